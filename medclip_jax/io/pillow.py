"""PNG, JPEG, BMP and TIFF through Pillow: grey, colour, palette, CMYK, alpha, 8 and 16 bit, pages.

The header is checked before anything is decoded, and whatever a decoder throws at broken bytes
becomes one `DataError` that names the file.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.ImageSequence
from jaxtyping import Float

from medclip_jax.errors import DataError
from medclip_jax.io.image import LUMA, Image, check_size, too_large

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
COLOUR = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "LA", "La", "CMYK", "YCbCr")


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
            kind = image.format or "unknown"
            return Image(_pages(path, image, kind), None, {"format": kind})
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: check the path or restore the file.") from error
    except PIL.UnidentifiedImageError as error:
        raise DataError(
            f"{path} is empty or is not a PNG, JPEG, BMP or TIFF image: replace or remove it."
        ) from error
    except PIL.Image.DecompressionBombError as error:
        raise DataError(too_large(path, "far more")) from error
    except Exception as error:  # a decoder fed hostile bytes may throw anything
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"{path} cannot be decoded ({reason}): the file is damaged or truncated, "
            "copy it again or remove it."
        ) from error


def _pages(path: Path, image: PIL.Image.Image, kind: str) -> Float[np.ndarray, "f h w"]:
    """Pages of a TIFF, all of one size; of other formats the one image (no MPO, no APNG)."""
    size = image.size
    check_size(path, *size)
    if kind != "TIFF":
        return _luminance(path, PIL.ImageOps.exif_transpose(image), kind)[None]
    pages = getattr(image, "n_frames", 1)
    check_size(path, *size, pages)
    found = []
    for page in PIL.ImageSequence.Iterator(image):
        if page.size != size:
            raise DataError(f"{path} has pages of several sizes: save each page as its own file.")
        found.append(_luminance(path, PIL.ImageOps.exif_transpose(page), kind))
    return np.stack(found)


def _luminance(path: Path, image: PIL.Image.Image, kind: str) -> Float[np.ndarray, "h w"]:
    """Scale by the stored type's full range; transparent pixels fade to black."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG")
    if deep:
        return np.asarray(image).astype(np.float32) / 65535
    if image.mode == "F":
        return _unit_float(path, np.asarray(image, np.float32))
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
    """Weighted sum of the bands, one at a time: three float bands at once would be dear."""
    bands = zip(LUMA, colour, strict=True)
    return np.minimum(sum(w * np.asarray(band, np.float32) for w, band in bands) / 255, 1)


def _unit_float(path: Path, pixels: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Floating-point files say nothing about their white: only [0, 1] is taken."""
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise DataError(f"{path} holds floats outside [0, 1] or NaN: scale them to [0, 1] first.")
    return pixels
