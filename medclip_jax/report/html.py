"""Writes report.html and figures/*.png."""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import colormaps

from medclip_jax.errors import printable
from medclip_jax.evaluation import bootstrap
from medclip_jax.explain import boxes
from medclip_jax.files import write_bytes
from medclip_jax.io.pillow import marked
from medclip_jax.report import figures, load
from medclip_jax.report.load import FILES, Files, Picture

ASSETS = Path(__file__).parents[1] / "assets"
GALLERY = ((1, 8), (0, 4))  # how many abnormal and healthy images, sampled by seed

NAMES = json.loads((ASSETS / "metric_names.json").read_text("utf-8"))  # of metrics.json


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
    pages = figures.gallery(shown, labels, cam_name(files.config))
    pages = pages or [figures.message("This run left no small copies of its images.")]
    for name, png in {**charts, "gallery": figures.stacked(pages)}.items():
        write_bytes(workdir / "figures" / f"{name}.png", marked(png))
    path = workdir / "report.html"
    write_bytes(path, page(files, charts, pages, rows).encode())
    return path


def draw(files: Files) -> dict[str, bytes]:
    """The charts as PNG by name: loss, roc, scores, calibration, risk_coverage, deletion."""
    _, label, score, p_value, uncertainty = (files.predictions[name] for name in load.COLUMNS)
    calibration = files.metrics.get("calibration") or {}
    grid, both = np.linspace(0, 1, 101), np.unique(label).size == 2
    unit = files.predictions.get("unit")
    sure = both and bootstrap.varies(label == 1, unit)
    band = (grid, *bootstrap.roc_band(score, label, grid, groups=unit)) if sure else None
    curves = (files.metrics.get("explanations") or {}).get("deletion")
    return {
        "loss": figures.loss(files.steps),
        "roc": figures.roc(label, score, files.metrics["image"].get("auroc"), band),
        "scores": figures.scores(label, score),
        "calibration": figures.calibration(
            p_value[(label == 0) & np.isfinite(p_value)],
            *(calibration.get(name) for name in ("k", "alpha_requested", "alpha_attained")),
        ),
        "risk_coverage": figures.risk_coverage(label, score, uncertainty),
        "deletion": figures.deletion(curves, cam_name(files.config))
        if curves
        else figures.message("No deletion curve was measured in this run."),
    }


def page(
    files: Files, charts: Mapping[str, bytes], gallery: Sequence[bytes], rows: Sequence[int]
) -> str:
    """The whole report as one HTML text; whatever comes from a file is escaped.

    charts: PNG by name. gallery: its pages, which show the test images `rows`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics, predictions = files.metrics, files.predictions
    label, cam = predictions["label"], cam_name(files.config)
    intervals, calibration, explanations = (
        metrics.get(name) or {} for name in ("intervals", "calibration", "explanations")
    )
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
        lesions=metrics.get("lesions"),
        lesion_table=_table(metrics.get("lesions") or {}),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        viewer_data=as_script(files.pictures, cam=cam, most=boxes.MOST, smallest=boxes.SMALLEST),
        images=list(_rows(files)),
        pictured=sum(x is not None for x in files.pictures),
        explanations=checks(explanations, cam),
        calibration=calibration,
        calibration_table=_table({n: x for n, x in calibration.items() if n != "message"}),
        timing_table=_table(metrics.get("timing") or {}, names={}),
        version_table=_table(metrics.get("versions") or {}, names={}),
        config_table=_table(dict(_flat(files.config)), names={}),
        charts={name: uri(png) for name, png in charts.items()},
        gallery=[uri(png) for png in gallery],
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
        if not isinstance(value, list | dict)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list | dict) else value


# --- values as the page prints them --------------------------------------------------------------


def _shown(value: Any) -> Any:
    """Text without control characters, whatever file or setting it is of; markup of ours stays."""
    plain = isinstance(value, str) and not isinstance(value, Markup)
    return "\n".join(map(printable, value.split("\n"))) if plain else value


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


def checks(explanations: Mapping[str, Any], cam: str) -> list[tuple[str, ...]]:
    """Rows of the table: what was checked, of the map, of Grad-CAM, and what to compare with."""
    rows: list[tuple[str, ...]] = []
    if points := explanations.get("pointing"):
        of_map, of_cam = (points.get(name) or {} for name in ("map", "grad_cam"))
        hits = tuple(text(one.get("hit")) if one else "–" for one in (of_map, of_cam))
        chance = f"{text(of_map.get('chance'))} by chance, {of_map.get('n')} images with a mask"
        if empty := of_cam.get("empty"):
            chance += f"; {empty} {cam} empty (misses)"
        rows.append(("Largest value lies in the lesion (pointing game)", *hits, chance))
    if curves := explanations.get("deletion"):
        areas = [text(float(np.mean(curves[name]))) for name in ("map", "grad_cam", "random")]
        rows.append(("Mean score in deletion, less is better", *areas[:2], f"{areas[2]} random"))
        agreement = text(explanations["spearman"])
        rows.append((f"Rank correlation of {cam} and map", "–", agreement, "1: equal"))
    for name, again in (explanations.get("randomised") or {}).items():
        what = f"Rank correlation with itself, {name.replace('_', ' ')} of the encoder randomised"
        rows.append((what, text(again["map"]), text(again["grad_cam"]), "near 1: ignores weights"))
    return rows


def as_script(pictures: Sequence[Picture | None], **more: Any) -> str:
    """JSON for the viewer; it can stand inside a script element, whatever its strings hold."""
    palette = colormaps["inferno"](np.arange(256), bytes=True)[:, :3].tobytes().hex()
    entries = [p and {**p._asdict(), **{name: uri(getattr(p, name)) for name in FILES}}
               for p in pictures]  # fmt: skip
    value = {"colours": palette, "images": entries, **more}
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def uri(data: bytes) -> str:
    """A PNG or JPEG as a data URI, "" for none."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}" if data else ""
