"""Training views: grey 224x224 crops, made once, kept on disk in shards beside teacher features."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

SIZE = 224
SHARD = 512  # views per shard


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


def view_order(rows: list[Row], repeats: dict[str, int], seed: int, round_: int) -> np.ndarray:
    """Image index of each view in one round: every image once, rare modalities several times."""
    counts = [repeats.get(row.modality, 1) for row in rows]
    order = np.repeat(np.arange(len(rows)), counts)
    return np.random.default_rng([seed, round_]).permutation(order)


def random_view(
    pixels: UInt8[np.ndarray, "h w"], rng: np.random.Generator
) -> UInt8[np.ndarray, "224 224"]:
    """A crop of 50-100% of the area, turned by up to 10 degrees, other brightness and gamma."""
    image = Image.fromarray(pixels)
    if rng.random() < 0.3:
        image = image.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
    width, height = image.size
    area, ratio = rng.uniform(0.5, 1.0), np.exp(rng.uniform(-0.2, 0.2))
    w = min(width, width * np.sqrt(area * ratio))
    h = min(height, height * np.sqrt(area / ratio))
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    values = np.asarray(image, np.float32) / 255.0
    values = values ** np.exp(rng.uniform(-0.35, 0.35))
    values = (values - 0.5) * rng.uniform(0.75, 1.25) + 0.5 + rng.uniform(-0.08, 0.08)
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
