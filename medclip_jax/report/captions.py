"""What the report's page says beside its figures, and its numbers as words."""

import base64
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from medclip_jax.explain.boxes import MOST, SMALLEST
from medclip_jax.report.load import Files


class Picture(NamedTuple):
    """One figure on the page, in one or more pieces that fit on paper."""

    title: str
    alt: str
    caption: str
    pieces: tuple[str, ...]  # data URIs
    dark: bool  # drawn dark already: never recoloured


def text(value: Any) -> str:
    """A value as the report prints it: four decimals, "undefined" for None."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "undefined"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    return str(value)


def checks(held: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the table: what was checked, of the map, of Grad-CAM, and what to compare with."""
    rows: list[tuple[str, str, str, str]] = []
    if points := held.get("pointing"):
        of_map, of_cam = (points.get(name) or {} for name in ("map", "grad_cam"))
        hits = tuple(text(one.get("hit")) if one else "–" for one in (of_map, of_cam))
        chance = f"{text(of_map.get('chance'))} by chance, {of_map.get('n')} images with a mask"
        rows.append(("Largest value lies in the lesion (pointing game)", hits[0], hits[1], chance))
    if curves := held.get("deletion"):
        means = [text(float(np.mean(curves[name]))) for name in ("map", "grad_cam", "random")]
        by_map, by_cam, at_random = means
        what = "Mean score in deletion, less is better"
        rows.append((what, by_map, by_cam, f"{at_random} at random"))
        rows.append(
            ("Rank correlation of Grad-CAM and map", "–", text(held["spearman"]), "1: equal")
        )
    for name, drawn in (held.get("randomised") or {}).items():
        what = f"Rank correlation with itself, {name.replace('_', ' ')} of the tower drawn anew"
        of_map, of_cam = text(drawn["map"]), text(drawn["grad_cam"])
        rows.append((what, of_map, of_cam, "near 1: does not depend on the weights"))
    return rows


def words_of(files: Files) -> dict[str, tuple[str, str, str]]:
    """Title, text for who cannot see it, and caption of every chart."""
    auroc = text(files.metrics["image"].get("auroc"))
    attained = text((files.metrics.get("calibration") or {}).get("alpha_attained"))
    return {
        "roc": (
            "ROC of the image scores",
            f"ROC curve of the image scores; AUROC {auroc}.",
            "The dot is the threshold that was set from healthy images alone. The band holds the "
            "curve in 95% of sets of test images, at each false-positive rate for itself.",
        ),
        "scores": (
            "Image scores",
            "Histograms of the image scores of healthy and of abnormal test images, "
            "with the threshold at 0.5.",
            "0.5 is the calibrated threshold; scores above it are flagged.",
        ),
        "calibration": (
            "Calibration of the p-values",
            "Observed against expected false-alarm rate on healthy test images; "
            f"the level used is {attained}.",
            "On the diagonal, a level of 10% gives 10% false alarms; the grey band is what "
            "K supports allow by chance.",
        ),
        "risk_coverage": (
            "Risk against coverage",
            "Error rate among the most certain images against the share of images decided.",
            "If the uncertainty is useful, the curve falls towards the left.",
        ),
        "loss": (
            "Training curves",
            f"The logged parts of the loss over {len(files.steps)} logged steps, one panel each.",
            "Logarithmic axes where a part spans more than a factor of 50. Held out: copies "
            "trained without a part of the supports tell these from their synthetic anomalies; "
            "accuracy is at the largest score of the other supports, the dotted line is chance.",
        ),
        "deletion": (
            "Deletion",
            "Score of the map while its patches are replaced by those of a healthy support, in the "
            "order of the map, of Grad-CAM and at random.",
            "An order that names what the score rests on lets it fall faster than a random one; "
            "0.5 is the pixel threshold.",
        ),
    }


def pictures(
    files: Files, charts: Mapping[str, bytes], sheets: list[bytes]
) -> Iterator[tuple[str, Picture]]:
    """Every figure of the page by name."""
    words = words_of(files)
    for name, (title, alt, caption) in words.items():
        yield name, Picture(title, alt, caption, (_uri(charts[name]),), False)
    yield (
        "gallery",
        Picture(
            "Gallery",
            f"{len(files.panels)} test images, each with its heat map, boxes and mask outline; "
            "the table below names them.",
            "Heat maps share one scale: 0.5, the white line, is the pixel threshold; the colours "
            "are blended with the image. Boxes surround what is above 0.5, "
            f"at most {MOST}, specks below 1/{SMALLEST} of the image left out.",
            tuple(map(_uri, sheets)),
            bool(files.panels),
        ),
    )


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
