"""Lesions found by boxes: recall at the decision, and FROC over all box scores.

A lesion is an 8-connected component of the mask (or a box of an annotator); it is found by a box of
enough IoU with its own. Stretching an image changes no IoU, so any frame serves.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from medclip_jax.explain.boxes import decided

IOUS = (0.1, 0.3)
RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # false positives per image, as LUNA16 averages
SMALL = 0.01  # share of the image that a small lesion covers at most


class Image(NamedTuple):
    """Boxes and lesions of one image; a box is row0, col0, row1, col1, ends not included."""

    boxes: Float[np.ndarray, "b 4"]
    score: Float[np.ndarray, " b"]
    lesions: Float[np.ndarray, "c 4"]
    small: Bool[np.ndarray, " c"]
    alarm: bool


def image_of(map: Float[np.ndarray, "h w"], alarm: bool, mask: Bool[np.ndarray, "h w"]) -> Image:
    """Of a unit map and a lesion mask of the same frame; boxes are also those of images passed."""
    boxes = decided(map, alarm, of_passed=True)
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    places = ndimage.find_objects(labels, count)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return Image(
        np.array([box[:4] for box in boxes], float).reshape(-1, 4),
        np.array([box.score for box in boxes], float),
        np.array([(r.start, c.start, r.stop, c.stop) for r, c in places], float).reshape(-1, 4),
        areas <= SMALL * mask.size,
        alarm,
    )


def measured(images: Sequence[Image], label: Sequence[int] | np.ndarray) -> dict[str, Any] | None:
    """Of all images, healthy ones (label 0) among them; None where no lesion is known.

    Returns:
      count and small_count of lesions; recall and small_recall, the share that a box of an image
      with an alarm finds at the first of IOUS; boxes_per_healthy_image; false_positives, RATES, and
      froc, by IoU the sensitivity at each of them and its mean.
    """
    if not sum(len(image.lesions) for image in images):
        return None
    small = np.concatenate([image.small for image in images])
    alarms = [x if x.alarm else x._replace(boxes=x.boxes[:0], score=x.score[:0]) for x in images]
    seen = np.concatenate([found(image, IOUS[0])[1] for image in alarms])
    healthy = [len(image.score) for image, y in zip(alarms, label, strict=True) if y == 0]
    curves = {}
    for least in IOUS:
        values = froc(images, least)
        curves[str(least)] = {"sensitivity": values, "mean": float(np.mean(values))}
    return {
        "count": len(small),
        "small_count": int(small.sum()),
        "recall": float(seen.mean()),
        "small_recall": float(seen[small].mean()) if small.any() else None,
        "boxes_per_healthy_image": float(np.mean(healthy)) if healthy else None,
        "false_positives": list(RATES),
        "froc": curves,
    }


def froc(images: Sequence[Image], least: float) -> list[float]:
    """Highest sensitivity among thresholds of the score with at most each of RATES per image."""
    score = np.concatenate([image.score for image in images])
    hit = np.concatenate([found(image, least)[0] for image in images])
    order = np.argsort(-score, kind="stable")
    hits, misses = (np.append(0, np.cumsum(x[order])) for x in (hit, ~hit))
    end = np.append(True, np.append(np.diff(score[order]) != 0, True)[: len(score)])
    hits, misses = hits[end], misses[end]  # boxes of equal scores come together
    lesions = sum(len(image.lesions) for image in images)
    return [float(hits[misses <= rate * len(images)].max() / lesions) for rate in RATES]


def found(image: Image, least: float) -> tuple[Bool[np.ndarray, " b"], Bool[np.ndarray, " c"]]:
    """Which boxes are hits, which lesions are found.

    Boxes by falling score take the free lesion of largest IoU, `least` or more; a second box on a
    lesion is no hit (Everingham et al., PASCAL VOC, IJCV 2010).
    """
    overlap = iou(image.boxes, image.lesions)
    hit, seen = np.zeros(len(image.boxes), bool), np.zeros(len(image.lesions), bool)
    for i in np.argsort(-image.score, kind="stable") if len(seen) else ():
        free = np.where(seen, -1.0, overlap[i])
        best = int(free.argmax())
        if free[best] >= least:
            hit[i] = seen[best] = True
    return hit, seen


def iou(a: Float[np.ndarray, "b 4"], b: Float[np.ndarray, "c 4"]) -> Float[np.ndarray, "b c"]:
    """Intersection over union of every pair of boxes that are not empty."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)
