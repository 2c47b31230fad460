"""Files that mean harm, or that nobody thought of: 480 kinds, small on disk or sparse.

`write` makes each in a folder of its own. What a kind must give is said beside it: READ or a part
of the sentence in unreadable.csv. Where that is "" it is READ for LENIENT ones, else any sentence.
"""

import gzip
import io
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from tests.support.dicom import film

READ = "read"
TOGETHER = "are scored together"  # at most; a small encoder, whose maps are small, takes all
MB = 1 << 20

LENIENT = {  # what their pixels need is whole
    *("dicom deflated cut", "dicom j2k both 60000x1000", "dicom htj2k both 60000x1000"),
    *("dicom rle segment bomb", "dicom doubles 8000x8000", "dicom pixels of 0xFFFFFFFE"),
    *("dicom nested 10,000 deep with lengths", "dicom 100,000 fragments"),
    *("dicom offset table wrong", "dicom extended offset table long", "nifti voxels at 0"),
    *("png IDAT of 1 GB", "png 500,000 texts", "png eXIf of 20 MB", "jpeg profiles of 64 MB"),
    *("jpeg EXIF of 65,535 entries", "jpeg EXIF loop", "jpeg MPO of 2^31 pictures"),
}


class Kind(NamedTuple):
    family: str
    name: str  # of the file
    write: Callable[[Path], object]
    expect: str
    fast: bool


KINDS: dict[str, Kind] = {}
NAMES = dict(dicom="a.dcm", nifti="a.nii", gzip="a.nii.gz", png="a.png", jpeg="a.jpg")
NAMES |= dict(bmp="a.bmp", tiff="a.tif")


def kind(label: str, content: Any, expect: str, fast: bool = False, name: str = "") -> None:
    """One more; its content is bytes, what makes them (without arguments), or writes to a path."""
    family = label.split()[0]
    assert label not in KINDS, label

    def write(path: Path) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content())

    expect = expect or (READ if label in LENIENT else "")
    plain = isinstance(content, bytes) or not signature(content).parameters
    KINDS[label] = Kind(family, name or NAMES[family], write if plain else content, expect, fast)


Bytes = bytes | Callable[[], bytes]  # a function for what takes time


def joined(parts) -> bytes:
    return b"".join(part() if callable(part) else part for part in parts)


def raw(*parts: Bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(joined(parts))


def sparse(size: int, head: bytes = b"") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size)

    return write


# ---- DICOM


def element(tag: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    """An element of explicit VR, little endian."""
    size = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    if vr in ("OB", "OW", "OD", "OF", "OL", "OV", "SQ", "UN", "UT", "UC", "UR"):
        return head + struct.pack("<HI", 0, size) + value
    return head + struct.pack("<H", size) + value


def implicit(tag: int, value: bytes, length: int | None = None) -> bytes:
    size = len(value) if length is None else length
    return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, size) + value


def slice_(shape=(40, 50), bits=8, **elements) -> Dataset:
    """A header and its pixels; `elements` replace or (None) remove some."""
    ds = film(np.zeros(shape, f"u{bits // 8}"))
    for name, value in elements.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    return ds


def encoded(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicom(*more: Bytes, pixels: bytes | None = None, **how) -> Callable[[Path], object]:
    """`more` stands between the header and the pixels."""

    def write(path: Path) -> None:
        ds = slice_(**how)
        own = ds.PixelData
        del ds.PixelData
        end = element(0x7FE00010, "OB", own) if pixels is None else pixels
        path.write_bytes(encoded(ds) + joined(more) + end)

    return write


def dicom_implicit(*more: Bytes, **how) -> Callable[[Path], object]:
    """The same without explicit VR: lengths of 32 bits for everything."""

    def write(path: Path) -> None:
        ds = slice_(**how)
        own = ds.PixelData
        del ds.PixelData
        ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
        path.write_bytes(encoded(ds) + joined(more) + implicit(0x7FE00010, own))

    return write


def of_size(shape, bits=8, packed=None, **elements) -> Callable[[Path], None]:
    """Uncompressed, its pixels sparse; `shape` with frames, rows, columns and samples."""

    def write(path: Path) -> None:
        ds = slice_((2, 2), **elements)
        frames, ds.Rows, ds.Columns = shape[:3]
        ds.SamplesPerPixel = shape[3] if len(shape) > 3 else 1
        ds.BitsAllocated = ds.BitsStored = bits
        ds.HighBit = bits - 1
        if frames > 1:
            ds.NumberOfFrames = frames
        if ds.SamplesPerPixel == 3:
            ds.PhotometricInterpretation, ds.PlanarConfiguration = "RGB", 0
        del ds.PixelData
        size = int(np.prod(shape)) * bits // 8
        tag = {64: 0x7FE00009}.get(bits, 0x7FE00010)
        vr = {64: "OD", 16: "OW", 32: "OW"}.get(bits, "OB")
        head = encoded(ds) + element(tag, vr, b"", size + size % 2)
        sparse(len(head) + size + size % 2, head)(path)

    return write


def compressed(syntax: str, streams, bot=True, **elements) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        ds = slice_(**elements)
        ds.file_meta.TransferSyntaxUID = syntax
        parts = streams() if callable(streams) else streams
        ds.PixelData = parts if isinstance(parts, bytes) else encapsulate(parts, has_bot=bot)
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        path.write_bytes(encoded(ds))

    return write


def deflated(head: Bytes, zeros: int, cut: int = 0, **how) -> Callable[[Path], None]:
    """A deflated file with `head` and a run of zeros as pixels."""

    def write(path: Path) -> None:
        ds = slice_(**how)
        del ds.PixelData
        ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        plain = encoded(ds)
        start = 132 + 12 + struct.unpack_from("<I", plain, 140)[0]
        ds.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
        meta = encoded(ds)
        meta = meta[: 144 + struct.unpack_from("<I", meta, 140)[0]]
        packer = zlib.compressobj(1, wbits=-15)
        body = packer.compress(plain[start:] + joined([head]))
        for _ in range(zeros // MB):
            body += packer.compress(bytes(MB))
        body += packer.flush()
        path.write_bytes(meta + body[: len(body) - cut])

    return write


def rle(frame: np.ndarray) -> bytes:
    """One 8- or 16-bit frame of one value: as small as RLE gets."""
    out = io.BytesIO()
    planes = frame.dtype.itemsize
    segment = b"\x81\0" * (frame.size // 128) + b"\x81\0"
    out.write(
        struct.pack(
            "<16I", planes, *[64 + i * len(segment) for i in range(planes)], *[0] * (15 - planes)
        )
    )
    out.write(segment * planes)
    return out.getvalue()


def picture(kind_: str, size=(16, 16), mode="L", **options) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new(mode, size).save(buffer, kind_, **options)
    return buffer.getvalue()


def resized_jpeg(stream: bytes, width: int, height: int) -> bytes:
    at = next(
        stream.index(bytes([0xFF, m]))
        for m in (0xC0, 0xC2, 0xC3, 0xF7)
        if bytes([0xFF, m]) in stream
    )
    return stream[: at + 5] + struct.pack(">HH", height, width) + stream[at + 9 :]


def j2k(width=16, height=16, claim=None, tile=None, components=None) -> bytes:
    stream = bytearray(picture("JPEG2000", (width, height), no_jp2=True))
    if claim:
        struct.pack_into(">II", stream, 8, *claim)
        struct.pack_into(">II", stream, 24, *(tile or claim))
    elif tile:
        struct.pack_into(">II", stream, 24, *tile)
    if components:
        struct.pack_into(">H", stream, 40, components)
    return bytes(stream)


def jls(width=16, height=16) -> bytes:
    import jpeg_ls

    return bytes(jpeg_ls.encode_array(np.zeros((height, width), np.uint8)))


def nested(depth: int, defined: bool) -> bytes:
    """A sequence in a sequence in a sequence ..."""
    if not defined:
        opens = element(0x00081140, "SQ", b"", 0xFFFFFFFF) + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
        return opens * depth + b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0" * depth
    heads, size = [], 0
    for _ in range(depth):
        heads.append(
            element(0x00081140, "SQ", b"", size + 8) + struct.pack("<HHI", 0xFFFE, 0xE000, size)
        )
        size += 20
    return b"".join(reversed(heads))


def items(count: int, inside: bytes = b"") -> bytes:
    return (struct.pack("<HHI", 0xFFFE, 0xE000, len(inside)) + inside) * count


def tiny_elements(count: int, make=implicit) -> bytes:
    """Empty elements of as many private tags."""
    tags = np.zeros((count, 2), "<u4")
    number = np.arange(count, dtype=np.uint32)
    tags[:, 0] = (((number >> 16) << 1) + 0x11) | ((number & 0xFFFF) << 16)
    return tags.tobytes()


def tiny_explicit(count: int) -> bytes:
    rows = np.zeros((count, 4), "<u2")
    number = np.arange(count)
    rows[:, 0], rows[:, 1] = ((number >> 16) << 1) + 0x11, number & 0xFFFF
    rows[:, 2] = int.from_bytes(b"LO", "little")
    return rows.tobytes()


BROKEN, STATED, TOO_MANY = "damaged or truncated", "says", "far more header elements"
LARGE, FRAMES, VOXELS = "at most 64,000,000 are read", "at most 10,000 are read", "in all are read"
OTHER, FOLLOWED = "which is not read", "a link out of the folder that was named"
BYTES, THIN = "at most 536,870,912 are read", "need 8 or more a side"

kind(
    "dicom deflated 250 MB of zeros",
    deflated(
        element(0x7FE00010, "OB", b"", 250 * MB), 250 * MB, shape=(2, 2), Rows=5000, Columns=5000
    ),
    READ,
)
kind(
    "dicom deflated bomb of 2 GB",
    deflated(element(0x7FE00010, "OB", b"", 2000 * MB), 2000 * MB),
    "inflates to more than",
)
kind(
    "dicom deflated bomb in a private tag",
    deflated(element(0x00111011, "OB", b"", 270 * MB), 271 * MB),
    "inflates to more than",
    True,
)
kind("dicom deflated cut", deflated(element(0x7FE00010, "OB", b"", 4 * MB), 4 * MB, 2000), "")
kind("dicom deflated elements", deflated(lambda: tiny_explicit(3_000_000), 0), TOO_MANY)
for name, claim in (("65535", (65535, 65535)), ("0", (0, 0)), ("60000x1000", (60000, 1000))):
    for codec, syntax, stream in (
        ("rle", uid.RLELossless, lambda: [rle(np.zeros((16, 16), np.uint8))]),
        ("jpeg", uid.JPEGBaseline8Bit, lambda: [picture("JPEG")]),
        ("j2k", uid.JPEG2000Lossless, lambda: [j2k()]),
        ("jls", uid.JPEGLSLossless, lambda: [jls()]),
        ("none", uid.ExplicitVRLittleEndian, None),
    ):
        how = {"Rows": claim[1], "Columns": claim[0]}
        make = compressed(syntax, stream, **how) if stream else dicom(**how)
        kind(f"dicom {codec} header {name}", make, "", codec == "rle" and name == "65535")
for codec, syntax, stream in (
    ("jpeg", uid.JPEGBaseline8Bit, lambda: [resized_jpeg(picture("JPEG"), 60000, 1000)]),
    ("jpeg-extended", uid.JPEGExtended12Bit, lambda: [resized_jpeg(picture("JPEG"), 60000, 1000)]),
    (
        "jpeg-lossless",
        uid.JPEGLosslessSV1,
        lambda: [resized_jpeg(picture("JPEG"), 60000, 1000).replace(b"\xff\xc0", b"\xff\xc3")],
    ),
    ("j2k", uid.JPEG2000Lossless, lambda: [j2k(claim=(60000, 1000))]),
    ("j2k-tiles", uid.JPEG2000Lossless, lambda: [j2k(claim=(60000, 1000), tile=(1, 1))]),
    ("htj2k", uid.HTJ2KLossless, lambda: [j2k(claim=(60000, 1000))]),
    ("jls", uid.JPEGLSLossless, lambda: [resized_jpeg(jls(), 60000, 1000)]),
    ("rle", uid.RLELossless, lambda: [rle(np.zeros((16, 16), np.uint8))]),
):
    kind(f"dicom {codec} both 60000x1000", compressed(syntax, stream, Rows=1000, Columns=60000), "")
for codec, syntax, stream in (
    ("jpeg", uid.JPEGBaseline8Bit, lambda: [picture("JPEG", (8000, 8000))]),
    ("j2k", uid.JPEG2000Lossless, lambda: [j2k(8000, 8000)]),
    ("jls", uid.JPEGLSLossless, lambda: [jls(8000, 8000)]),
    ("rle", uid.RLELossless, lambda: [rle(np.zeros((8000, 8000), np.uint8))]),
):
    kind(
        f"dicom {codec} whole 8000x8000", compressed(syntax, stream, Rows=8000, Columns=8000), READ
    )
kind(
    "dicom rle 16 bits 8 x 4000x3500",
    compressed(
        uid.RLELossless,
        lambda: [rle(np.zeros((4000, 3500), np.uint16))] * 8,
        bits=16,
        shape=(8, 2, 2),
        Rows=4000,
        Columns=3500,
    ),
    READ,
)
kind(
    "dicom rle 64 segments",
    compressed(uid.RLELossless, [struct.pack("<16I", 64, *[64] * 15) + b"\x81\0"]),
    BROKEN,
)
kind(
    "dicom rle offsets beyond",
    compressed(uid.RLELossless, [struct.pack("<16I", 1, 1 << 31, *[0] * 14) + b"\x81\0"]),
    BROKEN,
)
kind(
    "dicom rle segment bomb",
    compressed(uid.RLELossless, [struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * (4 * MB)]),
    "",
)
kind(
    "dicom j2k 16384 components",
    compressed(uid.JPEG2000Lossless, [j2k(components=16384)], Rows=16, Columns=16),
    STATED,
)
kind("dicom 20,000 frames of 1x1", of_size((20_000, 1, 1)), FRAMES, True)
kind("dicom 9,999 frames of 1x1", of_size((9_999, 1, 1)), THIN)
kind("dicom 9,999 frames of 8x8", of_size((9_999, 8, 8)), TOGETHER)
kind("dicom 900 frames of 8x8", of_size((900, 8, 8)), READ)
for frames in (2**31 - 1, -1, 0, 10**9):
    kind(f"dicom NumberOfFrames {frames}", dicom(NumberOfFrames=frames), "")
kind(
    "dicom NumberOfFrames words",
    dicom(element(0x00280008, "IS", b"abcd")),
    "no usable NumberOfFrames",
)
kind(
    "dicom NumberOfFrames many",
    dicom(element(0x00280008, "IS", b"1\\2\\3 ")),
    "no usable NumberOfFrames",
)
kind(
    "dicom NumberOfFrames of 9 MB",
    dicom_implicit(lambda: implicit(0x00280008, b"1\\" * (9 * MB // 2) + b"1 ")),
    TOO_MANY,
)
kind("dicom no rows", dicom(Rows=None), "no usable Rows")
kind(
    "dicom rows of 90 MB",
    dicom_implicit(lambda: implicit(0x00280010, b"\1\0" * (8 * MB))),
    TOO_MANY,
)
kind("dicom RGB 8000x8000", of_size((1, 8000, 8000, 3)), READ)
kind("dicom RGB 16 bits 8000x8000", of_size((1, 8000, 8000, 3), 16), READ)
kind("dicom 16 bits 8 x 4000x3500", of_size((8, 4000, 3500), 16), READ)
kind("dicom 32 bits 8000x8000", of_size((1, 8000, 8000), 32), READ)
kind("dicom 32 bits 2 x 8000x8000", of_size((2, 8000, 7999), 32), READ)
kind("dicom doubles 8000x8000", of_size((1, 8000, 8000), 64), "")
kind("dicom 8 bits 4 x 8000x8000", of_size((4, 8000, 8000)), READ)
kind("dicom 1 bit 4 x 8000x8000", of_size((4, 8000, 8000), 1), READ)
kind("dicom 1 x 60,000,000 is no VR", of_size((1, 60000, 1000), 16), READ)
kind("dicom 65535 rows of one pixel", of_size((1, 65535, 1)), READ)
kind("dicom 600 MB", of_size((1, 24000, 25000)), BYTES)
kind("dicom pixels shorter than stated", dicom(Rows=4000, Columns=4000), BROKEN)
kind("dicom pixels longer than stated", dicom(Rows=4, Columns=4), READ)
kind(
    "dicom pixels without an end",
    dicom(pixels=element(0x7FE00010, "OB", bytes(2000), 0xFFFFFFFF)),
    "",
)
kind(
    "dicom pixels of 0xFFFFFFFE",
    dicom(pixels=element(0x7FE00010, "OB", bytes(2000), 0xFFFFFFFE)),
    "",
)
kind("dicom private tag of 0xFFFFFFFE", dicom(element(0x00111010, "UN", b"x", 0xFFFFFFFE)), "")
kind("dicom private tag without an end", dicom(element(0x00111010, "UN", b"x", 0xFFFFFFFF)), "")
kind("dicom sequence of 0xFFFFFFFE", dicom(element(0x00081140, "SQ", b"", 0xFFFFFFFE)), "")


def private(size: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        ds = slice_()
        own = element(0x7FE00010, "OB", ds.PixelData)
        del ds.PixelData
        with path.open("wb") as file:
            file.write(encoded(ds) + element(0x00111010, "OB", b"", size))
            file.seek(size, 1)
            file.write(own)

    return write


kind("dicom private tag of 400 MB", private(400 * MB), READ)
kind("dicom private tag of 1 GB", private(1 << 30), BYTES, True)
kind("dicom nested 10,000 deep", dicom(lambda: nested(10_000, False)), "", True)
kind("dicom nested 10,000 deep with lengths", dicom(lambda: nested(10_000, True)), "")
kind("dicom nested 1,000,000 deep", dicom(lambda: nested(1_000_000, False)), "")
kind("dicom 3,000,000 elements", dicom(lambda: tiny_explicit(3_000_000)), TOO_MANY)
kind(
    "dicom 3,000,000 implicit elements", dicom_implicit(lambda: tiny_elements(3_000_000)), TOO_MANY
)
for label, tag in (
    ("icon", 0x00880200),
    ("VOI LUT", 0x00283010),
    ("shared groups", 0x52009229),
    ("per-frame groups", 0x52009230),
    ("modality LUT", 0x00283000),
    ("regions", 0x00186011),
):
    refusal = READ if label == "icon" else TOO_MANY
    kind(
        f"dicom {label}: 2,000,000 items",
        dicom(lambda tag=tag: element(tag, "SQ", items(2_000_000))),
        refusal,
    )
    kind(
        f"dicom {label}: an item of 3,000,000 elements",
        dicom(lambda tag=tag: element(tag, "SQ", items(1, tiny_explicit(3_000_000)))),
        refusal,
    )
    kind(
        f"dicom {label}: elements one deeper",
        dicom(
            lambda tag=tag: element(
                tag, "SQ", items(1, element(tag, "SQ", items(1, tiny_explicit(3_000_000))))
            )
        ),
        refusal,
    )
for label, tag, value in (
    ("WindowCenter", 0x00281050, b"1\\"),
    ("WindowWidth", 0x00281051, b"1\\"),
    ("ImagePositionPatient", 0x00200032, b"1\\"),
    ("ImageOrientationPatient", 0x00200037, b"1\\"),
    ("InstanceNumber", 0x00200013, b"1\\"),
    ("PixelSpacing", 0x00280030, b"1\\"),
    ("ImageType", 0x00080008, b"A\\"),
    ("SOPClassUID", 0x00080016, b"1\\"),
    ("SeriesInstanceUID", 0x0020000E, b"1\\"),
    ("PatientName", 0x00100010, b"A\\"),
    ("SpecificCharacterSet", 0x00080005, b"A\\"),
    ("LUTDescriptor", 0x00283002, b"\1\0"),
    ("PixelPaddingValue", 0x00280120, b"\1\0"),
    ("Manufacturer", 0x00080070, b"A\\"),
    ("PhotometricInterpretation", 0x00280004, b"A\\"),
    ("FrameIncrementPointer", 0x00280009, b"\1\0\2\0"),
):
    kind(
        f"dicom {label} of 16 MB",
        dicom_implicit(lambda tag=tag, value=value: implicit(tag, value * (16 * MB // len(value)))),
        TOO_MANY,
        label in ("WindowCenter", "PixelPaddingValue"),
    )
kind(
    "dicom PatientName of one value",
    dicom_implicit(lambda: implicit(0x00100010, b"A" * (16 * MB))),
    TOO_MANY,
)
kind(
    "dicom 100,000 fragments",
    compressed(
        uid.JPEGBaseline8Bit,
        lambda: encapsulate(
            [picture("JPEG") + bytes(200_000)], fragments_per_frame=100_000, has_bot=False
        ),
        Rows=16,
        Columns=16,
    ),
    "",
)
kind(
    "dicom 4,000,000 fragments",
    compressed(
        uid.JPEGBaseline8Bit,
        lambda: b"\xfe\xff\x00\xe0\0\0\0\0" * 4_000_000 + b"\xfe\xff\xdd\xe0\0\0\0\0",
        Rows=16,
        Columns=16,
    ),
    "",
)
kind(
    "dicom fragments of 4 GB",
    compressed(
        uid.JPEGBaseline8Bit,
        b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\x00\xe0\xfe\xff\xff\xff" + bytes(500),
    ),
    "",
)
kind(
    "dicom offset table wrong",
    compressed(
        uid.JPEGBaseline8Bit,
        lambda: (
            struct.pack("<HHII", 0xFFFE, 0xE000, 4, 1 << 31)
            + encapsulate([picture("JPEG")], has_bot=False)[8:]
        ),
        Rows=16,
        Columns=16,
    ),
    "",
)
kind(
    "dicom offset table of 40 MB",
    compressed(
        uid.JPEGBaseline8Bit,
        lambda: (
            struct.pack("<HHI", 0xFFFE, 0xE000, 40 * MB)
            + bytes(40 * MB)
            + encapsulate([picture("JPEG")], has_bot=False)[8:]
        ),
        Rows=16,
        Columns=16,
    ),
    "",
)
kind(
    "dicom offset table odd",
    compressed(
        uid.JPEGBaseline8Bit,
        lambda: (
            struct.pack("<HHI", 0xFFFE, 0xE000, 3)
            + bytes(3)
            + encapsulate([picture("JPEG")], has_bot=False)[8:]
        ),
        Rows=16,
        Columns=16,
    ),
    "",
)
for label, table, lengths in (("beyond", 1 << 40, 100), ("long", 0, 1 << 40), ("zero", 0, 0)):
    extended = dict(
        ExtendedOffsetTable=struct.pack("<Q", table),
        ExtendedOffsetTableLengths=struct.pack("<Q", lengths),
    )
    kind(
        f"dicom extended offset table {label}",
        compressed(
            uid.JPEGBaseline8Bit,
            lambda: [picture("JPEG")],
            bot=False,
            Rows=16,
            Columns=16,
            **extended,
        ),
        "",
    )
kind(
    "dicom 10,000 frames of one stream",
    compressed(
        uid.JPEGBaseline8Bit, lambda: [picture("JPEG")], NumberOfFrames=10_000, Rows=16, Columns=16
    ),
    "",
)
kind(
    "dicom jpeg cut at 20%",
    compressed(
        uid.JPEGBaseline8Bit, lambda: [picture("JPEG", (600, 600))[:900]], Rows=600, Columns=600
    ),
    "without an end",
    True,
)
kind(
    "dicom segmented palette bomb",
    dicom(
        *(element(0x00281101 + i, "US", struct.pack("<3H", 0, 0, 16)) for i in range(3)),
        *(
            element(0x00281221 + i, "OW", struct.pack("<3H", 1, 65535, 1) * 10_000)
            for i in range(3)
        ),
        PhotometricInterpretation="PALETTE COLOR",
    ),
    "segmented palette",
)
kind(
    "dicom palette shorter than stated",
    dicom(
        *(element(0x00281101 + i, "US", struct.pack("<3H", 0, 0, 16)) for i in range(3)),
        *(element(0x00281201 + i, "OW", bytes(8)) for i in range(3)),
        PhotometricInterpretation="PALETTE COLOR",
    ),
    "palette is shorter",
)


def lut() -> bytes:
    numbers = element(0x00283002, "US", struct.pack("<3H", 0, 0, 16))
    return element(0x00283000, "SQ", items(1, numbers + element(0x00283006, "OW", bytes(20 * MB))))


kind("dicom LUT of 20 MB", dicom(lut), READ)
kind(
    "dicom window not a number",
    dicom(element(0x00281050, "DS", b"nan "), element(0x00281051, "DS", b"inf ")),
    READ,
)
kind(
    "dicom slope infinite",
    dicom(element(0x00281052, "DS", b"0 "), element(0x00281053, "DS", b"inf ")),
    "NaN or infinite",
)
for syntax in (uid.MPEG2MPML, uid.HEVCMP51, uid.JPIPHTJ2KReferenced):
    kind(
        f"dicom transfer syntax {syntax[-8:]}",
        compressed(syntax, [bytes(100)]),
        "no decoder here can read",
    )
kind(
    "dicom DICOMDIR",
    dicom(element(0x00041220, "SQ", items(1)), SOPClassUID=uid.MediaStorageDirectoryStorage),
    "DICOMDIR",
    name="DICOMDIR",
)
kind("dicom report", dicom(SOPClassUID=uid.BasicTextSRStorage), "not an image (Basic Text SR")
kind(
    "dicom without DICM",
    lambda path: (dicom()(path), path.write_bytes(path.read_bytes()[132:])),
    READ,
)
kind("dicom only a preamble", raw(bytes(128), b"DICM"), "")
kind("dicom only 131 bytes", raw(bytes(128), b"DIC"), "no DICM prefix")
kind(
    "dicom meta group without end",
    raw(bytes(128), b"DICM", element(0x00020010, "UI", b"1.2.840.10008.1.2.1\0", 65000)),
    "",
)
kind(
    "dicom meta group of 40 MB",
    raw(bytes(128), b"DICM", lambda: element(0x00020102, "OB", bytes(40 * MB))),
    "",
)
kind(
    "dicom meta group of 3,000,000",
    raw(bytes(128), b"DICM", lambda: element(0x00020016, "AE", b"") * 3_000_000),
    TOO_MANY,
)
kind("dicom 1 TB", sparse(1 << 40, bytes(128) + b"DICM"), BYTES, True)

# ---- NIfTI


def nifti(shape, kind_=4, bits=16, offset=352.0, size=None, magic=b"n+1\0", **fields) -> bytes:
    """A header of NIfTI-1."""
    head = bytearray(348)
    struct.pack_into("<i", head, 0, 348)
    dims = fields.get("dims", len(shape))
    struct.pack_into("<8h", head, 40, dims, *(list(shape) + [1] * 7)[:7])
    struct.pack_into("<2h", head, 70, kind_, bits)
    struct.pack_into("<8f", head, 76, 1, *[1.0] * 7)
    struct.pack_into("<f", head, 108, offset)
    struct.pack_into("<2f", head, 112, fields.get("slope", 0.0), 0)
    struct.pack_into("<2h", head, 252, 0, 1)
    struct.pack_into("<12f", head, 280, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
    head[344:348] = magic
    return bytes(head) + bytes(4)


def volume(shape, kind_=4, bits=16, **fields) -> Callable[[Path], None]:
    return sparse(352 + int(np.prod(shape)) * bits // 8, nifti(shape, kind_, bits, **fields))


def packed(shape, kind_=4, bits=16, level=1, more=0, head=None, **fields) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with gzip.open(path, "wb", level) as file:
            file.write(head or nifti(shape, kind_, bits, **fields))
            left = int(np.prod(shape)) * bits // 8 + more
            while left > 0:
                file.write(bytes(min(left, MB)))
                left -= MB

    return write


kind("nifti 32767^3", nifti((32767, 32767, 32767)), LARGE, True)
kind("nifti 7 axes of 32767", nifti((32767,) * 7), "axes and 2 to 4 are read")
kind("nifti negative axis", nifti((8, -8, 8)), "")
kind("nifti axis of 0", nifti((8, 0, 8)), "says it has")
for dims in (0, 1, 8, -1, 32767):
    kind(f"nifti dim[0] of {dims}", raw(nifti((8, 8, 2), dims=dims), bytes(256)), "")
for offset in (1e9, -1.0, float("nan"), float("inf"), 1e30, 0.0):
    kind(f"nifti voxels at {offset:g}", raw(nifti((8, 8, 2), offset=offset), bytes(256)), "")
kind("nifti 20,000 slices of 1x1", volume((1, 1, 20_000)), FRAMES, True)
kind("nifti 9,999 slices of 1x1", volume((1, 1, 9_999)), THIN, True)
kind("nifti 100 x 200 of 1x1", volume((1, 1, 100, 200)), FRAMES)
for ending, make in ((".nii", volume), (".nii.gz", packed)):
    kind(f"nifti{ending} fMRI 64x64x30x200", make((64, 64, 30, 200)), READ, name=f"a{ending}")
    kind(f"nifti{ending} float64 512^3", make((512, 512, 512), 64, 64), "bytes", name=f"a{ending}")
    kind(f"nifti{ending} float64 400^3", make((400, 400, 400), 64, 64), READ, name=f"a{ending}")
    kind(f"nifti{ending} uint8 640^3", make((640, 640, 640), 2, 8), READ, name=f"a{ending}")
    kind(f"nifti{ending} int16 512^3", make((512, 512, 512)), READ, name=f"a{ending}")
    kind(f"nifti{ending} RGB 400^3", make((400, 400, 400), 128, 24), READ, name=f"a{ending}")
    kind(f"nifti{ending} RGB 560^3", make((560, 560, 560), 128, 24), READ, name=f"a{ending}")
    kind(f"nifti{ending} 8000x8000x4", make((8000, 8000, 4), 2, 8), READ, name=f"a{ending}")
    kind(f"nifti{ending} 4x8000x8000", make((4, 8000, 8000), 2, 8), THIN, name=f"a{ending}")
    kind(f"nifti{ending} 1x8000x8000", make((1, 8000, 8000), 16, 32), READ, name=f"a{ending}")
    kind(f"nifti{ending} 10,000x160x160", make((10_000, 160, 160), 2, 8), READ, name=f"a{ending}")
kind("nifti complex", volume((8, 8, 2), 32, 64), "voxels of kind")
kind("nifti float128", volume((8, 8, 2), 1536, 128), "")
kind("nifti unknown type", volume((8, 8, 2), 99, 16), "")
kind("nifti slope not a number", volume((8, 8, 2), slope=float("nan")), READ)
kind("nifti slope 1e38", raw(nifti((8, 8, 2), slope=1e38), b"\xff\x7f" * 128), "NaN, infinite")
kind(
    "nifti extension of 2 GB",
    raw(nifti((8, 8, 2))[:348], b"\1\0\0\0", struct.pack("<2i", 2**31 - 16, 2), bytes(256)),
    READ,
)
kind(
    "nifti affine flat",
    lambda: nifti((8, 8, 2))[:280] + bytes(48) + nifti((8, 8, 2))[328:] + bytes(256),
    "flattens space",
)
kind("nifti only a header", nifti((8, 8, 2)), "is truncated")
kind("nifti pair without voxels", nifti((8, 8, 2), magic=b"ni1\0"), "does not exist", name="a.hdr")
kind(
    "nifti pair and a pipe",
    lambda path: (
        path.write_bytes(nifti((8, 8, 2), magic=b"ni1\0")),
        os.mkfifo(path.with_suffix(".img")),
    ),
    "no regular file",
    name="a.hdr",
)
kind(
    "nifti pair and a link to itself",
    lambda path: (
        path.write_bytes(nifti((8, 8, 2), magic=b"ni1\0")),
        path.with_suffix(".img").symlink_to("a.img"),
    ),
    "cannot be read",
    name="a.hdr",
)
kind(
    "nifti pair and 1 TB",
    lambda path: (
        path.write_bytes(nifti((8, 8, 2), magic=b"ni1\0")),
        sparse(1 << 40)(path.with_suffix(".img")),
    ),
    BYTES,
    name="a.hdr",
)
kind("nifti 1 TB", sparse(1 << 40, nifti((8, 8, 2))), BYTES, True)
kind("gzip bomb behind a volume", packed((8, 8, 2), more=560 * MB), "unpacks to more than", True)
kind(
    "gzip bomb without a header",
    packed((1, 1, 1), more=1000 * MB, head=bytes(352)),
    "no magic letters",
)
kind("gzip of gzip", lambda: gzip.compress(gzip.compress(nifti((8, 8, 2)) + bytes(256))), "")
kind(
    "gzip of gzip of gzip of zeros",
    lambda: gzip.compress(gzip.compress(gzip.compress(bytes(99 * MB)))),
    "",
)
kind(
    "gzip of 300,000 members",
    lambda: gzip.compress(nifti((8, 8, 2)) + bytes(256)) + gzip.compress(b"") * 300_000,
    READ,
)
kind(
    "gzip of 500 members",
    lambda: b"".join(gzip.compress(bytes([b])) for b in nifti((8, 8, 2)) + bytes(256)),
    READ,
)
kind(
    "gzip with a name of 40 MB",
    raw(b"\x1f\x8b\x08\x08", bytes(6), lambda: b"A" * (40 * MB)),
    "gzip",
)
kind("gzip with a comment without end", raw(b"\x1f\x8b\x08\x10", bytes(6), b"A" * 1000), "gzip")
kind("gzip cut", lambda: gzip.compress(nifti((64, 64, 20)) + os.urandom(163_840))[:-9000], "gzip")
kind("gzip checksum", lambda: gzip.compress(nifti((8, 8, 2)) + bytes(256))[:-8] + bytes(8), "gzip")
kind(
    "gzip with rubbish behind",
    lambda: gzip.compress(nifti((8, 8, 2)) + bytes(256)) + b"rubbish" * 99,
    "gzip",
)
kind("gzip of a PNG", lambda: gzip.compress(picture("PNG")), "is not a PNG", name="a.png")

# ---- PNG


def chunk(name: bytes, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">I", size) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *chunks: bytes, depth=8, colour=0, interlace=0, data=None) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    if data is None:
        samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        row = 1 + -(-width * samples * depth // 8)
        data = zeros(row * height) if width * height <= 500_000_000 else zlib.compress(bytes(99))
    parts = (chunk(b"IHDR", head), *chunks, chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(count: int, level: int = 9) -> bytes:
    packer, parts = zlib.compressobj(level), []
    for _ in range(count // MB):
        parts.append(packer.compress(bytes(MB)))
    return b"".join([*parts, packer.compress(bytes(count % MB)), packer.flush()])


def lazily(make: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(make())


for size in (65535, 2**31 - 1):
    kind(f"png header {size}", lazily(lambda size=size: png(size, size)), "are read", True)
kind("png header 0", lambda: png(0, 0, data=zeros(9)), "")
kind("png 20000x20000", lambda: png(20000, 20000, depth=1), LARGE)
kind("png 8000x8000", lambda: png(8000, 8000), READ)
kind("png 8000x8000 of 16 bits", lambda: png(8000, 8000, depth=16), READ)
kind("png 8000x8000 RGBA", lambda: png(8000, 8000, colour=6), READ)
kind("png 8000x8000 RGBA of 16 bits", lambda: png(8000, 8000, colour=6, depth=16), READ)
kind("png 8000x8000 grey with alpha of 16 bits", lambda: png(8000, 8000, colour=4, depth=16), READ)
kind(
    "png 8000x8000 palette with transparency",
    lambda: png(8000, 8000, chunk(b"PLTE", bytes(768)), chunk(b"tRNS", bytes(256)), colour=3),
    READ,
)
kind(
    "png 8000x8000 interlaced", lambda: png(8000, 8000, interlace=1, data=zeros(8100 * 8100)), READ
)
kind("png 1 x 60,000,000", lambda: png(1, 60_000_000), "")
kind("png 60,000,000 x 1", lambda: png(60_000_000, 1), "")
kind("png 65535 x 900", lambda: png(65535, 900), READ)
kind("png IDAT of 1 GB", lambda: png(16, 16, data=zeros(1000 * MB, 1)), "")
profile = b"p\0\0"
kind("png iCCP bomb", lambda: png(16, 16, chunk(b"iCCP", profile + zeros(200 * MB, 1))), "", True)
kind("png zTXt bomb", lambda: png(16, 16, chunk(b"zTXt", b"t\0\0" + zeros(1000 * MB, 1))), "")
kind("png iTXt bomb", lambda: png(16, 16, chunk(b"iTXt", b"t\0\1\0\0\0" + zeros(1000 * MB, 1))), "")
kind(
    "png 200 zTXt of 15 MB",
    lambda: png(16, 16, *[chunk(b"zTXt", b"t%d\0\0" % i + zeros(15 * MB)) for i in range(200)]),
    "",
)
kind(
    "png 500,000 texts",
    lambda: png(16, 16, *[chunk(b"tEXt", b"k%d\0x" % i) for i in range(500_000)]),
    "",
)
kind(
    "png eXIf of 20 MB",
    lambda: png(16, 16, chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + bytes(20 * MB))),
    "",
)
kind("png chunk of 2 GB", lambda: png(16, 16, chunk(b"tEXt", b"k\0x", 2**31 - 1)), "")
kind("png checksum", lambda: png(16, 16)[:29] + bytes(4) + png(16, 16)[33:], "")
kind("png cut", lambda: png(600, 600, data=zlib.compress(os.urandom(360_600)))[:90_000], BROKEN)
kind("png with rubbish behind", lambda: png(16, 16) + bytes(9999), READ)
kind("png palette missing", lambda: png(16, 16, colour=3), "no palette", True)
frame_ = struct.pack(">IIIIIHHBB", 0, 16, 16, 0, 0, 1, 1, 0, 0)
kind(
    "png APNG of 10,000 frames",
    lambda: png(
        16, 16, chunk(b"acTL", struct.pack(">II", 10_000, 0)), *[chunk(b"fcTL", frame_)] * 10_000
    ),
    "",
)
kind(
    "png APNG of 2^31 frames",
    lambda: png(16, 16, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
    "",
)
kind("png 1 TB", sparse(1 << 40, png(16, 16)), BYTES, True)
kind("png 500 MB", sparse(500 * MB, png(16, 16)), READ)

# ---- JPEG, BMP, TIFF and what Pillow could read

kind("jpeg header 65500", lambda: resized_jpeg(picture("JPEG"), 65500, 65500), LARGE, True)
kind("jpeg header 60000x1000", lambda: resized_jpeg(picture("JPEG"), 60000, 1000), "truncated")
kind("jpeg 8000x8000", lambda: picture("JPEG", (8000, 8000)), READ)
kind("jpeg 8000x8000 CMYK", lambda: picture("JPEG", (8000, 8000), "CMYK"), READ)
kind(
    "jpeg 8000x8000 progressive",
    lambda: picture("JPEG", (8000, 8000), "RGB", progressive=True),
    READ,
)


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG with its last scan many times."""
    stream = picture("JPEG", (side, side), "L", progressive=True)
    last = stream.rindex(b"\xff\xda")
    return stream[:-2] + stream[last:-2] * count + b"\xff\xd9"


kind("jpeg 8000x8000 of 2,000 scans", lambda: many_scans(8000, 2_000), "2,011 scans")
kind("jpeg of 100,000 scans", lambda: many_scans(16, 100_000), "scans and at most 100", True)
kind(
    "jpeg comments of 64 MB",
    lambda: picture("JPEG")[:2] + (b"\xff\xfe\xff\xff" + bytes(65533)) * 1000 + picture("JPEG")[2:],
    READ,
)
kind(
    "jpeg profiles of 64 MB",
    lambda: (
        picture("JPEG")[:2]
        + (b"\xff\xe2\xff\xff" + b"ICC_PROFILE\0\1\xff" + bytes(65519)) * 1000
        + picture("JPEG")[2:]
    ),
    "",
)
kind(
    "jpeg EXIF of 65,535 entries",
    lambda: (
        picture("JPEG")[:2]
        + b"\xff\xe1\xff\xff"
        + b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
        + bytes(65511)
        + picture("JPEG")[2:]
    ),
    "",
)
kind(
    "jpeg EXIF loop",
    lambda: (
        picture("JPEG")[:2]
        + b"\xff\xe1\0\x24"
        + b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0"
        + picture("JPEG")[2:]
    ),
    "",
)
kind("jpeg cut", lambda: picture("JPEG", (600, 600), quality=99)[:-900], BROKEN)
kind("jpeg markers without end", b"\xff\xd8\xff\xe0\0\x10", "")
kind(
    "jpeg MPO of 2^31 pictures",
    lambda: (
        picture("JPEG")[:2]
        + b"\xff\xe2\0\x2aMPF\0II*\0\x08\0\0\0\1\0\1\xb0\4\0\1\0\0\0\xff\xff\xff\x7f\0\0\0\0"
        + bytes(6)
        + picture("JPEG")[2:]
    ),
    "",
)


def bmp(width, height, bits=24, packing=0, colours=0, data=b"") -> bytes:
    head = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, packing, len(data), 0, 0, colours, 0
    )
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + head + data


for width, height in ((65535, 65535), (2**31 - 1, 2**31 - 1), (-5, 5), (5, -(2**31)), (0, 0)):
    said = "are read" if width else "is not a PNG"
    kind(f"bmp header {width}x{height}", bmp(width, height), said, width == 65535)
kind("bmp runs 8000x8000", bmp(8000, 8000, 8, 1, 1, bytes(4) + b"\xff\0" * 300_000), BROKEN)
kind("bmp 8000x8000", sparse(54 + 192_000_000, bmp(8000, 8000)), READ)
kind("bmp 2^31 colours", bmp(16, 16, 8, 0, 2**31 - 1, bytes(2000)), BROKEN)


def tiff(
    tags: dict[int, tuple[int, int, int]], data: bytes = b"", following: int = 0, count=None
) -> bytes:
    """One directory; tag -> (type, count, value or offset)."""
    entries = b"".join(struct.pack("<HHII", t, *v) for t, v in sorted(tags.items()))
    head = (
        b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags) if count is None else count)
    )
    return head + entries + struct.pack("<I", following) + data


def page(
    width=16, height=16, bits=8, packing=1, photometric=1, offset=8, size=256, rows=None, **more
):
    tags = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 1, bits),
        259: (3, 1, packing),
        262: (3, 1, photometric),
        273: (4, 1, offset),
        277: (3, 1, 1),
        278: (4, 1, rows or height),
        279: (4, 1, size),
    }
    return tags | {int(k[1:]): v for k, v in more.items()}


def pages(count: int, width=1, height=1, packing=1, data=b"\0" * 256) -> bytes:
    """As many directories over the same pixels."""
    size = 2 + 12 * 9 + 4
    start = 8 + len(data)
    parts = [b"II*\0", struct.pack("<I", start), data]
    for i in range(count):
        tags = page(width, height, packing=packing, size=len(data))
        following = 0 if i == count - 1 else start + (i + 1) * size
        entries = b"".join(struct.pack("<HHII", t, *v) for t, v in tags.items())
        parts.append(struct.pack("<H", 9) + entries + struct.pack("<I", following))
    return b"".join(parts)


kind("tiff header 65535", tiff(page(65535, 65535)), LARGE, True)
kind("tiff header 2^32", tiff(page(2**32 - 1, 2**32 - 1)), "at most 65,535 a side")
kind("tiff 2^31 strips", tiff(page(s273=(4, 2**31, 8), s279=(4, 2**31, 8))), OTHER)
kind("tiff 65,535 tags", tiff(page(), count=65535), BROKEN)
kind("tiff tag of 4 GB", tiff(page(s270=(2, 2**32 - 1, 8)), bytes(999)), READ)
kind("tiff tag of 12 x 2^32 bytes", tiff(page(s700=(12, 2**32 - 1, 8)), bytes(999)), READ)
kind("tiff text of 60 MB", lambda: tiff(page(s270=(2, 60 * MB, 400)), bytes(61 * MB)), READ)
kind("tiff numbers of 60 MB", lambda: tiff(page(s65000=(3, 30 * MB, 400)), bytes(61 * MB)), READ)
kind("tiff rationals of 400 MB", sparse(401 * MB, tiff(page(s65000=(5, 50 * MB, 400)))), READ)
kind(
    "tiff 10,000,000 strips",
    lambda: tiff(page(s273=(4, 10_000_000, 400), s279=(4, 10_000_000, 400)), bytes(41 * MB)),
    READ,
)
kind("tiff directory loop", tiff(page(), bytes(256), following=8), "lead back to themselves")
kind(
    "tiff directory before itself", tiff(page(), bytes(256), following=4), "lead back to themselves"
)
kind("tiff directory beyond the file", tiff(page(), bytes(256), following=2**31), READ)
kind("tiff sub-directory loop", tiff(page(s330=(4, 1, 8), s34665=(4, 1, 8)), bytes(256)), READ)
kind("tiff 100,000 pages of 1x1", lambda: pages(100_000), "at most 10,000")
kind("tiff 9,999 pages of 1x1", lambda: pages(9_999), THIN)
kind("tiff 1,000 pages of 8x8", lambda: pages(1_000, 8, 8), READ)
kind("tiff 4 pages of 8000x8000", lambda: pages(4, 8000, 8000, 8, zeros(64_000_000)), READ)
kind("tiff 250 pages of 1000x1000", lambda: pages(250, 1000, 1000, 8, zeros(1_000_000)), READ)
kind("tiff 5 pages of 8000x8000", lambda: pages(5, 8000, 8000, 8, zeros(64_000_000)), "are read")
kind("tiff deflate bomb", lambda: pages(1, 16, 16, 8, zeros(1000 * MB, 1)), READ)
for name, mode, compression in (
    ("LZW", "L", "tiff_lzw"),
    ("CMYK", "CMYK", "tiff_lzw"),
    ("floats", "F", "tiff_lzw"),
    ("16 bits", "I;16", "tiff_lzw"),
    ("fax", "1", "group4"),
    ("JPEG", "RGB", "jpeg"),
):
    large = partial(picture, "TIFF", (8000, 8000), mode, compression=compression)
    kind(f"tiff {name} 8000x8000", lazily(large), READ)
kind("tiff pixels beyond the file", tiff(page(offset=2**31)), BROKEN)
kind("tiff strip of 4 GB", tiff(page(offset=200, size=2**32 - 1), bytes(999)), READ)
kind("tiff 1000 bits", tiff(page(bits=1000), bytes(999)), OTHER)
kind("tiff 65,535 samples", tiff(page(s277=(3, 1, 65535)), bytes(999)), "values (uint8) per pixel")
kind(
    "tiff tiles of 1x1",
    tiff(page(4000, 4000, s322=(4, 1, 1), s323=(4, 1, 1), s324=(4, 1, 8), s325=(4, 1, 1))),
    BROKEN,
)
kind(
    "tiff tile of 2^31",
    tiff(page(s322=(4, 1, 2**31), s323=(4, 1, 2**31), s324=(4, 1, 8), s325=(4, 1, 1))),
    BROKEN,
)
kind("tiff orientation 99", tiff(page(offset=200, s274=(3, 1, 99)), bytes(999)), READ)
kind("tiff big header", b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**62), BROKEN)
kind("tiff compression unknown", tiff(page(packing=60000), bytes(999)), OTHER)
kind("tiff 1 TB", sparse(1 << 40, tiff(page(offset=200), bytes(999))), BYTES)


def gif(width, height, frames: int) -> bytes:
    one = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0"
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + one * frames
        + b";"
    )


FOREIGN = {
    "GIF 65535": lambda: gif(65535, 65535, 1),
    "GIF of 100,000 frames": lambda: gif(4, 4, 100_000),
    "WebP": lambda: picture("WEBP"),
    "WebP 16384": lambda: b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f" + bytes(9),
    "AVIF": lambda: b"\0\0\0\x20ftypavif" + bytes(999),
    "HEIC": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(999),
    "SVG": lambda: (
        b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "aaaa">]>'
        b'<svg xmlns="http://www.w3.org/2000/svg" width="65535" height="65535">&a;</svg>'
    ),
    "PDF": lambda: b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF",
    "HTML": lambda: b"<!doctype html><title>403</title><p>Log in first",
    "EXR": lambda: b"\x76\x2f\x31\x01\2\0\0\0" + bytes(999),
    "PSD": lambda: (
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + bytes(99)
    ),
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 65535 65535\n%%EOF",
    "ICO": lambda: picture("ICO"),
    "PPM": lambda: b"P6 65535 65535 255\n" + bytes(99),
    "zip": lambda: archive(),
    "tar": lambda: tape(),
    "HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(999),
    "npy": lambda: numpy_file(),
    "npy of 1 TB": lambda: (
        b"\x93NUMPY\1\0v\0{'descr': '<f8', 'fortran_order': False, "
        b"'shape': (1099511627776,), }".ljust(73)
        + b"\n"
    ),
    "pickle": lambda: pickle.dumps({"a": os.getcwd}),
    "ELF": lambda: b"\x7fELF\2\1\1" + bytes(999),
    "text": lambda: b"Patient;Alter\nA;34\n",
    "NUL bytes": lambda: bytes(4096),
    "random bytes": lambda: np.random.default_rng(0).bytes(4096),
    "nothing": lambda: b"",
    "one byte": lambda: b"\0",
    "a line break": lambda: b"\n",
    "UTF-16": lambda: "nur Text".encode("utf-16"),
}


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../a.png", bytes(MB))
    return buffer.getvalue()


def tape() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("/a.png"))
    return buffer.getvalue()


def numpy_file() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((9, 9)))
    return buffer.getvalue()


ENDINGS = {"png": "a PNG", "tif": "a PNG", "dcm": "a DICOM", "nii": "a NIfTI", "nii.gz": "gzip"}
for number, (content, make) in enumerate(FOREIGN.items()):
    for ending, wanted in ENDINGS.items():
        said = f"is not {wanted}" if content != "nothing" else "is empty"
        fast = number % 9 == 0 and ending == "png"
        kind(f"foreign {content} as {ending}", make, said, fast, name=f"a.{ending}")

# ---- what else lies in folders


def bind(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


NO_FILE = "no regular file"
LINKS = dict.fromkeys(("/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "/"), FOLLOWED)
LINKS |= {"nothing": "a link to what is not there", "": "cannot be opened"}
for ending in ("png", "dcm", "nii.gz"):
    name = f"a.{ending}"
    kind(f"place pipe {ending}", lambda path: os.mkfifo(path), NO_FILE, True, name=name)
    kind(f"place socket {ending}", bind, NO_FILE, name=name)
    for target, said in LINKS.items():
        fast = target == "/dev/zero"
        link = partial(os.symlink, target or name)
        kind(f"place link to {target or 'itself'} {ending}", link, said, fast, name=name)
    kind(f"place link of links {ending}", lambda path: chain(path, 60), LINKS["nothing"], name=name)


def chain(path: Path, count: int) -> None:
    for i in range(count):
        path.with_name(f".{i}" if i else path.name).symlink_to(f".{i + 1}")


SMALL_PNG = picture("PNG", (20, 20))
for label, name in {
    "of 255 bytes": "n" * 251 + ".png",
    "of 255 bytes in letters of 3": "\u4e00" * 83 + "ab.png",
    "with a line break": "a\nb.png",
    "with escapes": "\x1b]0;x\x07\x1b[31ma.png",
    "that turns": "a\u202egnp.exe.png",
    "without text": "\udcff\udcfe.png",
    "of zero width": "a\u200b\ufeff.png",
    "of combining marks": "a" + "\u0301" * 100 + ".png",
    "like a flag": "--output=x.png",
    "like a formula": "=cmd|' '!A1.png",
    "like a pattern": "[a]*?.png",
    "like markup": "<script>[b]x[-b].png",
    "with quotes": "a\"',;.png",
    "with backslashes": "a\\..\\b.png",
    "like a device": "CON.png",
    "of one dot more": "a..png",
    "in capitals": "A.PNG",
    "with percent": "%s{0}%n.png",
}.items():
    kind(
        f"name {label}", SMALL_PNG, READ, label in ("with a line break", "without text"), name=name
    )


def write(folder: Path, labels=None) -> dict[str, Path]:
    """The files of these kinds, all without, each in a folder of its own; by label."""
    paths = {}
    for number, (label, one) in enumerate(KINDS.items()):
        if labels is None or label in labels:
            place = folder / f"{number:03d}"
            place.mkdir(parents=True)
            paths[label] = place / one.name
            one.write(paths[label])
    return paths
