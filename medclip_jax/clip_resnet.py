"""CLIP's ResNet image towers (RN50, RN101, RN50x4, x16, x64): tokens of every tapped stage.

OpenAI's ModifiedResNet (Radford et al. 2021): a stem of three convolutions, average pooling in
place of strides, and an attention pool. Weights come from safetensors under OpenAI's or open_clip's
names (`visual.…`); the sizes follow from the tensors. Equal to open_clip's module on random weights
(tests/test_clip_resnet.py). The batch norms are those of inference, with their running statistics.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.errors import CheckpointError, ConfigError
from medclip_jax.structs import Features

EPS = 1e-5  # of the batch norms
HEAD = 64  # width of a head of the attention pool, in all of OpenAI's towers
STAGES = 4


class Tower(NamedTuple):
    """What is static about the tower; hashable, so jit can close over it."""

    depths: tuple[int, ...]  # blocks of each stage
    heads: int  # of the attention pool
    size: int  # pixels per side of the input
    levels: tuple[int, ...]  # tapped stages, counted from 1


def load(path: Path, levels: tuple[int, ...] = (2, 3, 4)) -> tuple[dict[str, Any], Tower]:
    """Parameters and shape of the image tower in a safetensors file of OpenAI's or open_clip's.

    Raises CheckpointError if the file holds no whole ResNet tower, ConfigError for other `levels`
    than rising stages from 1 to 4.
    """
    if list(levels) != sorted(set(levels)) or not set(levels) <= set(range(1, STAGES + 1)):
        raise ConfigError(f"clip.levels {levels}: a ResNet has rising stages from 1 to {STAGES}")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        flat = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not safetensors ({error}); download it again") from None
    flat = {
        name.removeprefix("visual."): np.asarray(value, np.float32)
        for name, value in flat.items()
        if name.startswith("visual.")
    }
    try:
        tower = shape_of(flat, levels)
        return _params(flat, tower.depths), tower
    except KeyError as error:
        raise CheckpointError(
            f"{path}: tensor visual.{error.args[0]} is missing; this is not a ResNet CLIP"
        ) from None


def shape_of(flat: dict[str, np.ndarray], levels: tuple[int, ...]) -> Tower:
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
    return Tower(tuple(depths), max(width // HEAD, 1), 32 * side, tuple(levels))


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
    """Pooled embedding (joint space, not normalised) and the tokens after each tapped stage.

    pixels: normalised, tower.size per side. Stages have grids of their own, of size / 4, / 8, / 16
    and / 32 per side, row-major: coarser ones have fewer tokens and more channels.
    """
    x = pixels
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
