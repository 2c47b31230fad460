"""SIGTERM and SIGINT while predicting: the same command ends as if nothing had happened."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import content
from tests.support.paths import ROOT

IMAGES = 96  # six batches
# where tests run in the background of a shell, SIGINT is ignored and a child would inherit that
PROGRAM = """
import os, signal, sys
from medclip_jax import main
signal.signal(signal.SIGINT, signal.default_int_handler)
replace, results = os.replace, []

def counted(source, target):
    replace(source, target)
    if not str(target).endswith(".json"):
        return
    results.append(target)
    if len(results) == {least}:  # once: a second signal could cut the last line of the bar
        os.kill(os.getpid(), {number})

os.replace = counted
sys.exit(max([main.main(command) for command in {commands}]))
"""


@pytest.fixture
def predict(tmp_path, whole):
    """Predict IMAGES images into each folder, in a process that signals itself after some items."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (60, 50), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")

    def run(*outputs: Path, number: int = 0, least: int = 0) -> tuple[int, str]:
        flags = "--mode=predict", f"--workdir={whole}", f"--input={tmp_path / 'in'}"
        commands = [["main", *flags, f"--output={folder}"] for folder in outputs]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(number=number, least=least, commands=commands)],
            cwd=ROOT,
            # a batch is for all devices; of one, most images wait when the signal comes
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stderr

    return run


def finished(folder: Path) -> int:
    """Items that a stopped prediction has finished."""
    assert not (folder / "results.csv").exists()  # a table is of everything
    assert not list(folder.glob(".*"))  # nothing half-written stays
    return len(list(folder.glob("*.json")))


@pytest.mark.slow
def test_signals_while_predicting_and_the_same_command_finishes(predict, tmp_path):
    cut, whole = tmp_path / "cut", tmp_path / "undisturbed"
    code, stderr = predict(cut, number=signal.SIGINT, least=1)
    assert code == 130, stderr[-3000:]
    assert stderr.splitlines()[-1] == "Interrupted. Re-run the same command to resume."
    first = finished(cut)
    code, stderr = predict(cut, number=signal.SIGTERM, least=1)
    assert code == 143, stderr[-3000:]
    second = finished(cut)
    assert int(re.search(rf"stopped by SIGTERM after (\d+) of {IMAGES} items", stderr)[1]) == second
    assert 1 <= first < second < IMAGES
    code, stderr = predict(cut, whole)
    assert code == 0, stderr[-3000:]
    ours, theirs = content.of_prediction(cut), content.of_prediction(whole)
    # JSON, overlay, map and moments of MC-dropout of each, and two tables
    assert len(theirs) == 4 * IMAGES + 2 and ours == theirs
