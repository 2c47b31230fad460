"""Deviation from the supports, whatever they show: residuals to the nearest healthy patch, weighed.

Tokens are whitened, and each patch is compared with its nearest one among the supports. Squared
residuals in every whitened direction, standardised by those of the supports against one another,
mean the same for every modality; a linear head weighs them. A fresh head weighs all alike, which is
a memory bank on whitened tokens. Only the head learns, so thousands of steps are cheap.

Shape letters: n images, k supports, p patches (2 x 2 tokens each), l levels, d width, r directions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medclip_jax.clip.layers import Features
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.features.encoder import coarse
from medclip_jax.models import modules, similarity

DIRECTIONS = 64  # of each level that are kept
RIDGE = 0.1  # of the mean variance, added to each direction's before whitening
SMALLEST = 1e-3  # spread
# Of the images' distances, as a share of their mean: two images have one distance, whose spread is
# 0. On the sources, with 4 to 16 supports, the share is 0.2 to 1.
LEAST_SPREAD = 0.5
TOP = 0.05  # share of an image's patches that its score is the mean of


class Whitening(NamedTuple):
    """Centre and whitening directions of the tokens of each level."""

    mean: tuple[Float[Array, " d"], ...]
    kernel: tuple[Float[Array, "d r"], ...]


class Memory(NamedTuple):
    """What is known of the supports."""

    levels: tuple[Float[Array, "k p r"], ...]  # whitened, of length 1
    pooled: Float[Array, "k j"]  # of length 1
    centre: tuple[Float[Array, " r"], ...]  # mean squared residual in each direction
    spread: Float[Array, " l"]  # standard deviation of the patches' distances
    image: Float[Array, " 2"]  # mean and standard deviation of the images' distances


class Deviation(NamedTuple):
    """What the head reads."""

    patch: Float[Array, "n p f"]  # l r standardised squared residuals
    image: Float[Array, " n"]  # standardised distance of the whole image's embedding


def fine(patch: Float[Array, "n p"], grid: int) -> Float[Array, "n q"]:
    """A value per 2 x 2 tokens -> a value per token."""
    half = int(round(patch.shape[1] ** 0.5))
    image = patch.reshape(-1, half, half).repeat(2, 1).repeat(2, 2)
    return image[:, :grid, :grid].reshape(len(patch), -1)


def whiten(levels: Sequence[Float[np.ndarray, "n d"]]) -> Whitening:
    """The whitening of healthy tokens of each level, on the host."""
    means, kernels = [], []
    for tokens in levels:
        values, vectors = np.linalg.eigh(np.cov(np.asarray(tokens, np.float64).T))
        first = slice(None, -DIRECTIONS - 1, -1)
        scale = np.sqrt(values[first] + RIDGE * values.mean())
        means.append(jnp.asarray(tokens.mean(0), jnp.float32))
        kernels.append(jnp.asarray(vectors[:, first] / scale, jnp.float32))
    return Whitening(tuple(means), tuple(kernels))


def remember(whitening: Whitening, supports: Features) -> Memory:
    """The memory of k supports' coarse tokens; spreads are of each against the others."""
    levels, pooled = _whitened(whitening, supports), similarity.unit(supports.pooled)
    own = jnp.arange(len(pooled))
    squares = [_squares(z, z, own) for z in levels]
    spread = jnp.stack([x.sum(-1).std() for x in squares])
    image = _image_distance(pooled, pooled, own)
    least = jnp.maximum(LEAST_SPREAD * image.mean(), SMALLEST)
    return Memory(
        levels,
        pooled,
        tuple(x.mean((0, 1)) for x in squares),
        jnp.maximum(spread, SMALLEST),
        jnp.stack([image.mean(), jnp.maximum(image.std(), least)]),
    )


def deviation(
    whitening: Whitening, memory: Memory, features: Features, own: Int[Array, " n"]
) -> Deviation:
    """How images deviate from the supports.

    features: coarse tokens. own: the support that an image is, or was made of, which it is not
    compared with; -1 for none.
    """
    patch = [
        (_squares(z, m, own) - centre[None, None]) / spread
        for z, m, centre, spread in zip(
            _whitened(whitening, features),
            memory.levels,
            memory.centre,
            memory.spread,
            strict=True,
        )
    ]
    distance = _image_distance(similarity.unit(features.pooled), memory.pooled, own)
    image = (distance - memory.image[0]) / memory.image[1]
    return Deviation(jnp.concatenate(patch, -1), image)


def _whitened(whitening: Whitening, features: Features) -> tuple[Float[Array, "n p r"], ...]:
    each = zip(features.levels, whitening.mean, whitening.kernel, strict=True)
    return tuple(
        similarity.unit((x.astype(jnp.float32) - mean[None, None]) @ kernel)
        for x, mean, kernel in each
    )


def _squares(
    z: Float[Array, "n p r"], memory: Float[Array, "k p r"], own: Int[Array, " n"]
) -> Float[Array, "n p r"]:
    """Halves of the squared residuals to the nearest patch; they add up to 1 - cosine."""
    cosine = jnp.einsum("npr,kqr->npkq", z, memory)
    other = own[:, None] != jnp.arange(len(memory))[None]
    cosine = jnp.where(other[:, None, :, None], cosine, similarity.NEVER)
    row = jnp.argmax(cosine.reshape(*z.shape[:2], -1), -1)
    return (z - memory.reshape(-1, z.shape[-1])[row]) ** 2 / 2


def _image_distance(
    pooled: Float[Array, "n j"], memory: Float[Array, "k j"], own: Int[Array, " n"]
) -> Float[Array, " n"]:
    other = own[:, None] != jnp.arange(len(memory))[None]
    return 1 - jnp.where(other, pooled @ memory.T, similarity.NEVER).max(-1)


def init(whitening: Whitening) -> dict:
    """Parameters of a fresh head."""
    count = sum(kernel.shape[1] for kernel in whitening.kernel)
    head = modules.DeviationHead(len(whitening.kernel), 1.0)
    return head.init(jax.random.key(0), jnp.zeros((1, 1, count)), jnp.zeros(1))["params"]


def logits(
    params: Any, seen: Deviation, levels: int
) -> tuple[Float[Array, "n p"], Float[Array, " n"]]:
    """Anomaly logits of patches and images. params: of a head."""
    module: Any = modules.DeviationHead(levels, TOP)
    return module.apply({"params": params}, seen.patch, seen.image)


def scorer(grid: int) -> Callable[..., Scores]:
    """The `apply` of a head; params {head, whitening, memory}."""

    def apply(params, features, key):
        small = coarse(features)
        own = jnp.full(len(small.pooled), -1)
        seen = deviation(Whitening(**params["whitening"]), Memory(**params["memory"]), small, own)
        patch, image = logits(params["head"], seen, len(small.levels))
        return Scores(fine(patch, grid), image)

    return apply


def build(
    whitening: Whitening,
    heads: Any,
    tokens: Features,
    folds: Sequence[np.ndarray],
    grid: int,
    size: int,
) -> Detector:
    """The detector of adapted heads, leaves [1 + folds, ...]: of all supports, of all but a fold.

    tokens: of the supports, in their order. Each is scored by the head of its fold, with a memory
    of the others.
    """
    apply, k = scorer(grid), len(tokens.pooled)
    small = coarse(tokens)
    run, keep = jax.jit(apply), jax.jit(partial(remember, whitening))
    plain = {"mean": whitening.mean, "kernel": whitening.kernel}

    def params(fold, rows):
        memory = keep(jax.tree.map(lambda x: x[rows], small))
        head = jax.tree.map(lambda x: x[fold], heads)
        return {"head": head, "whitening": plain, "memory": memory._asdict()}

    fold_of = np.argmax([np.isin(np.arange(k), fold) for fold in folds], 0)
    each = [
        run(
            params(1 + fold_of[i], np.delete(np.arange(k), i)),
            jax.tree.map(lambda x, i=i: x[i : i + 1], tokens),
            None,
        )
        for i in range(k)
    ]
    calibration = jax.device_get(jax.tree.map(lambda *x: np.concatenate(x), *each))
    fold_heads = {"head": jax.tree.map(lambda x: x[1:], heads)}
    return Detector(apply, params(0, np.arange(k)), fold_heads, calibration, k, False, size)
