"""Detectors that remember the supports: their patch tokens (PatchCore), or their pixels.

Those on pixels need no CLIP: brightness and thumbnails, the honest floor of a table. Supports, test
images and calibration are the same; their features are `to_thumbnails`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medclip_jax.clip.layers import Features
from medclip_jax.data.layouts import Record
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.distributed.runtime import batches
from medclip_jax.features import cache
from medclip_jax.io import read
from medclip_jax.models import similarity

CHUNK = 4096  # rows of the memory compared at a time
SIDE = 32  # pixels of a thumbnail


def keep(tokens: Float[Array, "m d"], share: float) -> Float[Array, "_ d"]:
    """The coreset of a share (0, 1] of the rows; 1 keeps all of them as they are."""
    if share >= 1:
        return tokens
    return tokens[coreset(tokens, max(1, math.ceil(share * len(tokens))))]


def coreset(tokens: Float[Array, "m d"], count: int) -> Int[Array, " count"]:
    """Greedy k-centre on cosine distance (Roth et al., PatchCore, CVPR 2022, algorithm 1).

    Starts at the row farthest from the mean direction and then always takes the row that is
    farthest from all taken: at most twice the best possible covering radius (Gonzalez 1985, for
    Euclidean distance of the unit vectors, which orders as cosine distance does).
    """
    rows = similarity.unit(tokens)

    def away(i):
        return 1 - rows @ rows[i]

    first = jnp.argmin(rows @ similarity.unit(rows.mean(0)))
    taken = jnp.zeros(count, jnp.int32).at[0].set(first)

    def step(n, state):
        taken, far = state
        i = jnp.argmax(far)
        return taken.at[n].set(i), jnp.minimum(far, away(i)).at[i].set(-jnp.inf)

    start = away(first).at[first].set(-jnp.inf)
    return jax.lax.fori_loop(1, count, step, (taken, start))[0]


def scorer(pool: Callable, first_level: int = 0) -> Callable[..., Scores]:
    """The `apply` of a memory; params {memory}: healthy rows [m, d] of every level that it reads.

    Gradients are those of the distance to the nearest row; which row that is has none.
    pool: patch values [n, p] -> image scores [n]. first_level: that it reads.
    """

    def apply(params, features, key):
        levels = tuple(map(neighbourhood, features.levels[first_level:]))
        patch = memory_distance(levels, params["memory"])
        return Scores(patch, pool(patch))

    return apply


def build(
    tokens: Features,
    pool: Callable,
    size: int,
    *,
    k: int,
    coreset: float = 1.0,
    calibrating: Features | None = None,
    first_level: int = 0,
) -> Detector:
    """The detector of the supports' tokens; a support is compared with the others alone.

    Args:
        tokens: as many rows per support as the next, in their order.
        pool: patch values [n, p] -> image scores [n].
        coreset: share of the patches that is remembered, in (0, 1].
        calibrating: views of a single support, which are compared with it.
        first_level: that the memory reads.
    """
    apply = scorer(pool, first_level)
    rows = len(tokens.pooled) // k
    levels = tokens.levels[first_level:]
    pooled = tuple(neighbourhood(x).reshape(k, -1, x.shape[-1]) for x in levels)
    run = jax.jit(apply)

    @jax.jit
    def remember(pooled, supports):  # tokens as arguments: one program serves every draw
        every = (m[supports].reshape(-1, m.shape[-1]) for m in pooled)
        return {"memory": tuple(keep(tokens, coreset) for tokens in every)}

    params = remember(pooled, np.arange(k))
    if k == 1:
        calibration = run(params, tokens if calibrating is None else calibrating, None)
    else:
        each = []
        for i in range(k):
            own = slice(i * rows, (i + 1) * rows)
            others = remember(pooled, np.delete(np.arange(k), i))
            each.append(run(others, jax.tree.map(lambda x, r=own: x[r], tokens), None))
        calibration = jax.tree.map(lambda *x: np.concatenate(x), *each)
    # the nearest of more images is no farther; a coreset of more may lack it
    proven = ("image", "map") if coreset >= 1 else ()
    calibration = jax.device_get(calibration)
    return Detector(apply, params, None, calibration, k, False, size, proven=proven)


def memory_distance(
    levels: tuple[Float[Array, "n p _"], ...], memory: tuple[Float[Array, "_ _"], ...]
) -> Float[Array, "n p"]:
    """Cosine distance of each patch to its nearest healthy patch, mean over layers, in [0, 2]."""
    # the search has no gradient
    rows = [most_similar(jax.lax.stop_gradient(v), m) for v, m in zip(levels, memory, strict=True)]
    neighbours = [m[row] for m, row in zip(memory, rows, strict=True)]
    return similarity.level_mean(
        1 - (similarity.unit(v) * similarity.unit(near)).sum(-1)
        for v, near in zip(levels, neighbours, strict=True)
    )


def most_similar(v: Float[Array, "n p d"], memory: Float[Array, "m d"]) -> Int[Array, "n p"]:
    """The first row of the memory that has the largest cosine with each patch.

    One image and CHUNK rows at a time: similarities stay in the processor's cache, so that their
    largest is searched while they are there, and memory stays bounded.
    """
    size = min(len(memory), CHUNK)
    # filled with the last row, which changes no maximum
    fill = jnp.broadcast_to(memory[-1:], (-len(memory) % size, memory.shape[1]))
    chunks = similarity.unit(jnp.concatenate([memory, fill])).reshape(-1, size, memory.shape[1])
    first = jnp.arange(len(chunks)) * size
    place = jnp.arange(size)[None]

    def image(patches):
        def step(best, part):
            chunk, start = part
            cosine = patches @ chunk.T
            top = cosine.max(-1)
            # not argmax, which XLA computes one by one on a CPU
            row = start + jnp.where(cosine == top[:, None], place, size).min(-1)
            better = top > best[0]
            return (jnp.maximum(best[0], top), jnp.where(better, row, best[1])), None

        none = jnp.full(len(patches), -jnp.inf, v.dtype), jnp.zeros(len(patches), first.dtype)
        return jax.lax.scan(step, none, (chunks, first))[0][1]

    return jax.lax.map(image, similarity.unit(v))


def neighbourhood(tokens: Float[Array, "n p d"]) -> Float[Array, "n p d"]:
    """Mean of each patch with its (up to eight) neighbours, as PatchCore pools its patches."""
    n, p, d = tokens.shape
    grid = int(round(p**0.5))
    image = tokens.reshape(n, grid, grid, d)
    window, stride = (1, 3, 3, 1), (1, 1, 1, 1)

    def total(x):
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, stride, "SAME")

    count = total(jnp.ones((1, grid, grid, 1)))
    return (total(image) / count).reshape(n, p, d)


# --- baselines on pixels ---


def grey_level(features: Features, k: int, size: int) -> Detector:
    """The pixels are the map and their mean is the score, brighter being more anomalous.

    Nothing is fitted to the supports, and the sign was fixed before any test was read.
    """

    def apply(params, batch, key):
        return Scores(batch.levels[0][..., 0], batch.pooled[:, 0])

    calibration = jax.device_get(apply({}, features, None))
    proven = ("image", "map", "fixed")
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


PIXEL_BASELINES = {"grey_level": grey_level, "thumbnails": thumbnails}
