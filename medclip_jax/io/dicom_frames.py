"""Stored frames of a DICOM file, decoded one at a time; colour always as RGB.

A compressed stream says itself how large it is and how its colours are coded; where its file's
header says otherwise, the stream is right. Bytes that no colour could have given when read as the
header says (YBR) are RGB.
"""

from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pydicom.encaps
import pydicom.pixels
from jaxtyping import Bool, Num
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.pixels.processing import convert_color_space

from medclip_jax.errors import DataError
from medclip_jax.io import dicom_header, jpeg_header
from medclip_jax.io.image import COLOUR

NUMBERS = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored")
JPEG = {uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1}
JPEG_LS = {uid.JPEGLSLossless, uid.JPEGLSNearLossless}
NO_TRANSFORM = {uid.JPEG2000, uid.JPEG2000Lossless, uid.HTJ2K, uid.HTJ2KLossless}
OUT_OF_GAMUT = 24  # of 255: noise of lossy compression stays below
SAMPLE = 1 << 16  # pixels looked at to tell YBR from RGB


class Stored(NamedTuple):
    """Frames of one file before rescaling and windows."""

    number: int
    frame: Callable[[int], Num[np.ndarray, "h w *c"]]
    white: float  # of colour


def stored(path: Path, ds: Dataset) -> Stored:
    """Access to the frames of a checked file. Its PixelData are dropped if they are compressed."""
    frames = dicom_header.count(path, ds, "NumberOfFrames")
    floats = "PixelData" not in ds  # which state no bits
    white = 1.0 if floats else 2.0 ** dicom_header.count(path, ds, "BitsStored") - 1
    if not ds.file_meta.TransferSyntaxUID.is_encapsulated:
        get = _packed_bits(path, ds) if ds.BitsAllocated == 1 else _native(ds)
    else:
        streams = list(dicom_header.streams(ds, frames))
        ds.PixelData = b""
        if len(streams) < frames:
            raise DataError(
                f"{path} holds {len(streams)} of the {frames} frames that its header states: it is "
                "truncated, copy it again."
            )
        get = _encapsulated(path, ds, streams)
        head = jpeg_header.parse(streams[0])
        white = 2.0**head.precision - 1 if head else white

    def frame(index: int) -> Num[np.ndarray, "h w *c"]:
        try:
            return get(index)
        except Exception as error:  # decoders may raise anything for hostile bytes
            raise DataError(
                f"{path} has {dicom_header.syntax_name(ds)} pixels that cannot be decoded "
                f"({type(error).__name__}): it is damaged or truncated, copy it again or remove it."
            ) from None

    return Stored(frames, frame, white)


def _native(ds: Dataset) -> Callable[[int], np.ndarray]:
    decoder = pydicom.pixels.get_decoder(ds.file_meta.TransferSyntaxUID)
    kind, shift = str(ds.PhotometricInterpretation), _unused_low_bits(ds)
    options: dict[str, Any] = {"view_only": True}
    options |= {"correct_unused_bits": False} if shift else {}
    whole = int(ds.Rows) * int(ds.Columns) * 3 * int(ds.get("NumberOfFrames") or 1)
    if kind == "YBR_FULL_422" and len(ds.PixelData) >= whole * int(ds.BitsAllocated) // 8:
        kind = "YBR_FULL"  # nothing is subsampled, whatever the header says
        options["photometric_interpretation"] = kind

    def get(index: int) -> np.ndarray:
        values, _ = decoder.as_array(ds, index=index, raw=True, **options)
        if shift:
            up = int(ds.BitsAllocated) - 1 - int(ds.HighBit)
            values = (values << up) >> (int(ds.BitsAllocated) - int(ds.BitsStored))
        return _rgb(values, kind)

    return get


def _unused_low_bits(ds: Dataset) -> int:
    """By how much stored values lie above bit 0; 0 where the header's claim is not true."""
    if "PixelData" not in ds:
        return 0
    allocated, bits = int(ds.BitsAllocated), int(ds.BitsStored)
    shift = int(ds.get("HighBit", bits - 1)) + 1 - bits
    if allocated not in (8, 16, 32) or not 0 < shift <= allocated - bits:
        return 0
    little = ds.file_meta.TransferSyntaxUID.is_little_endian
    raw, size = ds.PixelData, allocated // 8
    words = np.frombuffer(raw, f"{'<' if little else '>'}u{size}", len(raw) // size)
    return shift if words.max(initial=0) >= 1 << bits else 0


def _packed_bits(path: Path, ds: Dataset) -> Callable[[int], np.ndarray]:
    """Frames of one bit per pixel, which need not begin at a byte (PS3.5 8.1.1 and annex D)."""
    shape = int(ds.Rows), int(ds.Columns)
    size, frames = shape[0] * shape[1], dicom_header.count(path, ds, "NumberOfFrames")
    raw = np.frombuffer(ds.PixelData, np.uint8)
    if 8 * len(raw) < size * frames:
        raise DataError(
            f"{path} holds {len(raw):,} of the {-(-size * frames // 8):,} bytes that its header "
            "states: it is truncated, copy it again."
        )

    def get(index: int) -> np.ndarray:
        first = index * size
        part = np.unpackbits(raw[first // 8 : -(-(first + size) // 8)], bitorder="little")
        return part[first % 8 : first % 8 + size].reshape(shape)

    return get


def _encapsulated(path: Path, ds: Dataset, streams: list[bytes]) -> Callable[[int], np.ndarray]:
    syntax, codec = ds.file_meta.TransferSyntaxUID, plugin(path, ds)
    decoder, kind = pydicom.pixels.get_decoder(syntax), str(ds.PhotometricInterpretation)
    numbers = (dicom_header.count(path, ds, name) for name in NUMBERS)
    keys = ("rows", "columns", "samples_per_pixel", "bits_allocated", "bits_stored")
    options: dict[str, Any] = dict(zip(keys, numbers, strict=True)) | {
        "pixel_representation": int(ds.get("PixelRepresentation") or 0),
        "planar_configuration": int(ds.get("PlanarConfiguration") or 0),
        "photometric_interpretation": kind,
        "number_of_frames": 1,
        "pixel_keyword": "PixelData",
    }

    def decoded(stream: bytes, head: jpeg_header.StreamHeader | None) -> np.ndarray:
        if head is not None and head.lossy_jpeg:
            return _jpeg(stream, head, kind)
        packed = pydicom.encaps.encapsulate([stream], has_bot=False)
        values, _ = decoder.as_array(
            packed, index=0, raw=True, decoding_plugin=codec, validate=False, **options
        )
        colour = head.colour if head is not None else ""
        if kind in COLOUR and syntax in NO_TRANSFORM and not colour and "FULL" not in kind:
            colour = "RGB"
        return _rgb(values, colour or kind)

    def get(index: int) -> np.ndarray:
        stream = streams[index]
        head = jpeg_header.parse(stream) if syntax != uid.RLELossless else None
        values = decoded(stream, head)
        if syntax in JPEG and jpeg_header.ends_early(
            stream, values[-1, -1], lambda data: decoded(data, head)
        ):
            raise EOFError
        return values

    return get


def plugin(path: Path, ds: Dataset) -> str:
    """The one decoder for a file; "" where pydicom itself reads uncompressed pixels.

    Left alone, pydicom tries all that are installed, in an order that depends on earlier files.
    CharLS refuses damaged JPEG-LS, libjpeg does not. pydicom's own RLE decoder is slow, but the
    fast one panics on damaged segments. libjpeg is an extra, for its licence: 8-bit JPEG goes
    without it, lossless and 12-bit JPEG are a DataError.
    """
    syntax = ds.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return ""
    if syntax == uid.RLELossless:
        return "pydicom"
    if syntax in JPEG_LS:
        return "pyjpegls"
    if syntax in JPEG and find_spec("libjpeg") is None:
        if syntax == uid.JPEGBaseline8Bit:
            return "pillow"
        raise DataError(
            f"{path} has {dicom_header.syntax_name(ds)} pixels, whose decoder is not installed: "
            "pip install pylibjpeg-libjpeg (GPL-3)."
        )
    return "pylibjpeg"


def _jpeg(stream: bytes, head: jpeg_header.StreamHeader, kind: str) -> np.ndarray:
    """An 8-bit lossy JPEG by Pillow, which refuses truncated ones."""
    with PIL.Image.open(BytesIO(stream), formats=("JPEG",)) as image:
        if head.components == 1:
            return np.asarray(image.convert("L"))
        if head.colour or kind != "RGB":
            return np.asarray(image.convert("RGB"))
        image.draft("YCbCr", image.size)  # as stored: neither marker nor subsampling tells
        values = np.asarray(image)
        level = values[..., 0]
        grey = 75 <= level.min() and level.max() <= 180  # such a grey could be either
        return values if grey or _beyond_colours(values) else _rgb(values, "YBR_FULL")


def _rgb(values: np.ndarray, kind: str) -> np.ndarray:
    """Colour as RGB; grey and palette indices unchanged."""
    if kind not in ("YBR", "YBR_FULL", "YBR_FULL_422") or values.dtype != np.uint8:
        return values
    if _beyond_colours(values):
        return values
    return convert_color_space(values, "YBR_FULL", "RGB")


def _beyond_colours(values: Num[np.ndarray, "h w 3"]) -> Bool[np.ndarray, ""] | bool:
    """Whether bytes, read as YBR, are colours that do not exist: so they are RGB."""
    pixels = values.reshape(-1, 3)
    luma, blue, red = pixels[:: -(-len(pixels) // SAMPLE)].astype(np.float32).T
    blue, red = blue - 128, red - 128
    bands = luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue
    outside = np.max([np.maximum(-band, band - 255) for band in bands], axis=0)
    return bool((outside > OUT_OF_GAMUT).mean() > 0.05)
