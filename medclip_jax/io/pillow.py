"""PNG, JPEG, BMP and TIFF as grey: through Pillow, and tifffile where it knows more kinds.

The header is checked before anything is decoded, and whatever a decoder raises for broken bytes
becomes one `DataError` that names the file.
"""

import logging
import math
import zlib
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin
import tifffile
from jaxtyping import Float

from medclip_jax.errors import DataError
from medclip_jax.io import jpeg_header
from medclip_jax.io.image import (
    LUMA,
    MAX_FRAMES,
    Image,
    check_regular,
    check_size,
    luma,
    reason,
    scaled,
    too_large,
)

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
# of TIFF 6.0: orientation tag, photometric interpretations, sample format, extra sample
ORIENTATION, WHITE_IS_ZERO, RGB, PALETTE, SIGNED, UNASSOCIATED = 274, 0, 2, 3, 2, 2
OURS = (1, 8, 32946)  # compressions: none, deflate
PLAIN = (WHITE_IS_ZERO, 1, RGB, PALETTE)
COLOUR = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "LA", "La", "CMYK", "YCbCr")

logging.getLogger("tifffile").setLevel(logging.CRITICAL)
PIL.PngImagePlugin.MAX_TEXT_CHUNK = 1 << 24  # profiles and texts of 1 MB and more are not unusual


def read_pillow(path: Path) -> Image:
    """Read one PNG, JPEG, BMP or TIFF.

    Returns:
      pixels [f, h, w]: luminance, EXIF or TIFF orientation applied, transparent pixels black.
      Unsigned values are scaled by the full range of their bits, up to 16; floats within [0, 1] are
      taken as they are; whatever else a TIFF holds is stretched over all its pages as
      `image.stretch_of` says. f is the number of pages of a TIFF or frames of an animated PNG, else
      1. Spacing None: dots per inch say how large to print, not how large the patient was.

    Raises:
      DataError: missing, no regular file, empty, truncated, too large, pages of several sizes or
        kinds, or a kind of pixel that is not read.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            if _is_tiff(file):
                pixels, words = _tiff(path, file)
                return Image(pixels, None, {"format": "TIFF"}, words)
            with PIL.Image.open(file, formats=FORMATS) as image:
                pixels, words = _frames(path, file, image)
                return Image(pixels, None, {"format": str(image.format)}, words)
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
    """Pixels of all pages as the header says, which is read without decoding."""
    check_regular(path)
    with path.open("rb") as file:
        if _is_tiff(file):
            with tifffile.TiffFile(file) as tif:
                pages: list[Any] = _directories(path, tif)
                return pages[0].imagewidth * pages[0].imagelength * _count(tif, pages)
        with PIL.Image.open(file, formats=FORMATS) as image:
            return image.width * image.height * int(getattr(image, "n_frames", 1))


def _what_else(path: Path) -> str:
    """What a file is that Pillow does not know."""
    with path.open("rb") as file:
        head = jpeg_header.parse(file.read(1 << 20))
    if head is None:
        return "is not a PNG, JPEG, BMP or TIFF image"
    return f"is a JPEG of {head.precision} bits or without loss, which is not read"


# --- PNG, JPEG, BMP ------------------------------------------------------------------------------


def _frames(path: Path, file: BinaryIO, image: Any) -> tuple[Float[np.ndarray, "f h w"], str]:
    """Frames of an animated PNG, of others the one image (the first of an MPO), and their range."""
    count = getattr(image, "n_frames", 1) if image.format == "PNG" else 1
    check_size(path, image.width, image.height, count)
    words = "0 to 65535" if image.mode.startswith("I") else "0 to 255"
    if str(args := image.tile[0].args if image.tile else "") == "LA;16B":  # else read with 8 bits
        image.tile, image._mode = [image.tile[0]._replace(args="RGBA")], "RGBA"
        grey, alpha = np.moveaxis(_upright(image).view(">u2"), 2, 0)
        return (grey / np.float32(65535) * (alpha / np.float32(65535)))[None], "0 to 65535"
    if image.mode in COLOUR and "L" not in image.mode:
        words = "colour: 0 to white"
    scale = {"L;2": 85, "L;4": 17}.get(str(args), 1)
    frames = [_luminance(path, image, scale)]
    if image.format == "JPEG":
        file.seek(0)
        last = image.getpixel((image.width - 1, image.height - 1))
        if jpeg_header.ends_early(
            file.read(), last, lambda x: np.asarray(PIL.Image.open(BytesIO(x)))
        ):
            raise DataError(f"{path} stops before its last pixel: it is truncated, copy it again.")
    for index in range(1, count):
        image.seek(index)
        frames.append(_luminance(path, image, scale))
    return np.stack(frames), words


def _upright(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(PIL.ImageOps.exif_transpose(image))


def _luminance(path: Path, image: PIL.Image.Image, scale: int = 1) -> Float[np.ndarray, "h w"]:
    """Scale by the stored type's full range; transparent pixels fade to black.

    Args:
      scale: of the grey value that is transparent.
    """
    clear, image = image.info.get("transparency"), PIL.ImageOps.exif_transpose(image)
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
    if image.has_transparency_data:
        *colour, alpha = image.convert("RGBA").split()
        return np.minimum(luma(colour) / 255, 1) * (np.asarray(alpha, np.float32) / 255)
    return np.minimum(luma(image.convert("RGB").split()) / 255, 1)


# --- TIFF ----------------------------------------------------------------------------------------


def _is_tiff(file: BinaryIO) -> bool:
    start = file.read(4)
    file.seek(0)
    return start in TIFF


def _directories(path: Path, tif: Any) -> list[Any]:
    """Pages of full size, which are alike; DataError for what is not read or too large."""
    pages = [p for p in islice(tif.pages, MAX_FRAMES + 1) if not (p.index and p.is_reduced)]
    first = pages[0]
    check_size(path, first.imagewidth, first.imagelength, _count(tif, pages))
    if len({(p.shaped, p.dtype, p.photometric, p.bitspersample) for p in pages}) > 1:
        raise DataError(
            f"{path} has pages of several sizes or kinds: save each page as its own file."
        )
    if first.samplesperpixel > 5 or first.imagedepth > 1 or np.dtype(first.dtype).kind == "c":
        raise DataError(
            f"{path} has {first.samplesperpixel} values ({first.dtype}) per pixel and "
            f"{first.imagedepth} layers per page: save it as grey or RGB."
        )
    return pages


def _count(tif: Any, pages: list[Any]) -> int:
    """Number of images: pages, or those that follow each other behind the one page there is."""
    first, images = pages[0], 1
    if first.is_imagej:
        images = int((tif.imagej_metadata or {}).get("images", 1))
    elif tif.is_shaped:
        images = math.prod(tif.shaped_metadata[0]["shape"]) // math.prod(first.shape)
    elif first.is_stk:
        images = first.tags["UIC2tag"].count
    return images if len(pages) == 1 else len(pages)


def _tiff(path: Path, file: BinaryIO) -> tuple[Float[np.ndarray, "f h w"], str]:
    """All images of one TIFF and what became 0 and 1."""
    with tifffile.TiffFile(file) as tif:
        pages: list[Any] = _directories(path, tif)
        first, count = pages[0], _count(tif, pages)
        kind = first.dtype and np.dtype(first.dtype)
        plain = kind is not None and first.bitspersample == 8 * kind.itemsize
        plain = plain and first.photometric in PLAIN
        white = 65535.0 if first.photometric == PALETTE else None
        if white is None and kind in (np.uint8, np.uint16):
            white = 2.0**first.bitspersample - 1
        invert, words = first.photometric == WHITE_IS_ZERO, ""
        if count > len(pages):
            if not (plain and first.is_contiguous):
                raise DataError(
                    f"{path} has {count} images in one directory, packed so that they cannot be "
                    "told apart: save each as a page or a file of its own."
                )
            values = [_grey(first, x) for x in _behind_each_other(path, file, tif, count)]
        elif plain and kind != np.uint8 and first.compression in OURS and first.predictor < 3:
            values = [_grey(page, _inflated(page)) for page in pages]
        else:
            file.seek(0)  # Pillow would map a named file and forget its orientation
            with _opened(path, file, tif) as image:
                if image.mode in ("1", "L") and first.sampleformat == SIGNED:
                    white, invert = None, False  # Pillow inverts 8 bits itself, but not 16
                elif not image.mode.startswith(("I", "F")):
                    white, invert, words = 1.0, False, "0 to white"
                values = [_of_pillow(path, image, page) for page in pages]
    pixels, words = scaled(path, values, white, words)
    return (1 - pixels if invert else pixels), words


def _opened(path: Path, file: BinaryIO, tif: Any) -> PIL.Image.Image:
    """By Pillow, which need not know every kind of page, and takes some for others."""
    try:
        image = PIL.Image.open(file, formats=("TIFF",))
        if image.mode in ("I", "F") and tif.byteorder == ">":  # decoded as if it were not
            raise PIL.UnidentifiedImageError
        return image
    except PIL.UnidentifiedImageError as error:
        page: Any = tif.pages[0]
        raise DataError(
            f"{path} is a TIFF of {page.samplesperpixel} x {page.bitspersample} bits per pixel "
            f"(compression {int(page.compression)}, photometric {int(page.photometric)}), which is "
            "not read: save it uncompressed as 8-bit or 16-bit grey or as RGB."
        ) from error


def _of_pillow(path: Path, image: PIL.Image.Image, page: Any) -> np.ndarray:
    """Stored values of a page, upright; in [0, 1] where they are not single numbers."""
    image.seek(page.index)
    signed = page.sampleformat == SIGNED
    if not image.mode.startswith(("I", "F")) and not (signed and image.mode == "L"):
        return _luminance(path, image)
    values = _upright(image)
    if image.mode == "L":
        return values.view(np.int8)
    return values.view(np.uint32) if image.mode == "I" and not signed else values


def _inflated(page: Any) -> np.ndarray:
    """Stored values [samples, 1, h, w, c]; raises where a piece unpacks to more than it should."""
    if page.compression != 1:
        limit = math.prod(page.chunks) * page.dtype.itemsize
        for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
            page.parent.filehandle.seek(offset)
            packed = page.parent.filehandle.read(size)
            if len(zlib.decompressobj().decompress(packed, limit + 1)) > limit:
                raise ValueError("a piece of it unpacks to more than its size")
    return page.asarray(squeeze=False)


def _behind_each_other(path: Path, file: BinaryIO, tif: Any, count: int) -> np.ndarray:
    """Images of one directory, as ImageJ and others write stacks: [count, samples, 1, h, w, c]."""
    page = tif.pages[0]
    file.seek(page.dataoffsets[0])
    size = count * page.nbytes
    raw = file.read(size)
    if len(raw) < size:
        raise DataError(
            f"{path} holds {len(raw):,} of the {size:,} bytes of its {count} images: it is "
            "truncated, copy it again."
        )
    return np.frombuffer(raw, page.dtype.newbyteorder(tif.byteorder)).reshape(count, *page.shaped)


def _grey(page: Any, stored: np.ndarray) -> np.ndarray:
    """[samples, 1, h, w, c] -> luminance in stored units, upright; transparent pixels black."""
    bands = [stored[i, 0, ..., j] for i in range(len(stored)) for j in range(stored.shape[-1])]
    grey: Any = bands[0]
    colour = page.photometric == RGB
    if colour:
        grey = luma(bands[:3])
    if page.photometric == PALETTE:
        grey = np.asarray(LUMA, np.float32) @ page.colormap[:, grey]
    if tuple(page.extrasamples)[:1] == (UNASSOCIATED,) and stored.dtype.kind == "u":
        grey = grey * (bands[3 if colour else 1] / np.float32(np.iinfo(stored.dtype).max))
    turn = page.tags.valueof(ORIENTATION, 1)
    if turn in (5, 6, 7, 8):
        grey, turn = grey.T, {5: 1, 6: 2, 7: 3, 8: 4}[turn]
    return grey[:: -1 if turn in (3, 4) else 1, :: -1 if turn in (2, 3) else 1]
