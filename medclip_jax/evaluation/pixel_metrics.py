"""TODO."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Num

from medclip_jax.evaluation import metrics
from medclip_jax.evaluation.pixels import MetricError, Spacing, bounds, read
from medclip_jax.evaluation.ranking import PixelRanks
from medclip_jax.evaluation.surface_distance import (
    hausdorff,
    hausdorff95,
    outline_scores,
    surface_distances,
)

PER_IMAGE = ("tp", "tn", "fp", "fn", "iou", "dice", "hausdorff", "hausdorff95", "boundary_f1")


def pixel_level(
    maps: Iterable[np.ndarray],
    masks: Iterable[np.ndarray],
    threshold: float = 0.5,
    spacing: Spacing = None,
    tolerance: float = 2,
    value_range: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Metrics of anomaly maps against masks (0 or 1), pooled over all pixels of all images.

    maps, masks: [n h w], or iterables of 2-D arrays whose sizes may differ; read one at a time,
    so memory-mapped arrays and generators stay on disk. spacing: mm (row, column), one pair for
    all images or one per image; distances and `tolerance` are in mm then, else in pixels.

    IoU and Dice come from pooled counts (NaN if nothing is marked or predicted). Hausdorff
    distances are means over the images where mask and prediction are both non-empty. Boundary F1
    is the mean over images where either is non-empty; a miss or a false alarm counts 0. AUPRO:
    up to a false-positive rate of 0.3, 8-connected components.

    AUROC, AUPRC and AUPRO use 2^20 bins between the smallest and largest value (see `ranking`).
    Generators can be read only once: for them the range is [0, 1] unless `value_range` is given.
    Raises MetricError, with the index of the image, for what cannot be measured.
    """
    return pixel_level_each(maps, masks, threshold, spacing, tolerance, value_range)[0]


def pixel_level_each(
    maps: Iterable[np.ndarray],
    masks: Iterable[np.ndarray],
    threshold: float = 0.5,
    spacing: Spacing = None,
    tolerance: float = 2,
    value_range: tuple[float, float] | None = None,
) -> tuple[dict[str, float], dict[str, Float[np.ndarray, " n"]]]:
    """`pixel_level`, and what it takes means of: each image's hausdorff, hausdorff95 and
    boundary_f1, NaN for an image that does not count in that mean.
    """
    low, high = value_range or bounds(maps)
    ranks = PixelRanks(low, high)
    rows = []
    for index, (values, mask, mm) in enumerate(read(maps, masks, spacing)):
        if not low <= float(values.min()) <= float(values.max()) <= high:
            raise MetricError(f"Map {index} leaves [{low}, {high}]; give its value_range.")
        ranks.add(values, mask)
        rows.append(_one_image(values >= np.float64(threshold), mask, mm, tolerance))
    if not rows:
        raise MetricError("There are no maps to measure; give at least one map and mask.")
    each = _columns(rows)
    tp, tn, fp, fn = (int(each[name].sum()) for name in PER_IMAGE[:4])
    marked = each["tp"] + each["fp"] + each["fn"] > 0
    finite = np.isfinite(each["hausdorff"])
    counted = {"hausdorff": finite, "hausdorff95": finite, "boundary_f1": marked}
    of_images = {name: np.where(used, each[name], metrics.NAN) for name, used in counted.items()}
    found = {
        "auroc": ranks.auroc(),
        "auprc": ranks.average_precision(),
        **metrics._rates(tp, tn, fp, fn),
        **_overlap(tp, fp, fn),
        "tp": tp,
        "tn": tn,
        "fp": fp,
        "fn": fn,
        **{name: _mean(each[name][used]) for name, used in counted.items()},
        "aupro": ranks.aupro(0.3),
    }
    return found, of_images


def per_image(
    maps: Iterable[np.ndarray],
    masks: Iterable[np.ndarray],
    threshold: float = 0.5,
    spacing: Spacing = None,
    tolerance: float = 2,
) -> dict[str, Num[np.ndarray, " n"]]:
    """tp, tn, fp, fn, iou, dice, hausdorff, hausdorff95 and boundary_f1 of each image.

    Both empty: iou, dice and distances NaN, boundary F1 1. One empty: iou, dice and boundary F1
    0, hausdorff inf, hausdorff95 NaN (MONAI). Arguments and errors as in `pixel_level`.
    """
    rows = [
        _one_image(values >= np.float64(threshold), mask, mm, tolerance)
        for values, mask, mm in read(maps, masks, spacing)
    ]
    return _columns(rows)


def _columns(rows: list[tuple[float, ...]]) -> dict[str, Num[np.ndarray, " n"]]:
    return {name: np.array([row[i] for row in rows]) for i, name in enumerate(PER_IMAGE)}


def _overlap(tp: int, fp: int, fn: int) -> dict[str, float]:
    marked = tp + fp + fn
    return {
        "iou": tp / marked if marked else metrics.NAN,
        "dice": 2 * tp / (marked + tp) if marked else metrics.NAN,
    }


def _one_image(
    predicted: Bool[np.ndarray, "h w"],
    mask: Bool[np.ndarray, "h w"],
    spacing: tuple[float, float],
    tolerance: float,
) -> tuple[float, ...]:
    """The values named in PER_IMAGE."""
    tp, tn, fp, fn = metrics._counts(predicted, mask)
    distances = surface_distances(predicted, mask, spacing)
    f1 = outline_scores(distances, tolerance)[2]
    overlap = _overlap(tp, fp, fn).values()
    return (tp, tn, fp, fn, *overlap, hausdorff(distances), hausdorff95(distances), f1)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else metrics.NAN
