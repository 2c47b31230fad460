"""The claim of a run on its workdir, and the lock that keeps other runs out."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from filelock import FileLock

from medclip_jax import config, files, main, workdir
from medclip_jax.data.layouts import Record
from medclip_jax.errors import WorkdirError
from medclip_jax.training import checkpoints
from medclip_jax.workdir import claim, locked
from tests.support.folders import pair
from tests.support.paths import ROOT


def settings(arg="k=4", **given):
    c = config.base(arg, name="folder")
    c.update(given)
    return config.resolve(c)


def test_a_claim_is_kept_and_renewed(tmp_path):
    claim(tmp_path, settings())
    first = json.loads((tmp_path / "config.json").read_text())
    assert first["k"] == 4 and first["steps"] > 0 and first["data"]["name"] == "folder"
    claim(tmp_path, settings(cache="/elsewhere", checkpoint_every=3))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["cache"] == "/elsewhere" and stored["checkpoint_every"] == 3


def test_fields_of_another_version_do_not_count(tmp_path):
    claim(tmp_path, settings())
    path = tmp_path / "config.json"
    first = json.loads(path.read_text())
    older = first | {"gone": 3, "score": {"top": first["score"]["top"]}}
    path.write_text(json.dumps(older))
    claim(tmp_path, settings())
    assert json.loads(path.read_text()) == first
    path.write_text(json.dumps(older | {"score": {"top": 0.5}}))
    with pytest.raises(WorkdirError, match="score.top = 0.5, not"):
        claim(tmp_path, settings())


@pytest.mark.parametrize(
    "arg, given, named",
    [
        ("k=8", {}, "k = 4, not 8"),
        ("k=4,seed=1", {}, "seed = 0, not 1"),
        ("k=4,method=memory", {}, "method = ours, not memory"),
        ("k=4", {"steps": 7}, "steps = .*, not 7"),
        ("k=4", {"loss": {"dice": 0.5}}, "loss"),
    ],
)
def test_a_claim_on_another_run_is_refused(tmp_path, arg, given, named):
    claim(tmp_path, settings())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(WorkdirError, match=named):
        claim(tmp_path, settings(arg, **given))
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_truth_changes_with_the_voxels_of_a_mask(tmp_path):
    mask = pair(tmp_path / "mask", 0)
    record = Record("a", 1, "test", tmp_path / "a.png", (mask,), "0" * 64)
    before = workdir.truth_of([record])
    assert workdir.truth_of([record]) == before
    pair(tmp_path / "mask", 1)
    assert workdir.truth_of([record]) != before


def test_one_run_in_a_workdir_and_a_dead_one_leaves_no_lock(tmp_path):
    code = (
        "import sys, time, pathlib; from medclip_jax import workdir\n"
        "with workdir.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in\n"
        with pytest.raises(WorkdirError, match="in use by another run"):
            with locked(tmp_path):
                pass
    finally:
        process.kill()
        process.communicate()  # closes the pipe, too
    with locked(tmp_path):
        pass


NAMES = [
    *(".lock", "metrics.json", "config.json", "report.html", "scorer.json", "scorer.safetensors"),
    *("split.json", "predictions.npz", "metrics.jsonl", "figures", "checkpoints", "tensorboard"),
    *("figures/a.png", "checkpoints/4", "checkpoints/4/x/_METADATA", "tensorboard/events"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plant", ["link", "folder link", "dangling", "pipe"])
def test_links_and_pipes_in_a_workdir_that_was_received(tmp_path, name, plant):
    """Nothing is written through a link and no pipe is waited for."""
    workdir, outside = tmp_path / "run", tmp_path / "outside"
    (workdir / name).parent.mkdir(parents=True)
    if plant == "pipe":
        os.mkfifo(workdir / name)
    else:
        (workdir / name).symlink_to(outside)
    if plant == "folder link":
        outside.mkdir()
    if plant == "link":
        outside.write_text("mine")
    with pytest.raises(WorkdirError, match=f"{name} is a link, or no f"):
        with locked(workdir):
            pass
    assert outside.exists() == (plant in ("link", "folder link"))
    assert plant != "link" or outside.read_text() == "mine"
    assert plant != "folder link" or not list(outside.iterdir())


@pytest.mark.parametrize("mode", ["train", "evaluate", "report"])
@pytest.mark.parametrize("plant", ["link", "pipe", "folder", "device"])
@pytest.mark.parametrize("name", [".lock", "config.json", "metrics.jsonl", "figures"])
def test_each_mode_refuses_them_with_one_sentence(tmp_path, capfd, mode, plant, name):
    workdir, outside = tmp_path / "run", tmp_path / "outside"
    workdir.mkdir()
    outside.write_text("mine")
    if plant == "link":
        (workdir / name).symlink_to(outside)
    elif plant == "device":
        (workdir / name).symlink_to("/dev/zero")
    elif plant == "pipe":
        os.mkfifo(workdir / name)
    elif name == "figures":
        (workdir / name).touch()
    else:
        (workdir / name).mkdir()
    flags = [f"--mode={mode}", f"--config={ROOT}/configs/folder.py:k=4,root={tmp_path}"]
    assert main.main(["main", *flags, f"--workdir={workdir}"]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {workdir / name} is a link, or no f")
    assert outside.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("mode", ["evaluate", "report"])
def test_a_workdir_without_a_run_is_refused_at_once_and_not_made(tmp_path, capfd, mode):
    (tmp_path / "empty").mkdir()
    flags = [f"--mode={mode}", f"--config={ROOT}/configs/folder.py:k=4,root={tmp_path}"]
    for name in ("typo", "empty"):
        assert main.main(["main", *flags, f"--workdir={tmp_path / name}"]) == 2
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(
            f"error: {tmp_path / name}/config.json is missing: run --mode train"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
    assert not [p for p in (tmp_path / "empty").iterdir() if p.name != ".lock"]


def test_other_names_of_somebodys_files(tmp_path):
    """A hard link is refused where it would be written into, else replaced."""
    workdir, outside = tmp_path / "run", tmp_path / "outside"
    workdir.mkdir()
    outside.write_text("mine")
    for name in ("config.json", "metrics.jsonl"):
        os.link(outside, workdir / name)
    with locked(workdir):
        claim(workdir, settings())
        with checkpoints.MetricsLog(workdir) as log:
            log.write(1, {"loss": 1.0})
    assert outside.read_text() == "mine" and len(files.read_steps(workdir / "metrics.jsonl")) == 1
    (workdir / ".lock").unlink()
    os.link(outside, workdir / ".lock")
    with pytest.raises(WorkdirError, match="lock is a link"):
        with locked(workdir):
            pass
    assert outside.read_text() == "mine"


def test_a_folder_where_the_lock_should_be(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(WorkdirError, match="lock is a link, or no file"):
        with locked(tmp_path):
            pass


def test_what_a_killed_report_left_is_swept(tmp_path):
    for folder in (tmp_path, tmp_path / "figures"):
        folder.mkdir(exist_ok=True)
        (folder / ".report.html.4194305.tmp").touch()  # above the largest number of a process
    with locked(tmp_path), files.writing(tmp_path / "a.json"):
        assert not list(tmp_path.rglob(".report*"))
        assert len(list(tmp_path.glob(".a.json.*.tmp"))) == 1
    with locked(tmp_path):  # the lock was given up
        pass


@pytest.mark.parametrize("process", [0, 1])
def test_of_several_processes_the_first_holds_the_lock_and_tells_the_others(
    tmp_path, monkeypatch, process
):
    monkeypatch.setattr(workdir.runtime, "several", lambda: True)
    monkeypatch.setattr(workdir.runtime, "is_main", lambda: process == 0)
    asked = []

    def any_process(flag):
        asked.append(flag)
        return np.array([in_use if process else flag])

    monkeypatch.setattr(workdir.runtime, "any_process", any_process)
    in_use = False
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists() == (process == 0)
    in_use = True
    with FileLock(tmp_path / ".lock"):
        with pytest.raises(WorkdirError, match="in use" if process == 0 else "process 0 says why"):
            with locked(tmp_path):
                pass
    assert asked == [False, process == 0]
