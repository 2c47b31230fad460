"""Baselines without a CLIP, the honest floor of a table: brightness and thumbnails alone.

Supports, test images and calibration are the same; features are `to_thumbnails`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.clip.layers import Features
from medclip_jax.data.layouts import Record
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.distributed.runtime import batches
from medclip_jax.features import cache
from medclip_jax.io import read

SIDE = 32  # pixels of a thumbnail


def grey_level(features: Features, k: int, size: int) -> Detector:
    """The pixels are the map and their mean is the score, brighter being more anomalous.

    Nothing is fitted to the supports, and the sign was fixed before any test was read.
    """

    def apply(params, batch, key):
        return Scores(batch.levels[0][..., 0], batch.pooled[:, 0])

    calibration = jax.device_get(apply({}, features, None))
    proven = ("image", "map")
    return Detector(apply, {}, None, calibration, k, False, size, load_thumbnails, proven)


def thumbnails(features: Features, k: int, size: int) -> Detector:
    """Half the squared difference to the nearest support, both standardised.

    Its mean over an image is 1 - correlation. A support is compared with the others only.
    """

    def apply(params, batch, key):
        patch = difference(standardise(batch.levels[0][..., 0]), params["supports"])
        return Scores(patch, patch.mean(1))

    rows = standardise(jnp.asarray(features.levels[0])[..., 0])
    alone = [difference(rows[i : i + 1], jnp.delete(rows, i, axis=0)) for i in range(len(rows))]
    patch: Any = np.concatenate(alone)
    calibration = Scores(patch, patch.mean(1))
    params = {"supports": rows}
    proven = ("image",)  # the nearest of more images is no farther, but its pixels may be
    return Detector(apply, params, None, calibration, k, False, size, load_thumbnails, proven)


def standardise(pixels: Float[Array, "n p"]) -> Float[Array, "n p"]:
    """Mean 0 and standard deviation 1 per image; a constant image becomes 0."""
    centred = pixels - pixels.mean(1, keepdims=True)
    return centred / jnp.maximum(centred.std(1, keepdims=True), 1e-6)


def difference(z: Float[Array, "n p"], memory: Float[Array, "k p"]) -> Float[Array, "n p"]:
    """Half the squared difference to the row of `memory` that correlates best."""
    nearest = memory[jnp.argmax(z @ memory.T, axis=1)]
    return (z - nearest) ** 2 / 2


def load_thumbnails(
    feature_cache: cache.FeatureCache, records: Sequence[Record], size: int
) -> Iterator[Features]:
    """Thumbnails of the given images in order, `size` at a time."""
    pixels = read.read_all(records, feature_cache.clip.size, feature_cache.fit)
    for group in batches((x for _, x in pixels), size):
        yield to_thumbnails(np.stack(group))


def to_thumbnails(images: Float[np.ndarray, "n s s"]) -> Features:
    """pooled [n, 1]: the mean grey level, [0, 1]; the one layer [n, 1024, 1]: the pixels."""
    pixels: Any = np.stack([shrink(x) for x in images]).reshape(len(images), -1, 1)
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


METHODS = {"grey_level": grey_level, "thumbnails": thumbnails}
