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

from medclip_jax import workdir
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
        *("--config.synthesis.variants=16", "--config.explanation.count=2"),
        *("--config.score.passes=2", "--config.steps=4", "--config.validations=0"),
        "--config.learner=joint",
        *more,
    ]


def start(base: Path, workdir: str, *more: str, count: int = 2) -> list[subprocess.Popen]:
    """The same command in `count` processes that find one another on loopback."""
    port = free_port()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def one(i):
        command = [sys.executable, "-m", "medclip_jax.main", *flags(base, workdir, *more)]
        address = f"--config.distributed=localhost:{port},{i}/{count}"
        return subprocess.Popen(
            [*command, *([address] if count > 1 else ())],
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


def test_two_processes_equal_one(base):
    """Files, metrics and predictions; by rounding, since two devices sum in another order.

    Three tasks do not spread evenly over two processes.
    """
    more = ("--config.learner=fomaml", "--config.meta.tasks=3")
    codes = ended([*start(base, "two", *more), *start(base, "one", *more, count=1)])
    assert all(code == 0 for code, _ in codes), codes
    one, two = base / "one", base / "two"

    def listed(folder):
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if "checkp" not in str(p)} - {
            ".lock"
        }

    assert listed(one) == listed(two)
    assert len((two / "metrics.jsonl").read_text().splitlines()) == 1  # one process writes
    with np.load(one / "predictions.npz") as a, np.load(two / "predictions.npz") as b:
        assert a.files == b.files and np.array_equal(a["id"], b["id"])
        for name in ("score", "p_value", "uncertainty", "maps"):
            np.testing.assert_allclose(a[name], b[name], atol=2e-3)
    first, second = (json.loads((p / "metrics.json").read_text()) for p in (one, two))
    for group in ("image", "pixel", "calibration"):
        assert first[group] == pytest.approx(second[group], abs=2e-2)
    caches = [
        sorted(p.name for p in (base / f"cache-{n}/feature_cache").rglob("*.*"))
        for n in ("one", "two")
    ]
    assert caches[0] == caches[1] and len(caches[0]) == 4 + 4 + 9  # images, variants, test images


def trains(base: Path, workdir: str) -> list[subprocess.Popen]:
    """Two processes that have logged some steps of many."""
    running = start(base, workdir, "--config.steps=100000")
    log, deadline = base / workdir / "metrics.jsonl", time.monotonic() + 300
    while not (log.is_file() and log.read_bytes().count(b"\n") > 2):
        if time.monotonic() > deadline or running[0].poll() is not None:
            raise AssertionError(ended(running, 1))
        time.sleep(0.05)
    return running


def test_a_killed_process_ends_the_other(base):
    """In the middle of training; the one that is left says what happened and what to do."""
    running = trains(base, "killed")
    running[1].kill()
    code, stderr = ended(running)[0]
    assert code not in (0, None)
    assert "Another process of the run has ended" in stderr or "JAX distributed service" in stderr


def test_sigterm_to_one_process_stops_all(base):
    """All save the same step and exit alike."""
    running = trains(base, "stopped")
    running[1].send_signal(signal.SIGTERM)
    codes = ended(running)
    assert [code for code, _ in codes] == [143, 143], codes
    assert all("stopped by SIGTERM at step" in text for _, text in codes)


def test_a_workdir_in_use_is_refused_by_all(base):
    with workdir.locked(base / "used"):
        codes = ended(start(base, "used"))
    assert [code for code, _ in codes] == [2, 2], codes
    assert "is in use by another run" in codes[0][1]
    assert "process 0 says why" in codes[1][1]
    assert not (base / "used" / "config.json").exists()
