"""Visual token refinement (equation 6): a learned query attends to the tapped block's own tokens.

z + gate Out(Attention(Q y, K y, V y)), where y is what the block's first norm hands to its
attention, K, V and Out are the block's frozen projections, and Q and the gate are learned. Q starts
as the block's V: each token then queries with its value, not with CLIP's query, which attends to
far tokens. The gate starts at 0, so a fresh refinement is exactly the identity.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medclip_jax.clip import layers


class Frozen(NamedTuple):
    """The frozen parts of the tapped blocks; the model's design holds them."""

    heads: int
    eps: float
    blocks: tuple[dict[str, Any], ...]  # per level: layer_norm1 and self_attn


def frozen(params: Mapping, encoder: Any) -> Frozen:
    """What stays of the tapped blocks; params: Clip.params, encoder: a ViT."""
    layers_of = params["vision_model"]["encoder"]["layers"]
    parts = "layer_norm1", "self_attn"
    blocks = tuple({x: layers_of[str(l - 1)][x] for x in parts} for l in encoder.levels)
    return Frozen(encoder.heads, encoder.eps, blocks)


class TokenRefiner(nn.Module):
    """Refines the patch tokens of one level."""

    heads: int
    eps: float

    @nn.compact
    def __call__(
        self, block: Mapping, tokens: Float[Array, "n p d"], inputs: Float[Array, "n s d"]
    ) -> Float[Array, "n p d"]:
        """Refined `tokens`, which come after the frozen `block`; `inputs` are what it reads."""
        attention = block["self_attn"]
        value = attention["v_proj"]
        query = {name: self.param(name, lambda _, n=name: value[n]) for name in ("kernel", "bias")}
        gate = self.param("gate", lambda _: jnp.zeros(()))
        n, s, d = inputs.shape
        norm = {"params": block["layer_norm1"]}
        y: Any = layers.LayerNorm(self.eps, parent=None).apply(norm, inputs.astype(jnp.float32))
        parts = query, attention["k_proj"], value
        q, k, v = (dense(y, p).reshape(n, s, self.heads, d // self.heads) for p in parts)
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(n, s, d)
        refined = dense(mixed, attention["out_proj"])[:, 1:]
        return tokens.astype(jnp.float32) + gate * refined


def dense(x: Float[Array, "n s d"], p: Mapping) -> Float[Array, "n s e"]:
    return x @ p["kernel"] + p["bias"][None, None]


def init(key: jax.Array, frozen_parts: Frozen) -> tuple[dict, ...]:
    """Fresh parameters of a TokenRefiner per level: {kernel, bias, gate}."""
    refiner = TokenRefiner(frozen_parts.heads, frozen_parts.eps)

    def fresh(block: Mapping) -> dict:
        width = block["layer_norm1"]["scale"].shape[0]
        return refiner.init(key, block, jnp.zeros((1, 1, width)), jnp.zeros((1, 2, width)))[
            "params"
        ]

    return tuple(map(fresh, frozen_parts.blocks))


def refine(
    params: tuple[Mapping, ...],
    frozen_parts: Frozen,
    levels: tuple[Float[Array, "n p d"], ...],
    inputs: tuple[Float[Array, "n s d"], ...],
) -> tuple[Float[Array, "n p d"], ...]:
    """Refined patch tokens of every tapped level; ValueError if `inputs` are missing."""
    refiner: Any = TokenRefiner(frozen_parts.heads, frozen_parts.eps)
    return tuple(
        refiner.apply({"params": own}, block, tokens, x)
        for own, block, tokens, x in zip(params, frozen_parts.blocks, levels, inputs, strict=True)
    )
