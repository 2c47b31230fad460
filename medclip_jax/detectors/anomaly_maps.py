"""Anomaly maps: the threshold of their pixels, and a filter that removes specks.

Neighbouring pixels are not exchangeable; whole images are. So the loss of an image is its share of
pixels above the threshold, and the supports, each held out, are what it is estimated from. They go
through the filter as all maps do; image scores, which are means over patches, do not.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import ndimage
from skimage import morphology

from medclip_jax.errors import ConfigError, DataError

STEPS = 200  # thresholds that are tried, from the smallest pixel to the largest
Maps = Float[np.ndarray, "n s s"]


class PixelThreshold(NamedTuple):
    """A decision `pixel > value` and the share of a healthy image's pixels above it."""

    value: float
    rate_requested: float
    rate_attained: float  # share to expect, estimated by leaving out one support after another
    pixels: int
    message: str
    bound: float | None = None  # that the mean share is proven to keep; None: nothing is proven


def pixel_threshold(
    maps: Iterable[np.ndarray], rate: float, *, proven: bool = False
) -> PixelThreshold:
    """The pixel threshold for a wanted share of a healthy image's pixels above it.

    With r = rate >= 1 / (k + 1) it is the smallest value t for which the shares of the k maps have
    (sum + 1) / (k + 1) <= r: conformal risk control (Angelopoulos et al. 2022), whole images being
    exchangeable, though pixels are not. A smaller r cannot be proven. Then t is the smallest value
    for which each map, with the threshold that the other maps set by the same rule, has on average
    a share of at most r; (k r + 1) / (k + 1) is proven then, since the mean share of the maps at t
    is at most r.

    Args:
        maps: of the k supports, two or more, each held out.
        rate: share that is asked for, in (0, 1).
        proven: the maps of the supports have no smaller values than exchangeable ones would.

    Raises DataError for fewer maps or NaN, ConfigError for a rate outside (0, 1).
    """
    check_share(rate, "pixel rate")
    rows = [np.sort(finite(np.ravel(x), "healthy support pixel")) for x in maps]
    k, pixels = len(rows), sum(map(len, rows))
    if k < 2:
        raise DataError("A pixel threshold needs the maps of two or more healthy images.")
    pooled = np.sort(np.concatenate(rows))
    above = np.append(np.geomspace(pixels, 1, STEPS).astype(int), 0)
    grid = pooled[pixels - 1 - np.minimum(above, pixels - 1)]  # rising to the largest value
    shares = np.stack([_share_above(x, grid) for x in rows])
    mean = shares.mean(0)
    attainable = rate * (k + 1) >= 1 - 1e-9
    most = (rate * (k + 1) - 1) / k if attainable else rate
    # the mean share aimed at: the largest with which a left-out map has `rate`; 0 if none has
    for level in [most, *mean[mean < most]]:
        typical = _left_out(shares, level)
        if attainable or typical <= rate:
            break

    # the smallest pixel above which the shares of all rows sum to the level
    total, above_all = k * level + 1e-9, lambda i: sum(_share_above(x, pooled[i]) for x in rows)
    value = float(pooled[bisect_left(range(pixels - 1), True, key=lambda i: above_all(i) <= total)])
    proof = (rate if attainable else (k * rate + 1) / (k + 1)) if proven else None
    least = "" if attainable else f" (below {percent(1 / (k + 1))} nothing can be proven)"
    bound = "no bound is proven" if proof is None else f"at most {percent(proof)} is proven"
    message = (
        f"with {k} healthy images about {percent(typical)} of a healthy image's pixels are to be "
        f"expected above the pixel threshold; {bound}, asked for {percent(rate)}{least}"
    )
    return PixelThreshold(value, rate, typical, pixels, message, proof)


def _share_above(ordered: np.ndarray, values: Any) -> Any:
    return 1 - np.searchsorted(ordered, values, side="right") / len(ordered)


def _left_out(shares: Float[np.ndarray, "k g"], level: float) -> float:
    """Mean share of each row above the first value where that of the others is at most `level`."""
    others = (shares.sum(0) - shares) / (len(shares) - 1)
    place = (others <= level + 1e-12).argmax(1)  # the last value is the largest: nothing above
    return float(shares[np.arange(len(shares)), place].mean())


def pixel_quantile(maps: Iterable[np.ndarray], rate: float) -> PixelThreshold:
    """Smallest value that at most `rate` of all pixels of views of one image exceed: no promise.

    Raises DataError for no maps or NaN, ConfigError for a rate outside (0, 1).
    """
    check_share(rate, "pixel rate")
    views = [np.ravel(x) for x in maps]
    pooled = finite(np.concatenate(views), "healthy support pixel")
    value = float(np.quantile(pooled, 1 - rate, method="inverted_cdf"))
    message = (
        f"{percent(float(np.mean(pooled > value)))} of the pixels of {len(views)} views of the "
        f"healthy image lie above the pixel threshold, asked for {percent(rate)}; "
        "for other images nothing can be promised"
    )
    return PixelThreshold(value, rate, math.nan, len(pooled), message)


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def check_share(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"The {name} is {value}; give a number between 0 and 1.")


def finite(values: np.ndarray, name: str, least: int = 1) -> Float[np.ndarray, " n"]:
    """As float64, or a DataError that names the first value that is not finite."""
    values = np.asarray(values, np.float64)
    if len(values) < least:
        raise DataError(f"There is no {name} to calibrate with; give at least one.")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(f"The score of {name} {bad[0]} is {values[bad[0]]}; check that image.")
    return values


class MapFilter(NamedTuple):
    """The settings of config.score.map_filter, in the order of the steps; each can be off."""

    median: float = 0  # pixels, odd; 0 = off
    min_area_mm2: float = 0.0
    min_area_pixels: float = 0
    sigma: float = 0.0  # pixels
    ceiling: float = math.inf  # value of the map; inf = off


def learn_filter(
    settings: dict,
    maps: Maps,
    mm2: Sequence[float | None] | None = None,
    inside: Sequence[Any] | None = None,
) -> tuple[MapFilter, Maps]:
    """A filter whose ceiling, a quantile, is learned from the supports' maps, and these filtered.

    Args:
        settings: steps of config.score.map_filter by name.
        maps: raw maps of the supports, each held out.
        mm2: area in mm² of a pixel of each, None where it is unknown.
        inside: of each, what the image fills; None: all of it.
    """
    fields = dict(settings)
    ceiling = fields.pop("ceiling", 1)
    steps = MapFilter(**fields)
    maps = apply_filter(maps, steps, mm2)
    if ceiling < 1:
        places = inside or [np.s_[:]] * len(maps)
        own = np.concatenate([x[place].ravel() for x, place in zip(maps, places, strict=True)])
        steps = steps._replace(ceiling=float(np.quantile(own, ceiling)))
    return steps, np.minimum(maps, steps.ceiling)


def apply_filter(maps: Maps, steps: MapFilter, mm2: Sequence[float | None] | None = None) -> Maps:
    """The maps after all steps, float32, any range; mm2 as of `learn_filter`."""
    if steps == MapFilter():
        return np.asarray(maps, np.float32)
    known = [None] * len(maps) if mm2 is None else mm2
    out = np.empty(np.shape(maps), np.float32)
    for i, (heat, area) in enumerate(zip(np.array(maps, np.float32), known, strict=True)):
        if steps.median > 1:
            heat = ndimage.median_filter(heat, int(steps.median), mode="nearest")
        smallest = least_pixels(steps, area)
        if smallest > 1:
            # lowered to the highest level of a component that is large enough (Vincent 1993), so
            # no threshold has to be chosen; corners connect
            heat = morphology.area_opening(heat, area_threshold=smallest, connectivity=2)
        if steps.sigma > 0:
            heat = ndimage.gaussian_filter(heat, steps.sigma, mode="nearest")
        out[i] = np.minimum(heat, steps.ceiling)
    return out


def least_pixels(steps: MapFilter, mm2: float | None) -> int:
    """Least number of pixels that a component needs to stay; 0: all stay.

    A component of exactly `min_area_mm2` stays.
    """
    if mm2 is None:
        return int(steps.min_area_pixels)
    # 2 mm² of pixels of 0.1 mm² are 20, whatever rounding says
    return math.ceil(steps.min_area_mm2 / mm2 - 1e-9)
