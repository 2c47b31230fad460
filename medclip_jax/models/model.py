"""What is learned (params) and how it turns cached tokens into anomaly: one forward for all.

params are the variables of Flax modules, one pytree:
  context   [c, k, d]        PromptLearner, or [1, k, d] if shared; absent where k is 0, as no
                             checkpoint holds an empty array
  adapters  ({kernel [d, j], bias [j]}, ...)   a VisualAdapter per tapped level
  scale, offset  []          AnomalyLogit: log of 1/temperature, and the distance form's offset
  language  {down, up}       TextAdapter, if it is tuned
  refine    ({kernel, bias, gate}, ...)  a TokenRefiner per tapped level, if refinement is on
  head      {hidden, out}    ProjectionHead of SimCLR, if it has a weight

frozen is the rest: `text` (Clip.text), `logit_scale` and, where it is not tuned, `language`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from medclip_jax.clip.checkpoint import Clip
from medclip_jax.clip.layers import Features
from medclip_jax.clip.text import encode_text
from medclip_jax.features.training_pool import Batch, Views
from medclip_jax.models import losses, modules, similarity, text_adapter
from medclip_jax.models.similarity import AnomalyLogit, Text
from medclip_jax.prompts.tokenize import Prompts

HEAD_STREAM = 53  # keeps the head's random numbers apart from others of the same seed


class Design(NamedTuple):
    """Everything static about the model; closed over by jit."""

    prompts: Prompts
    text_encoder: nn.Module
    size: int  # pixels per side of the encoder's input
    grid: int  # patches per side
    form: str  # of the anomaly logit: similarity.FORMS
    causal: bool  # CLIP's mask of the text; False as MediCLIP
    learn_scale: bool  # False: temperature 1, as MediCLIP
    dropout: float  # rate, on the adapted tokens
    refinement: modules.FrozenBlocks | None = None  # of the tapped blocks; None: off
    sets: similarity.PromptSets | None = None  # of all data sets, where there are several
    corners: bool = False  # of similarity.interpolation


class Output(NamedTuple):
    levels: tuple[Float[Array, "n p j"], ...]  # adapted patch tokens
    logit: Float[Array, "n p"]  # anomaly logit per patch


def init(
    key: jax.Array,
    model: Clip,
    design: Design,
    context: int,
    shared: bool,
    contrast: bool = False,
    language: Mapping | None = None,
) -> dict:
    """Fresh params; a part's first values do not depend on which other parts there are.

    Args:
        context: learnable vectors per prompt; shared: one context for all prompts.
        contrast: whether there is a SimCLR head.
        language: the adapter to tune, if one is.
    """
    context_key, *adapter_keys = jax.random.split(key, 1 + len(model.widths))
    rows, start = 1 if shared else len(design.prompts.ids), design.prompts.start
    params: dict[str, Any] = {}
    if context and model.text:
        tokens = token_table(model.text)
        params |= modules.init_context(context_key, rows, context, tokens, start)
    params["adapters"] = tuple(
        modules.init_adapter(k, width, model.joint)
        for k, width in zip(adapter_keys, model.widths, strict=True)
    )
    text = Text(jnp.zeros((2, model.joint)), np.arange(2))
    logit = AnomalyLogit(design.form, design.learn_scale)
    params |= logit.init(key, (jnp.zeros((1, 1, model.joint)),), text)["params"]
    if design.refinement is not None:
        params["refine"] = modules.init_refiners(key, design.refinement)
    if language is not None:
        params["language"] = language
    if contrast:
        params["head"] = modules.init_head(jax.random.fold_in(key, HEAD_STREAM), model.joint)
    return params


def token_table(text: Mapping) -> Float[Array, "v d"]:
    """Token embeddings of a text encoder's parameters."""
    return text["text_model"]["embeddings"]["token_embedding"]["embedding"]


def text_features(params: Mapping, frozen: Mapping, design: Design) -> Float[Array, "c j"]:
    """Text features of all prompts with the learned context and the language adapter, if any."""
    context = context_of(params, frozen, len(design.prompts.ids))
    text = encode_text(frozen["text"], context, design.prompts, design.text_encoder, design.causal)
    return adapt_text(params, frozen, text)


def context_of(params: Mapping, frozen: Mapping, prompts: int) -> Float[Array, "c k d"]:
    """The context of so many prompts; of no vectors where params has none."""
    if "context" not in params:
        return jnp.zeros((prompts, 0, token_table(frozen["text"]).shape[1]))
    learner: Any = modules.PromptLearner(*params["context"].shape)
    return learner.apply({"params": {"context": params["context"]}}, prompts)


def adapt_text(
    params: Mapping, frozen: Mapping, text: Float[Array, "*n c j"]
) -> Float[Array, "*n c j"]:
    """Text features through the tuned or the frozen language adapter; as they are without one."""
    adapter = params.get("language", frozen.get("language"))
    return text if adapter is None else text_adapter.adapt(adapter, text)


def adapt_tokens(
    params: Mapping, features: Features, design: Design, key: jax.Array | None = None
) -> tuple[Float[Array, "n p j"], ...]:
    """Patch tokens, refined where that is on (equation 6), in the joint space.

    With a key every image sees adapters that dropout has thinned, each image its own.
    """
    levels = features.levels[: len(params["adapters"])]  # then the memory's
    if design.refinement is not None:
        levels = modules.refine(params["refine"], design.refinement, levels, features.inputs)
    adapted: list[Any] = [
        modules.VisualAdapter(p["bias"].shape[0], rate=design.dropout).apply(
            {"params": p}, tokens, None if key is None else jax.random.fold_in(key, i)
        )
        for i, (tokens, p) in enumerate(zip(levels, params["adapters"], strict=True))
    ]
    return tuple(adapted)


def forward(
    params: Mapping,
    text: Float[Array, "c j"],
    features: Features,
    design: Design,
    key: jax.Array | None = None,
) -> Output:
    """Adapted tokens and anomaly logits, given the text features of `text_features`.

    A key stands for one model thinned by dropout, the same for every image, so what an image's
    neighbours in the batch are does not change its result (the levels stay whole). MC-dropout
    (equation 10) is vmap over keys: what they share is then computed once.
    """
    levels = adapt_tokens(params, features, design)
    keeps = None
    if key is not None and design.dropout > 0:
        keeps = [
            modules.dropout_mask(jax.random.fold_in(key, i), design.dropout, y.shape[-1:]).astype(
                y.dtype
            )
            for i, y in enumerate(levels)
        ]
    module, variables = link(params, design)
    return Output(levels, module.apply(variables, levels, Text(text, design.prompts.label), keeps))


def link(params: Mapping, design: Design) -> tuple[Any, dict]:
    """The AnomalyLogit and its variables."""
    variables = {"params": {name: params[name] for name in ("scale", "offset")}}
    return AnomalyLogit(design.form, design.learn_scale), variables


def batch_text(params: Mapping, frozen: Mapping, batch: Batch, design: Design) -> Text:
    """What the rows are compared with: prompts of their own data set where there are several."""
    if design.sets is None or batch.source is None:
        return Text(text_features(params, frozen, design), design.prompts.label)
    rows = params["context"].shape[0] if "context" in params else 1
    context, encoding = context_of(params, frozen, rows), (design.text_encoder, design.causal)
    text = similarity.set_features(context, frozen["text"], design.sets, batch.source, *encoding)
    return text._replace(features=adapt_text(params, frozen, text.features))


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

    Args:
        batch: tokens, masks [n, h, w] and labels of n rows. Without views (in adaptation) SimCLR
            does not count, without teacher logits distillation does not.
        key: of dropout; None for none.
        weights: of the terms, by name.
        distill: how the teacher's logits count.
    """
    batch = batch._replace(mask=batch.mask.astype(jnp.float32))
    levels = adapt_tokens(params, batch.features, design, key)
    text = batch_text(params, frozen, batch, design)
    cosines = similarity.mean_cosine(levels, text)
    module, variables = link(params, design)
    logit = module.apply(variables, levels, text, cosines, method="from_cosines")
    scale = module.apply(variables, method="temperature")
    pixels = similarity.to_pixels(logit, design.size, design.corners)
    share = losses.patch_share(batch.mask, design.grid)

    def prompt():
        pooled = batch.features.pooled[:, None].astype(jnp.float32)
        classes = similarity.cosine(pooled, similarity.class_features(text))[:, 0]
        return losses.prompt(jnp.exp(frozen["logit_scale"]) * classes, batch.label, batch.valid)

    terms = {
        "focal": lambda: losses.focal(pixels, batch.mask, batch.valid),
        "dice": lambda: losses.dice(pixels, batch.mask, batch.valid),
        "align": lambda: losses.align(cosines, share, jnp.asarray(text.label), batch.valid, scale),
        "prompt": prompt,
    }
    if (views := batch.views) is not None:
        terms["simclr"] = lambda: simclr(params, views, batch.valid, design=design)
    if (teacher := batch.teacher) is not None and (rule := distill) is not None:
        terms["distill"] = lambda: losses.distill_patches(logit, teacher, share, batch.valid, rule)
    weights = {**weights, "distill": distill.weight if distill else 0.0}
    parts = {name: term() for name, term in terms.items() if weights.get(name)}
    return losses.total(parts, weights)


def simclr(
    params: Mapping, views: Views, valid: Bool[Array, " n"], *, design: Design
) -> Float[Array, ""]:
    """Equation (12) of two augmentations of each of n images, 2 n of which are compared."""
    head: Any = partial(modules.ProjectionHead().apply, {"params": params["head"]})
    one, two = (head(adapt_tokens(params, x, design)) for x in views[:2])
    return losses.ntxent(one, two, views.image, valid)
