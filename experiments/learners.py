"""MAML against first order, ANIL and joint training at equal numbers of gradient evaluations.

python experiments/learners.py --config configs/busi.py --k 4 16 --draws 10 --out runs/learners \
  [--variants joint,maml,fomaml,anil,maml-rate-0.2,...] [--set data.root=DIR ...]

Draw i is seed i, for every variant: the same supports. `steps` is derived from `epochs`, so that
every variant takes as many gradients (config.gradients; metrics.json holds the number); a variant
that takes another number ends the comparison. The other variants are remedies: what might keep
MAML from helping. Finished runs are skipped, so a killed comparison goes on. Writes table.csv,
tests.json and table.md: mean, sd, 95% t interval, and the difference to joint training on the same
draws with its interval, paired t, Wilcoxon, and Holm's correction over the variants of a K.
"""

import argparse
import csv
import json
import time
from copy import copy
from itertools import product
from pathlib import Path

import compare
import numpy as np
import trials

from medclip_jax import files
from medclip_jax.evaluation import significance

BASE = "joint"
EPOCHS = 200  # unless --set says otherwise; learners take as many gradients as these need
VARIANTS = {  # name -> fields that differ
    "joint": {"learner": "joint"},
    "maml": {"learner": "maml"},
    "fomaml": {"learner": "fomaml"},
    "anil": {"learner": "anil"},
    # remedies
    "maml-rate-0.01": {"learner": "maml", "meta.inner_rate": 0.01},
    "maml-rate-0.2": {"learner": "maml", "meta.inner_rate": 0.2},
    "maml-meta-sgd": {"learner": "maml", "meta.learn_rate": True},
    "maml-adapt-0": {"learner": "maml", "meta.adapt_steps": 0},
    "maml-adapt-5": {"learner": "maml", "meta.adapt_steps": 5},
    "maml-inner-3": {"learner": "maml", "meta.inner_steps": 3, "meta.adapt_steps": 3},
    "maml-lr-4": {"learner": "maml", "optimizer.learning_rate": 4e-3},
    "joint-lr-4": {"learner": "joint", "optimizer.learning_rate": 4e-3},
    "maml-tasks-1": {"learner": "maml", "meta.tasks": 1},
    "maml-tasks-8": {"learner": "maml", "meta.tasks": 8},
    "maml-query-16": {"learner": "maml", "meta.query": 16},
    "maml-ultrasound": {"learner": "maml", "meta.data": ("phantom-ultrasound",)},
    "maml-modalities": {
        "learner": "maml",
        "meta.data": ("phantom-ultrasound", "phantom-mri", "phantom-xray"),
    },
}
MEASURES = (("image", "auroc"), ("pixel", "auroc"), ("pixel", "aupro"))


def main() -> None:
    args = arguments()
    ground, rows = trials.Ground(), []
    for seed in range(args.draws):  # whole draws first: what is stopped early can be compared
        for k, name in product(args.k, args.variants):
            result = finished(ground, args, k, name, seed)
            cells = [(result[group] or {}).get(measure) for group, measure in MEASURES]
            rows.append([k, name, seed, result["gradients"], *cells])
            print(*rows[-1], f"{result['seconds']:.1f} s", flush=True)
    equal_gradients(rows)
    write(args.out, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="config file of the data set")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--variants", default="joint,maml,fomaml,anil", help=", ".join(VARIANTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="field=value, as --config.field")
    args = parser.parse_args()
    args.variants = list(VARIANTS) if args.variants == "all" else args.variants.split(",")
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        parser.error(f"variants {unknown} are unknown: give any of {', '.join(VARIANTS)}, or all")
    if BASE not in args.variants:
        parser.error(f"--variants lacks {BASE}, with which the others are compared")
    return args


def finished(ground: trials.Ground, args: argparse.Namespace, k: int, name: str, seed: int) -> dict:
    """The result of one run of a variant, which is made if its file is not there."""
    path = args.out / name / f"k{k}-{seed}.json"
    if not path.is_file():
        one = copy(args)
        own = [f"{field}={value}" for field, value in VARIANTS[name].items()]
        one.set = [f"epochs={EPOCHS}", *args.set, *own]
        begin = time.perf_counter()
        result = trials.run(ground, compare.settings(one, k, "ours", seed), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, result | {"seconds": time.perf_counter() - begin})
    return json.loads(path.read_text())


def equal_gradients(rows: list[list]) -> None:
    """Raise ValueError unless all variants of a K took the same number of gradients, to 5%."""
    for k in dict.fromkeys(r[0] for r in rows):
        taken = {r[1]: r[3] for r in rows if r[0] == k}
        if max(taken.values()) > 1.05 * min(taken.values()):
            raise ValueError(f"K = {k}: gradients differ, {taken}; leave steps to be derived")


def tests(rows: list[list]) -> list[dict]:
    """Each variant against joint training, per K and measure, paired by draw."""
    found = []
    for k in dict.fromkeys(r[0] for r in rows):
        names = list(dict.fromkeys(r[1] for r in rows if r[0] == k))
        for column, (group, measure) in enumerate(MEASURES, start=4):
            values = {n: np.array([r[column] for r in rows if r[:2] == [k, n]]) for n in names}
            if None in values[BASE]:
                continue  # a data set without masks
            against = [against_base(k, n, values) for n in names if n != BASE]
            defined = [row for row in against if np.isfinite(row["p"])]
            for row, p in zip(
                defined, significance.holm(np.array([r["p"] for r in defined])), strict=True
            ):
                row["p_holm"] = float(p)
            found += [row | {"measure": f"{group} {measure}"} for row in against]
    return found


def against_base(k: int, name: str, values: dict[str, np.ndarray]) -> dict:
    t = significance.paired_t(values[name], values[BASE])
    rank = significance.wilcoxon(values[name], values[BASE])
    said = {"k": k, "variant": name, "draws": len(values[name]), "difference": t.mean}
    return said | {"low": t.low, "high": t.high, "p": t.p, "p_wilcoxon": rank.p}


def write(out: Path, rows: list[list]) -> None:
    """table.csv, tests.json and table.md."""
    names = ["k", "variant", "seed", "gradients", *(" ".join(m) for m in MEASURES)]
    with (out / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    compared = tests(rows) if len({r[2] for r in rows}) > 1 else []
    files.write_json(out / "tests.json", compared)
    head = ["k", "variant", "gradients", *names[4:]]
    head += ["image AUROC 95%", "difference to joint 95%", "p (Holm)"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    by = {(t["k"], t["variant"]): t for t in compared if t["measure"] == "image auroc"}
    for k, name in dict.fromkeys((r[0], r[1]) for r in rows):
        own = [r for r in rows if r[:2] == [k, name]]
        values = np.array([r[4:] for r in own], float)
        sd = values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)
        cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(values.mean(0), sd, strict=True)]
        low, high = compare.interval(values[:, 0])
        cells = [str(k), name, str(own[0][3]), *cells, f"{low:.3f} to {high:.3f}"]
        if test := by.get((k, name)):
            cells.append(f"{test['difference']:+.3f} ({test['low']:+.3f} to {test['high']:+.3f})")
            cells.append(f"{test.get('p_holm', float('nan')):.3f}")
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    files.write_bytes(out / "table.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
