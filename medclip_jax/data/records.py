"""One image of a data set as a record, and the split of records.

Shape letters, used in every annotation of the package:
  e episodes/tasks   n images   h w pixels (the encoder's input unless said otherwise)   f frames
  p patches (g x g grid, row-major)   l layers (tapped blocks)   d width
  c prompts   t text positions
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


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
    unit: int = -1  # near-duplicates and images of one patient have the same; -1: not known


class Split(NamedTuple):
    """Who is support and who is test. Supports are ordered: the first 4 of 8 are the 4 of K = 4."""

    support: tuple[Record, ...]
    test: tuple[Record, ...]


def unique(records: Iterable[Record]) -> list[Record]:
    """Records with different content: equal files are encoded once."""
    return list({r.sha256: r for r in records}.values())
