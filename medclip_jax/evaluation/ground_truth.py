"""What is known of test images: lesion masks, spacing, patients, units. Read after scoring only."""

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool

from medclip_jax.data.layouts import Record
from medclip_jax.io import read


class Masks:
    """Lesion masks in the encoder frame, bool [s, s] each; all False for an image without mask.

    Read once and stored compressed, about 300 bytes each; iterating unpacks one at a time.
    Raises DataError for a mask that cannot be read or is of another size than its image.
    """

    def __init__(self, records: Sequence[Record], size: int, fit: read.Mode):
        self.size = size

        def pack(record: Record) -> bytes:
            if not record.masks:
                return b""
            return zlib.compress(np.packbits(read.fit_mask(lesion_mask(record), size, fit)).data, 1)

        with ThreadPoolExecutor() as pool:
            self.packed = list(pool.map(pack, records))

    def __len__(self) -> int:
        return len(self.packed)

    def __iter__(self) -> Iterator[Bool[np.ndarray, "s s"]]:
        shape = self.size, self.size
        for packed in self.packed:
            if not packed:
                yield np.zeros(shape, bool)
                continue
            bits = np.frombuffer(zlib.decompress(packed), np.uint8)
            yield np.unpackbits(bits, count=self.size**2).astype(bool).reshape(shape)


def spacings(
    records: Sequence[Record], size: int, fit: read.Mode
) -> list[tuple[float, float]] | None:
    """Millimetres per pixel of the encoder frame (row, column) of each image; None if any lacks it.

    Distances of one table must have one unit, so one image without spacing makes all of them
    pixels.
    """
    sizes = []
    for record in records:
        image = read.read(record.path)
        if image.spacing is None:
            return None
        sides = image.pixels.shape[1:]
        sides = sides if fit == "stretch" else (max(sides),) * 2
        sizes.append(tuple(mm * side / size for mm, side in zip(image.spacing, sides, strict=True)))
    return sizes


def lesion_mask(record: Record) -> Bool[np.ndarray, "h w"]:
    """The lesion mask of one image in its own frame: the union of its mask files.

    Raises DataError for a mask of another size than its image.
    """
    shape = read.read(record.path).pixels.shape[1:]
    return read.read_mask(record.masks, shape, record.path)


def patients(records: Sequence[Record]) -> np.ndarray | None:
    """Patient of each image as a number (no name or id); None if no patient has two images.

    An image without patient is its own.
    """
    names = [r.patient or f"image {r.id}" for r in records]
    number = np.unique(names, return_inverse=True)[1]
    return None if len(set(names)) == len(names) else number


def units(records: Sequence[Record]) -> np.ndarray | None:
    """Unit of each image: what is resampled as one. None if every image is its own.

    Near-duplicates and images of one patient (splits.with_units) where known, else patients.
    """
    number = np.array([r.unit for r in records], int)
    if (number < 0).any():
        return patients(records)
    return None if len(set(number.tolist())) == len(number) else number


class Rows(Sequence):
    """Some rows of stored arrays as float32, one at a time: a copy of all would take the memory."""

    def __init__(self, stored: Any, rows: Sequence[int]):
        self.stored, self.rows = stored, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.stored[self.rows[place]].astype(np.float32)
