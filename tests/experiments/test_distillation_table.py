"""The comparison of a teacher with its students, on tiny runs."""

import json
import sys

import distillation
import pytest

from tests.support.paths import ROOT


def test_student_is_taught_by_the_teacher_of_its_draw(world, tmp_path, monkeypatch):
    fields = [f"data.root={world.data}", f"cache={world.base / 'cache'}", "steps=3"]
    fields += [f"clip.checkpoint={world.clip}", "synthesis.variants=2", "calibration.folds=2"]
    config = str(ROOT / "configs" / "folder.py")
    arguments = ["--config", config, "--k", "4", "--draws", "1", "--out", str(tmp_path / "out")]
    arguments += ["--teacher", "score.tiles=2", *(x for f in fields for x in ("--set", f))]
    monkeypatch.setattr(sys, "argv", ["distillation", *arguments])
    distillation.main()
    names = ("teacher", "student-taught", "student-alone")
    runs = {n: tmp_path / "out" / f"k4-{n}-0" for n in names}
    held = {n: json.loads((run / "config.json").read_text()) for n, run in runs.items()}
    assert str(held).count(str(runs["teacher"])) == 1
    assert str(runs["teacher"]) in json.dumps(held["student-taught"])
    found = {n: json.loads((run / "compared.json").read_text()) for n, run in runs.items()}
    assert all(f["images"] == 12 for f in found.values())
    first = (tmp_path / "out" / "table.md").read_text()
    auroc = found["student-taught"]["image"]["auroc"]
    assert f"| student, taught | 1 | {auroc:.3f} |" in first
    monkeypatch.setattr(distillation.train, "run", lambda *_: pytest.fail("made again"))
    distillation.main()
    assert (tmp_path / "out" / "table.md").read_text() == first
