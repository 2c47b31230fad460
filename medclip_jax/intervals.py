"""95% intervals of one run's metrics, over the test images it was measured on.

Images are drawn anew within their class (bootstrap, percentile interval). Every metric is a
function of how many positives and negatives stand at each score, so a round is one row of counts:
no score is sorted twice, and pixels, kept as one histogram per image, cost no more than images.
Rates of images (sensitivity, specificity and their complements) get Wilson's interval instead,
which stays honest at 0 and 1. They say nothing about other draws of the supports.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped
from scipy import stats as st

Limits = dict[str, list[float]]
BINS = 512  # of a pixel histogram over [0, 1]; 0.5 is an edge
ROUNDS = 1000
TAILS = (0.025, 0.975)


def image(
    scores: Num[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    threshold: float = 0.5,
    seed: int = 0,
) -> Limits:
    """Limits [low, high] of the metrics of `metrics.image_level`; {} unless both classes exist."""
    truth = np.asarray(labels) == 1
    if truth.all() or not truth.any():
        return {}
    levels, place = np.unique(scores, return_inverse=True)
    counts = np.zeros((len(scores), 2, len(levels)))
    counts[np.arange(len(scores)), truth.astype(int), place] = 1
    weights = resample(truth, ROUNDS, seed)
    start = int(np.searchsorted(levels, threshold, side="left"))
    found = _limits(measures(_sums(weights, counts), start))
    called = np.asarray(scores) >= threshold
    for names, hits in ((("recall", "tpr"), called[truth]), (("specificity",), ~called[~truth])):
        interval = st.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        found |= dict.fromkeys(names, [float(interval.low), float(interval.high)])
    low, high = found["specificity"]
    return {**{n: found[n] for n in found if n not in ("iou", "dice")}, "fpr": [1 - high, 1 - low]}


def pixel(
    maps: Float[np.ndarray, "n h w"],
    masks: Bool[np.ndarray, "n h w"],
    labels: Shaped[np.ndarray, " n"],
    seed: int = 0,
) -> Limits:
    """Limits of pooled pixel metrics when whole images are drawn; maps in [0, 1].

    AUROC and AUPRC come from 512 bins: their limits are off by no more than a bin's share.
    """
    counts = np.stack([histograms(m, truth) for m, truth in zip(maps, masks, strict=True)])
    weights = resample(np.asarray(labels) == 1, ROUNDS, seed)
    return _limits(measures(_sums(weights, counts), BINS // 2))


def histograms(
    values: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"]
) -> Float[np.ndarray, "2 b"]:
    """Normal and lesion pixels of one map by value; 0.5 opens the bin BINS / 2."""
    codes = np.minimum((values.astype(np.float32) * BINS).astype(np.intp), BINS - 1)
    both = np.bincount((codes + BINS * mask).ravel(), minlength=2 * BINS)
    return both.reshape(2, BINS).astype(float)


def resample(truth: Bool[np.ndarray, " n"], rounds: int, seed: int) -> Int[np.ndarray, "r n"]:
    """How often each image is drawn in each round; class sizes are kept."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((rounds, len(truth)), np.int64)
    for side in (False, True):
        chosen = np.flatnonzero(truth == side)
        if len(chosen):
            share = np.full(len(chosen), 1 / len(chosen))
            weights[:, chosen] = rng.multinomial(len(chosen), share, rounds)
    return weights


def measures(counts: Float[np.ndarray, "r 2 b"], start: int) -> dict[str, np.ndarray]:
    """Metrics of each row from its negatives and positives by level; `start` opens the called."""
    negative, positive = counts[:, 0, ::-1], counts[:, 1, ::-1]  # highest first
    hits, alarms = positive.cumsum(1), negative.cumsum(1)
    called = counts.shape[2] - start  # levels that are called positive
    tp, fp = (x[:, called - 1] if called else np.zeros(len(x)) for x in (hits, alarms))
    fn, tn = hits[:, -1] - tp, alarms[:, -1] - fp
    with np.errstate(divide="ignore", invalid="ignore"):
        pairs = hits[:, -1] * alarms[:, -1]
        below = alarms[:, -1:] - alarms + negative / 2
        precision_at = np.where(hits + alarms > 0, hits / (hits + alarms), 0)
        recall, specificity = tp / (tp + fn), tn / (tn + fp)
        product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        return {
            "auroc": (positive * below).sum(1) / pairs,
            "auprc": (positive * precision_at).sum(1) / hits[:, -1],
            "accuracy": (tp + tn) / (tp + tn + fp + fn),
            "precision": np.where(tp + fp > 0, tp / (tp + fp), 0),
            "recall": recall,
            "f1": 2 * tp / (2 * tp + fp + fn),
            "specificity": specificity,
            "balanced_accuracy": (recall + specificity) / 2,
            "mcc": np.where(product > 0, (tp * tn - fp * fn) / np.sqrt(product), 0),
            "iou": tp / (tp + fp + fn),
            "dice": 2 * tp / (2 * tp + fp + fn),
        }


def _sums(weights: Int[np.ndarray, "r n"], counts: Float[np.ndarray, "n 2 b"]) -> np.ndarray:
    flat = weights.astype(float) @ counts.reshape(len(counts), -1)
    return flat.reshape(len(weights), 2, -1)


def _limits(values: dict[str, np.ndarray]) -> Limits:
    """Percentiles of each metric; one that is undefined in some round is left out."""
    sound = {name: x for name, x in values.items() if np.isfinite(x).all()}
    return {name: [float(q) for q in np.quantile(x, TAILS)] for name, x in sound.items()}
