"""Small copies of test images, masks, maps and Grad-CAMs, kept with the predictions for the report.

JPEG for the image and 1-bit PNG for the mask, at most 256 pixels a side; 8-bit PNG for map and
Grad-CAM, at most 128; all in the aspect of the original. A byte of a map is its value times 256,
rounded down, so 128 and more is what the pixel threshold marks. All files of a kind stand one
after another in one uint8 array and `_end` says where each ends, so that nothing needs pickle.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float

from medclip_jax.data.records import Record
from medclip_jax.explain import grad_cam
from medclip_jax.io import read

SIDE = 256  # pixels of the longer side
MAP_SIDE = 128  # of maps, which are smooth
QUALITY = 80  # of JPEG
MOST = 1000  # images in a report, which opens in seconds then and stays below 40 MB
FILES = ("thumb", "thumb_mask", "thumb_map", "thumb_cam")


def pack(
    records: Sequence[Record],
    maps: Float[np.ndarray, "n s s"] | Any,
    fit: read.Mode,
    cams: Float[np.ndarray, "n p"] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Arrays thumb, thumb_mask, thumb_map, thumb_cam, each with its _end, and frame [n, 2].

    maps: tower frame, [0, 1]. cams: per patch, [0, 1]. `frame` is the size (rows, columns) of the
    original. There is no mask file where no lesion is known, no cam file without `cams`.
    Of more than MOST images so many are kept, drawn by seed: `thumb_index` says which.
    """
    kept = np.arange(len(records))
    if len(records) > MOST:
        kept = np.sort(np.random.default_rng(seed).permutation(len(records))[:MOST])

    def one(i: int):
        cam = None if cams is None else grad_cam.to_square(cams[i : i + 1], MAP_SIDE)[0]
        return _one(records[i], maps[i], cam, fit)

    with ThreadPoolExecutor() as pool:
        made = list(pool.map(one, kept.tolist()))
    frames = np.array([frame for frame, _ in made], np.int32).reshape(-1, 2)
    arrays: dict[str, np.ndarray] = {"frame": frames, "thumb_index": kept}
    for i, name in enumerate(FILES):
        arrays |= _joined(name, [parts[i] for _, parts in made])
    return arrays


def _one(record: Record, heat, cam, fit: read.Mode) -> tuple[tuple[int, int], tuple[bytes, ...]]:
    pixels = read.read(record.path, window=record.window).pixels[0]
    frame = (pixels.shape[0], pixels.shape[1])
    image = PIL.Image.fromarray(np.round(255 * pixels).astype(np.uint8))
    mask = b""
    if record.masks:
        lesion = read.read_mask(record.masks, frame)
        mask = _file(PIL.Image.fromarray(lesion.astype(np.uint8) * 255), "PNG")
    sides = small_size(*frame, MAP_SIDE)
    grey = [b"" if x is None else _grey(read.to_frame(x, *sides, fit)) for x in (heat, cam)]
    return frame, (_file(image, "JPEG"), mask, *grey)


def small_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of a copy whose longer side is at most `side`."""
    scale = min(1, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _grey(unit: Float[np.ndarray, "h w"]) -> bytes:
    held = io.BytesIO()
    codes = np.clip(np.floor(256 * unit), 0, 255).astype(np.uint8)
    PIL.Image.fromarray(codes).save(held, "PNG", optimize=True)
    return held.getvalue()


def _file(image: PIL.Image.Image, kind: str) -> bytes:
    size = small_size(image.height, image.width, SIDE)[::-1]
    how = PIL.Image.Resampling.NEAREST if kind == "PNG" else PIL.Image.Resampling.BILINEAR
    small = image.resize(size, how)
    held = io.BytesIO()
    if kind == "PNG":
        small.convert("1", dither=PIL.Image.Dither.NONE).save(held, kind, optimize=True)
    else:
        small.save(held, kind, quality=QUALITY, optimize=True)
    return held.getvalue()


def _joined(name: str, parts: Sequence[bytes]) -> dict[str, np.ndarray]:
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return {name: np.frombuffer(b"".join(parts), np.uint8), f"{name}_end": ends}
