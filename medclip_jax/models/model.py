"""What is learned (params) and how it turns cached tokens into anomaly: one forward for all.

params is a plain dict of arrays:
  context   [c, k, d]        learnable context of each prompt (equation 4), or [1, k, d] if shared;
                             absent where k is 0, as no checkpoint holds an empty array
  adapters  ({kernel [v, j], bias [j]}, ...)   one affine map per tapped level into the joint space
  scale     []               log of 1/temperature of the anomaly logit and the alignment
  offset    []               of the distance form (score.patch_logit)
  language  {down, up}       the language adapter (language.init), if it is tuned
  refine    ({kernel, bias, gate}, ...)  a query per tapped level (refine.init), if it is on
  head      {hidden, out}    SimCLR's projection (simclr.init), if it has a weight
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from medclip_jax.clip import vit
from medclip_jax.clip.outputs import Features
from medclip_jax.features.batch import Batch, Views
from medclip_jax.models import (
    anomaly_map,
    contrastive,
    losses,
    prompt_sets,
    similarity,
    token_refinement,
)
from medclip_jax.prompts.prompts import Prompts


class Design(NamedTuple):
    """Everything static about the model; closed over by jit."""

    prompts: Prompts
    text_tower: vit.Tower
    size: int  # pixels per side of the tower frame
    grid: int
    form: str  # score.FORMS
    causal: bool
    learn_scale: bool  # False: temperature 1, as MediCLIP
    dropout: float  # rate, on the adapted tokens
    refinement: token_refinement.Frozen | None = (
        None  # what refinement keeps of the tapped blocks; None: off
    )
    sets: prompt_sets.Sets | None = None  # prompts of all data sets, where training has several


class Output(NamedTuple):
    text: Float[Array, "c j"]  # not normalised
    levels: tuple[Float[Array, "n p j"], ...]  # adapted patch tokens
    logit: Float[Array, "n p"]  # anomaly logit per patch


def init(
    key: jax.Array,
    model: vit.Clip,
    design: Design,
    context: int,
    shared: bool,
    contrast: bool = False,
    language: Mapping | None = None,
) -> dict:
    """Fresh params: context N(0, 0.02^2), adapters U(+-1/sqrt(width)) as peers (PEERS 5.9-5.10).

    Context vectors for which the prompts name a token start from its embedding instead. With
    `contrast` there is a SimCLR head; what else is drawn does not depend on it. `language`: the
    adapter to tune.
    """
    context_key, *adapter_keys = jax.random.split(key, 1 + len(model.vision_tower.levels))
    rows = 1 if shared else len(design.prompts.ids)

    def adapter(key, width):
        kernel_key, bias_key = jax.random.split(key)
        draw = dict(minval=-(width**-0.5), maxval=width**-0.5)
        return {
            "kernel": jax.random.uniform(kernel_key, (width, model.joint), **draw),
            "bias": jax.random.uniform(bias_key, (model.joint,), **draw),
        }

    vectors = 0.02 * jax.random.normal(context_key, (rows, context, model.text_width))
    start = design.prompts.start
    if start is not None and (start >= 0).any():
        named = model.text["token"][jnp.maximum(start, 0)]
        vectors = jnp.where((jnp.asarray(start) >= 0)[None, :, None], named[None], vectors)
    params = {
        **({"context": vectors} if context else {}),
        "adapters": tuple(map(adapter, adapter_keys, model.widths)),
        "scale": jnp.asarray(0.0 if not design.learn_scale else 2.3),  # temperature 1 or 0.1
        "offset": jnp.asarray(0.5),
    }
    if design.refinement is not None:
        params["refine"] = token_refinement.init(design.refinement)
    if language is not None:
        params["language"] = language
    if contrast:
        params["head"] = contrastive.init(jax.random.fold_in(key, contrastive.STREAM), model.joint)
    return params


def text_features(params: Mapping, frozen: Mapping, design: Design) -> Float[Array, "c j"]:
    """Text features of all prompts with the learned context."""
    context = context_of(params, frozen)
    rows = len(design.prompts.ids)
    context = jnp.broadcast_to(context, (rows, *context.shape[1:]))
    return vit.encode_text(
        text_of(params, frozen), context, design.prompts, design.text_tower, design.causal
    )


def text_of(params: Mapping, frozen: Mapping) -> Mapping:
    """Parameters of the text tower, with the language adapter that is tuned if there is one."""
    tuned = {"language": params["language"]} if "language" in params else {}
    return {**frozen["text"], **tuned}


def context_of(params: Mapping, frozen: Mapping) -> Float[Array, "_ k d"]:
    """The learned context; of no vectors where params has none."""
    width = frozen["text"]["token"].shape[1]
    return params["context"] if "context" in params else jnp.zeros((1, 0, width))


def adapt_tokens(
    params: Mapping, features: Features, rate: float, key: jax.Array | None
) -> tuple[Float[Array, "n p j"], ...]:
    """Patch tokens in the joint space; inverted dropout at `rate` if a key is given."""
    adapted = []
    for i, (tokens, p) in enumerate(zip(features.levels, params["adapters"], strict=True)):
        y = tokens.astype(jnp.float32) @ p["kernel"] + p["bias"][None, None]
        if key is not None and rate > 0:
            units = (y.shape[0], 1, y.shape[2])  # one thinned adapter per image, not per patch
            keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, units)
            y = jnp.where(keep, y / (1 - rate), 0.0)
        adapted.append(y)
    return tuple(adapted)


def refined(params: Mapping, features: Features, design: Design) -> Features:
    """Features with the levels refined (equation 6); as they are where refinement is off."""
    if design.refinement is None:
        return features
    levels = token_refinement.refine(
        params["refine"], design.refinement, features.levels, features.inputs
    )
    return features._replace(levels=levels)


def scale_of(params: Mapping, design: Design) -> Float[Array, ""]:
    return jnp.exp(params["scale"]) if design.learn_scale else jnp.asarray(1.0)


def forward(
    params: Mapping,
    text: Float[Array, "c j"],
    features: Features,
    design: Design,
    key: jax.Array | None = None,
) -> Output:
    """Adapted tokens and anomaly logits, given the text features of `text_features`."""
    levels = adapt_tokens(params, refined(params, features, design), design.dropout, key)
    logit = similarity.patch_logit(
        levels,
        text,
        design.prompts.label,
        scale_of(params, design),
        params["offset"],
        design.form,
    )
    return Output(text, levels, logit)


class Compared(NamedTuple):
    """What a batch has in common with the prompts."""

    logit: Float[Array, "n p"]  # anomaly logit per patch
    alike: Float[Array, "n p c"]  # cosine with every prompt, mean over the levels
    pooled: Float[Array, "n 2"]  # cosine of the pooled embedding with the mean prompts
    label: Any  # of the prompts


def compare(params, frozen, batch: Batch, key, design: Design) -> Compared:
    """Rows against the prompts; against those of their own data set where there are several."""
    scale = scale_of(params, design)
    levels = adapt_tokens(params, refined(params, batch.features, design), design.dropout, key)
    pooled = batch.features.pooled
    if design.sets is not None and batch.source is not None:
        static = design.sets, batch.source, design.text_tower, design.causal
        words = prompt_sets.words(context_of(params, frozen), text_of(params, frozen), *static)
        logit = prompt_sets.patch_logit(levels, words, scale, params["offset"], design.form)
        alike = prompt_sets.similarity(levels, words)
        return Compared(logit, alike, prompt_sets.prompt_logits(pooled, words), design.sets.label)
    text = text_features(params, frozen, design)
    label = design.prompts.label
    alike = similarity.level_mean(similarity.cosine(v, text) for v in levels)
    if design.form == "softmax":  # score.patch_logit from cosines that are there already
        pair = alike @ similarity.class_weights(text, label)
        logit = scale * (pair[..., 1] - pair[..., 0])
    else:  # not linear in the levels' cosines
        logit = similarity.patch_logit(levels, text, label, scale, params["offset"], design.form)
    return Compared(
        logit, alike, similarity.cosine(pooled, similarity.class_features(text, label)), label
    )


def contrast(
    params: Mapping, views: Views, valid: Bool[Array, " n"], design: Design
) -> Float[Array, ""]:
    """SimCLR (equation 12) between the two views of each row."""
    one, two, image = views
    both = (adapt_tokens(params, refined(params, view, design), 0.0, None) for view in (one, two))
    first, second = (contrastive.project(params["head"], levels) for levels in both)
    return contrastive.ntxent(first, second, image, valid)


def loss(
    params: Mapping,
    frozen: Mapping[str, Any],
    batch: Batch,
    key: jax.Array | None,
    *,
    design: Design,
    weights: Mapping[str, float],
    distill: losses.Distill | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The training loss: (scalar, named parts). A term of weight 0 is not computed.

    Nor is SimCLR's where rows carry no views: in adaptation, which has no step to draw them by.
    `distill` says how the teacher's logits count, where the rows carry them. Where training has
    several data sets, rows are compared with the prompts of their own.
    """
    scale = scale_of(params, design)
    batch = batch._replace(mask=batch.mask.astype(jnp.float32))
    logit, alike, pooled, label = compare(params, frozen, batch, key, design)
    pixels = anomaly_map.to_pixels(logit, design.size)
    share = losses.patch_share(batch.mask, design.grid)

    def prompt():
        return losses.prompt(jnp.exp(frozen["logit_scale"]) * pooled, batch.label, batch.valid)

    terms = {
        "focal": lambda: losses.focal(pixels, batch.mask, batch.valid),
        "dice": lambda: losses.dice(pixels, batch.mask, batch.valid),
        "align": lambda: losses.align(alike, share, jnp.asarray(label), batch.valid, scale),
        "prompt": prompt,
    }
    if (views := batch.views) is not None:
        terms["simclr"] = lambda: contrast(params, views, batch.valid, design)
    if (teacher := batch.teacher) is not None and (like := distill) is not None:
        terms["distill"] = lambda: losses.distill_patches(logit, teacher, share, batch.valid, like)
    weights = {**weights, "distill": distill.weight if distill else 0.0}
    asked = [name for name in terms if weights.get(name)]
    parts = {name: terms[name]() for name in asked}
    return losses.total(parts, weights)
