"""CLIP's ResNet image towers (RN50, RN101, RN50x4, x16, x64): tokens of every tapped stage.

OpenAI's ModifiedResNet (Radford et al. 2021): a stem of three convolutions, average pooling in
place of strides, and an attention pool. Weights come under OpenAI's or open_clip's names
(`visual.…`, see openclip.py); the sizes follow from the tensors. Equal to open_clip's module on
random weights (tests/clip/test_resnet.py). The batch norms are those of inference, with their
running statistics.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.clip.outputs import Features
from medclip_jax.errors import ConfigError

EPS = 1e-5  # of the batch norms
HEAD = 64  # width of a head of the attention pool, in all of OpenAI's towers
STAGES = 4


class Tower(NamedTuple):
    """What is static about the tower; hashable, so jit can close over it."""

    depths: tuple[int, ...]  # blocks of each stage
    heads: int  # of the attention pool
    size: int  # pixels per side of the input
    levels: tuple[int, ...] = (2, 3, 4)  # tapped stages, counted from 1
    dtype: str = "float32"
    inputs: bool = False  # as clip.Tower: refinement needs a ViT, so always False


def read(flat: dict[str, np.ndarray]) -> tuple[dict[str, Any], Tower]:
    """Parameters and shape of the image tower among tensors under OpenAI's names.

    Raises KeyError naming a tensor that is missing.
    """
    flat = {n.removeprefix("visual."): x for n, x in flat.items() if n.startswith("visual.")}
    try:
        tower = shape_of(flat)
        return _params(flat, tower.depths), tower
    except KeyError as error:
        raise KeyError(f"visual.{error.args[0]}") from None


def tapped(tower: Tower, levels: tuple[int, ...], dtype: str, inputs: bool) -> Tower:
    """The tower with these levels tapped; () is stages 2 to 4.

    Raises ConfigError for other levels than rising stages from 1 to 4, or if `inputs` (refinement)
    is asked for.
    """
    levels = tuple(levels) or tower.levels
    if list(levels) != sorted(set(levels)) or not set(levels) <= set(range(1, STAGES + 1)):
        raise ConfigError(f"clip.levels {levels}: a ResNet has rising stages from 1 to {STAGES}")
    if inputs:
        raise ConfigError(
            "config.model.refine needs the keys and values of a ViT's blocks, which a ResNet "
            "lacks: give refine=False"
        )
    return tower._replace(levels=levels, dtype=dtype)


def widths(params: dict[str, Any], tower: Tower) -> tuple[int, ...]:
    """Channels of each tapped stage."""
    return tuple(len(params["stages"][l - 1][-1]["conv3"]["bias"]) for l in tower.levels)


def shape_of(flat: dict[str, np.ndarray]) -> Tower:
    """The tower that tensors (names without `visual.`) make up.

    Raises KeyError naming a tensor that is missing.
    """
    depths = [0] * STAGES
    for name in flat:
        if found := re.match(r"layer([1-4])\.(\d+)\.", name):
            stage, block = map(int, found.groups())
            depths[stage - 1] = max(depths[stage - 1], block + 1)
    if not all(depths):
        raise KeyError(f"layer{1 + depths.index(0)}.0.conv1.weight")
    positions, width = flat["attnpool.positional_embedding"].shape
    side = round((positions - 1) ** 0.5)
    return Tower(tuple(depths), max(width // HEAD, 1), 32 * side)


def _params(flat: dict[str, np.ndarray], depths: tuple[int, ...]) -> dict[str, Any]:
    def dense(name):
        return {"kernel": flat[f"{name}.weight"].T, "bias": flat[f"{name}.bias"]}

    def conv(name, norm):
        """A convolution [h, w, in, out] and the batch norm after it, as one."""
        scale = flat[f"{norm}.weight"] / np.sqrt(flat[f"{norm}.running_var"] + EPS)
        kernel = flat[f"{name}.weight"].transpose(2, 3, 1, 0) * scale
        return {
            "kernel": kernel,
            "bias": flat[f"{norm}.bias"] - flat[f"{norm}.running_mean"] * scale,
        }

    def block(at):
        made = {f"conv{i}": conv(f"{at}.conv{i}", f"{at}.bn{i}") for i in (1, 2, 3)}
        if f"{at}.downsample.0.weight" in flat:
            made["shortcut"] = conv(f"{at}.downsample.0", f"{at}.downsample.1")
        return made

    pool = {x: dense(f"attnpool.{x}_proj") for x in "qkvc"}
    pool["position"] = flat["attnpool.positional_embedding"]
    stages = [[block(f"layer{s}.{i}") for i in range(n)] for s, n in enumerate(depths, 1)]
    return {
        "stem": [conv(f"conv{i}", f"bn{i}") for i in (1, 2, 3)],
        "stages": stages,
        "pool": pool,
    }


def _conv(x, p, stride: int = 1):
    around = p["kernel"].shape[0] // 2
    y = jax.lax.conv_general_dilated(
        x,
        p["kernel"],
        (stride, stride),
        [(around, around)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + p["bias"][None, None, None]


def _halve(x, by: int = 2):
    """Mean of tiles of by x by pixels; what does not fill a tile is dropped."""
    n, h, w, c = x.shape
    x = x[:, : h // by * by, : w // by * by]
    return x.reshape(n, h // by, by, w // by, by, c).mean((2, 4))


def _block(x, p, stride: int):
    y = jax.nn.relu(_conv(x, p["conv1"]))
    y = jax.nn.relu(_conv(y, p["conv2"]))
    y = _conv(_halve(y, stride), p["conv3"])
    if "shortcut" in p:
        x = _conv(_halve(x, stride), p["shortcut"])
    return jax.nn.relu(x + y)


def attention_pool(
    p: dict[str, Any], x: Float[Array, "n h w d"], heads: int
) -> Float[Array, "n j"]:
    """The mean token asks, it and all patches answer; joint space, not normalised."""
    n, h, w, d = x.shape
    tokens = x.reshape(n, h * w, d)
    tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
    tokens = tokens + p["position"][None]

    def ask(name, of):
        y = of @ p[name]["kernel"] + p[name]["bias"][None, None]
        return y.reshape(n, -1, heads, d // heads)

    q, k, v = ask("q", tokens[:, :1]), ask("k", tokens), ask("v", tokens)
    mixed = jax.nn.dot_product_attention(q, k, v).reshape(n, d)
    return mixed @ p["c"]["kernel"] + p["c"]["bias"][None]


def patch_features(
    params: dict[str, Any], pixels: Float[Array, "n h w 3"], tower: Tower
) -> Features:
    """Pooled embedding (joint space, not normalised) and the tokens after each tapped stage, as is.

    pixels: normalised, tower.size per side. Stages have grids of their own, of size / 4, / 8, / 16
    and / 32 per side, row-major: coarser ones have fewer tokens and more channels.
    """
    dtype = jnp.dtype(tower.dtype)
    x, params = pixels.astype(dtype), jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    for i, p in enumerate(params["stem"]):
        x = jax.nn.relu(_conv(x, p, stride=2 if i == 0 else 1))
    x, levels = _halve(x), []
    for number, stage in enumerate(params["stages"], 1):
        for i, p in enumerate(stage):
            x = _block(x, p, stride=2 if number > 1 and i == 0 else 1)
        if number in tower.levels:
            levels.append(x.reshape(len(x), -1, x.shape[-1]).astype(jnp.float32))
    pooled = attention_pool(params["pool"], x, tower.heads)
    return Features(pooled.astype(jnp.float32), tuple(levels))


def encode(params: dict[str, Any], pixels: Float[Array, "n h w 3"], tower: Tower) -> Features:
    """`patch_features` with all stages on the grid of the third, as the rest of the house reads.

    Finer stages are averaged over its patches, the coarser one is interpolated.
    """
    found, grid = patch_features(params, pixels, tower), tower.size // 16
    return found._replace(levels=tuple(to_grid(x, grid) for x in found.levels))


def to_grid(tokens: Float[Array, "n p d"], grid: int) -> Float[Array, "n q d"]:
    """Tokens of a square grid, row-major, on another: means where it is coarser, else bilinear."""
    n, p, d = tokens.shape
    side = round(p**0.5)
    x = tokens.reshape(n, side, side, d)
    if side >= grid:
        x = _halve(x, side // grid)
    else:
        x = jax.image.resize(x, (n, grid, grid, d), "linear")
    return x.reshape(n, grid**2, d)


def project(
    params: dict[str, Any], tokens: Float[Array, "n p d"], tower: Tower
) -> Float[Array, "n p j"]:
    """The last stage's tokens into the joint space, by the attention pool's own values.

    That is what the pool gives for a token that looks at itself alone (Zhou et al., MaskCLIP, ECCV
    2022). Raises ConfigError if the last stage is not tapped.
    """
    if tower.levels[-1] != STAGES:
        raise ConfigError(f"clip.levels {tower.levels}: maps of plain prompts need stage {STAGES}")
    for name in "vc":
        p = params["pool"][name]
        tokens = tokens @ p["kernel"] + p["bias"][None, None]
    return tokens
