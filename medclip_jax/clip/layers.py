"""Matrix products of a tower, in its number format, with float32 sums."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product(equation: str, a: Any, b: Any) -> Float[Array, "*_"]:
    """einsum of two arrays (of NumPy or JAX) in the format of `a`, summed in float32, then rounded.

    Asked for a bfloat16 result, XLA on a CPU widens both factors to float32 and gains nothing;
    asked for a float32 one, it multiplies in bfloat16, at about twice the rate.
    """
    c = jnp.einsum(equation, a, b.astype(a.dtype), preferred_element_type=jnp.float32)
    return c.astype(a.dtype)


def attend(
    q: Float[Array, "n t h d"], k: Float[Array, "n s h d"], v: Float[Array, "n s h d"], mask
) -> Float[Array, "n t h d"]:
    """Scaled dot-product attention, softmax in float32; mask True where a query may look.

    Heads are moved beside the rows first: left to einsum, XLA on a CPU lays every product out anew,
    which makes the attention of a ViT-B/16 in float32 half as slow again.
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    weight = jnp.einsum("nhtd,nhsd->nhts", q, k, preferred_element_type=jnp.float32)
    weight = weight * q.shape[-1] ** -0.5
    if mask is not None:
        weight = jnp.where(mask, weight, jnp.finfo(jnp.float32).min)
    mixed = product("nhts,nhsd->nhtd", jax.nn.softmax(weight).astype(q.dtype), v)
    return mixed.transpose(0, 2, 1, 3)
