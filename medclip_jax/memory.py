"""Which healthy patch tokens to remember: all, or a greedy coreset of them (PatchCore)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medclip_jax import score


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
    rows = score.unit(tokens)

    def away(i):
        return 1 - rows @ rows[i]

    first = jnp.argmin(rows @ score.unit(rows.mean(0)))
    taken = jnp.zeros(count, jnp.int32).at[0].set(first)

    def step(n, state):
        taken, far = state
        i = jnp.argmax(far)
        return taken.at[n].set(i), jnp.minimum(far, away(i)).at[i].set(-jnp.inf)

    start = away(first).at[first].set(-jnp.inf)
    return jax.lax.fori_loop(1, count, step, (taken, start))[0]
