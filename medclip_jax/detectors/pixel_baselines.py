"""Baselines without a CLIP: what brightness and thumbnails alone can do (PROTOCOL.md, PEERS 1.6).

They are the honest floor of a table: same supports, same test images, same calibration, but their
features are pixels. Both take seconds.

    grey_level  mean grey level; brighter is more anomalous, a sign fixed before any test is read
    thumbnails  1 - correlation with the nearest support, over thumbnails of 32 x 32 pixels
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.clip.outputs import Features
from medclip_jax.data import records as data_records
from medclip_jax.data.records import Record
from medclip_jax.detectors.detector import Detector
from medclip_jax.features import cache, encoder, support_images

SIDE = 32  # pixels of a thumbnail


def build(method: str, feature_cache: cache.FeatureCache, supports: Sequence[Record]) -> Detector:
    """The detector of a method of METHODS; its `load` reads images where others read tokens."""
    images = support_images.healthy_images(
        feature_cache, supports
    )  # of one support also gentle views
    healthy = jnp.asarray(np.stack([shrink(x) for x in images]).reshape(len(images), -1))
    return METHODS[method](healthy)._replace(load=load, k=len(supports))


def load(
    feature_cache: cache.FeatureCache, records: Sequence[Record], size: int
) -> Iterator[Features]:
    """Thumbnails of the given images in order, `size` at a time, in place of tokens.

    pooled [n, 1] is the mean grey level in [0, 1], the one level [n, 1024, 1] holds the pixels:
    means of equal areas of the image as the tower sees it.
    """
    images = (
        shrink(pixels)
        for _, pixels in data_records.read_all(records, feature_cache.clip.size, feature_cache.fit)
    )
    for group in encoder.batches(images, size):
        pixels = np.stack(group).reshape(len(group), -1, 1)
        yield Features(jnp.asarray(pixels.mean(1)), (jnp.asarray(pixels),))


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


def grey_level(supports: Float[Array, "k p"]) -> Detector:
    """The pixels are the map and their mean is the score; nothing is fitted to the supports."""
    return Detector(
        lambda batch: batch.levels[0][..., 0],
        np.asarray(supports),
        None,
        lambda batch: batch.pooled[:, 0],
        np.asarray(supports.mean(1)),
    )


def thumbnails(supports: Float[Array, "k p"]) -> Detector:
    """Half the squared difference to the nearest support, both standardised.

    Its mean over an image is 1 - correlation. A support is compared with the others only.
    """
    held = standardise(supports)

    def of_pixels(memory, batch):
        return difference(standardise(batch.levels[0][..., 0]), memory)

    patches: Callable = jax.jit(partial(of_pixels, held))
    alone = [difference(held[i : i + 1], jnp.delete(held, i, axis=0)) for i in range(len(held))]
    left_out = np.concatenate(alone)
    return Detector(patches, left_out, None, lambda b: patches(b).mean(1), left_out.mean(1))


def standardise(pixels: Float[Array, "n p"]) -> Float[Array, "n p"]:
    """Mean 0 and standard deviation 1 per image; a constant image becomes 0."""
    centred = pixels - pixels.mean(1, keepdims=True)
    return centred / jnp.maximum(centred.std(1, keepdims=True), 1e-6)


def difference(z: Float[Array, "n p"], memory: Float[Array, "k p"]) -> Float[Array, "n p"]:
    """Half the squared difference to the row of `memory` that correlates best."""
    nearest = memory[jnp.argmax(z @ memory.T, axis=1)]
    return (z - nearest) ** 2 / 2


METHODS = {"grey_level": grey_level, "thumbnails": thumbnails}
