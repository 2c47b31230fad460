"""A scored test set and the file that holds it, predictions.npz.

It also holds small JPEG and PNG copies for the report. All files of a kind stand one after another
in one uint8 array and `_end` says where each ends, so that nothing needs pickle.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, Int

from medclip_jax import files
from medclip_jax.data import splits
from medclip_jax.data.layouts import Record
from medclip_jax.detectors.calibration import Calibration
from medclip_jax.explain import boxes
from medclip_jax.io import read

SIDE = 256  # pixels of the longer side of a copy, in the aspect of the original
MAP_SIDE = 128  # of maps, which are smooth
QUALITY = 80
MOST = 1000  # images in a report, which opens in seconds then and stays below 40 MB


class Predictions(NamedTuple):
    """A scored test set, on the host."""

    id: tuple[str, ...]
    label: Int[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]  # [0, 1], 0.5 is the calibrated threshold
    p_value: Float[np.ndarray, " n"]
    uncertainty: Float[np.ndarray, " n"]  # sd of the score over MC-dropout passes
    # encoder frame, [0, 1], 0.5 is the calibrated pixel threshold; on disk (files.temporary_array)
    maps: Float[np.ndarray, "n h w"]
    # equation (10): of every patch's unit value over the passes, g x g patches per image
    patch_mean: Float[np.ndarray, "n g g"]
    patch_variance: Float[np.ndarray, "n g g"]


class Scored(NamedTuple):
    """A scored test set, and what else is measured of it."""

    predictions: Predictions
    calibration: Calibration
    cams: Float[np.ndarray, "n p"] | None = None  # Grad-CAM per patch, [0, 1]
    uncertainties: dict[str, np.ndarray] | None = None  # measures beside the sd; None: no dropout


class Copies(NamedTuple):
    """Files of one image, b"" where there is none."""

    thumb: bytes
    thumb_mask: bytes
    thumb_map: bytes
    thumb_cam: bytes
    thumb_deviation: bytes


def write_predictions(
    workdir: Path,
    scored: Scored,
    test: Sequence[Record],
    fit: read.Mode,
    seed: int,
    counts: Float[np.ndarray, "n _ _"] | None = None,
    pictures: bool = True,
) -> None:
    """predictions.npz: one row per image, maps in the encoder's frame.

    Args:
        counts: for tables, `pixel_counts` of the images whose masks are known.
        pictures: also the arrays of `pack`, for the report.
    """
    p = scored.predictions
    more: dict[str, Any] = {} if counts is None else {"pixel_counts": counts}
    patients = splits.patient_numbers(test)
    more |= {} if patients is None else {"patient": patients}  # where one has several images
    units = np.array([r.unit for r in test], int)
    more |= {"unit": units} if (units >= 0).all() else {}
    if pictures:
        deviations = None  # nothing is random
        if scored.uncertainties is not None:
            deviations = np.sqrt(p.patch_variance).reshape(len(test), -1)
        more |= pack(test, p.maps, p.score >= 0.5, fit, scored.cams, deviations, seed)
    arrays: dict[str, Any] = {**p._asdict(), "id": np.array(p.id), **(scored.uncertainties or {})}
    with files.writing(workdir / "predictions.npz") as file:
        files.write_npz(file, {**arrays, **more})


def pack(
    records: Sequence[Record],
    maps: Float[np.ndarray, "n s s"] | Any,
    alarms: Bool[np.ndarray, " n"],
    fit: read.Mode,
    cams: Float[np.ndarray, "n p"] | None = None,
    deviations: Float[np.ndarray, "n p"] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Arrays for predictions.npz, of every image or of MOST sampled by seed.

    Args:
        maps: anomaly maps in the encoder's frame, [0, 1].
        alarms: of which images; the others have no boxes.
        cams: Grad-CAM of each patch, [0, 1].
        deviations: standard deviation of each patch's unit score over MC-dropout passes.

    Returns:
        `thumb_index` [m], rows of `records`; the fields of `Copies`, each with its `_end`; `frame`
        [m, 2], rows and columns of the original; `boxes` [b, 6], the fields of Box in the original,
        with `boxes_end`; `deviation_scale`, what grey level 255 of `thumb_deviation` stands for.
    """
    index = np.arange(len(records))
    if len(records) > MOST:
        index = np.sort(np.random.default_rng(seed).permutation(len(records))[:MOST])
    scale = 0.0 if deviations is None else float(deviations.max())

    def one(i: int):
        cam = None if cams is None else cams[i]
        deviation = deviations[i] / scale if deviations is not None and scale else None
        heat = maps[i].astype(np.float32)
        return _one(records[i], heat, bool(alarms[i]), (cam, deviation), fit)

    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(one, index.tolist()))
    marked = [box for _, each, _ in rows for box in each]
    arrays: dict[str, np.ndarray] = {
        "thumb_index": index,
        "frame": np.array([frame for frame, _, _ in rows], np.int32).reshape(-1, 2),
        "boxes": np.array(marked, np.float64).reshape(-1, len(boxes.Box._fields)),
        "boxes_end": np.cumsum([len(each) for _, each, _ in rows], dtype=np.int64),
    }
    for name in Copies._fields:
        arrays |= joined(name, [getattr(copies, name) for _, _, copies in rows])
    return arrays | ({"deviation_scale": np.array(scale)} if scale else {})


def joined(name: str, parts: Sequence[bytes]) -> dict[str, np.ndarray]:
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return {name: np.frombuffer(b"".join(parts), np.uint8), f"{name}_end": ends}


def _one(record: Record, map, alarm: bool, patches, fit: read.Mode):
    """Frame, boxes and copies of an image; patches: Grad-CAM and deviation [p], None if absent."""
    pixels = read.read(record.path, window=record.window).pixels[0]
    frame = (pixels.shape[0], pixels.shape[1])
    image = PIL.Image.fromarray(np.round(255 * pixels).astype(np.uint8))
    mask = b""
    if record.masks:
        lesion = read.read_mask(record.masks, frame, record.path)
        mask = small(PIL.Image.fromarray(lesion.astype(np.uint8) * 255), "PNG")
    squares = [x if x is None else read.to_square(x[None], MAP_SIDE)[0] for x in patches]
    sides = small_size(*frame, MAP_SIDE)
    greys = [b"" if x is None else grey(read.to_frame(x, *sides, fit)) for x in (map, *squares)]
    marked = boxes.decided(read.to_frame(map, *frame, fit), alarm)
    return frame, marked, Copies(small(image, "JPEG"), mask, *greys)


def small_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of a copy whose longer side is at most `side`."""
    scale = min(1, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def grey(unit: Float[np.ndarray, "h w"]) -> bytes:
    """PNG of values in [0, 1], times 256 and rounded down: 128 is what the threshold marks."""
    file = io.BytesIO()
    codes = np.clip(np.floor(256 * unit), 0, 255).astype(np.uint8)
    PIL.Image.fromarray(codes).save(file, "PNG")
    return file.getvalue()


def small(image: PIL.Image.Image, kind: str) -> bytes:
    """A copy of at most SIDE pixels; a PNG is 1-bit, a mask."""
    size = small_size(image.height, image.width, SIDE)[::-1]
    resample = PIL.Image.Resampling.NEAREST if kind == "PNG" else PIL.Image.Resampling.BILINEAR
    copy = image.resize(size, resample)
    if kind == "PNG":
        copy = copy.convert("1", dither=PIL.Image.Dither.NONE)
    file = io.BytesIO()
    copy.save(file, kind, quality=QUALITY, optimize=True)  # quality: of JPEG alone
    return file.getvalue()
