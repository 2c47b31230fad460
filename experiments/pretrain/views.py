"""Training views: grey 224x224 crops, made once, kept on disk in shards beside teacher features."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

SIZE = 224
SHARD = 512  # views per shard
BALANCE = 0.5  # a modality's share grows with this power of its number of images
TURN = 16  # degrees


class Row(NamedTuple):
    """One training image as captions.csv describes it. `finding` is empty for healthy images."""

    image: str
    source: str
    licence: str
    modality: str
    plane: str
    state: str
    finding: str
    state_from: str  # "label", or "look may tell": normal and abnormal come from different sources


def read_rows(folder: Path) -> list[Row]:
    """Rows of `captions.csv`, in file order."""
    with open(folder / "captions.csv", newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def balanced(modalities: list[str], seed: int, number: int) -> Int[np.ndarray, " 512"]:
    """Image index of each view of shard `number`.

    Modalities share a shard as count**BALANCE; images of one come in turn, in an order that is
    random anew each time all were shown.
    """
    names, inverse = np.unique(modalities, return_inverse=True)
    weight = np.bincount(inverse).astype(float) ** BALANCE
    edges = np.cumsum(weight) / weight.sum()
    out = []
    for kind in range(len(names)):
        members = np.flatnonzero(inverse == kind)
        before, after = (0.0 if kind == 0 else edges[kind - 1]), edges[kind]
        each = int(np.round(after * SHARD)) - int(np.round(before * SHARD))
        for place in range(number * each, (number + 1) * each):
            round_, rank = divmod(place, len(members))
            order = np.random.default_rng([seed, 3, kind, round_]).permutation(len(members))
            out.append(members[order[rank]])
    return np.random.default_rng([seed, 4, number]).permutation(out)


def random_view(
    pixels: UInt8[np.ndarray, "h w"], rng: np.random.Generator
) -> UInt8[np.ndarray, "224 224"]:
    """A crop of 40-100% of the area, half of them turned by up to TURN, of mildly other tone."""
    image = Image.fromarray(pixels)
    if rng.random() < 0.5:
        image = image.rotate(float(rng.uniform(-TURN, TURN)), Image.Resampling.BILINEAR)
    width, height = image.size
    area, ratio = rng.uniform(0.4, 1.0), np.exp(rng.uniform(-0.2, 0.2))
    w = min(width, width * np.sqrt(area * ratio))
    h = min(height, height * np.sqrt(area / ratio))
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    values = np.asarray(image, np.float32) / 255.0
    values = values ** np.exp(rng.uniform(-0.2, 0.2))
    values = (values - 0.5) * rng.uniform(0.85, 1.15) + 0.5 + rng.uniform(-0.05, 0.05)
    return np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)


def load_grey(path: Path) -> UInt8[np.ndarray, "224 224"]:
    """Any image file as one grey 224x224 plane, stretched (as the peers do)."""
    with Image.open(path) as image:
        image = image.convert("RGB").convert("L")
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


class Shard(NamedTuple):
    """Arrays of one shard, memory-mapped.

    index [n] image row; pixels [n 224 224] uint8; fine [n 14 14 40], coarse [n 14 14 112] and
    pooled [n 1280] float16 teacher features.
    """

    index: np.ndarray
    pixels: np.ndarray
    fine: np.ndarray
    coarse: np.ndarray
    pooled: np.ndarray


def write_shard(folder: Path, shard: Shard) -> None:
    """Arrays into `folder`, then the mark `complete` that readers wait for."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in shard._asdict().items():
        np.save(folder / f"{name}.npy", array)
    (folder / "complete").touch()


def read_shards(cache: Path, limit: int | None = None) -> list[Shard]:
    """Complete shards in order of number, at most `limit`."""
    folders = sorted(p.parent for p in cache.glob("shard-*/complete"))[:limit]
    return [
        Shard(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Shard._fields))
        for folder in folders
    ]
