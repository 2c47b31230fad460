"""DICOM files that would unfold without end, or that no decoder is there for."""

import io
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid

from medclip_jax.errors import DataError
from medclip_jax.io import dicom_frames, dicom_header, jpeg_header, read
from tests.support.dicom import file, film, ramp, save


@pytest.mark.parametrize(
    "elements",
    [{"Rows": 60000, "Columns": 60000}, {"Rows": 4000, "Columns": 4000, "NumberOfFrames": 17}],
)
def test_bombs_are_refused_by_their_header(tmp_path, monkeypatch, elements):
    monkeypatch.setattr(dicom_frames, "stored", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"at most (64,000,000|268,435,456)"):
        read.read(save(tmp_path / "a.dcm", film(ramp(), **elements)))


STREAMS = {  # a header that states 60000 x 60000 and no more
    uid.JPEGBaseline8Bit: bytes.fromhex("ffd8ffc0000b08ea60ea6001011100ffd9"),
    uid.JPEGLSLossless: bytes.fromhex("ffd8fff7000b08ea60ea6001011100ffd9"),
    uid.JPEG2000: bytes.fromhex("ff4fff51002900000000ea600000ea60" + "00" * 8 + "0000ea600000ea60")
    + bytes(8)
    + bytes.fromhex("0001070101"),
}


@pytest.mark.parametrize("syntax", STREAMS, ids=lambda s: s.name)
def test_a_stream_larger_than_its_header_says_is_not_decoded(tmp_path, monkeypatch, syntax):
    monkeypatch.setattr(dicom_frames, "stored", lambda *_: pytest.fail("decoded"))
    ds = film(ramp(6, 8, np.uint8))
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = pydicom.encaps.encapsulate([STREAMS[syntax]])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    with pytest.raises(DataError, match="8 x 6 x 1 in its header and 60000 x 60000 x 1"):
        read.read(save(tmp_path / "a.dcm", ds))


def test_a_deflated_file_that_inflates_for_ever_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_header, "MAX_INFLATED", 3_000_000)
    monkeypatch.setattr(pydicom, "dcmread", lambda *_, **__: pytest.fail("inflated whole"))
    whole = file("deflated_u8").read_bytes()
    meta = 132 + 12 + int.from_bytes(whole[140:144], "little")
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflate.compress(bytes(50_000_000)) + deflate.flush()
    (tmp_path / "a.dcm").write_bytes(whole[:meta] + packed)
    with pytest.raises(DataError, match="inflates to more than 3,000,000 bytes"):
        read.read(tmp_path / "a.dcm")


def test_a_syntax_without_decoder_is_named(tmp_path):
    ds = film(ramp())
    ds.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    ds.PixelData = pydicom.encaps.encapsulate([b"1234"])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    with pytest.raises(DataError, match="MPEG2 Main Profile"):
        read.read(save(tmp_path / "a.dcm", ds))


def test_jpeg_without_its_extra_decoder(monkeypatch):
    """8-bit JPEG goes to Pillow; lossless is refused with what to install."""
    monkeypatch.setattr(dicom_frames, "find_spec", lambda name: None)

    def film(syntax):
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = syntax
        return ds

    assert dicom_frames.plugin(Path("a.dcm"), film(pydicom.uid.JPEGBaseline8Bit)) == "pillow"
    with pytest.raises(DataError, match=r"a\.dcm has JPEG Lossless.*pip install pylibjpeg-libjpeg"):
        dicom_frames.plugin(Path("a.dcm"), film(pydicom.uid.JPEGLosslessSV1))


# ---------------------------------------------------------------- sizes stated in streams

SIZ = bytes.fromhex("ff4fff51") + (47).to_bytes(2) + bytes(2)


def jpeg(shape=(30, 50), **options) -> bytes:
    stored = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(stored, "JPEG", **options)
    return stored.getvalue()


def jpeg2000(x: int, y: int, left=0, top=0, components=3) -> bytes:
    sides = b"".join(v.to_bytes(4) for v in (x, y, left, top))
    return SIZ + sides + bytes(16) + components.to_bytes(2)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"long" * 900}])
def test_a_jpeg_of_pillow_states_its_size(options):
    assert jpeg_header.parse(jpeg(**options))[:3] == (50, 30, 1)
    assert jpeg_header.parse(jpeg((30, 50, 3), **options))[:3] == (50, 30, 3)


def test_fill_bytes_and_markers_without_length_are_passed_over():
    whole = jpeg()
    assert jpeg_header.parse(whole[:2] + b"\xff\xff" + whole[3:])[:3] == (50, 30, 1)
    assert jpeg_header.parse(whole[:2] + b"\xff\x01\xff\xd0" + whole[2:])[:3] == (50, 30, 1)


def test_jpeg_2000_is_measured_from_its_offset_also_inside_a_file():
    assert jpeg_header.parse(jpeg2000(60, 40, 10, 5))[:3] == (50, 35, 3)
    assert jpeg_header.parse(b"jP  boxes" + jpeg2000(60, 40, components=1))[:3] == (60, 40, 1)


def test_a_stream_that_states_nothing_has_no_size():
    whole = jpeg()
    frame = whole.index(b"\xff\xc0")
    for stream in (
        b"",
        b"neither of them",
        whole[:2],
        whole[: frame + 6],  # ends within its frame header
        whole[:2] + b"\x00\x00" + whole[4:],  # no marker where one must be
        b"\xff\xd8\xff\xda" + bytes(20),  # a scan before any frame
        b"\xff\xd8\xff\xe0\x00\x10",  # a segment longer than the stream
        jpeg2000(60, 40)[:20],
    ):
        assert jpeg_header.parse(stream) is None
