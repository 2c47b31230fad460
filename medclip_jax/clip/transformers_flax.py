"""CLIP by the modules of transformers.models.clip.modeling_flax_clip, on the same parameters.

The other choice of config.clip.implementation: slower, and not our arithmetic. Flax left
transformers with version 5, so its classes are imported only when this is chosen.
"""

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from medclip_jax.clip import text
from medclip_jax.clip.layers import Features
from medclip_jax.errors import ConfigError


def modules() -> Any:
    """transformers' module of Flax CLIP. Raises ConfigError where transformers has none."""
    try:
        return import_module("transformers.models.clip.modeling_flax_clip")
    except ImportError as error:
        raise ConfigError(
            f"config.clip.implementation transformers needs transformers 4.57 ({error}): "
            "install medclip-jax[transformers-flax], or give implementation=fused"
        ) from None


class TransformersViT(nn.Module):
    """The image encoder; what it returns and offers is as vit.ViT."""

    config: str  # of CLIPVisionConfig, as JSON: a module's fields are hashable
    joint: int
    levels: tuple[int, ...] = ()
    dtype: str = "float32"
    inputs: bool = False

    implementation: ClassVar[str] = "transformers"
    prefix: ClassVar[int] = 1  # class token

    depth = property(lambda self: json.loads(self.config)["num_hidden_layers"])
    heads = property(lambda self: json.loads(self.config)["num_attention_heads"])
    eps = property(lambda self: json.loads(self.config)["layer_norm_eps"])

    def setup(self):
        from transformers import CLIPVisionConfig

        config, dtype = CLIPVisionConfig(**json.loads(self.config)), jnp.dtype(self.dtype)
        self.vision_model = modules().FlaxCLIPVisionTransformer(config, dtype)
        self.visual_projection = nn.Dense(self.joint, use_bias=False, dtype=dtype)

    def __call__(self, pixels: Float[Array, "n h w 3"]) -> Features:
        out = self.vision_model(
            pixels.astype(self.dtype), output_hidden_states=True, return_dict=True
        )
        after = [x.astype(jnp.float32) for x in out.hidden_states]  # 0: before the first block
        pooled = self.visual_projection(out.pooler_output).astype(jnp.float32)
        inputs = tuple(after[level - 1] for level in self.levels) if self.inputs else ()
        return Features(pooled, tuple(after[level][:, 1:] for level in self.levels), inputs)

    def project(self, tokens):
        return self.visual_projection(self.vision_model.post_layernorm(tokens))

    @nn.nowrap
    def prepare(self, params: Mapping) -> dict[str, Any]:
        return {name: params[name] for name in ("vision_model", "visual_projection")}

    @nn.nowrap
    def restore(self, vision: Mapping) -> dict[str, Any]:
        return dict(vision)


class TransformersText(nn.Module):
    """The text encoder: learnable context goes through their embeddings, encoder and final norm."""

    config: str  # of CLIPTextConfig, as JSON
    joint: int

    full_length: ClassVar[bool] = False

    def setup(self):
        from transformers import CLIPTextConfig

        config = CLIPTextConfig(**json.loads(self.config))
        self.text_model = modules().FlaxCLIPTextTransformer(config)
        self.text_projection = nn.Dense(self.joint, use_bias=False)

    def __call__(self, context, ids, slots, eos, causal: bool = True) -> Float[Array, "c j"]:
        if not causal:
            raise ConfigError(
                "config.prompts.causal is False, and the text encoder of transformers is causal: "
                "give clip.implementation=fused"
            )
        embeddings = self.text_model.embeddings
        x = text.fill(embeddings.token_embedding(ids), context, slots)
        x = x + embeddings.position_embedding(jnp.arange(ids.shape[1])[None])
        x = self.text_model.encoder(x, return_dict=True).last_hidden_state
        x = self.text_model.final_layer_norm(x[jnp.arange(len(x)), eos])
        return self.text_projection(x)
