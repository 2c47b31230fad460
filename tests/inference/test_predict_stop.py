"""SIGTERM and SIGINT while predicting: the same command ends as if nothing had happened."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import content
from tests.support.paths import ROOT
from tests.support.predicting import run as predict

IMAGES = 240
# where tests run in the background of a shell, SIGINT is ignored and a child would inherit that
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from medclip_jax import main; main.cli()"
)


@pytest.fixture
def start(tmp_path, whole):
    """Predict IMAGES images into the named folder, in a process of its own."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (60, 50), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")

    def run(output: str) -> subprocess.Popen:
        flags = "--mode=predict", f"--workdir={whole}", f"--input={tmp_path / 'in'}"
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *flags, f"--output={tmp_path / output}"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def stopped(process: subprocess.Popen, folder: Path, with_: int, least: int) -> tuple[str, int]:
    """Stop it once it has finished so many items; what it said, and how many it has finished."""
    while process.poll() is None and len(list(folder.glob("*.json"))) < least:
        time.sleep(0.002)
    process.send_signal(with_)
    _, stderr = process.communicate(timeout=300)
    assert not (folder / "results.csv").exists()  # a table is of everything
    assert not list(folder.glob(".*"))  # nothing half-written stays
    done = len(list(folder.glob("*.json")))
    assert least <= done < IMAGES
    return stderr, done


def test_signals_while_predicting_and_the_same_command_finishes(start, whole, tmp_path):
    cut = tmp_path / "cut"
    process = start("cut")
    stderr, done = stopped(process, cut, signal.SIGINT, 1)
    assert process.returncode == 130, stderr[-3000:]
    assert stderr.splitlines()[-1] == "Interrupted. Re-run the same command to resume."
    process = start("cut")
    stderr, done = stopped(process, cut, signal.SIGTERM, done + 1)
    assert process.returncode == 143, stderr[-3000:]
    assert int(re.search(rf"stopped by SIGTERM after (\d+) of {IMAGES} items", stderr)[1]) == done
    for output in (cut, tmp_path / "undisturbed"):
        assert predict(whole, output, tmp_path / "in") == 0
    ours, theirs = content.of_prediction(cut), content.of_prediction(tmp_path / "undisturbed")
    # JSON, overlay, map and moments of MC-dropout of each, and two tables
    assert len(theirs) == 4 * IMAGES + 2 and ours == theirs
