"""Refuses training images that stand, exactly or nearly, in an evaluation set."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

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


def thumbnail(path: Path) -> Float[np.ndarray, "576"]:
    """Grey 24x24 thumbnail with mean 0 and length 1; a constant image gives zeros."""
    with Image.open(path) as image:
        small = image.convert("RGB").convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(small, np.float32).ravel()
    values = values - values.mean()
    length = np.linalg.norm(values)
    return values / length if length > 0 else values


def thumbnails(paths: list[Path]) -> Float[np.ndarray, "n 576"]:
    return np.stack([thumbnail(path) for path in paths])


def image_files(folder: Path) -> list[Path]:
    """Images under `folder`, masks left out, in a fixed order."""
    return sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and "_mask" not in p.stem
    )


def highest_correlation(
    train: Float[np.ndarray, "n 576"], held_out: Float[np.ndarray, "m 576"]
) -> Float[np.ndarray, " n"]:
    """For each training thumbnail, its highest correlation with any evaluation thumbnail."""
    return (train @ held_out.T).max(axis=1)


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
        best = highest_correlation(ours, thumbnails(files))
        near = best > LIMIT
        excluded = name not in disjoint_patients
        if excluded:
            keep &= ~near
        counts.append(LeakCount(name, len(files), int(near.sum()), float(best.max()), excluded))
    return keep, counts
