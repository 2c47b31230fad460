"""SIGTERM while predicting: training's exit code, and the same command ends as if undisturbed."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from .test_end_to_end import ROOT, finished

IMAGES = 120


@pytest.fixture
def start(tmp_path, tmp_path_factory):
    """Predict IMAGES images into the named folder, in a process of its own."""
    base = tmp_path_factory.getbasetemp()
    workdir, rng = finished(base).workdir, np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (60, 50), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(base / "world" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def run(output: str) -> subprocess.Popen:
        flags = "--mode=predict", f"--workdir={workdir}", f"--input={tmp_path / 'in'}"
        return subprocess.Popen(
            [sys.executable, "-m", "medclip_jax.main", *flags, f"--output={tmp_path / output}"],
            cwd=ROOT,
            env=os.environ | settings,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def kept(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_sigterm_while_predicting_and_the_same_command_finishes(start, tmp_path):
    undisturbed = start("whole")
    process = start("cut")
    while process.poll() is None and not list(tmp_path.glob("cut/*.json")):
        time.sleep(0.002)
    process.terminate()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 143, stderr[-3000:]
    said = re.search(r"stopped by SIGTERM after (\d+) of 120 items", stderr)
    done = len(list(tmp_path.glob("cut/*.json")))
    assert 0 < int(said[1]) == done < IMAGES
    assert not (tmp_path / "cut" / "results.csv").exists()  # a table is of everything
    assert not list(tmp_path.glob("cut/.*"))  # nothing half-written stays
    process = start("cut")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    _, stderr = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, stderr[-3000:]
    ours, theirs = kept(tmp_path / "cut"), kept(tmp_path / "whole")
    assert len(theirs) == 3 * IMAGES + 2 and ours == theirs
