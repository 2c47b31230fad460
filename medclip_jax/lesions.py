"""Where lesions are known to be: masks and millimetres of test images. Read after scoring only."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool

from medclip_jax.data import readers
from medclip_jax.structs import Record


def truths(test: Sequence[Record], size: int, fit: readers.Mode) -> Bool[np.ndarray, "n s s"]:
    """Lesion masks in the tower frame; all False for an image without mask."""

    def one(record):
        return readers.fit_mask(truth(record), size, fit) if record.masks else empty

    empty = np.zeros((size, size), bool)
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(one, test)))


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
