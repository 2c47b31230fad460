"""A share of experiments/faults.py: killed with -9 while predicting, nothing is lost.

Killed while training: test_end_to_end.
"""

import json
import os
import time

import faults

from medclip_jax.inference import results


def test_kills_lose_nothing(tmp_path, whole):
    found = faults.run(tmp_path, 2, seed=1, stages=("predict",), trained=whole)
    assert found["losses"] == []
    assert found["kills"] == {"predict": 2}


def test_a_lost_or_changed_file_is_a_loss(tmp_path):
    def write(folder: str, file: str, score: float, deflated: int) -> None:
        told = {"score": score, "bytes": {"map": deflated, "overlay": 7}}
        (tmp_path / folder / file).write_text(json.dumps(told))

    for name in ("whole", "job"):
        (tmp_path / name).mkdir()
        for file in ("results.csv", ".a.json.7.tmp"):
            (tmp_path / name / file).write_text(file)
        write(name, "a.json", 0.5, 7)
    job = faults.Job((), tmp_path / "job", tmp_path)
    (tmp_path / "job" / ".b.json.8.tmp").touch()
    assert faults.losses(job, tmp_path / "whole") == []
    write("job", "a.json", 0.5, 8)  # the same pixels may deflate to a byte more
    assert faults.losses(job, tmp_path / "whole") == []
    write("job", "a.json", 0.6, 7)
    write("job", "b.json", 0.5, 7)
    assert faults.losses(job, tmp_path / "whole") == ["a.json", "b.json"]


def test_what_killed_writers_left_is_swept_after_a_day(tmp_path):
    names = (".a.json.71.tmp", ".results.csv.71.tmp", ".b.json.72.tmp", "c.71.tmp", ".d.tmp")
    for name in names:
        (tmp_path / name).touch()
    past = time.time() - 2 * results.STALE
    for name in (".a.json.71.tmp", ".results.csv.71.tmp", "c.71.tmp", ".d.tmp"):
        os.utime(tmp_path / name, (past, past))
    assert results.sweep(tmp_path) == 2
    assert {p.name for p in tmp_path.iterdir()} == {".b.json.72.tmp", "c.71.tmp", ".d.tmp"}
    assert results.sweep(tmp_path / "absent") == 0
