"""Two-level bootstrap of all metrics of a table: draws of the support images x test images.

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
from jaxtyping import Float, Int, Num, Shaped
from scipy import stats as st

from medclip_jax.errors import DataError
from medclip_jax.evaluation import bootstrap

Indices = Sequence[Int[np.ndarray, " _"]]
TAILS = np.array(bootstrap.TAILS)


class Estimate(NamedTuple):
    """A mean over draws with its standard error, 95% confidence limits and test."""

    value: float
    se: float
    low: float
    high: float
    p: float  # two-sided, of a mean of 0: Student's t of value / se, with Satterthwaite's df


def image(
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
      The metrics of bootstrap.measure_images and false_alarm_rate; {} unless both classes exist.
    """
    truth = np.asarray(labels) == 1
    if truth.all() or not truth.any():
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


def pixel(
    histograms: Sequence[Float[np.ndarray, "_ 3 b"]],
    labels: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"] | None = None,
    seed: int = 0,
    indices: Indices | None = None,
) -> dict[str, Estimate]:
    """Means over draws of pixel metrics; histograms of each draw as in bootstrap.pixel.

    The rest as in `image`.
    """
    weights = _weights(np.asarray(labels) == 1, groups, seed)
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
        df = _satterthwaite(se, own)
        wider = st.t.ppf(TAILS[1], df) / st.norm.ppf(TAILS[1])
        scale = wider * se / spread if spread else 1.0
        low, high = own.mean() + scale * (np.quantile(means, TAILS) - own.mean())
        p = 2 * st.t.sf(abs(own.mean()) / se, df) if se else float(own.mean() == 0)
        estimates[name] = Estimate(*map(float, (own.mean(), se, low, high, p)))
    return estimates


def _satterthwaite(se: float, values: Float[np.ndarray, " d"]) -> float:
    """Degrees of freedom of `se`, of whose parts few draws estimate only that between them."""
    d = len(values)
    between = float(values.var(ddof=1)) / d if d > 1 else 0.0
    return (d - 1) * (se**2 / between) ** 2 if between else np.inf
