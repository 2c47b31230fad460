"""Methods side by side on the same support draws: mean, sd and 95% interval per K.

python experiments/compare.py --config configs/busi.py --k 16 --draws 5 --out runs/compare \
  [--methods ours,mediclip,memory,zero_shot] [--set data.root=DIR --set cache=DIR ...]

Draw i is seed i, for every method. Each run has its own workdir below --out and is skipped if it
is finished, so a killed comparison goes on. Writes table.csv (a line per run) and table.md.
"""

import argparse
import csv
import importlib.util
import json
from ast import literal_eval
from pathlib import Path

import numpy as np
from scipy import stats

from medclip_jax import config, files, train

COLUMNS = (
    ("image", "auroc"),
    ("image", "auprc"),
    ("pixel", "auroc"),
    ("pixel", "aupro"),
    ("pixel", "dice"),
    ("calibration", "false_alarm_rate"),
)


def main() -> None:
    args = arguments()
    rows = []
    for k in args.k:
        for method in args.methods.split(","):
            for seed in range(args.draws):
                result = finished(args, k, method, seed)
                cells = [(result[group] or {}).get(name) for group, name in COLUMNS]
                rows.append([k, method, seed, *cells])
                print(*rows[-1], flush=True)
    table(args.out, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="config file of the data set")
    parser.add_argument("--k", type=int, nargs="+", default=[16])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--methods", default=",".join(config.METHODS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="field=value, as --config.field")
    return parser.parse_args()


def finished(args: argparse.Namespace, k: int, method: str, seed: int) -> dict:
    """metrics.json of one run, which is made if it is not there."""
    workdir = args.out / f"k{k}-{method}-{seed}"
    path = workdir / "metrics.json"
    if not path.is_file():
        train.run(settings(args, k, method, seed), workdir)
        (workdir / "predictions.npz").unlink()  # 75 MB of maps each
    return json.loads(path.read_text())


def settings(args: argparse.Namespace, k: int, method: str, seed: int):
    spec = importlib.util.spec_from_file_location("config_file", args.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(f"k={k},seed={seed},method={method}")
    for assignment in args.set:
        name, _, value = assignment.partition("=")
        old = c
        for part in name.split("."):
            old = old[part]
        c.update_from_flattened_dict({name: value if isinstance(old, str) else literal_eval(value)})
    return c


def table(out: Path, rows: list[list]) -> None:
    """table.csv and table.md: mean +- sd over draws, and the t interval of the image AUROC."""
    names = ["k", "method", "seed", *(f"{group} {name}" for group, name in COLUMNS)]
    with (out / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    lines = [f"| {' | '.join(names[:2] + names[3:])} | image AUROC 95% |", "|---" * 9 + "|"]
    for k, method in dict.fromkeys((r[0], r[1]) for r in rows):
        values = np.array([r[3:] for r in rows if r[:2] == [k, method]], float)
        mean, n = values.mean(0), len(values)
        sd = values.std(0, ddof=1) if n > 1 else np.full(len(mean), np.nan)
        low, high = interval(values[:, 0])
        cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, sd, strict=True)]
        lines.append(f"| {k} | {method} | {' | '.join(cells)} | {low:.3f} to {high:.3f} |")
    files.write_bytes(out / "table.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% t interval of a mean over draws; NaN for a single one."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5 if n > 1 else np.nan
    return values.mean() - half, values.mean() + half


if __name__ == "__main__":
    main()
