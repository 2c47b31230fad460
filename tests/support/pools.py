"""A training pool in memory, where anomalous patches carry a planted shift."""

import numpy as np
import pytest

from medclip_jax import config
from medclip_jax.clip import checkpoint
from medclip_jax.features import training_pool
from tests.support.checkpoints import tiny_checkpoint

VARIANTS = 9


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> checkpoint.Clip:
    return checkpoint.load(str(tiny_checkpoint(tmp_path_factory.mktemp("clip"))[0]))


@pytest.fixture(scope="module")
def pool(clip) -> training_pool.TrainingPool:
    """Four images; a variant's left or right half is anomalous, its tokens moved by a vector."""
    rng = np.random.default_rng(0)
    grid, size, width = clip.grid, clip.size, clip.widths[0]
    levels = len(clip.image_encoder.levels)
    shift = 3 * rng.normal(size=(levels, width))
    clean, anomalous = [], []
    for _ in range(4):
        base = rng.normal(size=(levels, 1, grid, grid, width))
        sides = np.zeros((VARIANTS, 1, grid), bool)
        sides[::2, :, : grid // 2], sides[1::2, :, grid // 2 :] = True, True
        shown = np.broadcast_to(sides, (VARIANTS, grid, grid))
        moved = base + shown[None, ..., None] * shift[:, None, None, None]
        mask = shown.repeat(size // grid, 1).repeat(size // grid, 2).reshape(VARIANTS, -1)
        for into, x in ((clean, base), (anomalous, moved)):
            n = x.shape[1]
            tokens = x.reshape(levels, n, grid * grid, width).astype(np.float32)
            held = {f"level{i}": level for i, level in enumerate(tokens)}
            held["pooled"] = np.zeros((n, clip.joint), np.float32)
            into.append((held | {"mask": np.packbits(mask, axis=1)}).__getitem__)
    kinds = np.tile(np.arange(VARIANTS) % 3, (4, 1))
    return training_pool.TrainingPool(tuple(clean), tuple(anomalous), levels, size, VARIANTS, kinds)


def settings(**fields):
    c = config.base("k=4,seed=0", name="folder", anatomy="breast", conditions=("mass",))
    c.update_from_flattened_dict({"model.dropout": 0.0, "prompts.context": 2} | fields)
    return config.resolve(c)
