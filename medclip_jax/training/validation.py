"""While it trains: do the fold params tell synthetic anomalies from healthy images?

From time to time they score the supports of their fold, which they never see, and a few of their
synthetic anomalies (the paper's Figures 5 to 7). Nothing is chosen by it and no test image is read;
other kinds of anomalies are not seen here, so it does not tell how good the result is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medclip_jax.clip.layers import Features
from medclip_jax.distributed import sharding
from medclip_jax.features import training_pool
from medclip_jax.features.training_pool import TrainingPool
from medclip_jax.models import model, similarity

ALTERED_EACH = 4  # synthetic anomalies of each held-out support
NONE, HEALTHY, ALTERED, SEEN = range(4)  # role of a row
Score = Callable[[Any, Any, Features], Float[Array, " n"]]


def scorer(design: model.Design, top: float) -> Score:
    """(params, frozen, features) -> image scores; top: as in similarity.image_score."""

    def score(params, frozen, features):
        text = model.text_features(params, frozen, design)
        return similarity.image_score(model.forward(params, text, features, design).logit, top)

    return score


def due(step: int, steps: int, times: int, log_every: int) -> bool:
    """Whether to validate after `step`: about `times` times, where the log has a line anyway."""
    if not times:
        return False
    every = log_every * max(1, round(steps / times / log_every))
    return step % every == 0 or step == steps


def validator(
    pool: TrainingPool, folds: Sequence[np.ndarray], score: Score, mesh
) -> Callable[[Any, Any], dict[str, Float[Array, ""]]]:
    """(params [1 + folds, ...], frozen) -> the two numbers.

    pool: of the supports, with variants. folds: of the supports, 2 or more. score: see `scorer`.
    """
    features, role = sharding.replicate(rows(pool, folds), mesh)

    @jax.jit
    def validate(params, frozen, features, role):
        fold_params = jax.tree.map(lambda x: x[1:], params)
        scores = jax.lax.map(lambda own: score(own[0], frozen, own[1]), (fold_params, features))
        return held_out_metrics(scores, role)

    # arguments, not constants: the program holds no image, so that every split shares it
    return lambda params, frozen: validate(params, frozen, features, role)


def rows(pool: TrainingPool, folds: Sequence[np.ndarray]):
    """Features [f, r, ...] and role [f, r] of each fold: images, altered ones, the other folds.

    Folds that are smaller are filled up with rows of no role.
    """
    variants = np.arange(-1, min(ALTERED_EACH, pool.variants))  # -1 is the image itself
    everyone, longest = np.concatenate(folds), max(map(len, folds))
    each = []
    for fold in folds:
        others = np.setdiff1d(everyone, fold)
        others = np.resize(others, len(everyone) - min(map(len, folds)))
        image = np.repeat(np.resize(fold, longest), len(variants))
        variant = np.tile(variants, longest)
        filling = np.repeat(np.arange(longest) >= len(fold), len(variants))
        role = np.where(filling, NONE, np.where(variant < 0, HEALTHY, ALTERED))
        unaltered, seen = np.full(len(others), -1), np.full(len(others), SEEN)
        each.append(([*image, *others], [*variant, *unaltered], [*role, *seen]))
    image, variant, role = (np.array(x) for x in zip(*each, strict=True))
    batch = training_pool.take(pool._replace(teacher=(), source=None), image, variant)
    return batch.features, role


def held_out_metrics(
    scores: Float[Array, "f r"], role: Int[Array, "f r"]
) -> dict[str, Float[Array, ""]]:
    """Two numbers for the log, [0, 1].

    held_out_accuracy   share of right decisions, healthy and altered images weighing the same;
                        anomalous is what scores above every support of the other folds
    held_out_auroc      share of pairs (healthy, altered) of one fold that are in order
    """
    healthy, altered = ((role == x).astype(scores.dtype) for x in (HEALTHY, ALTERED))
    threshold = jnp.where(role == SEEN, scores, -jnp.inf).max(1, keepdims=True)
    specificity = (healthy * (scores <= threshold)).sum() / healthy.sum()
    recall = (altered * (scores > threshold)).sum() / altered.sum()
    pairs = healthy[:, :, None] * altered[:, None]
    above = scores[:, None] - scores[:, :, None]  # altered minus healthy
    order = (above > 0) + 0.5 * (above == 0)
    return {
        "held_out_accuracy": (specificity + recall) / 2,
        "held_out_auroc": (pairs * order).sum() / pairs.sum(),
    }
