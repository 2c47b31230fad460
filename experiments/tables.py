"""Tables of finished runs: means, two-level intervals, paired tests, published numbers as context.

A cell is {variant: its runs, a dict each as `sweep.read` returns them}, of one data set, split and
K. One variant, the base, is what the others are compared with.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import published

from medclip_jax.errors import DataError
from medclip_jax.evaluation import significance

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
In brackets the 95% interval of a two-level bootstrap over draws and test images; near-duplicates
and images of one patient are one unit of it. The clean split is the headline; the peer split, which
lets near-duplicates into pool and test, is there to compare with published tables. Where a set has
no test part, each draw keeps a pool of supports of its own, so its healthy test images differ.
Difference: to the first variant, on the draws that both have, with the two-level interval; p of it:
Student's t over the two-level standard error. t, Wilcoxon: paired t and signed-rank test over draws
alone, which say nothing of other test images; in brackets the smallest p that Wilcoxon's could be
with so many draws, after correction. DeLong: draws in which the two AUROCs differ at p < 0.05, and
the median p of a draw before correction; it counts near-duplicates as images. All are corrected by
Holm over all data sets x K x variants of a split. Columns named oracle read test labels and are for
comparison only. Published numbers have other splits, backbones and stopping rules: context, no
comparison."""
SPLITS = ("clean", "peer")  # the headline first
Run = Mapping[str, Any]
Cell = Mapping[str, Sequence[Run]]
Place = tuple[str, str, int]  # data set, split, K
Cells = Mapping[Place, Cell]


class Number(NamedTuple):
    """A metric over the draws of one variant; None where it is undefined."""

    mean: float | None
    sd: float | None = None  # ddof 1
    low: float | None = None  # 95%, two-level bootstrap
    high: float | None = None


class Difference(NamedTuple):
    """Image AUROC of a variant minus that of the base, on the draws that both have.

    Tests are two-sided and corrected by Holm over all comparisons of a split.
    """

    mean: float
    low: float | None  # 95%, two-level bootstrap
    high: float | None
    p: float  # of the two-level standard error; 1 where it is undefined
    t_p: float  # paired t test over draws alone; 1 where it is undefined
    wilcoxon_p: float  # over draws alone
    least_p: float  # the smallest that Wilcoxon's could be with so many draws
    delong: int  # draws whose AUROCs differ at p < 0.05
    delong_p: float  # median over draws, not corrected
    draws: int


class Summary(NamedTuple):
    """What is computed of a cell, by variant; the base has no difference."""

    numbers: Mapping[str, Mapping[str, Number]]
    differences: Mapping[str, Difference]


def summarise(cells: Cells, base: str) -> dict[Place, Summary]:
    """Numbers of every variant of every cell, and differences corrected over each split's cells."""
    differing = {}
    for split in dict.fromkeys(place[1] for place in cells):
        own = {place: c for place, c in cells.items() if place[1] == split}
        differing |= differences(own, base)
    return {
        place: Summary({v: numbers(runs) for v, runs in cell.items()}, differing[place])
        for place, cell in cells.items()
    }


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
    places, labels, units = images(runs)
    of_image = significance.image_estimates(
        [r["score"] for r in runs], labels, units, indices=places
    )
    limits = {f"image {name}": x for name, x in of_image.items()}
    if "false_alarm_rate" in of_image:
        limits["calibration false_alarm_rate"] = of_image["false_alarm_rate"]
    counts = [r["pixel_counts"]() for r in runs]
    if all(c is not None for c in counts):
        masks = [c.any((1, 2)) for c in counts]  # of images whose lesions are outlined
        counts = [c[known] for c, known in zip(counts, masks, strict=True)]
        outlined = [place[known] for place, known in zip(places, masks, strict=True)]
        of_pixel = significance.pixel_estimates(counts, labels, units, indices=outlined)
        limits |= {f"pixel {name}": x for name, x in of_pixel.items()}
    # with few draws the limits would reach beyond what a rate can be
    return {name: (max(x.low, 0.0), min(x.high, 1.0)) for name, x in limits.items()}


def images(runs: Sequence[Run]):
    """Places of each draw's images among those of all draws; their labels and units or None."""
    unit = [name for name in ("unit", "patient") if all(name in r for r in runs)][:1]
    values = ([r[name] for r in runs] for name in ("label", *unit))
    places, (labels, *units) = significance.union([r["id"] for r in runs], *values)
    return places, labels, units[0] if units else None


def duplicates(runs: Sequence[Run]) -> tuple[int, int] | None:
    """Test images of all draws, and how many beyond the first of their unit; None: not known."""
    if not all("unit" in r for r in runs):
        return None
    _, _, units = images(runs)
    return len(units), len(units) - len(set(units.tolist()))


def overlap(runs: Sequence[Run]) -> float | None:
    """Share of the supports that two draws have in common, mean over pairs; None: not known."""
    pairs = [
        len({*a["support"]} & {*b["support"]}) / len(a["support"])
        for a, b in combinations(runs, 2)
        if a.get("support") and b.get("support")
    ]
    return float(np.mean(pairs)) if pairs else None


def differences(cells: Cells, base: str) -> dict[Place, dict[str, Difference]]:
    """Image AUROC of each variant against the base, where a cell has it, corrected over all."""
    pairs = {(place, v): p for place, cell in cells.items() for v, p in paired(cell, base).items()}
    result: dict[Place, dict[str, Difference]] = {place: {} for place in cells}
    if not pairs:
        return result
    signed = [significance.wilcoxon(*aurocs(p)) for p in pairs.values()]
    paired_t = [significance.paired_t(*aurocs(p)).p if len(p) > 1 else 1 for p in pairs.values()]
    level = [two_level(p) for p in pairs.values()]
    each = [[delong_p(*pair) for pair in p] for p in pairs.values()]
    of_draws = np.nan_to_num(np.concatenate(each), nan=1.0)
    ends = np.cumsum([len(p) for p in each])[:-1]
    tests = zip(
        pairs,
        level,
        significance.holm(np.array([p for *_, p in level])),
        significance.holm(np.nan_to_num(paired_t, nan=1.0)),
        significance.holm(np.array([s.p for s in signed])),
        [min(1.0, s.least_p * len(pairs)) for s in signed],
        np.split(significance.holm(of_draws), ends),
        np.split(of_draws, ends),
        strict=True,
    )
    for (place, variant), (mean, low, high, _), *ps, least, corrected, raw in tests:
        delong = int((corrected < 0.05).sum()), float(np.median(raw))
        result[place][variant] = Difference(
            *(mean, low, high, *map(float, ps), least, *delong, len(raw))
        )
    return result


def delong_p(a: Run, b: Run) -> float:
    """p of DeLong's test of two runs; NaN where a class has fewer than two images."""
    if np.bincount(a["label"], minlength=2).min() < 2:
        return np.nan
    return significance.delong(a["score"], b["score"], a["label"]).p


def paired(cell: Cell, base: str) -> dict[str, list[tuple[Run, Run]]]:
    """Runs of each variant with those of the base on the same draw."""
    by_seed = {r["seed"]: r for r in cell.get(base, ()) if np.isfinite(value(r, MAIN))}
    pairs = {
        variant: [(r, by_seed[r["seed"]]) for r in runs if r["seed"] in by_seed]
        for variant, runs in cell.items()
        if variant != base
    }
    return {
        v: p for v, p in pairs.items() if p and np.isfinite([value(a, MAIN) for a, _ in p]).all()
    }


def aurocs(pairs: Sequence[tuple[Run, Run]]) -> tuple[np.ndarray, np.ndarray]:
    """Image AUROCs of the variant and of the base by draw."""
    variant, base = zip(*pairs, strict=True)
    return tuple(np.array([value(r, MAIN) for r in side]) for side in (variant, base))


def two_level(
    pairs: Sequence[tuple[Run, Run]],
) -> tuple[float, float | None, float | None, float]:
    """Mean difference with its limits and p, draws and images resampled together for both."""
    if not all(np.array_equal(a[x], b[x]) for a, b in pairs for x in ("id", "label")):
        raise DataError("variants of a draw were tested on different data: run them on the same")
    variant, base = zip(*pairs, strict=True)
    places, labels, units = images(variant)
    estimates = significance.image_estimates(
        [r["score"] for r in variant],
        labels,
        units,
        indices=places,
        baselines=[r["score"] for r in base],
    )
    a, b = aurocs(pairs)
    if "auroc" not in estimates:
        return float((a - b).mean()), None, None, 1.0
    return float((a - b).mean()), *estimates["auroc"][2:]


# --- files ------------------------------------------------------------------------------------


def as_csv(head: Sequence[str], rows) -> bytes:
    """A CSV file; None is an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head, *rows])
    return file.getvalue().encode()


def runs_csv(cells: Cells) -> bytes:
    """A line per run."""
    rows = []
    for (dataset, split, k), cell in cells.items():
        for variant, runs in cell.items():
            for r in runs:
                values = [value(r, metric) for metric in METRICS]
                cellular = ["" if np.isnan(x) else x for x in values]
                rows.append([dataset, split, k, variant, r["seed"], *cellular])
    return as_csv(["dataset", "split", "k", "variant", "seed", *METRICS], rows)


def summary_csv(cells: Cells, summaries: Mapping[Place, Summary]) -> bytes:
    """A line per data set, split, K, variant and metric; the last columns are published context."""
    sources = list(dict.fromkeys(s for x in CONTEXT.values() for y in x.values() for s in y))
    head = ["dataset", "split", "k", "variant", "draws", "supports_shared", "metric"]
    head += ["mean", "sd", "low95", "high95"]
    head += ["difference", "difference_low95", "difference_high95", "two_level_p_holm"]
    head += ["paired_t_p_holm", "wilcoxon_p_holm", "wilcoxon_least_p_holm", "delong_significant"]
    head += ["delong_median_p", "paired_draws"]
    rows = []
    for (dataset, split, k), cell in cells.items():
        summary = summaries[dataset, split, k]
        for variant, runs in cell.items():
            for metric, number in summary.numbers[variant].items():
                row = [dataset, split, k, variant, len(runs), overlap(runs), metric, *number]
                d = summary.differences.get(variant) if metric == MAIN else None
                context = (known(metric, dataset, split, k, source) for source in sources)
                rows.append([*row, *(d or [None] * len(Difference._fields)), *context])
    return as_csv([*head, *(f"context, published: {source}" for source in sources)], rows)


def known(metric: str, dataset: str, split: str, k: int, source: str) -> float | None:
    """What a source printed for this metric, data set and K; theirs are no clean splits."""
    row = CONTEXT.get(metric, {}).get(dataset, {}).get(source)
    return row[published.K.index(k)] if row and split == "peer" and k in published.K else None


def markdown(cells: Cells, summaries: Mapping[Place, Summary]) -> bytes:
    """For each data set its metrics by K with published numbers, then everything of each K."""
    lines = ["# Results", "", NOTE, ""]
    for dataset in dict.fromkeys(place[0] for place in cells):
        own = [place for place in cells if place[0] == dataset]
        own.sort(key=lambda place: (SPLITS.index(place[1]), place[2]))
        for metric in CONTEXT:
            lines += metric_by_k(metric, {place: summaries[place] for place in own})
        for place in own:
            lines += whole(place, cells[place], summaries[place])
    return ("\n".join(lines) + "\n").encode()


def metric_by_k(metric: str, summaries: Mapping[Place, Summary]) -> list[str]:
    """Variants by split and K and, in rows of their own, what others published."""
    columns = {p: {v: n[metric] for v, n in s.numbers.items()} for p, s in summaries.items()}
    if all(number.mean is None for column in columns.values() for number in column.values()):
        return []
    rows = [
        [variant, *(brief(c[variant]) if variant in c else "" for c in columns.values())]
        for variant in dict.fromkeys(v for c in columns.values() for v in c)
    ]
    (dataset,) = {place[0] for place in columns}
    for source in CONTEXT[metric].get(dataset, {}):
        printed = [known(metric, *place, source) for place in columns]
        if any(printed):
            cellular = (f"{x:.3f}" if x else "" for x in printed)
            rows.append([f"*published:* {source}", *cellular])
    head = ["variant", *(f"{split}, K = {k}" for _, split, k in columns)]
    return table(f"{dataset}: {metric}", head, rows)


def whole(place: Place, cell: Cell, summary: Summary) -> list[str]:
    """Variants by metric, with differences to the first."""
    rows = []
    for variant, runs in cell.items():
        shown = [brief(summary.numbers[variant][metric]) for metric in SHOWN]
        d, tests = summary.differences.get(variant), [""] * 4
        if d:
            limits = "" if d.low is None else f" ({d.low:+.3f} to {d.high:+.3f})"
            tests = [f"{d.mean:+.3f}{limits}", f"{d.p:.3f}"]
            tests.append(f"{d.t_p:.3f}, {d.wilcoxon_p:.3f} ({d.least_p:.3g})")
            tests.append(f"{d.delong} of {d.draws} (median p {d.delong_p:.3g})")
        rows.append([variant, str(len(runs)), *shown, *tests])
    head = ["variant", "draws", *SHOWN, "difference in image auroc", "p", "t, Wilcoxon", "DeLong"]
    dataset, split, k = place
    return table(f"{dataset}, {split} split, K = {k}", head, rows, known_of(cell))


def known_of(cell: Cell) -> str:
    """What a reader needs to know of the draws and images of a cell, in a sentence or two."""
    runs = next(iter(cell.values()))
    share, images_of = overlap(runs), duplicates(runs)
    said = [] if share is None else [f"Two draws share {share:.0%} of their supports (mean)."]
    if images_of is not None and images_of[1]:
        said.append(f"Of {images_of[0]} test images {images_of[1]} repeat another or its patient.")
    return " ".join(said)


def table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> list[str]:
    """Lines of a Markdown table under a heading, and perhaps a note."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    noted = [note, ""] if note else []
    return [f"## {title}", "", *noted, lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def brief(number: Number) -> str:
    """Mean ± sd (low to high); a dash if undefined."""
    if number.mean is None:
        return "–"
    sd = "" if number.sd is None else f" ± {number.sd:.3f}"
    limits = "" if number.low is None else f" ({number.low:.3f} to {number.high:.3f})"
    return f"{number.mean:.3f}{sd}{limits}"
