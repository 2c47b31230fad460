"""report.html and its figures, from the files of a workdir alone: no model, no data set, no JAX."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from medclip_jax.evaluation import bootstrap
from medclip_jax.files import write_bytes
from medclip_jax.report import captions, figures, gallery, rerun_command, viewer
from medclip_jax.report.captions import text
from medclip_jax.report.load import Files, read

ROOT = Path(__file__).parents[1] / "assets"

NAMES = {
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
    "alpha_requested": "level asked for (α)",
    "alpha_attained": "level attained",
    "k": "K",
    "n_healthy_test": "healthy test images",
    "least_attainable": "least level attainable with K images",
    "false_alarm_rate": "observed false-alarm rate",
    "expected_low": "expected of such a draw (95%), from",
    "expected_high": "expected of such a draw (95%), to",
}


class Cell(NamedTuple):
    """One row of a two-column table."""

    name: str
    value: str | None  # the exact value, None if undefined
    text: str  # as printed
    limits: str | None = None  # 95% interval as printed


def write(workdir: str | Path) -> Path:
    """Write figures/*.png and a self-contained report.html into the workdir; returns its path.

    Reads config.json, metrics.jsonl, split.json, metrics.json and predictions.npz.
    The same files give the same bytes. Raises WorkdirError if one is missing or unreadable, or if
    the workdir cannot be written.
    """
    workdir = Path(workdir)
    files = read(workdir)
    pngs = draw(files)
    sheets = gallery.pages(files.panels) or [figures.message("No image was kept for the gallery.")]
    for name, png in {**pngs, "gallery": gallery.stack(sheets)}.items():
        write_bytes(workdir / "figures" / f"{name}.png", png)
    path = workdir / "report.html"
    write_bytes(path, page(files, pngs, sheets).encode())
    return path


def draw(files: Files) -> dict[str, bytes]:
    """The charts as PNG by name: loss, roc, scores, calibration, risk_coverage, deletion."""
    label, score, p_value, uncertainty = (
        files.predictions[name] for name in ("label", "score", "p_value", "uncertainty")
    )
    calibration = files.metrics.get("calibration") or {}
    grid = np.linspace(0, 1, 101)
    band = None
    if np.unique(label).size == 2:
        band = (grid, *bootstrap.roc_band(score, label, grid))
    curves = (files.metrics.get("explanations") or {}).get("deletion")
    alarms = p_value[(label == 0) & np.isfinite(p_value)]
    return {
        "loss": figures.loss(files.steps),
        "roc": figures.roc(label, score, files.metrics["image"].get("auroc"), band),
        "scores": figures.scores(label, score),
        "calibration": figures.calibration(
            alarms,
            calibration.get("k"),
            calibration.get("alpha_requested"),
            calibration.get("alpha_attained"),
        ),
        "risk_coverage": figures.risk_coverage(label, score, uncertainty),
        "deletion": figures.deletion(curves)
        if curves
        else figures.message("No deletion curve was measured in this run."),
    }


def page(files: Files, charts: Mapping[str, bytes], sheets: list[bytes]) -> str:
    """The whole report as one HTML text; whatever comes from a file is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics, predictions = files.metrics, files.predictions
    label = predictions["label"]
    pictures = dict(captions.pictures(files, charts, sheets))
    sure = metrics.get("intervals") or {}
    script = (ROOT / "report.js").read_text(encoding="utf-8")
    shown = {"colours": viewer.colours(), "images": files.pictures}
    return environment.get_template("report.html.jinja").render(
        metrics=metrics,
        support=files.split["support"],
        split_kind=files.split.get("kind", metrics["split"]),
        n=len(label),
        healthy=int((label == 0).sum()),
        abnormal=int((label == 1).sum()),
        missing=len({row["id"] for row in files.split["test"]} - set(predictions["id"].tolist())),
        text=text,
        image_table=_table(metrics["image"], limits=sure.get("image")),
        pixel_table=_table(metrics.get("pixel") or {}, limits=sure.get("pixel")),
        sure=bool(sure.get("image") or sure.get("pixel")),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        shown=viewer.as_script(shown),
        everything=_all_rows(files),
        pictured=sum(x is not None for x in files.pictures),
        explanations=captions.checks(metrics.get("explanations") or {}),
        command=rerun_command.again(files.config),
        calibration=metrics.get("calibration") or {},
        calibration_table=_table(metrics.get("calibration") or {}, skip=("message",)),
        timing_table=_table(metrics.get("timing") or {}, names={}),
        version_table=_table(metrics.get("versions") or {}, names={}),
        config_table=_table(dict(_flat(files.config)), names={}),
        pictures=pictures,
        rows=_gallery_rows(files),
    )


def _table(
    values: Mapping[str, Any],
    *,
    skip: tuple[str, ...] = (),
    names: Mapping[str, str] = NAMES,
    limits: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """Rows for the plain values; curves and other lists are drawn, not listed."""
    return [
        Cell(
            names.get(name, name.replace("_", " ") if names else name),
            None if value is None else str(value),
            text(value),
            " to ".join(map(text, limits[name])) if limits and name in limits else None,
        )
        for name, value in values.items()
        if name not in skip and not isinstance(value, list | dict)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list | dict) else value


def _all_rows(files: Files) -> list[dict[str, Any]]:
    """One row per test image for the table; boxes are None where no small copy was kept."""
    columns = ("id", "label", "score", "p_value", "uncertainty")
    rows = []
    for i in range(len(files.predictions["id"])):
        row = {name: files.predictions[name][i].item() for name in columns}
        kept = files.pictures[i] if files.pictures else None
        rows.append({**row, "boxes": len(kept["boxes"]) if kept else None})
    return rows


def _gallery_rows(files: Files) -> list[dict[str, Any]]:
    columns = ("id", "label", "score", "p_value", "uncertainty")
    rows = []
    for number, (i, panel) in enumerate(zip(files.places, files.panels, strict=True), start=1):
        row = {name: files.predictions[name][i].item() for name in columns}
        rows.append({**row, "number": number, "boxes": len(panel.boxes)})
    return rows
