"""kill -9 at random moments of a tiny job; what resumes must end as if nothing had happened.

python experiments/faults.py --kills 30 [--seed 0] [--json FILE]

From a checkout, beside its tests, whose tiny random CLIP and simulated images it uses. Each job is
killed a few times, each time the same command goes on, and the last one runs to its end. Then its
files are compared with those of a job that nobody disturbed: metrics.json and the log but for
times, predictions.npz, tables and figures of reproduce.py byte for byte, and what the results of
prediction say.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
STEPS, EVERY, IMAGES = 300, 20, 40
PATIENCE = 600  # seconds until a stage must be reached; a job takes about ten
STAGES = ("feature_cache", "training", "checkpoint", "scoring")  # of one training job, in order
PREDICT, REPRODUCE = ("predict",) * 3, ("reproduce",) * 3
TABLE_STEPS, METHODS = 100, ("ours", "memory")  # of the runs of reproduce.py


class Job(NamedTuple):
    """A command, and where it leaves its files."""

    flags: tuple[str, ...]
    folder: Path
    cache: Path
    program: tuple[str, ...] = ("-m", "medclip_jax.main")

    def start(self, compiled: Path) -> subprocess.Popen:
        settings = {
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        return subprocess.Popen(
            [sys.executable, *self.program, *self.flags],
            cwd=ROOT,
            env=os.environ | settings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, compiled: Path) -> None:
        """Run to the end. Raises RuntimeError with the last lines if that fails."""
        process = self.start(compiled)
        _, said = process.communicate(timeout=PATIENCE)
        if process.returncode:
            raise RuntimeError(f"{self.folder}: exit code {process.returncode}\n{said[-3000:]}")


class World(NamedTuple):
    """Data, checkpoint and compiled code that all jobs share."""

    base: Path
    data: Path
    clip: Path
    scans: Path

    @property
    def compiled(self) -> Path:
        return self.base / "xla"

    def training(self, name: str, cache: Path) -> Job:
        flags = (
            f"--config={ROOT}/configs/folder.py:k=4,root={self.data}",
            f"--workdir={self.base / name}",
            f"--config.cache={cache}",
            f"--config.clip.checkpoint={self.clip}",
            "--config.synthesis.variants=2",
            "--config.calibration.folds=2",
            "--config.score.passes=2",
            f"--config.steps={STEPS}",
            f"--config.checkpoint_every={EVERY}",
        )
        return Job(flags, self.base / name, cache)

    def prediction(self, name: str, workdir: Path) -> Job:
        output = self.base / name
        flags = "--mode=predict", f"--workdir={workdir}", f"--input={self.scans}"
        return Job((*flags, f"--output={output}"), output, output)

    def reproduction(self, name: str) -> Job:
        """Two small runs and their tables: results/, runs/ and a feature_cache of its own in the folder."""
        folder = self.base / name
        fields = {
            "data.root": self.data,
            "cache": folder / "cache",
            "clip.checkpoint": self.clip,
            "synthesis.variants": 2,
            "calibration.folds": 2,
            "score.passes": 2,
            "steps": TABLE_STEPS,
            "checkpoint_every": EVERY,
        }
        flags = [f"--config={ROOT}/configs/folder.py", "--k=4", "--draws=1"]
        flags += [f"--methods={','.join(METHODS)}", f"--out={folder / 'results'}"]
        flags += [f"--runs={folder / 'runs'}", *(f"--set={n}={v}" for n, v in fields.items())]
        program = (str(ROOT / "experiments" / "reproduce.py"),)
        return Job(tuple(flags), folder, folder / "cache", program)

    def job(self, kind: str, name: str, trained: Path) -> Job:
        """A new job; kind: "training", "predict" (with the workdir `trained`) or "reproduce"."""
        if kind == "predict":
            return self.prediction(name, trained)
        if kind == "reproduce":
            return self.reproduction(name)
        return self.training(name, self.base / f"cache-{name}")


def world(base: Path) -> World:
    sys.path[:0] = [str(ROOT)]
    from medclip_jax.data import phantom
    from tests.support.checkpoints import tiny_checkpoint

    data = phantom.write_folder(base / "data", "ultrasound", 0, 64, 8, 6, 6)
    clip, *_ = tiny_checkpoint(base / "clip")
    scans = base / "scans"
    scans.mkdir()
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (200, 180), dtype=np.uint8)).save(scans / f"{i}.png")
    return World(base, data, clip, scans)


def moment(stage: str, job: Job, rng: np.random.Generator) -> Callable[[], bool]:
    """A condition that holds from a random moment of the stage on."""
    if stage == "feature_cache":
        least = int(rng.integers(1, 25))
        return lambda: sum(1 for _ in job.cache.rglob("*")) >= least
    if stage == "training":
        least = int(rng.integers(1, STEPS // 10 - 3))
        return lambda: _lines(job.folder / "metrics.jsonl") >= least
    if stage == "checkpoint":
        kept = job.folder / "checkpoints"
        after = int(rng.integers(EVERY, STEPS - 2 * EVERY))
        return lambda: _newest(kept) >= after
    if stage == "scoring":
        return lambda: _newest(job.folder / "checkpoints") >= STEPS
    if stage == "reproduce":
        runs = job.folder / "runs"
        if rng.random() < 0.5:  # while the first run trains
            least = int(rng.integers(1, TABLE_STEPS // 10))
            return lambda: sum(_lines(path) for path in runs.glob("*/metrics.jsonl")) >= least
        least = int(rng.integers(1, len(METHODS) + 1))  # between runs or before the tables
        return lambda: sum(1 for _ in runs.glob("*/scores.npz")) >= least
    least = int(rng.integers(1, 3 * IMAGES - 5))
    return lambda: sum(1 for _ in job.folder.glob("*")) >= least if job.folder.is_dir() else False


def kill(job: Job, stage: str, compiled: Path, rng: np.random.Generator) -> bool:
    """Start the job and kill it at a random moment of `stage`; False if it was over before."""
    reached = moment(stage, job, rng)
    wait = rng.uniform(0, {"scoring": 4.0, "reproduce": 2.0, "checkpoint": 0.02}.get(stage, 0.1))
    process, end = job.start(compiled), time.monotonic() + PATIENCE
    while process.poll() is None and not reached():
        if time.monotonic() > end:
            process.kill()
            raise RuntimeError(f"{job.folder} did not reach {stage} in {PATIENCE} s")
        time.sleep(0.002)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{job.folder}: exit code {process.returncode}\n{said[-3000:]}")
    return process.returncode == -signal.SIGKILL


def losses(job: Job, whole: Path) -> list[str]:
    """What the job left that differs from the undisturbed one."""
    theirs, ours = results(whole), results(job.folder)
    return [name for name in sorted(theirs.keys() | ours) if theirs.get(name) != ours.get(name)]


def results(folder: Path) -> dict[str, object]:
    """What must be equal: all that says nothing of time."""
    if (folder / "results.csv").is_file():
        # a killed writer's hidden temporary file stays a day, then prediction sweeps it away
        kept = (p for p in folder.iterdir() if not p.name.startswith("."))
        return {p.name: said(p) for p in kept}
    if (folder / "results").is_dir():
        return reproduced(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics.pop("timing")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
    with np.load(folder / "predictions.npz", allow_pickle=False) as held:
        arrays = {name: (held[name].dtype.str, held[name].tobytes()) for name in held.files}
    scorer = (folder / "scorer.safetensors").read_bytes()
    return {"metrics.json": metrics, "log": rows, "predictions": arrays, "scorer": scorer}


def said(path: Path) -> bytes:
    """What a result of prediction says; isal once deflated the same pixels to one byte more."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path)).tobytes()
    if path.suffix == ".json":
        told = json.loads(path.read_text())
        if set(told.pop("bytes")) != {"map", "overlay"}:
            raise ValueError(f"{path}: it does not give the bytes of map and overlay")
        return json.dumps(told).encode()
    return path.read_bytes()


def reproduced(folder: Path) -> dict[str, object]:
    """Tables and figures of reproduce.py, and what they were made of."""
    made = {str(p): p for p in (folder / "results").rglob("*") if p.is_file()}
    found = {name.removeprefix(str(folder)): path.read_bytes() for name, path in made.items()}
    for run in (folder / "runs").iterdir():
        metrics = json.loads((run / "metrics.json").read_text())
        metrics.pop("timing")
        with np.load(run / "scores.npz", allow_pickle=False) as held:
            arrays = {name: held[name].tobytes() for name in held.files}
        found |= {f"{run.name}/metrics": metrics, f"{run.name}/scores": arrays}
    return found


def _newest(checkpoints: Path) -> int:
    """The last checkpoint, also one that is still being written."""
    if not checkpoints.is_dir():
        return -1
    found = (p.name.partition(".")[0] for p in checkpoints.iterdir())
    return max((int(name) for name in found if name.isdigit()), default=-1)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def run(
    base: Path,
    kills: int,
    seed: int,
    stages: tuple[str, ...] = (*STAGES, "predict", "reproduce"),
    trained: Path | None = None,
) -> dict:
    """Kill `kills` times, the stages in turn, at most one job's worth of stages per job.

    trained: a workdir to predict with; without it that of the undisturbed training.
    Returns counts of kills and attempts that came too late by stage, and what was lost. Raises
    RuntimeError if a job fails.
    """
    rng, here = np.random.default_rng(seed), world(base)
    groups = {"training": STAGES, "predict": PREDICT, "reproduce": REPRODUCE}
    scorer, whole = trained or base / "whole-training", {}
    for kind, group in groups.items():
        needed = kind == "training" and trained is None and "predict" in stages
        if needed or set(group) & set(stages):
            whole[kind] = here.job(kind, f"whole-{kind}", scorer)
            whole[kind].finish(here.compiled)
    done, late, lost, number = Counter(), Counter(), [], 0
    while sum(done.values()) < kills:
        for kind, group in groups.items():
            chosen = [s for s in group if s in stages][: kills - sum(done.values())]
            if not chosen:
                continue
            number += 1
            job = here.job(kind, f"job{number}", scorer)
            for stage in chosen:
                (done if kill(job, stage, here.compiled, rng) else late)[stage] += 1
            job.finish(here.compiled)
            lost += [f"{job.folder.name}: {what}" for what in losses(job, whole[kind].folder)]
            print(f"{sum(done.values())} kills, {len(lost)} losses", file=sys.stderr, flush=True)
    return {"kills": dict(done), "too_late": dict(late), "jobs": number, "losses": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    known = (*STAGES, "predict", "reproduce")
    parser.add_argument("--stages", nargs="+", choices=known, default=known)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), given.kills, given.seed, tuple(given.stages))
    found = {"total": sum(found["kills"].values()), **found}
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    sys.exit(bool(found["losses"]))


if __name__ == "__main__":
    main()
