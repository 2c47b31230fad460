"""Is one method better than another? Paired tests, DeLong, Holm, and a two-level bootstrap.

The bootstrap of a table has draws of the support images and test images as its levels.
A round resamples the test images (whole units: near-duplicates and images of one patient) within
their class, the same for all draws, and then the draws. Where the pool of healthy images changes
with the draw, each draw is tested on images of its own, most of them shared: then the images of all
draws together are resampled, and each draw counts its own. What images add to one draw alone shows
between the draws already; only what they move in all draws together counts beside that (see
`standard_error`).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats as st
from jaxtyping import Float, Int, Num, Shaped

from medclip_jax.errors import DataError
from medclip_jax.evaluation import bootstrap

NAN = float("nan")
ROUNDING = 1e-12  # a spread of metrics that is no larger is that of equal values
Indices = Sequence[Int[np.ndarray, " _"]]
TAILS = np.array(bootstrap.TAILS)


class PairedT(NamedTuple):
    """Paired t test of a - b, two-sided."""

    mean: float
    sd: float  # ddof 1
    t: float
    p: float
    df: int
    low: float  # 95% confidence limits of the mean
    high: float
    dz: float  # Cohen's d of the differences


class Wilcoxon(NamedTuple):
    """Signed-rank test of a - b, two-sided; zero differences are left out."""

    statistic: float  # smaller of the two rank sums
    p: float
    n: int  # non-zero differences
    least_p: float  # smallest p that n differences can reach


class DeLong(NamedTuple):
    """Two correlated AUROCs, two-sided test of their difference."""

    auroc_a: float
    auroc_b: float
    difference: float  # a - b
    se: float
    z: float
    p: float
    low: float  # 95% confidence limits of the difference
    high: float


def paired_t(a: Num[np.ndarray, " n"], b: Num[np.ndarray, " n"]) -> PairedT:
    """Paired t test with its 95% interval.

    t, p and dz are NaN when all differences are equal. Raises DataError for n < 2, NaN or inf.
    """
    difference = _differences(a, b)
    n = len(difference)
    if n < 2:
        raise DataError(f"A paired t test needs at least 2 pairs, not {n}; add draws.")
    mean, sd = float(difference.mean()), float(difference.std(ddof=1))
    if sd <= ROUNDING:
        return PairedT(mean, sd, NAN, NAN, n - 1, mean, mean, NAN)
    test = st.ttest_1samp(difference, 0.0)
    low, high = test.confidence_interval(0.95)
    t, p = float(test.statistic), float(test.pvalue)
    return PairedT(mean, sd, t, p, n - 1, float(low), float(high), mean / sd)


def wilcoxon(a: Num[np.ndarray, " n"], b: Num[np.ndarray, " n"]) -> Wilcoxon:
    """Signed-rank test: exact up to 50 differences (13 with ties), asymptotic beyond.

    `least_p` is 2 / 2^n: 5 draws cannot go below 0.0625. Raises DataError for NaN or no pairs.
    """
    difference = _differences(a, b).round(12)  # what rounding alone tells apart is equal
    difference = difference[difference != 0]
    if not (n := len(difference)):
        return Wilcoxon(0.0, 1.0, 0, 1.0)
    test = st.wilcoxon(difference)
    return Wilcoxon(float(test.statistic), float(test.pvalue), n, min(1.0, 2.0 ** (1 - n)))


def delong(
    scores_a: Num[np.ndarray, " n"],
    scores_b: Num[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
) -> DeLong:
    """Test of two AUROCs on the same images (DeLong, DeLong and Clarke-Pearson 1988).

    By mid-ranks (Sun and Xu, IEEE Signal Processing Letters, 2014). Equal rankings give p = 1; z
    and p are NaN where the variance is 0 but the AUROCs differ.

    Args:
      scores_a, scores_b: of two methods on the same images, finite, larger = more anomalous.
      labels: 0 or 1.

    Raises:
      DataError: fewer than 2 images in a class, or scores that are not finite.
    """
    scores = np.stack([np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)])
    positive = np.asarray(labels) == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if m < 2 or n < 2 or not np.isfinite(scores).all():
        raise DataError(
            f"DeLong's test needs finite scores of at least 2 images per class; there are {n} "
            f"healthy and {m} abnormal images."
        )
    above, below = scores[:, positive], scores[:, ~positive]
    ranks = st.rankdata(np.concatenate([above, below], 1), axis=1)
    of_positive = (ranks[:, :m] - st.rankdata(above, axis=1)) / n  # share of negatives below each
    of_negative = 1 - (ranks[:, m:] - st.rankdata(below, axis=1)) / m
    a, b = of_positive.mean(1).tolist()
    variance = sum(
        float(np.diff(x, axis=0).var(ddof=1)) / x.shape[1] for x in (of_positive, of_negative)
    )
    se = variance**0.5
    # Rounding leaves 1e-17 where the two rankings are equal; that is no evidence.
    if se < ROUNDING:
        z, p = (0.0, 1.0) if abs(a - b) < ROUNDING else (NAN, NAN)
    else:
        z = (a - b) / se
        p = float(2 * st.norm.sf(abs(z)))
    half = float(st.norm.ppf(0.975)) * se
    return DeLong(a, b, a - b, se, z, p, a - b - half, a - b + half)


def holm(p: Num[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Holm's step-down adjusted p-values, in the order of p. Raises DataError outside [0, 1]."""
    p = np.asarray(p, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError(f"P-values {p} are not all in [0, 1]; leave undefined tests out.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def _differences(a: np.ndarray, b: np.ndarray) -> Float[np.ndarray, " n"]:
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    if len(difference) == 0 or not np.isfinite(difference).all():
        raise DataError("Paired values must be finite and at least one; check the runs compared.")
    return difference


class Estimate(NamedTuple):
    """A mean over draws with its standard error, 95% confidence limits and test."""

    value: float
    se: float
    low: float
    high: float
    p: float  # two-sided, of a mean of 0: Student's t of value / se, with Satterthwaite's df


def image_estimates(
    scores: Sequence[Num[np.ndarray, " _"]],
    labels: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"] | None = None,
    seed: int = 0,
    indices: Indices | None = None,
    baselines: Sequence[Num[np.ndarray, " _"]] | None = None,
) -> dict[str, Estimate]:
    """Means over draws of image metrics.

    Args:
      scores: of each draw, [0, 1]; 0.5 is the threshold.
      labels: of all images, 0 or 1.
      groups: unit of each image (near-duplicates, patients), or None.
      seed: of the resampling.
      indices: which of all images each draw was tested on; None: every draw on all, in order.
      baselines: scores of another method on the same images; the estimates are then of the mean
        differences to it.

    Returns:
      The metrics of bootstrap.measure_images and false_alarm_rate; {} unless both classes exist
      and have more than one unit each, without which no image can be resampled.
    """
    truth = np.asarray(labels) == 1
    if truth.all() or not truth.any() or not bootstrap.varies(truth, groups):
        return {}
    weights = _weights(truth, groups, seed)
    rows = indices or [np.arange(len(truth))] * len(scores)

    def draws(of: Sequence) -> Iterator[dict[str, np.ndarray]]:
        for own, row in zip(of, rows, strict=True):
            values = bootstrap.measure_images(weights[:, row], own, truth[row])
            yield values | {"false_alarm_rate": 1 - values["specificity"]}

    if baselines is None:
        return _over_draws([*draws(scores)], seed)
    pairs = zip(draws(scores), draws(baselines), strict=True)
    return _over_draws([{name: a[name] - b[name] for name in a} for a, b in pairs], seed)


def pixel_estimates(
    histograms: Sequence[Float[np.ndarray, "_ 3 b"]],
    labels: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"] | None = None,
    seed: int = 0,
    indices: Indices | None = None,
) -> dict[str, Estimate]:
    """Means over draws of pixel metrics; histograms of each draw as in bootstrap.pixel.

    The rest as in `image_estimates`.
    """
    truth = np.asarray(labels) == 1
    if not bootstrap.varies(truth, groups):
        return {}
    weights = _weights(truth, groups, seed)
    rows = indices or [np.arange(len(labels))] * len(histograms)
    draws = zip(histograms, rows, strict=True)
    return _over_draws([bootstrap.measure_pixels(weights[:, row], own) for own, row in draws], seed)


def union(
    ids: Sequence[Shaped[np.ndarray, " _"]], *columns: Sequence[Shaped[np.ndarray, " _"]]
) -> tuple[Indices, tuple[Shaped[np.ndarray, " n"], ...]]:
    """Indices of each draw's images among all of them, and each column of all of them.

    ids, and every column: an array per draw. Raises DataError if the draws give an image different
    values.
    """
    flat = np.concatenate(ids)
    _, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # in order of appearance
    rank = np.argsort(order)[inverse]
    indices = np.split(rank, np.cumsum([len(own) for own in ids])[:-1])
    merged = []
    for column in columns:
        values = np.concatenate(column)
        unique = values[first[order]]
        if differing := flat[unique[rank] != values].tolist():
            raise DataError(
                f"{differing[0]} differs between draws: they were run on different data. "
                "Run all draws of a table on the same data set."
            )
        merged.append(unique)
    return indices, tuple(merged)


def standard_error(values: Float[np.ndarray, "d r"]) -> float:
    """Of the mean over draws.

    values: of each draw as it is (first column), then with its images resampled. Two crossed random
    effects (Brennan, Generalizability Theory, 2001): the variance between draws over d, which holds
    what draws and their own images add, and the covariance that shared images give two draws.
    One draw: that of its images.
    """
    d, rounds = len(values), values[:, 1:]
    if d == 1:
        return float(rounds.std(ddof=1))
    covariance = np.cov(rounds)
    shared = (covariance.sum() - np.trace(covariance)) / (d * (d - 1))
    return float(values[:, 0].var(ddof=1) / d + max(shared, 0.0)) ** 0.5


def _weights(truth, groups, seed: int) -> np.ndarray:
    """All images once, then ROUNDS resamples of them."""
    rows = bootstrap.resample(truth, bootstrap.ROUNDS, seed, groups)
    return np.concatenate([np.ones((1, len(truth)), rows.dtype), rows])


def _over_draws(each: Sequence[dict[str, np.ndarray]], seed: int) -> dict[str, Estimate]:
    """Values [1 + rounds] of each draw by name -> estimate of the mean over draws.

    A percentile interval of few draws is too narrow: its width is scaled to the standard error and
    to Student's t (Hesterberg, The American Statistician 69, 2015, "expanded percentile").
    """
    rounds = bootstrap.ROUNDS
    resampled = np.random.default_rng([seed, len(each)]).integers(0, len(each), (rounds, len(each)))
    estimates = {}
    for name in each[0]:
        values = np.stack([one[name] for one in each])
        if not np.isfinite(values).all():
            continue  # undefined in some round
        means = values[resampled.T, 1 + np.arange(rounds)].mean(0)
        own, se, spread = values[:, 0], standard_error(values), float(means.std(ddof=1))
        # Satterthwaite's: few draws estimate only the part of `se` that is between them
        between = float(own.var(ddof=1)) / len(own) if len(own) > 1 else 0.0
        df = (len(own) - 1) * (se**2 / between) ** 2 if between else np.inf
        wider = st.t.ppf(TAILS[1], df) / st.norm.ppf(TAILS[1])
        scale = wider * se / spread if spread else 1.0
        low, high = own.mean() + scale * (np.quantile(means, TAILS) - own.mean())
        p = float(abs(own.mean()) <= ROUNDING)
        if se > ROUNDING:
            p = 2 * st.t.sf(abs(own.mean()) / se, df)
        estimates[name] = Estimate(*map(float, (own.mean(), se, low, high, p)))
    return estimates
