"""Is the uncertainty worth anything? What remains when the most uncertain images are set aside.

Measures of one image's uncertainty, larger is less certain; p_t is its unit score in pass t:

    sd                  standard deviation of p_t over the MC-dropout passes (equation 10)
    entropy             predictive entropy H(mean p_t), H(p) = -p ln p - (1 - p) ln(1 - p), nats
    mutual_information  H(mean p_t) - mean H(p_t), on which the passes disagree, nats (BALD,
                        Houlsby et al. 2011)
    ensemble            standard deviation over the fold params
    distance            -|score - 0.5|, the nearness to the threshold, which costs nothing

The last two are the baselines that the others have to beat. Unit scores are no frequencies: 0.5 is
the threshold.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import special
from sklearn.metrics import roc_auc_score

COVERAGE = (1.0, 0.9, 0.8, 0.7, 0.5)
NAMES = ("entropy", "mutual_information", "ensemble")

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


def measure(
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
    """Share of wrong decisions among the 1, 2, ... n most certain images."""
    order = np.argsort(uncertainty, kind="stable")
    return np.cumsum(np.asarray(wrong, float)[order]) / np.arange(1, len(order) + 1)


def _rejection(score, label, wrong, uncertainty) -> dict[str, Any]:
    """aurc, risk and auroc of one measure; see `measure`."""
    curve = risk_coverage(wrong, uncertainty)
    order = np.argsort(uncertainty, kind="stable")
    remaining = [order[: max(1, round(share * len(order)))] for share in COVERAGE]
    return {
        "aurc": float(curve.mean()),
        "risk": [float(curve[len(rows) - 1]) for rows in remaining],
        "auroc": [
            float(roc_auc_score(label[rows], score[rows])) if np.ptp(label[rows]) else None
            for rows in remaining
        ],
    }
