"""Prompts as a detector: trained ones with their adapters, or plain ones (zero-shot)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medclip_jax.clip import checkpoint
from medclip_jax.clip.layers import Features
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.models import model, similarity


def scorer(design: model.Design, pool: Callable) -> Callable[..., Scores]:
    """The `apply` of a trained model; params {model, text}: its parameters and text features.

    pool: patch values [n, p] -> image scores [n].
    """

    def apply(params, features, key):
        patch = model.forward(params["model"], params["text"], features, design, key).logit
        return Scores(patch, pool(patch))

    return apply


def build(
    params: Any,
    frozen: dict,
    design: model.Design,
    pool: Callable,
    tokens: Features,
    folds: Sequence[np.ndarray],
    k: int,
) -> Detector:
    """The detector of trained parameters.

    Args:
        params: [1 + folds, ...]: of all supports, then of those outside each fold.
        tokens: of what calibrates, as many rows per support as the next, in their order.
        folds: numbers of the supports of each fold; none: the first parameters score `tokens`.
    """
    apply = scorer(design, pool)
    text = jax.jit(jax.vmap(partial(model.text_features, design=design), (0, None)))(params, frozen)
    stacked = {"model": params, "text": text}
    own = jax.tree.map(lambda x: x[0], stacked)
    fold_params = jax.tree.map(lambda x: x[1:], stacked) if len(folds) else None
    if fold_params is None:
        calibration = jax.device_get(jax.jit(apply)(own, tokens, None))
    else:
        every = jax.device_get(jax.jit(jax.vmap(apply, (0, None, None)))(fold_params, tokens, None))
        n = len(tokens.pooled)
        fold_of = np.argmax([np.isin(np.arange(k), fold) for fold in folds], 0)
        rows = fold_of[np.arange(n) * k // n], np.arange(n)
        calibration = Scores(*(x[rows] for x in every))
    return Detector(apply, own, fold_params, calibration, k, design.dropout > 0, design.size)


def learned(params: dict) -> tuple[Any, Any]:
    """Parameters of the model and text features, from the params of a detector that has them.

    Raises KeyError for a detector without a trained branch.
    """
    own = params.get("learned", params)  # a branch of its own, or the whole detector
    own = own.get("whole", own)  # of tiled images
    return own["model"], own["text"]


def zero_shot_scorer(clip: checkpoint.Clip, label: np.ndarray) -> Callable[..., Scores]:
    """The `apply` of plain prompts; params {text [c, d], scale}. label [c]: 1 is abnormal.

    Patches are the CLIP's last tokens through its own norm and projection. Scores are
    logits: 0 is where both classes are equally likely.
    """

    def apply(params, features, key):
        words = similarity.Text(params["text"], label), params["scale"]
        variables, last = {"params": clip.vision}, features.levels[len(clip.widths) - 1]
        joint = clip.image_encoder.apply(variables, last, method="project")
        pooled = similarity.plain_logit(features.pooled[:, None], *words)[:, 0]
        return Scores(similarity.plain_logit(joint, *words), pooled)

    return apply


def zero_shot(
    clip: checkpoint.Clip, frozen: dict, design: model.Design, tokens: Features | None, k: int
) -> Detector:
    """The detector of the prompts of `design`, which have no context.

    tokens: of what calibrates; None: there is no support (K = 0). k: number of supports.
    """
    apply = zero_shot_scorer(clip, design.prompts.label)
    text = jax.jit(partial(model.text_features, {}, design=design))(frozen)
    params = {"text": text, "scale": jnp.exp(frozen["logit_scale"])}
    calibration = jax.device_get(Scores(jnp.zeros((0, design.grid**2)), jnp.zeros(0)))
    if tokens is not None:
        calibration = jax.device_get(jax.jit(apply)(params, tokens, None))
    always = ("image", "map", "fixed")  # nothing depends on the supports
    return Detector(apply, params, None, calibration, k, False, design.size, proven=always)
