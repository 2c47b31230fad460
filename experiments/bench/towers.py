"""Image towers of random weights, as weights.read gives them, for clip.py's own code."""

from typing import Any, NamedTuple

import numpy as np

from medclip_jax.clip import vit


class Size(NamedTuple):
    """Of one image tower."""

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


def tower(size: Size, dtype: str = "float32") -> vit.Tower:
    """Three levels are tapped, as a run does: 1/2, 3/4 and the last."""
    levels = tuple(round(size.layers * x) for x in (0.5, 0.75, 1.0))
    return vit.Tower(size.heads, EPS, "quick_gelu", size.patch, levels, dtype)


def parameters(size: Size, seed: int = 0) -> dict[str, Any]:
    """N(0, 1/width); biases and norms too are not what a fresh tower has, so mistakes show."""
    rng, n, d = np.random.default_rng(seed), size.layers, size.width
    grid = size.pixels // size.patch

    def normal(*shape: int, spread: float = 0.0):
        return ((spread or d**-0.5) * rng.standard_normal(shape)).astype(np.float32)

    def norm(*lead: int):
        scale = 1 + normal(*lead, d, spread=0.05)
        return {"scale": scale.astype(np.float32), "bias": normal(*lead, d, spread=0.05)}

    def dense(a: int, b: int):
        return {"kernel": normal(n, a, b), "bias": normal(n, b, spread=0.05)}

    return {
        "patch": normal(size.patch**2 * 3, d),
        "class": normal(d),
        "position": normal(grid**2 + 1, d),
        "pre": norm(),
        "blocks": {
            "norm1": norm(n),
            "qkv": dense(d, 3 * d),
            "out": dense(d, d),
            "norm2": norm(n),
            "fc1": dense(d, 4 * d),
            "fc2": dense(4 * d, d),
        },
        "post": norm(),
        "projection": normal(d, size.joint),
    }


def flops(size: Size) -> float:
    """Multiplications and additions of all matrix products for one image."""
    d, s = size.width, (size.pixels // size.patch) ** 2 + 1
    block = 2 * s * d * (3 * d + d + 8 * d) + 2 * 2 * s * s * d
    return size.layers * block + 2 * (s - 1) * size.patch**2 * 3 * d + 2 * d * size.joint


def images(size: Size, count: int, seed: int = 1) -> np.ndarray:
    """Grey images in [0, 1], [n, h, w]."""
    return np.random.default_rng(seed).random((count, size.pixels, size.pixels), np.float32)
