"""From similarities to anomaly: logits per patch, maps per pixel, one score per image.

One `cosine` serves training and scoring. A patch's anomaly is a logit; its probability is the
sigmoid. Both of the paper's forms fit: "softmax" (healthy against abnormal prompts, as peers) and
"distance" (equation 9). Imports no sibling but structs.
"""

from collections.abc import Iterable
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

FORMS = ("softmax", "distance")


def unit(x: Float[Array, "*a d"]) -> Float[Array, "*a d"]:
    """Vectors of length 1 over the last axis; a zero vector stays zero."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def cosine(v: Float[Array, "*a p d"], t: Float[Array, "c d"]) -> Float[Array, "*a p c"]:
    """Equation (7): cosine similarity of every patch with every text feature, in [-1, 1].

    The product is divided by the patches' lengths, not the patches: few numbers, where they have
    many. A zero vector is similar to nothing (0).
    """
    square = jnp.sum(v * v, axis=-1, keepdims=True)
    return (v @ unit(t).T) * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def class_features(text: Float[Array, "c d"], label: np.ndarray) -> Float[Array, "2 d"]:
    """Mean prompt of the healthy and of the abnormal class; not normalised before the mean."""
    label = np.asarray(label)
    return jnp.stack([text[np.flatnonzero(label == side)].mean(0) for side in (0, 1)])


def class_weights(text: Float[Array, "c d"], label: np.ndarray) -> Float[Array, "c 2"]:
    """What turns cosines with every prompt into those with `class_features`, which are linear."""
    member = np.stack([np.asarray(label) == side for side in (0, 1)], axis=1)
    share = jnp.asarray(member / member.sum(0), text.dtype)
    length = jnp.sqrt(jnp.maximum(jnp.sum(text * text, axis=-1), 1e-24))
    whole = jnp.sqrt(jnp.maximum(jnp.sum(class_features(text, label) ** 2, axis=-1), 1e-24))
    return share * length[:, None] / whole[None]


def patch_logit(
    levels: tuple[Float[Array, "n p d"], ...],
    text: Float[Array, "c d"],
    label: Int[np.ndarray, " c"],
    scale: Float[Array, ""],
    offset: Float[Array, ""],
    form: str,
) -> Float[Array, "n p"]:
    """Anomaly logit of each patch, mean over the levels.

    softmax:  scale (sim to the mean abnormal prompt - sim to the mean healthy prompt)
    distance: scale (1 - max_j sim to healthy prompt j - offset), equation (9) with a link so that
              its sigmoid can be trained by focal and dice
    """
    if form == "softmax":
        pair = class_features(text, label)
        similarity = level_mean(cosine(v, pair) for v in levels)
        return scale * (similarity[..., 1] - similarity[..., 0])
    if form == "distance":
        healthy = text[np.flatnonzero(np.asarray(label) == 0)]
        away = level_mean(1 - cosine(v, healthy).max(-1) for v in levels)
        return scale * (away - offset)
    raise ValueError(f"form {form!r} is not one of {FORMS}")


def level_mean(each: Iterable[Float[Array, "*_"]]) -> Float[Array, "*_"]:
    """Mean of what every level says, in order of the levels."""
    values = list(each)
    return reduce(add, values) / len(values)
