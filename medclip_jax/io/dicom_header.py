"""Parsing DICOM files and refusing by the header what must not be decoded.

Nothing that a file says about its patient leaves this module: texts of pydicom's own errors and
warnings may quote an element, so they are not passed on.
"""

import io
import logging
import stat
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.charset
import pydicom.config
import pydicom.encaps
import pydicom.filereader
import pydicom.pixels
from pydicom import uid
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import BaseTag, Tag

from medclip_jax.errors import DataError
from medclip_jax.io import jpeg_header
from medclip_jax.io.image import COLOUR, GREY, PALETTE, check_regular, check_size

STARTS = (b"\x02\x00", b"\x08\x00", b"\x00\x08")  # group 0002 or 0008, where "DICM" is missing
MAX_INFLATED = 1 << 28  # bytes of a deflated file, which are in memory twice
MAX_INFLATED_HEADER = 1 << 25  # bytes inflated where no pixels are needed
MAX_READS = 1_000_000  # a header of 5,000 frames with functional groups needs half of them
MAX_VALUE = 1 << 16  # bytes of a value that pydicom splits into many
SEQUENCES = (  # that are looked into
    *("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence", "VOILUTSequence"),
    *("ModalityLUTSequence", "SequenceOfUltrasoundRegions", "DirectoryRecordSequence"),
)
WHOLE = {"OB", "OD", "OF", "OL", "OV", "OW", "UN", "ST", "LT", "UT", "UR"}  # VRs of one value
CHARSET = b"\x08\x00\x05\x00"  # tag, the value of which pydicom splits while it reads
BITS = {1, 8, 16, 32, 64}
ENCODINGS = {  # (implicit VR, little endian) of files that do not name their transfer syntax
    (True, True): uid.ImplicitVRLittleEndian,
    (False, True): uid.ExplicitVRLittleEndian,
    (False, False): uid.ExplicitVRBigEndian,
}

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="pydicom")


class _Metered(io.BufferedReader):
    """A file that ends where its elements are too many: each takes far more memory than its bytes.

    pydicom reads the head of every element by a call of its own.
    """

    calls, head = 0, b""

    def read(self, size: int | None = -1) -> bytes:
        self.calls += 1
        split = self.head[:4] == CHARSET and size is not None and size > MAX_VALUE
        if self.calls > MAX_READS or split:
            raise TooManyElementsError
        data = super().read(size)
        self.head = data if size == 8 else b""
        return data


class TooManyElementsError(Exception):
    """More than a medical image needs."""


def is_dicom(path: Path) -> bool:
    """Whether a regular file has the letters DICM at byte 128, whatever its suffix."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError):
        return False  # the reader for its suffix will say why


def parse(path: Path, tags: Sequence[str] | None = None) -> Dataset:
    """The data set of a file; with `tags` only those elements and no pixels.

    Files without preamble are accepted if they start with group 0002 or 0008; the encoding of files
    that do not name their transfer syntax is the one pydicom finds.
    Raises DataError for a file that is missing, empty, too large (also once inflated), not DICOM,
    or of too many elements; whatever pydicom raises for damaged ones.
    """
    check_regular(path)
    options: dict[str, Any] = {"specific_tags": None if tags is None else list(tags)}
    try:
        with path.open("rb", buffering=0) as raw, _Metered(raw, 1 << 16) as file:
            head = file.read(132)
            bare = head[128:] != b"DICM"
            if bare and head[:2] not in STARTS:
                raise DataError(
                    f"{path} is not a DICOM file (no DICM prefix): replace or remove it."
                )
            meta = _file_meta(file, bare)
            if meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
                ds = _deflated(path, file, tags is not None, options)
                ds.file_meta = meta
            else:
                file.seek(0)
                stop = tags is not None
                ds = pydicom.dcmread(file, force=bare, stop_before_pixels=stop, **options)
            calls = file.calls
            for name in SEQUENCES:
                calls = _expand(ds, Tag(name), calls)
            _check_values(ds)
    except OSError as error:
        if isinstance(error.__context__, TooManyElementsError):  # pydicom replaces it
            raise _too_many(path) from None
        if error.errno is None:  # pydicom's own, which may quote an element
            raise DataError(f"{path} is damaged or truncated: copy it again.") from None
        raise DataError(f"{path} cannot be read ({error.strerror}): fix or remove it.") from error
    except TooManyElementsError:
        raise _too_many(path) from None
    ds.file_meta = getattr(ds, "file_meta", None) or FileMetaDataset()
    if not ds.file_meta.get("TransferSyntaxUID"):
        implicit, little = ds.original_encoding
        ds.file_meta.TransferSyntaxUID = ENCODINGS[bool(implicit), bool(little)]
    return ds


def _expand(ds: Dataset, tag: BaseTag, calls: int) -> int:
    """Parse a sequence, and those in it, which pydicom would do without end; returns all reads.

    One that is damaged stays as it is, for whoever needs it. Raises TooManyElementsError.
    """
    raw = ds.get_item(tag) if tag in ds else None
    value = getattr(raw, "value", None)
    if raw is None or _kind(raw) != "SQ":
        return calls
    if isinstance(value, bytes):
        file = _Metered(io.BytesIO(value))
        file.calls, implicit = calls, getattr(raw, "is_implicit_VR", False)
        little = getattr(raw, "is_little_endian", True)
        try:
            value = pydicom.filereader.read_sequence(
                file, implicit, little, len(value), [pydicom.charset.default_encoding]
            )
        except Exception as error:
            if isinstance(error.__context__ or error, TooManyElementsError):
                raise TooManyElementsError from None
            return file.calls
        ds[tag], calls = DataElement(tag, "SQ", value), file.calls
    for item in value or ():
        _check_values(item)
        for inner in list(item.keys()):
            calls = _expand(item, inner, calls)
    return calls


def _check_values(ds: Dataset) -> None:
    """Raise TooManyElementsError for a value that would be split into very many."""
    for tag in ds.keys():  # noqa: SIM118  iterating over the data set itself converts its values
        raw = ds.get_item(tag)
        if isinstance(raw, RawDataElement) and len(raw.value or b"") > MAX_VALUE:
            kind = _kind(raw)
            if kind not in WHOLE and kind != "SQ" and "OW" not in kind:
                raise TooManyElementsError


def _kind(element: RawDataElement | DataElement) -> str:
    """The VR, also where the file does not say it; of several, OW leaves the value whole."""
    try:
        return element.VR or dictionary_VR(element.tag)
    except KeyError:
        return "UN"


def _too_many(path: Path) -> DataError:
    return DataError(
        f"{path} has far more header elements than an image needs: remove it if it is not yours."
    )


def _file_meta(file: _Metered, bare: bool) -> FileMetaDataset:
    """Group 0002; the file is left at its end."""
    file.seek(0 if bare else 132)
    meta = pydicom.filereader.read_dataset(
        file,
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, *_: tag.group != 2,
    )
    return FileMetaDataset(meta)


def _deflated(path: Path, file: _Metered, header: bool, options: dict[str, Any]) -> Dataset:
    """The data set of a deflated file, inflated piece by piece up to what is read at most."""
    inflate, whole = zlib.decompressobj(-zlib.MAX_WBITS), io.BytesIO()
    while not inflate.eof and (piece := inflate.unconsumed_tail or file.read(1 << 18)):
        whole.write(inflate.decompress(piece, 1 << 20))
        if header and whole.tell() > MAX_INFLATED_HEADER:
            break
        if whole.tell() > MAX_INFLATED:
            raise DataError(
                f"{path} inflates to more than {MAX_INFLATED:,} bytes: remove it if it is not "
                "yours."
            )
    whole.seek(0)
    pixels = (0x7FE0,)
    return pydicom.filereader.read_dataset(
        _Metered(whole),
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=(lambda tag, *_: tag.group in pixels) if header else None,
        specific_tags=options["specific_tags"] and [Tag(t) for t in options["specific_tags"]],
    )


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


def common_spacing(spacings: Sequence[Any]) -> Any:
    """The spacing, (row, column), that all have but for a scanner's rounding, else None."""
    same = all(spacings) and np.allclose(spacings, spacings[:1], rtol=1e-4, atol=0)
    return spacings[0] if spacings and same else None


def syntax_name(ds: Dataset) -> str:
    """Name of the transfer syntax, if it is one of the standard's."""
    syntax = ds.file_meta.TransferSyntaxUID
    return syntax.name if syntax in uid.UID_dictionary else "an unknown transfer syntax"


def streams(ds: Dataset, frames: int) -> Iterator[bytes]:
    """The compressed frames of a file, one after another."""
    table = ds.get("ExtendedOffsetTable"), ds.get("ExtendedOffsetTableLengths")
    return pydicom.encaps.generate_frames(
        ds.PixelData, number_of_frames=frames, extended_offsets=table if all(table) else None
    )


def _check_streams(path: Path, ds: Dataset, size: tuple[int, int, int], frames: int) -> None:
    """Each compressed frame must be whole and state the header's size: its decoder believes it."""
    for number, stream in enumerate(streams(ds, frames), start=1):
        head = jpeg_header.parse(stream)
        jpeg_header.check_scans(path, stream)
        if head is None or head[:3] != size:
            stream_size = " x ".join(map(str, head[:3])) if head else "no size"
            raise DataError(
                f"{path} says {' x '.join(map(str, size))} in its header and {stream_size} in its "
                f"{syntax_name(ds)} stream: it is damaged, copy it again or remove it."
            )
        if not head.whole:
            raise DataError(
                f"{path} has a {syntax_name(ds)} stream without an end (frame {number} of "
                f"{frames}): it is truncated, copy it again."
            )
