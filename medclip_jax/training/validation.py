"""While it trains: do the held-out copies tell synthetic anomalies from healthy images?

Copy 1 + f of params never sees the supports of fold f. From time to time it scores them and a few of
their synthetic anomalies, and the log gets two numbers (the paper's Figures 5 to 7):

    held_out_accuracy   share of right decisions, healthy and altered images weighing alike, [0, 1];
                        anomalous is what scores above every healthy support of the other folds
    held_out_auroc      share of pairs (healthy, altered) of one copy that are in order, [0, 1]

Nothing is chosen by them and no test image is read. Other kinds of anomalies are not seen here, so
they say how training goes, not how good the result is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medclip_jax.distributed import sharding
from medclip_jax.features import training_pool
from medclip_jax.models import anomaly_map, model

ALTERED = 4  # synthetic anomalies of each held-out support
NONE, HEALTHY, ALTERED_COPY, SEEN = range(4)  # role of a row
Judge = Callable[[Any, Any], dict[str, Float[Array, ""]]]


def due(step: int, steps: int, times: int, log_every: int) -> bool:
    """Whether to validate after `step`: about `times` times, where the log has a line anyway."""
    if not times:
        return False
    every = log_every * max(1, round(steps / times / log_every))
    return step % every == 0 or step == steps


def judge(
    pool: training_pool.Pool,
    groups: Sequence[np.ndarray],
    design: model.Design,
    top: float,
    mesh,
) -> Judge | None:
    """(params [1 + folds, ...], frozen) -> the two numbers; None where nothing is held out.

    pool: the supports, then whatever else is trained on. top: as of score.image_score.
    """
    if not len(groups) or not pool.variants:
        return None
    tokens, role = sharding.replicate(rows(pool, groups), mesh)

    @jax.jit
    def measured(params, frozen, tokens, role):
        def one(copy):
            params, batch = copy
            text = model.text_features(params, frozen, design)
            return anomaly_map.image_score(model.forward(params, text, batch, design).logit, top)

        held_out = jax.tree.map(lambda x: x[1:], params)
        return numbers(jax.lax.map(one, (held_out, tokens)), role)

    # arguments, not constants: the program holds no image, so that every draw shares it
    return lambda params, frozen: measured(params, frozen, tokens, role)


def rows(pool: training_pool.Pool, groups: Sequence[np.ndarray]):
    """Tokens [f, r, ...] and role [f, r] of each fold: images, altered copies, the other folds.

    Folds that are smaller are filled up with rows of no role.
    """
    variants = np.arange(-1, min(ALTERED, pool.variants))  # -1 is the image itself
    everyone = np.concatenate(groups)
    longest = max(map(len, groups))
    dealt: list[tuple[list, list, list]] = []
    for group in groups:
        seen = np.resize(np.setdiff1d(everyone, group), len(everyone) - min(map(len, groups)))
        support = [*np.repeat(np.resize(group, longest), len(variants)), *seen]
        variant = [*np.tile(variants, longest), *np.full(len(seen), -1)]
        told = np.repeat(np.where(np.arange(longest) < len(group), HEALTHY, NONE), len(variants))
        told = np.where((told == HEALTHY) & (np.tile(variants, longest) >= 0), ALTERED_COPY, told)
        dealt.append((support, variant, [*told, *np.full(len(seen), SEEN)]))
    image, altered, role = (np.array(x) for x in zip(*dealt, strict=True))
    batch = training_pool.take(
        pool._replace(teacher=(), source=None), image.ravel(), altered.ravel()
    )
    tokens = jax.tree.map(lambda x: x.reshape(*image.shape, *x.shape[1:]), batch.features)
    return tokens, role


def numbers(scores: Float[Array, "f r"], role: Int[Array, "f r"]) -> dict[str, Float[Array, ""]]:
    """The two numbers of image scores; each copy has its own scale, so pairs are of one copy."""
    healthy, altered = ((role == x).astype(scores.dtype) for x in (HEALTHY, ALTERED_COPY))
    limit = jnp.where(role == SEEN, scores, -jnp.inf).max(1, keepdims=True)
    passed = (healthy * (scores <= limit)).sum() / healthy.sum()
    found = (altered * (scores > limit)).sum() / altered.sum()
    pairs = healthy[:, :, None] * altered[:, None]
    above = scores[:, None] - scores[:, :, None]  # altered minus healthy
    order = (above > 0) + 0.5 * (above == 0)
    return {
        "held_out_accuracy": (passed + found) / 2,
        "held_out_auroc": (pairs * order).sum() / pairs.sum(),
    }
