"""What the small CLIP learns: teacher patches, token similarity, agreement of two views, texts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8
from optax import contrib

from .encoders import Encoders, encode_image, encode_text, project, unit


class Batch(NamedTuple):
    """One step's data. Teacher features are standardised per channel, for the kept patches.

    The last `Weights.pairs` images are the first once more, each of their kept patches showing the
    same place, so that the two views can be compared (`agreement`).
    """

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
    agreement: float = 0.1
    caption: float = 0.1
    patch_caption: float = 0.05
    phrase: float = 0.5
    into_image: float = 0.0  # share of the captions' gradient that reaches the image encoder

    def pairs(self, images: int) -> int:
        """How many of the images of a batch are a second view of another."""
        return int(images * PAIRS) if self.agreement else 0

    @property
    def image(self) -> float:
        """Of all that teaches the image encoder; 0: it stays as it is, and texts alone learn."""
        own = self.fine + self.coarse + self.pooled + self.similarity + self.agreement
        return own + self.into_image


SIMILARITY_TOKENS = 12  # patches of each image that enter the similarity loss
PAIRS = 0.25  # share of the images that are a second view of another
PROTOTYPES, PROTOTYPE_WIDTH = 256, 128
STUDENT, TARGET = 0.1, 0.05  # temperatures of the agreement
EMA = 0.002  # of the weights, a step


def init_heads(encoders: Encoders, seed: int) -> dict[str, np.ndarray]:
    """Linear maps from our tokens to the teachers' features; training only, never exported."""
    rng = np.random.default_rng([seed, 5])
    shapes = {"fine": (40, encoders.image.width), "coarse": (112, encoders.image.width)}
    shapes |= {"pooled": (1280, encoders.image.width), "phrase": (384, encoders.image.joint)}
    shapes |= {"agreement": (PROTOTYPE_WIDTH, encoders.image.width)}
    prototypes = rng.normal(size=(PROTOTYPES, PROTOTYPE_WIDTH)).astype(np.float32)
    out = {"prototypes": prototypes, "sigmoid.bias": np.float32(-2.0)}
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


def sinkhorn(logits: Float[Array, "n p"], rounds: int = 3) -> Float[Array, "n p"]:
    """Assignments near exp(logits): each row sums to 1, each column to about n / p."""
    q = jnp.exp(logits - logits.max())
    for _ in range(rounds):
        q = q / q.sum(0, keepdims=True) / q.shape[1]
        q = q / q.sum(1, keepdims=True) / q.shape[0]
    return q * q.shape[0]


def agreement(
    one: Float[Array, "n c"], other: Float[Array, "n c"], prototypes: Float[Array, "p c"]
) -> Float[Array, ""]:
    """Cross-entropy of each view's patches against the other's balanced assignments.

    Row i of both is the same place of the same image seen twice. The assignment to prototypes is
    balanced by `sinkhorn` and passes no gradient (Caron et al. 2020; per patch as in iBOT and
    DINOv2): equal places agree, and not by all of them becoming alike.
    """
    one, other = (unit(x) @ unit(prototypes).T for x in (one, other))

    def part(z, target):
        target = jax.lax.stop_gradient(sinkhorn(target / TARGET))
        return optax.softmax_cross_entropy(z / STUDENT, target).mean()

    return (part(one, other) + part(other, one)) / 2


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

    Parts of weight 0 are left out, and the text encoder where no part needs it.
    """
    clip, heads = params["clip"], params["heads"]
    states = encode_image(clip, encoders, batch.pixels.astype(jnp.float32) / 255, batch.keep)
    middle, last = (x[:, 1:] for x in states)

    def near(name, tokens, target):
        return optax.huber_loss(linear(heads, name, tokens), target).mean()

    parts = {
        "fine": near("fine", middle, batch.fine),
        "coarse": near("coarse", last, batch.coarse),
        "pooled": near("pooled", states[1][:, 0], batch.pooled),
        "similarity": similarity(middle, batch.fine) + similarity(last, batch.coarse),
    }
    if pairs := weights.pairs(last.shape[0]):
        seen = linear(heads, "agreement", last).reshape(*last.shape[:2], -1)
        one, other = (x.reshape(-1, x.shape[-1]) for x in (seen[:pairs], seen[-pairs:]))
        parts["agreement"] = agreement(one, other, heads["prototypes"])
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


def step(params, moments, average, lr, number, batch, *, encoders, weights, optimiser):
    """One update: (params, optimiser state, running average of the CLIP parameters, parts)."""
    gradient_of = jax.value_and_grad(loss, has_aux=True)
    (total, parts), gradient = gradient_of(params, encoders, weights, batch)
    updates, moments = optimiser.update(gradient, moments, params)
    if not weights.image:  # not even by the decay of its weights
        vision = updates["clip"]["vision_model"]
        fixed = jax.tree.map(jnp.zeros_like, vision) | {"post_layernorm": vision["post_layernorm"]}
        updates["clip"]["vision_model"] = fixed
    params = jax.tree.map(lambda w, u: w - lr * u, params, updates)
    toward = jnp.maximum(EMA, 10 / (10.0 + number))  # early weights are soon forgotten
    average = jax.tree.map(lambda a, w: a + toward * (w - a), average, params["clip"])
    return params, moments, average, parts | {"total": total}


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
