"""95% intervals of one run's metrics, over the test images it was measured on.

Images are resampled within their class (percentile bootstrap) as rows of weights: metrics follow
from weighted counts by score, so nothing is sorted twice. Rates of images get Wilson's interval,
which stays honest at 0 and 1. Other choices of support images are in significance.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Num, Shaped
from scipy import stats as st

from medclip_jax.evaluation import metrics

ROUNDS = 1000
BLOCK, PART = 50, 500  # rounds and images at a time, so that memory does not grow with both
TAILS = (0.025, 0.975)


class Interval(NamedTuple):
    """95% confidence limits."""

    low: float
    high: float


Intervals = dict[str, Interval]


def image(
    scores: Num[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    seed: int = 0,
    groups: Shaped[np.ndarray, " n"] | None = None,
) -> Intervals:
    """Intervals of the metrics of `metrics.image_level`; {} unless both classes exist.

    Of a class of a single unit nothing can be resampled: only Wilson's intervals are left then.

    groups: unit of each image (near-duplicates, patients): whole units are resampled, and no rate
      gets Wilson's interval.
    """
    truth = np.asarray(labels) == 1
    if truth.all() or not truth.any():
        return {}
    intervals: Intervals = {}
    if varies(truth, groups):
        values = measure_images(resample(truth, ROUNDS, seed, groups), scores, truth)
        values.pop("sensitivity_at_90")
        intervals = _percentiles(values)
    if groups is None:
        called = np.asarray(scores) >= 0.5
        for name, hits in (("recall", called[truth]), ("specificity", ~called[~truth])):
            wilson = st.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
            intervals[name] = Interval(float(wilson.low), float(wilson.high))
    if "recall" in intervals:
        intervals["tpr"] = intervals["recall"]
    if "specificity" in intervals:
        low, high = intervals["specificity"]
        intervals["fpr"] = Interval(1 - high, 1 - low)
    return intervals


def pixel(
    histograms: Sequence | np.ndarray,
    labels: Shaped[np.ndarray, " n"],
    seed: int = 0,
    groups: Shaped[np.ndarray, " n"] | None = None,
) -> Intervals:
    """Intervals of pooled pixel metrics when whole images are resampled.

    histograms: [n 3 b] of PixelMetrics.add, or a sequence whose rows are read when needed. Ranking
    metrics come from its bins: their limits are off by no more than a bin's share. {} where a
    class is a single unit.
    """
    truth = np.asarray(labels) == 1
    if not varies(truth, groups):
        return {}
    weights = resample(truth, ROUNDS, seed, groups)
    return _percentiles(measure_pixels(weights, histograms))


def means(
    values: Mapping[str, Float[np.ndarray, " n"]],
    labels: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"] | None = None,
) -> Intervals:
    """Intervals of means over images; an image with NaN does not count in that mean.

    {} where a class is a single unit.
    """
    truth = np.asarray(labels) == 1
    if not varies(truth, groups):
        return {}
    weights = resample(truth, ROUNDS, 0, groups).astype(float)
    resampled = {}
    for name, each in values.items():
        known = np.isfinite(each)
        with np.errstate(invalid="ignore"):
            resampled[name] = (weights @ np.where(known, each, 0.0)) / (weights @ known)
    return _percentiles(resampled)


def roc_band(
    scores: Num[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    fpr: Float[np.ndarray, " f"],
    seed: int = 0,
    groups: Shaped[np.ndarray, " n"] | None = None,
) -> tuple[Float[np.ndarray, " f"], Float[np.ndarray, " f"]]:
    """Pointwise 95% limits of the TPR at each FPR of the grid. Needs both classes."""
    truth = np.asarray(labels) == 1
    rates = []
    for counts in _counts(resample(truth, ROUNDS, seed, groups), scores, truth):
        curves = np.pad(counts[:, :, ::-1].cumsum(2), ((0, 0), (0, 0), (1, 0)))
        sound = (curve for curve in curves if curve[:, -1].all())  # with images of both classes
        rates += [np.interp(fpr, *(curve / curve[:, -1:])) for curve in sound]
    low, high = np.quantile(rates, TAILS, axis=0)
    return low, high


def varies(truth: Bool[np.ndarray, " n"], groups: Shaped[np.ndarray, " n"] | None = None) -> bool:
    """Whether no class, of those that are there, has its images in a single unit."""
    owner, _ = _units(truth, groups)
    return all(len(np.unique(owner[truth == side])) != 1 for side in (False, True))


def resample(
    truth: Bool[np.ndarray, " n"],
    rounds: int,
    seed: int,
    groups: Shaped[np.ndarray, " n"] | None = None,
) -> Integer[np.ndarray, "r n"]:
    """How often each image is in each resample; class sizes are fixed.

    groups: whole units are resampled, within those with and those without an abnormal image.
    """
    rng = np.random.default_rng(seed)
    owner, abnormal = _units(truth, groups)
    weights = np.zeros((rounds, len(abnormal)), np.uint16)
    for side in (False, True):
        members = np.flatnonzero(abnormal == side)
        if len(members):
            share = np.full(len(members), 1 / len(members))
            for row in weights:
                row[members] = rng.multinomial(len(members), share)
    return weights if groups is None else weights[:, owner]


def _units(truth, groups) -> tuple[Integer[np.ndarray, " n"], Bool[np.ndarray, " u"]]:
    """Which unit each image is of, and whether each unit has an abnormal image."""
    owner = np.arange(len(truth))
    if groups is not None:
        _, owner = np.unique(groups, return_inverse=True)
    abnormal = np.zeros(owner.max() + 1, bool)
    np.logical_or.at(abnormal, owner, truth)
    return owner, abnormal


def measure_images(
    weights: Integer[np.ndarray, "r n"],
    scores: Num[np.ndarray, " n"],
    truth: Bool[np.ndarray, " n"],
) -> dict[str, Float[np.ndarray, " r"]]:
    """Metrics of each resample at the threshold 0.5, and sensitivity at a specificity of 0.9."""
    start = int(np.searchsorted(np.unique(scores), 0.5, side="left"))
    parts = [
        metrics.ranking(counts)
        | metrics.rates(*metrics.confusion_from(counts, start))
        | {"sensitivity_at_90": metrics.sensitivity(counts, 0.9)}
        for counts in _counts(weights, scores, truth)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def measure_pixels(
    weights: Integer[np.ndarray, "r n"], histograms: Sequence | np.ndarray
) -> dict[str, Float[np.ndarray, " r"]]:
    """Pooled pixel metrics of each resample of images; the threshold is 0.5."""
    shape = histograms[0].shape
    total = np.zeros((len(weights), math.prod(shape)))
    for first in range(0, len(histograms), PART):
        part = range(first, min(first + PART, len(histograms)))
        rows = np.stack([histograms[i].ravel() for i in part]).astype(float)
        total += weights[:, first : first + PART].astype(float) @ rows
    counts = total.reshape(len(weights), *shape)
    tp, tn, fp, fn = metrics.confusion_from(counts, shape[-1] // 2)
    rates = metrics.rates(tp, tn, fp, fn) | metrics.overlap(tp, fp, fn)
    return metrics.ranking(counts) | rates


def _counts(weights, scores, truth) -> Iterator[Float[np.ndarray, "r 2 b"]]:
    """Counts by score of BLOCK resamples at a time."""
    for first in range(0, len(weights), BLOCK):
        yield metrics.by_score(scores, truth, weights[first : first + BLOCK])[0]


def _percentiles(values: dict[str, np.ndarray]) -> Intervals:
    """Interval of each metric; one that is undefined in some resample is left out."""
    sound = {name: x for name, x in values.items() if np.isfinite(x).all()}
    return {name: Interval(*np.quantile(x, TAILS).tolist()) for name, x in sound.items()}
