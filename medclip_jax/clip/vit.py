"""The ViT image encoder, fused: blocks stacked once, run by lax.scan between the tapped ones.

Parameters are transformers' Flax tree (vision_model, visual_projection) with the blocks stacked.
It equals FlaxCLIPModel on the same parameters (tests/clip/test_transformers.py).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from medclip_jax.clip import layers
from medclip_jax.clip.layers import Features


class PatchEmbedding(nn.Module):
    width: int
    patch: int
    dtype: str

    @nn.compact
    def __call__(self, pixels: Float[Array, "n h w 3"]) -> Float[Array, "n p d"]:
        n, h, w, _ = pixels.shape
        s = self.patch
        kernel = self.param("kernel", nn.initializers.normal(0.02), (s, s, 3, self.width))
        patches = pixels.reshape(n, h // s, s, w // s, s, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(n, -1, s * s * 3).astype(self.dtype)
        return layers.product("npi,id->npd", patches, kernel.reshape(-1, self.width))


class Embeddings(nn.Module):
    """Class token, then patches (row-major), with positions."""

    width: int
    patch: int
    positions: int
    dtype: str

    def setup(self):
        start = nn.initializers.normal(0.02)
        self.class_embedding = self.param("class_embedding", start, (self.width,))
        self.patch_embedding = PatchEmbedding(self.width, self.patch, self.dtype)
        self.position_embedding = nn.Embed(self.positions, self.width, embedding_init=start)

    def __call__(self, pixels):
        x = self.patch_embedding(pixels)
        first = jnp.broadcast_to(self.class_embedding.astype(x.dtype), (x.shape[0], 1, self.width))
        positions = self.position_embedding(jnp.arange(self.positions)[None])
        return jnp.concatenate([first, x], axis=1) + positions.astype(x.dtype)


class VisionModel(nn.Module):
    """transformers' vision_model."""

    embedding: tuple  # fields of Embeddings
    blocks: tuple  # fields of layers.Encoder
    eps: float

    def setup(self):
        self.embeddings = Embeddings(*self.embedding)
        self.pre_layrnorm = layers.LayerNorm(self.eps)  # spelled so in every checkpoint
        self.encoder = layers.Encoder(*self.blocks)
        self.post_layernorm = layers.LayerNorm(self.eps)


class ViT(nn.Module):
    """Pooled embedding (joint space, not normalised) and patch tokens after each tapped block.

    Tokens are the residual stream, without the final norm and projection, as MediCLIP taps them;
    row-major grid, class token dropped.
    """

    width: int
    heads: int
    hidden: int
    depth: int
    patch: int  # pixels per patch side
    positions: int  # patches + 1
    joint: int
    activation: str = "quick_gelu"  # | gelu
    eps: float = 1e-5
    levels: tuple[int, ...] = ()  # tapped blocks, counted from 1
    dtype: str = "float32"
    inputs: bool = False  # also tap what the tapped blocks read, for refinement

    implementation: ClassVar[str] = "fused"

    def setup(self):
        kinds = self.heads, self.hidden, self.activation, self.eps, self.dtype
        self.vision_model = VisionModel(
            (self.width, self.patch, self.positions, self.dtype),
            (self.depth, self.width, *kinds),
            self.eps,
        )
        self.visual_projection = layers.Dense(self.joint, use_bias=False)

    def __call__(self, pixels: Float[Array, "n h w 3"]) -> Features:
        scan, x, start = self.vision_model.encoder.scan, self.embed(pixels), 0
        tapped, inputs = [], []
        for level in self.levels:  # one scan per stretch between taps
            if self.inputs:
                x, start = scan(x, start, level - 1), level - 1
                inputs.append(x.astype(jnp.float32))
            x, start = scan(x, start, level), level
            tapped.append(x[:, 1:].astype(jnp.float32))
        if start < self.depth:
            x = scan(x, start, self.depth)
        return Features(self.pool(x).astype(jnp.float32), tuple(tapped), tuple(inputs))

    def embed(self, pixels: Float[Array, "n h w 3"]) -> Float[Array, "n s d"]:
        """What the first block reads."""
        return self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))

    def pool(self, x: Float[Array, "n s d"]) -> Float[Array, "n j"]:
        """The pooled embedding (joint space, not normalised) of the last block's tokens."""
        return self.visual_projection(self.vision_model.post_layernorm(x[:, 0]))

    def project(self, tokens: Float[Array, "n p d"]) -> Float[Array, "n p j"]:
        """Last block's tokens into the joint space, by the encoder's own norm and projection."""
        return self.visual_projection(self.vision_model.post_layernorm(tokens))

    @nn.nowrap
    def prepare(self, params: Mapping) -> dict[str, Any]:
        return _image_part(params, layers.stack)

    @nn.nowrap
    def restore(self, vision: Mapping) -> dict[str, Any]:
        return _image_part(vision, layers.unstack)


def _image_part(params: Mapping, layout) -> dict[str, Any]:
    """The image part of the tree, with its blocks in another layout."""
    model = params["vision_model"]
    model = {**model, "encoder": {"layers": layout(model["encoder"]["layers"])}}
    return {"vision_model": model, "visual_projection": params["visual_projection"]}


def of_params(params: Mapping, heads: int, activation: str, eps: float, **taps) -> ViT:
    """The encoder that transformers' Flax tree makes up; the rest are fields of ViT."""
    model = params["vision_model"]
    kernel = model["embeddings"]["patch_embedding"]["kernel"]
    blocks = model["encoder"]["layers"]
    return ViT(
        width=kernel.shape[-1],
        heads=heads,
        hidden=blocks["0"]["mlp"]["fc1"]["bias"].shape[0],
        depth=len(blocks),
        patch=kernel.shape[0],
        positions=model["embeddings"]["position_embedding"]["embedding"].shape[0],
        joint=params["visual_projection"]["kernel"].shape[-1],
        activation=activation,
        eps=eps,
        **taps,
    )
