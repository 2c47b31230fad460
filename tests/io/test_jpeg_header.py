"""Sizes stated in compressed streams: what encoders write, and streams that state nothing."""

import io

import numpy as np
import pytest
from PIL import Image

from medclip_jax.io.dicom_header import Size, stated_size

SIZ = bytes.fromhex("ff4fff51") + (47).to_bytes(2) + bytes(2)


def jpeg(shape=(30, 50), **options) -> bytes:
    held = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(held, "JPEG", **options)
    return held.getvalue()


def jpeg2000(x: int, y: int, left=0, top=0, components=3) -> bytes:
    sides = b"".join(v.to_bytes(4) for v in (x, y, left, top))
    return SIZ + sides + bytes(16) + components.to_bytes(2)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"long" * 900}])
def test_a_jpeg_of_pillow_states_its_size(options):
    assert stated_size(jpeg(**options)) == Size(50, 30, 1)
    assert stated_size(jpeg((30, 50, 3), **options)) == Size(50, 30, 3)


def test_fill_bytes_and_markers_without_length_are_passed_over():
    whole = jpeg()
    assert stated_size(whole[:2] + b"\xff\xff" + whole[3:]) == Size(50, 30, 1)
    assert stated_size(whole[:2] + b"\xff\x01\xff\xd0" + whole[2:]) == Size(50, 30, 1)


def test_jpeg_2000_is_measured_from_its_offset_also_inside_a_file():
    assert stated_size(jpeg2000(60, 40, 10, 5)) == Size(50, 35, 3)
    assert stated_size(b"jP  boxes" + jpeg2000(60, 40, components=1)) == Size(60, 40, 1)


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
        assert stated_size(stream) is None
