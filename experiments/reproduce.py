"""The paper's tables and figures: data sets x K x draws x methods, with intervals and tests.

python experiments/reproduce.py --out results --runs runs/reproduce --set data.root=/data \
  [--config FILE ...] [--k 4 8 16 32] [--draws 10] [--methods ours,memory,...] [--part 1/2] \
  [--config.clip.checkpoint=openai/clip-vit-large-patch14]

Draw i is seed i for every method. A finished run is never made again, so a killed command goes on;
several processes share the work with --part 1/2 and --part 2/2 (same --runs folder), and whichever
comes last writes tables of all that is finished. Tokens are kept in one bank, compiled programs in
its folder. Writes below --out: runs.csv (a line per run), tables.md, figures/.
"""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from compare import settings
from published import IMAGE_AUROC, PIXEL_AUROC, K

from medclip_jax import config as configuration
from medclip_jax import figures, files, gallery, metrics, results, stats, train

ROOT = Path(__file__).parents[1]
CONFIGS = [ROOT / "configs" / f"{name}.py" for name in ("busi", "brain_mri", "chest_xray")]
LEARNERS = ("maml", "fomaml", "anil")  # as methods: ours with this learner
METHODS = ("ours", "fomaml", "mediclip", "memory", "zero_shot", "thumbnails", "grey_level")
COLUMNS = (
    *(("image", name) for name in ("auroc", "auprc")),
    ("image", "sensitivity_at_90"),
    *(("calibration", name) for name in ("alpha_attained", "false_alarm_rate")),
    *(("pixel", name) for name in ("auroc", "auprc", "aupro", "dice")),
    ("oracle", "f1"),
)
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
    known = {*configuration.METHODS, *LEARNERS}
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
    cache = configuration.cache_folder(c.cache)
    jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    print(*job[1:], job[0].stem, file=sys.stderr, flush=True)
    train.run(c, workdir)
    held = results.read(workdir)
    if job[3] == 0 and job[2] == "ours":  # for the figures
        sheet = gallery.pages([p._replace(name=f"K = {job[1]}") for p in held.panels[:SHOWN]])
        files.write_bytes(workdir / "panels.png", gallery.stack(sheet))
    kept = workdir / ".scores.npz"
    np.savez(kept, **held.predictions)
    (workdir / "predictions.npz").unlink()  # 75 MB of maps each
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    kept.rename(workdir / "scores.npz")  # last: it says that the run is whole


def read(args, *job) -> dict:
    """Metrics of a finished run, with scores and labels."""
    result = json.loads((folder(args, *job) / "metrics.json").read_text())
    with np.load(folder(args, *job) / "scores.npz", allow_pickle=False) as held:
        result |= {name: held[name] for name in ("id", "label", "score")}
    score, label = result["score"], result["label"]
    result["image"]["sensitivity_at_90"] = metrics.sensitivity_at(score, label, 0.9)
    both = len(set(label.tolist())) == 2
    result["oracle"] = {"f1": metrics.oracle_f1(score, label)[0] if both else None}
    return result


# --- tables ---------------------------------------------------------------------------------


def write(args, rows: dict) -> None:
    """runs.csv, tables.md and figures of all finished runs."""
    args.out.mkdir(parents=True, exist_ok=True)
    head = ["dataset", "k", "method", "seed", *(f"{a} {b}" for a, b in COLUMNS)]
    with (args.out / "runs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *(line(job, r) for job, r in rows.items())])
    lines = ["# Results", "", *notes(args)]
    for file in args.config:
        for k in args.k:
            cell = {}
            for (f, n, method, _), result in rows.items():
                if (f, n) == (file, k):
                    cell.setdefault(method, []).append(result)
            if cell:
                lines += table(file, k, cell)
    files.write_bytes(args.out / "tables.md", ("\n".join(lines) + "\n").encode())
    draw(args)


def notes(args) -> list[str]:
    p = 2.0 ** (1 - args.draws)
    return [
        "Mean ± sd over support draws; draw i is seed i, the same for every method. The interval "
        "is a two-level bootstrap over draws and test images. Last step of a fixed budget; no test "
        "label is read before scoring, except for the columns named oracle, which are for "
        "comparison only. p: Wilcoxon over draws against ours, Holm-corrected within the table; "
        f"with {args.draws} draws it cannot be below {p:.4g}. DeLong: draws of "
        f"{args.draws} in which the AUROCs differ at p < 0.05 after Holm's correction.",
        "",
    ]


def line(job: tuple, result: dict) -> list:
    return [job[0].stem, *job[1:], *((result[a] or {}).get(b) for a, b in COLUMNS)]


def table(file: Path, k: int, cell: dict[str, list[dict]]) -> list[str]:
    """One Markdown table: methods by columns, then published numbers in rows of their own."""
    names = ["method", "draws", *(f"{a} {b}" for a, b in COLUMNS)]
    names[3:3] = ["image AUROC 95%", "p", "DeLong"]
    out = [f"## {file.stem}, K = {k}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    against = tests(cell)
    for method, runs in cell.items():
        cells = [spread([(r[a] or {}).get(b) for r in runs]) for a, b in COLUMNS]
        cells[1:1] = [interval(runs), *against.get(method, ("", ""))]
        out.append(f"| {method} | {len(runs)} | {' | '.join(cells)} |")
    out += [
        "",
        "Published elsewhere (other splits, backbones and stopping rules; context only):",
        "",
    ]
    for what, numbers in (("image", IMAGE_AUROC), ("pixel", PIXEL_AUROC)):
        for name, values in numbers.get(file.stem, {}).items():
            value = values[K.index(k)] if k in K else None
            if value is not None:
                out.append(f"- {name}: {what} AUROC {value:.3f}")
    return [*out, ""]


def spread(values: list[float | None]) -> str:
    """Mean ± sd, "–" where undefined."""
    known = np.array([np.nan if v is None else v for v in values], float)
    if not np.isfinite(known).all():
        return "–"
    return f"{known.mean():.3f}" + (f" ± {known.std(ddof=1):.3f}" if len(known) > 1 else "")


def interval(runs: list[dict]) -> str:
    """Two-level bootstrap of the image AUROC, if all draws have the same test images."""
    label = runs[0]["label"]
    if any(r["id"].tolist() != runs[0]["id"].tolist() for r in runs) or len(set(label)) < 2:
        return "–"
    scores = np.stack([r["score"] for r in runs])
    found = stats.bootstrap_interval(scores, label, np.random.default_rng(0), rounds=1000)
    return f"{max(found.low, 0):.3f} to {min(found.high, 1):.3f}"  # few draws reach beyond


def tests(cell: dict[str, list[dict]]) -> dict[str, tuple[str, str]]:
    """Each method against ours on the draws both have: Wilcoxon over draws, DeLong per draw."""
    ours = {r["seed"]: r for r in cell.get("ours", [])}
    names, p, per_draw = [], [], []
    for method, runs in cell.items():
        pairs = [(ours[r["seed"]], r) for r in runs if r["seed"] in ours]
        if method == "ours" or not pairs or None in [r["image"]["auroc"] for x in pairs for r in x]:
            continue
        a, b = (np.array([pair[i]["image"]["auroc"] for pair in pairs]) for i in (0, 1))
        each = [stats.delong(x["score"], y["score"], x["label"]).p for x, y in pairs]
        names.append(method)
        p.append(stats.wilcoxon(a, b).p)
        per_draw.append(each)
    if not names:
        return {}
    flat = np.nan_to_num(np.concatenate(per_draw), nan=1.0)
    adjusted = np.split(stats.holm(flat), np.cumsum([len(x) for x in per_draw])[:-1])
    return {
        name: (f"{value:.3f}", f"{int((each < 0.05).sum())} of {len(each)}")
        for name, value, each in zip(names, stats.holm(np.array(p)), adjusted, strict=True)
    }


# --- figures --------------------------------------------------------------------------------


def draw(args) -> None:
    """Maps and boxes by K (the paper's Figures 2 to 4), loss curves by K (Figures 5 to 7)."""
    from medclip_jax.writer import read_steps

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
