"""Processes that build DICOM objects: the same objects, also where a process is killed."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medclip_jax.io import dicom_write
from tests.support.predicting import dicom

CLOCK = ("InstanceCreationDate", "InstanceCreationTime", "ContentDate", "ContentTime")
CLOCK += ("SeriesDate", "SeriesTime", "DateOfSecondaryCapture", "TimeOfSecondaryCapture")
CLOCK += ("ContributionDateTime", "DimensionOrganizationUID")  # the last is random


@pytest.fixture
def work(tmp_path):
    """What to build."""
    dicom_write.quieten()  # as prediction does
    (tmp_path / "in").mkdir()
    path = dicom(tmp_path / "in" / "a.dcm")
    shape = pydicom.dcmread(path).pixel_array.shape
    marked = np.zeros((1, *shape), bool)
    marked[0, :9, :9] = True
    return dicom_write.Task([str(path)], "key", marked, np.zeros((*shape, 3), np.uint8), 0)


def timeless(made: dicom_write.DicomObjects) -> dict[str, str]:
    assert set(made.files) == {"seg", "capture"} and not made.notes
    stored = {}
    for name, raw in made.files.items():
        lines = str(pydicom.dcmread(io.BytesIO(raw))).splitlines()
        words = [pydicom.datadict.dictionary_description(word) for word in CLOCK]
        stored[name] = "\n".join(x for x in lines if not any(word in x for word in words))
    return stored


def workers(of: int) -> list[int]:
    """Processes below one that build objects."""
    result = []
    for task in Path(f"/proc/{of}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            if b"multiprocessing.spawn" in Path(f"/proc/{child}/cmdline").read_bytes():
                result.append(child)
    return result


def test_few_files_are_built_in_line():
    with dicom_write.builder(dicom_write.MIN_FILES - 1) as build:
        assert build is dicom_write.build


def test_processes_build_the_same_and_their_death_is_no_loss(work):
    expected = timeless(dicom_write.build(work))
    assert len(expected["seg"]) > 1000
    with dicom_write.builder(dicom_write.MIN_FILES) as build:
        assert timeless(build(work)) == expected
        started = workers(os.getpid())
        assert started
        for pid in started:
            os.kill(pid, signal.SIGKILL)
        assert timeless(build(work)) == expected
    assert not workers(os.getpid())


PROGRAM = """
import sys, time
import numpy as np
from medclip_jax.io import dicom_write
with dicom_write.builder(dicom_write.MIN_FILES) as build:
    picture = np.zeros((4, 4, 3), np.uint8)
    build(dicom_write.Task([sys.argv[1]], "k", np.zeros((1, 4, 4), bool), picture, 0))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_processes_of_a_killed_prediction_end_by_themselves(work):
    command = [sys.executable, "-c", PROGRAM, work.paths[0]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    left = workers(process.pid)
    assert left
    process.kill()
    process.communicate()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]
