"""Image- and pixel-level metrics on host arrays.

A score equal to the threshold counts as positive (`score >= threshold`). Ratios with nothing to
divide: precision, recall, F1 and MCC are 0, as in scikit-learn; TPR, FPR, specificity, balanced
accuracy, AUROC and AUPRC are NaN when the class they need is absent. Infinite or undefined scores
raise `MetricError`, which names the image.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped
from sklearn import metrics as sk

from medclip_jax.evaluation.pixels import MetricError

NAN = float("nan")


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
