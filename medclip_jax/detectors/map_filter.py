"""Outlier suppression of anomaly maps: specks go, lesions stay.

Median filter, removal of small components, Gaussian smoothing, clipping at quantiles of the
supports' maps, in this order; each step is off at its neutral setting. Supports go through the
same steps before anything is calibrated on them. Maps alone are filtered, not the image scores,
which are means over patches.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import ndimage
from skimage import morphology

Maps = Float[np.ndarray, "n s s"]


class Steps(NamedTuple):
    """The settings of config.score.map_filter, with the ceiling as a value of the map."""

    median: float = 0  # pixels, odd; 0 = off
    min_area_mm2: float = 0.0
    min_area_pixels: float = 0
    sigma: float = 0.0  # pixels
    ceiling: float = math.inf  # value of the map; inf = off


def learn(
    settings: dict, maps: Maps, mm2: Sequence[float | None] | None = None
) -> tuple[Steps, Maps]:
    """Steps whose ceiling, a quantile, is learned from the supports' maps, and these maps filtered.

    Args:
        settings: steps of config.score.map_filter by name.
        maps: raw maps of the supports, each held out.
        mm2: area in mm² of a pixel of each, None where it is unknown.
    """
    fields = dict(settings)
    ceiling = fields.pop("ceiling", 1)
    steps = Steps(**fields)
    maps = apply(maps, steps, mm2)
    if ceiling < 1:
        steps = steps._replace(ceiling=float(np.quantile(maps, ceiling)))
    return steps, np.minimum(maps, steps.ceiling)


def apply(maps: Maps, steps: Steps, mm2: Sequence[float | None] | None = None) -> Maps:
    """The maps after all steps, float32, any range; mm2 as of `learn`."""
    if steps == Steps():
        return np.asarray(maps, np.float32)
    known = [None] * len(maps) if mm2 is None else mm2
    out = np.empty(np.shape(maps), np.float32)
    for i, (heat, area) in enumerate(zip(np.array(maps, np.float32), known, strict=True)):
        if steps.median > 1:
            heat = ndimage.median_filter(heat, int(steps.median), mode="nearest")
        smallest = pixels(steps, area)
        if smallest > 1:
            # lowered to the highest level of a component that is large enough (Vincent 1993), so
            # no threshold has to be chosen; corners connect
            heat = morphology.area_opening(heat, area_threshold=smallest, connectivity=2)
        if steps.sigma > 0:
            heat = ndimage.gaussian_filter(heat, steps.sigma, mode="nearest")
        out[i] = np.minimum(heat, steps.ceiling)
    return out


def pixels(steps: Steps, mm2: float | None) -> int:
    """Least number of pixels that a component needs to stay; 0: all stay.

    A component of exactly `min_area_mm2` stays.
    """
    if mm2 is None:
        return int(steps.min_area_pixels)
    # 2 mm² of pixels of 0.1 mm² are 20, whatever rounding says
    return math.ceil(steps.min_area_mm2 / mm2 - 1e-9)
