"""Metrics of anomaly maps in [0, 1] against lesion masks, one image at a time.

Pixels are counted in bins of their value, so memory does not grow with the images. AUROC, AUPRC and
AUPRO are exact for maps of 8 and 16 bits, and within 2^-20 of a map's range otherwise.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped
from scipy import ndimage
from scipy.spatial import cKDTree

from medclip_jax.evaluation import metrics
from medclip_jax.evaluation.metrics import MetricError
from medclip_jax.io import read

BINS = 2**20  # of all images together; 24 MB
IMAGE_BINS = 512  # of one image's histogram, for the bootstrap; 0.5 is an edge
DISTANCES = ("hausdorff", "hausdorff95", "boundary_f1")
MISSED = "_or_diagonal"  # of a distance for which a missed lesion counts as the image's diagonal
COLUMNS = ("tp", "tn", "fp", "fn", *DISTANCES, "diagonal")
Distances = tuple[Float[np.ndarray, " a"], Float[np.ndarray, " b"]]


class PixelMetrics:
    """Takes image after image and measures all of them together.

    Args:
      threshold: values from here on are predicted lesion.
      tolerance: of the boundary F1, in the unit of the distances.
    """

    def __init__(self, threshold: float = 0.5, tolerance: float = 2.0):
        self.threshold, self.tolerance = np.float64(threshold), tolerance
        self.counts = np.zeros((3, BINS))  # normal pixels, lesion pixels, coverage by value
        self.components = 0  # lesions, 8-connected
        self.rows: list[tuple[float, ...]] = []

    def add(
        self,
        values: Num[np.ndarray, "_ _"],
        mask: Shaped[np.ndarray, "_ _"],
        spacing: tuple[float, float] = (1.0, 1.0),
    ) -> Float[np.ndarray, "3 b"]:
        """Count one image: a map in [0, 1], a lesion mask, and the size of a pixel (row, column).

        Returns:
          The image's own histogram of IMAGE_BINS bins: normal pixels, lesion pixels, and lesion
          pixels weighed by 1 / area of their 8-connected component (see metrics.pro_curve).

        Raises:
          MetricError: a map or mask that cannot be measured, by the number of the image.
        """
        values, mask = _checked(values, mask, len(self.rows))
        codes = np.minimum((values.astype(np.float64) * BINS).astype(np.intp), BINS - 1)
        lesion, normal = codes[mask], codes[~mask]
        owners, count = ndimage.label(mask, np.ones((3, 3), int))
        owners = owners[mask]
        self.components += count
        weights = 1.0 / np.bincount(owners)[owners] if count else np.zeros(0)
        parts = (normal, None), (lesion, None), (lesion, weights)
        for row, (where, weight) in zip(self.counts, parts, strict=True):
            np.add.at(row, where, 1.0 if weight is None else weight)
        predicted = values >= self.threshold
        distances = surface_distances(predicted, mask, spacing)
        of_outlines = hausdorff(distances), hausdorff95(distances)
        f1 = boundary_f1(distances, self.tolerance)
        diagonal = float(np.hypot(*np.multiply(mask.shape, spacing)))
        self.rows.append((*metrics.confusion(predicted, mask), *of_outlines, f1, diagonal))
        coarse = BINS // IMAGE_BINS
        own = [np.bincount(codes // coarse, w, IMAGE_BINS) for codes, w in parts]
        return np.stack(own, dtype=float)

    def per_image(self) -> dict[str, Num[np.ndarray, " n"]]:
        """tp, tn, fp, fn, iou, dice, hausdorff, hausdorff95, boundary_f1, diagonal of each image.

        Both empty: iou, dice and distances NaN, boundary F1 1. One empty: iou, dice and boundary F1
        0, hausdorff inf, hausdorff95 NaN.
        """
        if not self.rows:
            raise MetricError("There are no maps to measure; give at least one map and mask.")
        each = {name: np.array([row[i] for row in self.rows]) for i, name in enumerate(COLUMNS)}
        return each | metrics.overlap(each["tp"], each["fp"], each["fn"])

    def averaged(self) -> dict[str, Float[np.ndarray, " n"]]:
        """DISTANCES of each image, NaN for an image that does not count in the mean.

        Hausdorff distances count where lesion and prediction are both there; with the suffix MISSED
        also where a lesion is not predicted at all, as the image's diagonal. The boundary F1 counts
        where either is there: a miss or a false alarm is 0.
        """
        each = self.per_image()
        lesion, predicted = each["tp"] + each["fn"] > 0, each["tp"] + each["fp"] > 0
        values = {n: np.where(lesion & predicted, each[n], np.nan) for n in DISTANCES[:2]}
        for name in DISTANCES[:2]:
            missed = lesion & ~predicted
            values[name + MISSED] = np.where(missed, each["diagonal"], values[name])
        values["boundary_f1"] = np.where(lesion | predicted, each["boundary_f1"], np.nan)
        return values

    def pooled(self) -> dict[str, float]:
        """Metrics over all pixels of all images.

        AUROC, AUPRC, tp, tn, fp, fn and the rates of metrics.rates, IoU and Dice from the pooled
        counts; oracle_dice, the best over all thresholds, which reads the masks; AUPRO up to a
        false-positive rate of 0.3, 8-connected lesions; means over images of `averaged`, and under
        <name>_images of how many. NaN where nothing counts.
        """
        each = self.per_image()
        total = {name: int(each[name].sum()) for name in COLUMNS[:4]}
        used = self.counts[None, :, self.counts[:2].any(0)]
        tp, tn, fp, fn = total.values()
        result: dict[str, Any] = metrics.rates(tp, tn, fp, fn) | metrics.overlap(tp, fp, fn)
        result |= {name: x[0] for name, x in metrics.ranking(used).items()}
        above = used[0, :2, ::-1].cumsum(1)
        dice = metrics.overlap(above[1], above[0], above[1, -1:] - above[1])["dice"]
        result["oracle_dice"] = np.max(dice, initial=0.0) if above[1, -1] else metrics.NAN
        for name, values in self.averaged().items():
            known = values[~np.isnan(values)]
            result[name] = known.mean() if len(known) else metrics.NAN
            total[f"{name}_images"] = len(known)
        return total | {name: float(x) for name, x in result.items()}


def pointing(
    maps: Iterable[Float[np.ndarray, "h w"]],
    cams: Float[np.ndarray, "n p"] | None,
    masks: Iterable[Bool[np.ndarray, "h w"]],
    inside: Iterable[Any] | None = None,
) -> dict[str, dict[str, float | int]] | None:
    """Of map and Grad-CAM: hit, chance, n, empty; None if no image has a lesion mask.

    Hit is the mean share of a map's largest values that lie in the mask, chance the mean share of
    the image that the mask covers (Zhang, 2018). A map without any positive value points nowhere:
    it is a miss, and `empty` counts these.

    Args:
        maps: unit scores, in the frame of the masks.
        cams: a value per patch, None where there is no Grad-CAM.
        masks: True in lesions; an image without any is left out.
        inside: of each frame, what the image fills (`detector.places`); None: all of it.
    """
    hits: dict[str, list[float]] = {"map": [], "grad_cam": []}
    empty = dict.fromkeys(hits, 0)
    chances = []
    places = itertools.repeat(np.s_[:, :]) if inside is None else inside
    for i, (heat, mask, place) in enumerate(zip(maps, masks, places, strict=inside is not None)):
        if not mask.any():
            continue
        each = {"map": heat}
        if cams is not None:
            each["grad_cam"] = read.to_square(cams[i : i + 1], len(mask))[0]
        lesion = mask[place]
        chances.append(lesion.mean())
        for name, values in each.items():
            own = values[place]
            hits[name].append(lesion[own == own.max()].mean() if own.max() > 0 else 0.0)
            empty[name] += int(own.max() <= 0)
    chance = float(np.mean(chances)) if chances else 0.0
    return {
        name: dict(hit=float(np.mean(values)), chance=chance, n=len(values), empty=empty[name])
        for name, values in hits.items()
        if values
    } or None


# --- distances between outlines: MONAI's conventions for empty masks ----------------------------


def surface_distances(
    predicted: Bool[np.ndarray, "h w"],
    mask: Bool[np.ndarray, "h w"],
    spacing: tuple[float, float] = (1.0, 1.0),
) -> Distances:
    """Distance of each predicted outline pixel to the mask's outline, and the reverse.

    An outline pixel has a 4-neighbour that is background or outside the image. Distances are
    Euclidean between pixel centres, in the unit of `spacing` (row, column). Where one of the two
    is empty the distances of the other are inf; an empty one has no distances.
    """
    a, b = (np.argwhere(x & ~ndimage.binary_erosion(x)) * spacing for x in (predicted, mask))
    if len(a) == 0 or len(b) == 0:
        return np.full(len(a), np.inf), np.full(len(b), np.inf)
    return cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]


def hausdorff(distances: Distances) -> float:
    """Largest of both directions: inf if one mask is empty, NaN if both are."""
    return float(np.concatenate(distances).max()) if any(map(len, distances)) else float("nan")


def hausdorff95(distances: Distances) -> float:
    """Larger of the two 95th percentiles (linear interpolation); NaN if either mask is empty.

    Pooling both directions first, as medpy does, gives another number.
    """
    if not all(map(len, distances)):
        return float("nan")
    return float(max(np.percentile(d, 95) for d in distances))


def boundary_f1(distances: Distances, tolerance: float) -> float:
    """F1 of the outline within `tolerance` (unit of the distances), [0, 1].

    Precision is the share of predicted outline pixels near the mask's outline, recall the reverse.
    1 if both masks are empty, 0 if one is.
    """
    if not all(map(len, distances)):
        return float(not any(map(len, distances)))
    precision, recall = (float(np.mean(d <= tolerance)) for d in distances)
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _checked(values: np.ndarray, mask: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Map and boolean mask of image number `index`, or a MetricError."""
    values, mask = np.asarray(values), np.asarray(mask)
    if values.ndim != 2 or values.size == 0:
        raise MetricError(f"Map {index} has shape {values.shape}; maps must be height x width.")
    if mask.shape != values.shape:
        raise MetricError(
            f"Mask {index} has shape {mask.shape} but its map {values.shape}; resize one."
        )
    if not (values.min() >= 0 and values.max() <= 1):
        raise MetricError(f"Map {index} has values outside [0, 1], or NaN; scale the maps first.")
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        raise MetricError(f"Mask {index} has values other than 0 and 1; threshold it first.")
    return values, mask == 1
