"""Metrics of image scores, and the formulas that images and pixels share.

Every metric is a function of how many negatives and positives have each score, or of the four
counts at a threshold, in rows: a bootstrap measures all its resamples at once. A score equal to the
threshold is positive. Without anything to divide by, precision, recall, F1 and MCC are 0, as in
scikit-learn; all other ratios are NaN.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped
from scipy import special
from sklearn import metrics as sk
from sklearn.metrics import roc_auc_score

from medclip_jax.errors import DataError

NAN = float("nan")
Array = np.ndarray
COVERAGE = (1.0, 0.9, 0.8, 0.7, 0.5)
# Measures of one image's uncertainty, larger is less certain; p_t is its unit score in pass t:
#   sd                  standard deviation of p_t over the MC-dropout passes (equation 10)
#   entropy             predictive entropy H(mean p_t), H(p) = -p ln p - (1 - p) ln(1 - p), nats
#   mutual_information  H(mean p_t) - mean H(p_t), on which the passes disagree, nats (BALD,
#                       Houlsby et al. 2011)
#   ensemble            standard deviation over the fold params
#   distance            -|score - 0.5|, the nearness to the threshold, which costs nothing
# The last two are the baselines that the others have to beat.
UNCERTAINTIES = ("entropy", "mutual_information", "ensemble")  # beside sd


class MetricError(DataError, ValueError):
    """Scores, labels, maps or masks that cannot be measured."""


def image_level(
    scores: Num[Array, "_"], labels: Shaped[Array, "_"], threshold: float = 0.5
) -> dict[str, float]:
    """Metrics of the images of a test set.

    scores: finite, larger = more anomalous, abnormal from `threshold` on; labels: 0 or 1.

    Returns:
      auroc; auprc, the average precision sum of (R_k - R_{k-1}) P_k; accuracy, precision, recall,
      f1, specificity, balanced_accuracy, mcc, fpr, tpr; and the threshold. AUROC, AUPRC, TPR and
      FPR are NaN where the class that they need is absent.

    Raises:
      MetricError: empty input, unequal lengths, labels other than 0 and 1, NaN or infinite scores.
    """
    scores, truth = _checked(scores, labels)
    result = {name: float(x[0]) for name, x in ranking(by_score(scores, truth)[0]).items()}
    tp, tn, fp, fn = confusion(scores >= threshold, truth)
    result |= {name: float(x) for name, x in rates(tp, tn, fp, fn).items()}
    fpr, tpr = float(_ratio(fp, fp + tn)), float(_ratio(tp, tp + fn))
    return result | {"fpr": fpr, "tpr": tpr, "threshold": float(threshold)}


def roc(
    scores: Num[Array, "_"], labels: Shaped[Array, "_"]
) -> tuple[Float[Array, " t"], Float[Array, " t"], Float[Array, " t"]]:
    """FPR, TPR and thresholds at every distinct score, from (0, 0) at inf. Needs both classes."""
    scores, truth = _checked(scores, labels, both=True)
    return sk.roc_curve(truth, scores, drop_intermediate=False)


def precision_recall(
    scores: Num[Array, "_"], labels: Shaped[Array, "_"]
) -> tuple[Float[Array, " _"], Float[Array, " _"], Float[Array, " t"]]:
    """Precision, recall (t + 1 values, ending at 1, 0) and thresholds. Needs both classes."""
    scores, truth = _checked(scores, labels, both=True)
    return sk.precision_recall_curve(truth, scores)


def sensitivity_at(
    scores: Num[Array, "_"], labels: Shaped[Array, "_"], specificity: float = 0.9
) -> float:
    """Highest sensitivity among thresholds with at least this specificity; NaN for one class."""
    counts, _ = by_score(*_checked(scores, labels))
    return float(sensitivity(counts, specificity)[0])


def oracle_f1(scores: Num[Array, "_"], labels: Shaped[Array, "_"]) -> tuple[float, float]:
    """Best F1 over all thresholds, and that threshold. It reads test labels: never a result."""
    precision, recall, thresholds = precision_recall(scores, labels)
    f1 = _ratio(2 * precision * recall, precision + recall, 0.0)
    best = int(np.argmax(f1[:-1]))
    return float(f1[best]), float(thresholds[best])


def by_score(
    scores: Num[Array, " n"], truth: Bool[Array, " n"], weights: Num[Array, "r n"] | None = None
) -> tuple[Float[Array, "r 2 b"], Float[Array, " b"]]:
    """Negatives and positives at each distinct score, and these scores, ascending.

    weights: how often each image counts, a row per resample; None: one row of ones.
    """
    order = np.argsort(scores, kind="stable")
    values = np.asarray(scores)[order]
    starts = np.flatnonzero(np.append(True, np.diff(values) != 0))
    weights = np.ones((1, len(values))) if weights is None else weights
    sides = np.stack([~truth, truth]).astype(float)[:, order]
    return np.add.reduceat(weights[:, None, order] * sides, starts, axis=2), values[starts]


def ranking(counts: Num[Array, "r c b"]) -> dict[str, Float[Array, " r"]]:
    """Threshold-free metrics of each row of counts, ascending by score.

    counts: negatives, positives and, for AUPRO, coverage (see `pro_curve`). AUROC is
    P(positive > negative) + P(equal) / 2, AUPRC the average precision.
    """
    negative, positive = counts[:, 0, ::-1], counts[:, 1, ::-1]
    alarms, hits = negative.cumsum(1), positive.cumsum(1)
    precision = _ratio(hits, hits + alarms, 0.0)
    result = {
        "auroc": _ratio(((hits - positive / 2) * negative).sum(1), hits[:, -1] * alarms[:, -1]),
        "auprc": _ratio((positive * precision).sum(1), hits[:, -1]),
    }
    if counts.shape[1] == 3:
        result["aupro"] = aupro(*pro_curve(counts))
    return {name: np.minimum(x, 1.0) for name, x in result.items()}


def pro_curve(counts: Num[Array, "r 3 b"]) -> tuple[Float[Array, "r t"], Float[Array, "r t"]]:
    """False-positive rate over all normal pixels and per-region overlap, from (0, 0) to (1, 1).

    The third channel is the coverage: each lesion pixel weighs 1 / area of its component, so that
    a running sum is the mean overlap times the number of components.
    """
    running = counts[:, ::2, ::-1].cumsum(2)
    x, y = np.pad(_ratio(running, running[:, :, -1:]), ((0, 0), (0, 0), (1, 0))).swapaxes(0, 1)
    return x, y


def aupro(
    fpr: Float[Array, "r t"], overlap: Float[Array, "r t"], limit: float = 0.3
) -> Float[Array, " r"]:
    """Area under the PRO curve up to the false-positive rate `limit`, divided by it.

    Linear interpolation at the limit (Bergmann et al., MVTec AD, IJCV 2021). NaN without
    components or without normal pixels.
    """
    width, rise = np.diff(fpr), np.diff(overlap)
    used = np.clip(limit - fpr[:, :-1], 0, width)
    end = overlap[:, :-1] + rise * _ratio(used, width, 0.0)
    return (used * (overlap[:, :-1] + end) / 2).sum(1) / limit


def sensitivity(counts: Num[Array, "r 2 b"], specificity: float) -> Float[Array, " r"]:
    """Highest sensitivity of each row among thresholds with at least this specificity."""
    alarms, hits = (np.pad(counts[:, i, ::-1].cumsum(1), ((0, 0), (1, 0))) for i in (0, 1))
    allowed = alarms <= (1 - specificity + 1e-12) * alarms[:, -1:]
    total = np.where(alarms[:, -1] > 0, hits[:, -1], 0)
    return _ratio(np.where(allowed, hits, 0).max(1), total)


def confusion(predicted: Bool[Array, "*_"], truth: Bool[Array, "*_"]) -> tuple[int, ...]:
    """True positives, true negatives, false positives, false negatives."""
    tp = int(np.count_nonzero(predicted & truth))
    fp = int(np.count_nonzero(predicted)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    return tp, truth.size - tp - fp - fn, fp, fn


def confusion_from(counts: Num[Array, "r c b"], start: int) -> tuple[Float[Array, " r"], ...]:
    """As `confusion`, of each row of counts by score: bins from `start` on are called positive."""
    below, above = counts[:, :2, :start].sum(2), counts[:, :2, start:].sum(2)
    return above[:, 1], below[:, 0], above[:, 0], below[:, 1]


def rates(tp: Any, tn: Any, fp: Any, fn: Any) -> dict[str, Float[Array, "*r"]]:
    """Accuracy, precision, recall, F1, specificity, balanced accuracy and MCC of counts [r]."""
    tp, tn, fp, fn = (np.asarray(x, float) for x in (tp, tn, fp, fn))
    recall, specificity = _ratio(tp, tp + fn, 0.0), _ratio(tn, tn + fp)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return {
        "accuracy": _ratio(tp + tn, tp + tn + fp + fn),
        "precision": _ratio(tp, tp + fp, 0.0),
        "recall": recall,
        "f1": _ratio(2 * tp, 2 * tp + fp + fn, 0.0),
        "specificity": specificity,
        "balanced_accuracy": np.where(tp + fn > 0, (recall + specificity) / 2, NAN),
        "mcc": _ratio(tp * tn - fp * fn, np.sqrt(product), 0.0),
    }


def overlap(tp: Any, fp: Any, fn: Any) -> dict[str, Float[Array, "*r"]]:
    """IoU and Dice of counts [r]; NaN where nothing is marked and nothing predicted."""
    tp, marked = np.asarray(tp, float), np.asarray(tp, float) + fp + fn
    return {"iou": _ratio(tp, marked), "dice": _ratio(2 * tp, marked + tp)}


def _ratio(part: Any, whole: Any, empty: float = NAN) -> np.ndarray:
    """part / whole, and `empty` where the whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, float), whole)
    return np.divide(part, whole, out=np.full(part.shape, empty), where=whole > 0)


def _checked(scores: Array, labels: Array, both: bool = False) -> tuple[Array, Array]:
    """Scores as float64 and labels as bool, or a MetricError; both: two classes are needed."""
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
    if both and np.ptp(labels) == 0:
        raise MetricError("All labels are equal; a curve needs healthy and abnormal images.")
    return scores, labels == 1


Column = Float[np.ndarray, " n"]


def entropy(p: Float[np.ndarray, "*a"]) -> Float[np.ndarray, "*a"]:
    """Entropy of a Bernoulli variable in nats, [0, ln 2]; p in [0, 1]."""
    return special.entr(p) + special.entr(1 - p)


def of_passes(p: Float[np.ndarray, "t n"]) -> tuple[Column, Column]:
    """Predictive entropy and mutual information of unit scores p in [0, 1], nats.

    Equal passes have no mutual information; rounding below 0 is cut off.
    """
    whole = entropy(p.mean(0))
    return whole, np.where(np.ptp(p, axis=0) == 0, 0.0, np.maximum(whole - entropy(p).mean(0), 0))


def risk_and_coverage(
    score: Column, label: Int[np.ndarray, " n"], uncertainty: Mapping[str, Column]
) -> dict[str, Any] | None:
    """Risk against coverage and the AUROC of the images that remain, per measure.

    Labels are read here: call it after scoring.

    Args:
      score: [0, 1], abnormal from 0.5 on.
      label: 0 or 1.
      uncertainty: any of the measures above but `distance`, which is added. One that is the same
        for all images orders nothing and is left out.

    Returns:
      coverage, the shares of images that remain, and per measure: risk (share of wrong decisions)
      and auroc at each coverage (None where one class alone remains), and aurc, the mean risk over
      all coverages, [0, 1]. None without `sd`, or with a constant one.
    """
    if "sd" not in uncertainty or np.ptp(uncertainty["sd"]) == 0:
        return None
    every = {**uncertainty, "distance": -np.abs(np.asarray(score, np.float64) - 0.5)}
    wrong = (score >= 0.5) != (label == 1)
    measures = {n: _rejection(score, label, wrong, u) for n, u in every.items() if np.ptp(u) > 0}
    return {"coverage": list(COVERAGE), "measures": measures}


def risk_coverage(wrong: np.ndarray, uncertainty: Column) -> Column:
    """Share of wrong decisions among the 1, 2, ... n most certain images.

    Of images of equal uncertainty it is the mean over all orders of them.
    """
    _, tie, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    errors, images = np.cumsum(np.bincount(tie, wrong)), np.arange(1, len(tie) + 1)
    return np.interp(images, [0, *np.cumsum(count)], [0, *errors]) / images


def _rejection(score, label, wrong, uncertainty) -> dict[str, Any]:
    """aurc, risk and auroc of one measure; see `risk_and_coverage`.

    Where a tie lies across a coverage, its images have the share of it that remains as weight.
    """
    curve = risk_coverage(wrong, uncertainty)
    _, tie, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    remaining = [max(1, round(share * len(tie))) for share in COVERAGE]
    aurocs = []
    for n in remaining:
        weight = np.clip((n - (np.cumsum(count) - count)) / count, 0, 1)[tie]
        rows = weight > 0
        both = np.ptp(label[rows]) > 0
        how = {"sample_weight": weight[rows]}
        aurocs.append(float(roc_auc_score(label[rows], score[rows], **how)) if both else None)
    risk = [float(curve[n - 1]) for n in remaining]
    return {"aurc": float(curve.mean()), "risk": risk, "auroc": aurocs}


def headline(metrics: dict) -> str:
    """One line of the main numbers."""
    pixel = metrics["pixel"] or {}
    parts = {"image AUROC": metrics["image"]["auroc"], "pixel AUROC": pixel.get("auroc")}
    parts |= {"AUPRO": pixel.get("aupro"), "Dice": pixel.get("dice")}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in parts.items() if value is not None)
    shown = shown or "no AUROC, as the test images are of one class"
    return f"{metrics['dataset']} K={metrics['k']} {metrics['method']}: {shown}"
