"""Prompts of several data sets in one run: every image is compared with those of its own set.

The sets' prompts are laid out alike, healthy ones first, and filled up to the longest; what only
fills the shape weighs nothing anywhere. Set 0 is the target. Theta keeps the target's shape: the
context vectors of a prompt are those of the target's prompt of the same class and place, beginning
again where the target has fewer.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medclip_jax.clip import vit
from medclip_jax.models import similarity as models_similarity
from medclip_jax.prompts.prompts import Prompts

NEVER = -1e9  # a similarity that no softmax and no maximum feels; finite, so gradients are too


class Sets(NamedTuple):
    """Prompts of s data sets, static."""

    ids: Int[np.ndarray, "s c t"]
    slots: Int[np.ndarray, "s c t"]
    eos: Int[np.ndarray, "s c"]
    row: Int[np.ndarray, "s c"]  # of params's context
    real: Bool[np.ndarray, "s c"]  # False for what only fills the shape
    label: Int[np.ndarray, " c"]  # 0 healthy, 1 abnormal, of every set


class Words(NamedTuple):
    """Text features that images are compared with: of one set, or of each image's own."""

    text: Float[Array, "*n c j"]  # not normalised
    real: Bool[Array, "*n c"]
    label: Int[np.ndarray, " c"]


def stack(prompts: Sequence[Prompts]) -> Sets:
    """Prompts of the target, then of the other sets; all have the same positions and context."""
    sides = [[np.flatnonzero(p.label == side) for p in prompts] for side in (0, 1)]
    most = [max(map(len, own)) for own in sides]

    def lay(taken) -> np.ndarray:
        """[s, c], `taken(set, side, places)` of each side beside one another."""
        columns = [
            np.stack([taken(i, side, np.arange(n)) for i in range(len(prompts))])
            for side, n in enumerate(most)
        ]
        return np.concatenate(columns, axis=1)

    def again(own: np.ndarray, places: np.ndarray) -> np.ndarray:
        return own[places % len(own)]

    prompt = lay(lambda i, side, places: again(sides[side][i], places))
    ids, slots, eos = (
        np.stack([getattr(p, name)[own] for p, own in zip(prompts, prompt, strict=True)])
        for name in ("ids", "slots", "eos")
    )
    return Sets(
        *(ids, slots, eos),
        row=lay(lambda i, side, places: again(sides[side][0], places)),
        real=lay(lambda i, side, places: places < len(sides[side][i])),
        label=np.repeat([0, 1], most),
    )


def words(
    context: Float[Array, "_ k d"],
    text: Mapping,
    sets: Sets,
    source: Int[Array, "*n"],
    tower: vit.Tower,
    causal: bool,
) -> Words:
    """Text features of the sets that `source` names: one for all images ([]) or one each ([n]).

    One set alone goes through the text tower in the first case, all of them in the second.
    """
    length = int(sets.eos.max()) + 1 if causal else sets.ids.shape[2]
    ids, slots = sets.ids[:, :, :length], sets.slots[:, :, :length]
    count, most = sets.row.shape

    def encode(rows, ids, slots, eos):
        own = context[rows if context.shape[0] > 1 else jnp.zeros_like(rows)]
        return vit.encode_ids(text, own, ids, slots, eos, tower, causal)

    each = [jnp.asarray(x) for x in (sets.row, ids, slots, sets.eos)]
    if source.ndim == 0:
        features = encode(*(x[source] for x in each))
    else:
        every = encode(*(x.reshape(count * most, *x.shape[2:]) for x in each))
        features = every.reshape(count, most, -1)[source]
    return Words(features, jnp.asarray(sets.real)[source], sets.label)


def cosine(v: Float[Array, "n p j"], text: Float[Array, "*n c j"]) -> Float[Array, "n p c"]:
    """Equation (7) of each image with the text features that are its own."""
    return (
        models_similarity.cosine(v, text)
        if text.ndim == 2
        else jax.vmap(models_similarity.cosine)(v, text)
    )


def class_features(words: Words) -> Float[Array, "*n 2 j"]:
    """score.class_features of the real prompts."""

    def mean(side: int):
        own = words.real & (words.label == side).reshape((1,) * (words.real.ndim - 1) + (-1,))
        total = jnp.where(own[..., None], words.text, 0.0).sum(-2)
        return total / own.sum(-1, keepdims=True)

    return jnp.stack([mean(0), mean(1)], axis=-2)


def similarity(levels: tuple[Float[Array, "n p j"], ...], words: Words) -> Float[Array, "n p c"]:
    """Mean over the levels of `cosine`; NEVER for what only fills the shape."""
    alike = models_similarity.level_mean(cosine(v, words.text) for v in levels)
    return _only(alike, words.real, NEVER)


def patch_logit(
    levels: tuple[Float[Array, "n p j"], ...],
    words: Words,
    scale: Float[Array, ""],
    offset: Float[Array, ""],
    form: str,
) -> Float[Array, "n p"]:
    """score.patch_logit of each image with the prompts that are its own."""
    if form == "softmax":
        pair = class_features(words)
        alike = models_similarity.level_mean(cosine(v, pair) for v in levels)
        return scale * (alike[..., 1] - alike[..., 0])
    if form == "distance":
        healthy = np.flatnonzero(words.label == 0)
        text, real = words.text[..., healthy, :], words.real[..., healthy]
        nearest = [_only(cosine(v, text), real, NEVER).max(-1) for v in levels]
        return scale * (sum(1 - x for x in nearest) / len(nearest) - offset)
    raise ValueError(f"form {form!r} is not one of {models_similarity.FORMS}")


def prompt_logits(pooled: Float[Array, "n j"], words: Words) -> Float[Array, "n 2"]:
    """Cosine of each image's pooled embedding with the two classes of its own set."""
    return cosine(pooled[:, None], class_features(words))[:, 0]


def _only(
    values: Float[Array, "n p c"], real: Bool[Array, "*n c"], otherwise: float
) -> Float[Array, "n p c"]:
    return jnp.where(real[None, None] if real.ndim == 1 else real[:, None], values, otherwise)
