"""Rows of the training pool as batches: folds of the supports, and what the joint learner reads.

Params are stacked, [1 + folds, ...]: the main params learn from all supports, the fold params 1 + f
from those outside fold f. A row is (image, variant) as training_pool.take counts them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from medclip_jax.features import training_pool
from medclip_jax.features.training_pool import Batch, TrainingPool

CLEAN = 0.25  # probability that a row of the joint learner is a healthy image
VIEWS_STREAM = 53  # keeps the views apart from other random numbers of the same seed

Indices = Int[np.ndarray, " _"]


def folds(k: int, parts: int) -> list[Indices]:
    """k supports in up to `parts` disjoint folds of nearly equal size; none if k is 1."""
    parts = min(parts, k)
    return [] if parts < 2 else [np.arange(k)[i::parts] for i in range(parts)]


def supports(k: int, folds: Sequence[Indices]) -> list[Indices]:
    """The supports that each params of the stack learns from."""
    return [np.arange(k), *(np.setdiff1d(np.arange(k), fold) for fold in folds)]


def members(
    k: int, folds: Sequence[Indices], auxiliary: Sequence[int], on_target: bool = True
) -> list[list[Indices]]:
    """The images of the pool that each params may learn from, per dataset: [1 + folds][dataset].

    Args:
      k: supports, which the pool holds first.
      folds: of them.
      auxiliary: number of images of each auxiliary dataset, which follow in the pool.
      on_target: False to leave out the supports.
    """
    ends = k + np.cumsum([0, *auxiliary])
    others = [np.arange(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return [[own, *others] if on_target else others for own in supports(k, folds)]


def joint_batch(
    step: int,
    pool: TrainingPool,
    members: Sequence[Indices],
    size: int,
    seed: int,
    rows: Indices | None = None,
    views: bool = False,
) -> Batch:
    """The rows of one step of the joint learner: a function of the arguments alone.

    Every params walks through its own images in random order, epoch after epoch; in an epoch an
    image is itself with probability 1/4, else its next anomalous variant.

    Args:
      step: from 0.
      pool: to read, as a batch on the host with leaves [row, 1 + folds, ...].
      members: images of each params.
      size: rows per step.
      seed: of the run.
      rows: which of them are read (this process's share), None for all.
      views: add two augmented views of every row's image, for SimCLR.
    """
    each = [joint_rows(step, own, size, seed, pool.variants, pool.copies) for own in members]
    image, variant = (np.stack(x, axis=1) for x in zip(*each, strict=True))
    pair = sample_views(seed, step, image.shape, pool.copies) if views else ()
    image, variant, *own = (x if rows is None else x[rows] for x in (image, variant, *pair))
    return training_pool.take(pool, image, variant, own)


def joint_rows(step: int, own: Indices, size: int, seed: int, variants: int, copies: int = 0):
    """(image, variant) of each row; healthy rows take the image and its copies in turn."""
    image, variant = [], []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(own))
        rng = np.random.default_rng([seed, epoch])
        image.append(own[rng.permutation(len(own))[place]])
        clean = rng.random(len(own))[place] < CLEAN or not variants
        variant.append(-1 - epoch % (1 + copies) if clean else epoch % variants)
    return np.array(image), np.array(variant)


def sample_views(seed: int, step: int, shape: tuple[int, ...], copies: int) -> tuple:
    """Two different views of each row's image, as variants: -1 the image, -2 its copy 0, ..."""
    if copies < 1:
        raise ValueError("two views of an image need at least one augmented copy")
    rng = np.random.default_rng([seed, step, VIEWS_STREAM])
    first = rng.integers(1 + copies, size=shape)
    second = (first + 1 + rng.integers(copies, size=shape)) % (1 + copies)
    return -1 - first, -1 - second
