"""The check for machines with an accelerator, whole, in its small sizes on the CPU."""

import json
import sys

import accelerator_check
import numpy as np
import pytest


@pytest.mark.slow
def test_every_part_runs_and_the_device_agrees_with_the_cpu(tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["check", f"--out={out}", "--small", "--minutes=60"])
    assert accelerator_check.main() == 0
    result = json.loads(out.read_text())
    assert not result["skipped"] and result["equality"]["same"]
    assert set(result["runs"]["phantom"]) >= {"encode", "train", "score", "in all"}
    assert result["runs"]["largest_difference_of_a_map"] < 1e-3
    assert all(row["images_per_second"] > 0 for row in result["encoder"]["rows"])
    assert [row["tasks"] for row in result["episodes"]["rows"]] == [2]


def test_parts_are_skipped_when_the_time_is_over(tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["check", f"--out={out}", "--minutes=-1"])
    assert accelerator_check.main() == 0
    assert json.loads(out.read_text())["skipped"] == ["equality", "runs", "encoder", "episodes"]


def test_images_are_made_in_the_layout_of_a_users_folder(tmp_path):
    accelerator_check.made(tmp_path, 5, 2)
    counts = {p: len(list((tmp_path / p).iterdir())) for p in ("train/good", "test/good")}
    assert counts == {"train/good": 2, "test/good": 3}
    with accelerator_check.Image.open(tmp_path / "test/lesion/1.png") as image:
        assert np.asarray(image)[120, 120] == 250 and image.size == (384, 320)
