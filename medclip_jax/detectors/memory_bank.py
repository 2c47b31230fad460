"""A memory of healthy patch tokens, all or a greedy coreset of them, as a detector (PatchCore)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medclip_jax.clip.layers import Features
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.models import similarity

CHUNK = 4096  # rows of the memory compared at a time


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


def scorer(pool: Callable) -> Callable[..., Scores]:
    """The `apply` of a memory; params {memory}: healthy rows [m, d] of every tapped layer.

    Gradients are those of the distance to the nearest row; which row that is has none.
    pool: patch values [n, p] -> image scores [n].
    """

    def apply(params, features, key):
        levels = tuple(map(neighbourhood, features.levels))
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
) -> Detector:
    """The detector of the supports' tokens; a support is compared with the others alone.

    Args:
        tokens: as many rows per support as the next, in their order.
        pool: patch values [n, p] -> image scores [n].
        size: pixels per side of the encoder frame.
        k: number of supports.
        coreset: share of the patches that is remembered, in (0, 1].
        calibrating: views of a single support, which are compared with it.
    """
    apply = scorer(pool)
    rows = len(tokens.pooled) // k
    pooled = tuple(neighbourhood(x).reshape(k, -1, x.shape[-1]) for x in tokens.levels)
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
