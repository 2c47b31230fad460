"""Broken files of every format, in a process of their own: no crash, no hang, no growth."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow
CASES = int(os.environ.get("MEDCLIP_FUZZ_CASES", "300"))
HANG = 120 + CASES  # seconds; three cases take about a tenth of one


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
