"""The effect of each preprocessing step and of each augmentation, one at a time, on one data set.

python experiments/preprocessing.py --config configs/busi.py --recipe ultrasound --k 16 --draws 3 \
  --out runs/preprocessing [--methods ours,memory] [--set epochs=60 --set cache=DIR ...]
python experiments/preprocessing.py --speed

Every row differs from the first (nothing switched on) in one thing; draw i is seed i everywhere, so
differences are between equal supports. Elastic deformation is left out where it is not permitted,
and augmentation where nothing learns. Finished runs are skipped: a killed experiment goes on.
Writes table.md below --out. --speed measures images/s of preprocessing and stops.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import compare
import numpy as np
from scipy import stats

from medclip_jax import files
from medclip_jax.data import augmentation, preprocessing
from medclip_jax.errors import ConfigError

SWITCHES = {
    "flip": 0.5,
    "flip_vertical": 0.5,
    "rotate": 10.0,
    "elastic": 0.01,
    "intensity": 0.1,
}


def main() -> None:
    if "--speed" in sys.argv[1:]:
        speed()
        return
    args = arguments()
    rows = []
    for method in args.methods.split(","):
        for name, fields in conditions(args, method).items():
            given = argparse.Namespace(**vars(args))
            given.out, given.set = args.out / name, [*args.set, *fields]
            found = [compare.finished(given, args.k, method, seed) for seed in range(args.draws)]
            rows.append((method, name, [r["image"]["auroc"] for r in found]))
            print(*rows[-1], flush=True)
    files.write_bytes(args.out / "table.md", table(rows).encode())
    print(table(rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="config file of the data set")
    parser.add_argument("--recipe", choices=preprocessing.RECIPES, required=True)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--methods", default="ours,memory")
    parser.add_argument("--only", choices=("recipe", "augment"), help="one half of the rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="field=value, as --config.field")
    return parser.parse_args()


def conditions(args: argparse.Namespace, method: str) -> dict[str, list[str]]:
    """Name -> the fields that differ from nothing switched on."""
    found: dict[str, list[str]] = {"none": []}
    if args.only != "augment":
        found |= {step: [f"data.recipe={step}"] for step in preprocessing.STEPS}
        found[f"recipe {args.recipe}"] = [f"data.recipe={args.recipe}"]
    if args.only == "recipe" or method != "ours":
        return found
    modality = compare.settings(args, args.k, method, 0).data.modality
    for name, strength in SWITCHES.items():
        try:
            augmentation.permitted(augmentation.Strengths(**{name: strength}), modality)
        except ConfigError as reason:
            print(reason, file=sys.stderr)
            continue
        found[f"augment {name} {strength}"] = [f"augment.{name}={strength}"]
    return found


def table(rows: list[tuple[str, str, list[float]]]) -> str:
    """Markdown: mean image AUROC, its t interval, and the paired difference to nothing."""
    lines = ["| method | switched on | image AUROC | 95% | difference | 95% |", "|---" * 6 + "|"]
    plain = {method: np.array(values) for method, name, values in rows if name == "none"}
    for method, name, values in rows:
        change = np.array(values) - plain[method]
        cells = f"{np.mean(values):.3f} | {interval(values)}"
        other = "| |" if name == "none" else f"{change.mean():+.3f} | {interval(change)} |"
        lines.append(f"| {method} | {name} | {cells} | {other}")
    return "\n".join(lines) + "\n"


def interval(values) -> str:
    """95% t interval of the mean; a dash for a single draw."""
    n = len(values)
    if n < 2:
        return "-"
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return f"{np.mean(values) - half:.3f} to {np.mean(values) + half:.3f}"


def speed(count: int = 256, side: int = 224) -> None:
    """images/s of every step and recipe: a plain loop against `batch` on all cores, best of 3."""
    images = np.random.default_rng(0).random((count, side, side), np.float32)
    print(f"{count} images of {side} x {side}, {os.cpu_count()} cores")
    print("| steps | loop | batch |\n|---|---|---|")
    for name in (*preprocessing.STEPS, *preprocessing.RECIPES):

        def loop(name=name):
            return [preprocessing.apply(image, name) for image in images]

        ways = loop, lambda name=name: preprocessing.batch(images, name)
        print(f"| {name} | " + " | ".join(f"{count / fastest(way):.0f}" for way in ways) + " |")


def fastest(way) -> float:
    """Shortest of three times, seconds."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        way()
        times.append(time.perf_counter() - begin)
    return min(times)


if __name__ == "__main__":
    main()
