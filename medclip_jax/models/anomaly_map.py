"""From a value per patch to a map per pixel and a score per image."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@cache
def interpolation(patches: int, pixels: int) -> np.ndarray:
    """[pixels, patches] bilinear weights with aligned corners, as MediCLIP up-samples."""
    at = np.arange(pixels) * ((patches - 1) / max(pixels - 1, 1))
    low = np.clip(np.floor(at).astype(int), 0, max(patches - 2, 0))
    weights = np.zeros((pixels, patches), np.float64)
    rows = np.arange(pixels)
    weights[rows, low] = 1 - (at - low)
    weights[rows, np.minimum(low + 1, patches - 1)] += at - low
    return weights.astype(np.float32)


def to_pixels(patch: Float[Array, "n p"], size: int) -> Float[Array, "n size size"]:
    """A value per patch (row-major square grid) -> a smooth value per pixel of the input."""
    grid = int(round(patch.shape[-1] ** 0.5))
    up = interpolation(grid, size)
    return jnp.einsum("hg,ngk,wk->nhw", up, patch.reshape(-1, grid, grid), up)


def image_score(values: Float[Array, "n p"], top: float) -> Float[Array, " n"]:
    """Mean of the largest share `top` of an image's values; 0 is the maximum alone, as MediCLIP."""
    count = max(1, round(top * values.shape[-1]))
    return jax.lax.top_k(values, count)[0].mean(-1)
