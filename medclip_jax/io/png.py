"""PNG files of results, written fast: one filter for every row and Intel's deflate.

Pillow tries five filters on every row and deflates slowly; with it, writing an image's overlay and
map takes longer than the encoder takes for the image. Any reader reads these files.
"""

import struct
import zlib

import numpy as np
from isal import isal_zlib
from jaxtyping import UInt8, UInt16

UP = 2  # of the PNG filters: the difference to the row above
LEVEL = 1  # of isal, 0 to 3
COLOUR = {2: 0, 3: 2}  # axes of the array -> colour type


def encode(pixels: UInt8[np.ndarray, "h w *_"] | UInt16[np.ndarray, "h w"]) -> bytes:
    """A PNG of grey (8 or 16 bits) or RGB [h, w, 3] (8 bits) pixels (PNG, third edition, W3C)."""
    height, width = pixels.shape[:2]
    deep = pixels.dtype == np.uint16
    rows = np.ascontiguousarray(pixels.astype(">u2") if deep else pixels).view(np.uint8)
    rows = rows.reshape(height, -1)
    lines = np.empty((height, rows.shape[1] + 1), np.uint8)
    lines[:, 0] = UP
    lines[0, 1:] = rows[0]  # nothing is above: the difference to 0
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    head = struct.pack(">IIBBBBB", width, height, 16 if deep else 8, COLOUR[pixels.ndim], 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", isal_zlib.compress(lines, LEVEL)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = isal_zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
