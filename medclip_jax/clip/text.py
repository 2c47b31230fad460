"""The text encoder with learnable context, fused: it runs in every training step.

Parameters are transformers' Flax tree (text_model, text_projection). The encoder is causal and cut
after the last end-of-text token, since what comes later cannot change the result.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medclip_jax.clip import layers
from medclip_jax.prompts.tokenize import Prompts


class Embeddings(nn.Module):
    """Token embeddings, with context vectors where a slot says so, and positions."""

    vocabulary: int
    positions: int
    width: int

    def setup(self):
        start = nn.initializers.normal(0.02)
        self.token_embedding = nn.Embed(self.vocabulary, self.width, embedding_init=start)
        self.position_embedding = nn.Embed(self.positions, self.width, embedding_init=start)

    def __call__(self, context, ids, slots):
        x = fill(self.token_embedding(ids), context, slots)
        return x + self.position_embedding(jnp.arange(ids.shape[1])[None])


class TextModel(nn.Module):
    """transformers' text_model."""

    embedding: tuple  # fields of Embeddings
    blocks: tuple  # fields of layers.Encoder
    eps: float

    def setup(self):
        self.embeddings = Embeddings(*self.embedding)
        self.encoder = layers.Encoder(*self.blocks)
        self.final_layer_norm = layers.LayerNorm(self.eps)


class TextEncoder(nn.Module):
    """Prompt embeddings in the joint space, not normalised."""

    width: int
    heads: int
    hidden: int
    depth: int
    vocabulary: int
    positions: int
    joint: int
    activation: str = "quick_gelu"  # | gelu
    eps: float = 1e-5

    def setup(self):
        kinds = self.heads, self.hidden, self.activation, self.eps
        embedding = self.vocabulary, self.positions, self.width
        self.text_model = TextModel(embedding, (self.depth, self.width, *kinds), self.eps)
        self.text_projection = layers.Dense(self.joint, use_bias=False)

    def __call__(
        self,
        context: Float[Array, "c k d"],
        ids: Int[Array, "c t"],
        slots: Int[Array, "c t"],
        eos: Int[Array, " c"],
        causal: bool = True,
    ) -> Float[Array, "c j"]:
        x = self.text_model.embeddings(context, ids, slots)
        t = x.shape[1]
        mask = jnp.tril(jnp.ones((t, t), bool))[None, None] if causal else None
        x = self.text_model.encoder.lean(x, mask, eos)[:, 0]
        return self.text_projection(self.text_model.final_layer_norm(x))


def fill(
    tokens: Float[Array, "c t d"], context: Float[Array, "c k d"], slots: Int[Array, "c t"]
) -> Float[Array, "c t d"]:
    """Embeddings with context vectors where a slot says so."""
    where = jax.nn.one_hot(slots, context.shape[1], dtype=context.dtype)  # no slot: zeros
    filled = jnp.einsum("ctk,ckd->ctd", where, context, precision=jax.lax.Precision.HIGHEST)
    return jnp.where((slots >= 0)[..., None], filled, tokens)


def encode_text(
    text: Mapping[str, Any],
    context: Float[Array, "c k d"],
    prompts: Prompts,
    encoder: nn.Module,
    causal: bool = True,
) -> Float[Array, "c j"]:
    """Prompt embeddings in the joint space, not normalised; context fills the slots (equation 4).

    encoder: TextEncoder, or transformers' own, of the parameters `text`.
    causal: False is MediCLIP's unmasked encoder, which also sees the padding.
    """
    end = int(np.max(prompts.eos)) + 1 if causal else None
    ids, slots = (jnp.asarray(x)[:, :end] for x in (prompts.ids, prompts.slots))
    features: Any = encoder.apply(
        {"params": text}, context, ids, slots, jnp.asarray(prompts.eos), causal
    )
    return features


def of_params(params: Mapping, heads: int, activation: str, eps: float) -> TextEncoder:
    """The encoder that a checkpoint's parameters (transformers' Flax tree) make up."""
    model = params["text_model"]
    tokens = model["embeddings"]["token_embedding"]["embedding"]
    blocks = model["encoder"]["layers"]
    return TextEncoder(
        width=tokens.shape[1],
        heads=heads,
        hidden=blocks["0"]["mlp"]["fc1"]["bias"].shape[0],
        depth=len(blocks),
        vocabulary=tokens.shape[0],
        positions=model["embeddings"]["position_embedding"]["embedding"].shape[0],
        joint=params["text_projection"]["kernel"].shape[-1],
        activation=activation,
        eps=eps,
    )
