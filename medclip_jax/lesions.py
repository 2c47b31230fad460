"""What is known of test images: masks, millimetres, patients. Read after scoring only."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Float

from medclip_jax.data import readers
from medclip_jax.structs import Record


def truths(test: Sequence[Record], size: int, fit: readers.Mode) -> Bool[np.ndarray, "n s s"]:
    """Lesion masks in the tower frame; all False for an image without mask."""

    def fill(i):
        if test[i].masks:
            made[i] = readers.fit_mask(truth(test[i]), size, fit)

    made = np.zeros((len(test), size, size), bool)
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(len(test))):
            pass  # an error is raised here
    return made


def spacings(
    test: Sequence[Record], size: int, fit: readers.Mode
) -> list[tuple[float, float]] | None:
    """Millimetres per pixel of the tower frame (row, column) of each image; None if any lacks it.

    Distances of one table must have one unit, so one image without spacing makes all of them
    pixels.
    """
    found = []
    for record in test:
        image = readers.read(record.path)
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
    shape = readers.read(record.path).pixels.shape[1:]
    return readers.read_mask(record.masks, shape)


def patients(test: Sequence[Record]) -> np.ndarray | None:
    """A number for whose image each is (no name or id); None if no patient has two.

    An image without patient is its own.
    """
    named = [r.patient or f"image {r.id}" for r in test]
    number = np.unique(named, return_inverse=True)[1]
    return None if len(set(named)) == len(named) else number


class Halves:
    """Some of the stored maps as float32, one at a time: a copy of all would double the memory."""

    def __init__(self, maps: Float[np.ndarray, "n h w"], rows: Sequence[int]):
        self.maps, self.rows = maps, rows

    def __iter__(self):
        return (self.maps[i].astype(np.float32) for i in self.rows)
