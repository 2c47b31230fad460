"""Which healthy patch tokens to remember: all, or a greedy coreset of them (PatchCore)."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medclip_jax.clip.outputs import Features
from medclip_jax.data.records import Record
from medclip_jax.detectors import detector
from medclip_jax.features import cache, encoder, support_images
from medclip_jax.models import similarity


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


def mirrored(feature_cache: cache.FeatureCache, supports: Sequence[Record]) -> Features:
    """Tokens of the supports [2 k], each followed by its mirror image, which the feature cache keeps too."""
    images = support_images.pixels(feature_cache, supports, feature_cache.clip.size)[
        :, None, :, ::-1
    ]
    made = encoder.encode_stacks(feature_cache, images, "mirrored")
    (tokens,) = cache.load_images(feature_cache, supports, len(supports))
    each = [jax.tree.map(lambda x, i=i: x[i : i + 1], tokens) for i in range(len(supports))]
    pairs = [x for pair in zip(each, made, strict=True) for x in pair]
    return jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x), jnp.float32), *pairs)


def remember(
    tokens: Features,
    coreset: float = 1.0,
    healthy: Features | None = None,
    rows: int = 1,
    asked: int | None = None,
) -> detector.Detector:
    """Nearest healthy patch of the supports; a support is compared with the others only.

    coreset: share of the patches that is kept. A single support is remembered whole, and `healthy`
    (views of it) are compared with it. rows: of the tokens, in turn, that are of one support;
    the first `asked` of them (all by default) are its held-out values.
    """
    asked = asked or rows
    pooled = tuple(neighbourhood(x) for x in tokens.levels)
    pooled = tuple(m.reshape(-1, rows * m.shape[1], m.shape[2]) for m in pooled)
    k = len(pooled[0])

    @jax.jit
    def search(batch, kept):
        return nearest(tuple(map(neighbourhood, batch.levels)), kept)

    def patches(batch, kept):
        return search(batch, kept)[0]

    def chosen(batch, choice):
        return distance_to(tuple(map(neighbourhood, batch.levels)), choice)

    @jax.jit
    def choose(supports, pooled):
        return tuple(keep(m[supports].reshape(-1, m.shape[-1]), coreset) for m in pooled)

    def without(i, batch):
        others = np.delete(np.arange(k), i) if k > 1 else np.arange(k)
        return patches(batch, choose(others, pooled))

    everything = choose(np.arange(k), pooled)
    if k > 1 or healthy is None:
        own = [slice(i * rows, i * rows + asked) for i in range(k)]
        each = (jax.tree.map(lambda x, r=r: x[r], tokens) for r in own)
        scored = [without(i, one) for i, one in enumerate(each)]
    else:
        scored = [patches(healthy, everything)]
    held_out = np.concatenate(scored)
    found = once(lambda b: search(b, everything))
    return detector.Detector(
        lambda b: found(b)[0],
        held_out,
        None,
        without=without,
        k=k,
        choose=lambda b: tuple(m[row] for m, row in zip(everything, found(b)[1], strict=True)),
        chosen=chosen,
    )


def once(function: Callable) -> Callable:
    """`function`, which remembers its value for the last argument: called again, it is not run.

    The map, image score, passes and copies of one batch all read the same values. Under a
    transformation (Grad-CAM's gradient) nothing is remembered.
    """
    last = object(), None  # read and replaced whole, for threads; no batch is this object

    def remembering(batch):
        nonlocal last
        known, value = last
        if known is batch:
            return value
        value = function(batch)
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(batch)):
            last = batch, value
        return value

    return remembering


CHUNK = 4096  # rows of the memory compared at a time


def memory_distance(
    levels: tuple[Float[Array, "n p _"], ...], memory: tuple[Float[Array, "_ _"], ...]
) -> Float[Array, "n p"]:
    """Cosine distance of each patch to its nearest healthy patch, mean over levels, in [0, 2]."""
    return nearest(levels, memory)[0]


def nearest(
    levels: tuple[Float[Array, "n p _"], ...], memory: tuple[Float[Array, "_ _"], ...]
) -> tuple[Float[Array, "n p"], tuple[Int[Array, "n p"], ...]]:
    """`memory_distance`, and the row of the memory that is nearest in each level."""
    found = [most_alike(v, m) for v, m in zip(levels, memory, strict=True)]
    return similarity.level_mean(1 - alike for alike, _ in found), tuple(row for _, row in found)


def distance_to(
    levels: tuple[Float[Array, "n p _"], ...], neighbours: tuple[Float[Array, "n p _"], ...]
) -> Float[Array, "n p"]:
    """Cosine distance of each patch to a neighbour of its own, mean over levels, in [0, 2].

    With the nearest rows of a memory: the value and the gradient of `memory_distance`.
    """
    pairs = zip(levels, neighbours, strict=True)
    return similarity.level_mean(
        1 - (similarity.unit(v) * similarity.unit(near)).sum(-1) for v, near in pairs
    )


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
    chunks = similarity.unit(jnp.concatenate([memory, fill])).reshape(-1, size, memory.shape[1])
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
