"""The state of training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class TrainState(NamedTuple):
    """All that a resumed run needs: everything random is a function of (key, step).

    params and opt are stacked, [1 + folds, ...]: the main params, then the fold params.
    """

    step: Int[Array, ""]
    params: Any
    opt: Any
    key: jax.Array  # jax.random.key_data


def start(
    params: Any, optimizer: optax.GradientTransformation, count: int, seed: int
) -> TrainState:
    """Step 0: `count` equal copies of `params`, each with its own optimiser state."""
    stacked = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * count), params)
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.asarray(0), stacked, jax.vmap(optimizer.init)(stacked), key)
