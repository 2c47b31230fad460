"""Several processes as one run: equal to one process, and ended together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medclip_jax.data import phantom
from tests.support.checkpoints import tiny_checkpoint
from tests.support.paths import ROOT
from tests.support.ports import free_port


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """8 supports and 5 + 4 test images of 64 pixels, a random CLIP of 32 pixels."""
    base = tmp_path_factory.mktemp("processes")
    phantom.write_folder(base / "data", "ultrasound", 0, 64, 8, 5, 4)
    tiny_checkpoint(base / "clip")
    return base


def flags(base: Path, workdir: str, *more: str) -> list[str]:
    return [
        f"--config={ROOT}/configs/folder.py:k=4,root={base}/data",
        f"--workdir={base / workdir}",
        f"--config.cache={base / 'cache'}-{'one' if workdir.startswith('one') else 'two'}",
        f"--config.clip.checkpoint={base / 'clip'}",
        *("--config.synthesis.variants=16", "--config.calibration.folds=2"),
        *("--config.score.passes=2", "--config.steps=4", "--config.log_every=2"),
        "--config.learner=joint",
        *more,
    ]


def start(base: Path, workdir: str, *more: str, count: int = 2) -> list[subprocess.Popen]:
    """The same command in `count` processes that find one another on loopback."""
    port = free_port()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def one(i):
        address = ("--config.distributed=True", f"--config.cluster.coordinator=localhost:{port}")
        address += (f"--config.cluster.processes={count}", f"--config.cluster.process={i}")
        command = [sys.executable, "-m", "medclip_jax.main", *flags(base, workdir, *more)]
        return subprocess.Popen(
            [*command, *(address if count > 1 else ())],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return [one(i) for i in range(count)]


def ended(running: list[subprocess.Popen], timeout: int = 300) -> list[tuple[int, str]]:
    """(exit code, stderr) of each; none is left behind."""
    try:
        said = [p.communicate(timeout=timeout)[1] for p in running]
    finally:
        for p in running:
            p.kill()
            p.wait()
    return [(p.returncode, text) for p, text in zip(running, said, strict=True)]


@pytest.mark.parametrize("learner", ["joint", "maml"])
def test_two_processes_equal_one(base, learner):
    """Files, metrics and predictions; by rounding, since two devices sum in another order.

    Three tasks do not spread evenly over two processes.
    """
    more = (f"--config.learner={learner}", "--config.meta.tasks=3")
    names = f"one-{learner}", f"two-{learner}"
    codes = ended([*start(base, names[1], *more), *start(base, names[0], *more, count=1)])
    assert all(code == 0 for code, _ in codes), codes
    one, two = (base / name for name in names)

    def listed(folder):
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if "checkp" not in str(p)}

    assert listed(one) == listed(two)
    assert len((two / "metrics.jsonl").read_text().splitlines()) == 2  # one process writes
    with np.load(one / "predictions.npz") as a, np.load(two / "predictions.npz") as b:
        assert a.files == b.files and np.array_equal(a["id"], b["id"])
        for name in ("score", "p_value", "uncertainty", "maps"):
            np.testing.assert_allclose(a[name], b[name], atol=2e-3)
    mine, other = (json.loads((p / "metrics.json").read_text()) for p in (one, two))
    for group in ("image", "pixel", "calibration"):
        assert mine[group] == pytest.approx(other[group], abs=2e-2)
    feature_caches = [
        sorted(p.name for p in (base / f"cache-{n}/feature_cache").rglob("*.*"))
        for n in ("one", "two")
    ]
    assert feature_caches[0] == feature_caches[1]
    assert (
        len(feature_caches[0]) == 4 + 4 + 9 + 2
    )  # images, variants, test images, and of redrawn towers


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_other(base, lost):
    """In the middle of training; the one that is left says what happened and what to do."""
    more = ("--config.steps=100000", "--config.learner=joint", "--config.cluster.heartbeat=10")
    running = start(base, f"killed-{lost}", *more)
    lines = base / f"killed-{lost}" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    try:
        while not (lines.is_file() and lines.read_bytes().count(b"\n") > 2):
            assert time.monotonic() < deadline and running[0].poll() is None
            time.sleep(0.05)
        running[lost].kill()
    finally:
        if not lines.is_file():
            ended(running, 1)
    code, said = ended(running)[1 - lost]
    assert code not in (0, None)
    assert "another process of the run has ended" in said or "JAX distributed service" in said


def test_sigterm_to_one_process_stops_all(base):
    """All save the same step and exit alike; the same command goes on, here by one process."""
    more = ("--config.steps=100000", "--config.learner=joint", "--config.log_every=2")
    running = start(base, "stopped", *more)
    lines = base / "stopped" / "metrics.jsonl"
    while not (lines.is_file() and lines.read_bytes().count(b"\n") > 2):
        assert running[0].poll() is None
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    codes = ended(running)
    assert [code for code, _ in codes] == [143, 143], codes
    assert all("stopped by SIGTERM at step" in text for _, text in codes)
