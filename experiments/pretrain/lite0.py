"""The image teacher, EfficientNet-Lite0, in JAX: for fresh views on an accelerator."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .teachers import COARSE_BLOCK, FINE_BLOCK, MEAN, SD

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the blocks
EPSILON = 1e-3  # of batch normalisation


def convert(net) -> dict[str, np.ndarray]:
    """Kernels [h w in out] and biases of the PyTorch net, batch normalisation folded in."""
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    out = {}

    def fold(name: str, conv: str, norm: str) -> None:
        gain = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + EPSILON)
        out[f"{name}.kernel"] = (state[f"{conv}.weight"].T * gain).transpose(1, 0, 2, 3)
        out[f"{name}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain

    fold("stem", "_conv_stem", "_bn0")
    for n in range(len(STRIDES)):
        for part, norm in (("expand", 0), ("depthwise", 1), ("project", 2)):
            if f"_blocks.{n}._{part}_conv.weight" in state:  # the first block does not expand
                fold(f"{n}.{part}", f"_blocks.{n}._{part}_conv", f"_blocks.{n}._bn{norm}")
    fold("head", "_conv_head", "_bn1")
    return {name: np.ascontiguousarray(x, np.float32) for name, x in out.items()}


def features(
    weights: dict[str, Array], grey: Float[Array, "n 224 224"]
) -> tuple[Float[Array, "n 14 14 40"], Float[Array, "n 14 14 112"], Float[Array, "n 1280"]]:
    """What `teachers.image_features` returns, of images in [0, 1]; products in their dtype."""

    def conv(x, name, stride=1, active=True):
        kernel = weights[f"{name}.kernel"].astype(x.dtype)
        groups = x.shape[-1] // kernel.shape[2]
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        x = x + weights[f"{name}.bias"].astype(x.dtype)[None, None, None]
        return jnp.clip(x, 0, 6) if active else x

    mean, sd = (np.array(v, np.float32)[None, None, None] for v in (MEAN, SD))
    x = conv(((jnp.stack([grey] * 3, -1) - mean) / sd).astype(grey.dtype), "stem", 2)
    for n, stride in enumerate(STRIDES):
        before = x
        if f"{n}.expand.kernel" in weights:
            x = conv(x, f"{n}.expand")
        x = conv(conv(x, f"{n}.depthwise", stride), f"{n}.project", active=False)
        if stride == 1 and x.shape == before.shape:
            x = x + before
        if n == FINE_BLOCK:
            fine = x.reshape(len(x), 14, 2, 14, 2, -1).mean((2, 4))
        if n == COARSE_BLOCK:
            coarse = x
    return fine, coarse, conv(x, "head").mean((1, 2))
