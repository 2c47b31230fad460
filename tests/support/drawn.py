"""Weights that two programs draw alike from nothing but names and shapes: no file is stored."""

import zlib

import numpy as np


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """A value for each tensor: scales near 1, all else near 0, so that no part is idle."""
    return {name: draw(name, shape) for name, shape in shapes.items()}


def draw(name: str, shape) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.normal(size=tuple(shape)).astype(np.float32)
    if name.endswith(("logit_scale", "logit_bias")):
        return np.full(tuple(shape), 1.5, np.float32)
    if name.endswith(("lambda1", "gamma")) or (name.endswith("weight") and len(shape) == 1):
        return 1 + 0.2 * values
    fan = np.prod(shape[1:]) if len(shape) > 1 and "embedding" not in name else 25
    return values / np.sqrt(fan)


def waves() -> np.ndarray:
    """A grey image [224, 224] in [0, 1]: waves of several lengths."""
    y, x = np.mgrid[:224, :224].astype(np.float64)
    waves = np.sin(x / 3) * np.cos(y / 7) + np.sin((x + y) / 19) + np.cos((x - 2 * y) / 41)
    return ((waves + 3) / 6).astype(np.float32)


def pixels(count: int, side: int) -> np.ndarray:
    """Images as an encoder takes them, [n, h, w, 3]."""
    return np.random.default_rng(side).normal(size=(count, side, side, 3)).astype(np.float32)
