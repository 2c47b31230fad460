"""CLIP as pure functions on a flat dict of parameters with PyTorch's names and layout.

The dict is what `model.safetensors` holds, so export is a plain save.
Source: transformers' CLIPModel (pre-norm blocks, quick GELU, causal text tower).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

Params = dict[str, Array]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
SD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
PATCH = 16


class Size(NamedTuple):
    """Widths and depths of both towers."""

    width: int = 192
    layers: int = 8
    heads: int = 3
    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 2
    joint: int = 192
    vocabulary: int = 6000
    image: int = 224
    context: int = 77


def _init_block(rng: np.random.Generator, name: str, width: int, layers: int) -> dict:
    """Weights of one transformer block; outputs scaled down with depth as CLIP does."""
    out = {}
    shapes = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
    shapes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for part, (rows, columns) in shapes.items():
        sd = columns**-0.5 * (
            (2 * layers) ** -0.5 if part in ("self_attn.out_proj", "mlp.fc2") else 1
        )
        out[f"{name}.{part}.weight"] = rng.normal(0, sd, (rows, columns))
        out[f"{name}.{part}.bias"] = np.zeros(rows)
    for part in ("layer_norm1", "layer_norm2"):
        out[f"{name}.{part}.weight"], out[f"{name}.{part}.bias"] = np.ones(width), np.zeros(width)
    return out


def init(size: Size, seed: int) -> dict[str, np.ndarray]:
    """Random parameters, float32, under CLIPModel's names."""
    rng = np.random.default_rng([seed, 3])
    d, t = size.width, size.text_width
    places = (size.image // PATCH) ** 2 + 1
    out = {
        "logit_scale": np.array(2.6592),
        "vision_model.embeddings.class_embedding": rng.normal(0, d**-0.5, d),
        "vision_model.embeddings.patch_embedding.weight": rng.normal(0, 0.02, (d, 3, PATCH, PATCH)),
        "vision_model.embeddings.position_embedding.weight": rng.normal(0, 0.02, (places, d)),
        "text_model.embeddings.token_embedding.weight": rng.normal(0, 0.02, (size.vocabulary, t)),
        "text_model.embeddings.position_embedding.weight": rng.normal(0, 0.01, (size.context, t)),
        "visual_projection.weight": rng.normal(0, d**-0.5, (size.joint, d)),
        "text_projection.weight": rng.normal(0, t**-0.5, (size.joint, t)),
    }
    norms = {
        "vision_model.pre_layrnorm": d,
        "vision_model.post_layernorm": d,
        "text_model.final_layer_norm": t,
    }
    for name, width in norms.items():
        out[f"{name}.weight"], out[f"{name}.bias"] = np.ones(width), np.zeros(width)
    for number in range(size.layers):
        out |= _init_block(rng, f"vision_model.encoder.layers.{number}", d, size.layers)
    for number in range(size.text_layers):
        out |= _init_block(rng, f"text_model.encoder.layers.{number}", t, size.text_layers)
    return {name: np.asarray(value, np.float32) for name, value in out.items()}


def _lift(vector: Array, x: Array) -> Array:
    """A vector with leading axes of length 1, to meet `x` without implicit rank promotion."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def linear(p: Params, name: str, x: Array) -> Array:
    x = x @ p[f"{name}.weight"].T
    return x + _lift(p[f"{name}.bias"], x)


def norm(p: Params, name: str, x: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * _lift(p[f"{name}.weight"], x) + _lift(p[f"{name}.bias"], x)


def _attend(p: Params, name: str, x: Array, heads: int, mask: Array | None) -> Array:
    n, t, d = x.shape
    q, k, v = (
        linear(p, f"{name}.{part}_proj", x).reshape(n, t, heads, d // heads) for part in "qkv"
    )
    scores = jnp.einsum("nthc,nshc->nhts", q, k) * (d // heads) ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -1e9)
    mixed = jnp.einsum("nhts,nshc->nthc", jax.nn.softmax(scores), v).reshape(n, t, d)
    return linear(p, f"{name}.out_proj", mixed)


def block(p: Params, name: str, x: Array, heads: int, mask: Array | None = None) -> Array:
    """One pre-norm transformer block."""
    x = x + _attend(p, f"{name}.self_attn", norm(p, f"{name}.layer_norm1", x), heads, mask)
    hidden = linear(p, f"{name}.mlp.fc1", norm(p, f"{name}.layer_norm2", x))
    return x + linear(p, f"{name}.mlp.fc2", hidden * jax.nn.sigmoid(1.702 * hidden))


def patches(pixels: UInt8[Array, "n h w"]) -> Float[Array, "n p 768"]:
    """Grey images as normalised three-channel patches, in the order of the patch convolution."""
    n, side, _ = pixels.shape
    g = side // PATCH
    x = pixels.reshape(n, g, PATCH, g, PATCH).transpose(0, 1, 3, 2, 4)
    x = x.reshape(n, g * g, 1, PATCH * PATCH).astype(jnp.float32) / 255.0
    x = (x - MEAN[None, None, :, None]) / SD[None, None, :, None]
    return x.reshape(n, g * g, 3 * PATCH * PATCH)


def encode_image(
    p: Params, size: Size, pixels: UInt8[Array, "n h w"], keep: Int[Array, "n t"] | None = None
) -> list[Float[Array, "n 1+t d"]]:
    """Hidden states before the first and after each layer; class token first.

    `keep` names the patches that enter (random subsets make training steps cheaper).
    """
    x = patches(pixels)
    places = p["vision_model.embeddings.position_embedding.weight"]
    where = jnp.broadcast_to(places[None, 1:], (*x.shape[:2], size.width))
    if keep is not None:
        x = jnp.take_along_axis(x, keep[..., None], 1)
        where = places[1 + keep]
    kernel = p["vision_model.embeddings.patch_embedding.weight"].reshape(size.width, -1)
    x = x @ kernel.T + where
    first = p["vision_model.embeddings.class_embedding"] + places[0]
    first = jnp.broadcast_to(first[None, None], (x.shape[0], 1, size.width))
    x = norm(p, "vision_model.pre_layrnorm", jnp.concatenate([first, x], 1))
    states = [x]
    for number in range(size.layers):
        states.append(block(p, f"vision_model.encoder.layers.{number}", states[-1], size.heads))
    return states


def project_tokens(p: Params, tokens: Float[Array, "... d"]) -> Float[Array, "... j"]:
    """Last-layer tokens in the joint space; the class token gives CLIP's image embedding."""
    return norm(p, "vision_model.post_layernorm", tokens) @ p["visual_projection.weight"].T


def encode_text(p: Params, size: Size, ids: Int[Array, "n t"]) -> Float[Array, "n j"]:
    """CLIP's text embedding: the state at the first end token (the largest id)."""
    x = p["text_model.embeddings.token_embedding.weight"][ids]
    length = ids.shape[1]
    x = x + p["text_model.embeddings.position_embedding.weight"][None, :length]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    for number in range(size.text_layers):
        x = block(p, f"text_model.encoder.layers.{number}", x, size.text_heads, mask)
    x = norm(p, "text_model.final_layer_norm", x)
    last = jnp.take_along_axis(x, ids.argmax(1)[:, None, None], 1)[:, 0]
    return last @ p["text_projection.weight"].T


def unit(x: Array) -> Array:
    """Vectors of length 1 along the last axis."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
