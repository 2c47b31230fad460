"""Writes report.html and figures/*.png."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from medclip_jax.evaluation import bootstrap
from medclip_jax.explain import boxes
from medclip_jax.files import write_bytes
from medclip_jax.report import captions, figures, load, viewer
from medclip_jax.report.captions import text
from medclip_jax.report.load import Files

ASSETS = Path(__file__).parents[1] / "assets"
GALLERY = ((1, 8), (0, 4))  # how many abnormal and healthy images, sampled by seed


class Cell(NamedTuple):
    """One row of a two-column table."""

    name: str
    value: str | None  # the exact value, None if undefined
    text: str  # as printed
    limits: str | None = None  # 95% interval as printed


def write(workdir: str | Path) -> Path:
    """Write figures/*.png and a self-contained report.html into the workdir; returns its path.

    Reads config.json, metrics.jsonl, split.json, metrics.json and predictions.npz.

    Raises:
        WorkdirError: one of them is missing or corrupt, or the workdir cannot be written.
    """
    workdir = Path(workdir)
    files = load.read(workdir)
    charts = draw(files)
    rows = gallery_rows(files)
    shown = [picture for i in rows if (picture := files.pictures[i])]
    labels = [_label(files.predictions, i, number) for number, i in enumerate(rows, start=1)]
    pages = viewer.gallery(shown, labels, captions.cam_name(files.config))
    pages = pages or [figures.message("This run left no small copies of its images.")]
    for name, png in {**charts, "gallery": viewer.stacked(pages)}.items():
        write_bytes(workdir / "figures" / f"{name}.png", png)
    path = workdir / "report.html"
    write_bytes(path, page(files, charts, pages, rows).encode())
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
    return {
        "loss": figures.loss(files.steps),
        "roc": figures.roc(label, score, files.metrics["image"].get("auroc"), band),
        "scores": figures.scores(label, score),
        "calibration": figures.calibration(
            p_value[(label == 0) & np.isfinite(p_value)],
            calibration.get("k"),
            calibration.get("alpha_requested"),
            calibration.get("alpha_attained"),
        ),
        "risk_coverage": figures.risk_coverage(label, score, uncertainty),
        "deletion": figures.deletion(curves, captions.cam_name(files.config))
        if curves
        else figures.message("No deletion curve was measured in this run."),
    }


def page(
    files: Files, charts: Mapping[str, bytes], gallery: Sequence[bytes], rows: Sequence[int]
) -> str:
    """The whole report as one HTML text; whatever comes from a file is escaped.

    Args:
        charts: PNG by name.
        gallery: pages of the gallery, which shows the test images `rows`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics, predictions = files.metrics, files.predictions
    label = predictions["label"]
    intervals = metrics.get("intervals") or {}
    cam = captions.cam_name(files.config)
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.jinja").render(
        metrics=metrics,
        support=files.split["support"],
        split_kind=files.split.get("kind", metrics["split"]),
        n=len(label),
        healthy=int((label == 0).sum()),
        abnormal=int((label == 1).sum()),
        missing=len({row["id"] for row in files.split["test"]} - set(predictions["id"].tolist())),
        text=text,
        cam=cam,
        steps=len(files.steps),
        deviation_scale=files.deviation_scale,
        image_table=_table(metrics["image"], limits=intervals.get("image")),
        pixel_table=_table(metrics.get("pixel") or {}, limits=intervals.get("pixel")),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        viewer_data=viewer.as_script(files.pictures, cam=cam),
        images=list(_rows(files)),
        pictured=sum(x is not None for x in files.pictures),
        explanations=captions.checks(metrics.get("explanations") or {}, cam),
        calibration=metrics.get("calibration") or {},
        calibration_table=_table(metrics.get("calibration") or {}, skip=("message",)),
        timing_table=_table(metrics.get("timing") or {}, names={}),
        version_table=_table(metrics.get("versions") or {}, names={}),
        config_table=_table(dict(_flat(files.config)), names={}),
        charts={name: viewer.uri(png) for name, png in charts.items()},
        gallery=[viewer.uri(png) for png in gallery],
        gallery_ids=[predictions["id"][i].item() for i in rows],
        most_boxes=boxes.MOST,
        smallest_box=boxes.SMALLEST,
    )


def gallery_rows(files: Files) -> list[int]:
    """Images of the gallery, abnormal ones first."""
    rng = np.random.default_rng(files.metrics["seed"])
    labels, chosen = files.predictions["label"], []
    for label, count in GALLERY:
        rows = [i for i, x in enumerate(files.pictures) if x is not None and labels[i] == label]
        chosen += sorted(rng.permutation(rows)[:count].tolist())
    return chosen


def _label(predictions: Mapping[str, np.ndarray], i: int, number: int) -> str:
    kind = "abnormal" if predictions["label"][i] else "healthy"
    p = predictions["p_value"][i]
    return f"{number}\n{kind}\nscore {predictions['score'][i]:.3f}" + (
        "" if np.isnan(p) else f"\np {p:.3f}"
    )


def _rows(files: Files) -> Iterator[dict[str, Any]]:
    """One row per test image; boxes are None where no small copy was kept."""
    for i in range(len(files.predictions["id"])):
        picture = files.pictures[i] if files.pictures else None
        row = {name: files.predictions[name][i].item() for name in load.COLUMNS}
        yield row | {"boxes": None if picture is None else len(picture.boxes)}


def _table(
    values: Mapping[str, Any],
    *,
    skip: tuple[str, ...] = (),
    names: Mapping[str, str] = captions.NAMES,
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
