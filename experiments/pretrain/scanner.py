"""What another scanner would have made of a picture: tone, bias field, blur, noise; pure JAX.

Every function takes images [n h w] in [0, 1]; places and sizes do not change, so that the teacher's
patches of the unchanged view stay the target.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

RADIUS = 4  # pixels of the blur's half width


def tone(
    x: Float[Array, "n h w"],
    gamma: Float[Array, " n"],
    contrast: Float[Array, " n"],
    brightness: Float[Array, " n"],
) -> Float[Array, "n h w"]:
    """(x**gamma - 1/2) contrast + 1/2 + brightness."""
    gamma, contrast, brightness = (v[:, None, None] for v in (gamma, contrast, brightness))
    return (jnp.power(jnp.maximum(x, 1e-6), gamma) - 0.5) * contrast + 0.5 + brightness


def blur(x: Float[Array, "n h w"], sigma: Float[Array, " n"]) -> Float[Array, "n h w"]:
    """Gaussian blur of `sigma` pixels, edges repeated; sigma 0 changes nothing."""
    offsets = jnp.arange(-RADIUS, RADIUS + 1.0)
    weight = jnp.exp(-0.5 * jnp.square(offsets[None] / jnp.maximum(sigma, 1e-3)[:, None]))
    weight = weight / weight.sum(1, keepdims=True)

    def along(y, axis):
        padded = jnp.pad(
            y, [(0, 0), *(((RADIUS,) * 2 if a == axis else (0, 0)) for a in (1, 2))], "edge"
        )
        size = y.shape[axis]
        parts = [
            weight[:, i, None, None] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
            for i in range(2 * RADIUS + 1)
        ]
        return sum(parts[1:], parts[0])

    return along(along(x, 1), 2)


def bias_field(x: Float[Array, "n h w"], knots: Float[Array, "n k k"]) -> Float[Array, "n h w"]:
    """x exp(b), b smoothly interpolated between `knots`: a coil's uneven gain."""
    return x * jnp.exp(jax.image.resize(knots, x.shape, "linear"))


def noise(
    key: Key[Array, ""],
    x: Float[Array, "n h w"],
    added: Float[Array, " n"],
    speckle: Float[Array, " n"],
) -> Float[Array, "n h w"]:
    """Gaussian noise of sd `added`, and of sd `speckle` times the value."""
    sd = added[:, None, None] + speckle[:, None, None] * x
    return x + sd * jax.random.normal(key, x.shape)


def vary(
    key: Key[Array, ""], x: Float[Array, "n h w"], share: float = 1.0
) -> Float[Array, "n h w"]:
    """One draw of everything above for a share of the images, clipped to [0, 1]."""
    keys = jax.random.split(key, 10)
    n, plain = x.shape[0], x

    def uniform(k, low, high, chance=1.0):
        """Of each image low..high, or (with 1 - chance) 0."""
        one, two = jax.random.split(k)
        value = jax.random.uniform(one, (n,), minval=low, maxval=high)
        return jnp.where(jax.random.uniform(two, (n,)) < chance, value, 0.0)

    knots = uniform(keys[0], 0.05, 0.35, 0.3)[:, None, None] * jax.random.normal(keys[1], (n, 3, 3))
    x = bias_field(x, knots)
    gamma = jnp.exp(uniform(keys[2], -0.4, 0.4))
    x = tone(x, gamma, 1 + uniform(keys[3], -0.4, 0.4), uniform(keys[4], -0.1, 0.1))
    x = blur(jnp.clip(x, 0, 1), uniform(keys[5], 0.4, 1.5, 0.3))
    x = noise(keys[6], x, uniform(keys[7], 0.0, 0.06, 0.5), uniform(keys[8], 0.0, 0.15, 0.3))
    chosen = jax.random.uniform(keys[9], (n, 1, 1)) < share
    return jnp.where(chosen, jnp.clip(x, 0, 1), plain)
