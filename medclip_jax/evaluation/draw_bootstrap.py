"""Two-level bootstrap of all metrics of a table: draws of the supports x test images.

As stats.bootstrap_interval, for every metric at once: a round draws images (whole patients where
they are known) within their class, the same for all draws, and then draws with replacement. Every
metric comes from counts by level (see `intervals`), so no score is sorted twice.

Where the pool of healthy images is drawn anew, each draw is tested on images of its own, most of
them shared. Then the images of all draws together are resampled, and each draw counts its own.
What images add to one draw alone shows between the draws already: only what they move in all draws
together counts beside that (see `standard_error`).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Num, Shaped

from medclip_jax.errors import DataError
from medclip_jax.evaluation import bootstrap
from medclip_jax.evaluation.significance import Interval, widening

Places = Sequence[Int[np.ndarray, " _"]]
ROUNDS = 1000
LEVEL = 0.95


def image(
    scores: Sequence[Num[np.ndarray, " _"]],
    labels: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"] | None = None,
    seed: int = 0,
    places: Places | None = None,
    baselines: Sequence[Num[np.ndarray, " _"]] | None = None,
) -> dict[str, Interval]:
    """Of the means over draws of image metrics; {} unless both classes exist.

    baselines: scores of another method on the same images; the intervals are then of the mean
    differences to it.

    scores: of each draw, 0.5 is the threshold. labels, groups: of all images. places: which of
    them each draw was tested on; None: all draws on all, in this order. Beside those of
    intervals.measures: sensitivity_at_90 (specificity) and false_alarm_rate.
    """
    truth = np.asarray(labels) == 1
    if truth.all() or not truth.any():
        return {}
    weights = bootstrap.resample(truth, ROUNDS, seed, groups)
    rows = np.concatenate([np.ones((1, len(truth)), weights.dtype), weights])  # first as it is
    each = []
    others = [None] * len(scores) if baselines is None else baselines
    for one, base, at in zip(scores, others, _all_on_all(places, len(scores)), strict=True):
        values = _of_draw(rows[:, at], one, truth[at])
        if base is not None:
            of_base = _of_draw(rows[:, at], base, truth[at])
            values = {name: x - of_base[name] for name, x in values.items()}
        each.append(values)
    return _over_draws(each, seed)


def _of_draw(rows: np.ndarray, scores: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    values = bootstrap.of_images(rows, scores, truth, more=at_90)
    return values | {"false_alarm_rate": 1 - values["specificity"]}


def pixel(
    counts: Sequence[Float[np.ndarray, "_ 3 b"]],
    labels: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"] | None = None,
    seed: int = 0,
    places: Places | None = None,
) -> dict[str, Interval]:
    """Of the means over draws of pixel metrics, from intervals.pixel_counts of each draw.

    The rest as in `image`.
    """
    weights = bootstrap.resample(np.asarray(labels) == 1, ROUNDS, seed, groups)
    rows = np.concatenate([np.ones((1, len(labels)), weights.dtype), weights])
    half = bootstrap.BINS // 2
    own = zip(counts, _all_on_all(places, len(counts)), strict=True)
    each = [bootstrap.measures(bootstrap.sums(rows[:, at], c), half) for c, at in own]
    return _over_draws(each, seed)


def together(
    ids: Sequence[Shaped[np.ndarray, " _"]], *columns: Sequence[Shaped[np.ndarray, " _"]]
) -> tuple[Places, tuple[Shaped[np.ndarray, " n"], ...]]:
    """Places of each draw's images among all of them, and each column of all of them.

    ids, and every column: an array per draw. Raises DataError if the draws give an image different
    values.
    """
    flat = np.concatenate(ids)
    names, first, inverse = np.unique(flat, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # as they first come
    rank = np.argsort(order)
    places = np.split(rank[inverse], np.cumsum([len(one) for one in ids])[:-1])
    found = []
    for column in columns:
        values = np.concatenate(column)
        kept = values[first[order]]
        if bad := flat[kept[rank[inverse]] != values].tolist():
            raise DataError(f"{bad[0]} differs between draws: its runs are of different data")
        found.append(kept)
    return places, tuple(found)


def _all_on_all(places: Places | None, draws: int) -> Sequence:
    return [slice(None)] * draws if places is None else places


def at_90(counts: Float[np.ndarray, "r 2 b"]) -> dict[str, np.ndarray]:
    return {"sensitivity_at_90": sensitivity_at(counts, 0.9)}


def sensitivity_at(counts: Float[np.ndarray, "r 2 b"], specificity: float) -> np.ndarray:
    """Highest sensitivity of each row among thresholds with at least this specificity."""
    alarms, hits = (np.pad(counts[:, i, ::-1].cumsum(1), ((0, 0), (1, 0))) for i in (0, 1))
    allowed = alarms <= (1 - specificity + 1e-12) * alarms[:, -1:]
    return np.where(allowed, hits, 0).max(1) / hits[:, -1]


def _over_draws(each: Sequence[dict[str, np.ndarray]], seed: int) -> dict[str, Interval]:
    """Values [1 + rounds] of each draw by name -> interval of the mean over draws."""
    rng = np.random.default_rng([seed, len(each)])
    chosen = rng.integers(0, len(each), (ROUNDS, len(each)))
    found = {}
    for name in each[0]:
        values = np.stack([one[name] for one in each])
        if not np.isfinite(values).all():
            continue  # undefined in some round
        means = values[chosen.T, 1 + np.arange(ROUNDS)].mean(0)
        own = values[:, 0]
        se, drawn = standard_error(values), float(means.std(ddof=1))
        stretch = widening(se, own, LEVEL) * se / drawn if drawn else 1.0
        tails = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        low, high = own.mean() + stretch * (tails - own.mean())
        found[name] = Interval(float(own.mean()), se, float(low), float(high))
    return found


def standard_error(values: Float[np.ndarray, "d r"]) -> float:
    """Of the mean over draws; values: of each draw as it is, then with its images resampled.

    Two crossed random effects (Brennan, Generalizability Theory, 2001): the variance between draws
    over d, which holds what draws and their own images add, and the covariance that shared images
    give two draws. One draw: that of its images.
    """
    d, rounds = len(values), values[:, 1:]
    if d == 1:
        return float(rounds.std(ddof=1))
    covariance = np.cov(rounds)
    shared = (covariance.sum() - np.trace(covariance)) / (d * (d - 1))
    return float(values[:, 0].var(ddof=1) / d + max(shared, 0.0)) ** 0.5
