"""The trained prompts and adapters as a detector."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from medclip_jax.clip.outputs import Features
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.models import model


def scorer(design: model.Design, pool: Callable) -> Callable[..., Scores]:
    """The `apply` of a trained model; params {learned, text}: its parameters and text features.

    pool: patch values [n, p] -> image scores [n].
    """

    def apply(params, features, key):
        learned, text = params["learned"], params["text"]
        patch = model.forward(learned, text, features, design, key).logit
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
        pool: patch values [n, p] -> image scores [n].
        tokens: of what calibrates, as many rows per support as the next, in their order.
        folds: numbers of the supports of each fold; none: the first parameters score `tokens`.
        k: number of supports.
    """
    apply = scorer(design, pool)
    text = jax.jit(jax.vmap(partial(model.text_features, design=design), (0, None)))(params, frozen)
    stacked = {"learned": params, "text": text}
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
    own = params["learned"]
    return (own["learned"], own["text"]) if "learned" in own else (own, params["text"])
