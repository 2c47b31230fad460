"""Whole runs on a tiny CLIP and tiny phantoms: by the command line, and in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from filelock import FileLock

from medclip_jax import config, main, train
from medclip_jax.data import phantom
from tests.support.checkpoints import tiny_checkpoint
from tests.support.paths import ROOT

STEPS, EVERY = 60, 10
# exact meta-learning; three tasks spread evenly neither over two processes nor over four devices
META = (
    *("--config.learner=maml", "--config.meta.tasks=3", "--config.synthesis.variants=16"),
    "--config.checkpoint_every=90",
)
EXPLAINED = "--config.explained=2", "--config.validations=6"  # of `finished` alone


class World(NamedTuple):
    """Tiny data, a tiny CLIP and a cache that all runs share."""

    base: Path
    data: Path
    clip: Path

    def fields(self, **more) -> dict:
        """Settings of a run that does no more than it must."""
        return {
            "cache": str(self.base / "cache"),
            "clip.checkpoint": str(self.clip),
            "synthesis.variants": 2,
            "score.passes": 2,
            "explained": 0,
            "validations": 0,
        } | {name.replace("__", "."): value for name, value in more.items()}

    def flags(self, workdir: Path, *more: str, arguments: str = "k=4") -> list[str]:
        return [
            f"--config={ROOT}/configs/folder.py:{arguments},root={self.data}",
            f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in self.fields().items()),
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

    def main(self, workdir: Path, *more: str, report: bool = True, **options) -> int:
        """The same in this process; without the report, which takes half of the time, if it may."""
        argv = ["main", *self.flags(workdir, *more, **options)]
        if report:
            return main.main(argv)
        with mock.patch.object(train, "write_report"):
            return main.main(argv)

    def train(self, workdir: Path, arguments: str = "k=4", **fields) -> dict:
        """A run of two steps in this process, without a report; `a__b` is the field `a.b`."""
        c = config.base(arguments, name="folder", root=str(self.data))
        c.update_from_flattened_dict(self.fields(**{"steps": 2} | fields))
        return train.run(c, workdir, report=False)


class Finished(NamedTuple):
    """What other tests only read: they copy what they change."""

    workdir: Path
    stderr: str


def make_world(base: Path) -> World:
    """8 supports, 6 healthy and 6 diseased test images of 64 pixels; a random CLIP of 32 pixels."""
    world = World(base, base / "data", base / "clip")
    base.mkdir(exist_ok=True)
    with FileLock(base / "lock"):
        if not world.data.is_dir():
            tiny_checkpoint(world.clip)
            phantom.write_folder(world.data, "ultrasound", 0, 64, 8, 6, 6)
    return world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """One for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return make_world((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "world")


@pytest.fixture(scope="session")
def finished(world) -> Finished:
    """One uninterrupted run; -X importtime lists on stderr every module it imported."""
    workdir, log = world.base / "whole", world.base / "whole.stderr"
    with FileLock(world.base / "whole.lock"):
        if not log.is_file():
            process = world.start(workdir, *EXPLAINED, python=("-X", "importtime"))
            _, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stderr[-3000:]
            log.write_text(stderr)
    return Finished(workdir, log.read_text())


@pytest.fixture(scope="session")
def whole(finished) -> Path:
    return finished.workdir


def predictions(workdir: Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "predictions.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def log(workdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return rows
