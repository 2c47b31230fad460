"""Run a table of variants on data sets x K x draws, and tabulate whatever is finished.

python experiments/sweep.py --config configs/busi.py configs/brain_mri.py --variants methods \
  --k 4 16 --draws 10 --runs runs/methods --out results --set data.root=/data

--variants names a file of experiments/variants; the first that runs is the base of comparisons.
A field of a variant may be a function of K.
Draw i is seed i for every variant, so all see the same supports; whole draws run first. A finished
run is never repeated, and a stopped one resumes. Start the same command in several terminals to
share the work: each run belongs to the process that locks it; or --engine ray [--ray.address
HOST:PORT] runs each draw as a task of a cluster whose nodes share all folders. Tokens, data and
compiled programs are shared through the cache (--set cache=FOLDER).

Both splits are run: `clean`, the headline, and `peer`, as published tables have it. Report sets
(medclip_jax.data.catalog.EVIDENCE) need --report and the frozen configuration, see looks.py.

Writes below --out: runs.csv (a line per run), summary.csv (a line per data set, K, variant and
metric, with intervals, tests and published numbers), tables.md, and runs.npz: with --archive on
another machine these runs are not repeated there.
"""

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import sys
from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import archive
import command
import filelock
import looks
import numpy as np
import tables
from ml_collections import ConfigDict

from medclip_jax import config as config_module
from medclip_jax import files, train
from medclip_jax.data import splits
from medclip_jax.errors import ConfigError, UserError, WorkdirError
from medclip_jax.evaluation import metrics
from medclip_jax.features import encoder

ARRAYS = ("id", "label", "score", "p_value", "uncertainty", "patient", "unit", "pixel_counts")
TABULATED = ("id", "label", "score", "patient", "unit")  # of these, what tables read at once
TEACHER = "{teacher}"  # in a variant: the folder of the variant `teacher` of the same draw


class Job(NamedTuple):
    """One run of a sweep; all fields but the last say which supports it sees."""

    config: str
    k: int
    seed: int
    split: str
    variant: str

    @property
    def dataset(self) -> str:
        file, _, words = self.config.partition(":")
        return words.partition(",")[0] or Path(file).stem

    @property
    def name(self) -> str:
        split = "" if self.split == "peer" else f"-{self.split}"
        return f"{self.dataset}{split}-k{self.k}-{self.variant}-{self.seed}"


def main() -> None:
    args = arguments()
    guard(args)
    jobs = [
        Job(config, k, seed, split, variant)
        for seed in range(args.draws)  # first: what is stopped early can be compared
        for config in args.config
        for split in args.split
        for k in args.k
        for variant in args.only
    ]
    draws = [[*same] for _, same in groupby(jobs, lambda job: job[:-1])]
    for job in (job for job in jobs if not job.seed):  # now, not after the runs before it
        try:
            config_module.resolve(settings(args, job))
        except ConfigError as error:
            raise ConfigError(f"{job.name}: {error}") from None
    with on_ray(args) if args.engine else nullcontext(map) as each:
        while any([*each(partial(run_all, args), draws)]):
            pass  # once more for what others left unfinished
    results = {job: finished(args, job) for job in jobs if done(args, job)}
    print(f"{len(results)} of {len(jobs)} runs are finished", file=sys.stderr)
    if not results:
        raise UserError(f"no run in {args.runs} is finished: no table is written, run this again")
    write(args.out, results, args.only)


def arguments() -> argparse.Namespace:
    """The command line; `fields`: those of each variant by name, `only`: the variants to run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", required=True, help="of the data sets")
    parser.add_argument("--variants", default="methods", help="a file of experiments/variants")
    parser.add_argument("--only", type=lambda x: x.split(","), help="variants of it, by comma")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--draws", type=command.count, default=10)
    parser.add_argument("--split", nargs="+", choices=splits.KINDS, default=["clean", "peer"])
    parser.add_argument("--report", action="store_true", help="score report sets, as frozen")
    parser.add_argument("--freeze", action="store_true", help="write frozen.json, run nothing")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs' workdirs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--archive", type=Path, nargs="+", default=[], help="other runs.npz files")
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE of all runs")
    parser.add_argument("--engine", choices=["ray"], help="runs are tasks of a Ray cluster")
    parser.add_argument("--ray.address", dest="address", default="", help="HOST:PORT of it")
    parser.add_argument("--ray.workers", dest="workers", type=int, default=0, help="at a time")
    args = parser.parse_args()
    words = [word for x in args.config for word in x.partition(":")[2].split(",")]
    if any(x.partition("=")[0] in ("k", "seed", "data.split") for x in args.set + words):
        parser.error("k, seed, data.split of --set or --config: give --k, --draws, --split")
    names = [Job(x, 0, 0, "", "").dataset for x in dict.fromkeys(args.config)]
    if twice := {name for name in names if names.count(name) > 1}:  # one would pass for the other
        parser.error(f"--config has two data sets called {twice.pop()}: rename a file, or run one")
    try:
        args.fields = importlib.import_module(f"variants.{args.variants}").VARIANTS
    except ModuleNotFoundError:
        names = sorted(p.stem for p in Path(__file__).with_name("variants").glob("[a-z]*.py"))
        parser.error(f"--variants {args.variants}: give one of {', '.join(names)}")
    args.archived = {n: run for path in args.archive for n, run in archive.read(path).items()}
    args.only = args.only or list(args.fields)
    if unknown := [name for name in args.only if name not in args.fields]:
        parser.error(f"--only {', '.join(unknown)}: give any of {', '.join(args.fields)}")
    return args


def guard(args: argparse.Namespace) -> None:
    """Report sets are run as frozen and logged, or not at all; --freeze ends here.

    Raises:
      UserError: a report set without --report, or settings that differ from the frozen ones.
    """

    def at16(dataset: str, variant: str) -> ConfigDict:
        return settings(args, first[dataset]._replace(variant=variant))

    first = {(job := Job(str(x), 16, 0, "clean", args.only[0])).dataset: job for x in args.config}
    report = [name for name in first if looks.is_report(at16(name, args.only[0]))]
    if report and not (args.report or args.freeze):
        raise UserError(
            f"{', '.join(report)}: a report set is scored with the frozen configuration only: "
            "add --report, and the look is logged in docs/looks.csv"
        )
    if args.report or args.freeze:
        now = looks.described(at16, [*first], next(iter(args.fields)), args.only)
        if args.freeze:
            sys.exit(print(f"frozen as {looks.freeze(now)}: {looks.FROZEN}"))
        looks.log(looks.check(now), report)


def settings(args: argparse.Namespace, job: Job) -> ConfigDict:
    """The config of one run: the file's fields, then those of --set, then the variant's own."""
    file, _, words = job.config.partition(":")
    if not Path(file).is_file():
        raise UserError(f"--config {file}: there is no such file")
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(",".join(filter(None, [words, f"k={job.k},seed={job.seed}"])))
    c.data.split = job.split
    for assignment in args.set:
        name, _, text = assignment.partition("=")
        try:
            text_field = isinstance(dict(config_module.flat(c))[name], str)
            c.update_from_flattened_dict({name: text if text_field else literal_eval(text)})
        except (KeyError, SyntaxError, TypeError, ValueError):
            raise UserError(f"--set {assignment}: give a field and its value: steps=10") from None
    if job.seed:  # explanations are checked in the first draw alone: they take longest
        c.explained = 0
    teacher = args.runs / job._replace(variant="teacher").name
    fields = {n: x(job.k) if callable(x) else x for n, x in args.fields[job.variant].items()}
    c.update_from_flattened_dict(
        {n: str(teacher) if x == TEACHER else x for n, x in fields.items()}
    )
    return c


def run_all(args: argparse.Namespace, jobs: Sequence[Job]) -> bool:
    """`run` the variants of one draw; forget the synthetic anomalies that no other draw can use."""
    ran = [run(args, job) for job in jobs]
    if any(ran) and all(done(args, job) for job in jobs):
        workdir = args.runs / jobs[ran.index(True)].name
        split = json.loads((workdir / "split.json").read_text())
        folder = encoder.supports_folder([r["sha256"] for r in split["support"]])
        root = Path(config_module.resolve(settings(args, jobs[0])).cache)
        for path in root.glob(f"feature_cache/*/{folder}"):
            shutil.rmtree(path, ignore_errors=True)
    return any(ran)


@contextmanager
def on_ray(args: argparse.Namespace) -> Iterator[Callable]:
    """What maps a function over items as tasks of a cluster, in any order, run again if lost."""
    from medclip_jax.inference import ray_engine

    args.runs = args.runs.absolute()
    args.runs.mkdir(parents=True, exist_ok=True)

    def each(function: Callable, items: Sequence) -> Iterator:
        folder, (reserved, most) = Path.cwd(), ray_engine.places(args.workers)

        def task(item):
            ray_engine.check(versions, [str(folder), str(args.runs)])
            os.chdir(folder)  # relative paths
            return function(item)

        versions, pending = ray_engine.versions(), []
        for item in items:
            pending.append(ray_engine.ray.remote(task).options(**reserved).remote(item))
            if len(pending) >= most:
                (ref,), pending = ray_engine.ray.wait(pending)
                yield ray_engine.answer_of(ref)
        yield from map(ray_engine.answer_of, pending)

    with ray_engine.connected(args.address):
        yield each


def done(args: argparse.Namespace, job: Job) -> bool:
    return job.name in args.archived or (args.runs / job.name / "scores.npz").is_file()


def finished(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What tables need of a finished run."""
    return args.archived.get(job.name) or read(args.runs / job.name, job.seed)


def run(args: argparse.Namespace, job: Job, wait: bool = False) -> bool:
    """Finish one run; False if it was finished before or (unless `wait`) another process has it.

    Raises:
      WorkdirError: the folder holds a finished run with other settings.
    """
    c, workdir = settings(args, job), args.runs / job.name
    if done(args, job):
        refuse_other(args, job, c)
        return False
    if TEACHER in args.fields[job.variant].values():
        run(args, job._replace(variant="teacher"), wait=True)
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(f"{workdir}.lock", timeout=-1 if wait else 0):
            if done(args, job):
                return False
            print(job.name, file=sys.stderr, flush=True)
            train.run(c, workdir, report=False)
            if not (workdir / "predictions.npz").is_file():
                raise UserError(f"{job.name}: the data set has no test images: add some")
            reduce(workdir)
    except filelock.Timeout:
        return False
    return True


def refuse_other(args: argparse.Namespace, job: Job, c: ConfigDict) -> None:
    """Raise WorkdirError if a finished run had other settings than `c`."""
    workdir, archived = args.runs / job.name, args.archived.get(job.name)
    before = archived["settings"] if archived else as_flat((workdir / "config.json").read_text())
    for name, value in as_flat(config_module.resolve(c).to_json_best_effort()).items():
        if before.get(name) != value:
            raise WorkdirError(
                f"{workdir} is a finished run with {name} = {before.get(name)}, not {value}: give "
                "another --runs folder or --archive, or the settings of the first sweep"
            )


def as_flat(text: str) -> dict[str, Any]:
    """The fields of settings in JSON that say what a run computes, by dotted name."""
    return dict(config_module.flat(config_module.comparable(json.loads(text))))


def reduce(workdir: Path) -> None:
    """Keep of a finished run what tables need; scores.npz, written last, says that it is whole."""
    with np.load(workdir / "predictions.npz", allow_pickle=False) as arrays:
        scores = {name: arrays[name] for name in ARRAYS if name in arrays.files}
    part = workdir / ".scores.npz"
    np.savez_compressed(part, **scores)
    (workdir / "predictions.npz").unlink()  # 75 MB of maps each
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    part.rename(workdir / "scores.npz")


def read(workdir: Path, seed: int) -> dict[str, Any]:
    """metrics.json of a finished run with its arrays; `pixel_counts` is read when it is called."""
    result = json.loads((workdir / "metrics.json").read_text()) | {"seed": seed}
    result["settings"] = as_flat((workdir / "config.json").read_text())
    with np.load(workdir / "scores.npz", allow_pickle=False) as arrays:
        result |= {name: arrays[name] for name in TABULATED if name in arrays.files}
    result["pixel_counts"] = partial(pixel_counts, workdir)
    split = json.loads((workdir / "split.json").read_text())
    result["support"] = [row["sha256"][:16] for row in split["support"]]  # as archives keep them
    score, label = result["score"], result["label"]
    result["image"]["sensitivity_at_90"] = metrics.sensitivity_at(score, label, 0.9)
    both = len(set(label.tolist())) == 2
    result["oracle"] = {"f1": metrics.oracle_f1(score, label)[0] if both else None}
    return result


def pixel_counts(workdir: Path) -> np.ndarray | None:
    """Counts of pixels by score and image; None where no lesion is outlined."""
    with np.load(workdir / "scores.npz", allow_pickle=False) as arrays:
        return arrays["pixel_counts"] if "pixel_counts" in arrays.files else None


def write(out: Path, results: dict[Job, dict[str, Any]], only: Sequence[str]) -> None:
    """runs.csv, summary.csv and tables.md of finished runs; the base is the first of `only`."""
    cells: dict[tables.Place, dict[str, list[dict]]] = {}
    weights: dict[Any, str] = {}
    for job, result in results.items():
        named = tuple(result["settings"][x] for x in ("clip.checkpoint", "memory_encoder"))
        if (other := weights.setdefault(named, result["backbone"])) != result["backbone"]:
            raise UserError(
                f"{job.name} was run with {result['backbone']}, others with {other}: the CLIP "
                "has changed between them, so give another --runs folder or --archive"
            )
    for job, result in sorted(results.items(), key=lambda item: only.index(item[0].variant)):
        cell = cells.setdefault((job.dataset, job.split, job.k), {})
        cell.setdefault(job.variant, []).append(result)
    summaries = tables.summarise(cells, only[0])
    files.write_bytes(out / "runs.csv", tables.runs_csv(cells))
    files.write_bytes(out / "summary.csv", tables.summary_csv(cells, summaries))
    files.write_bytes(out / "tables.md", tables.markdown(cells, summaries))
    archive.write(out / "runs.npz", {job.name: result for job, result in results.items()})


if __name__ == "__main__":
    command.run(main)
