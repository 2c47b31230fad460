"""Image- and pixel-level metrics on host arrays.

A score equal to the threshold counts as positive (`score >= threshold`). Ratios with nothing to
divide: precision, recall, F1 and MCC are 0, as in scikit-learn; TPR, FPR, specificity, balanced
accuracy, AUROC and AUPRC are NaN when the class they need is absent. Infinite or undefined scores
raise `MetricError`, which names the image.
"""

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped
from sklearn import metrics as sk

from medclip_jax.boundary import hausdorff, hausdorff95, outline_scores, surface_distances
from medclip_jax.pixels import MetricError, Spacing, bounds, read
from medclip_jax.ranking import PixelRanks

NAN = float("nan")
PER_IMAGE = ("tp", "tn", "fp", "fn", "iou", "dice", "hausdorff", "hausdorff95", "boundary_f1")


def image_level(
    scores: Num[np.ndarray, "_"], labels: Shaped[np.ndarray, "_"], threshold: float = 0.5
) -> dict[str, float]:
    """Metrics of image scores [n] (any finite range) against labels [n] (0 or 1).

    AUPRC is the average precision, sum of (R_k - R_{k-1}) P_k; 1.0 when all labels are 1.
    Raises MetricError for empty input, unequal lengths, other labels, or NaN and inf (by index).
    """
    scores, truth = _checked(scores, labels)
    predicted = scores >= threshold
    both = truth.any() and not truth.all()
    tp, tn, fp, fn = _counts(predicted, truth)
    rates = _rates(tp, tn, fp, fn)
    return {
        "auroc": float(sk.roc_auc_score(truth, scores)) if both else NAN,
        "auprc": float(sk.average_precision_score(truth, scores)) if truth.any() else NAN,
        **rates,
        "fpr": fp / (fp + tn) if fp + tn else NAN,
        "tpr": rates["recall"] if truth.any() else NAN,
        "threshold": float(threshold),
    }


def roc(
    scores: Num[np.ndarray, "_"], labels: Shaped[np.ndarray, "_"]
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """FPR, TPR and thresholds at every distinct score, from (0, 0) at inf. Needs both classes."""
    scores, truth = _two_classes(scores, labels)
    return sk.roc_curve(truth, scores, drop_intermediate=False)


def precision_recall(
    scores: Num[np.ndarray, "_"], labels: Shaped[np.ndarray, "_"]
) -> tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"], Float[np.ndarray, " t"]]:
    """Precision, recall (t + 1 values, ending at 1, 0) and thresholds. Needs both classes."""
    scores, truth = _two_classes(scores, labels)
    return sk.precision_recall_curve(truth, scores)


def sensitivity_at(
    scores: Num[np.ndarray, "_"], labels: Shaped[np.ndarray, "_"], specificity: float = 0.9
) -> float:
    """Highest sensitivity among thresholds with at least this specificity; NaN for one class."""
    scores, truth = _checked(scores, labels)
    if truth.all() or not truth.any():
        return NAN
    fpr, tpr, _ = roc(scores, truth)
    return float(tpr[fpr <= 1 - specificity + 1e-12].max())


def fpr_at(
    scores: Num[np.ndarray, "_"], labels: Shaped[np.ndarray, "_"], tpr: float = 0.95
) -> float:
    """Lowest FPR among thresholds with at least this TPR; NaN for one class."""
    scores, truth = _checked(scores, labels)
    if truth.all() or not truth.any():
        return NAN
    alarms, hits, _ = roc(scores, truth)
    return float(alarms[hits >= tpr - 1e-12].min())


def oracle_f1(scores: Num[np.ndarray, "_"], labels: Shaped[np.ndarray, "_"]) -> tuple[float, float]:
    """Best F1 over all thresholds, and that threshold. It reads test labels: never a result."""
    precision, recall, thresholds = precision_recall(scores, labels)
    total = precision + recall
    f1 = 2 * precision * recall / np.where(total > 0, total, 1)
    best = int(np.argmax(f1[:-1]))
    return float(f1[best]), float(thresholds[best])


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
    of_images = {name: np.where(used, each[name], NAN) for name, used in counted.items()}
    found = {
        "auroc": ranks.auroc(),
        "auprc": ranks.average_precision(),
        **_rates(tp, tn, fp, fn),
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


def _checked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 and labels as bool, or a MetricError."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if len(scores) == 0 or len(scores) != len(labels):
        raise MetricError(
            f"There are {len(scores)} scores and {len(labels)} labels; give one of each per image."
        )
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise MetricError(
            f"The score of image {bad[0]} is {scores[bad[0]]}; scores must be finite numbers."
        )
    bad = np.flatnonzero((labels != 0) & (labels != 1))
    if len(bad):
        raise MetricError(f"The label of image {bad[0]} is {labels[bad[0]]}; use 0 and 1.")
    return scores, labels == 1


def _two_classes(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, truth = _checked(scores, labels)
    if truth.all() or not truth.any():
        raise MetricError("All labels are equal; a curve needs healthy and abnormal images.")
    return scores, truth


def _counts(predicted: Bool[np.ndarray, "*_"], truth: Bool[np.ndarray, "*_"]) -> tuple[int, ...]:
    """True positives, true negatives, false positives, false negatives."""
    tp = int(np.count_nonzero(predicted & truth))
    fp = int(np.count_nonzero(predicted)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    return tp, truth.size - tp - fp - fn, fp, fn


def _rates(tp: int, tn: int, fp: int, fn: int) -> dict[str, float]:
    """Everything that follows from the four counts (see the module for empty classes)."""
    recall = tp / (tp + fn) if tp + fn else 0.0
    specificity = tn / (tn + fp) if tn + fp else NAN
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return {
        "accuracy": (tp + tn) / (tp + tn + fp + fn),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": recall,
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0,
        "specificity": specificity,
        "balanced_accuracy": (recall + specificity) / 2 if tp + fn else NAN,
        "mcc": (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0,
    }


def _overlap(tp: int, fp: int, fn: int) -> dict[str, float]:
    marked = tp + fp + fn
    return {
        "iou": tp / marked if marked else NAN,
        "dice": 2 * tp / (marked + tp) if marked else NAN,
    }


def _one_image(
    predicted: Bool[np.ndarray, "h w"],
    mask: Bool[np.ndarray, "h w"],
    spacing: tuple[float, float],
    tolerance: float,
) -> tuple[float, ...]:
    """The values named in PER_IMAGE."""
    tp, tn, fp, fn = _counts(predicted, mask)
    distances = surface_distances(predicted, mask, spacing)
    f1 = outline_scores(distances, tolerance)[2]
    overlap = _overlap(tp, fp, fn).values()
    return (tp, tn, fp, fn, *overlap, hausdorff(distances), hausdorff95(distances), f1)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else NAN
