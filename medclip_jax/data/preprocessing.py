"""Preprocessing (section 4.1 of the paper): z-score, equalisation, wavelet denoising, CLAHE.

A recipe is a tuple of step names, applied from left to right at the encoder's input size; steps map
float32 pixels in [0, 1] to [0, 1], so that any order is possible. Synthetic anomalies go through
the same chain as real ones.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pywt
from jaxtyping import Float, Shaped
from skimage import exposure

from medclip_jax.errors import ConfigError

VERSION = 1  # raise when a step changes: the feature cache is named by it
SPREAD = 3.0  # standard deviations that fill half of [0, 1]
WAVELET = "db4"
LEVELS = 2  # of the wavelet transform; noise lives in the finest ones
NORMAL = 0.6744897501960817  # third quartile of N(0, 1): median of |x| over its sd

Pixels = Float[np.ndarray, "h w"]


def zscore(image: Shaped[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """(I - mean) / sd, float64, sd with ddof 0 (equation 1); all 0 for a constant image."""
    if image.min() == image.max():
        return np.zeros(image.shape)
    return (image - image.mean(dtype=np.float64)) / image.std(dtype=np.float64)


def equalize_hist(image: Shaped[np.ndarray, "h w"]) -> Shaped[np.ndarray, "h w"]:
    """Each pixel's place in the cumulated histogram, (0, 1], 256 bins; a constant is unchanged."""
    if image.min() == image.max():
        return image
    if image.dtype == np.float32:  # too coarse for 256 bins between nearly equal values
        image = image.astype(np.float64)
    return exposure.equalize_hist(image)


def clahe(
    image: Shaped[np.ndarray, "h w"],
    kernel: tuple[int, int] | None = None,
    clip_limit: float = 0.01,
) -> Shaped[np.ndarray, "h w"]:
    """Contrast-limited adaptive histogram equalisation, stretched to [0, 1] (scikit-image).

    Args:
      image: float in [0, 1] or unsigned integers. A constant image comes back unchanged.
      kernel: height and width of the tiles, pixels; None takes an eighth of each side.
      clip_limit: share of a tile's pixels that one of 256 grey levels may hold.
    """
    if image.min() == image.max():
        return image
    return exposure.equalize_adapthist(image, kernel, clip_limit)


def wavelet_denoise(
    image: Float[np.ndarray, "*n h w"], mode: str = "symmetric", levels: int = LEVELS
) -> Float[np.ndarray, "*n h w"]:
    """W^-1[T(W[I])], Daubechies db4, soft threshold (equation 2); precision and range remain.

    Threshold sd * sqrt(2 ln(h w)), sd = median |diagonal detail of the finest level| / 0.6745
    (Donoho and Johnstone 1994, VisuShrink), per image; the coarse approximation is untouched.

    Args:
      image: one or many of one size. A side below 14 pixels has no level: unchanged.
      mode: how PyWavelets continues the image beyond its edge.
      levels: at most; fewer where the image is too small for the filter.
    """
    height, width = image.shape[-2:]
    levels = min(levels, pywt.dwt_max_level(min(height, width), WAVELET))
    if not levels:
        return image
    coarse, *details = pywt.wavedec2(image, WAVELET, mode, levels, axes=(-2, -1))
    noise = np.median(np.abs(details[-1][-1]), axis=(-2, -1), keepdims=True) / NORMAL
    threshold = (noise * np.sqrt(2 * np.log(height * width))).astype(image.dtype)
    soft = [
        tuple(np.sign(band) * np.maximum(np.abs(band) - threshold, 0) for band in bands)
        for bands in details
    ]
    whole = pywt.waverec2([coarse, *soft], WAVELET, mode, axes=(-2, -1))
    return whole[..., :height, :width]  # an odd side comes back one pixel longer


def _unit_zscore(image: Pixels) -> Pixels:
    """z-score, clipped to 3 standard deviations and mapped to [0, 1]; constant: all 0.5."""
    return (np.clip(zscore(image), -SPREAD, SPREAD) + SPREAD) / (2 * SPREAD)


STEPS: dict[str, Callable[[Pixels], Pixels]] = {
    "zscore": _unit_zscore,
    "equalize": equalize_hist,
    "wavelet": wavelet_denoise,
    "clahe": clahe,
}

# CT is windowed by its reader, where Hounsfield units are known: config.data.window.
RECIPES = {
    "ultrasound": ("wavelet", "clahe", "zscore"),
    "mri": ("zscore", "wavelet"),
    "xray": ("clahe", "zscore"),
    "mammography": ("clahe", "zscore"),
    "ct": ("zscore",),
}


def steps(recipe: str | Sequence[str]) -> tuple[str, ...]:
    """The steps of a recipe: "" (none), a name of RECIPES, or step names as a tuple or "a,b".

    Raises ConfigError for a name that is neither.
    """
    if isinstance(recipe, str):
        recipe = RECIPES.get(recipe) or tuple(s.strip() for s in recipe.split(",") if s.strip())
    for name in recipe:
        if name not in STEPS:
            raise ConfigError(
                f"config.data.recipe has {name!r}: give a recipe ({', '.join(RECIPES)}) "
                f"or steps ({', '.join(STEPS)}) separated by commas"
            )
    return tuple(recipe)


def apply(image: Pixels, recipe: str | Sequence[str]) -> Float[np.ndarray, "h w"]:
    """One image through the steps of a recipe; float32 in [0, 1] in and out."""
    for name in steps(recipe):  # wavelets overshoot; every step expects pixels in [0, 1]
        image = np.clip(STEPS[name](image), 0, 1).astype(np.float32)
    return image


def batch(
    images: Float[np.ndarray, "n h w"], recipe: str | Sequence[str]
) -> Float[np.ndarray, "n h w"]:
    """Many images, each as `apply`, on all cores; with an empty recipe the same array."""
    chain = steps(recipe)
    if not chain:
        return images
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(lambda image: apply(image, chain), images)))
