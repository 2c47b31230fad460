"""The tables of finished runs: means, intervals and tests of every data set, K and method.

A cell is {method: its runs, a dict each as `reproduce.read` gives them}. Published numbers stand in
columns and rows of their own, named as context.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from published import IMAGE_AUROC, PIXEL_AUROC, K

from medclip_jax.evaluation import draw_bootstrap, significance

COLUMNS = (
    *(("image", name) for name in ("auroc", "auprc")),
    ("image", "sensitivity_at_90"),
    *(("calibration", name) for name in ("alpha_attained", "false_alarm_rate")),
    *(("pixel", name) for name in ("auroc", "auprc", "aupro", "dice")),
    ("oracle", "f1"),
)
CONTEXT = {("image", "auroc"): IMAGE_AUROC, ("pixel", "auroc"): PIXEL_AUROC}
PAPER = (  # which table of the paper shows what
    ("Table 1", "busi", ("image", "auroc")),
    ("Table 2", "busi", ("pixel", "auroc")),
    ("Table 3", "chexpert", ("image", "auroc")),
    ("Table 4", "brain_mri", ("image", "auroc")),
    ("Not in the paper", "chest_xray", ("image", "auroc")),
)
Run = Mapping[str, Any]
Cell = Mapping[str, Sequence[Run]]


class Number(NamedTuple):
    """A metric of one method over its draws; None where it is undefined."""

    mean: float | None
    sd: float | None  # over draws, ddof 1
    low: float | None  # 95%, two-level bootstrap over draws and test images
    high: float | None


Column = tuple[str, str]
Cells = Mapping[tuple[str, int], Cell]
Methods = Mapping[str, Mapping[Column, Number]]
Found = Mapping[tuple[str, int], Methods]


class Tests(NamedTuple):
    """A method against ours on the draws that both have."""

    wilcoxon: float  # over draws, Holm-corrected within the cell
    least: float  # what Wilcoxon's p could reach with so many draws, before Holm
    t: float | None  # paired t over draws, Holm-corrected; None if all differences are equal
    delong: int  # draws in which AUROCs differ at p < 0.05 after Holm
    draws: int


def numbers(runs: Sequence[Run]) -> dict[Column, Number]:
    """Every column of one method."""
    limits = intervals(runs)
    found = {}
    for group, name in COLUMNS:
        values = [(r[group] or {}).get(name) for r in runs]
        known = np.array([np.nan if v is None else v for v in values], float)
        if not np.isfinite(known).all():
            found[group, name] = Number(None, None, None, None)
            continue
        sd = float(known.std(ddof=1)) if len(known) > 1 else None
        low, high = limits.get((group, name), (None, None))
        found[group, name] = Number(float(known.mean()), sd, low, high)
    return found


def intervals(runs: Sequence[Run]) -> dict[Column, tuple[float, float]]:
    """Two-level 95% limits by column; draws may be tested on different images."""
    told = ["label", "patient"] if all("patient" in r for r in runs) else ["label"]
    columns = ([r[name] for r in runs] for name in told)
    places, (label, *patients) = draw_bootstrap.together([r["id"] for r in runs], *columns)
    patient = patients[0] if patients else None
    of_image = draw_bootstrap.image([r["score"] for r in runs], label, patient, places=places)
    found = {("image", name): x for name, x in of_image.items()}
    if "false_alarm_rate" in of_image:
        found["calibration", "false_alarm_rate"] = of_image["false_alarm_rate"]
    counts = [pixel_counts(r) for r in runs]
    if all(c is not None for c in counts):
        known = [c.any((1, 2)) for c in counts]
        counts = [c[sure] for c, sure in zip(counts, known, strict=True)]
        at = [place[sure] for place, sure in zip(places, known, strict=True)]
        of_pixel = draw_bootstrap.pixel(counts, label, patient, places=at)
        found |= {("pixel", name): x for name, x in of_pixel.items()}
    # few draws reach beyond what a rate can be
    return {name: (max(x.low, 0.0), min(x.high, 1.0)) for name, x in found.items()}


def pixel_counts(run: Run) -> np.ndarray | None:
    """intervals.pixel_counts of a run, read when needed; None where no masks are known."""
    with np.load(run["arrays"], allow_pickle=False) as held:
        return held["pixel_counts"] if "pixel_counts" in held.files else None


def tests(cell: Cell) -> dict[str, Tests]:
    """Each method against ours, on the image AUROC of the draws that both have."""
    ours = {r["seed"]: r for r in cell.get("ours", [])}
    held = {}
    for method, runs in cell.items():
        pairs = [(ours[r["seed"]], r) for r in runs if r["seed"] in ours]
        if method == "ours" or not pairs or None in [r["image"]["auroc"] for x in pairs for r in x]:
            continue
        a, b = (np.array([pair[i]["image"]["auroc"] for pair in pairs]) for i in (0, 1))
        each = [significance.delong(x["score"], y["score"], x["label"]).p for x, y in pairs]
        t = significance.paired_t(a, b).p if len(pairs) > 1 else np.nan
        held[method] = significance.wilcoxon(a, b), t, np.nan_to_num(each, nan=1.0)
    if not held:
        return {}
    signed = significance.holm(np.array([w.p for w, _, _ in held.values()]))
    plain = np.array([t for _, t, _ in held.values()])
    paired = significance.holm(np.nan_to_num(plain, nan=1.0))
    sizes = np.cumsum([len(each) for *_, each in held.values()])
    delong = np.split(significance.holm(np.concatenate([e for *_, e in held.values()])), sizes[:-1])
    return {
        method: Tests(
            float(signed[i]),
            held[method][0].least_p,
            float(paired[i]) if np.isfinite(plain[i]) else None,
            int((delong[i] < 0.05).sum()),
            len(delong[i]),
        )
        for i, method in enumerate(held)
    }


# --- files ------------------------------------------------------------------------------------


def measured(cells: Cells) -> Found:
    """`numbers` of every data set, K and method: the long part, made once."""
    return {at: {m: numbers(runs) for m, runs in cell.items()} for at, cell in cells.items()}


def summary(cells: Cells, found: Found) -> str:
    """CSV, a line per data set, K, method and metric; the last columns are published context."""
    sources = list(dict.fromkeys(s for x in CONTEXT.values() for y in x.values() for s in y))
    head = ["dataset", "k", "method", "draws", "metric", "mean", "sd", "low95", "high95"]
    head += ["wilcoxon_p_holm", "wilcoxon_least_p", "paired_t_p_holm", "delong_significant"]
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow([*head, *(f"context, published: {source}" for source in sources)])
    for (dataset, k), cell in cells.items():
        against = tests(cell)
        for method, runs in cell.items():
            p = against.get(method)
            for column, number in found[dataset, k][method].items():
                tested = [p.wilcoxon, p.least, p.t, p.delong] if p else [None] * 4
                tested = tested if column == ("image", "auroc") else [None] * 4
                row = [dataset, k, method, len(runs), " ".join(column), *number, *tested]
                out.writerow([*row, *(published(column, dataset, k, s) for s in sources)])
    return file.getvalue()


def published(column: Column, dataset: str, k: int, source: str) -> float | None:
    """What a source printed for this metric, data set and K."""
    row = CONTEXT.get(column, {}).get(dataset, {}).get(source)
    return row[K.index(k)] if row and k in K else None


def markdown(cells: Cells, found: Found, draws_asked: int) -> str:
    """The paper's tables by K, then everything of each data set and K."""
    learners = {r.get("learner", "joint") for cell in cells.values() for r in cell.get("ours", [])}
    lines = ["# Results", "", notes(draws_asked, learners), ""]
    for title, dataset, column in PAPER:
        mine = {k: methods for (name, k), methods in found.items() if name == dataset}
        if any(x[column].mean is not None for methods in mine.values() for x in methods.values()):
            lines += by_k(title, dataset, column, mine)
    for (dataset, k), cell in cells.items():
        lines += whole(dataset, k, cell, found[dataset, k])
    return "\n".join(lines) + "\n"


def notes(draws_asked: int, learners: set[str]) -> str:
    """What the tables keep to. learners: of the runs of ours."""
    least = significance.wilcoxon(np.arange(1.0, draws_asked + 1), np.zeros(draws_asked)).least_p
    if learners <= {"joint"}:
        episodes = "Joint training without episodes is `ours` itself, whose learner is joint."
    else:
        names = ", ".join(sorted(learners))
        episodes = f"`ours` learned by {names}; `joint` is the same without episodes."
    return (
        "Mean ± sd over support draws; draw i is seed i, the same for every method. A data set "
        "without a test part (BUSI, brain MRI) gives each draw a pool of its own, so its healthy "
        "test images differ, at K = 32 too. In brackets the 95% interval of a two-level bootstrap"
        " over draws and test images (patients where they are known). Last step of a fixed "
        "budget; no test label is read before scoring, except for the columns named oracle, which"
        " are for comparison only. p: Wilcoxon over draws against ours and the paired t test, "
        "Holm-corrected within "
        f"the table; with {draws_asked} draws Wilcoxon's p cannot be below {least:.4g} even before "
        "that. DeLong: draws in which the AUROCs differ at p < 0.05 after Holm's correction. "
        f"{episodes}"
    )


def by_k(title: str, dataset: str, column: Column, mine: Mapping[int, Methods]) -> list[str]:
    """One metric: methods by K, then what others published, in a table of its own."""
    ks = sorted(mine)
    head = f"| method | {' | '.join(f'K = {k}' for k in ks)} |"
    rule = "|---" * (len(ks) + 1) + "|"
    lines = [f"## {title}: {dataset}, {' '.join(column)}", "", head, rule]
    for method in dict.fromkeys(m for methods in mine.values() for m in methods):
        shown = [mine[k].get(method) for k in ks]
        told = [brief(x[column]) if x else "" for x in shown]
        lines.append(f"| {method} | {' | '.join(told)} |")
    sources = CONTEXT.get(column, {}).get(dataset, {})
    if sources:
        lines += ["", f"{ELSEWHERE}:", "", head.replace("method", "published by"), rule]
        for source in sources:
            values = [published(column, dataset, k, source) for k in ks]
            told = ["" if v is None else f"{v:.3f}" for v in values]
            lines.append(f"| {source} | {' | '.join(told)} |")
    return [*lines, ""]


ELSEWHERE = "Context, published elsewhere with other splits, backbones and stopping rules"


def whole(dataset: str, k: int, cell: Cell, found: Methods) -> list[str]:
    """Methods by every column, with tests against ours; context last."""
    names = ["method", "draws", *(" ".join(column) for column in COLUMNS)]
    names += ["Wilcoxon p", "t test p", "DeLong"]
    lines = [f"## {dataset}, K = {k}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    against = tests(cell)
    for method, runs in cell.items():
        told = [brief(number) for number in found[method].values()]
        p = against.get(method)
        t = "–" if p is None or p.t is None else f"{p.t:.3f}" if p.t >= 5e-4 else "< 0.001"
        tested = [f"{p.wilcoxon:.3f}", t, f"{p.delong} of {p.draws}"] if p else [""] * 3
        lines.append(f"| {method} | {len(runs)} | {' | '.join([*told, *tested])} |")
    context = []
    for column, numbers_of in CONTEXT.items():
        for source in numbers_of.get(dataset, {}):
            value = published(column, dataset, k, source)
            if value is not None:
                context.append(f"- {source}: {' '.join(column)} {value:.3f}")
    if context:
        lines += ["", f"{ELSEWHERE}:", "", *context]
    return [*lines, ""]


def brief(number: Number) -> str:
    """Mean ± sd (low to high); what is undefined is left out, and is "–" if all is."""
    if number.mean is None:
        return "–"
    sd = "" if number.sd is None else f" ± {number.sd:.3f}"
    limits = "" if number.low is None else f" ({number.low:.3f} to {number.high:.3f})"
    return f"{number.mean:.3f}{sd}{limits}"


def per_run(rows: Mapping[tuple[Path, int, str, int], Run]) -> str:
    """CSV, a line per run."""
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow(["dataset", "k", "method", "seed", *(" ".join(c) for c in COLUMNS)])
    for (config, *job), result in rows.items():
        cells = [(result[group] or {}).get(name) for group, name in COLUMNS]
        out.writerow([config.stem, *job, *cells])
    return file.getvalue()
