"""The ViT image encoders, fused.

Parameters are transformers' Flax tree (vision_model, visual_projection), of int8 with the blocks
stacked; of others than CLIP what names.py says. A CLIP equals FlaxCLIPModel on the same parameters
(tests/clip/test_transformers.py), the others what made them (tests/clip/test_backbones.py).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.clip import layers, stacked
from medclip_jax.clip.layers import Features


class PatchEmbedding(nn.Module):
    width: int
    patch: int
    bias: bool
    dtype: str

    @nn.compact
    def __call__(self, pixels: Float[Array, "n h w 3"]) -> Float[Array, "n p d"]:
        n, h, w, _ = pixels.shape
        s = self.patch
        kernel = self.param("kernel", nn.initializers.normal(0.02), (s, s, 3, self.width))
        pixels = pixels[:, : h // s * s, : w // s * s]  # what does not fill a patch is not seen
        patches = pixels.reshape(n, h // s, s, w // s, s, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(n, -1, s * s * 3).astype(self.dtype)
        x = layers.product("npi,id->npd", patches, kernel.reshape(-1, self.width))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.width,))
            x = x + bias.astype(x.dtype)[None, None]
        return x


class Embeddings(nn.Module):
    """Class token and registers, if any, then patches (row-major), with positions."""

    width: int
    patch: int
    positions: int
    dtype: str
    prefix: int = 1  # tokens before the patches
    plain: bool = False

    def setup(self):
        start = nn.initializers.normal(0.02)
        self.patch_embedding = PatchEmbedding(self.width, self.patch, self.plain, self.dtype)
        if self.positions:
            self.position_embedding = nn.Embed(self.positions, self.width, embedding_init=start)
        if not self.plain:
            self.class_embedding = self.param("class_embedding", start, (self.width,))
        elif self.prefix:  # with their positions
            self.prefix_tokens = self.param("prefix_tokens", start, (self.prefix, self.width))

    def __call__(self, pixels):
        x = self.patch_embedding(pixels)
        positions: Any = 0.0
        if self.positions:
            positions = self.position_embedding(jnp.arange(self.positions)[None]).astype(x.dtype)
        if self.plain:
            x = x + positions
            first = self.prefix_tokens if self.prefix else jnp.zeros((0, self.width))
            shape = x.shape[0], self.prefix, self.width
            return jnp.concatenate([jnp.broadcast_to(first.astype(x.dtype), shape), x], axis=1)
        first = jnp.broadcast_to(self.class_embedding.astype(x.dtype), (x.shape[0], 1, self.width))
        return jnp.concatenate([first, x], axis=1) + positions


class MapHead(nn.Module):
    """SigLIP's pooling: one learned query attends to all tokens (Zhai et al. 2023)."""

    width: int
    heads: int
    hidden: int
    activation: str
    eps: float
    dtype: str

    def setup(self):
        self.probe = self.param("probe", nn.initializers.normal(0.02), (self.width,))
        self.attention = layers.Attention(self.heads, self.dtype)
        self.layernorm = layers.LayerNorm(self.eps)
        self.mlp = layers.Mlp(self.hidden, self.activation, self.dtype)

    def __call__(self, x: Float[Array, "n s d"]) -> Float[Array, "n d"]:
        n, s, d = x.shape
        x = jnp.concatenate([jnp.broadcast_to(self.probe.astype(x.dtype), (n, 1, d)), x], axis=1)
        mask = jnp.broadcast_to(jnp.arange(s + 1) > 0, (1, 1, s + 1, s + 1))
        x = self.attention(x, mask, jnp.zeros(n, int))[:, 0]
        return x + self.mlp(self.layernorm(x))

    def values(self, x: Float[Array, "n p d"]) -> Float[Array, "n p d"]:
        """What the head gives for tokens that attend to themselves alone."""
        x = self.attention(x, jnp.eye(x.shape[1], dtype=bool)[None, None])
        return x + self.mlp(self.layernorm(x))


class VisionModel(nn.Module):
    """transformers' vision_model."""

    embedding: tuple  # fields of Embeddings
    blocks: tuple  # fields of layers.Encoder
    eps: float
    plain: bool = False
    pools: bool = False

    def setup(self):
        self.embeddings = Embeddings(*self.embedding)
        if not self.plain:
            self.pre_layrnorm = layers.LayerNorm(self.eps)  # spelled so in every checkpoint
        self.encoder = layers.Encoder(*self.blocks)
        self.post_layernorm = layers.LayerNorm(self.eps)
        if self.pools:
            self.head = MapHead(*self.blocks[1:7])


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
    positions: int  # that are learned: patches, and 1 of CLIP; 0 of DINOv3
    joint: int  # width of the projection; 0: there is none
    activation: str = "quick_gelu"  # | gelu
    eps: float = 1e-5
    levels: tuple[int, ...] = ()  # tapped blocks, counted from 1
    dtype: str = "float32"
    inputs: bool = False  # also tap what the tapped blocks read, for refinement
    prefix: int = 1  # class token and registers
    plain: bool = False  # not CLIP's: no norm before the blocks, a bias of the patches
    pools: bool = False  # by MapHead; else the class token is taken
    rope: float = 0.0  # base of rotary positions; 0: none

    implementation: ClassVar[str] = "fused"

    def setup(self):
        dtype = stacked.compute_dtype(self.dtype)
        kinds = self.heads, self.hidden, self.activation, self.eps, dtype
        rope = (self.rope, self.prefix) if self.rope else ()
        self.vision_model = VisionModel(
            (self.width, self.patch, self.positions, dtype, self.prefix, self.plain),
            (self.depth, self.width, *kinds, rope),
            *(self.eps, self.plain, self.pools),
        )
        if self.joint:
            self.visual_projection = layers.Dense(self.joint, use_bias=False)

    def __call__(self, pixels: Float[Array, "n h w 3"]) -> Features:
        run, x, start = self.vision_model.encoder.run, self.embed(pixels), 0
        tapped, inputs = [], []
        for level in self.levels:
            if self.inputs:
                x, start = run(x, start, level - 1), level - 1
                inputs.append(x.astype(jnp.float32))
            x, start = run(x, start, level), level
            tapped.append(x[:, self.prefix :].astype(jnp.float32))
        if start < self.depth:
            x = run(x, start, self.depth)
        return Features(self.pool(x).astype(jnp.float32), tuple(tapped), tuple(inputs))

    def embed(self, pixels: Float[Array, "n h w 3"]) -> Float[Array, "n s d"]:
        """What the first block reads."""
        x = self.vision_model.embeddings(pixels)
        return x if self.plain else self.vision_model.pre_layrnorm(x)

    def pool(self, x: Float[Array, "n s d"]) -> Float[Array, "n j"]:
        """The pooled embedding (joint space, not normalised) of the last block's tokens."""
        if self.pools:
            return self.vision_model.head(self.vision_model.post_layernorm(x))
        return self.project(x[:, 0])

    def project(self, tokens: Float[Array, "*n d"]) -> Float[Array, "*n j"]:
        """Last block's tokens into the joint space, by the encoder's own norm and projection."""
        tokens = self.vision_model.post_layernorm(tokens)
        if self.pools:
            return self.vision_model.head.values(tokens)
        return self.visual_projection(tokens) if self.joint else tokens

    @nn.nowrap
    def prepare(self, params: Mapping) -> dict[str, Any]:
        def layout(blocks):
            kept = {}
            for i, p in blocks.items():  # each is on the device before the next is made
                kept[i] = jax.tree.map(jnp.asarray, stacked.compress(p, self.dtype))
            return stacked.stack(kept) if self.dtype == "int8" else kept

        return _image_part(params, layout)

    @nn.nowrap
    def restore(self, vision: Mapping) -> dict[str, Any]:
        def layout(blocks):
            blocks = stacked.decompress(blocks if "0" in blocks else stacked.unstack(blocks))
            return jax.tree.map(lambda x: x.astype(jnp.float32), blocks)

        return _image_part(vision, layout)


def _image_part(params: Mapping, layout) -> dict[str, Any]:
    """The image part of the tree, with its blocks in another layout."""
    model = params["vision_model"]
    model = {**model, "encoder": {"layers": layout(model["encoder"]["layers"])}}
    rest = {x: params[x] for x in ("visual_projection",) if x in params}
    return {"vision_model": model, **rest}


def of_params(params: Mapping, heads: int, activation: str, eps: float, **more) -> ViT:
    """The encoder that transformers' Flax tree makes up; `more` are other fields of ViT."""
    model = params["vision_model"]
    embeddings = model["embeddings"]
    kernel, blocks = embeddings["patch_embedding"]["kernel"], model["encoder"]["layers"]
    table = embeddings.get("position_embedding", {"embedding": ()})["embedding"]
    plain, projection = "pre_layrnorm" not in model, params.get("visual_projection")
    return ViT(
        width=kernel.shape[-1],
        heads=heads,
        hidden=blocks["0"]["mlp"]["fc1"]["bias"].shape[0],
        depth=len(blocks),
        patch=kernel.shape[0],
        positions=len(table),
        joint=0 if projection is None else projection["kernel"].shape[-1],
        activation=activation,
        eps=eps,
        prefix=len(embeddings.get("prefix_tokens", ())) if plain else 1,
        plain=plain,
        pools="head" in model,
        **more,
    )


def resized(
    table: Float[np.ndarray, "p d"], grid: int, antialias: bool
) -> Float[np.ndarray, "q d"]:
    """Positions of a square grid, row-major, on one of `grid` per side, by torch's bicubic rule.

    Keys 1981; torch takes his a = -0.75, and -0.5 with antialias, where the kernel also widens
    when the grid shrinks.
    """
    side = round(len(table) ** 0.5)
    scale = side / grid
    centre = (np.arange(grid)[:, None] + 0.5) * scale - 0.5
    wide, a = (max(scale, 1.0), -0.5) if antialias else (1.0, -0.75)
    reach = 2 * int(np.ceil(wide)) + 1
    source = np.floor(centre) + np.arange(-reach, reach + 1)
    x = np.abs(source - centre) / wide
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    weight = np.where(x <= 1, near, np.where(x < 2, far, 0))
    if antialias:  # what lies outside has no weight; without, the edge stands for it
        weight = weight * ((source >= 0) & (source < side))
        weight /= weight.sum(1, keepdims=True)
    matrix = np.zeros((grid, side))
    rows = np.broadcast_to(np.arange(grid)[:, None], source.shape)
    np.add.at(matrix, (rows, source.clip(0, side - 1).astype(int)), weight)
    square = np.asarray(table, np.float64).reshape(side, side, -1)
    out = np.einsum("ia,jb,abd->ijd", matrix, matrix, square, optimize=True)
    return out.reshape(grid**2, -1).astype(np.float32)
