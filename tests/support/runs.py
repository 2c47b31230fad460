"""Whole runs through the command line, on a tiny CLIP and tiny phantoms."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from medclip_jax import main
from medclip_jax.data import phantom
from tests.support.checkpoints import tiny_checkpoint
from tests.support.paths import ROOT

STEPS, EVERY = 150, 10


class World(NamedTuple):
    """Tiny data, a tiny CLIP and a cache that all runs share."""

    base: Path
    data: Path
    clip: Path

    def flags(self, workdir: Path, *more: str, arguments: str = "k=4") -> list[str]:
        return [
            f"--config={ROOT}/configs/folder.py:{arguments},root={self.data}",
            f"--workdir={workdir}",
            f"--config.cache={self.base / 'cache'}",
            f"--config.clip.checkpoint={self.clip}",
            "--config.synthesis.variants=2",
            "--config.score.passes=2",
            f"--config.steps={STEPS}",
            f"--config.checkpoint_every={EVERY}",
            *more,
        ]

    def start(self, workdir: Path, *more: str, **options) -> subprocess.Popen:
        """The command as a user gives it, in a process of its own."""
        return subprocess.Popen(
            [sys.executable, *options.get("python", ()), "-m", "medclip_jax.main"]
            + self.flags(workdir, *more),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def main(self, workdir: Path, *more: str, **options) -> int:
        """The same in this process."""
        return main.main(["main", *self.flags(workdir, *more, **options)])


class Finished(NamedTuple):
    workdir: Path
    stderr: str


@cache
def make_world(base: Path) -> World:
    """8 supports, 6 healthy and 6 diseased test images of 64 pixels; a random CLIP of 32 pixels."""
    base = base / "world"
    data = phantom.write_folder(base / "data", "ultrasound", 0, 64, 8, 6, 6)
    clip, *_ = tiny_checkpoint(base / "clip")
    return World(base, data, clip)


@cache
def finished(base: Path) -> Finished:
    """One uninterrupted run; -X importtime lists on stderr every module it imported."""
    here = make_world(base)
    process = here.start(here.base / "whole", python=("-X", "importtime"))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    return Finished(here.base / "whole", stderr)


@pytest.fixture
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.getbasetemp())


@pytest.fixture
def whole(tmp_path_factory) -> Path:
    return finished(tmp_path_factory.getbasetemp()).workdir


def predictions(workdir: Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "predictions.npz", allow_pickle=False) as held:
        return {name: held[name] for name in held.files}


def log(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows
