"""Judges a CLIP folder by use: nearest-neighbour memory and zero-shot phrases on three test sets.

No training decision may be read from these numbers; the card says when they were looked at.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from sklearn.metrics import roc_auc_score
from transformers import CLIPTokenizerFast

from . import leaks, tokens, tower, views

POOL = 32
GRID = 14
PHRASES = {
    "BUSI": (
        (
            "a normal breast ultrasound", "healthy breast",
            "breast ultrasound without a mass", "no signs of a tumor in the breast",
        ),
        (
            "an abnormal breast ultrasound", "diseased breast",
            "breast ultrasound with a mass", "signs of a tumor in the breast",
        ),
    ),
    "BrainMRI": (
        (
            "a normal brain mri", "healthy brain",
            "brain mri without a tumor", "no signs of a tumor in the brain",
        ),
        (
            "an abnormal brain mri", "diseased brain",
            "brain mri with a tumor", "signs of a tumor in the brain",
        ),
    ),
    "chest_xray": (
        (
            "a normal chest x-ray", "healthy lungs",
            "chest x-ray without pneumonia", "no signs of pneumonia in the lungs",
        ),
        (
            "an abnormal chest x-ray", "diseased lungs",
            "chest x-ray with pneumonia", "signs of pneumonia in the lungs",
        ),
    ),
}  # fmt: skip


class TestSet(NamedTuple):
    """Grey images; `pool` are the healthy ones supports may be drawn from."""

    name: str
    pixels: UInt8[np.ndarray, "n 224 224"]
    abnormal: Bool[np.ndarray, " n"]
    pool: Bool[np.ndarray, " n"]


class Encoded(NamedTuple):
    """Unit tokens of the middle and last layer, 3x3 pooled; unit image embeddings."""

    levels: Float[np.ndarray, "n 2 p d"]
    pooled: Float[np.ndarray, "n j"]


def read_set(name: str, data: Path) -> TestSet:
    """BUSI, BrainMRI or chest_xray. The chest pool is the set's own train/NORMAL."""
    if name == "chest_xray":
        root = data / "chest_xray"
        parts = [(root / "train/NORMAL", False, True), (root / "test/NORMAL", False, False)]
        parts.append((root / "test/PNEUMONIA", True, False))
    elif name == "BUSI":
        root = data / "busi" / "Dataset_BUSI_with_GT"
        parts = [
            (root / n, n != "normal", n == "normal") for n in ("normal", "benign", "malignant")
        ]
    else:
        root = data / "brain_mri"
        parts = [(root / "no", False, True), (root / "yes", True, False)]
    found = [(p, bad, pool) for folder, bad, pool in parts for p in leaks.image_files(folder)]
    pixels = np.stack([views.load_grey(p) for p, _, _ in found])
    return TestSet(name, pixels, np.array([f[1] for f in found]), np.array([f[2] for f in found]))


def smooth(tokens_: Float[Array, "n p d"]) -> Float[Array, "n p d"]:
    """Mean over the 3x3 neighbourhood (fewer at the border), then length 1."""
    n, _, d = tokens_.shape
    grid = tokens_.reshape(n, GRID, GRID, d)
    around = ((0, 0), (1, 1), (1, 1), (0, 0))

    def total(x):
        x = jnp.pad(x, around)
        rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
        return rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]

    return tower.unit((total(grid) / total(jnp.ones((1, GRID, GRID, 1)))).reshape(n, -1, d))


def encode_set(clip: dict, size: tower.Size, pixels: np.ndarray, batch: int = 32) -> Encoded:
    @jax.jit
    def encode(part):
        states = tower.encode_image(clip, size, part)
        levels = [smooth(states[k][:, 1:]) for k in (size.layers // 2, size.layers)]
        return jnp.stack(levels, 1), tower.unit(tower.project_tokens(clip, states[-1][:, 0]))

    out = []
    for first in range(0, len(pixels), batch):
        part = pixels[first : first + batch]
        missing = batch - len(part)
        filled = np.concatenate([part, np.zeros((missing, *part.shape[1:]), np.uint8)])
        out.append([np.asarray(x)[: len(part)] for x in encode(filled)])
    return Encoded(*(np.concatenate(x) for x in zip(*out, strict=True)))


@jax.jit
def _distances(test: Array, feature_cache: Array) -> Array:
    """Mean over patches of the cosine distance to the nearest feature_cache token, one level."""
    return 1 - (test @ feature_cache.T).max(-1).mean(-1)


def memory_scores(
    levels: np.ndarray, support: np.ndarray, batch: int = 64
) -> Float[np.ndarray, " n"]:
    """Anomaly score of every image from the supports' tokens, mean of both levels."""
    scores = np.zeros(len(levels))
    for level in range(levels.shape[1]):
        feature_cache = levels[support, level].reshape(-1, levels.shape[-1])
        for first in range(0, len(levels), batch):
            part = levels[first : first + batch, level]
            scores[first : first + batch] += np.asarray(_distances(part, feature_cache)) / 2
    return scores


def memory_auroc(test: TestSet, encoded: Encoded, ks: tuple[int, ...], draws: int) -> dict:
    """K -> image AUROC of each draw. The pool of a draw is out of the test; supports are nested."""
    out = {k: [] for k in ks}
    for draw in range(draws):
        rng = np.random.default_rng([draw, 23])
        order = rng.permutation(np.flatnonzero(test.pool))[:POOL]
        rest = np.ones(len(test.pixels), bool)
        rest[np.flatnonzero(test.pool) if test.name == "chest_xray" else order] = False
        for k in ks:
            scores = memory_scores(encoded.levels, order[:k])
            out[k].append(roc_auc_score(test.abnormal[rest], scores[rest]))
    return out


def zero_shot(test: TestSet, encoded: Encoded, clip: dict, size: tower.Size, tokenizer) -> float:
    """Image AUROC of mean abnormal minus mean healthy phrase, over all images but a chest pool."""
    ids = [jnp.asarray(tokens.encode(tokenizer, list(p), size.context)) for p in PHRASES[test.name]]
    healthy, abnormal = (
        np.asarray(tower.unit(tower.encode_text(clip, size, i)).mean(0)) for i in ids
    )
    scores = encoded.pooled @ (abnormal - healthy)
    rest = ~test.pool if test.name == "chest_xray" else np.ones(len(scores), bool)
    return float(roc_auc_score(test.abnormal[rest], scores[rest]))


def judge(folder: Path, clip: dict, size: tower.Size, tests: list[TestSet], draws: int = 5) -> dict:
    """{set: {"zero_shot": a, 4: [...], 16: [...]}}; the tokenizer is the folder's."""
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    out = {}
    for test in tests:
        encoded = encode_set(clip, size, test.pixels)
        told = {"zero_shot": zero_shot(test, encoded, clip, size, tokenizer)}
        out[test.name] = told | memory_auroc(test, encoded, (4, 16), draws)
    return out


def table(named: dict[str, dict]) -> str:
    """A Markdown table of `judge` results by model."""
    lines = ["| model | set | zero-shot | memory K=4 | memory K=16 |", "|---|---|---|---|---|"]
    for model, sets in named.items():
        for name, told in sets.items():
            cells = [f"{np.mean(told[k]):.3f} ± {np.std(told[k]):.3f}" for k in (4, 16)]
            lines.append(
                f"| {model} | {name} | {told['zero_shot']:.3f} | {cells[0]} | {cells[1]} |"
            )
    return "\n".join(lines)
