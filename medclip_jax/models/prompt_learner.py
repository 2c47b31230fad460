"""Learnable context of the prompts (equation 4)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medclip_jax.models.adapters import from_key


class PromptLearner(nn.Module):
    """Context vectors, N(0, 0.02^2) at first."""

    rows: int  # one per prompt, or 1: all share it
    vectors: int  # per prompt
    width: int  # of the text encoder
    context_init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, prompts: int) -> Float[Array, "c k d"]:
        """The context of so many prompts."""
        context = self.param("context", self.context_init, (self.rows, self.vectors, self.width))
        return jnp.broadcast_to(context, (prompts, *context.shape[1:]))


def init(
    key: jax.Array,
    rows: int,
    vectors: int,
    tokens: Float[Array, "v d"],
    start: Int[np.ndarray, " k"] | None = None,
) -> dict[str, jax.Array]:
    """Fresh parameters of a PromptLearner: {context}.

    Args:
        key: of the random vectors.
        rows: one per prompt, or 1.
        vectors: per prompt.
        tokens: the text encoder's token embeddings.
        start: token from whose embedding each vector starts instead; -1 for a random one.
    """

    def initialise(key, shape, dtype):
        random = nn.initializers.normal(0.02)(key, shape, dtype)
        if start is None or (start < 0).all():
            return random
        embedded = tokens[jnp.maximum(start, 0)][None]
        return jnp.where((jnp.asarray(start) >= 0)[None, :, None], embedded, random)

    learner = PromptLearner(rows, vectors, tokens.shape[1], from_key(key, initialise))
    return learner.init(key, rows)["params"]
