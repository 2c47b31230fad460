"""Thresholds and p-values from healthy images only (split-conformal).

If a healthy test score and the k healthy support scores are exchangeable, `score > threshold`
happens with probability at most `alpha_attained`. Leave-one-out support scores are exchangeable
with test scores only approximately, because the test image is compared with one support more.
The decision is strict on raw scores. `to_unit` maps the threshold itself just below 0.5, so that
`unit >= 0.5`, as `metrics` decides, is the same decision.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num
from scipy import stats

from medclip_jax.detectors import map_filter
from medclip_jax.errors import ConfigError, DataError

# The float32 just below 0.5: a unit score keeps its side of 0.5 when it is stored as float32.
BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))


class Threshold(NamedTuple):
    """A decision `score > value` and what it promises."""

    value: float
    alpha_requested: float
    alpha_attained: float  # bound on the false-alarm rate
    attainable: bool  # False if alpha_requested < 1 / (k + 1)
    message: str


class PixelThreshold(NamedTuple):
    """A decision `pixel > value` and its rate on the healthy support maps themselves."""

    value: float
    rate_requested: float
    rate_attained: float
    pixels: int
    message: str


class Calibration(NamedTuple):
    """Where healthy ends, by the held-out supports, and the unit to measure beyond it."""

    healthy: Float[np.ndarray, " k"]  # raw image scores of the supports, each held out
    image: Threshold
    scale: float
    pixel: PixelThreshold
    pixel_scale: float
    k: int  # supports; with fewer than 2 there are no p-values
    filter: map_filter.Steps = map_filter.Steps()  # of the maps, before the pixel threshold


def calibrate(
    healthy: Float[np.ndarray, " v"],
    maps: Float[np.ndarray, "v s s"],
    k: int,
    alpha: float,
    pixel_rate: float,
    steps: map_filter.Steps,
) -> Calibration:
    """Thresholds and scales from the image scores and maps of the held-out supports.

    maps: after `steps`. k: number of supports; of a single one the rows are views.
    """
    image = threshold(healthy, alpha) if k > 1 else largest(healthy, alpha)
    pixel = pixel_threshold(maps, pixel_rate)
    scale = spread(np.asarray(maps).ravel())
    return Calibration(healthy, image, spread(healthy), pixel, scale, k, steps)


def described(calibration: Calibration) -> dict[str, float | str]:
    """What metrics.json says of the thresholds beside `calibration_summary`."""
    return {
        "threshold_raw": calibration.image.value,
        "scale": calibration.scale,
        "pixel_threshold_raw": calibration.pixel.value,
        "pixel_scale": calibration.pixel_scale,
        "pixel_message": calibration.pixel.message,
    }


def p_values(
    scores: Num[np.ndarray, " n"], healthy: Num[np.ndarray, " k"]
) -> Float[np.ndarray, " n"]:
    """(1 + number of healthy >= score) / (k + 1), in [1 / (k + 1), 1].

    Small means unlike the healthy images; P(p <= a) <= a for exchangeable healthy scores
    (Vovk et al., Algorithmic Learning in a Random World, 2005). Raises DataError.
    """
    ordered = np.sort(_finite(healthy, "healthy support image"))
    below = np.searchsorted(ordered, _finite(scores, "image", least=0), side="left")
    return (1 + len(ordered) - below) / (len(ordered) + 1)


def threshold(healthy: Num[np.ndarray, " k"], alpha: float) -> Threshold:
    """The ceil((k + 1) (1 - alpha))-th smallest healthy score.

    alpha: bound wanted for the false-alarm rate, in (0, 1). Below 1 / (k + 1) no bound can be
    kept: then the largest healthy score is used and the message says what it promises.
    Raises DataError for no healthy scores or NaN, ConfigError for alpha outside (0, 1).
    """
    ordered = np.sort(_finite(healthy, "healthy support image"))
    k = len(ordered)
    alarms, attainable, message = _promise(k, alpha)
    return Threshold(float(ordered[k - alarms]), alpha, alarms / (k + 1), attainable, message)


def even_odds(alpha: float, rate: float) -> Calibration:
    """Without supports (K = 0): decide where the prompts give probability 0.5, logit 0."""
    message = (
        "without a healthy image no threshold can be set from data: "
        "the decision is where the prompts give probability 0.5"
    )
    image = Threshold(0.0, alpha, math.nan, False, message)
    pixel = PixelThreshold(0.0, rate, math.nan, 0, message)
    return Calibration(np.zeros(0), image, 1.0, pixel, 1.0, 0)


def largest(healthy: Num[np.ndarray, " v"], alpha: float) -> Threshold:
    """With one support (K = 1): above the largest score of its views, with no promise.

    Raises DataError for no scores or NaN.
    """
    message = (
        "with one healthy image none can be held out, so no false-alarm rate can be promised: "
        f"the threshold is the largest score of {len(healthy)} views of it"
    )
    value = float(_finite(healthy, "view of the healthy image").max())
    return Threshold(value, alpha, math.nan, False, message)


def spread(healthy: Num[np.ndarray, " k"]) -> float:
    """Standard deviation (ddof 1) of the healthy scores: the scale of `to_unit`.

    Not below 1e-6 of the largest absolute score; 1 if that is 0, too, so never zero.
    """
    healthy = _finite(healthy, "healthy support image")
    deviation = float(healthy.std(ddof=1)) if len(healthy) > 1 else 0.0
    return max(deviation, 1e-6 * float(np.abs(healthy).max())) or 1.0


def to_unit(
    scores: Num[np.ndarray, "*shape"], threshold: float, scale: float
) -> Float[np.ndarray, "*shape"]:
    """Map scores (or maps) to (0, 1): >= 0.5 exactly where score > threshold.

    With z = (score - threshold) / scale it is 1 - 0.5 / (1 + z) above the threshold and just
    under 0.5 / (1 - z) up to it. Strictly increasing in float64: scores that differ as float32
    stay different while |z| < 1e8, so ranking metrics do not change. Raises DataError.
    """
    if not (math.isfinite(scale) and scale > 0 and math.isfinite(threshold)):
        raise DataError(
            f"Threshold {threshold} and scale {scale} cannot calibrate; check the healthy scores."
        )
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise DataError("Scores to calibrate hold NaN or inf; check the images they come from.")
    z = np.abs(scores - threshold) / scale
    return np.where(scores > threshold, 1 - 0.5 / (1 + z), BELOW_HALF / (1 + z))


def pixel_threshold(maps: Iterable[np.ndarray], rate: float) -> PixelThreshold:
    """Smallest value that at most `rate` of the pooled healthy support pixels exceed.

    maps: k 2-D maps (leave-one-out, so that no image explains itself). Neighbouring pixels are
    not exchangeable: this describes the supports and promises nothing for other images.
    Raises DataError for no maps or NaN, ConfigError for a rate outside (0, 1).
    """
    _check_share(rate, "pixel rate")
    flat = [np.asarray(values, np.float64).ravel() for values in maps]
    pooled = _finite(np.concatenate(flat) if flat else np.empty(0), "healthy support pixel")
    value = float(np.quantile(pooled, 1 - rate, method="inverted_cdf"))
    attained = float(np.mean(pooled > value))
    message = (
        f"{attained:.2%} of the pixels of {len(flat)} healthy images lie above the pixel "
        f"threshold (asked for {rate:.2%}); other images may differ."
    )
    return PixelThreshold(value, rate, attained, len(pooled), message)


def calibration_summary(
    healthy_p_values: Num[np.ndarray, " n"], k: int, alpha: float
) -> dict[str, float | int | bool | str | None]:
    """What the threshold promised and what healthy test images showed.

    `false_alarm_rate` is the share of the p-values at or under `alpha_attained`, which is the
    decision `score > threshold`; NaN for none. `expected_low` and `expected_high` hold 95% of such
    rates over support draws when the promise is exact (beta-binomial).
    Raises DataError, ConfigError.
    """
    p = _finite(healthy_p_values, "healthy test image", least=0)
    alarms, attainable, message = _promise(k, alpha)
    attained, n = alarms / (k + 1), len(p)
    expected = stats.betabinom(n, alarms, k + 1 - alarms)
    low, high = (float(expected.ppf(q)) / n if n else math.nan for q in (0.025, 0.975))
    return {
        "alpha_requested": alpha,
        "alpha_attained": attained,
        "attainable": attainable,
        "least_attainable": 1 / (k + 1),
        "k": k,
        "n_healthy_test": n,
        "false_alarm_rate": float(np.mean(p <= attained + 1e-12)) if n else math.nan,
        "expected_low": low,
        "expected_high": high,
        "message": message,
    }


def no_promise(
    healthy_scores: Num[np.ndarray, " n"], k: int, image: Threshold
) -> dict[str, float | int | bool | str | None]:
    """`calibration_summary` where K is 0 or 1, from unit scores: what cannot be known is None."""
    n = len(healthy_scores)
    unknown = ("alpha_attained", "least_attainable", "expected_low", "expected_high")
    return {
        "alpha_requested": image.alpha_requested,
        **dict.fromkeys(unknown),
        "attainable": False,
        "k": k,
        "n_healthy_test": n,
        "false_alarm_rate": float(np.mean(np.asarray(healthy_scores) >= 0.5)) if n else math.nan,
        "message": image.message,
    }


def _promise(k: int, alpha: float) -> tuple[int, bool, str]:
    """How many of k + 1 exchangeable scores may exceed the threshold, and the sentence for it."""
    _check_share(alpha, "false-alarm rate")
    if k < 1:
        raise DataError("There are no healthy support scores; give at least one healthy image.")
    # (k + 1) alpha can fall short of a whole number by rounding alone, as 100 * 0.29 does.
    alarms = min(math.floor((k + 1) * alpha + 1e-9), k)
    images = f"with {k} healthy image" + "s" * (k > 1)
    rate, request = _percent(max(alarms, 1) / (k + 1)), f"asked for {_percent(alpha)}"
    if alarms < 1:
        return 1, False, f"{images} the least attainable false-alarm rate is {rate}, {request}"
    expected = f"a false-alarm rate of about {rate} is to be expected"
    return alarms, True, f"{images} {expected} (more where few supports teach the model), {request}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _check_share(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"The {name} is {value}; give a number between 0 and 1.")


def _finite(values: np.ndarray, name: str, least: int = 1) -> Float[np.ndarray, " n"]:
    """As float64, or a DataError that names the first value that is not finite."""
    values = np.asarray(values, np.float64)
    if len(values) < least:
        raise DataError(f"There is no {name} to calibrate with; give at least one.")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(f"The score of {name} {bad[0]} is {values[bad[0]]}; check that image.")
    return values


def half_precision(heat: Float[np.ndarray, "*n h w"]) -> Float[np.ndarray, "*n h w"]:
    """Unit maps as float16; what is below 0.5 stays below, so every decision stays the same."""
    below = np.nextafter(np.float16(0.5), np.float16(0))
    small = heat.astype(np.float16)
    return np.where((heat < 0.5) & (small >= 0.5), below, small)
