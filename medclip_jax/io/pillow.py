"""PNG, JPEG, BMP and TIFF through Pillow: read as grey, written as PNG, drawn as overlays.

The header is checked before anything is decoded, and whatever a decoder raises for broken bytes
becomes one `DataError` that names the file.
"""

import zlib
from collections.abc import Iterable
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps
import PIL.ImageSequence
import PIL.PngImagePlugin
from jaxtyping import Float, UInt8, UInt16, UInt32

from medclip_jax.errors import DataError
from medclip_jax.io.image import LUMA, Image, check_size, missing, reason, too_large

MARK = b"Software\0medclip_jax"  # text of every PNG that is written
FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
PHOTOMETRIC = 262  # TIFF tag; 0: white is zero
COLOUR = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "LA", "La", "CMYK", "YCbCr")
OVERLAY_SIDE = 1024  # pixels of an overlay's longer side at most
HEAT = 0.45  # weight of the anomaly map in an overlay
BOX = (230, 159, 0)  # orange of Okabe and Ito

PIL.PngImagePlugin.MAX_TEXT_CHUNK = 1 << 24  # profiles and texts of 1 MB and more are not unusual


def read_pillow(path: Path) -> Image:
    """Read one PNG, JPEG, BMP or TIFF.

    Returns:
      pixels [f, h, w]: luminance scaled by the stored type's full range, EXIF orientation applied,
      transparent pixels black; f is the number of pages of a TIFF, else 1. Spacing None: dots per
      inch say how large to print, not how large the patient was.

    Raises:
      DataError: missing, empty, truncated, too large, pages of several sizes, or a kind of pixel
        whose white is not known.
    """
    try:
        with PIL.Image.open(path, formats=FORMATS) as image:
            return Image(_pages(path, image), None, {"format": str(image.format)})
    except DataError:
        raise
    except FileNotFoundError as error:
        raise missing(path) from error
    except PIL.UnidentifiedImageError as error:
        raise DataError(
            f"{path} is empty or is not a PNG, JPEG, BMP or TIFF image: replace or remove it."
        ) from error
    except PIL.Image.DecompressionBombError as error:
        raise DataError(too_large(path, "far more")) from error
    except Exception as error:  # a decoder of hostile bytes may raise anything
        raise DataError(
            f"{path} cannot be decoded ({reason(error)}): the file is damaged or truncated, "
            "copy it again or remove it."
        ) from error


def pixels_of(path: Path) -> int:
    """Pixels of all pages as the header says, which Pillow reads without decoding."""
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

    Args:
      boxes: row0, col0, row1, col1 in pixels of the image, ends not included.
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
    pen = PIL.ImageDraw.Draw(picture)
    for box in boxes:
        corners = [box["col0"], box["row0"], box["col1"] - 1, box["row1"] - 1]
        pen.rectangle([round(v * scale) for v in corners], outline=BOX, width=2)
    return np.asarray(picture)


def _pages(path: Path, image: PIL.Image.Image) -> Float[np.ndarray, "f h w"]:
    """Pages of a TIFF, all of one size; of other formats the one image (no MPO, no APNG)."""
    size, file_format = image.size, str(image.format)
    check_size(path, *size)
    if file_format != "TIFF":
        return _luminance(path, PIL.ImageOps.exif_transpose(image), file_format)[None]
    check_size(path, *size, getattr(image, "n_frames", 1))
    pages = []
    for page in PIL.ImageSequence.Iterator(image):
        if page.size != size:
            raise DataError(f"{path} has pages of several sizes: save each page as its own file.")
        grey = _luminance(path, PIL.ImageOps.exif_transpose(page), file_format)
        white_is_zero = (
            page.mode.startswith("I;16") and getattr(page, "tag_v2", {}).get(PHOTOMETRIC) == 0
        )
        pages.append(1 - grey if white_is_zero else grey)  # Pillow inverts 8 bits, but not 16
    return np.stack(pages)


def _luminance(path: Path, image: PIL.Image.Image, file_format: str) -> Float[np.ndarray, "h w"]:
    """Scale by the stored type's full range; transparent pixels fade to black."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG"):
        return np.asarray(image).astype(np.float32) / 65535
    if image.mode == "F":
        pixels = np.asarray(image, np.float32)
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise DataError(
                f"{path} holds floats outside [0, 1] or NaN: scale them to [0, 1] first."
            )
        return pixels
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return np.asarray(image.convert("L"), np.float32) / 255
    if image.mode not in COLOUR + ("1", "L"):
        raise DataError(
            f"{path} holds pixels of kind '{image.mode}', whose white is not known: "
            "save it as 8-bit or 16-bit grey or as RGB."
        )
    if image.has_transparency_data:
        *colour, alpha = image.convert("RGBA").split()
        return _mix(colour) * (np.asarray(alpha, np.float32) / 255)
    return _mix(image.convert("RGB").split())


def _mix(colour: Iterable[PIL.Image.Image]) -> Float[np.ndarray, "h w"]:
    """Weighted sum of the bands, one at a time, since three as floats would take much memory."""
    bands = zip(LUMA, colour, strict=True)
    return np.minimum(sum(w * np.asarray(band, np.float32) for w, band in bands) / 255, 1)


@cache
def _blends() -> UInt32[np.ndarray, " 65536"]:
    """Colour (four bytes, the last unused) at 256 * grey + heat: looked up, not computed."""
    import matplotlib  # slow to import

    palette = (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)
    blend = ((1 - HEAT) * np.arange(256)[:, None, None] + HEAT * palette).astype(np.uint8)
    padded = np.concatenate([blend, np.full((256, 256, 1), 255, np.uint8)], axis=2)
    return padded.reshape(-1, 4).copy().view(np.uint32).ravel()
