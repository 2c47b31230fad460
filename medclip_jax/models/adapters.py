"""Visual adapters: one affine map per tapped level from image tokens into the joint space."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class VisualAdapter(nn.Module):
    """Patch tokens of one level in the joint space; inverted dropout in training.

    Dropout leaves out columns, the same of all patches of an image: each image sees one thinned
    adapter.
    """

    features: int  # width of the joint space
    rate: float = 0.0  # of dropout
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "n p d"], key: jax.Array | None = None
    ) -> Float[Array, "n p j"]:
        """Adapted tokens; without a key nothing is dropped."""
        kernel = self.param("kernel", self.kernel_init, (tokens.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        y = tokens.astype(jnp.float32) @ kernel + bias[None, None]
        if key is None or self.rate == 0:
            return y
        keep = kept(key, self.rate, (y.shape[0], 1, y.shape[2]))
        return jnp.where(keep, y / (1 - self.rate), 0.0)


def kept(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """What dropout at `rate` keeps, True or False."""
    return jax.random.bernoulli(key, 1 - rate, shape)


def init(key: jax.Array, width: int, features: int) -> dict[str, jax.Array]:
    """Fresh parameters for tokens of `width`: U(+-1/sqrt(width)), as MediCLIP."""
    kernel, bias = (from_key(k, uniform(width**-0.5)) for k in jax.random.split(key))
    adapter = VisualAdapter(features, kernel_init=kernel, bias_init=bias)
    return adapter.init(key, jnp.zeros((1, 1, width)))["params"]


def uniform(bound: float) -> Callable:
    """Initialiser U(-bound, bound)."""

    def initialise(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return initialise


def from_key(key: jax.Array, initialise: Callable) -> Callable:
    """The initialiser with a key of its own, in place of the one Flax derives from the name.

    So a parameter's first value does not depend on how modules are nested or called.
    """
    return lambda _, shape, dtype=jnp.float32: initialise(key, shape, dtype)
