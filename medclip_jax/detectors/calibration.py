"""Thresholds and p-values from healthy images only (split-conformal; conformal risk control).

For a healthy test image exchangeable with the k supports, `score > threshold` happens with
probability at most `alpha_attained`, if its score is no larger than it would be if each support
were scored as it is. That is proven for detectors that learn nothing from the supports, or compare
with the nearest of them; for trained ones `alpha_attained` is what to expect, and no bound.
The decision is strict on raw scores; `to_unit` maps the threshold itself just below 0.5.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num
from scipy import stats

from medclip_jax import stored
from medclip_jax.detectors import anomaly_maps
from medclip_jax.detectors.anomaly_maps import (
    PixelThreshold,
    check_share,
    finite,
    percent,
    pixel_quantile,
    pixel_threshold,
)
from medclip_jax.errors import DataError

# The float32 just below 0.5: a unit score keeps its side of 0.5 when it is stored as float32.
BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))


class Threshold(NamedTuple):
    """A decision `score > value` and what it promises."""

    value: float
    alpha_requested: float
    alpha_attained: float  # false-alarm rate to expect
    attainable: bool  # False if alpha_requested < 1 / (k + 1)
    message: str
    bound: float | None = None  # that the rate is proven to keep; None: nothing is proven


class Calibration(NamedTuple):
    """Where healthy ends, by the held-out supports, and the unit to measure beyond it."""

    healthy: Float[np.ndarray, " k"]  # raw image scores of the supports, each held out
    image: Threshold
    scale: float
    pixel: PixelThreshold
    pixel_scale: float
    k: int  # supports; with fewer than 2 there are no p-values
    filter: anomaly_maps.MapFilter = (
        anomaly_maps.MapFilter()
    )  # of the maps, before the pixel threshold
    peak: float = 0.0  # as of `lowered`


def calibrate(
    healthy: Float[np.ndarray, " v"],
    maps: Sequence[Float[np.ndarray, "_ _"]] | Float[np.ndarray, "v s s"],
    k: int,
    alpha: float,
    pixel_rate: float,
    steps: anomaly_maps.MapFilter,
    proven: Collection[str] = (),
) -> Calibration:
    """Thresholds and scales from the image scores and maps of the held-out supports.

    maps: after `steps`, without padding. k: number of supports; of a single one the rows are views.
    proven: as of `Detector`.
    """
    if k > 1:
        image = threshold(healthy, alpha, proven="image" in proven)
        pixel = pixel_threshold(maps, pixel_rate, proven="map" in proven)
    else:
        image, pixel = largest(healthy, alpha), pixel_quantile(maps, pixel_rate)
    scale = spread(np.concatenate([np.ravel(x) for x in maps]))
    return Calibration(healthy, image, spread(healthy), pixel, scale, k, steps)


def described(calibration: Calibration) -> dict[str, float | str | None]:
    """What metrics.json says of the thresholds beside `calibration_summary`."""
    typical = calibration.pixel.rate_attained
    return {
        "threshold_raw": calibration.image.value,
        "scale": calibration.scale,
        "pixel_threshold_raw": calibration.pixel.value,
        "pixel_scale": calibration.pixel_scale,
        "pixel_typical": None if math.isnan(typical) else typical,
        "pixel_bound": calibration.pixel.bound,
        "pixel_message": calibration.pixel.message,
    }


def p_values(
    scores: Num[np.ndarray, " n"], healthy: Num[np.ndarray, " k"], steps: bool = True
) -> Float[np.ndarray, " n"]:
    """(1 + number of healthy >= score) / (k + 1), in [1 / (k + 1), 1].

    Small means unlike the healthy images; P(p <= a) <= a for exchangeable healthy scores
    (Vovk et al., Algorithmic Learning in a Random World, 2005). Without `steps` it falls linearly
    between two healthy scores, as `threshold` without a bound lies between them: P(p <= a) is about
    a, for every a from 1 / (k + 1). Raises DataError.
    """
    ordered = np.sort(finite(healthy, "healthy support image"))
    scores, k = finite(scores, "image", least=0), len(ordered)
    below = np.searchsorted(ordered, scores, side="left")
    rank = below.astype(float)
    if not steps and k > 1:
        upper = np.clip(below, 1, k - 1)
        width = np.maximum(ordered[upper] - ordered[upper - 1], np.finfo(float).tiny)
        share = (scores - ordered[upper - 1]) / width
        # just short of the next rank: a score on the threshold is no alarm
        rank += np.where((below > 0) & (below < k), share * (1 - 1e-9), 0)
    return (1 + k - rank) / (k + 1)


def threshold(healthy: Num[np.ndarray, " k"], alpha: float, *, proven: bool = False) -> Threshold:
    """The healthy score of rank (k + 1) (1 - alpha), from the smallest.

    alpha: false-alarm rate that is asked for, in (0, 1). None below 1 / (k + 1) can be attained:
    then the largest healthy score is used and the message says what it promises. proven: the rate
    is a bound (see above), not only what to expect: the rank is rounded up. Else the threshold is
    interpolated between two scores, and the rate to expect is alpha itself (Hutson, Stat. Probab.
    Lett. 1999; a little less where the healthy tail is long).
    Raises DataError for no healthy scores or NaN, ConfigError for alpha outside (0, 1).
    """
    ordered = np.sort(finite(healthy, "healthy support image"))
    k = len(ordered)
    alarms, attainable, message = _promise(k, alpha, proven)
    value, rate = float(np.interp(k + 1 - alarms, np.arange(1, k + 1), ordered)), alarms / (k + 1)
    return Threshold(value, alpha, rate, attainable, message, rate if proven else None)


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
    value = float(finite(healthy, "view of the healthy image").max())
    return Threshold(value, alpha, math.nan, False, message)


def spread(healthy: Num[np.ndarray, " k"]) -> float:
    """Standard deviation (ddof 1) of the healthy scores: the scale of `to_unit`.

    Not below 1e-6 of the largest absolute score, nor what is stored at the least; 1 if both are 0.
    """
    healthy = finite(healthy, "healthy support image")
    deviation = float(healthy.std(ddof=1)) if len(healthy) > 1 else 0.0
    scale = max(deviation, 1e-6 * float(np.abs(healthy).max()))
    return max(scale, stored.WIDTH.low) if scale else 1.0


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


def calibration_summary(
    healthy_p_values: Num[np.ndarray, " n"], k: int, alpha: float, proven: bool = False
) -> dict[str, float | int | bool | str | None]:
    """What the threshold promised and what healthy test images showed.

    `typical` is the rate to expect (`alpha_attained`), `bound` the same where it is proven.
    `false_alarm_rate` is the share of the p-values (`p_values`, with steps if proven) at or under
    `alpha_attained`, which is the decision `score > threshold`; NaN for none. `expected_low` and
    `expected_high` hold 95% of such rates over support draws when the promise is exact
    (beta-binomial).
    Raises DataError, ConfigError.
    """
    p = finite(healthy_p_values, "healthy test image", least=0)
    alarms, attainable, message = _promise(k, alpha, proven)
    attained, n = alarms / (k + 1), len(p)
    expected = stats.betabinom(n, alarms, k + 1 - alarms)
    low, high = (float(expected.ppf(q)) / n if n else math.nan for q in (0.025, 0.975))
    return {
        "alpha_requested": alpha,
        "alpha_attained": attained,
        "typical": attained,
        "bound": attained if proven else None,
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
    unknown = "alpha_attained typical bound least_attainable expected_low expected_high".split()
    return {
        "alpha_requested": image.alpha_requested,
        **dict.fromkeys(unknown),
        "attainable": False,
        "k": k,
        "n_healthy_test": n,
        "false_alarm_rate": float(np.mean(np.asarray(healthy_scores) >= 0.5)) if n else math.nan,
        "message": image.message,
    }


def _promise(k: int, alpha: float, proven: bool) -> tuple[float, bool, str]:
    """How many of k + 1 exchangeable scores exceed the threshold, and the sentence for it.

    A whole number where it is a bound.
    """
    check_share(alpha, "false-alarm rate")
    if k < 1:
        raise DataError("There are no healthy support scores; give at least one healthy image.")
    # (k + 1) alpha can fall short of a whole number by rounding alone, as 100 * 0.29 does.
    alarms = min((k + 1) * alpha + 1e-9, k)
    alarms = math.floor(alarms) if proven or alarms < 1 else max(1.0, alarms - 1e-9)
    images = f"with {k} healthy image" + "s" * (k > 1)
    rate, request = percent(max(alarms, 1) / (k + 1)), f"asked for {percent(alpha)}"
    if alarms < 1:
        least = f"{images} the least attainable false-alarm rate is"
        sure = f"{rate}, a proven bound" if proven else f"about {rate}, with no proven bound"
        return 1, False, f"{least} {sure}, {request}"
    sure = f"at most {rate} is proven"
    if not proven:
        sure = f"about {rate}, with no proven bound, is to be expected"
    return alarms, True, f"{images} a false-alarm rate of {sure}, {request}"


def lowered(maps: Num[Any, "*n h w"], share: float) -> Any:
    """Maps less this share of the way from their median to their largest value.

    Of a lesion that stands out the flanks fall below the threshold, not of a weak one: a contour
    relative to the peak, as those of nuclear medicine are, whose border is still set by healthy
    images. Arrays of NumPy or JAX.
    """
    if not share:
        return maps
    flat = maps.reshape(*maps.shape[:-2], -1)
    middle = (np if isinstance(maps, np.ndarray) else jnp).median(flat, -1)
    return maps - share * (flat.max(-1) - middle)[..., None, None]


def half_precision(heat: Float[np.ndarray, "*n h w"]) -> Float[np.ndarray, "*n h w"]:
    """Unit maps as float16; what is below 0.5 stays below, so every decision stays the same."""
    below = np.nextafter(np.float16(0.5), np.float16(0))
    small = heat.astype(np.float16)
    return np.where((heat < 0.5) & (small >= 0.5), below, small)
