"""What the report's script needs to show any test image: pictures as data URIs, and boxes.

Reads the arrays that `thumbnails.pack` left in predictions.npz; no JAX, no data set.
"""

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from medclip_jax.explain.boxes import boxes_of

FILES = {"image": "thumb", "mask": "thumb_mask", "map": "thumb_map", "cam": "thumb_cam"}
KINDS = {"image": "jpeg", "mask": "png", "map": "png", "cam": "png"}


def pictures(arrays: Mapping[str, np.ndarray], n: int) -> list[dict[str, Any] | None]:
    """Of each of n images: data URIs of image, mask, map, cam ("" where absent), boxes, frame.

    Boxes are [row0, col0, row1, col1, score] in the original frame, score in [0, 1]. None for an
    image whose small copies were not kept; empty if the workdir was written without any. Raises
    ValueError for arrays that do not fit.
    """
    if "frame" not in arrays:
        return []
    frames = arrays["frame"]
    files = {name: unpack(arrays, held) for name, held in FILES.items()}
    index = arrays["thumb_index"] if "thumb_index" in arrays else np.arange(n)
    right = index.ndim == 1 and ((index >= 0) & (index < n)).all()
    if frames.shape != (len(index), 2) or any(len(x) != len(index) for x in files.values()):
        right = False
    if not right:
        raise ValueError("its small copies are not one per image")
    rows: list[dict[str, Any] | None] = [None] * n
    for place, (i, (height, width)) in enumerate(zip(index, frames.tolist(), strict=True)):
        row = {name: _uri(files[name][place], KINDS[name]) for name in FILES}
        found = _boxes(files["map"][place], height, width)
        rows[i] = {**row, "boxes": found, "frame": [height, width]}
    return rows


def unpack(arrays: Mapping[str, np.ndarray], name: str) -> list[bytes]:
    """The files that were joined under `name`, b"" where there is none."""
    data, ends = arrays[name].tobytes(), [int(x) for x in arrays[f"{name}_end"]]
    starts = [0, *ends[:-1]] if ends else []
    if any(a > b for a, b in zip(starts, ends, strict=True)) or ends[-1:] not in ([], [len(data)]):
        raise ValueError(f"the files of {name!r} are not where {name}_end says")
    return [data[a:b] for a, b in zip(starts, ends, strict=True)]


def colours(name: str = "cividis") -> str:
    """256 colours of a map that colour-blind readers can read, as 6 hex digits each."""
    from matplotlib import colormaps

    return "".join(bytes(row[:3]).hex() for row in colormaps[name](np.arange(256), bytes=True))


def as_script(value: Any) -> str:
    """JSON that can stand inside a script element, whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _boxes(png: bytes, height: int, width: int) -> list[list[float]]:
    from PIL import Image

    codes = np.asarray(Image.open(io.BytesIO(png)), np.float32)
    rows, columns = height / codes.shape[0], width / codes.shape[1]
    return [
        [
            *(round(x) for x in (b.row0 * rows, b.col0 * columns, b.row1 * rows, b.col1 * columns)),
            round(b.score + 0.5 / 256, 3),
        ]
        for b in boxes_of(codes / 256)
    ]


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}" if data else ""
