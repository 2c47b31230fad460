"""CLIPs of known sizes with random weights: time does not depend on the values."""

from pathlib import Path

import jax
import numpy as np
from pretrain import encoders, export

from medclip_jax.clip import checkpoint, hf_weights

SIZES = {
    "ViT-B/16": dict(width=768, layers=12, heads=12, text_width=512, text_layers=12, text_heads=8)
    | dict(joint=512),
    "ViT-L/14": dict(width=1024, layers=24, heads=16, text_width=768, text_layers=12)
    | dict(text_heads=12, joint=768, patch=14),
    "compact": {},  # the embedded CLIP,
    "compact/8": dict(patch=8),  # it with smaller patches,
    "compact/320": dict(size=320),  # a larger frame,
    "compact-384": dict(width=384, heads=6),  # or twice the width
    "tiny": dict(width=32, layers=4, heads=2, text_width=32, text_layers=2, text_heads=2)
    | dict(joint=16, patch=8, size=32),  # for the tests
}


def write(name: str, folder: Path, **changes) -> Path:
    """A CLIP folder; `changes` are fields of encoders.make_config. Returns the folder."""
    vocabulary = checkpoint.load("compact").tokenizer.vocab_size
    config = encoders.make_config(vocabulary, **SIZES[name] | changes)
    params = encoders.init(encoders.build(config), 0)
    rng = np.random.default_rng(0)
    # fresh norms are 1 and biases 0, which would hide mistakes
    noisy = jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape, np.float32), params)
    export.write_folder(folder, noisy, config, hf_weights.EMBEDDED)
    return folder


def flops(name: str, **changes) -> float:
    """Multiplications and additions of all matrix products of the image encoder, for one image."""
    config = encoders.make_config(3, **SIZES[name] | changes)
    image, joint = config.vision_config, config.projection_dim
    d, p, s = image.hidden_size, image.patch_size, (image.image_size // image.patch_size) ** 2 + 1
    block = 2 * s * d * (4 * d + 2 * image.intermediate_size) + 2 * 2 * s * s * d
    return image.num_hidden_layers * block + 2 * (s - 1) * p * p * 3 * d + 2 * d * joint


def images(clip: checkpoint.Clip, count: int) -> np.ndarray:
    """Grey images in [0, 1], [n, h, w]."""
    return np.random.default_rng(1).random((count, clip.size, clip.size), np.float32)
