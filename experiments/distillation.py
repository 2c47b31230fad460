"""Speed against accuracy of a teacher, its student, and the same student that was never taught.

python experiments/distillation.py --config configs/busi.py --k 16 --draws 3 --out runs/distil \
  [--teacher model.refine=True] [--student "clip.levels=(8,)"] [--set data.root=DIR ...]

Draw i is seed i for all three; --teacher and --student are repeated, a field each. What is compared
is the learned branch alone, which is what teaches. Finished runs are skipped. Writes table.md: mean
image and pixel AUROC with the 95% t interval of the first, and the images scored per second from
tokens in the feature cache to maps and scores (the stage `score`; MC-dropout and checks are off).
"""

import argparse
import json
import shutil
from pathlib import Path

import compare
import numpy as np

from medclip_jax import files, train

ALONE = ["fusion.branches=('learned',)", "score.passes=1", "explained=0", "validations=0"]


def main() -> None:
    args = arguments()
    rows: dict[str, list[list]] = {"teacher": [], "student, taught": [], "student alone": []}
    for seed in range(args.draws):
        teacher = args.out / f"k{args.k}-teacher-{seed}"
        taught = [*args.student, f"distill.teacher={teacher}"]
        for name, fields in zip(rows, (args.teacher, taught, args.student), strict=True):
            result = finished(args, seed, name.replace(", ", "-").replace(" ", "-"), fields)
            rows[name].append(measured(result))
            print(name, seed, *rows[name][-1], flush=True)
    files.write_bytes(args.out / "table.md", ("\n".join(table(rows)) + "\n").encode())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="config file of the data set")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--teacher", action="append", default=[], help="field=value of the teacher")
    parser.add_argument("--student", action="append", default=[], help="of both students")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="field=value, of all")
    return parser.parse_args()


def finished(args: argparse.Namespace, seed: int, name: str, fields: list[str]) -> dict:
    """metrics.json of one run with its number of `images`; it is made if it is not there."""
    workdir = args.out / f"k{args.k}-{name}-{seed}"
    path = workdir / "compared.json"  # last: it says that the run is whole
    if not path.is_file():
        one = argparse.Namespace(config=args.config, set=[*args.set, *ALONE, *fields])
        result = train.run(compare.settings(one, args.k, "ours", seed), workdir)
        with np.load(workdir / "predictions.npz") as held:
            result["images"] = len(held["score"])
        (workdir / "predictions.npz").unlink()
        shutil.rmtree(workdir / "checkpoints")
        files.write_json(path, result)
    return json.loads(path.read_text())


def measured(result: dict) -> list[float]:
    """Image AUROC, pixel AUROC (NaN without masks), images per second."""
    pixel = (result["pixel"] or {}).get("auroc", np.nan)
    return [result["image"]["auroc"], pixel, result["images"] / result["timing"]["score"]]


def table(rows: dict[str, list[list]]) -> list[str]:
    lines = ["| model | draws | image AUROC | 95% | pixel AUROC | images/s |", "|---" * 6 + "|"]
    for name, each in rows.items():
        values = np.array(each, float)
        low, high = compare.interval(values[:, 0])
        mean, pixel, _ = values.mean(0)
        fast = np.median(values[:, 2])
        cells = f"{mean:.3f} | {low:.3f} to {high:.3f} | {pixel:.3f} | {fast:.0f}"
        lines.append(f"| {name} | {len(each)} | {cells} |")
    return lines


if __name__ == "__main__":
    main()
