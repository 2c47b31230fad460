"""Files that appear whole, JSON that any reader reads, and arrays on disk."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from medclip_jax.errors import WorkdirError
from medclip_jax.files import plain, temporary_array, write_json


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
    with pytest.raises(WorkdirError, match="run.*another workdir"):
        write_json(tmp_path / "run/a.json", 1)


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
