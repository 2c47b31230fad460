"""CLIP's own text and image embeddings as a detector; nothing is learned."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from medclip_jax.clip import checkpoint
from medclip_jax.clip.outputs import Features
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.models import model, similarity


def scorer(clip: checkpoint.Clip, label: np.ndarray) -> Callable[..., Scores]:
    """The `apply` of plain prompts; params {text [c, d], scale}. label [c]: 1 is abnormal.

    Patches are the last level's tokens through the encoder's own norm and projection. Scores are
    logits: 0 is where both classes are equally likely.
    """

    def apply(params, features, key):
        words = similarity.Text(params["text"], label), params["scale"]
        variables, last = {"params": clip.vision}, features.levels[-1]
        joint = clip.image_encoder.apply(variables, last, method="project")
        pooled = similarity.plain_logit(features.pooled[:, None], *words)[:, 0]
        return Scores(similarity.plain_logit(joint, *words), pooled)

    return apply


def build(
    clip: checkpoint.Clip, frozen: dict, design: model.Design, tokens: Features | None, k: int
) -> Detector:
    """The detector of the prompts of `design`, which have no context.

    tokens: of what calibrates; None: there is no support (K = 0). k: number of supports.
    """
    apply = scorer(clip, design.prompts.label)
    text = jax.jit(partial(model.text_features, {}, design=design))(frozen)
    params = {"text": text, "scale": jnp.exp(frozen["logit_scale"])}
    calibration = Scores(np.zeros((0, design.grid**2), np.float32), np.zeros(0, np.float32))
    if tokens is not None:
        calibration = jax.device_get(jax.jit(apply)(params, tokens, None))
    return Detector(apply, params, None, calibration, k, False, design.size)
