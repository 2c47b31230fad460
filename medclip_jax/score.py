"""From similarities to anomaly: logits per patch, maps per pixel, one score per image.

One `cosine` serves training and scoring. A patch's anomaly is a logit; its probability is the
sigmoid. Both of the paper's forms fit: "softmax" (healthy against abnormal prompts, as peers) and
"distance" (equation 9). Imports no sibling but structs.
"""

from collections.abc import Iterable
from functools import cache, reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

FORMS = ("softmax", "distance")
CHUNK = 4096  # rows of the memory compared at a time


def unit(x: Float[Array, "*a d"]) -> Float[Array, "*a d"]:
    """Vectors of length 1 over the last axis; a zero vector stays zero."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def cosine(v: Float[Array, "*a p d"], t: Float[Array, "c d"]) -> Float[Array, "*a p c"]:
    """Equation (7): cosine similarity of every patch with every text feature, in [-1, 1].

    The product is divided by the patches' lengths, not the patches: few numbers, where they have
    many. A zero vector is similar to nothing (0).
    """
    square = jnp.sum(v * v, axis=-1, keepdims=True)
    return (v @ unit(t).T) * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def class_features(text: Float[Array, "c d"], label: np.ndarray) -> Float[Array, "2 d"]:
    """Mean prompt of the healthy and of the abnormal class; not normalised before the mean."""
    label = np.asarray(label)
    return jnp.stack([text[np.flatnonzero(label == side)].mean(0) for side in (0, 1)])


def class_weights(text: Float[Array, "c d"], label: np.ndarray) -> Float[Array, "c 2"]:
    """What turns cosines with every prompt into those with `class_features`, which are linear."""
    member = np.stack([np.asarray(label) == side for side in (0, 1)], axis=1)
    share = jnp.asarray(member / member.sum(0), text.dtype)
    length = jnp.sqrt(jnp.maximum(jnp.sum(text * text, axis=-1), 1e-24))
    whole = jnp.sqrt(jnp.maximum(jnp.sum(class_features(text, label) ** 2, axis=-1), 1e-24))
    return share * length[:, None] / whole[None]


def patch_logit(
    levels: tuple[Float[Array, "n p d"], ...],
    text: Float[Array, "c d"],
    label: Int[np.ndarray, " c"],
    scale: Float[Array, ""],
    offset: Float[Array, ""],
    form: str,
) -> Float[Array, "n p"]:
    """Anomaly logit of each patch, mean over the levels.

    softmax:  scale (sim to the mean abnormal prompt - sim to the mean healthy prompt)
    distance: scale (1 - max_j sim to healthy prompt j - offset), equation (9) with a link so that
              its sigmoid can be trained by focal and dice
    """
    if form == "softmax":
        pair = class_features(text, label)
        similarity = level_mean(cosine(v, pair) for v in levels)
        return scale * (similarity[..., 1] - similarity[..., 0])
    if form == "distance":
        healthy = text[np.flatnonzero(np.asarray(label) == 0)]
        away = level_mean(1 - cosine(v, healthy).max(-1) for v in levels)
        return scale * (away - offset)
    raise ValueError(f"form {form!r} is not one of {FORMS}")


@cache
def interpolation(patches: int, pixels: int) -> np.ndarray:
    """[pixels, patches] bilinear weights with aligned corners, as peers up-sample (PEERS 5.11)."""
    at = np.arange(pixels) * ((patches - 1) / max(pixels - 1, 1))
    low = np.clip(np.floor(at).astype(int), 0, max(patches - 2, 0))
    weights = np.zeros((pixels, patches), np.float64)
    rows = np.arange(pixels)
    weights[rows, low] = 1 - (at - low)
    weights[rows, np.minimum(low + 1, patches - 1)] += at - low
    return weights.astype(np.float32)


def to_pixels(patch: Float[Array, "n p"], size: int) -> Float[Array, "n size size"]:
    """A value per patch (row-major square grid) -> a smooth value per pixel of the tower frame."""
    grid = int(round(patch.shape[-1] ** 0.5))
    up = interpolation(grid, size)
    return jnp.einsum("hg,ngk,wk->nhw", up, patch.reshape(-1, grid, grid), up)


def image_score(values: Float[Array, "n p"], top: float) -> Float[Array, " n"]:
    """Mean of the largest share `top` of an image's values; 0 is the maximum alone (peers)."""
    count = max(1, round(top * values.shape[-1]))
    return jax.lax.top_k(values, count)[0].mean(-1)


def memory_distance(
    levels: tuple[Float[Array, "n p _"], ...], memory: tuple[Float[Array, "_ _"], ...]
) -> Float[Array, "n p"]:
    """Cosine distance of each patch to its nearest healthy patch, mean over levels, in [0, 2]."""
    return nearest(levels, memory)[0]


def level_mean(each: Iterable[Float[Array, "*_"]]) -> Float[Array, "*_"]:
    """Mean of what every level says, in order of the levels."""
    values = list(each)
    return reduce(add, values) / len(values)


def nearest(
    levels: tuple[Float[Array, "n p _"], ...], memory: tuple[Float[Array, "_ _"], ...]
) -> tuple[Float[Array, "n p"], tuple[Int[Array, "n p"], ...]]:
    """`memory_distance`, and the row of the memory that is nearest in each level."""
    found = [most_alike(v, m) for v, m in zip(levels, memory, strict=True)]
    return level_mean(1 - alike for alike, _ in found), tuple(row for _, row in found)


def distance_to(
    levels: tuple[Float[Array, "n p _"], ...], neighbours: tuple[Float[Array, "n p _"], ...]
) -> Float[Array, "n p"]:
    """Cosine distance of each patch to a neighbour of its own, mean over levels, in [0, 2].

    With the nearest rows of a memory: the value and the gradient of `memory_distance`.
    """
    pairs = zip(levels, neighbours, strict=True)
    return level_mean(1 - (unit(v) * unit(near)).sum(-1) for v, near in pairs)


def most_alike(
    v: Float[Array, "n p d"], memory: Float[Array, "m d"]
) -> tuple[Float[Array, "n p"], Int[Array, "n p"]]:
    """Largest cosine with any row of the memory and the first row that has it.

    One image and CHUNK rows at a time: similarities stay in the processor's cache, so that their
    largest is found while they are there, and memory stays bounded.
    """
    size = min(len(memory), CHUNK)
    # filled with the last row, which changes no maximum
    fill = jnp.broadcast_to(memory[-1:], (-len(memory) % size, memory.shape[1]))
    chunks = unit(jnp.concatenate([memory, fill])).reshape(-1, size, memory.shape[1])
    first = jnp.arange(len(chunks)) * size
    place = jnp.arange(size)[None]

    def image(patches):
        def step(best, part):
            chunk, start = part
            alike = patches @ chunk.T
            top = alike.max(-1)
            # not argmax, which XLA computes one by one on a CPU
            row = start + jnp.where(alike == top[:, None], place, size).min(-1)
            better = top > best[0]
            return (jnp.maximum(best[0], top), jnp.where(better, row, best[1])), None

        none = jnp.full(len(patches), -jnp.inf, v.dtype), jnp.zeros(len(patches), first.dtype)
        return jax.lax.scan(step, none, (chunks, first))[0]

    return jax.lax.map(image, unit(v))


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
