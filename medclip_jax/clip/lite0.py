"""EfficientNet-Lite0 (ImageNet): patch tokens of their own for the memory of healthy patches.

The first eleven blocks (Tan & Le 2019), batch normalisation folded into the convolutions; frozen.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from medclip_jax import stored
from medclip_jax.clip import hf_weights, tensor_files
from medclip_jax.clip.layers import Features, ImageEncoder
from medclip_jax.clip.resnet import to_grid

NAME = "efficientnet-lite0"
WEIGHTS = hf_weights.EMBEDDED.with_name("efficientnet_lite0") / "model.safetensors"
STEM = 32  # channels
BLOCKS = (  # kernel, stride, expansion, channels
    *((3, 1, 1, 16), (3, 2, 6, 24), (3, 1, 6, 24), (5, 2, 6, 40), (5, 1, 6, 40)),
    *((3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)),
    *((5, 1, 6, 112), (5, 1, 6, 112), (5, 1, 6, 112)),
)
PATCH = 16  # pixels per token
# blocks whose tokens the memory compares, counted from 1; chosen on the development sets with their
# labels known (docs/embedded_clip.md)
TAPPED = 5, 11


class Convolution(nn.Module):
    """With bias and, if `active`, ReLU6; `depthwise` filters every channel on its own."""

    kernel: int
    channels: int
    stride: int = 1
    depthwise: bool = False
    active: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n i j d"]:
        k, inputs = self.kernel, 1 if self.depthwise else x.shape[-1]
        start = nn.initializers.lecun_normal()
        kernel = self.param("kernel", start, (k, k, inputs, self.channels))
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        if self.depthwise:
            x = filtered(x, kernel[:, :, 0], self.stride)
        elif k == 1:
            x = x @ kernel[0, 0]
        else:
            sides = ("NHWC", "HWIO", "NHWC")
            strides = (self.stride, self.stride)
            x = jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=sides)
        x = x + bias[None, None, None]
        return jnp.clip(x, 0.0, 6.0) if self.active else x


def filtered(
    x: Float[Array, "n h w c"], kernel: Float[Array, "k k c"], stride: int
) -> Float[Array, "n i j c"]:
    """Every channel filtered by its own kernel, padded as TensorFlow's SAME.

    A sum of shifted products: on a CPU five times as fast as XLA's grouped convolution.
    """
    k, lines = len(kernel), []
    for side in x.shape[1:3]:
        count = -(-side // stride)
        missing = max((count - 1) * stride + k - side, 0)
        lines.append((count, (missing // 2, missing - missing // 2)))
    (rows, above), (columns, left) = lines
    x = jnp.pad(x, ((0, 0), above, left, (0, 0)))
    total = jnp.zeros((x.shape[0], rows, columns, x.shape[3]), x.dtype)
    for i in range(k):
        for j in range(k):
            down, across = (
                slice(at, at + (count - 1) * stride + 1, stride)
                for at, count in ((i, rows), (j, columns))
            )
            total = total + x[:, down, across] * kernel[i, j][None, None, None]
    return total


class Block(nn.Module):
    """An inverted bottleneck: expand, filter, project; added to its input where shapes allow."""

    kernel: int
    stride: int
    expansion: int
    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n i j d"]:
        y, wide = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = Convolution(1, wide, name="expand")(y)
        y = Convolution(self.kernel, wide, self.stride, depthwise=True, name="depthwise")(y)
        y = Convolution(1, self.channels, active=False, name="project")(y)
        return x + y if x.shape == y.shape else y


class Lite0(nn.Module):
    """Tokens after the tapped blocks, one for 16 x 16 pixels; pooled: the last block's mean."""

    levels: tuple[int, ...] = TAPPED
    dtype: str = "float32"

    implementation: ClassVar[str] = "fused"
    inputs: ClassVar[bool] = False
    depth: ClassVar[int] = len(BLOCKS)

    @nn.compact
    def __call__(self, pixels: Float[Array, "n h w 3"]) -> Features:
        x, tokens = Convolution(3, STEM, 2, name="stem")(pixels), []
        for number, shape in enumerate(BLOCKS, 1):
            x = Block(*shape, name=f"block{number}")(x)
            if number in self.levels:
                flat = x.reshape(x.shape[0], -1, x.shape[-1])
                tokens.append(to_grid(flat, pixels.shape[1] // PATCH))
        return Features(x.mean((1, 2)), tuple(tokens))


@dataclass(frozen=True)
class PairedEncoder:
    """A CLIP's image encoder and the memory's as one: the memory's tokens are the last levels.

    Everything else is as of the CLIP's (`levels` too: its tapped blocks).
    """

    clip: Any  # ImageEncoder
    memory: Any
    mean: tuple[float, ...]  # of the pixels that the CLIP reads
    std: tuple[float, ...]
    side: int  # pixels per side that the memory's reads

    @property
    def title(self) -> str:
        return f"{type(self.clip).__name__}, and EfficientNet-Lite0 for the memory"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.clip, name)

    def apply(self, variables: Any, pixels: Array, method: Any = None) -> Any:
        own = {"params": variables["params"]["clip"]}
        if method is not None:
            return self.clip.apply(own, pixels, method=method)
        found = self.clip.apply(own, pixels)
        mean, std = (np.asarray(x, np.float32) for x in (self.mean, self.std))
        centre, width = (np.asarray(x, np.float32) for x in hf_weights.IMAGENET)
        pixels = (pixels * (std / width)[None, None, None]) + ((mean - centre) / width)[
            None, None, None
        ]
        if pixels.shape[1] != self.side:
            shape = (pixels.shape[0], self.side, self.side, 3)
            pixels = jax.image.resize(pixels, shape, "linear")

        def run(x):
            return self.memory.apply({"params": variables["params"]["memory"]}, x)

        def one_by_one(x):  # wide blocks of one image stay in a processor's cache
            return jax.tree.map(lambda y: y[:, 0], jax.lax.map(lambda image: run(image[None]), x))

        ways = {"cpu": one_by_one} if jax.device_count() == 1 else {}  # devices share the images
        added = jax.lax.platform_dependent(pixels, default=run, **ways)
        return found._replace(levels=(*found.levels, *added.levels))

    def prepare(self, params: Any) -> Any:
        rest = {name: x for name, x in params.items() if name != NAME}
        return {"clip": self.clip.prepare(rest), "memory": params[NAME]}

    def restore(self, vision: Any) -> Any:
        return {**self.clip.restore(vision["clip"]), NAME: vision["memory"]}


def without_memory_encoder(clip: Any) -> Any:
    """Undoes `with_memory_encoder`: the checkpoint.Clip alone."""
    if not clip.memory_levels:
        return clip
    pair: Any = clip.image_encoder
    own = {"image_encoder": pair.clip, "vision": clip.vision["clip"], "digest": clip.own_digest}
    return clip._replace(**own, memory_levels=0)


def with_memory_encoder(clip: Any) -> Any:
    """The checkpoint.Clip with EfficientNet-Lite0's tokens, on its own grid, as the last levels.

    Raises CheckpointError for a damaged file of weights.
    """
    flat = {tuple(n.split(".")): x for n, x in tensor_files.read(WEIGHTS).items()}
    memory: ImageEncoder = Lite0()
    pair = PairedEncoder(clip.image_encoder, memory, clip.mean, clip.std, clip.grid * PATCH)
    vision = {"clip": clip.vision, "memory": jax.tree.map(jnp.asarray, unflatten_dict(flat))}
    digest = stored.digest([clip.digest, hf_weights.digest_of(NAME.encode(), WEIGHTS)])
    both: dict[str, Any] = {"image_encoder": pair, "vision": vision, "digest": digest}
    return clip._replace(**both, memory_levels=len(memory.levels))
