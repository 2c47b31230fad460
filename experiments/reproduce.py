"""The paper's tables and figures: data sets x K x draws x methods, with intervals and tests.

python experiments/reproduce.py --out results --runs runs/reproduce --set data.root=/data \
  [--config FILE ...] [--k 4 8 16 32] [--draws 10] [--methods ours,memory,...] [--part 1/2] \
  [--config.clip.checkpoint=openai/clip-vit-large-patch14]

Draw i is seed i for every method. A finished run is never made again, so a killed command goes on;
several processes share the work with --part 1/2 and --part 2/2 (same --runs folder), and whichever
comes last writes tables of all that is finished. Tokens are kept in one feature_cache, compiled programs in
its folder. Writes below --out: runs.csv (a line per run), summary.csv (a line per data set, K,
method and metric, with intervals, tests and published context), tables.md, figures/ (images of
each K, training, and over draws ROC, scores, calibration, risk against coverage).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import curves
import numpy as np
import tables
from compare import settings
from published import K

from medclip_jax import config, files, train
from medclip_jax.evaluation import metrics
from medclip_jax.report import figures, gallery, load

ROOT = Path(__file__).parents[1]
CONFIGS = [ROOT / "configs" / f"{name}.py" for name in ("busi", "brain_mri", "chest_xray")]
LEARNERS = ("maml", "fomaml", "anil")  # as methods: ours with this learner
METHODS = ("ours", "fomaml", "mediclip", "memory", "zero_shot", "thumbnails", "grey_level")
COLUMNS = ("id", "label", "score", "p_value", "uncertainty")  # of each run, for tables and curves
SHOWN = 2  # images of Figures 2 to 4


def main() -> None:
    args = arguments()
    jobs = [
        (file, k, method, seed)
        for file in args.config
        for k in args.k
        for seed in range(args.draws)
        for method in args.methods
    ]
    part, parts = args.part
    for number, job in enumerate(jobs):
        if number % parts == part - 1:
            finished(args, *job)
    rows = {job: read(args, *job) for job in jobs if done(args, *job)}
    print(f"{len(rows)} of {len(jobs)} runs are finished", file=sys.stderr)
    write(args, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, nargs="+", default=CONFIGS, help="of the data sets")
    parser.add_argument("--k", type=int, nargs="+", default=list(K))
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--methods", type=lambda x: x.split(","), default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--part", type=share, default=(1, 1), help="i/n: every n-th run from i")
    parser.add_argument("--set", action="append", default=[], help="field=value of every config")
    args, rest = parser.parse_known_args()
    for flag in rest:
        if not flag.startswith("--config.") or "=" not in flag:
            parser.error(f"unrecognized argument {flag}; fields are given as --config.field=value")
        args.set.append(flag.removeprefix("--config."))
    known = {*config.METHODS, *LEARNERS}
    if unknown := set(args.methods) - known:
        parser.error(f"--methods {', '.join(sorted(unknown))}: give any of {', '.join(known)}")
    return args


def share(text: str) -> tuple[int, int]:
    """ "2/3" -> (2, 3)."""
    part, _, parts = text.partition("/")
    if not 1 <= int(part) <= int(parts):
        raise argparse.ArgumentTypeError(f"{text}: give i/n with i from 1 to n")
    return int(part), int(parts)


def fields(args, file: Path, k: int, method: str, seed: int):
    """The config of one run."""
    learner = method in LEARNERS
    c = settings(SimpleNamespace(config=file, set=args.set), k, "ours" if learner else method, seed)
    if learner:
        c.learner = method
    if seed:  # explanations are checked in the first draw alone
        c.explained = 0
    return c


def folder(args, file: Path, k: int, method: str, seed: int) -> Path:
    return args.runs / f"{file.stem}-k{k}-{method}-{seed}"


def done(args, *job) -> bool:
    return (folder(args, *job) / "scores.npz").is_file()


def finished(args, *job) -> None:
    """Make one run if it is not there: metrics.json, scores.npz and, of draw 0, its panels."""
    if done(args, *job):
        return
    workdir = folder(args, *job)
    c = fields(args, *job)
    print(*job[1:], job[0].stem, file=sys.stderr, flush=True)
    train.run(c, workdir, pictures=False)
    held = load.read(workdir)
    with np.load(workdir / "predictions.npz", allow_pickle=False) as file:
        beside = {n: file[n] for n in ("pixel_counts", "patient") if n in file.files}
    if job[3] == 0 and job[2] == "ours":  # for the figures
        sheet = gallery.pages([p._replace(name=f"K = {job[1]}") for p in held.panels[:SHOWN]])
        files.write_bytes(workdir / "panels.png", gallery.stack(sheet))
    kept = workdir / ".scores.npz"
    np.savez_compressed(kept, **held.predictions, **beside)
    (workdir / "predictions.npz").unlink()  # 75 MB of maps each
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    kept.rename(workdir / "scores.npz")  # last: it says that the run is whole


def read(args, *job) -> dict:
    """Metrics of a finished run, with scores, labels and where its arrays are."""
    result = json.loads((folder(args, *job) / "metrics.json").read_text())
    result["arrays"] = folder(args, *job) / "scores.npz"
    with np.load(result["arrays"], allow_pickle=False) as held:
        names = {*COLUMNS, "patient"} & set(held.files)
        result |= {name: held[name] for name in names}
    score, label = result["score"], result["label"]
    result["image"]["sensitivity_at_90"] = metrics.sensitivity_at(score, label, 0.9)
    both = len(set(label.tolist())) == 2
    result["oracle"] = {"f1": metrics.oracle_f1(score, label)[0] if both else None}
    return result


def write(args, rows: dict) -> None:
    """runs.csv, summary.csv, tables.md and figures of all finished runs."""
    cells: dict[tuple[str, int], dict[str, list[dict]]] = {}
    for (file, k, method, _), result in rows.items():
        cells.setdefault((file.stem, k), {}).setdefault(method, []).append(result)
    files.write_bytes(args.out / "runs.csv", tables.per_run(rows).encode())
    found = tables.measured(cells)
    files.write_bytes(args.out / "summary.csv", tables.summary(cells, found).encode())
    files.write_bytes(args.out / "tables.md", tables.markdown(cells, found, args.draws).encode())
    for (name, k), methods in cells.items():
        for file, chart in curves.drawn(name, methods, k).items():
            files.write_bytes(args.out / "figures" / file, chart)
    draw(args)


# --- figures --------------------------------------------------------------------------------


def draw(args) -> None:
    """Maps and boxes by K (the paper's Figures 2 to 4), loss and validation by K (5 to 7)."""
    from medclip_jax.training.metrics_log import read_steps

    for file in args.config:
        at = [(k, folder(args, file, k, "ours", 0)) for k in args.k]
        sheets = [(w / "panels.png").read_bytes() for _, w in at if (w / "panels.png").is_file()]
        if sheets:
            path = args.out / "figures" / f"{file.stem}-maps.png"
            files.write_bytes(path, gallery.stack(sheets))
        for k, workdir in at:
            if done(args, file, k, "ours", 0):
                chart = figures.loss(read_steps(workdir / "metrics.jsonl"))
                files.write_bytes(args.out / "figures" / f"{file.stem}-k{k}-training.png", chart)


if __name__ == "__main__":
    main()
