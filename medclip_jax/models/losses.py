"""The terms of the training loss, each by its own name, and their weighted total.

Logits are of the anomalous class. `valid` weighs rows, so padded rows never count.
"""

from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from medclip_jax.models import similarity

TERMS = ("focal", "dice", "align", "prompt")


class Distill(NamedTuple):
    """How a teacher's logits count (equation 13): config.distill without the teacher."""

    weight: float = 1.0  # of the whole term
    alpha: float = 0.5  # share of the labels' cross-entropy; the rest is the teacher's
    temperature: float = 1.0
    squared: bool = False  # times temperature^2, as Hinton et al. 2015


def row_mean(x: Float[Array, " n"], valid: Bool[Array, " n"]) -> Float[Array, ""]:
    """Mean over the valid rows; 0 if there is none."""
    return jnp.where(valid, x, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def focal(
    logit: Float[Array, "n h w"],
    mask: Float[Array, "n h w"],
    valid: Bool[Array, " n"],
    gamma: float = 2.0,
) -> Float[Array, ""]:
    """MediCLIP's focal loss (Zhang et al. 2024), mean over pixels.

    Unlike optax's, the label is the mask cut to an integer and kept within [1e-5, 1 - 1e-5].
    """
    p = jax.nn.sigmoid(logit)
    q = jnp.clip(jnp.trunc(mask), 1e-5, 1 - 1e-5)
    p_t = q * p + (1 - q) * (1 - p) + 1e-5
    per_row = (-((1 - p_t) ** gamma) * jnp.log(p_t)).mean((1, 2))
    return row_mean(per_row, valid)


def dice(
    logit: Float[Array, "n h w"], mask: Float[Array, "n h w"], valid: Bool[Array, " n"]
) -> Float[Array, ""]:
    """1 - (2 |p g| + 1) / (|p| + |g| + 1) per image, mean over images, as MediCLIP."""
    # optax halves both sums, so its smooth of 0.5 is the peers' 1
    return row_mean(optax.losses.dice_loss(logit[..., None], mask[..., None], smooth=0.5), valid)


def infonce(logits: Float[Array, "n c"], positives: Bool[Array, "n c"]) -> Float[Array, " n"]:
    """-log(sum of positives' exp / sum of all exp), per row."""
    own = jnp.where(positives, logits, -jnp.inf)
    return jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(own, axis=-1)


def align(
    cosines: Float[Array, "n p c"],
    share: Float[Array, "n p"],
    label: Int[Array, " c"],
    valid: Bool[Array, " n"],
    scale: Float[Array, ""],
) -> Float[Array, ""]:
    """Equation (8): each patch towards its best prompt of the right class, against all prompts.

    `share` is the masked share of each patch: 0 is healthy, over one half is anomalous, and the
    patches between are neither and do not count. `scale` is 1/temperature.
    """
    anomalous = (share > 0.5)[..., None]
    right = anomalous == (label == 1)[None, None]
    best = jnp.argmax(jnp.where(right, cosines, -jnp.inf), axis=-1)
    positive = jax.nn.one_hot(best, cosines.shape[-1], dtype=bool)
    n, p, c = cosines.shape
    per_patch = infonce((scale * cosines).reshape(n * p, c), positive.reshape(n * p, c))
    counts = (share == 0) | (share > 0.5)
    per_row = jnp.where(counts, per_patch.reshape(n, p), 0.0).sum(1) / jnp.maximum(counts.sum(1), 1)
    return row_mean(per_row, valid)


def prompt(
    logits: Float[Array, "n 2"], label: Int[Array, " n"], valid: Bool[Array, " n"]
) -> Float[Array, ""]:
    """Equation (5): -log P(healthy | image) of the pooled embedding; healthy images only."""
    return row_mean(-jax.nn.log_softmax(logits, axis=-1)[:, 0], valid & (label == 0))


def ntxent(
    one: Float[Array, "n m"],
    two: Float[Array, "n m"],
    image: Int[Array, " n"],
    valid: Bool[Array, " n"],
    temperature: float = 0.5,
) -> Float[Array, ""]:
    """SimCLR (equation 12): NT-Xent, mean over the anchors of the valid rows; 0 if there is none.

    Row i of `one` and of `two` are augmentations of image number image[i]. An anchor's positive is
    its partner, its negatives are the rows of other images. Equal to optax.losses.ntxent where all
    images differ and all rows are valid; optax cannot leave rows out, and its gradient is NaN where
    an anchor has no negative (K = 1). The temperature is Chen et al.'s (2020) for small batches.
    """
    n = len(one)
    both = jnp.concatenate([one, two])
    image, valid = jnp.concatenate([image] * 2), jnp.concatenate([valid] * 2)
    partner = jnp.asarray(np.roll(np.eye(2 * n, dtype=bool), n, axis=1))
    negative = (image[:, None] != image[None]) & valid[None]
    logits = similarity.cosine(both, both) / temperature
    each = infonce(jnp.where(partner | negative, logits, -jnp.inf), partner)
    return row_mean(each, valid)


def distill(
    student: Float[Array, "n c"],
    teacher: Float[Array, "n c"],
    label: Int[Array, " n"],
    rule: Distill,
) -> Float[Array, " n"]:
    """Equation (13) per row: alpha CE(label, student) + (1 - alpha) KL(teacher || student).

    KL of the softmax at the temperature; `rule.squared` multiplies it by temperature^2.
    """
    ce = optax.losses.softmax_cross_entropy_with_integer_labels(student, label)
    own, target = (jax.nn.log_softmax(z / rule.temperature) for z in (student, teacher))
    kl = optax.losses.kl_divergence_with_log_targets(own, jax.lax.stop_gradient(target))
    strength = rule.temperature**2 if rule.squared else 1.0
    return rule.alpha * ce + (1 - rule.alpha) * strength * kl


def distill_patches(
    student: Float[Array, "n p"],
    teacher: Float[Array, "n p"],
    share: Float[Array, "n p"],
    valid: Bool[Array, " n"],
    rule: Distill,
) -> Float[Array, ""]:
    """Equation (13) on anomaly logits, mean over patches and valid rows.

    A patch is labelled anomalous if more than half of it is masked.
    """
    own, target = (
        jnp.stack([jnp.zeros_like(z), z], axis=-1).reshape(-1, 2) for z in (student, teacher)
    )
    each = distill(own, target, (share > 0.5).astype(jnp.int32).reshape(-1), rule)
    return row_mean(each.reshape(share.shape).mean(1), valid)


def patch_share(mask: Float[Array, "n h w"], grid: int) -> Float[Array, "n p"]:
    """Masked share of each patch of a grid x grid tiling, row-major."""
    n, h, w = mask.shape
    return mask.reshape(n, grid, h // grid, grid, w // grid).mean((2, 4)).reshape(n, grid * grid)


def total(
    parts: Mapping[str, Float[Array, ""]], weights: Mapping[str, float]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted sum of the parts and the parts themselves with it under "loss"."""
    loss = reduce(add, (weights[name] * value for name, value in parts.items()), jnp.zeros(()))
    return loss, {"loss": loss, **parts}
