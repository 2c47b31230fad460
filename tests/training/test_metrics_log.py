"""The log of a run: whole lines, no silent NaN, resumes that repeat nothing."""

import errno
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from medclip_jax.errors import ConfigError, WorkdirError
from medclip_jax.files import write_json
from medclip_jax.training import metrics_log
from medclip_jax.training.metrics_log import Writer, read_steps


def log(workdir, steps, **options):
    with Writer(workdir, **options) as out:
        for step in steps:
            out.scalars(step, {"loss": step / 10, "focal": np.float32(0.5)})
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_one_line_per_step_with_parts_by_name(tmp_path):
    rows = log(tmp_path / "new" / "folder", [10, 20])
    assert [row["step"] for row in rows] == [10, 20]
    assert rows[0]["loss"] == 1.0 and rows[1]["loss"] == 2.0 and rows[0]["focal"] == 0.5
    assert 0 <= rows[0]["seconds"] <= rows[1]["seconds"]
    assert "nonfinite" not in rows[0]


def test_a_line_is_on_disk_before_the_writer_closes(tmp_path):
    out = Writer(tmp_path)
    out.scalars(1, {"loss": 0.25})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.25
    out.close()


def test_nonfinite_is_null_and_named(tmp_path):
    with Writer(tmp_path) as out:
        out.scalars(3, {"loss": np.float32("nan"), "dice": math.inf, "focal": 1.0})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["loss"] is None and row["dice"] is None and row["focal"] == 1.0
    assert row["nonfinite"] == ["loss", "dice"]


def test_resume_drops_later_steps_and_half_a_line(tmp_path):
    log(tmp_path, [10, 20, 30])
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    rows = log(tmp_path, [21, 22], resume_step=20)
    assert [row["step"] for row in rows] == [10, 20, 21, 22]
    assert rows[2]["seconds"] >= rows[1]["seconds"]


def test_without_resume_step_all_whole_lines_stay(tmp_path):
    log(tmp_path, [10])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20')
    assert [row["step"] for row in log(tmp_path, [30])] == [10, 30]


def test_resume_at_the_last_step_leaves_the_bytes_alone(tmp_path):
    log(tmp_path, [10, 20])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    Writer(tmp_path, resume_step=20).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_kill_while_truncating_leaves_the_old_file(tmp_path, monkeypatch):
    log(tmp_path, [10, 20])
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(WorkdirError, match="No space left"):
        Writer(tmp_path, resume_step=10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_spoilt_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(WorkdirError, match="Line 2 of .*metrics.jsonl"):
        Writer(tmp_path)


def test_reading_skips_half_a_line_and_changes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2')
    assert read_steps(path) == [{"step": 1, "loss": 2.0}]
    assert path.read_text().endswith('{"step": 2')


def test_reserved_names_are_refused(tmp_path):
    with Writer(tmp_path) as out, pytest.raises(ValueError, match="seconds"):
        out.scalars(1, {"seconds": 2.0})


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


def test_a_full_disk_is_one_sentence_with_the_path(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, which this system lacks")
    out = Writer(tmp_path)
    out._file.close()
    out._file = open("/dev/full", "w")  # the disk fills up while the run is going
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl.*No space left.*free space"):
        out.scalars(1, {"loss": 1.0})
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl.*No space left"):
        out.close()  # what could not be written is told again, and the file is closed
    assert out._file.closed


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "run").write_text("a file")
    for call in (lambda: Writer(tmp_path / "run"), lambda: write_json(tmp_path / "run/a.json", 1)):
        with pytest.raises(WorkdirError, match="run.*another workdir"):
            call()


def test_tensorboard_is_written_if_asked_for_and_its_absence_told(tmp_path, monkeypatch):
    log(tmp_path / "plain", [1])
    assert not (tmp_path / "plain" / "tensorboard").exists()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match="tensorboardX is not installed"):
        Writer(tmp_path / "view", tensorboard=True)


def test_tensorboard_holds_the_scalars(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra [tensorboard] is not installed")
    log(tmp_path, [1, 2], tensorboard=True)
    events = list((tmp_path / "tensorboard").glob("events.out.*"))
    assert len(events) == 1 and b"focal" in events[0].read_bytes()


def test_plain_leaves_finite_values_alone():
    assert metrics_log.plain({"a": [1, 2.5, "x", None, True]}) == {"a": [1, 2.5, "x", None, True]}
