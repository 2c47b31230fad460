"""PNG, JPEG and BMP through Pillow: read as grey, written as PNG, drawn as overlays.

The header is checked before anything is decoded, and whatever a decoder raises for broken bytes
becomes one `DataError` that names the file.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageChops
import PIL.ImageDraw
import PIL.ImageFilter
import PIL.ImageOps
import PIL.PngImagePlugin
from jaxtyping import Float, UInt8, UInt16, UInt32

from medclip_jax.errors import DataError
from medclip_jax.io import jpeg_header
from medclip_jax.io.image import (
    MAX_PIXELS,
    Frames,
    bands,
    check_regular,
    check_size,
    in_memory,
    luma,
    reason,
    too_large,
)

MARK = b"Software\0medclip_jax"  # text of every PNG that is written
FORMATS = ("PNG", "JPEG", "BMP")
COLOUR = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "LA", "La", "CMYK", "YCbCr")
OVERLAY_SIDE = 1024  # pixels of an overlay's longer side at most
HEAT = 0.45  # weight of the anomaly map in an overlay
BOX = (230, 159, 0)  # orange of Okabe and Ito
CONTOUR = (240, 228, 66)  # their yellow

PIL.PngImagePlugin.MAX_TEXT_CHUNK = 1 << 24  # profiles and texts of 1 MB and more are not unusual
PIL.Image.core.set_block_size(1 << 26)  # bytes: freed blocks of 32 MB go back to the system


def open_pillow(path: Path) -> Frames:
    """Open one PNG, JPEG or BMP.

    Returns:
      Frames of luminance scaled by the full range of the stored type (colour: of 8 bits), EXIF
      orientation applied, transparent pixels black; more than one of an animated PNG alone. Spacing
      None: dots per inch say how large to print, not how large the patient was.

    Raises:
      DataError: missing, no regular file, empty, truncated, too large, or another kind of file.
    """
    with readable(path), path.open("rb") as file:
        with PIL.Image.open(file, formats=FORMATS) as image:
            pixels, words = _frames(path, file, image)
            return in_memory(pixels, str(image.format), words)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A regular file, whose decoder's errors become one DataError that names it."""
    check_regular(path)
    try:
        yield
    except DataError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise DataError(f"{path} {_what_else(path)}: replace or remove it.") from error
    except PIL.Image.DecompressionBombError as error:
        raise DataError(too_large(path, "far more")) from error
    except Exception as error:  # a decoder of hostile bytes may raise anything
        raise DataError(
            f"{path} cannot be decoded ({reason(error)}): the file is damaged or truncated, "
            "copy it again or remove it."
        ) from error


def pixels_of(path: Path) -> int:
    """Pixels of all frames as the header says."""
    with PIL.Image.open(path, formats=FORMATS) as image:
        return image.width * image.height * int(getattr(image, "n_frames", 1))


def encode_png(pixels: UInt8[np.ndarray, "h w *_"] | UInt16[np.ndarray, "h w"]) -> bytes:
    """A PNG of grey (8 or 16 bits) or RGB [h, w, 3] (8 bits) pixels, compressed for speed."""
    buffer = BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return marked(buffer.getvalue())


def marked(png: bytes) -> bytes:
    """The same PNG with a text chunk after its header that says which program wrote it."""
    chunk = b"tEXt" + MARK
    sizes = len(MARK).to_bytes(4), zlib.crc32(chunk).to_bytes(4)
    return png[:33] + sizes[0] + chunk + sizes[1] + png[33:]


def draw_overlay(
    pixels: UInt8[np.ndarray, "h w"], heat: Float[np.ndarray, "h w"], boxes: list[dict]
) -> UInt8[np.ndarray, "a b 3"]:
    """A grey image with its anomaly map [0, 1] in colour and boxes; RGB, at most 1024 x 1024.

    Where there are boxes, a line of one pixel runs along the border of what is at least 0.5.

    Args:
      boxes: row0, col0, row1, col1 in pixels of the image, ends not included; score, and where it
        is known height_mm and width_mm, are written beside them.
    """
    height, width = pixels.shape
    scale = min(1.0, OVERLAY_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    grey, warm = PIL.Image.fromarray(pixels), PIL.Image.fromarray(heat)
    if scale < 1:
        grey = grey.resize(size, PIL.Image.Resampling.BOX)
        warm = warm.resize(size, PIL.Image.Resampling.BILINEAR)
    level = np.clip(np.asarray(warm) * 255, 0, 255).astype(np.uint8)
    colours = _blends()[np.asarray(grey).astype(np.intp) * 256 + level]
    picture = PIL.Image.frombuffer("RGBX", size, colours.tobytes(), "raw", "RGBX", 0, 1)
    picture = picture.convert("RGB")
    if boxes:
        inside = PIL.Image.fromarray((np.asarray(warm) >= 0.5).astype(np.uint8) * 255)
        edge = PIL.ImageChops.difference(inside, inside.filter(PIL.ImageFilter.MinFilter(3)))
        picture.paste(CONTOUR, mask=edge)
    pen = PIL.ImageDraw.Draw(picture)
    for box in boxes:
        corners = [box["col0"], box["row0"], box["col1"] - 1, box["row1"] - 1]
        left, top, right, bottom = (round(v * scale) for v in corners)
        pen.rectangle([left, top, right, bottom], outline=BOX, width=2)
        text = f"{box['score']:.2f}" if "score" in box else ""
        if "height_mm" in box:
            text += f"  {box['height_mm']:.0f} x {box['width_mm']:.0f} mm"
        below = bottom + 2 if bottom + 14 <= size[1] else max(0, top - 13)
        if text:
            pen.text((left, below), text, BOX, stroke_width=1, stroke_fill="black")
    return np.asarray(picture)


def _what_else(path: Path) -> str:
    """What a file is that Pillow does not know."""
    with path.open("rb") as file:
        head = jpeg_header.parse(file.read(1 << 20))
    if head is None:
        return "is not a PNG, JPEG, BMP or TIFF image"
    return f"is a JPEG of {head.precision} bits or without loss, which is not read"


def _frames(path: Path, file: BinaryIO, image: Any) -> tuple[Float[np.ndarray, "f h w"], str]:
    """Frames of an animated PNG, of others the one image (the first of an MPO), and their range."""
    count = getattr(image, "n_frames", 1) if image.format == "PNG" else 1
    check_size(path, image.width, image.height, count)
    if image.width * image.height * count > MAX_PIXELS:  # all in memory
        raise DataError(too_large(path, f"{image.width} x {image.height} x {count}"))
    if image.mode == "P" and not (image.palette and image.palette.palette):
        raise DataError(
            f"{path} has colours by number and no palette: it is damaged, copy it again."
        )
    words = "0 to 65535" if image.mode.startswith("I") else "0 to 255"
    if str(args := image.tile[0].args if image.tile else "") == "LA;16B":  # else read with 8 bits
        image.tile, image._mode = [image.tile[0]._replace(args="RGBA")], "RGBA"
        grey, alpha = np.moveaxis(np.asarray(upright(image)).view(">u2"), 2, 0)
        grey = grey / np.float32(65535)
        grey *= alpha / np.float32(65535)
        return grey[None], "0 to 65535"
    if str(args).endswith("16B") and image.mode in COLOUR and count == 1:  # too
        return _deep_colour(file, image)[None], "colour: 0 to white"
    if image.mode in COLOUR and "L" not in image.mode:
        words = "colour: 0 to white"
    stream = b""
    if image.format in ("JPEG", "MPO"):
        file.seek(0)
        stream = file.read()
        jpeg_header.check_scans(path, stream)
    scale = {"L;2": 85, "L;4": 17}.get(str(args), 1)
    frames = [luminance(path, image, scale)]
    if stream:
        last = image.getpixel((image.width - 1, image.height - 1))
        if jpeg_header.ends_early(stream, last, lambda x: np.asarray(PIL.Image.open(BytesIO(x)))):
            raise DataError(f"{path} stops before its last pixel: it is truncated, copy it again.")
    for index in range(1, count):
        image.seek(index)
        frames.append(luminance(path, image, scale))
    return (np.stack(frames) if count > 1 else frames[0][None]), words


def _deep_colour(file: BinaryIO, image: Any) -> Float[np.ndarray, "h w"]:
    """Luminance of 16-bit colour: Pillow gives upper bytes and, taken as little-endian, lower."""
    clear, high = image.info.get("transparency"), upright(image)
    high.load()
    file.seek(0)
    again: Any = PIL.Image.open(file, formats=("PNG",))
    again.tile = [again.tile[0]._replace(args=again.tile[0].args.replace("16B", "16L"))]
    low, white = upright(again), np.float32(65535)
    grey = np.empty(high.size[::-1], np.float32)
    for rows in bands(grey.shape):
        box = (0, rows.start, high.width, min(rows.stop, high.height))
        values = np.asarray(high.crop(box)).astype(np.uint16) << 8 | np.asarray(low.crop(box))
        grey[rows] = np.minimum(luma(values[..., i] for i in range(3)) / white, 1)
        if high.mode == "RGBA":
            grey[rows] *= values[..., 3] / white
        elif clear is not None:
            grey[rows] *= (values != clear).any(2)
    return grey


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turned as its EXIF says; the image itself where that is how it lies."""
    turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1
    return PIL.ImageOps.exif_transpose(image) if turned else image


def luminance(path: Path, image: PIL.Image.Image, scale: int = 1) -> Float[np.ndarray, "h w"]:
    """Scale by the stored type's full range; transparent pixels fade to black.

    Args:
      scale: of the grey value that is transparent.
    """
    clear, image = image.info.get("transparency"), upright(image)
    if image.mode.startswith("I") or image.mode in ("1", "L") and not isinstance(clear, bytes):
        white = 65535 if image.mode.startswith("I") else 255
        values = np.asarray(image if white > 255 else image.convert("L"))
        grey = values.astype(np.float32) / white
        return grey if clear is None else np.where(values == clear * scale, np.float32(0), grey)
    if image.mode not in COLOUR:
        raise DataError(
            f"{path} holds pixels of kind '{image.mode}', whose white is not known: "
            "save it as 8-bit or 16-bit grey or as RGB."
        )
    grey = np.empty(image.size[::-1], np.float32)
    for rows in bands(grey.shape):
        part = image.crop((0, rows.start, image.width, min(rows.stop, image.height)))
        see_through = part.has_transparency_data
        split = part.convert("RGBA" if see_through else "RGB").split()
        grey[rows] = np.minimum(luma(split[:3]) / 255, 1)
        if see_through:
            grey[rows] *= np.asarray(split[3], np.float32) / 255
    return grey


@cache
def _blends() -> UInt32[np.ndarray, " 65536"]:
    """Colour (four bytes, the last unused) at 256 * grey + heat: looked up, not computed."""
    import matplotlib  # slow to import

    palette = (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)
    blend = ((1 - HEAT) * np.arange(256)[:, None, None] + HEAT * palette).astype(np.uint8)
    padded = np.concatenate([blend, np.full((256, 256, 1), 255, np.uint8)], axis=2)
    return padded.reshape(-1, 4).copy().view(np.uint32).ravel()
