"""AUROC, average precision and AUPRO over the pooled pixels of any number of images.

Pixels are counted in bins of equal width, so memory does not grow with the number of images.
Pixels of one bin count as ties. Where values lie at least a bin apart or are equal (maps of 8 bits,
for example) every result is exact; otherwise `*_error` bounds the difference to the exact result.
"""

import numpy as np
from jaxtyping import Bool, Float, Num
from scipy import ndimage

BINS = 2**20  # 24 MB of counters; 8-bit and 16-bit maps are exact
EIGHT_CONNECTED = np.ones((3, 3), int)
Curve = tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]


class PixelRanks:
    """Counts of normal and lesion pixels by value in [low, high].

    `coverage` counts each lesion pixel with weight 1 / area of its component, so that its
    running sum is the per-region overlap (PRO) times the number of components.
    """

    def __init__(self, low: float, high: float, bins: int = BINS):
        self.low = low
        self.scale = (bins - 1) / (high - low) if high > low else 0.0
        self.normal = np.zeros(bins, np.int64)
        self.lesion = np.zeros(bins, np.int64)
        self.coverage = np.zeros(bins)
        self.components = 0

    def add(self, values: Num[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"]) -> None:
        """Count one image; values must lie in [low, high]. Components are 8-connected."""
        # Rounding is monotone, so this never swaps two values; at most it makes them ties.
        codes = ((values - np.float64(self.low)) * self.scale).astype(np.intp)
        np.add.at(self.normal, codes[~mask], 1)
        if not mask.any():
            return
        np.add.at(self.lesion, codes[mask], 1)
        labels, count = ndimage.label(mask, EIGHT_CONNECTED)
        owners = labels[mask]
        np.add.at(self.coverage, codes[mask], 1.0 / np.bincount(owners)[owners])
        self.components += count

    def _descending(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lesion, normal and coverage of the bins in use, highest value first."""
        used = np.flatnonzero(self.lesion + self.normal)[::-1]
        return self.lesion[used].astype(float), self.normal[used].astype(float), self.coverage[used]

    def auroc(self) -> float:
        """P(lesion > normal) + P(equal) / 2; NaN unless both kinds of pixel exist."""
        lesion, normal, _ = self._descending()
        pairs = lesion.sum() * normal.sum()
        above = np.cumsum(lesion) - lesion / 2
        return min(float(above @ normal / pairs), 1.0) if pairs else float("nan")

    def auroc_error(self) -> float:
        """Half the share of pairs that share a bin bounds the error of `auroc`."""
        lesion, normal, _ = self._descending()
        pairs = lesion.sum() * normal.sum()
        return float(lesion @ normal / 2 / pairs) if pairs else float("nan")

    def average_precision(self) -> float:
        """Sum of precision times step in recall; NaN without lesion pixels."""
        lesion, normal, _ = self._descending()
        if not lesion.sum():
            return float("nan")
        hits = np.cumsum(lesion)
        precision = hits / (hits + np.cumsum(normal))
        return float(lesion @ precision / lesion.sum())

    def average_precision_error(self) -> float:
        """Bound: in each bin the lesion pixels may come all first or all last."""
        lesion, normal, _ = self._descending()
        if not lesion.sum():
            return float("nan")
        hits, alarms = np.cumsum(lesion), np.cumsum(normal)
        used = hits / (hits + alarms)
        best = hits / np.maximum(hits + alarms - normal, 1)
        first = hits - lesion + 1
        worst = first / (first + alarms)
        return float(lesion @ np.maximum(best - used, used - worst) / lesion.sum())

    def pro_curve(self) -> Curve:
        """False-positive rate over all normal pixels and mean coverage, from (0, 0) to (1, 1)."""
        _, normal, coverage = self._descending()
        fpr = np.concatenate([[0.0], np.cumsum(normal)]) / normal.sum()
        covered = np.cumsum(coverage)
        # The last sum is the number of components but for rounding, which could exceed 1.
        return fpr, np.concatenate([[0.0], covered / covered[-1]])

    def aupro(self, limit: float = 0.3) -> float:
        """Area under the PRO curve up to the false-positive rate `limit`, divided by it.

        8-connected components, linear interpolation at the limit (Bergmann et al., MVTec AD,
        IJCV 2021). NaN without components or without normal pixels.
        """
        if not self.components or not self.normal.any():
            return float("nan")
        fpr, pro = self.pro_curve()
        end = int(np.searchsorted(fpr, limit, side="right"))
        x, y = fpr[:end], pro[:end]
        if end < len(fpr):
            share = (limit - fpr[end - 1]) / (fpr[end] - fpr[end - 1])
            x = np.append(x, limit)
            y = np.append(y, pro[end - 1] + share * (pro[end] - pro[end - 1]))
        return min(float(np.trapezoid(y, x) / limit), 1.0)

    def aupro_error(self, limit: float = 0.3) -> float:
        """Bound: inside a bin the exact curve stays in the rectangle whose diagonal is used."""
        if not self.components or not self.normal.any():
            return float("nan")
        fpr, pro = self.pro_curve()
        rectangles = np.diff(fpr) * np.diff(pro)
        return float(rectangles[fpr[:-1] <= limit].sum() / limit)
