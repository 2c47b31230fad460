"""What the small CLIP learns: teacher patches, token similarity, texts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8
from optax import contrib

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
    """Weight of each part of the loss, and what the texts teach the image encoder."""

    fine: float = 1.0
    coarse: float = 1.0
    pooled: float = 0.5
    similarity: float = 4.0
    caption: float = 0.1
    patch_caption: float = 0.05
    phrase: float = 0.5
    into_image: float = 0.0  # share of the captions' gradient that reaches the image encoder

    @property
    def image(self) -> float:
        """Of all that teaches the image encoder; 0: it stays as it is, and texts alone learn."""
        return self.fine + self.coarse + self.pooled + self.similarity + self.into_image


SIMILARITY_TOKENS = 12  # patches of each image that enter the similarity loss


def init_heads(encoders: Encoders, seed: int) -> dict[str, np.ndarray]:
    """Linear maps from our tokens to the teachers' features; training only, never exported."""
    rng = np.random.default_rng([seed, 5])
    shapes = {"fine": (40, encoders.image.width), "coarse": (112, encoders.image.width)}
    shapes |= {"pooled": (1280, encoders.image.width), "phrase": (384, encoders.image.joint)}
    out: dict = {"sigmoid.bias": np.float32(-2.0)}
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


def sigmoid_loss(
    images: Float[Array, "n j"],
    texts: Float[Array, "n j"],
    match: Float[Array, "n n"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> Float[Array, ""]:
    """SigLIP's loss (Zhai et al. 2023): every pair is a question of its own, so that every caption
    true of an image is a positive. Sum over the pairs, per image."""
    logits = scale * unit(images) @ unit(texts).T + bias
    return optax.sigmoid_binary_cross_entropy(logits, match).sum() / images.shape[0]


def linear(heads: dict, name: str, x: Array) -> Array:
    """One of the linear maps."""
    bias = heads[f"{name}.bias"]
    return x @ heads[f"{name}.weight"].T + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def loss(
    params: dict, encoders: Encoders, weights: Weights, batch: Batch
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Sum and parts; params = {"clip": FlaxCLIPModel's parameters, "heads": linear maps}.

    Where no part needs them, the text encoder and the image encoder's backward pass are left out.
    """
    clip, heads = params["clip"], params["heads"]
    image = clip if weights.image else jax.lax.stop_gradient(clip)
    states = encode_image(image, encoders, batch.pixels.astype(jnp.float32) / 255, batch.keep)
    middle, last = (x[:, 1:] for x in states)

    def near(name, tokens, target):
        return optax.huber_loss(linear(heads, name, tokens), target).mean()

    parts = {}
    if weights.image:
        parts |= {
            "fine": near("fine", middle, batch.fine),
            "coarse": near("coarse", last, batch.coarse),
            "pooled": near("pooled", states[1][:, 0], batch.pooled),
            "similarity": similarity(middle, batch.fine) + similarity(last, batch.coarse),
        }
    if weights.caption or weights.patch_caption or weights.phrase:
        texts = encode_text(clip, encoders, jnp.concatenate([batch.captions, batch.phrases]))
        captions, phrases = jnp.split(texts, [batch.captions.shape[0]])
        scale, bias = (
            jnp.exp(jnp.minimum(clip["logit_scale"], jnp.log(100.0))),
            heads["sigmoid.bias"],
        )
        fixed = jax.lax.stop_gradient(states[1])
        joint = project(clip, encoders, fixed + weights.into_image * (states[1] - fixed))
        own, patches = joint[:, 0], joint[:, 1:].mean(1)
        meaning = unit(linear(heads, "phrase", phrases))
        parts |= {
            "caption": sigmoid_loss(own, captions, batch.match, scale, bias),
            "patch_caption": sigmoid_loss(patches, captions, batch.match, scale, bias),
            "phrase": 1 - (meaning * batch.meaning).sum(-1).mean(),
        }
    total = sum(getattr(weights, name) * value for name, value in parts.items())
    return total, parts


def step(params, moments, lr, batch, *, encoders, weights, optimiser):
    """One update: (params, optimiser state, parts)."""
    gradient_of = jax.value_and_grad(loss, has_aux=True)
    (total, parts), gradient = gradient_of(params, encoders, weights, batch)
    updates, moments = optimiser.update(gradient, moments, params)
    if not weights.image:  # not even by the decay of its weights
        vision = updates["clip"]["vision_model"]
        fixed = jax.tree.map(jnp.zeros_like, vision) | {"post_layernorm": vision["post_layernorm"]}
        updates["clip"]["vision_model"] = fixed
    params = jax.tree.map(lambda w, u: w - lr * u, params, updates)
    return params, moments, parts | {"total": total}


OPTIMISER = "Muon for the matrices of the blocks, AdamW for the rest"
ORTHOGONAL = 40.0  # times the rate: the length of Muon's update, which has the spectral norm 1


def clip_each(gradient: dict, params: dict | None = None) -> dict:
    """The gradient of every encoder and head, on its own of length 1 at most.

    Together the large gradients of the texts would shorten those of the patches from step to step.
    """

    def one(tree):
        return jax.tree.map(lambda g: g / jnp.maximum(1.0, optax.tree.norm(tree)), tree)

    return {side: {name: one(x) for name, x in own.items()} for side, own in gradient.items()}


def make_optimiser() -> optax.GradientTransformation:
    """OPTIMISER without its learning rate (the loop multiplies it in); no decay of vectors.

    docs/embedded_clip.md compares it with AdamW alone.
    """

    def which(path, w):
        return "muon" if w.ndim == 2 and "layers" in jax.tree_util.keystr(path) else "adamw"

    def matrices(tree):
        return jax.tree.map(lambda w: w.ndim > 1, tree)

    def all_matrices(tree):
        return jax.tree.map(lambda w: contrib.MuonDimensionNumbers(), tree)

    muon = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=all_matrices),
        optax.add_decayed_weights(0.05),
        optax.scale(ORTHOGONAL),
    )
    adamw = optax.chain(
        optax.scale_by_adam(b2=0.98), optax.add_decayed_weights(0.05, mask=matrices)
    )
    return optax.chain(
        optax.stateless(clip_each),
        optax.partition(
            {"muon": muon, "adamw": adamw},
            lambda tree: jax.tree_util.tree_map_with_path(which, tree),
        ),
    )
