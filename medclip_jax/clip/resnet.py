"""CLIP's ResNet image encoders (RN50, RN101, RN50x4, x16, x64): tokens of every tapped stage.

OpenAI's ModifiedResNet (Radford et al. 2021): a stem of three convolutions, average pooling in
place of strides, and an attention pool. Batch norms are folded into the convolutions before them.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.clip.layers import Features
from medclip_jax.errors import ConfigError

EPS = 1e-5  # of the batch norms
HEAD = 64  # width of a head of the attention pool, in all of OpenAI's encoders
STAGES = 4
STRIDE = 16  # pixels per patch of the third stage, whose grid all stages are brought to


class Bottleneck(nn.Module):
    width: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        def conv(name, features, side):
            around = [(side // 2,) * 2] * 2
            return nn.Conv(features, (side, side), padding=around, dtype=self.dtype, name=name)

        y = jax.nn.relu(conv("conv1", self.width, 1)(x))
        y = jax.nn.relu(conv("conv2", self.width, 3)(y))
        y = conv("conv3", 4 * self.width, 1)(halve(y, self.stride))
        if self.stride > 1 or x.shape[-1] != 4 * self.width:
            x = conv("shortcut", 4 * self.width, 1)(halve(x, self.stride))
        return jax.nn.relu(x + y)


class AttentionPool(nn.Module):
    """The mean token is the query, it and all patches are keys; joint space, not normalised."""

    positions: int
    width: int
    heads: int
    joint: int
    dtype: str

    def setup(self):
        size = (self.positions, self.width)
        self.position = self.param("position", nn.initializers.normal(0.02), size)
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (
            nn.Dense(n, dtype=self.dtype) for n in (*(self.width,) * 3, self.joint)
        )

    def __call__(self, x: Float[Array, "n h w d"]) -> Float[Array, "n j"]:
        n, h, w, d = x.shape
        tokens = x.reshape(n, h * w, d)
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
        tokens = tokens + self.position.astype(tokens.dtype)[None]
        parts = self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens)
        q, k, v = (y.reshape(n, -1, self.heads, d // self.heads) for y in parts)
        return self.c_proj(jax.nn.dot_product_attention(q, k, v).reshape(n, d))

    def values(self, tokens):
        """What the pool gives for tokens that attend to themselves alone."""
        return self.c_proj(self.v_proj(tokens))


class ResNet(nn.Module):
    """Pooled embedding (joint space, not normalised) and the tokens after each tapped stage.

    Tokens come on the grid of the third stage, as the rest of the package reads them: finer stages
    are averaged over its patches, the coarser one is interpolated.
    """

    depths: tuple[int, ...]  # blocks of each stage
    width: int  # of the stem
    size: int  # pixels per side of the input
    joint: int
    levels: tuple[int, ...] = (2, 3, 4)  # tapped stages, counted from 1
    dtype: str = "float32"

    implementation: ClassVar[str] = "fused"
    inputs: ClassVar[bool] = False  # refinement needs a ViT
    depth: ClassVar[int] = STAGES

    def setup(self):
        half, whole = self.width // 2, self.width

        def conv(features, stride=1):
            same = [(1, 1), (1, 1)]
            return nn.Conv(features, (3, 3), (stride,) * 2, padding=same, dtype=self.dtype)

        self.conv1, self.conv2, self.conv3 = conv(half, 2), conv(half), conv(whole)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            [
                Bottleneck(whole * 2**stage, 2 if stage and not i else 1, self.dtype)
                for i in range(depth)
            ]
            for stage, depth in enumerate(self.depths)
        )
        positions, width = (self.size // 32) ** 2 + 1, 32 * whole
        heads = max(width // HEAD, 1)
        self.attnpool = AttentionPool(positions, width, heads, self.joint, self.dtype)

    def __call__(self, pixels: Float[Array, "n h w 3"]) -> Features:
        found = self.stages(pixels)
        grid = self.size // STRIDE
        return found._replace(levels=tuple(to_grid(x, grid) for x in found.levels))

    def stages(self, pixels: Float[Array, "n h w 3"]) -> Features:
        """Features with each stage on its own grid: size / 4, / 8, / 16 and / 32 per side."""
        x, levels = pixels.astype(self.dtype), []
        for conv in (self.conv1, self.conv2, self.conv3):
            x = jax.nn.relu(conv(x))
        x = halve(x)
        for number in range(1, STAGES + 1):
            for block in getattr(self, f"layer{number}"):
                x = block(x)
            if number in self.levels:
                levels.append(x.reshape(len(x), -1, x.shape[-1]).astype(jnp.float32))
        return Features(self.attnpool(x).astype(jnp.float32), tuple(levels))

    def project(self, tokens: Float[Array, "n p d"]) -> Float[Array, "n p j"]:
        """The last stage's tokens into the joint space, by the attention pool's own values.

        Zhou et al. (MaskCLIP, 2022). Raises ConfigError if the last stage is not tapped.
        """
        if self.levels[-1] != STAGES:
            raise ConfigError(
                f"config.clip.layers {self.levels}: maps of plain prompts need stage {STAGES}"
            )
        return self.attnpool.values(tokens)

    @nn.nowrap
    def widths(self, levels: tuple[int, ...]) -> tuple[int, ...]:
        """Channels of stages."""
        return tuple(4 * self.width * 2 ** (level - 1) for level in levels)

    @nn.nowrap
    def prepare(self, params: Mapping) -> dict[str, Any]:
        return params["visual"]

    @nn.nowrap
    def restore(self, vision: Mapping) -> dict[str, Any]:
        return {"visual": vision}


def halve(x, by: int = 2):
    """Mean of tiles of by x by pixels; what does not fill a tile is dropped."""
    n, h, w, c = x.shape
    x = x[:, : h // by * by, : w // by * by]
    return x.reshape(n, h // by, by, w // by, by, c).mean((2, 4))


def to_grid(tokens: Float[Array, "n p d"], grid: int) -> Float[Array, "n q d"]:
    """Tokens of a square grid, row-major, on another: means where it is coarser, else bilinear."""
    n, p, d = tokens.shape
    side = round(p**0.5)
    x = tokens.reshape(n, side, side, d)
    if side >= grid:
        x = halve(x, side // grid)
    else:
        x = jax.image.resize(x, (n, grid, grid, d), "linear")
    return x.reshape(n, grid**2, d)


def tapped(encoder: ResNet, levels: tuple[int, ...], dtype: str, inputs: bool) -> ResNet:
    """The encoder with these levels tapped; () is stages 2 to 4. Raises ConfigError."""
    levels = tuple(levels) or encoder.levels
    if list(levels) != sorted(set(levels)) or not set(levels) <= set(range(1, STAGES + 1)):
        raise ConfigError(
            f"config.clip.layers {levels}: a ResNet has rising stages from 1 to {STAGES}"
        )
    if inputs:
        raise ConfigError(
            "config.model.refine needs the keys and values of a ViT's blocks, which a ResNet "
            "lacks: give refine=False"
        )
    return encoder.clone(levels=levels, dtype=dtype)


def read(flat: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], ResNet]:
    """Parameters and encoder among tensors of OpenAI's names; KeyError names a missing one."""
    flat = {n.removeprefix("visual."): x for n, x in flat.items() if n.startswith("visual.")}
    try:
        encoder = of_tensors(flat)
        return _params(flat, encoder.depths), encoder
    except KeyError as error:
        raise KeyError(f"visual.{error.args[0]}") from None


def of_tensors(flat: Mapping[str, np.ndarray]) -> ResNet:
    """The encoder that tensors (names without `visual.`) make up; KeyError names a missing one."""
    depths = [0] * STAGES
    for name in flat:
        if found := re.match(r"layer([1-4])\.(\d+)\.", name):
            stage, block = map(int, found.groups())
            depths[stage - 1] = max(depths[stage - 1], block + 1)
    if not all(depths):
        raise KeyError(f"layer{1 + depths.index(0)}.0.conv1.weight")
    positions, width = flat["attnpool.positional_embedding"].shape
    side = round((positions - 1) ** 0.5)
    joint = len(flat["attnpool.c_proj.bias"])
    return ResNet(tuple(depths), width // 32, 32 * side, joint)


def _params(flat: Mapping[str, np.ndarray], depths: tuple[int, ...]) -> dict[str, Any]:
    def dense(name):
        return {"kernel": flat[f"{name}.weight"].T, "bias": flat[f"{name}.bias"]}

    def conv(name, norm):
        """A convolution [h, w, in, out] and the batch norm after it, as one."""
        scale = flat[f"{norm}.weight"] / np.sqrt(flat[f"{norm}.running_var"] + EPS)
        bias = flat[f"{norm}.bias"] - flat[f"{norm}.running_mean"] * scale
        return {"kernel": flat[f"{name}.weight"].transpose(2, 3, 1, 0) * scale, "bias": bias}

    def block(at):
        parts = {f"conv{i}": conv(f"{at}.conv{i}", f"{at}.bn{i}") for i in (1, 2, 3)}
        if f"{at}.downsample.0.weight" in flat:
            parts["shortcut"] = conv(f"{at}.downsample.0", f"{at}.downsample.1")
        return parts

    pool = {f"{x}_proj": dense(f"attnpool.{x}_proj") for x in "qkvc"}
    stem = {f"conv{i}": conv(f"conv{i}", f"bn{i}") for i in (1, 2, 3)}
    blocks = {
        f"layer{s}_{i}": block(f"layer{s}.{i}") for s, n in enumerate(depths, 1) for i in range(n)
    }
    pool["position"] = flat["attnpool.positional_embedding"]
    return {**stem, **blocks, "attnpool": pool}
