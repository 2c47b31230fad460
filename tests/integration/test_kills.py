"""kill -9 at a random moment of every stage: the same command ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import content
from tests.support.paths import ROOT
from tests.support.runs import EVERY, EXPLAINED, STEPS

PATIENCE = 300  # seconds
IMAGES = 40

pytestmark = pytest.mark.slow


def kill(process: subprocess.Popen, reached: Callable[[], bool], wait: float) -> None:
    """Kill it some time after `reached` holds; it may have ended before."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and not reached():
        assert time.monotonic() < end, "the stage was not reached"
        time.sleep(0.002)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), stderr[-3000:]


def finish(process: subprocess.Popen) -> None:
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr[-3000:]


def newest(workdir: Path) -> int:
    """The last checkpoint, also one that is still being written."""
    names = (p.name.partition(".")[0] for p in workdir.glob("checkpoints/*"))
    return max((int(name) for name in names if name.isdigit()), default=-1)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_a_training_that_is_killed_in_every_stage_loses_nothing(world, whole, tmp_path):
    rng, workdir, cache = np.random.default_rng(0), tmp_path / "killed", tmp_path / "cache"
    moments = {
        "features": lambda: len(list(cache.rglob("*"))) >= rng.integers(1, 25),
        "training": lambda: lines(workdir / "metrics.jsonl") >= 3,
        "checkpoint": lambda: newest(workdir) >= STEPS // 2 // EVERY * EVERY,
        "scoring": lambda: newest(workdir) >= STEPS,
    }
    flags = [*EXPLAINED, f"--config.cache={cache}"]
    for stage, reached in moments.items():
        longest = {"scoring": 3.0, "checkpoint": 0.02}.get(stage, 0.1)
        kill(world.start(workdir, *flags), reached, rng.uniform(0, longest))
    finish(world.start(workdir, *flags))
    assert content.of_run(workdir) == content.of_run(whole)


def test_a_prediction_that_is_killed_loses_nothing(whole, tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "scans").mkdir()
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (200, 180), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "scans" / f"{i}.png")

    def start(output: Path) -> subprocess.Popen:
        flags = f"--workdir={whole}", f"--input={tmp_path / 'scans'}", f"--output={output}"
        command = [sys.executable, "-m", "medclip_jax.main", "--mode=predict", *flags]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    cut = tmp_path / "cut"
    for _ in range(3):
        least = int(rng.integers(1, 3 * IMAGES - 5))
        kill(start(cut), lambda least=least: len(list(cut.glob("*"))) >= least, rng.uniform(0, 0.1))
    finish(start(cut))
    finish(start(tmp_path / "undisturbed"))
    assert content.of_prediction(cut) == content.of_prediction(tmp_path / "undisturbed")


def test_a_sweep_that_is_killed_loses_nothing(world, tmp_path):
    fields = {"data.root": world.data, "clip.checkpoint": world.clip, "steps": 30}
    fields |= {"synthesis.variants": 2, "score.passes": 2, "explained": 0}

    def start(folder: Path) -> subprocess.Popen:
        flags = [f"--config={ROOT}/configs/folder.py", "--k=4", "--draws=1", "--only=ours,memory"]
        flags += [f"--out={folder}/results", f"--runs={folder}/runs", f"--set=cache={folder}/cache"]
        flags += [f"--set={name}={value}" for name, value in fields.items()]
        command = [sys.executable, "experiments/sweep.py", *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}  # a script's folder is not the root
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )

    runs = tmp_path / "cut" / "runs"
    kill(start(tmp_path / "cut"), lambda: any(map(lines, runs.glob("*/metrics.jsonl"))), 0.05)
    kill(start(tmp_path / "cut"), lambda: any(runs.glob("*/scores.npz")), 0.5)
    for name in ("cut", "undisturbed"):
        finish(start(tmp_path / name))
    tables = [
        (tmp_path / name / "results/summary.csv").read_text() for name in ("cut", "undisturbed")
    ]
    cut, undisturbed = (
        [line for line in text.splitlines() if "seconds" not in line] for text in tables
    )
    assert cut == undisturbed
