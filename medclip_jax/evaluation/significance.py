"""Is one method better than another? Paired tests over draws, DeLong over images, Holm."""

from typing import NamedTuple

import numpy as np
import scipy.stats as st
from jaxtyping import Float, Num, Shaped

from medclip_jax.errors import DataError

NAN = float("nan")


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
    if sd == 0:
        return PairedT(mean, sd, NAN, NAN, n - 1, mean, mean, NAN)
    test = st.ttest_1samp(difference, 0.0)
    low, high = test.confidence_interval(0.95)
    t, p = float(test.statistic), float(test.pvalue)
    return PairedT(mean, sd, t, p, n - 1, float(low), float(high), mean / sd)


def wilcoxon(a: Num[np.ndarray, " n"], b: Num[np.ndarray, " n"]) -> Wilcoxon:
    """Signed-rank test: exact up to 50 differences (13 with ties), asymptotic beyond.

    `least_p` is 2 / 2^n: 5 draws cannot go below 0.0625. Raises DataError for NaN or no pairs.
    """
    difference = _differences(a, b)
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
    if se < 1e-12:
        z, p = (0.0, 1.0) if abs(a - b) < 1e-12 else (NAN, NAN)
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
