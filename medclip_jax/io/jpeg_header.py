"""What a compressed stream inside DICOM says of itself: size, depth, colour, and whether it ends.

Layouts: ISO/IEC 10918-1 B.2 (JPEG; JPEG-LS, ISO/IEC 14495-1 C.2.2, has the same frame header) and
ISO/IEC 15444-1 A.4 to A.6 (JPEG 2000; HTJ2K has the same).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medclip_jax.errors import DataError

FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF0-15 without DHT, JPG, DAC; LS
LOSSY = {0xC0, 0xC1, 0xC2}  # Huffman: baseline, extended, progressive
ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RST0-7, SOI
SOI, SOS = b"\xff\xd8", b"\xff\xda"
MAX_SCANS = 100  # of a picture; encoders write about ten
SOC_SIZ, SOT, COD, EOC = b"\xff\x4f\xff\x51", b"\xff\x90", b"\xff\x52", b"\xff\xd9"
JUNK = b"\x55\xaa\x12\x34\x9b\x6d" * 200  # without a marker
GREY, NEAR = 128, 16  # what decoders put in place of missing blocks
RGB_LETTERS = (b"RGB", b"rgb")


class StreamHeader(NamedTuple):
    """What one compressed frame states."""

    width: int
    height: int
    components: int
    precision: int  # bits per sample
    colour: str  # "RGB" or "YBR" where the stream says so, else ""
    lossy_jpeg: bool  # DCT with Huffman codes and 8 bits, which Pillow decodes
    whole: bool  # its last marker is there
    progressive: bool = False


def parse(stream: bytes) -> StreamHeader | None:
    """The header of a JPEG, JPEG-LS or JPEG 2000 stream; None if it has no size."""
    if stream[:2] == SOI:
        return _jpeg(stream)
    return _jpeg2000(stream)


def check_scans(path: Path, stream: bytes, pictures: int = 1) -> None:
    """Raise DataError for a JPEG of far too many scans: each takes as long as the whole picture."""
    if (count := stream.count(SOS)) > MAX_SCANS + 4 * pictures:
        raise DataError(
            f"{path} has a JPEG of {count:,} scans and at most {MAX_SCANS} are decoded: save it "
            "again or remove it if it is not yours."
        )


def ends_early(stream: bytes, last: Any, decode: Callable[[bytes], np.ndarray]) -> bool:
    """Whether a JPEG stops before its last pixel, although its last marker is there.

    Decoders fill up what is missing and say nothing. Only then do bytes before the marker change
    the picture, which is decoded again where it may be so.

    Args:
      last: the decoded last pixel, a number or one of each colour.
    """
    head = parse(stream)
    if head is None or stream[:2] != SOI:
        return False
    baseline = head.lossy_jpeg and not head.progressive
    if baseline and np.abs(np.subtract(last, GREY, dtype=int)).max() > NEAR:
        return False
    end = stream.rfind(EOC)
    # behind each restart marker too, one of which a stream cut between its intervals waits for
    more = JUNK + b"".join(bytes((0xFF, 0xD0 + i)) + JUNK for i in range(8))
    return not np.array_equal(decode(stream), decode(stream[:end] + more + stream[end:]))


def _segments(stream: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(marker, offset, content) up to the first scan."""
    offset = 2
    while offset + 4 <= len(stream) and stream[offset] == 0xFF:
        marker = stream[offset + 1]
        if marker == 0xFF:  # fill byte
            offset += 1
        elif marker in ALONE:
            offset += 2
        else:
            length = max(2, int.from_bytes(stream[offset + 2 : offset + 4]))
            yield marker, offset, stream[offset + 4 : offset + 2 + length]
            if marker == 0xDA:
                return
            offset += 2 + length


def _jpeg(stream: bytes) -> StreamHeader | None:
    frame, kind, scan, jfif, adobe = b"", 0, len(stream), False, None
    for marker, offset, content in _segments(stream):
        if marker in FRAMES and not frame:
            kind, frame = marker, content
        elif marker == 0xE0 and content[:4] == b"JFIF":
            jfif = True
        elif marker == 0xEE and content[:5] == b"Adobe" and len(content) >= 12:
            adobe = content[11]
        elif marker == 0xDA:
            scan = offset
    if len(frame) < 6:
        return None
    precision, count = frame[0], frame[5]
    table = frame[6 : 6 + 3 * count]
    letters, sampling = table[::3], set(table[1::3])
    lossy, colour = kind in LOSSY, ""
    if count == 3 and letters in RGB_LETTERS:
        colour = "RGB"
    elif count == 3 and lossy:
        if adobe is not None and not jfif:
            colour = "YBR" if adobe else "RGB"
        elif jfif or len(sampling) > 1:
            colour = "YBR"
    return StreamHeader(
        int.from_bytes(frame[3:5]),
        int.from_bytes(frame[1:3]),
        count,
        precision,
        colour,
        lossy and precision == 8,
        stream.rfind(EOC) > scan,  # entropy-coded bytes never look like it
        kind == 0xC2,
    )


def _jpeg2000(stream: bytes) -> StreamHeader | None:
    start = stream.find(SOC_SIZ)  # at 0, or inside a JP2 file
    siz = stream[start + 4 :][:48]  # length, capabilities, x, y, x offset, y offset, tiles, count
    if start < 0 or len(siz) < 38:
        return None
    x, y, left, top = (int.from_bytes(siz[4 + 4 * i : 8 + 4 * i]) for i in range(4))
    precision, colour, offset = (siz[38:39] or b"\7")[0] % 128 + 1, "", start + 2
    whole = False
    while offset + 12 <= len(stream):
        marker, length = stream[offset : offset + 2], stream[offset + 2 : offset + 4]
        if marker == SOT:
            part = int.from_bytes(stream[offset + 6 : offset + 10])
            end = len(stream.rstrip(b"\0")) - 2 if part == 0 else offset + part
            whole = offset + 12 < end <= len(stream) and (part > 0 or stream[end : end + 2] == EOC)
            if part == 0 or not whole:
                break
            offset = end
        elif marker[:1] == b"\xff" and marker != EOC:
            if marker == COD and stream[offset + 8 : offset + 9] == b"\1":
                colour = "RGB"  # its own colour transform is undone by every decoder
            offset += 2 + max(2, int.from_bytes(length))
        else:
            break
    return StreamHeader(
        x - left, y - top, int.from_bytes(siz[36:38]), precision, colour, False, whole
    )
