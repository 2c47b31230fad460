"""Comparisons and intervals: paired tests, DeLong, two-level bootstrap, Holm."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.stats as st
from jaxtyping import Float, Int, Num, Shaped

from medclip_jax.errors import DataError

NAN = float("nan")
EXACT_UP_TO = 100  # pairs for which all sign flips are counted
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


class PairedT(NamedTuple):
    """Paired t test of a - b, two-sided."""

    mean: float
    sd: float  # ddof 1
    t: float
    p: float
    df: int
    low: float
    high: float
    dz: float  # Cohen's d of the differences


class Wilcoxon(NamedTuple):
    """Signed-rank test of a - b, two-sided; zero differences are dropped."""

    statistic: float  # smaller of the two rank sums
    p: float
    n: int  # non-zero differences
    least_p: float  # smallest p that n differences can reach
    method: str  # "exact" or "asymptotic"


class Interval(NamedTuple):
    """An estimate with its standard error and confidence limits."""

    value: float
    se: float
    low: float
    high: float


class DeLong(NamedTuple):
    """Two correlated AUROCs, two-sided test of their difference."""

    auroc_a: float
    auroc_b: float
    difference: float  # a - b
    se: float
    z: float
    p: float
    low: float
    high: float


def paired_t(a: Num[np.ndarray, " n"], b: Num[np.ndarray, " n"], level: float = 0.95) -> PairedT:
    """Paired t test with the interval mean +- t sd / sqrt(n).

    t, p and dz are NaN when all differences are equal. Raises DataError for n < 2, NaN or inf.
    """
    difference = _differences(a, b)
    n = len(difference)
    if n < 2:
        raise DataError(f"A paired t test needs at least 2 pairs, not {n}; add draws.")
    mean, sd = float(difference.mean()), float(difference.std(ddof=1))
    half = float(st.t.ppf((1 + level) / 2, n - 1)) * sd / n**0.5
    if sd == 0:
        return PairedT(mean, sd, NAN, NAN, n - 1, mean, mean, NAN)
    test = st.ttest_1samp(difference, 0.0)
    t, p = float(test.statistic), float(test.pvalue)
    return PairedT(mean, sd, t, p, n - 1, mean - half, mean + half, mean / sd)


def wilcoxon(a: Num[np.ndarray, " n"], b: Num[np.ndarray, " n"]) -> Wilcoxon:
    """Signed-rank test; exact over all sign flips (ties get mid-ranks) up to 100 pairs.

    `least_p` is 2 / 2^n: 5 draws cannot go below 0.0625. Raises DataError for NaN or no pairs.
    """
    difference = _differences(a, b)
    difference = difference[difference != 0]
    n = len(difference)
    if n == 0:
        return Wilcoxon(0.0, 1.0, 0, 1.0, "exact")
    ranks = st.rankdata(np.abs(difference))
    positive = float(ranks[difference > 0].sum())
    smaller = min(positive, float(ranks.sum()) - positive)
    least = min(1.0, 2.0 ** (1 - n))
    if n <= EXACT_UP_TO:
        return Wilcoxon(smaller, _sign_flip_p(ranks, smaller), n, least, "exact")
    p = float(st.wilcoxon(difference, method="asymptotic", correction=False).pvalue)
    return Wilcoxon(smaller, p, n, least, "asymptotic")


def auroc(
    scores: Num[np.ndarray, "*d n"], labels: Shaped[np.ndarray, " n"]
) -> Float[np.ndarray, "*d"]:
    """AUROC along the last axis: P(positive > negative) + P(equal) / 2. DataError for one class."""
    positive = labels == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if m == 0 or n == 0:
        raise DataError("AUROC needs healthy and abnormal images; all labels are equal.")
    ranks = st.rankdata(scores, axis=-1)
    return (ranks[..., positive].sum(-1) - m * (m + 1) / 2) / (m * n)


def auroc_interval(
    scores: Num[np.ndarray, " n"], labels: Shaped[np.ndarray, " n"], level: float = 0.95
) -> Interval:
    """AUROC with DeLong's standard error and limits on the logit scale, so within [0, 1].

    The limits are NaN where the variance is 0 (perfect separation): no interval can be estimated
    there. Raises DataError unless each class has at least 2 images.
    """
    values, covariance = _delong_covariance(np.asarray(scores)[None], labels)
    value, se = float(values[0]), float(covariance[0, 0]) ** 0.5
    if se == 0 or not 0 < value < 1:
        return Interval(value, se, NAN, NAN)
    logit = np.log(value / (1 - value))
    half = st.norm.ppf((1 + level) / 2) * se / (value * (1 - value))
    low, high = (1 / (1 + np.exp(-(logit + sign * half))) for sign in (-1, 1))
    return Interval(value, se, float(low), float(high))


def delong(
    scores_a: Num[np.ndarray, " n"],
    scores_b: Num[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    level: float = 0.95,
) -> DeLong:
    """Test of two AUROCs on the same images (DeLong, DeLong and Clarke-Pearson 1988).

    Equal rankings give p = 1; z and p are NaN where the variance is 0 but the AUROCs differ.
    Raises DataError unless each class has at least 2 images.
    """
    both = np.stack([np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)])
    values, covariance = _delong_covariance(both, labels)
    a, b = float(values[0]), float(values[1])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    se = float(max(variance, 0.0)) ** 0.5
    # Rounding leaves 1e-17 where the two rankings are equal; that is no evidence.
    if se < 1e-12:
        z, p = (0.0, 1.0) if abs(a - b) < 1e-12 else (NAN, NAN)
    else:
        z = (a - b) / se
        p = float(2 * st.norm.sf(abs(z)))
    half = float(st.norm.ppf((1 + level) / 2)) * se
    return DeLong(a, b, a - b, se, z, p, a - b - half, a - b + half)


def bootstrap_interval(
    scores: Num[np.ndarray, "d n"],
    labels: Shaped[np.ndarray, " n"],
    rng: np.random.Generator,
    statistic: Statistic = auroc,
    baseline: Num[np.ndarray, "d n"] | None = None,
    groups: Shaped[np.ndarray, " n"] | None = None,
    rounds: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Two-level bootstrap of the mean of `statistic` over draws x images.

    scores: one row per draw on the same test images. statistic: (scores [d n'], labels [n']) to
    one value per row. baseline: scores of another method on the same draws; the interval is then
    of the mean difference. groups: patient of each image; whole patients are drawn. Images are
    drawn within each class (patients: by their largest label), draws freely.

    A percentile interval of few draws is too narrow. Its width is corrected as in Hesterberg
    (The American Statistician 69, 2015, "expanded percentile"): the draws' variance with d - 1,
    and Student's t with Satterthwaite's degrees of freedom. One draw: images only.
    """
    values = _draw_values(scores, labels, statistic, baseline)
    d, mean = len(values), float(values.mean())
    strata = _strata(np.asarray(labels), groups)
    means = np.empty(rounds)
    for index in range(rounds):
        chosen = _resample(strata, rng)
        other = None if baseline is None else baseline[:, chosen]
        drawn = _draw_values(scores[:, chosen], labels[chosen], statistic, other)
        means[index] = drawn[rng.integers(0, d, d)].mean()
    se, stretch = few_draws(float(means.std(ddof=1)), values, level)
    tails = (1 - level) / 2, (1 + level) / 2
    low, high = mean + stretch * (np.quantile(means, tails) - mean)
    return Interval(mean, se, float(low), float(high))


def holm(p: Num[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Holm's step-down adjusted p-values, in the order given. Raises DataError outside [0, 1]."""
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


def _sign_flip_p(ranks: Float[np.ndarray, " n"], smaller: float) -> float:
    """Two-sided p of the rank sum when every sign is a fair coin (mid-ranks doubled to whole)."""
    whole = np.rint(2 * ranks).astype(int)
    chances = np.zeros(whole.sum() + 1)
    chances[0] = 1.0
    for rank in whole:
        shifted = np.concatenate([np.zeros(rank), chances[: len(chances) - rank]])
        chances = (chances + shifted) / 2
    return float(min(1.0, 2 * chances[: round(2 * smaller) + 1].sum()))


def _delong_covariance(
    scores: Num[np.ndarray, "d n"], labels: Shaped[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """AUROCs and their covariance by mid-ranks (Sun and Xu, IEEE SPL 2014)."""
    scores, positive = np.asarray(scores, np.float64), np.asarray(labels) == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if m < 2 or n < 2 or not np.isfinite(scores).all():
        raise DataError(
            f"DeLong needs finite scores of at least 2 images per class; there are {n} and {m}."
        )
    above, below = scores[:, positive], scores[:, ~positive]
    ranks = st.rankdata(np.concatenate([above, below], 1), axis=1)
    of_positive = (ranks[:, :m] - st.rankdata(above, axis=1)) / n
    of_negative = 1 - (ranks[:, m:] - st.rankdata(below, axis=1)) / m
    covariance = np.cov(of_positive).reshape(len(scores), -1) / m
    return of_positive.mean(1), covariance + np.cov(of_negative).reshape(len(scores), -1) / n


def _draw_values(
    scores: np.ndarray, labels: np.ndarray, statistic: Statistic, baseline: np.ndarray | None
) -> Float[np.ndarray, " d"]:
    values = statistic(scores, labels)
    return values if baseline is None else values - statistic(baseline, labels)


def _strata(labels: np.ndarray, groups: np.ndarray | None) -> list[list[Int[np.ndarray, " _"]]]:
    """Units to draw (image indices of each unit), listed by class."""
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    _, owner = np.unique(groups, return_inverse=True)
    order = np.argsort(owner, kind="stable")
    units = np.split(order, np.cumsum(np.bincount(owner))[:-1])
    kinds = [labels[unit].max() for unit in units]
    return [[u for u, kind in zip(units, kinds, strict=True) if kind == k] for k in set(kinds)]


def _resample(strata: list[list[np.ndarray]], rng: np.random.Generator) -> Int[np.ndarray, " _"]:
    chosen = [[units[i] for i in rng.integers(0, len(units), len(units))] for units in strata]
    return np.concatenate([index for units in chosen for index in units])


def few_draws(se: float, values: Float[np.ndarray, " d"], level: float) -> tuple[float, float]:
    """Standard error with the draws' full variance, and the factor that widens the percentiles.

    Drawing d of d rows shows only (d - 1) / d of the variance s^2 / d of their mean.
    """
    d = len(values)
    if d == 1 or se == 0:
        return se, 1.0
    of_draws = float(values.var(ddof=1)) / d
    full = (se**2 + of_draws / d) ** 0.5
    return full, widening(full, values, level) * full / se


def widening(se: float, values: Float[np.ndarray, " d"], level: float) -> float:
    """Student's t over the normal quantile, with Satterthwaite's degrees of freedom.

    se: of the mean of `values`, of which the draws are the part that few draws estimate.
    """
    d = len(values)
    of_draws = float(values.var(ddof=1)) / d if d > 1 else 0.0
    df = (d - 1) * (se**2 / of_draws) ** 2 if of_draws else np.inf
    return float(st.t.ppf((1 + level) / 2, df) / st.norm.ppf((1 + level) / 2))
