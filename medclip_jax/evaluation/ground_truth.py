"""What is known of test images: masks, millimetres, patients. Read after scoring only."""

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool

from medclip_jax.data.records import Record
from medclip_jax.io import read


class Truths:
    """Lesion masks in the tower frame, bool [s, s] each; all False for an image without mask.

    Read once and held compressed, about 300 bytes each; iterating unpacks one at a time.
    Raises DataError for a mask that cannot be read or is of another size than its image.
    """

    def __init__(self, test: Sequence[Record], size: int, fit: read.Mode):
        self.size = size

        def packed(record: Record) -> bytes:
            if not record.masks:
                return b""
            return zlib.compress(np.packbits(read.fit_mask(truth(record), size, fit)).data, 1)

        with ThreadPoolExecutor() as pool:
            self.held = list(pool.map(packed, test))

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[Bool[np.ndarray, "s s"]]:
        shape = self.size, self.size
        for raw in self.held:
            if not raw:
                yield np.zeros(shape, bool)
                continue
            bits = np.frombuffer(zlib.decompress(raw), np.uint8)
            yield np.unpackbits(bits, count=self.size**2).astype(bool).reshape(shape)


def spacings(test: Sequence[Record], size: int, fit: read.Mode) -> list[tuple[float, float]] | None:
    """Millimetres per pixel of the tower frame (row, column) of each image; None if any lacks it.

    Distances of one table must have one unit, so one image without spacing makes all of them
    pixels.
    """
    found = []
    for record in test:
        image = read.read(record.path)
        if image.spacing is None:
            return None
        sides = image.pixels.shape[1:]
        sides = sides if fit == "stretch" else (max(sides),) * 2
        found.append(tuple(mm * side / size for mm, side in zip(image.spacing, sides, strict=True)))
    return found


def truth(record: Record) -> Bool[np.ndarray, "h w"]:
    """The lesion mask of one image in its own frame: the union of its mask files.

    Raises DataError for a mask of another size than its image.
    """
    shape = read.read(record.path).pixels.shape[1:]
    return read.read_mask(record.masks, shape)


def patients(test: Sequence[Record]) -> np.ndarray | None:
    """A number for whose image each is (no name or id); None if no patient has two.

    An image without patient is its own.
    """
    named = [r.patient or f"image {r.id}" for r in test]
    number = np.unique(named, return_inverse=True)[1]
    return None if len(set(named)) == len(named) else number


class Chosen(Sequence):
    """Some of the stored rows as float32, one at a time: a copy of all would take the memory."""

    def __init__(self, held: Any, rows: Sequence[int]):
        self.held, self.rows = held, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.held[self.rows[place]].astype(np.float32)
