"""Thumbnails in the place of tokens, for the baselines on pixels."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from medclip_jax.clip.outputs import Features
from medclip_jax.data.records import Record
from medclip_jax.distributed.runtime import batches
from medclip_jax.features import cache
from medclip_jax.io import read

SIDE = 32  # pixels of a thumbnail


def load(
    feature_cache: cache.FeatureCache, records: Sequence[Record], size: int
) -> Iterator[Features]:
    """Thumbnails of the given images in order, `size` at a time."""
    pixels = read.read_all(records, feature_cache.clip.size, feature_cache.fit)
    for group in batches((x for _, x in pixels), size):
        yield of_images(np.stack(group))


def of_images(images: Float[np.ndarray, "n s s"]) -> Features:
    """pooled [n, 1]: the mean grey level, [0, 1]; the one layer [n, 1024, 1]: the pixels."""
    pixels = np.stack([shrink(x) for x in images]).reshape(len(images), -1, 1)
    return Features(pixels.mean(1), (pixels,))


def shrink(pixels: Float[np.ndarray, "s s"]) -> Float[np.ndarray, "_ _"]:
    """Means over 32 x 32 equal areas; a pixel on a border counts for both by its share."""
    weights = areas(len(pixels))
    return (weights @ pixels @ weights.T).astype(np.float32)


def areas(size: int) -> Float[np.ndarray, "a s"]:
    """[32, size] shares of the pixels in each of 32 equal stretches; rows sum to 1."""
    width = size / SIDE
    start = np.arange(SIDE)[:, None] * width
    pixel = np.arange(size)[None]
    overlap = np.minimum(pixel + 1, start + width) - np.maximum(pixel, start)
    return np.clip(overlap, 0, None) / width
