"""What the uncertainty of finished runs is worth, over support draws: a table of metrics.json.

python experiments/uncertainty.py runs/reproduce/busi-k16-ours-*

A line per measure (medclip_jax/rejection.py): the area under the risk-coverage curve (smaller is
better), its difference to |score - threshold| on the same draws with 95% t intervals, and the error
rate and image AUROC of what remains at some coverages, means over the runs.
"""

import argparse
import json
from pathlib import Path

import compare
import numpy as np

SHOWN = (1.0, 0.8, 0.5)  # coverages
BASE = "distance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="workdirs of one data set, K and method")
    args = parser.parse_args()
    unfinished = [str(run) for run in args.runs if not (run / "metrics.json").is_file()]
    if unfinished:
        parser.error(f"{', '.join(unfinished)}: no metrics.json; give finished runs")
    found = [json.loads((run / "metrics.json").read_text())["uncertainty"] for run in args.runs]
    lacking = [str(run) for run, one in zip(args.runs, found, strict=True) if one is None]
    if lacking:
        parser.error(f"{', '.join(lacking)}: no uncertainty was measured (score.passes, dropout)")
    print("\n".join(table(found)))


def table(found: list[dict]) -> list[str]:
    """Lines of the table, from the groups `uncertainty` of the runs."""
    at = [found[0]["coverage"].index(c) for c in SHOWN]
    names = ["measure", "AURC", f"minus {BASE}"]
    names += [f"error at {c:.0%}" for c in SHOWN] + [f"AUROC at {c:.0%}" for c in SHOWN]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    base = np.array([one["measures"][BASE]["aurc"] for one in found])
    for name in found[0]["measures"]:
        each = [one["measures"][name] for one in found]
        area = np.array([m["aurc"] for m in each])
        cells = [interval(area), "" if name == BASE else interval(area - base, "+")]
        for kind in ("risk", "auroc"):
            cells += [f"{x:.3f}" for x in np.mean([m[kind] for m in each], 0)[at]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def interval(values: np.ndarray, sign: str = "") -> str:
    """Mean and 95% t interval; the mean alone of a single value."""
    low, high = compare.interval(values)
    mean = format(values.mean(), f"{sign}.3f")
    return mean if len(values) < 2 else f"{mean} ({low:{sign}.3f} to {high:{sign}.3f})"


if __name__ == "__main__":
    main()
