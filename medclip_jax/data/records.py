"""One image of a data set as a record, the split of records, and reading many of them.

Shape letters, used in every annotation of the package:
  e episodes/tasks   n images   h w pixels (the encoder's input unless said otherwise)   f frames
  p patches (g x g grid, row-major)   l layers (tapped blocks)   d width
  c prompts   t text positions
"""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from medclip_jax.errors import DataError
from medclip_jax.io import read
from medclip_jax.io.resize import Mode, fit


class Record(NamedTuple):
    """One image of a data set, named but not yet read."""

    id: str  # path below the data root, '/' separated; unique
    label: int  # 0 healthy, 1 abnormal
    part: str  # the data set's own part: "train", "test", or "" where it has none
    path: Path  # absolute
    masks: tuple[Path, ...]  # their union is the lesion mask; empty if there is none
    sha256: str  # of the image file's bytes
    patient: str = ""  # whose image, where the data set says so; a code, never a name
    window: str = ""  # CT window that the image is read with, see io.read


class Split(NamedTuple):
    """Who is support and who is test. Supports are ordered: the first 4 of 8 are the 4 of K = 4."""

    support: tuple[Record, ...]
    test: tuple[Record, ...]


def read_all(
    records: Iterable[Record], size: int, mode: Mode = "stretch", workers: int | None = None
) -> Iterator[tuple[Record, Float[np.ndarray, "s s"]]]:
    """Read and resize many images, in order, on threads (Pillow decodes outside the GIL).

    At most four images per worker are in memory, however slowly the caller consumes them.

    Yields:
      (record, pixels [size, size] in [0, 1]).

    Raises:
      DataError: as `io.read`, at the broken image's turn.
    """
    workers = workers or os.cpu_count() or 1
    waiting = iter(records)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running: collections.deque = collections.deque()

        def submit(count: int) -> None:
            for record in itertools.islice(waiting, count):
                running.append((record, pool.submit(_read_fit, record, size, mode)))

        submit(4 * workers)
        while running:
            record, future = running.popleft()
            pixels = future.result()
            submit(1)
            yield record, pixels


def _read_fit(record: Record, size: int, mode: Mode) -> Float[np.ndarray, "s s"]:
    pixels = read.read(record.path, window=record.window).pixels
    if pixels.shape[0] != 1:
        raise DataError(
            f"{record.path} holds {pixels.shape[0]} frames where one image is needed: "
            "save the frames as files of their own."
        )
    return fit(pixels[0], size, mode)


def unique(records: Iterable[Record]) -> list[Record]:
    """Records with different content: equal files are encoded once."""
    return list({r.sha256: r for r in records}.values())
