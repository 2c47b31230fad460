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

from medclip_jax import workdir as workdirs
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.runs import META

EPISODES = (*META, "--config.learner=fomaml")  # each process compiles, and the exact step is slow


TOY = """
from medclip_jax import main, train
from medclip_jax.distributed import sharding
from medclip_jax.features import training_pool
from medclip_jax.training import loop, step
from tests.support import toy

def run(fields, workdir, **_):
    many = 10**6
    loop.fit(
        toy.toy_params(8), {}, [toy.planted_pool(4, 8, 8, 1, 4)], training_pool.folds(4, 2),
        loss=toy.toy_loss, optimizer=loop.adam(0.05), learner=step.Learner("joint"),
        schedule=loop.Schedule(many, 0, 4, 3, 2, many, 0), workdir=workdir, mesh=sharding.mesh(),
    )

train.run = run  # all around it is as a user gets it
main.cli()
"""


def start(
    world, workdir: Path, *more: str, program=("-m", "medclip_jax.main"), apart: bool = False
) -> list[subprocess.Popen]:
    """The same command in two processes that find one another on loopback.

    apart: each has a workdir and a cache of its own, as on two machines.
    """
    port = free_port()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}

    def one(i):
        address = f"--config.distributed=localhost:{port},{i}/2"
        place = workdir.with_name(f"{workdir.name}-{i}") if apart else workdir
        own = [f"--config.cache={place}-cache"] if apart else []
        flags = world.flags(place, *more, *own, address)
        return subprocess.Popen(
            [sys.executable, *program, *flags],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return [one(i) for i in range(2)]


def ended(running: list[subprocess.Popen], timeout: int = 300) -> list[tuple[int, str]]:
    """(exit code, stderr) of each; none is left behind."""
    try:
        said = [p.communicate(timeout=timeout)[1] for p in running]
    finally:
        for p in running:
            p.kill()
            p.wait()
    return [(p.returncode, text) for p, text in zip(running, said, strict=True)]


def test_two_processes_without_a_common_disk_equal_one(world, tmp_path):
    """Files, metrics and predictions; by rounding, since two devices sum in another order.

    Three tasks do not spread evenly over two processes.
    """
    one, two = tmp_path / "one", tmp_path / "two-0"
    more = (*EPISODES, "--config.steps=4", "--config.explained=2")
    running = start(world, tmp_path / "two", *more, apart=True)
    assert world.main(one, *more, f"--config.cache={tmp_path}/one-cache") == 0
    codes = ended(running)
    assert all(code == 0 for code, _ in codes), codes

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
    names = [
        sorted(p.name for p in (tmp_path / f"{n}-cache/feature_cache").rglob("*.*"))
        for n in ("one", "two-0", "two-1")
    ]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 4 + 4 + 12  # images, variants, test images
    assert not (tmp_path / "two-1").exists()  # process 0 alone needs a workdir


def trains(world, workdir: Path) -> list[subprocess.Popen]:
    """Two processes that have logged some of many steps of a loss of four numbers."""
    running = start(world, workdir, program=("-c", TOY))
    log, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
    while not (log.is_file() and log.read_bytes().count(b"\n") > 1):
        if time.monotonic() > deadline or running[0].poll() is not None:
            raise AssertionError(ended(running, 1))
        time.sleep(0.05)
    return running


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(world, tmp_path, victim):
    """In the middle of training; the one that is left says what happened and what to do."""
    running = trains(world, tmp_path / "killed")
    running[victim].kill()
    code, stderr = ended(running, 30)[1 - victim]
    assert code == 2, stderr
    assert "Another process of the run has ended" in stderr.splitlines()[-1]
    assert "Check failure" not in stderr and "Traceback" not in stderr


def test_sigterm_to_one_process_stops_all(world, tmp_path):
    """All save the same step and exit alike."""
    running = trains(world, tmp_path / "stopped")
    running[1].send_signal(signal.SIGTERM)
    codes = ended(running)
    assert [code for code, _ in codes] == [143, 143], codes
    assert all("stopped by SIGTERM at step" in text for _, text in codes)


def test_a_workdir_in_use_is_refused_by_all(world, tmp_path):
    with workdirs.locked(tmp_path / "used"):
        codes = ended(start(world, tmp_path / "used"))
    assert [code for code, _ in codes] == [2, 2], codes
    assert "is in use by another run" in codes[0][1]
    assert "process 0 says why" in codes[1][1]
    assert not (tmp_path / "used" / "config.json").exists()
