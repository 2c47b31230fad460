"""Where healthy ends, by what the held-out supports scored."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medclip_jax.detectors import calibration
from medclip_jax.detectors.detector import Detector


class Limits(NamedTuple):
    """What the held-out supports say: where healthy ends, and the unit to measure beyond it."""

    healthy: Float[np.ndarray, " k"]  # image scores of the supports, each held out
    image: calibration.Threshold
    image_width: float
    pixel: calibration.PixelThreshold
    pixel_width: float


def find(detector: Detector, maps, image_scores, alpha: float, pixel_rate: float) -> Limits:
    """Thresholds and widths from the supports; `maps` and `image_scores` read patch values.

    Without supports: where the prompts hold both classes equally likely, logit 0.
    """
    if not len(detector.held_out):
        image, pixel = calibration.even_odds(alpha, pixel_rate)
        return Limits(np.zeros(0), image, 1.0, pixel, 1.0)
    held_maps = np.asarray(maps(jnp.asarray(detector.held_out)))
    healthy = detector.held_out_image
    if healthy is None:
        healthy = np.asarray(image_scores(jnp.asarray(detector.held_out)))
    return Limits(
        healthy,
        calibration.threshold(healthy, alpha)
        if detector.k > 1
        else calibration.largest(healthy, alpha),
        calibration.spread(healthy),
        calibration.pixel_threshold(held_maps, pixel_rate),
        calibration.spread(held_maps.ravel()),
    )


def described(found: Limits, alpha: float, k: int) -> dict[str, Any]:
    """What metrics.json says of the limits."""
    return {
        "threshold_raw": found.image.value,
        "scale": found.image_width,
        "pixel_threshold_raw": found.pixel.value,
        "pixel_scale": found.pixel_width,
        "pixel_message": found.pixel.message,
        "alpha": alpha,
        "k": k,
    }
