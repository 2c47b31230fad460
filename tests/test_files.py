"""Files that appear whole, JSON that any reader reads, and arrays on disk."""

import hashlib
import io
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medclip_jax import config, files
from medclip_jax.errors import ConfigError, WorkdirError
from medclip_jax.files import plain, temporary_array, write_bytes, write_json
from tests.support.paths import ROOT


def test_write_json_converts_and_replaces(tmp_path):
    path = tmp_path / "a" / "metrics.json"
    write_json(path, {"old": 1})
    value = {
        "auroc": np.float32(0.5),
        "n": np.int64(3),
        "ok": np.bool_(True),
        "undefined": math.nan,
        "far": np.float64("inf"),
        "curve": np.array([[0.0, np.nan]]),
        "path": Path("x/y"),
        "pair": (1, None),
        5: "ä",
    }
    write_json(path, value)
    assert json.loads(path.read_text()) == {
        "auroc": 0.5,
        "n": 3,
        "ok": True,
        "undefined": None,
        "far": None,
        "curve": [[0.0, None]],
        "path": "x/y",
        "pair": [1, None],
        "5": "ä",
    }
    assert os.listdir(path.parent) == ["metrics.json"]


def test_write_json_keeps_the_old_file_when_a_value_cannot_be_written(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}


def test_write_json_below_a_file_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(WorkdirError, match="run.*another folder"):
        write_json(tmp_path / "run/a.json", 1)


@pytest.mark.parametrize("plant", ["link", "dangling", "pipe"])
def test_what_lies_in_the_way_is_replaced_and_a_links_target_left_alone(tmp_path, plant):
    path, outside = tmp_path / "results.csv", tmp_path / "outside"
    if plant == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside)
    if plant == "link":
        outside.write_text("mine")
    write_bytes(path, b"ours")
    assert path.read_bytes() == b"ours" and not path.is_symlink()
    assert outside.exists() == (plant == "link")
    assert plant != "link" or outside.read_text() == "mine"


def test_a_folder_of_that_name_is_one_sentence(tmp_path):
    (tmp_path / "results.csv" / "mine").mkdir(parents=True)
    with pytest.raises(WorkdirError, match=r"results\.csv.*directory"):
        write_bytes(tmp_path / "results.csv", b"ours")
    assert os.listdir(tmp_path) == ["results.csv"]


def test_names_of_temporary_files_cannot_be_guessed_and_are_not_followed(tmp_path, monkeypatch):
    """Even a right guess is refused: the file must be new."""
    names = set()
    for _ in range(3):
        with files.writing(tmp_path / ("ä" * 120)):
            (name,) = os.listdir(tmp_path)
            names.add(name)
        (tmp_path / ("ä" * 120)).unlink()
    assert len(names) == 3
    (tmp_path / "outside").write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 2 * n)
    files._temporary_name(tmp_path / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(WorkdirError, match="exists"):
        write_bytes(tmp_path / "a", b"ours")
    assert (tmp_path / "outside").read_text() == "mine"


def test_errors_of_the_block_are_not_said_of_the_file(tmp_path):
    with pytest.raises(FileNotFoundError), files.writing(tmp_path / "a"):
        (tmp_path / "vanished").read_bytes()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, 1 << 22])
def test_a_full_disk_names_the_file(tmp_path, size):
    """A limit on the size of files stands for the disk."""
    with pytest.raises(WorkdirError, match=f"{tmp_path}/a .*File too large"):
        with files.writing(tmp_path / "a") as file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            try:
                file.write(b"0" * size)
                file.flush()
            finally:
                limits = resource.RLIM_INFINITY, resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys; from pathlib import Path; from medclip_jax import files
folder = Path(sys.argv[1])
with files.writing(folder / "report.html"), files.temporary_folder(folder / "set") as part:
    (part / "a").touch()
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_only_what_the_dead_left_is_swept(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    pid = int(done.stdout)
    assert len(list(tmp_path.iterdir())) == 2
    foreign = {".mine.tmp", ".x.1.abc.tmp", "a.12.tmp", f".report.html.{os.getpid()}.tmp"}
    for name in foreign:
        (tmp_path / name).touch()
    (tmp_path / f".link.{pid}.tmp").symlink_to(tmp_path / "a.12.tmp")
    os.mkfifo(tmp_path / f".pipe.{pid}.tmp")
    (tmp_path / f".report.html.{pid}.tmp").touch()  # of a dead process
    with files.writing(tmp_path / "b"), files.temporary_folder(tmp_path / "c"):
        assert files.sweep(tmp_path) == 3
    left = {path.name for path in tmp_path.iterdir()}
    assert left == foreign | {f".link.{pid}.tmp", f".pipe.{pid}.tmp", "b"}
    assert files.sweep(tmp_path / "absent") == 0


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    assert files.read_regular(tmp_path / "a", 3) == b"abc"
    for name, most in (("a", 2), ("link", 3), ("pipe", 3), ("absent", 3)):
        with pytest.raises(OSError):
            files.read_regular(tmp_path / name, most)
    for name in ("pipe", "."):
        with pytest.raises(OSError):
            files.sha256_of(tmp_path / name)
    assert files.sha256_of(tmp_path / "link") == hashlib.sha256(b"abc").hexdigest()


def test_plain_leaves_finite_values_alone():
    assert plain({"a": [1, 2.5, "x", None, True]}) == {"a": [1, 2.5, "x", None, True]}


def test_a_temporary_array_is_zeros_without_a_name(tmp_path):
    wanted = np.random.default_rng(0).normal(size=(7, 3, 4)).astype(np.float16)
    array = temporary_array((7, 3, 4), np.float16, tmp_path)
    array[4:] = wanted[4:]
    assert not array[:4].any() and list(tmp_path.iterdir()) == []  # a killed process leaves nothing
    array[:4] = wanted[:4]
    np.testing.assert_array_equal(array, wanted)
    assert temporary_array((0, 3), np.float16, tmp_path).shape == (0, 3)


def test_a_temporary_array_that_the_disk_refuses(tmp_path, monkeypatch):
    with pytest.raises(WorkdirError, match="Cannot write"):
        temporary_array((2, 4), np.float32, tmp_path / "absent")
    with pytest.raises(WorkdirError, match="Cannot write"):
        temporary_array((2**60,), np.uint8, tmp_path)  # more than any disk has


@pytest.mark.parametrize("now", [0, 1, 4e8, -1, 5e9])
def test_arrays_are_written_whatever_the_clock_says(tmp_path, monkeypatch, now):
    """Before 1980 zip files know no time; equal arrays give equal bytes at any."""
    monkeypatch.setattr(time, "time", lambda: now)
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array(["x", "yy"])}
    with files.writing(tmp_path / "a.npz") as file:
        files.write_npz(file, arrays)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as read:
        assert {name: read[name].tolist() for name in read.files} == {
            name: array.tolist() for name, array in arrays.items()
        }
    monkeypatch.undo()
    raw = io.BytesIO()
    files.write_npz(raw, arrays)
    assert raw.getvalue() == (tmp_path / "a.npz").read_bytes()


def test_a_home_that_is_not_known_is_one_sentence(monkeypatch):
    assert files.expanded("a/~b") == Path("a/~b")
    assert files.expanded("~/x") == Path.home() / "x"
    with pytest.raises(ConfigError, match="~nobody-of-that-name.*home folder is not known"):
        files.expanded("~nobody-of-that-name/x")
    with pytest.raises(ConfigError, match="zero byte"):
        files.expanded("a\0b")
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MEDCLIP_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a name
    with pytest.raises(ConfigError, match="MEDCLIP_CACHE"):
        config.cache_folder("")
    assert config.cache_folder("/x") == Path("/x")
