"""What the small CLIP learns: teacher patches, token similarity and what texts say."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from .encoders import Encoders, encode_image, encode_text, project, unit


class Batch(NamedTuple):
    """One step's data. Teacher features are standardised per channel, for the kept patches."""

    pixels: UInt8[Array, "n h w"]
    keep: Int[Array, "n t"]
    fine: Float[Array, "n t 40"]
    coarse: Float[Array, "n t 112"]
    pooled: Float[Array, "n 1280"]
    captions: Int[Array, "n l"]
    match: Float[Array, "n n"]  # image i, caption j: 1 where true
    phrases: Int[Array, "m l"]
    meaning: Float[Array, "m 384"]  # the text teacher's embeddings, length 1


class Weights(NamedTuple):
    """Weight of each part of the loss."""

    fine: float = 1.0
    coarse: float = 1.0
    pooled: float = 0.5
    similarity: float = 4.0
    caption: float = 0.15
    patch_caption: float = 0.1
    phrase: float = 0.5


SIMILARITY_TOKENS = 12  # patches of each image that enter the similarity loss


def init_heads(encoders: Encoders, seed: int) -> dict[str, np.ndarray]:
    """Linear maps from our tokens to the teachers' features; training only, never exported."""
    rng = np.random.default_rng([seed, 5])
    shapes = {"fine": (40, encoders.image.width), "coarse": (112, encoders.image.width)}
    shapes |= {"pooled": (1280, encoders.image.width), "phrase": (384, encoders.image.joint)}
    out = {}
    for name, (rows, columns) in shapes.items():
        out[f"{name}.weight"] = rng.normal(0, 0.02, (rows, columns)).astype(np.float32)
        out[f"{name}.bias"] = np.zeros(rows, np.float32)
    return out


def similarity(ours: Float[Array, "n t d"], theirs: Float[Array, "n t c"]) -> Float[Array, ""]:
    """Mean squared difference between both sides' cosines over all pairs of sampled tokens.

    Nearest-neighbour memories live on exactly these cosines (Gram matching, as in DINOv3).
    """
    a, b = (unit(x[:, :SIMILARITY_TOKENS].reshape(-1, x.shape[-1])) for x in (ours, theirs))
    return jnp.square(a @ a.T - b @ b.T).mean()


def contrast(
    images: Float[Array, "n j"],
    texts: Float[Array, "n j"],
    match: Float[Array, "n n"],
    scale: Float[Array, ""],
) -> Float[Array, ""]:
    """CLIP's symmetric loss with every true caption as a positive."""
    logits = scale * unit(images) @ unit(texts).T
    to_text = optax.softmax_cross_entropy(logits, match / match.sum(1, keepdims=True))
    back = match.T / match.T.sum(1, keepdims=True)
    return (to_text.mean() + optax.softmax_cross_entropy(logits.T, back).mean()) / 2


def linear(heads: dict, name: str, x: Array) -> Array:
    """One of the linear maps."""
    bias = heads[f"{name}.bias"]
    return x @ heads[f"{name}.weight"].T + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def loss(
    params: dict, encoders: Encoders, weights: Weights, batch: Batch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Sum and parts; params = {"clip": FlaxCLIPModel's parameters, "heads": linear maps}."""
    clip, heads = params["clip"], params["heads"]
    states = encode_image(clip, encoders, batch.pixels, batch.keep)
    middle, last = (x[:, 1:] for x in states)
    texts = encode_text(clip, encoders, jnp.concatenate([batch.captions, batch.phrases]))
    captions, phrases = jnp.split(texts, [batch.captions.shape[0]])
    scale = jnp.exp(jnp.minimum(clip["logit_scale"], jnp.log(100.0)))
    joint = project(clip, encoders, states[1])
    meaning = unit(linear(heads, "phrase", phrases))

    def near(name, tokens, target):
        return optax.huber_loss(linear(heads, name, tokens), target).mean()

    parts = {
        "fine": near("fine", middle, batch.fine),
        "coarse": near("coarse", last, batch.coarse),
        "pooled": near("pooled", states[1][:, 0], batch.pooled),
        "similarity": similarity(middle, batch.fine) + similarity(last, batch.coarse),
        "caption": contrast(joint[:, 0], captions, batch.match, scale),
        "patch_caption": contrast(joint[:, 1:].mean(1), captions, batch.match, scale),
        "phrase": 1 - (meaning * batch.meaning).sum(-1).mean(),
    }
    total = sum(getattr(weights, name) * value for name, value in parts.items())
    return total, parts


def step(params, moments, average, lr, batch, *, encoders, weights, optimiser):
    """One update: (params, optimiser state, running average of the CLIP parameters, parts)."""
    (total, parts), gradient = jax.value_and_grad(loss, has_aux=True)(
        params, encoders, weights, batch
    )
    updates, moments = optimiser.update(gradient, moments, params)
    params = jax.tree.map(lambda w, u: w - lr * u, params, updates)
    average = jax.tree.map(lambda a, w: a + 0.005 * (w - a), average, params["clip"])
    return params, moments, average, parts | {"total": total}


def make_optimiser() -> optax.GradientTransformation:
    """AdamW without its learning rate (the loop multiplies it in); no decay of vectors."""

    def matrices(tree):
        return jax.tree.map(lambda w: w.ndim > 1, tree)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(0.05, mask=matrices),
    )
