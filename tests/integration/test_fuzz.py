"""Broken files of every format, in a process of their own: no crash, no hang, no growth."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from medclip_jax import workdir
from medclip_jax.detectors import saved
from medclip_jax.errors import UserError
from medclip_jax.report import load
from tests.integration import fuzz_workdir
from tests.support.paths import ROOT

CASES = int(os.environ.get("MEDCLIP_FUZZ_CASES", "300"))
HANG = 120 + CASES  # seconds; three cases take about a tenth of one


@pytest.mark.slow
def test_broken_files_through_prediction_are_scored_or_listed(whole):
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.fuzz_predict", f"--cases={CASES // 2}"]
        + [f"--workdir={whole}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["files"] == CASES // 2 and found["scored"] > 9 and found["refused"] > 9
    assert found["grown_mb"] < 1024


@pytest.mark.slow
def test_broken_files_give_an_image_or_a_data_error():
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.fuzz_readers", "--cases", str(CASES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    kinds = [found[k] for k in found if isinstance(found[k], dict)]
    assert len(kinds) == 7 and sum(k["read"] + k["refused"] for k in kinds) == CASES
    assert all(k["refused"] for k in kinds) and sum(k["read"] for k in kinds) > CASES // 10
    assert found["grown_mb"] < 1024


@pytest.fixture(scope="module")
def copied(whole, tmp_path_factory):
    """A finished run and its twin, as fuzz_workdir restores from it."""
    base = tmp_path_factory.mktemp("damaged")
    for name in ("now", "whole"):
        shutil.copytree(whole, base / name / "run")
    return fuzz_workdir.Scene(base / "now", None, base / "whole", {})


def read_all(workdir):
    """What later commands believe of a run: its report's files and its detector."""
    stored, detector = load.read(workdir), saved.read(workdir)
    return stored.metrics, detector.digest, len(stored.pictures), stored.split["support"]


def test_sixty_damages_of_a_run_are_named_or_change_nothing(copied):
    rng, right, refused = np.random.default_rng(0), read_all(copied.base / "run"), 0
    names = ("config.json", "metrics.json", "split.json", "metrics.jsonl", "predictions.npz")
    names += ("scorer.json", "scorer.safetensors")
    for number in range(60):
        fuzz_workdir.restore(copied)
        way = fuzz_workdir.damage(copied, rng, copied.base / "run" / names[number % len(names)])
        try:
            workdir.check_names(copied.base / "run")
            found = read_all(copied.base / "run")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) > 40
            refused += 1
        else:
            assert found == right, (number, way)
    assert refused > 45


@pytest.mark.slow
def test_every_file_of_a_run_damaged_in_every_way(tmp_path):
    """No traceback, no other exit than 2 with one sentence, and never another result."""
    done = fuzz_workdir.run(tmp_path, 0, CASES, 0)
    assert not done["bad"]
    assert done["counts"]["refused"] > CASES // 5 and done["counts"]["right"] > CASES // 5
