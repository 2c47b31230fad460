"""Visual token refinement (equation 6): a learned query looks at the tapped block's own tokens.

z + gate Out(Attention(Q y, K y, V y)), where y is what the block's first norm hands to its
attention, K, V and Out are the block's frozen projections, and Q and the gate are learned. Q starts
as the block's V: each token then asks with its value, not with CLIP's query, which attends to
far tokens. The gate starts at 0, so a fresh refinement is exactly the identity.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Frozen(NamedTuple):
    """The frozen parts of the tapped blocks; the model's design holds them."""

    heads: int
    eps: float
    blocks: tuple[dict[str, Any], ...]  # per level: norm1, qkv, out


def frozen(vision: Mapping, levels: tuple[int, ...], heads: int, eps: float) -> Frozen:
    """What stays of the blocks `levels` (from 1) of an image tower's parameters."""
    parts = {name: vision["blocks"][name] for name in ("norm1", "qkv", "out")}
    blocks = tuple(jax.tree.map(lambda b, i=level - 1: b[i], parts) for level in levels)
    return Frozen(heads, eps, blocks)


def init(held: Frozen) -> tuple[dict, ...]:
    """Per level the query {kernel [d, d], bias [d]}, equal to the block's V, and gate [] = 0."""
    queries = []
    for block in held.blocks:
        kernel, bias = (jnp.split(block["qkv"][x], 3, axis=-1)[2] for x in ("kernel", "bias"))
        queries.append({"kernel": kernel, "bias": bias, "gate": jnp.asarray(0.0)})
    return tuple(queries)


def attend(
    query: Mapping, block: Mapping, inputs: Float[Array, "n s d"], heads: int, eps: float
) -> Float[Array, "n s d"]:
    """Out(Attention(Q y, K y, V y)) of all tokens of a block's input, the class token first."""
    n, s, d = inputs.shape
    y = jax.nn.standardize(inputs.astype(jnp.float32), epsilon=eps)
    y = y * block["norm1"]["scale"][None, None] + block["norm1"]["bias"][None, None]
    _, k, v = jnp.split(y @ block["qkv"]["kernel"] + block["qkv"]["bias"][None, None], 3, axis=-1)
    q = y @ query["kernel"] + query["bias"][None, None]
    mixed = jax.nn.dot_product_attention(*(x.reshape(n, s, heads, d // heads) for x in (q, k, v)))
    return mixed.reshape(n, s, d) @ block["out"]["kernel"] + block["out"]["bias"][None, None]


def refine(
    queries: tuple[Mapping, ...],
    held: Frozen,
    levels: tuple[Float[Array, "n p d"], ...],
    inputs: tuple[Float[Array, "n s d"], ...],
) -> tuple[Float[Array, "n p d"], ...]:
    """Refined patch tokens of every tapped level.

    inputs: what the tapped blocks read (Features.inputs). Raises ValueError if they are missing.
    """
    refined = []
    for query, block, z, x in zip(queries, held.blocks, levels, inputs, strict=True):
        seen = attend(query, block, x, held.heads, held.eps)[:, 1:]
        refined.append(z.astype(jnp.float32) + query["gate"] * seen)
    return tuple(refined)
