"""95% intervals of one run's metrics, over the test images it was measured on.

Images are drawn anew within their class (bootstrap, percentile interval). Every metric is a
function of how many positives and negatives stand at each score, so a round is one row of counts:
no score is sorted twice, and pixels, kept as one histogram per image, cost no more than images.
Rates of images (sensitivity, specificity and their complements) get Wilson's interval instead,
which stays honest at 0 and 1. They say nothing about other draws of the supports.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer, Num, Shaped
from scipy import stats as st

Limits = dict[str, list[float]]
BINS = 512  # of a pixel histogram over [0, 1]; 0.5 is an edge
ROUNDS = 1000
BLOCK, PART = 50, 500  # rounds and images at a time, so that memory does not grow with both
TAILS = (0.025, 0.975)


def image(
    scores: Num[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    threshold: float = 0.5,
    seed: int = 0,
    groups: Shaped[np.ndarray, " n"] | None = None,
) -> Limits:
    """Limits [low, high] of the metrics of `metrics.image_level`; {} unless both classes exist.

    groups: patient of each image; whole patients are drawn, and no rate gets Wilson's interval.
    """
    truth = np.asarray(labels) == 1
    if truth.all() or not truth.any():
        return {}
    weights = resample(truth, ROUNDS, seed, groups)
    found = _limits(of_images(weights, scores, truth, threshold))
    if groups is not None:
        low, high = found["specificity"]
        found |= {"tpr": found["recall"], "fpr": [1 - high, 1 - low]}
        return {n: found[n] for n in found if n not in ("iou", "dice")}
    called = np.asarray(scores) >= threshold
    for names, hits in ((("recall", "tpr"), called[truth]), (("specificity",), ~called[~truth])):
        interval = st.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        found |= dict.fromkeys(names, [float(interval.low), float(interval.high)])
    low, high = found["specificity"]
    return {**{n: found[n] for n in found if n not in ("iou", "dice")}, "fpr": [1 - high, 1 - low]}


def of_images(
    weights: Integer[np.ndarray, "r n"],
    scores: Num[np.ndarray, " n"],
    truth: Bool[np.ndarray, " n"],
    threshold: float = 0.5,
    more: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None,
) -> dict[str, Float[np.ndarray, " r"]]:
    """`measures` of each row of weights, BLOCK rows at a time; more: adds others from the counts.

    Counts [r, 2, b] are healthy and abnormal images by score.
    """
    levels, place = np.unique(scores, return_inverse=True)
    start = int(np.searchsorted(levels, threshold, side="left"))
    found: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(weights), BLOCK):
        rows = weights[first : first + BLOCK].astype(float)
        counts = np.zeros((len(rows), 2, len(levels)))
        for side in (0, 1):
            of = truth == bool(side)
            np.add.at(counts[:, side].T, place[of], rows[:, of].T)
        values = measures(counts, start) | (more(counts) if more else {})
        for name, x in values.items():
            found.setdefault(name, []).append(x)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def pixel(
    maps: Iterable[Float[np.ndarray, "h w"]],
    masks: Iterable[Bool[np.ndarray, "h w"]],
    labels: Shaped[np.ndarray, " n"],
    seed: int = 0,
) -> Limits:
    """Limits of pooled pixel metrics when whole images are drawn; maps in [0, 1]."""
    return of_counts(pixel_counts(maps, masks), labels, seed)


def of_counts(
    counts: Sequence | np.ndarray,
    labels: Shaped[np.ndarray, " n"],
    seed: int = 0,
    groups: Shaped[np.ndarray, " n"] | None = None,
) -> Limits:
    """The same from `pixel_counts` [n, 3, b], or rows of it that are read when needed.

    AUROC, AUPRC and AUPRO come from 512 bins: their limits are off by no more than a bin's share.
    """
    weights = resample(np.asarray(labels) == 1, ROUNDS, seed, groups)
    return _limits(measures(sums(weights, counts), BINS // 2))


def of_means(
    values: Mapping[str, Float[np.ndarray, " n"]],
    labels: Shaped[np.ndarray, " n"],
    seed: int = 0,
    groups: Shaped[np.ndarray, " n"] | None = None,
) -> Limits:
    """Limits of means over images; an image with NaN does not count in that mean."""
    weights = resample(np.asarray(labels) == 1, ROUNDS, seed, groups)
    found = {}
    for name, each in values.items():
        known = np.isfinite(each)
        both = np.stack([np.where(known, each, 0.0), known])[..., None]  # sum and count
        total, count = sums(weights, both.swapaxes(0, 1))[..., 0].T
        with np.errstate(invalid="ignore"):
            found[name] = total / count
    return _limits(found)


def pixel_counts(
    maps: Iterable[Float[np.ndarray, "h w"]], masks: Iterable[Bool[np.ndarray, "h w"]]
) -> Float[np.ndarray, "n 3 b"]:
    """`histograms` of every image, float32."""
    return np.stack([*each_counts(maps, masks)])


def each_counts(
    maps: Iterable[Float[np.ndarray, "h w"]], masks: Iterable[Bool[np.ndarray, "h w"]]
) -> Iterator[Float[np.ndarray, "3 b"]]:
    """`pixel_counts` of one image after the other."""
    made = (histograms(m, truth) for m, truth in zip(maps, masks, strict=True))
    return (x.astype(np.float32) for x in made)


def roc_band(
    scores: Num[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    fpr: Float[np.ndarray, " f"],
    seed: int = 0,
) -> tuple[Float[np.ndarray, " f"], Float[np.ndarray, " f"]]:
    """Pointwise 95% limits of the TPR at each FPR of the grid. Needs both classes."""
    truth = np.asarray(labels) == 1
    order = np.argsort(-np.asarray(scores), kind="stable")
    ends = np.flatnonzero(np.append(np.diff(np.asarray(scores)[order]) != 0, True))
    rates = []
    for weights in resample(truth, ROUNDS, seed):
        drawn, positive = weights[order], truth[order]
        hits, alarms = (np.cumsum(drawn * side)[ends] for side in (positive, ~positive))
        x, y = ([0, *(c / c[-1])] for c in (alarms, hits))
        rates.append(np.interp(fpr, x, y))
    low, high = np.quantile(rates, TAILS, axis=0)
    return low, high


def histograms(
    values: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"]
) -> Float[np.ndarray, "3 b"]:
    """Normal pixels, lesion pixels and coverage of one map by value; 0.5 opens the bin BINS / 2.

    Coverage is as in `ranking`: a lesion pixel weighs 1 / area of its 8-connected component.
    """
    from scipy import ndimage

    codes = np.minimum((values.astype(np.float32) * BINS).astype(np.intp), BINS - 1)
    both = np.bincount((codes + BINS * mask).ravel(), minlength=2 * BINS)
    covered = np.zeros(BINS)
    if mask.any():
        owners = ndimage.label(mask, np.ones((3, 3)))[0][mask]
        covered += np.bincount(codes[mask], 1.0 / np.bincount(owners)[owners], BINS)
    return np.stack([*both.reshape(2, BINS), covered])


def resample(
    truth: Bool[np.ndarray, " n"],
    rounds: int,
    seed: int,
    groups: Shaped[np.ndarray, " n"] | None = None,
) -> Integer[np.ndarray, "r n"]:
    """How often each image is drawn in each round; class sizes are kept.

    groups: whole patients are drawn, within those with and those without an abnormal image.
    """
    rng = np.random.default_rng(seed)
    owner = np.arange(len(truth))
    if groups is not None:
        _, owner = np.unique(groups, return_inverse=True)
    ill = np.zeros(owner.max() + 1, bool)
    np.logical_or.at(ill, owner, truth)
    weights = np.zeros((rounds, len(ill)), np.uint16)
    for side in (False, True):
        chosen = np.flatnonzero(ill == side)
        if len(chosen):
            share = np.full(len(chosen), 1 / len(chosen))
            for row in weights:
                row[chosen] = rng.multinomial(len(chosen), share)
    return weights if groups is None else weights[:, owner]


def measures(counts: Float[np.ndarray, "r c b"], start: int) -> dict[str, np.ndarray]:
    """Metrics of each row from its negatives and positives by level; `start` opens the called.

    A third channel is the coverage, for AUPRO.
    """
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
        covered = {}
        if counts.shape[1] == 3:
            covered["aupro"] = aupro(alarms, counts[:, 2, ::-1].cumsum(1))
        return covered | {
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


def aupro(
    alarms: Float[np.ndarray, "r b"], covered: Float[np.ndarray, "r b"], limit: float = 0.3
) -> Float[np.ndarray, " r"]:
    """As PixelRanks.aupro of each row, from running sums of normal pixels and coverage."""
    x, y = (np.pad(c / c[:, -1:], ((0, 0), (1, 0))) for c in (alarms, covered))
    wide, rise = np.diff(x), np.diff(y)
    used = np.clip(limit - x[:, :-1], 0, wide)
    end = y[:, :-1] + rise * np.divide(used, wide, out=np.zeros_like(wide), where=wide > 0)
    return (used * (y[:, :-1] + end) / 2).sum(1) / limit


def sums(weights: Integer[np.ndarray, "r n"], counts: Sequence | np.ndarray) -> np.ndarray:
    """Counts of each round's images, [r, c, b]; PART images at a time."""
    shape = counts[0].shape
    total = np.zeros((len(weights), math.prod(shape)))
    for first in range(0, len(counts), PART):
        part = [counts[i].ravel() for i in range(first, min(first + PART, len(counts)))]
        total += weights[:, first : first + PART].astype(float) @ np.stack(part).astype(float)
    return total.reshape(len(weights), *shape)


def _limits(values: dict[str, np.ndarray]) -> Limits:
    """Percentiles of each metric; one that is undefined in some round is left out."""
    sound = {name: x for name, x in values.items() if np.isfinite(x).all()}
    return {name: [float(q) for q in np.quantile(x, TAILS)] for name, x in sound.items()}
