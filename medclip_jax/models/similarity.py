"""From tokens and text features to anomaly: one cosine, and the two forms of a patch's logit.

"softmax" (healthy against abnormal prompts, as MediCLIP) and "distance" (equation 9). Text features
are of one set of prompts for all images ([c, j]) or of each image's own ([n, c, j]).
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, reduce
from operator import add
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medclip_jax.clip.text import length
from medclip_jax.prompts.tokenize import Prompts

FORMS = ("softmax", "distance")
NEVER = -1e9  # a similarity that no softmax and no maximum takes; finite, so gradients are too


class Text(NamedTuple):
    """Text features that images are compared with."""

    features: Float[Array, "*n c j"]  # not normalised
    label: Int[np.ndarray, " c"]  # 0 healthy, 1 abnormal
    real: Bool[Array, "*n c"] | None = None  # False: only fills the shape; None: all are real


def unit(x: Float[Array, "*a d"]) -> Float[Array, "*a d"]:
    """Vectors of length 1 over the last axis; a zero vector stays zero."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def cosine(
    v: Float[Array, "*a p d"], t: Float[Array, "*b c d"], keep: Float[Array, " d"] | None = None
) -> Float[Array, "*a p c"]:
    """Equation (7): cosine similarity of every patch with every text feature, in [-1, 1].

    The product is divided by the patches' lengths, not the patches: few numbers, where they have
    many. A zero vector is similar to nothing (0).

    Args:
        v: patches; with one set of features for all, of any leading axes.
        t: features, [c, d] or [n, c, d] with v [n, p, d].
        keep: 1 for the columns of v that dropout keeps, 0 for others. Under vmap over `keep` all
            masks share two matrix products, as the mask goes to the other factor of each.
    """
    t = unit(t)
    if keep is None:
        square = jnp.sum(v * v, axis=-1, keepdims=True)
    else:
        t = t * keep.reshape((1,) * (t.ndim - 1) + (-1,))
        square = jnp.matmul(v * v, keep, precision=jax.lax.Precision.HIGHEST)[..., None]
    precision = None if keep is None else jax.lax.Precision.HIGHEST
    product = jnp.matmul(v, jnp.swapaxes(t, -1, -2), precision=precision)
    return product * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def class_features(text: Text) -> Float[Array, "*n 2 j"]:
    """Mean prompt of the healthy and of the abnormal class; not normalised before the mean."""
    return jnp.einsum("...ck,...cj->...kj", _shares(text), text.features, precision="highest")


def class_weights(text: Text) -> Float[Array, "*n c 2"]:
    """What turns cosines with every prompt into those with `class_features`, which are linear."""
    length = jnp.sqrt(jnp.maximum(jnp.sum(text.features**2, axis=-1), 1e-24))
    whole = jnp.sqrt(jnp.maximum(jnp.sum(class_features(text) ** 2, axis=-1), 1e-24))
    return _shares(text) * length[..., None] / whole[..., None, :]


def _shares(text: Text) -> Float[Array, "*n c 2"]:
    """Share of each prompt in the mean of each class."""
    member = jnp.asarray(np.stack([np.asarray(text.label) == side for side in (0, 1)], axis=1))
    if text.real is not None:
        member = text.real[..., None] & member.reshape((1,) * (text.real.ndim - 1) + member.shape)
    return member / member.sum(-2, keepdims=True)


def mean_cosine(levels: Sequence[Float[Array, "n p j"]], text: Text) -> Float[Array, "n p c"]:
    """Cosine with every prompt, mean over the levels; NEVER for what only fills the shape."""
    return _only_real(level_mean(cosine(v, text.features) for v in levels), text.real)


def _only_real(values: Float[Array, "n p c"], real) -> Float[Array, "n p c"]:
    if real is None:
        return values
    return jnp.where(real[None, None] if real.ndim == 1 else real[:, None], values, NEVER)


class AnomalyLogit(nn.Module):
    """Anomaly logit of each patch, with the learned scale and offset.

    softmax:  scale (cosine to the mean abnormal prompt - cosine to the mean healthy prompt)
    distance: scale (1 - max_j cosine to healthy prompt j - offset), equation (9) with a link so
              that its sigmoid can be trained by focal and dice
    """

    form: str  # softmax | distance
    learn_scale: bool = True  # False: temperature 1, as MediCLIP

    def setup(self):
        start = 2.3 if self.learn_scale else 0.0  # a temperature of 0.1, or 1
        self.scale = self.param("scale", lambda _: jnp.asarray(start))
        self.offset = self.param("offset", lambda _: jnp.asarray(0.5))

    def temperature(self) -> Float[Array, ""]:
        """1/temperature of the logit and of the alignment."""
        return jnp.exp(self.scale) if self.learn_scale else jnp.asarray(1.0)

    def __call__(
        self, levels: Sequence[Float[Array, "n p j"]], text: Text, keeps: Sequence | None = None
    ) -> Float[Array, "n p"]:
        """Mean over the levels; keeps: per level, what dropout keeps (see `cosine`)."""
        keeps = [None] * len(levels) if keeps is None else keeps
        pairs = list(zip(levels, keeps, strict=True))
        if self.form == "softmax":
            classes = class_features(text)
            return self.of_classes(level_mean(cosine(v, classes, keep) for v, keep in pairs))
        healthy = np.flatnonzero(np.asarray(text.label) == 0)
        features = text.features[..., healthy, :]
        real = None if text.real is None else text.real[..., healthy]
        nearest = (_only_real(cosine(v, features, keep), real).max(-1) for v, keep in pairs)
        return self.temperature() * (level_mean(1 - x for x in nearest) - self.offset)

    def from_cosines(
        self, levels: Sequence[Float[Array, "n p j"]], text: Text, cosines: Float[Array, "n p c"]
    ) -> Float[Array, "n p"]:
        """The same from `mean_cosine`, without another product where the form is linear in it."""
        if self.form != "softmax":
            return self(levels, text)
        return self.of_classes(jnp.matmul(cosines, class_weights(text)))

    def of_classes(self, cosines: Float[Array, "n p 2"]) -> Float[Array, "n p"]:
        """The softmax form from the cosines to the two classes' mean prompts."""
        return self.temperature() * (cosines[..., 1] - cosines[..., 0])


def plain_logit(
    tokens: Float[Array, "n p j"], text: Text, scale: Float[Array, ""]
) -> Float[Array, "n p"]:
    """The softmax form of tokens in the joint space, at CLIP's own scale; nothing is learned."""
    params = {"scale": jnp.log(scale), "offset": jnp.zeros(())}
    logit: Any = AnomalyLogit("softmax").apply({"params": params}, (tokens,), text)
    return logit


def level_mean(each: Iterable[Float[Array, "*_"]]) -> Float[Array, "*_"]:
    """Mean over the levels, in their order."""
    values = list(each)
    return reduce(add, values) / len(values)


@cache
def interpolation(patches: int, pixels: int, corners: bool = False) -> np.ndarray:
    """[pixels, patches] bilinear weights: a patch's value lies in the middle of its pixels.

    With `corners` the outermost values lie on the outermost pixels, as MediCLIP up-samples: every
    place is then up to half a patch further out than what the patch shows.
    """
    at = np.arange(pixels) * ((patches - 1) / max(pixels - 1, 1))
    if not corners:
        at = np.clip((np.arange(pixels) + 0.5) * patches / pixels - 0.5, 0, patches - 1)
    low = np.clip(np.floor(at).astype(int), 0, max(patches - 2, 0))
    weights = np.zeros((pixels, patches), np.float64)
    rows = np.arange(pixels)
    weights[rows, low] = 1 - (at - low)
    weights[rows, np.minimum(low + 1, patches - 1)] += at - low
    return weights.astype(np.float32)


def to_pixels(
    patch: Float[Array, "n p"], size: int, corners: bool = False
) -> Float[Array, "n size size"]:
    """A value per patch (row-major square grid) -> a smooth value per pixel of the input."""
    grid = int(round(patch.shape[-1] ** 0.5))
    up = interpolation(grid, size, corners)
    return jnp.einsum("hg,ngk,wk->nhw", up, patch.reshape(-1, grid, grid), up)


def affinity(tokens: Float[Array, "n p d"], width: float) -> Float[Array, "n p p"]:
    """How much each patch takes from every patch of its image; rows sum to 1.

    A softmax of the cosines between the patches' tokens, from which their mean is taken. Its
    temperature is `width` (> 0) standard deviations of the image's cosines: backbones differ.
    """
    rows = unit(tokens.astype(jnp.float32) - tokens.mean(1, keepdims=True, dtype=jnp.float32))
    cosine = jnp.einsum("npd,nqd->npq", rows, rows)
    spread = jnp.maximum(cosine.std((1, 2), keepdims=True), 1e-6)
    return jax.nn.softmax(cosine / (width * spread), -1)


def image_score(values: Float[Array, "n p"], top: float) -> Float[Array, " n"]:
    """Mean of the largest share `top` of an image's values; 0 is the maximum alone, as MediCLIP."""
    count = max(1, round(top * values.shape[-1]))
    return jax.lax.top_k(values, count)[0].mean(-1)


class PromptSets(NamedTuple):
    """Prompts of s data sets in one run, static: every image is compared with those of its own.

    They are laid out the same, healthy ones first, and filled up to the longest; what only fills
    the shape has no weight anywhere. Set 0 is the target. The learned context keeps the target's
    shape: the context vectors of a prompt are those of the target's prompt of the same class and
    place, beginning again where the target has fewer.
    """

    ids: Int[np.ndarray, "s c t"]
    slots: Int[np.ndarray, "s c t"]
    eos: Int[np.ndarray, "s c"]
    row: Int[np.ndarray, "s c"]  # of the learned context
    real: Bool[np.ndarray, "s c"]  # False for what only fills the shape
    label: Int[np.ndarray, " c"]  # 0 healthy, 1 abnormal, of every set


def stack_prompts(prompts: Sequence[Prompts]) -> PromptSets:
    """Prompts of the target, then of the other sets; all have the same positions and context."""
    sides = [[np.flatnonzero(p.label == side) for p in prompts] for side in (0, 1)]
    counts = [max(map(len, side)) for side in sides]
    own: Any = []  # lists of each side, then arrays of both; so are the others
    row: Any = []
    real: Any = []
    for side, count in zip(sides, counts, strict=True):
        place = np.arange(count)
        own.append([of_set[place % len(of_set)] for of_set in side])
        row.append([side[0][place % len(side[0])]] * len(prompts))
        real.append([place < len(of_set) for of_set in side])
    own, row, real = (np.concatenate(x, axis=1) for x in (own, row, real))
    ids, slots, eos = (
        np.stack([getattr(p, name)[rows] for p, rows in zip(prompts, own, strict=True)])
        for name in ("ids", "slots", "eos")
    )
    return PromptSets(ids, slots, eos, row, real, np.repeat([0, 1], counts))


def set_features(
    context: Float[Array, "_ k d"],
    text: Mapping,
    sets: PromptSets,
    source: Int[Array, "*n"],
    encoder: nn.Module,
    causal: bool,
) -> Text:
    """Text features of the sets that `source` names: one for all images ([]) or one each ([n]).

    One set alone goes through the text encoder in the first case, all of them in the second.
    """
    end = length(sets.eos, encoder, causal)
    arrays = sets.row, sets.ids[:, :, :end], sets.slots[:, :, :end], sets.eos
    count, width = sets.row.shape
    if source.ndim == 0:
        row, *words = (jnp.asarray(x)[source] for x in arrays)
    else:
        row, *words = (jnp.asarray(x.reshape(count * width, *x.shape[2:])) for x in arrays)
    context = context[row if context.shape[0] > 1 else jnp.zeros_like(row)]
    features: Any = encoder.apply({"params": text}, context, *words, causal)
    if source.ndim > 0:
        features = features.reshape(count, width, -1)[source]
    return Text(features, sets.label, jnp.asarray(sets.real)[source])
