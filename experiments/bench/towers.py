"""Image encoders of random weights in the sizes of published ones."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medclip_jax.clip import vit


class Size(NamedTuple):
    """Of one image encoder."""

    width: int
    layers: int
    heads: int
    patch: int
    pixels: int
    joint: int


SIZES = {
    "ViT-B/16": Size(768, 12, 12, 16, 224, 512),
    "ViT-L/14": Size(1024, 24, 16, 14, 224, 768),
    "compact": Size(192, 8, 3, 16, 224, 192),  # the embedded CLIP
    "compact/8": Size(192, 8, 3, 8, 224, 192),  # it with smaller patches,
    "compact/320": Size(192, 8, 3, 16, 320, 192),  # a larger frame,
    "compact-384": Size(384, 8, 6, 16, 224, 192),  # or twice the width
    "tiny": Size(32, 4, 2, 8, 32, 16),  # for the tests
}
EPS = 1e-5
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def encoder(size: Size, dtype: str = "float32") -> vit.ViT:
    """Three levels are tapped, as a run does: 1/2, 3/4 and the last."""
    return vit.ViT(
        width=size.width,
        heads=size.heads,
        hidden=4 * size.width,
        depth=size.layers,
        patch=size.patch,
        positions=(size.pixels // size.patch) ** 2 + 1,
        joint=size.joint,
        eps=EPS,
        levels=tuple(round(size.layers * x) for x in (0.5, 0.75, 1.0)),
        dtype=dtype,
    )


def parameters(size: Size, seed: int = 0) -> dict[str, Any]:
    """Random parameters of the encoder in transformers' Flax tree."""
    pixels = jnp.zeros((1, size.pixels, size.pixels, 3))
    return random_like(encoder(size), size.width, seed, pixels)


def random_like(module: nn.Module, width: int, seed: int, *inputs) -> dict[str, Any]:
    """N(0, 1/width); biases and norms too are not what a fresh module has, so mistakes show."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        spread = 0.05 if name in ("bias", "scale") else width**-0.5
        return ((name == "scale") + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def flops(size: Size) -> float:
    """Multiplications and additions of all matrix products for one image."""
    d, s = size.width, (size.pixels // size.patch) ** 2 + 1
    block = 2 * s * d * (3 * d + d + 8 * d) + 2 * 2 * s * s * d
    return size.layers * block + 2 * (s - 1) * size.patch**2 * 3 * d + 2 * d * size.joint


def images(size: Size, count: int, seed: int = 1) -> np.ndarray:
    """Grey images in [0, 1], [n, h, w]."""
    return np.random.default_rng(seed).random((count, size.pixels, size.pixels), np.float32)
