"""The check for machines with an accelerator, whole, in its small sizes on the CPU."""

import json
import sys
import time

import accelerator_check
import numpy as np
import pytest
from bench import clock, torch_peer, workload

from medclip_jax.errors import WorkdirError


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
    assert json.loads(out.read_text())["skipped"] == [
        "equality",
        "runs",
        "encoder",
        "episodes",
        "pytorch",
    ]


def test_where_pytorch_is_missing_the_result_says_so(tmp_path):
    python = tmp_path / "python"
    words = "ModuleNotFoundError: No module named 'torch'"
    python.write_text(f'#!/bin/sh\necho "{words}" >&2; exit 1\n')
    python.chmod(0o755)
    said = accelerator_check.pytorch(True, str(python), 0.0)
    assert said == {"missing": words}
    absent = accelerator_check.pytorch(True, str(tmp_path / "none"), 0.0)
    assert absent == {"missing": f"{tmp_path / 'none'}: No such file or directory"}


WORKER = """
import json, sys
for line in sys.stdin:
    broken = line.split()[-1] == "compiled"
    print(json.dumps({"error": "no compiler"} if broken else 0.5), flush=True)
"""


def test_pytorch_is_timed_by_line_until_the_time_is_over():
    worker = clock.worker([sys.executable, "-c", WORKER])
    rows = torch_peer.rates(worker, ["4 eager", "4 compiled"], time.monotonic() + 60, 0)
    assert rows[0] == {"what": "4 eager", "per_second": 8.0}
    assert rows[1] == {"what": "4 compiled", "error": "no compiler"}
    late = torch_peer.rates(worker, ["8 eager"], 0.0, 0)
    assert late == [{"what": "8 eager", "error": "the time was over"}]
    worker.kill()
    gone = torch_peer.rates(worker, ["8 eager"], time.monotonic() + 60, 0)
    assert gone[0]["what"] == "8 eager" and "error" in gone[0]
    clock.end(worker)


def test_pytorch_reads_the_same_weights_and_prompts_and_must_agree():
    work = workload.build("tiny", 4, 2)
    flat = torch_peer.arrays(work)
    assert flat["ids"].shape == flat["slots"].shape == (21, 15) and flat["depth"] == 2
    assert {n.split("/")[0] for n in flat} > {"text", "params", "support", "query"}
    assert flat["text/encoder/layers/1/mlp/fc1/kernel"].shape == (32, 128)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        torch_peer.compare(work, {"loss": 1.0, "gradient": [1.0] * (21 * 8 * 32)})


def test_images_are_made_in_the_layout_of_a_users_folder(tmp_path):
    accelerator_check.made(tmp_path, 5, 2)
    counts = {p: len(list((tmp_path / p).iterdir())) for p in ("train/good", "test/good")}
    assert counts == {"train/good": 2, "test/good": 3}
    with accelerator_check.Image.open(tmp_path / "test/lesion/1.png") as image:
        assert np.asarray(image)[120, 120] == 250 and image.size == (384, 320)


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check", f"--out={tmp_path}"])
    monkeypatch.setattr(accelerator_check, "equality", lambda small: pytest.fail("measured"))
    with pytest.raises(WorkdirError, match="Cannot write"):
        accelerator_check.main()
