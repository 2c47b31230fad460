"""The report's figures, from arrays alone, as bytes of a PNG, the same for the same input.

Colours are Okabe and Ito's, safe for colour-blind readers, and never the only difference: healthy
is hatched or dashed, abnormal is solid.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from scipy.stats import betabinom

from medclip_jax.evaluation import metrics
from medclip_jax.io import pillow
from medclip_jax.report.load import Picture

HEALTHY, ABNORMAL, NEUTRAL = "#0072B2", "#D55E00", "#4d4d4d"
DPI = 144
ROWS = 4  # of the gallery on one printed page
CELL, LABEL, HEAD = 256, 120, 28  # pixels: side of an image, width of the labels, height of titles
GROUND, INK, OUTLINE = "#1b1b1b", "#dcdcdc", "#56B4E9"
NOT_PARTS = ("step", "seconds", "nonfinite")
VALIDATION = "held_out"


def loss(steps: Sequence[Mapping[str, Any]]) -> bytes:
    """One panel per logged part over the steps; a value that was not finite leaves a gap.

    Validation of the fold models on synthetic anomalies comes last, from 0 to 1.
    """
    names = list(dict.fromkeys(name for row in steps for name in row if name not in NOT_PARTS))
    names.sort(key=lambda name: name.startswith(VALIDATION))
    if not names:
        return message("No training step was logged.")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(max(4.2, 3.1 * columns), 2.3 * rows + 0.2)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, name in zip(grid, names, strict=False):
        logged = [row for row in steps if name in row]
        step = np.array([row["step"] for row in logged])
        values = np.array([row[name] for row in logged], dtype=float)
        marker = "o" if np.isfinite(values).sum() < 30 else None
        axes.plot(step, values, color=HEALTHY, lw=1.2, marker=marker, ms=3)
        axes.set_title(name.replace("_", " "), fontsize=10, parse_math=False)
        if name.startswith(VALIDATION):
            axes.axhline(0.5, color=NEUTRAL, lw=1, ls=":")  # chance
            axes.set_ylim(0, 1.03)
        else:
            finite = values[np.isfinite(values)]
            if finite.size > 1 and finite.min() > 0 and finite.max() > 50 * finite.min():
                axes.set_yscale("log")
        _plain(axes)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(names) - columns) : len(names)]:  # nothing below
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelbottom=True)
    return png(figure)


def roc(
    label: Int[np.ndarray, " n"],
    score: Float[np.ndarray, " n"],
    auroc: float | None,
    band: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> bytes:
    """ROC of the image scores, with the point that the calibrated threshold (0.5) chooses.

    band: false-positive rates and the 95% limits, low and high, of the recall there.
    """
    if np.unique(label).size < 2:
        return message("The ROC is undefined: the test images are all of one class.")
    fpr, tpr, _ = metrics.roc(score, label)
    figure, axes = chart("false-positive rate (1 − specificity)", "true-positive rate (recall)")
    name = "ROC" if auroc is None else f"ROC, AUROC {auroc:.3f}"
    axes.plot([0, 1], [0, 1], color=NEUTRAL, lw=1, ls=":", label="chance")
    if band is not None:
        rate, low, high = band
        axes.fill_between(rate, low, high, color=HEALTHY, alpha=0.2, lw=0, label="95% pointwise")
    axes.plot(fpr, tpr, color=HEALTHY, lw=2, label=name)
    chosen = score >= 0.5
    point = chosen[label == 0].mean(), chosen[label == 1].mean()
    axes.plot(*point, "o", color=ABNORMAL, ms=8, ls="none", clip_on=False, label="threshold (0.5)")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    return png(figure)


def scores(label: Int[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> bytes:
    """Histograms of the image scores, healthy and abnormal, each in per cent of its class."""
    figure, axes = chart("image score", "images of the class (%)")
    bins = np.linspace(0, 1, 41)
    kinds = ((0, "healthy", HEALTHY, "////", 0.0), (1, "abnormal", ABNORMAL, None, 0.35))
    for kind, name, colour, hatch, fill in kinds:
        values = np.clip(score[label == kind], 0, 1)
        share = np.histogram(values, bins)[0] * (100 / max(1, values.size))
        name = f"{name} (n = {values.size})"
        axes.stairs(share, bins, fill=True, color=(colour, fill), ec=colour, hatch=hatch, lw=0)
        axes.stairs(share, bins, color=colour, lw=1.5)
        axes.fill([], [], fc=(colour, fill), ec=colour, hatch=hatch, label=name)
    axes.axvline(0.5, color=NEUTRAL, lw=1.5, ls="--", label="threshold (0.5)")
    axes.set_xlim(0, 1)
    _legend_above(figure, 3)
    return png(figure)


def calibration(
    p_value: Float[np.ndarray, " n"], k: int | None, alpha: float | None, attained: float | None
) -> bytes:
    """Observed against expected false alarms on healthy test images, over all rates.

    p_value: of healthy test images only, finite. With k calibration scores, the band holds 95%
    of the observed rates that exchangeable data would give at each attainable rate j/(k+1): the
    count of alarms is beta-binomial(n, j, k+1-j), as the coverage of split conformal prediction is
    Beta distributed (Vovk 2012; Angelopoulos and Bates 2021, section 3.2).
    """
    n = p_value.size
    if n == 0:
        return message("Calibration is undefined: no p-value of a healthy test image.")
    figure, axes = chart("expected false-alarm rate", "observed on healthy test images")
    if k:
        j = np.arange(1, k + 1)
        low, high = (betabinom.ppf(q, n, j, k + 1 - j) / n for q in (0.025, 0.975))
        x, lower, upper = (np.concatenate([[0], y, [1]]) for y in (j / (k + 1), low, high))
        axes.fill_between(
            x, lower, upper, color=NEUTRAL, alpha=0.18, lw=0, label=f"95% by chance, {k} images"
        )
    axes.plot([0, 1], [0, 1], color=NEUTRAL, lw=1, ls=":", label="exact")
    axes.ecdf(np.clip(p_value, 0, 1), color=HEALTHY, lw=2, label=f"observed (n = {n})")
    if attained is not None and 0 <= attained <= 1:
        name = f"attained: {attained:.3f}"
        name += "" if alpha is None or alpha == attained else f" (requested: {alpha:.3f})"
        axes.axvline(attained, color=ABNORMAL, lw=1.5, ls="--", label=name)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    _legend_above(figure, 2)
    return png(figure)


def risk_coverage(
    label: Int[np.ndarray, " n"],
    score: Float[np.ndarray, " n"],
    uncertainty: Float[np.ndarray, " n"],
) -> bytes:
    """Error rate of the decision (score >= 0.5) among the images of least uncertainty.

    Images of equal uncertainty are kept or left out together, so order never matters.
    """
    if label.size == 0:
        return message("Risk is undefined: no test image.")
    if not np.isfinite(uncertainty).all():
        return message("Risk is undefined: the uncertainty was not measured.")
    order = np.argsort(uncertainty, kind="stable")
    wrong = ((score >= 0.5) != (label == 1))[order]
    ends = np.flatnonzero(np.append(np.diff(uncertainty[order]) != 0, True)) + 1
    risk = np.cumsum(wrong)[ends - 1] / ends
    figure, axes = chart("coverage: share of images decided", "error rate among them")
    axes.axhline(wrong.mean(), color=NEUTRAL, lw=1, ls=":", label=f"all images: {wrong.mean():.3f}")
    marker = "o" if ends.size < 30 else None
    axes.plot(
        ends / label.size, risk, color=HEALTHY, lw=2, marker=marker, label="most certain first"
    )
    axes.set(xlim=(0, 1.01), ylim=(0, max(0.05, 1.35 * float(risk.max()))))
    axes.legend(loc="upper right", fontsize=9, frameon=False)
    return png(figure)


def deletion(curves: Mapping[str, Sequence[float]], cam: str) -> bytes:
    """The map's score while patches are replaced by healthy ones, by whose order comes first."""
    figure, axes = chart("share of the patches replaced by healthy ones", "score of the map")
    kinds = (("map", "map", HEALTHY, "-o"), ("grad_cam", cam, ABNORMAL, "--s"))
    for key, name, colour, style in (*kinds, ("random", "random", NEUTRAL, ":^")):
        label = f"{name} first (mean {np.mean(curves[key]):.3f})"
        axes.plot(curves["share"], curves[key], style, color=colour, ms=5, lw=1.8, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    _legend_above(figure, 1)
    return png(figure)


def chart(x: str, y: str) -> tuple[Figure, Axes]:
    figure = _figure(4.6, 3.9)
    axes = figure.subplots()
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    _plain(axes)
    return figure, axes


def _legend_above(figure: Figure, columns: int) -> None:
    """Outside the axes, where it covers no curve."""
    style = {"fontsize": 8.5, "frameon": False, "columnspacing": 1.2, "handlelength": 1.8}
    figure.legend(loc="outside upper center", ncols=columns, **style)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def message(text: str) -> bytes:
    """A chart-sized figure that says why there is no chart."""
    figure = _figure(4.6, 3.9)
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=11, wrap=True)
    return png(figure)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


# --- images with maps, boxes and masks, for print -----------------------------------------------


def gallery(pictures: Sequence[Picture], labels: Sequence[str], cam: str) -> list[bytes]:
    """Pages of at most ROWS rows: image, map, boxes and outline of the mask, Grad-CAM (PNG).

    labels: lines beside each row. cam: title of the last column.
    """
    rows = list(zip(pictures, labels, strict=True))
    return [_page(rows[i : i + ROWS], cam) for i in range(0, len(rows), ROWS)]


def stacked(pages: Sequence[bytes]) -> bytes:
    """The pages below one another as one PNG."""
    return _bytes(Image.fromarray(np.concatenate([Image.open(io.BytesIO(x)) for x in pages])))


def _page(rows: Sequence[tuple[Picture, str]], cam: str) -> bytes:
    sheet = Image.new("RGB", (LABEL + 4 * CELL, HEAD + len(rows) * CELL), GROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, title in enumerate(("image", "anomaly map", "boxes and true mask", cam)):
        place = (LABEL + (column + 0.5) * CELL, HEAD / 2)
        pen.text(place, title, INK, font, anchor="mm")
    for row, (picture, label) in enumerate(rows):
        top = HEAD + row * CELL
        pen.multiline_text((8, top + CELL / 2), label, INK, font, anchor="lm", spacing=6)
        for column, cell in enumerate(_cells(picture)):
            cell.thumbnail((CELL - 6, CELL - 6))
            left = LABEL + column * CELL + (CELL - cell.width) // 2
            sheet.paste(cell, (left, top + (CELL - cell.height) // 2))
    return _bytes(sheet)


def _cells(picture: Picture) -> list[Image.Image]:
    image = Image.open(io.BytesIO(picture.image)).convert("L")
    marked = image.convert("RGB")
    if picture.mask:
        mask = Image.open(io.BytesIO(picture.mask)).convert("L")
        edge = ImageChops.difference(mask.filter(ImageFilter.MaxFilter(5)), mask)
        marked.paste(OUTLINE, mask=edge)
    pen = ImageDraw.Draw(marked)
    y, x = image.height / picture.frame[0], image.width / picture.frame[1]
    for box in picture.boxes:
        first, last = (box.col0 * x, box.row0 * y), (box.col1 * x - 1, box.row1 * y - 1)
        corners = *first, *map(max, first, last)  # of a line, less than a pixel wide here
        pen.rectangle(corners, outline="black", width=3)
        pen.rectangle(corners, outline=pillow.BOX, width=2)
    cells = [image.convert("RGB"), _blend(image, picture.map), marked]
    return cells + ([_blend(image, picture.cam)] if picture.cam else [])


def _blend(image: Image.Image, grey: bytes) -> Image.Image:
    heat = Image.open(io.BytesIO(grey)).resize(image.size, Image.Resampling.BILINEAR)
    unit = np.asarray(heat, np.float32) / 256
    return Image.fromarray(pillow.draw_overlay(np.asarray(image), unit, []))


def _bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
