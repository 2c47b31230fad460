"""Sizes that a compressed image states about itself, read before any decoder sees it.

A DICOM header may say 16 x 16 while the JPEG inside says 60000 x 60000: the decoder believes the
JPEG and fills the memory. Layouts: ISO/IEC 10918-1 B.2.2 (JPEG frame header; JPEG-LS, ISO/IEC
14495-1 C.2.2, has the same) and ISO/IEC 15444-1 A.5.1 (JPEG 2000 SIZ; HTJ2K has the same).
"""

from typing import NamedTuple

JPEG_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF0-15 without DHT, JPG, DAC; LS
ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RST0-7, SOI


class Size(NamedTuple):
    """What a codestream says it holds."""

    width: int
    height: int
    components: int


def stated_size(stream: bytes) -> Size | None:
    """Size stated by a JPEG, JPEG-LS or JPEG 2000 stream; None if it states none."""
    if stream[:2] == b"\xff\xd8":
        return _jpeg(stream)
    if stream[:4] == b"\xff\x4f\xff\x51":
        return _jpeg2000(stream)
    start = stream.find(b"\xff\x4f\xff\x51")  # inside a JP2 file
    return _jpeg2000(stream[start:]) if start >= 0 else None


def _jpeg(stream: bytes) -> Size | None:
    """Walk the segments up to the frame header; entropy-coded data come only after it."""
    offset = 2
    while offset + 4 <= len(stream):
        if stream[offset] != 0xFF:
            return None
        marker = stream[offset + 1]
        if marker == 0xFF:  # fill byte
            offset += 1
            continue
        if marker in ALONE:
            offset += 2
            continue
        if marker in JPEG_FRAMES:
            head = stream[offset + 4 : offset + 10]
            if len(head) < 6:
                return None
            height, width = int.from_bytes(head[1:3]), int.from_bytes(head[3:5])
            return Size(width, height, head[5])
        if marker == 0xDA:  # a scan before any frame
            return None
        offset += 2 + max(2, int.from_bytes(stream[offset + 2 : offset + 4]))
    return None


def _jpeg2000(stream: bytes) -> Size | None:
    """Marker SOC, then SIZ: length, capabilities, x, y, x offset, y offset, tiles, components."""
    siz = stream[4:]
    if len(siz) < 38:
        return None
    x, y, left, top = (int.from_bytes(siz[4 + 4 * i : 8 + 4 * i]) for i in range(4))
    return Size(x - left, y - top, int.from_bytes(siz[36:38]))
