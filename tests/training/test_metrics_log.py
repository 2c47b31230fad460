"""The log of a run: whole lines, no silent NaN, resumes that repeat nothing, TensorBoard."""

import json
import math
import os
import struct

import numpy as np
import pytest

from medclip_jax.errors import WorkdirError
from medclip_jax.files import read_steps
from medclip_jax.training.checkpoints import MetricsLog


def log(workdir, steps, **options):
    with MetricsLog(workdir, **options) as out:
        for step in steps:
            out.write(step, {"loss": step / 10, "focal": np.float32(0.5)})
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_one_line_per_step_with_parts_by_name(tmp_path):
    rows = log(tmp_path / "new" / "folder", [10, 20])
    assert [row["step"] for row in rows] == [10, 20]
    assert rows[0]["loss"] == 1.0 and rows[1]["loss"] == 2.0 and rows[0]["focal"] == 0.5
    assert 0 <= rows[0]["seconds"] <= rows[1]["seconds"]
    assert "nonfinite" not in rows[0]


def test_a_line_is_on_disk_at_once_and_what_is_not_finite_is_null_and_named(tmp_path):
    with MetricsLog(tmp_path) as out:
        out.write(3, {"loss": np.float32("nan"), "dice": math.inf, "focal": 1.0})
        row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["loss"] is None and row["dice"] is None and row["focal"] == 1.0
    assert row["nonfinite"] == ["loss", "dice"]


def test_resume_drops_later_steps_and_half_a_line(tmp_path):
    log(tmp_path, [10, 20, 30])
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [row["step"] for row in read_steps(path)] == [10, 20, 30]
    rows = log(tmp_path, [21, 22], resume_step=20)
    assert [row["step"] for row in rows] == [10, 20, 21, 22]
    assert rows[2]["seconds"] >= rows[1]["seconds"]
    before = path.read_bytes()
    log(tmp_path, [], resume_step=22)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "odd",
    [
        *("not json", "[1]", "3", '{"step": 2}', '{"step": "2", "seconds": 0.1}'),
        *(
            '{"step": 2, "seconds": "1"}',
            '{"step": 2, "seconds": null}',
            '{"step": 2.5, "seconds": 1}',
        ),
        *(f'{{"step": 2, "seconds": 1{"0" * 400}}}', '{"step": 2, "seconds": 1, "loss": NaN}'),
        *('{"step": 2, "seconds": 1, "loss": "abc"}', '{"step": 2, "seconds": 1, "loss": [1]}'),
    ],
)
def test_a_corrupt_line_in_the_middle_is_named(tmp_path, odd):
    line = '{"step": 1, "seconds": 0.1, "loss": null, "nonfinite": ["loss"]}'
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{odd}\n{line}\n")
    with pytest.raises(WorkdirError, match="Line 2 of .*metrics.jsonl"):
        MetricsLog(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_sentence_with_the_path(tmp_path):
    with (
        pytest.raises(WorkdirError, match=r"metrics\.jsonl.*No space left"),
        MetricsLog(tmp_path) as out,
    ):
        out._file.close()
        out._file = open("/dev/full", "w")  # the disk fills up while the run is going
        with pytest.raises(WorkdirError, match=r"metrics\.jsonl.*No space left.*free space"):
            out.write(1, {"loss": 1.0})
    assert out._file.closed


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(WorkdirError, match="run.*another folder"):
        MetricsLog(tmp_path / "run")


# --- TensorBoard ------------------------------------------------------------------------------


def events(folder):
    """(step, name, value) of the scalars in the event files: records of length, data, checksums."""
    from tensorboardX.proto import event_pb2

    for path in sorted(folder.glob("events.out.*")):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = event_pb2.Event.FromString(data[start + 12 : start + 12 + length])
            yield from ((event.step, x.tag, x.simple_value) for x in event.summary.value)
            start += length + 16


def test_tensorboard_files_hold_the_scalars(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra [tensorboard] is not installed")
    log(tmp_path, [1, 2], tensorboard=True)
    values = [(step, name, round(x, 6)) for step, name, x in events(tmp_path / "tensorboard")]
    assert values == [(s, n, x) for s in (1, 2) for n, x in (("loss", s / 10), ("focal", 0.5))]
