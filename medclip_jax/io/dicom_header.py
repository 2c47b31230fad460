"""Parsing DICOM files and refusing by the header what must not be decoded.

Nothing that a file says about its patient leaves this module: texts of pydicom's own errors and
warnings may quote an element, so they are not passed on.
"""

import logging
import warnings
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pydicom.config
import pydicom.encaps
import pydicom.filereader
import pydicom.pixels
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from medclip_jax.errors import DataError
from medclip_jax.io.image import COLOUR, GREY, MAX_BYTES, PALETTE, check_size, load_bytes

STARTS = (b"\x02\x00", b"\x08\x00", b"\x00\x08")  # group 0002 or 0008, where "DICM" is missing
BITS = {1, 8, 16, 32, 64}
JPEG = {uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1}
JPEG_LS = {uid.JPEGLSLossless, uid.JPEGLSNearLossless}
ENCODINGS = {  # (implicit VR, little endian) of files that do not name their transfer syntax
    (True, True): uid.ImplicitVRLittleEndian,
    (False, True): uid.ExplicitVRLittleEndian,
    (False, False): uid.ExplicitVRBigEndian,
}
JPEG_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF0-15 without DHT, JPG, DAC; LS
ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RST0-7, SOI

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="pydicom")


def is_dicom(path: Path) -> bool:
    """Whether a file has the letters DICM at byte 128, whatever its suffix."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False  # the reader for its suffix will say why


def parse(path: Path, tags: Sequence[str] | None = None) -> Dataset:
    """The data set of a file; with `tags` only those elements and no pixels.

    Files without preamble are accepted if they start with group 0002 or 0008; the encoding of files
    that do not name their transfer syntax is the one pydicom finds.
    Raises DataError for a file that is missing, empty, too large (also once inflated) or not DICOM.
    """
    raw = load_bytes(path)
    bare = raw[128:132] != b"DICM"
    if bare and raw[:2] not in STARTS:
        raise DataError(f"{path} is not a DICOM file (no DICM prefix): replace or remove it.")
    _check_deflated(path, raw)
    ds = pydicom.dcmread(
        BytesIO(raw),
        force=bare,
        stop_before_pixels=tags is not None,
        specific_tags=None if tags is None else list(tags),
    )
    ds.file_meta = getattr(ds, "file_meta", None) or FileMetaDataset()
    if not ds.file_meta.get("TransferSyntaxUID"):
        implicit, little = ds.original_encoding
        ds.file_meta.TransferSyntaxUID = ENCODINGS[bool(implicit), bool(little)]
    return ds


def check(path: Path, ds: Dataset) -> None:
    """Raise DataError for what has no image, is too large or has no decoder here."""
    if not any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DataError(f"{path} is DICOM without an image (no PixelData): remove it.")
    rows, columns, frames = (count(path, ds, n) for n in ("Rows", "Columns", "NumberOfFrames"))
    check_size(path, columns, rows, frames)
    samples, bits = count(path, ds, "SamplesPerPixel"), count(path, ds, "BitsAllocated")
    kind = ds.get("PhotometricInterpretation")
    channels = 3 if kind in COLOUR else 1
    if kind not in GREY | COLOUR | {PALETTE} or samples != channels or bits not in BITS:
        raise DataError(
            f"{path} has {samples} sample(s) of {bits} bits per pixel in a colour space that does "
            "not fit or is not read: save it as MONOCHROME2 or RGB."
        )
    syntax = ds.file_meta.TransferSyntaxUID
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError:
        raise DataError(
            f"{path} is stored as {syntax_name(ds)}, which no decoder here can read: "
            "save it uncompressed or as JPEG 2000."
        ) from None
    if not decoder.is_available:
        raise DataError(
            f"{path} is stored as {syntax_name(ds)}, whose decoder is not installed: "
            "install pylibjpeg with its plug-ins."
        )
    if syntax.is_encapsulated and syntax != uid.RLELossless:
        _check_streams(path, ds, (columns, rows, samples), frames)


def count(path: Path, ds: Dataset, name: str) -> int:
    """A whole number of the header, else DataError; the number of frames is 1 if missing."""
    value = ds.get(name)
    if value in (None, "") and name == "NumberOfFrames":
        return 1
    try:
        return int(value)
    except (TypeError, ValueError):
        raise DataError(
            f"{path} has no usable {name} in its header: it is damaged or truncated, remove it."
        ) from None


def syntax_name(ds: Dataset) -> str:
    """Name of the transfer syntax, if it is one of the standard's."""
    syntax = ds.file_meta.TransferSyntaxUID
    return syntax.name if syntax in uid.UID_dictionary else "an unknown transfer syntax"


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
            f"{path} has {syntax_name(ds)} pixels, whose decoder is not installed: "
            "pip install pylibjpeg-libjpeg (GPL-3)."
        )
    return "pylibjpeg"


def _check_deflated(path: Path, raw: bytes) -> None:
    """Inflate a deflated data set piece by piece, keeping none, before pydicom keeps it whole."""
    stream = BytesIO(raw)
    pydicom.filereader.read_preamble(stream, True)
    meta = pydicom.filereader.read_dataset(
        stream,
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, *_: tag.group != 2,
    )
    if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
        return
    inflate, total, rest = zlib.decompressobj(-zlib.MAX_WBITS), 0, raw[stream.tell() :]
    while rest and not inflate.eof:
        total += len(inflate.decompress(rest, 1 << 20))
        rest = inflate.unconsumed_tail
        if total > MAX_BYTES:
            raise DataError(
                f"{path} inflates to more than {MAX_BYTES:,} bytes: remove it if it is not yours."
            )


def _check_streams(path: Path, ds: Dataset, size: tuple[int, int, int], frames: int) -> None:
    """Each compressed frame must state the size that the header states: its decoder believes it."""
    table = ds.get("ExtendedOffsetTable"), ds.get("ExtendedOffsetTableLengths")
    streams = pydicom.encaps.generate_frames(
        ds.PixelData, number_of_frames=frames, extended_offsets=table if all(table) else None
    )
    for stream in streams:
        stated = stated_size(stream)
        if stated != size:
            stream_size = " x ".join(map(str, stated)) if stated else "no size"
            raise DataError(
                f"{path} says {' x '.join(map(str, size))} in its header and {stream_size} in its "
                f"{syntax_name(ds)} stream: it is damaged, copy it again or remove it."
            )


def stated_size(stream: bytes) -> tuple[int, int, int] | None:
    """(width, height, components) that a JPEG, JPEG-LS or JPEG 2000 stream states, if it does.

    Layouts: ISO/IEC 10918-1 B.2.2 (JPEG frame header; JPEG-LS, ISO/IEC 14495-1 C.2.2, has the same)
    and ISO/IEC 15444-1 A.5.1 (JPEG 2000 SIZ; HTJ2K has the same).
    """
    if stream[:2] == b"\xff\xd8":
        return _jpeg_size(stream)
    start = stream.find(b"\xff\x4f\xff\x51")  # markers SOC and SIZ, at 0 or inside a JP2 file
    siz = stream[start + 4 :]  # length, capabilities, x, y, x offset, y offset, tiles, components
    if start < 0 or len(siz) < 38:
        return None
    x, y, left, top = (int.from_bytes(siz[4 + 4 * i : 8 + 4 * i]) for i in range(4))
    return x - left, y - top, int.from_bytes(siz[36:38])


def _jpeg_size(stream: bytes) -> tuple[int, int, int] | None:
    """Walk the segments up to the frame header; entropy-coded data come only after it."""
    offset = 2
    while offset + 4 <= len(stream):
        if stream[offset] != 0xFF:
            return None
        marker = stream[offset + 1]
        if marker in JPEG_FRAMES:
            head = stream[offset + 4 : offset + 10]
            if len(head) < 6:
                return None
            return int.from_bytes(head[3:5]), int.from_bytes(head[1:3]), head[5]
        if marker == 0xDA:  # a scan before any frame
            return None
        if marker == 0xFF:  # fill byte
            offset += 1
        elif marker in ALONE:
            offset += 2
        else:
            offset += 2 + max(2, int.from_bytes(stream[offset + 2 : offset + 4]))
    return None
