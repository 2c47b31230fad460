"""Refuses training images that stand, exactly or nearly, in an evaluation set."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from medclip_jax.data import near_duplicates

SIDE = 24
LIMIT = 0.95  # correlation of 24x24 thumbnails above which two images count as one
SUFFIXES = {".png", ".jpg", ".jpeg"}


class LeakCount(NamedTuple):
    """How one evaluation set compares with the training images."""

    name: str
    evaluation_images: int
    near_duplicates: int  # training images over LIMIT
    highest: float  # highest correlation found
    excluded: bool  # False where patients are disjoint instead (chest films look alike)


def thumbnails(paths: list[Path]) -> Float[np.ndarray, "n 576"]:
    """Grey 24x24 thumbnails with mean 0 and length 1; of a constant image zeros."""
    rows = []
    for path in paths:
        with Image.open(path) as image:
            grey = image.convert("RGB").convert("L")
            small = grey.resize((SIDE, SIDE), Image.Resampling.BOX)
        rows.append(near_duplicates.normalised(np.asarray(small, np.float32)))
    return np.stack(rows)


def image_files(folder: Path) -> list[Path]:
    """Images under `folder`, masks left out, in a fixed order."""
    return sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and "_mask" not in p.stem
    )


def leak_check(
    train: list[Path], evaluation: dict[str, Path], disjoint_patients: set[str]
) -> tuple[Bool[np.ndarray, " n"], list[LeakCount]]:
    """Which training images may stay, and the counts for the model card.

    Sets named in `disjoint_patients` are counted but exclude nothing: their patients are disjoint
    by construction, and different healthy chest films do correlate over the limit.
    """
    ours = thumbnails(train)
    keep = np.ones(len(train), bool)
    counts = []
    for name, folder in evaluation.items():
        files = image_files(folder)
        best = (ours @ thumbnails(files).T).max(axis=1)
        near = best > LIMIT
        excluded = name not in disjoint_patients
        if excluded:
            keep &= ~near
        counts.append(LeakCount(name, len(files), int(near.sum()), float(best.max()), excluded))
    return keep, counts
