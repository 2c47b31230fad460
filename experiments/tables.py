"""Tables of finished runs: means, two-level intervals, paired tests, published numbers as context.

A cell is {variant: its runs, a dict each as `sweep.read` returns them}, of one data set and K. Its
first variant is the base that the others are compared with.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import published

from medclip_jax.evaluation import draw_bootstrap, significance

METRICS = {  # name -> where it stands in metrics.json
    **{f"image {x}": ("image", x) for x in ("auroc", "auprc", "sensitivity_at_90")},
    **{f"calibration {x}": ("calibration", x) for x in ("alpha_attained", "false_alarm_rate")},
    **{f"pixel {x}": ("pixel", x) for x in ("auroc", "auprc", "aupro", "dice")},
    "oracle f1": ("oracle", "f1"),
    **{
        f"aurc {x}": ("uncertainty", "measures", x, "aurc")
        for x in ("sd", "mutual_information", "ensemble", "distance")
    },
    "gradients": ("gradients",),
    **{f"seconds {x}": ("timing", x) for x in ("train", "score")},
}
SHOWN = ("image auroc", "image auprc", "calibration false_alarm_rate") + (
    *("pixel auroc", "pixel aupro", "pixel dice"),
)
MAIN = "image auroc"  # what is tested
CONTEXT = {MAIN: published.IMAGE_AUROC, "pixel auroc": published.PIXEL_AUROC}
NOTE = """\
Mean ± standard deviation over draws of the supports; draw i is seed i, the same for all variants.
In brackets the 95% interval of a two-level bootstrap over draws and test images (patients where
they are known). Where a data set has no test part, each draw keeps a pool of supports of its own,
so its healthy test images differ. Difference: to the first variant, on the draws that both have,
with the two-level interval. p: Wilcoxon's signed-rank test over these draws, corrected by Holm
within the table; in brackets the smallest p that so many draws could give before correction; p of
t: the paired t test over these draws, corrected likewise.
DeLong: draws in which the two AUROCs differ at p < 0.05 after Holm's correction. Columns named
oracle read test labels and are for comparison only. Published numbers have other splits, backbones
and stopping rules: context, not a comparison."""
Run = Mapping[str, Any]
Cell = Mapping[str, Sequence[Run]]
Cells = Mapping[tuple[str, int], Cell]


class Number(NamedTuple):
    """A metric over the draws of one variant; None where it is undefined."""

    mean: float | None
    sd: float | None = None  # ddof 1
    low: float | None = None  # 95%, two-level bootstrap
    high: float | None = None


class Difference(NamedTuple):
    """Image AUROC of a variant minus that of the base, on the draws that both have."""

    mean: float
    low: float | None  # 95%, two-level bootstrap
    high: float | None
    p: float  # Wilcoxon over draws, Holm-corrected within the cell
    least_p: float  # the smallest p that Wilcoxon could give with so many draws, before Holm
    t_p: float  # paired t test over draws, Holm-corrected; 1 where it is undefined
    delong: int  # draws whose AUROCs differ at p < 0.05 after Holm
    draws: int


class Summary(NamedTuple):
    """What is computed of a cell, by variant; the base has no difference."""

    numbers: Mapping[str, Mapping[str, Number]]
    differences: Mapping[str, Difference]


def summarise(cell: Cell) -> Summary:
    """Numbers and differences of every variant of a cell."""
    return Summary({v: numbers(runs) for v, runs in cell.items()}, differences(cell))


def value(run: Run, metric: str) -> float:
    """A metric of one run; NaN where it is undefined or was not measured."""
    result: Any = run
    for part in METRICS[metric]:
        result = (result or {}).get(part)
    return np.nan if result is None else float(result)


def numbers(runs: Sequence[Run]) -> dict[str, Number]:
    """Every metric of one variant."""
    limits = intervals(runs)
    table = {}
    for metric in METRICS:
        values = np.array([value(r, metric) for r in runs])
        if not np.isfinite(values).all():
            table[metric] = Number(None)
            continue
        sd = float(values.std(ddof=1)) if len(values) > 1 else None
        table[metric] = Number(float(values.mean()), sd, *limits.get(metric, (None, None)))
    return table


def intervals(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """Two-level 95% limits of the means by metric; draws may be tested on different images."""
    places, labels, patients = images(runs)
    of_image = draw_bootstrap.image([r["score"] for r in runs], labels, patients, indices=places)
    limits = {f"image {name}": x for name, x in of_image.items()}
    if "false_alarm_rate" in of_image:
        limits["calibration false_alarm_rate"] = of_image["false_alarm_rate"]
    counts = [r["pixel_counts"]() for r in runs]
    if all(c is not None for c in counts):
        masks = [c.any((1, 2)) for c in counts]  # of images whose lesions are outlined
        counts = [c[known] for c, known in zip(counts, masks, strict=True)]
        outlined = [place[known] for place, known in zip(places, masks, strict=True)]
        of_pixel = draw_bootstrap.pixel(counts, labels, patients, indices=outlined)
        limits |= {f"pixel {name}": x for name, x in of_pixel.items()}
    # with few draws the limits would reach beyond what a rate can be
    return {name: (max(x.low, 0.0), min(x.high, 1.0)) for name, x in limits.items()}


def images(runs: Sequence[Run]):
    """Places of each draw's images among those of all draws; their labels and patients or None."""
    columns = ["label", "patient"] if all("patient" in r for r in runs) else ["label"]
    values = ([r[name] for r in runs] for name in columns)
    places, (labels, *patients) = draw_bootstrap.union([r["id"] for r in runs], *values)
    return places, labels, patients[0] if patients else None


def differences(cell: Cell) -> dict[str, Difference]:
    """Image AUROC of each variant against the base."""
    base, *others = cell
    by_seed = {r["seed"]: r for r in cell[base] if np.isfinite(value(r, MAIN))}
    pairs = {
        variant: [(r, by_seed[r["seed"]]) for r in cell[variant] if r["seed"] in by_seed]
        for variant in others
    }
    pairs = {
        v: p for v, p in pairs.items() if p and np.isfinite([value(a, MAIN) for a, _ in p]).all()
    }
    if not pairs:
        return {}
    signed = [significance.wilcoxon(*aurocs(p)) for p in pairs.values()]
    paired = [significance.paired_t(*aurocs(p)).p if len(p) > 1 else 1.0 for p in pairs.values()]
    each = [
        significance.delong(a["score"], b["score"], a["label"]).p
        for p in pairs.values()
        for a, b in p
    ]
    p_delong = significance.holm(np.nan_to_num(each, nan=1.0))
    ends = np.cumsum([len(p) for p in pairs.values()])[:-1]
    tests = zip(
        signed,
        significance.holm(np.array([s.p for s in signed])),
        significance.holm(np.nan_to_num(paired, nan=1.0)),
        np.split(p_delong, ends),
        strict=True,
    )
    return {
        variant: Difference(
            *two_level(pairs[variant]),
            *(float(p), w.least_p, float(t), int((d < 0.05).sum()), len(d)),
        )
        for variant, (w, p, t, d) in zip(pairs, tests, strict=True)
    }


def aurocs(pairs: Sequence[tuple[Run, Run]]) -> tuple[np.ndarray, np.ndarray]:
    """Image AUROCs of the variant and of the base by draw."""
    variant, base = zip(*pairs, strict=True)
    return tuple(np.array([value(r, MAIN) for r in side]) for side in (variant, base))


def two_level(pairs: Sequence[tuple[Run, Run]]) -> tuple[float, float | None, float | None]:
    """Mean difference with its limits, draws and images resampled together for both."""
    variant, base = zip(*pairs, strict=True)
    places, labels, patients = images(variant)
    found = draw_bootstrap.image(
        [r["score"] for r in variant],
        labels,
        patients,
        indices=places,
        baselines=[r["score"] for r in base],
    )
    a, b = aurocs(pairs)
    limits = (found["auroc"].low, found["auroc"].high) if "auroc" in found else (None, None)
    return float((a - b).mean()), *limits


# --- files ------------------------------------------------------------------------------------


def as_csv(head: Sequence[str], rows) -> bytes:
    """A CSV file; None is an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head, *rows])
    return file.getvalue().encode()


def runs_csv(cells: Cells) -> bytes:
    """A line per run."""
    rows = []
    for (dataset, k), cell in cells.items():
        for variant, runs in cell.items():
            for r in runs:
                values = [value(r, metric) for metric in METRICS]
                cellular = ["" if np.isnan(x) else x for x in values]
                rows.append([dataset, k, variant, r["seed"], *cellular])
    return as_csv(["dataset", "k", "variant", "seed", *METRICS], rows)


def summary_csv(cells: Cells, summaries: Mapping[tuple[str, int], Summary]) -> bytes:
    """A line per data set, K, variant and metric; the last columns are published context."""
    sources = list(dict.fromkeys(s for x in CONTEXT.values() for y in x.values() for s in y))
    head = ["dataset", "k", "variant", "draws", "metric", "mean", "sd", "low95", "high95"]
    head += ["difference", "difference_low95", "difference_high95"]
    head += [
        "wilcoxon_p_holm",
        "wilcoxon_least_p",
        "paired_t_p_holm",
        "delong_significant",
        "paired_draws",
    ]
    rows = []
    for (dataset, k), cell in cells.items():
        summary = summaries[dataset, k]
        for variant, runs in cell.items():
            for metric, number in summary.numbers[variant].items():
                row = [dataset, k, variant, len(runs), metric, *number]
                d = summary.differences.get(variant) if metric == MAIN else None
                context = (known(metric, dataset, k, source) for source in sources)
                rows.append([*row, *(d or [None] * len(Difference._fields)), *context])
    return as_csv([*head, *(f"context, published: {source}" for source in sources)], rows)


def known(metric: str, dataset: str, k: int, source: str) -> float | None:
    """What a source printed for this metric, data set and K."""
    row = CONTEXT.get(metric, {}).get(dataset, {}).get(source)
    return row[published.K.index(k)] if row and k in published.K else None


def markdown(cells: Cells, summaries: Mapping[tuple[str, int], Summary]) -> bytes:
    """For each data set its metrics by K with published numbers, then everything of each K."""
    lines = ["# Results", "", NOTE, ""]
    for dataset in dict.fromkeys(name for name, _ in cells):
        by_k = {k: x for (name, k), x in summaries.items() if name == dataset}
        for metric in CONTEXT:
            lines += metric_by_k(dataset, metric, by_k)
        for k, summary in by_k.items():
            lines += whole(dataset, k, cells[dataset, k], summary)
    return ("\n".join(lines) + "\n").encode()


def metric_by_k(dataset: str, metric: str, by_k: Mapping[int, Summary]) -> list[str]:
    """Variants by K and, in rows of their own, what others published."""
    columns = {k: {v: n[metric] for v, n in s.numbers.items()} for k, s in by_k.items()}
    if all(number.mean is None for column in columns.values() for number in column.values()):
        return []
    rows = [
        [variant, *(brief(c[variant]) if variant in c else "" for c in columns.values())]
        for variant in dict.fromkeys(v for c in columns.values() for v in c)
    ]
    for source in CONTEXT[metric].get(dataset, {}):
        numbers = (known(metric, dataset, k, source) for k in columns)
        rows.append([f"*published:* {source}", *(f"{x:.3f}" if x else "" for x in numbers)])
    return table(f"{dataset}: {metric}", ["variant", *(f"K = {k}" for k in columns)], rows)


def whole(dataset: str, k: int, cell: Cell, summary: Summary) -> list[str]:
    """Variants by metric, with differences to the first."""
    rows = []
    for variant, runs in cell.items():
        shown = [brief(summary.numbers[variant][metric]) for metric in SHOWN]
        d, tests = summary.differences.get(variant), [""] * 4
        if d:
            limits = "" if d.low is None else f" ({d.low:+.3f} to {d.high:+.3f})"
            tests = [f"{d.mean:+.3f}{limits}", f"{d.p:.3f} ({d.least_p:.3g})", f"{d.t_p:.3f}"]
            tests.append(f"{d.delong} of {d.draws}")
        rows.append([variant, str(len(runs)), *shown, *tests])
    head = ["variant", "draws", *SHOWN, "difference in image auroc", "p", "p of t", "DeLong"]
    return table(f"{dataset}, K = {k}", head, rows)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table under a heading."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [f"## {title}", "", lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def brief(number: Number) -> str:
    """Mean ± sd (low to high); a dash if undefined."""
    if number.mean is None:
        return "–"
    sd = "" if number.sd is None else f" ± {number.sd:.3f}"
    limits = "" if number.low is None else f" ({number.low:.3f} to {number.high:.3f})"
    return f"{number.mean:.3f}{sd}{limits}"
