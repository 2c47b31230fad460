"""TIFF of every type: tifffile knows the pages, and decodes what Pillow cannot or gets wrong."""

import logging
import math
import threading
import zlib
from collections.abc import Callable
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tifffile
from jaxtyping import Float

from medclip_jax.errors import DataError
from medclip_jax.io import jpeg_header, pillow
from medclip_jax.io.image import (
    LUMA,
    MAX_BYTES,
    MAX_FRAMES,
    MAX_PIXELS,
    Frames,
    check_regular,
    check_size,
    in_memory,
    luma,
    unit_scale,
)

# of TIFF 6.0: orientation tag, photometric interpretations, sample format, extra sample
ORIENTATION, WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE = 274, 0, 1, 2, 3
SIGNED, UNASSOCIATED = 2, 2
PLAIN = (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE)
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
OURS, JPEG = (1, 8, 32946), (6, 7)  # compressions: none and deflate; the old JPEG and the new

logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def is_tiff(path: Path) -> bool:
    """By its first bytes; DataError for what is no regular file."""
    check_regular(path)
    with pillow.readable(path), path.open("rb") as file:
        return file.read(4) in MAGIC


def open_tiff(path: Path) -> Frames:
    """Open a TIFF, whose frames are its pages, or the images that follow each other behind one.

    Unsigned values are scaled by the full range of their bits, up to 16 (8 of compressed colour);
    floats within [0, 1] are taken as they are; whatever else there is is stretched over all pages
    as `image.stretch_of` says. Small files are decoded now, others when their frames are needed.
    Raises DataError as `pillow.open_pillow`; pages of several sizes or kinds; a kind of pixel that
    is not read.
    """
    with pillow.readable(path), path.open("rb") as file, tifffile.TiffFile(file) as tif:
        frames = _images(path, file, tif)
        if math.prod(frames.shape) <= MAX_PIXELS:
            return in_memory(frames.part(0, frames.shape[0]), "TIFF", frames.range)
    with pillow.readable(path):
        content = BytesIO(path.read_bytes())
        return _images(path, content, tifffile.TiffFile(content))


def pixels_of(path: Path) -> int:
    """Pixels of all images as the header says."""
    with path.open("rb") as file, tifffile.TiffFile(file) as tif:
        pages = _directories(path, tif)
        return pages[0].imagewidth * pages[0].imagelength * _count(tif, pages)


def _directories(path: Path, tif: Any) -> list[Any]:
    """Pages of full size, which are alike; DataError for what is not read or too large."""
    pages = [p for p in islice(tif.pages, MAX_FRAMES + 1) if not (p.index and p.is_reduced)]
    first = pages[0]
    if len(pages) > MAX_FRAMES:
        raise DataError(
            f"{path} has more than {MAX_FRAMES:,} pages, or some lead back to themselves, and "
            f"at most {MAX_FRAMES:,} are read: save it in parts or remove it if it is not yours."
        )
    count = _count(tif, pages)
    check_size(path, first.imagewidth, first.imagelength, count)
    if first.nbytes > MAX_BYTES:
        raise DataError(
            f"{path} unpacks to {first.nbytes:,} bytes and at most {MAX_BYTES:,} are read."
        )
    if len({(p.shaped, p.dtype, p.photometric, p.bitspersample) for p in pages}) > 1:
        raise DataError(
            f"{path} has pages of several sizes or kinds: save each page as its own file."
        )
    most = 2 if first.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) else 5  # grey, and alpha
    several = first.samplesperpixel > most or first.imagedepth > 1
    if several or np.dtype(first.dtype).kind == "c":
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
        shape = (tif.shaped_metadata or [{}])[0].get("shape", first.shape)
        images = max(1, math.prod(shape) // math.prod(first.shape))
    elif first.is_stk:
        images = first.tags["UIC2tag"].count
    return images if len(pages) == 1 else len(pages)


def _images(path: Path, file: Any, tif: Any) -> Frames:
    pages = _directories(path, tif)
    first, count = pages[0], _count(tif, pages)
    kind = first.dtype and np.dtype(first.dtype)
    plain = kind is not None and first.bitspersample == 8 * kind.itemsize
    plain = plain and first.photometric in PLAIN
    white = 65535.0 if first.photometric == PALETTE else None
    if white is None and kind in (np.uint8, np.uint16):
        white = 2.0**first.bitspersample - 1
    invert, words = first.photometric == WHITE_IS_ZERO, ""
    stored: Callable[[int], np.ndarray]
    if count > len(pages):
        if not (plain and first.is_contiguous):
            raise DataError(
                f"{path} has {count} images in one directory, packed so that they cannot be "
                "told apart: save each as a page or a file of its own."
            )
        behind = _behind_each_other(path, file, tif, count)
        stored = lambda index: _grey(first, behind[index])  # noqa: E731
    elif plain and kind != np.uint8 and first.compression in OURS and first.predictor < 3:
        stored = lambda index: _grey(pages[index], _inflated(pages[index]))  # noqa: E731
    else:
        if first.compression in JPEG:
            file.seek(0)
            jpeg_header.check_scans(path, file.read(), sum(len(p.dataoffsets) for p in pages))
        file.seek(0)  # Pillow would map a named file and forget its orientation
        image = _opened(path, file, tif)
        if image.mode in ("1", "L") and first.sampleformat == SIGNED:
            white, invert = None, False  # Pillow inverts 8 bits itself, but not 16
        elif not image.mode.startswith(("I", "F")):
            white, invert, words = 1.0, False, "0 to white"
        stored = lambda index: _of_pillow(path, image, pages[index])  # noqa: E731
    if count * first.imagewidth * first.imagelength <= MAX_PIXELS:  # decoded once
        stored = [stored(index) for index in range(count)].__getitem__
    shape, lock = stored(0).shape, threading.Lock()
    to_unit, range_words = unit_scale(path, stored, count, shape, white)

    def part(start: int, end: int) -> Float[np.ndarray, "n h w"]:
        pixels = np.empty((end - start, *shape), np.float32)
        for into, index in zip(pixels, range(start, end), strict=True):
            with lock, pillow.readable(path):
                values = stored(index)
            to_unit(values, into)
        return 1 - pixels if invert else pixels

    nbytes = path.stat().st_size
    return Frames((count, *shape), part, None, {"format": "TIFF"}, words or range_words, nbytes)


def _opened(path: Path, file: Any, tif: Any) -> PIL.Image.Image:
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
        return pillow.luminance(path, image)
    values = np.asarray(pillow.upright(image))
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


def _behind_each_other(path: Path, file: Any, tif: Any, count: int) -> np.ndarray:
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
