"""Test images on the page: data for the viewer's script, and a gallery that can be printed.

Reads the arrays that `evaluation.thumbnails.pack` left in predictions.npz.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from medclip_jax.explain.boxes import Box
from medclip_jax.io import pillow

FILES = {  # of a Picture -> of predictions.npz
    "image": "thumb",
    "map": "thumb_map",
    "mask": "thumb_mask",
    "cam": "thumb_cam",
    "deviation": "thumb_deviation",
}
ROWS = 4  # of the gallery on one printed page
CELL, LABEL, HEAD = 256, 120, 28  # pixels: side of an image, width of the labels, height of titles
GROUND, INK, OUTLINE = "#1b1b1b", "#dcdcdc", "#56B4E9"


class Picture(NamedTuple):
    """Small copies of a test image, PNG or JPEG; b"" where there is none."""

    image: bytes
    map: bytes  # grey level / 256 is the unit score
    mask: bytes
    cam: bytes
    deviation: bytes  # grey level 255 is the largest of the test set
    frame: tuple[int, int]  # rows and columns of the original
    boxes: list[Box]  # in the original


def pictures(arrays: Mapping[str, np.ndarray], n: int) -> list[Picture | None]:
    """Of each of n images; None for those without small copies, no entry if there are none at all.

    Raises:
        ValueError: the arrays do not fit together.
    """
    if "frame" not in arrays:
        return []
    frames, index, boxes = arrays["frame"], arrays["thumb_index"], arrays["boxes"]
    files = {name: unpack(arrays, stored) for name, stored in FILES.items()}
    ends = arrays["boxes_end"]
    columns = (frames, ends, *files.values())
    if any(len(x) != len(index) for x in columns) or not set(index.tolist()) <= set(range(n)):
        raise ValueError("its small copies are not one per image")
    rows: list[Picture | None] = [None] * n
    for place, i in enumerate(index):
        own = boxes[ends[place - 1] if place else 0 : ends[place]].tolist()
        copies = {name: files[name][place] for name in FILES}
        height, width = frames[place].tolist()
        each = [Box(*map(int, box[:4]), box[4], int(box[5])) for box in own]
        rows[i] = Picture(**copies, frame=(height, width), boxes=each)
    return rows


def unpack(arrays: Mapping[str, np.ndarray], name: str) -> list[bytes]:
    """The files that were joined under `name`, b"" where there is none."""
    data, ends = arrays[name].tobytes(), arrays[f"{name}_end"].tolist()
    starts = [0, *ends[:-1]] if ends else []
    if any(a > b for a, b in zip(starts, ends, strict=True)) or ends[-1:] not in ([], [len(data)]):
        raise ValueError(f"the files of {name!r} are not where {name}_end says")
    return [data[a:b] for a, b in zip(starts, ends, strict=True)]


def as_script(pictures: Sequence[Picture | None], **more: Any) -> str:
    """JSON for the viewer; it can stand inside a script element, whatever its strings hold."""
    from matplotlib import colormaps

    palette = colormaps["inferno"](np.arange(256), bytes=True)[:, :3].tobytes().hex()
    entries = [p and {**p._asdict(), **{name: uri(getattr(p, name)) for name in FILES}}
               for p in pictures]  # fmt: skip
    value = {"colours": palette, "images": entries, **more}
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def uri(data: bytes) -> str:
    """A PNG or JPEG as a data URI, "" for none."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}" if data else ""


def gallery(pictures: Sequence[Picture], labels: Sequence[str], cam: str) -> list[bytes]:
    """Pages of at most ROWS rows: image, map, boxes and outline of the mask, Grad-CAM (PNG).

    Args:
        labels: lines beside each row.
        cam: title of the last column.
    """
    rows = list(zip(pictures, labels, strict=True))
    return [_page(rows[i : i + ROWS], cam) for i in range(0, len(rows), ROWS)]


def stacked(pages: Sequence[bytes]) -> bytes:
    """The pages below one another as one PNG."""
    images = [Image.open(io.BytesIO(page)) for page in pages]
    sheet = Image.new("RGB", (images[0].width, sum(i.height for i in images)), GROUND)
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return _png(sheet)


def _page(rows: Sequence[tuple[Picture, str]], cam: str) -> bytes:
    sheet = Image.new("RGB", (LABEL + 4 * CELL, HEAD + len(rows) * CELL), GROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, title in enumerate(("image", "anomaly map", "boxes and true mask", cam)):
        place = (LABEL + (column + 0.5) * CELL, HEAD / 2)
        pen.text(place, title, INK, font, anchor="mm")
    for row, (picture, label) in enumerate(rows):
        top = HEAD + row * CELL
        pen.multiline_text((8, top + CELL / 2), label, INK, font, anchor="lm", spacing=6)
        for column, cell in enumerate(_cells(picture)):
            cell.thumbnail((CELL - 6, CELL - 6))
            left = LABEL + column * CELL + (CELL - cell.width) // 2
            sheet.paste(cell, (left, top + (CELL - cell.height) // 2))
    return _png(sheet)


def _cells(picture: Picture) -> list[Image.Image]:
    image = Image.open(io.BytesIO(picture.image)).convert("L")
    marked = image.convert("RGB")
    if picture.mask:
        mask = Image.open(io.BytesIO(picture.mask)).convert("L")
        edge = ImageChops.difference(mask.filter(ImageFilter.MaxFilter(5)), mask)
        marked.paste(OUTLINE, mask=edge)
    pen = ImageDraw.Draw(marked)
    y, x = image.height / picture.frame[0], image.width / picture.frame[1]
    for box in picture.boxes:
        corners = (box.col0 * x, box.row0 * y, box.col1 * x - 1, box.row1 * y - 1)
        pen.rectangle(corners, outline="black", width=3)
        pen.rectangle(corners, outline=pillow.BOX, width=2)
    cells = [image.convert("RGB"), _blend(image, picture.map), marked]
    return cells + ([_blend(image, picture.cam)] if picture.cam else [])


def _blend(image: Image.Image, grey: bytes) -> Image.Image:
    heat = Image.open(io.BytesIO(grey)).resize(image.size, Image.Resampling.BILINEAR)
    unit = np.asarray(heat, np.float32) / 256
    return Image.fromarray(pillow.draw_overlay(np.asarray(image), unit, []))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
