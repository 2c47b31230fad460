"""Small data sets in the shipped layouts, as the tests write them, and where the real ones are."""

import os
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest

from medclip_jax.data import datasets
from medclip_jax.errors import DataError
from tests.support.paths import ROOT

COUNTS = {"normal": 12, "benign": 5, "malignant": 3}
NAMED = os.environ.get("MEDCLIP_DATA")
REAL = Path(NAMED) if NAMED else ROOT.parent / "shared" / "data"


def png(path: Path, seed: int, size=(9, 7), mask=False) -> Path:
    """A small image of noise in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    PIL.Image.fromarray((array > 127).astype(np.uint8) * 255 if mask else array).save(path)
    return path


def pair(path: Path, seed: int, side=8) -> Path:
    """A NIfTI pair of one slice; headers of one side are equal bytes. Returns the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 1000, (side, side, 1)).astype(np.int16)
    nibabel.Nifti1Pair(values, np.eye(4)).to_filename(path.with_suffix(".img"))
    return path.with_suffix(".hdr")


def write_busi(root: Path) -> Path:
    seed = 0
    for kind, count in COUNTS.items():
        for n in range(1, count + 1):
            seed += 1
            png(root / kind / f"{kind} ({n}).png", seed)
            mask = png(root / kind / f"{kind} ({n})_mask.png", seed, mask=True)
            if kind == "normal":
                PIL.Image.new("L", (7, 9)).save(mask)
    png(root / "benign" / "benign (2)_mask_1.png", 99, mask=True)
    return root


def write_folder(root: Path) -> Path:
    for n in range(6):
        png(root / "train" / "good" / f"{n}.png", n)
        png(root / "test" / "good" / f"{n}.png", 10 + n)
        png(root / "test" / "crack" / f"{n}.png", 20 + n)
        png(root / "ground_truth" / "crack" / f"{n}_mask.png", 20 + n, mask=True)
        png(root / "test" / "stain" / f"{n}.png", 30 + n)  # a kind without masks
    (root / "train" / "good" / ".DS_Store").touch()
    return root


def write_brain(root: Path) -> Path:
    for n in range(6):
        png(root / "no" / f"{n} no.jpg", n)
        png(root / "yes" / f"Y{n}.JPG", 50 + n)
    return root


def write_chest(root: Path) -> Path:
    for n in range(4):
        for i, place in enumerate(("train/NORMAL", "test/NORMAL", "test/PNEUMONIA")):
            png(root / place / f"IM-{i}{n}-0001.jpeg", 10 * n + i)
    png(root / "train" / "PNEUMONIA" / "person1_virus_6.jpeg", 99)
    png(root / "val" / "NORMAL" / "IM-9.jpeg", 98)
    return root


def real(name: str) -> Path:
    """The folder that holds the real data set, or the test is skipped."""
    try:
        datasets.LAYOUTS[name](REAL)
    except DataError:
        pytest.skip(f"no {name} below {REAL}; set $MEDCLIP_DATA")
    return REAL
