"""Numbers of the page as words."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

NAMES = {  # of metrics.json
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "iou": "IoU",
    "dice": "Dice",
    "mcc": "Matthews correlation",
    "fpr": "false-positive rate",
    "tpr": "true-positive rate",
    "tp": "true positives",
    "tn": "true negatives",
    "fp": "false positives",
    "fn": "false negatives",
    "hausdorff": "Hausdorff distance",
    "hausdorff95": "Hausdorff distance, 95th percentile",
    "boundary_f1": "boundary F1",
    "aupro": "AUPRO, false-positive rate up to 0.3",
    "boundary_tolerance": "tolerance of boundary F1",
    "distance_unit": "unit of distances and tolerance",
    "alpha_requested": "false-alarm rate requested (α)",
    "alpha_attained": "false-alarm rate attained",
    "k": "K",
    "n_healthy_test": "healthy test images",
    "least_attainable": "least rate attainable with K images",
    "false_alarm_rate": "observed false-alarm rate",
    "expected_low": "expected of such a sample (95%), from",
    "expected_high": "expected of such a sample (95%), to",
}


def text(value: Any) -> str:
    """A value as the report prints it: four decimals, "undefined" for None."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "undefined"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    return str(value)


def cam_name(config: Mapping[str, Any]) -> str:
    """What explained the scores, as config.json says."""
    settings = config["explanation"]
    name = {"grad_cam": "Grad-CAM", "grad_cam_pp": "Grad-CAM++"}[settings["method"]]
    return name if settings["layer"] == -1 else f"{name}, layer {settings['layer']}"


def checks(explanations: Mapping[str, Any], cam: str) -> list[tuple[str, str, str, str]]:
    """Rows of the table: what was checked, of the map, of Grad-CAM, and what to compare with."""
    rows: list[tuple[str, str, str, str]] = []
    if points := explanations.get("pointing"):
        of_map, of_cam = (points.get(name) or {} for name in ("map", "grad_cam"))
        hits = tuple(text(one.get("hit")) if one else "–" for one in (of_map, of_cam))
        chance = f"{text(of_map.get('chance'))} by chance, {of_map.get('n')} images with a mask"
        rows.append(("Largest value lies in the lesion (pointing game)", *hits, chance))
    if curves := explanations.get("deletion"):
        by_map, by_cam, random = (
            text(float(np.mean(curves[name]))) for name in ("map", "grad_cam", "random")
        )
        rows.append(("Mean score in deletion, less is better", by_map, by_cam, f"{random} random"))
        agreement = text(explanations["spearman"])
        rows.append((f"Rank correlation of {cam} and map", "–", agreement, "1: equal"))
    for name, again in (explanations.get("randomised") or {}).items():
        what = f"Rank correlation with itself, {name.replace('_', ' ')} of the encoder randomised"
        rows.append((what, text(again["map"]), text(again["grad_cam"]), "near 1: ignores weights"))
    return rows
