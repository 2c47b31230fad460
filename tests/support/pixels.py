"""Pixel metrics of whole data sets in one call."""

from itertools import repeat

from medclip_jax.evaluation.pixel_metrics import PixelMetrics


def pixel_level(maps, masks, threshold=0.5, spacing=None, tolerance=2.0) -> dict[str, float]:
    """PixelMetrics over maps and masks, which are read one at a time."""
    measured = PixelMetrics(threshold, tolerance)
    sizes = repeat((1.0, 1.0)) if spacing is None else spacing
    for (values, mask), size in zip(zip(maps, masks, strict=True), sizes, strict=False):
        measured.add(values, mask, size)
    return measured.pooled()
