"""Whole runs of the methods beside `ours`, and of ours with one support or none."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import medclip_jax
from tests.support.paths import ROOT
from tests.support.pictures import write_pictures
from tests.support.predicting import run as predict
from tests.support.runs import log, predictions


@pytest.mark.parametrize("method", ["memory", "zero_shot", "thumbnails", "grey_level"])
def test_methods_that_learn_nothing(world, tmp_path, method, capfd):
    metrics = world.train(tmp_path, f"k=2,method={method}")
    assert metrics["method"] == method and metrics["k"] == metrics["calibration"]["k"] == 2
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert not (tmp_path / "checkpoints").exists()
    assert len(np.unique(predictions(tmp_path)["score"])) > 6
    images = world.data / "test" / "lesion"
    code, said = predict(tmp_path, tmp_path / "out", images), capfd.readouterr().err
    if method in ("thumbnails", "grey_level"):  # for tables alone
        assert code == 2 and f"holds the baseline {method}" in said, said
    else:
        assert code == 0, said


@pytest.mark.slow
def test_extra_healthy_images_calibrate_a_trained_run_anew(world, tmp_path):
    (folder := tmp_path / "extra").mkdir()
    write_pictures(folder, 12)
    one = world.train(tmp_path / "run", "k=2,method=memory")["calibration"]
    more = {"calibration__extra": str(folder)}
    two = world.train(tmp_path / "run", "k=2,method=memory", **more)["calibration"]
    assert (one["k"], two["k"]) == (2, 12) and two["bound"] == pytest.approx(1 / 13)
    assert world.train(tmp_path / "run", "k=2,method=memory", **more)["calibration"] == two
    head = json.loads((tmp_path / "run" / "scorer.json").read_text())
    assert head["calibration"]["k"] == len(head["calibration"]["healthy"]) == 12
    assert str(folder) not in json.dumps(head)
    assert predict(tmp_path / "run", tmp_path / "out", world.data / "test" / "lesion") == 0


@pytest.mark.slow
def test_memory_of_the_papers_recipe_does_not_grow_with_variants(world, tmp_path):
    """Held in memory, 576 more variants would be 130 MB of tokens in 16 bits."""

    def peak(variants):
        more = f"--config.synthesis.variants={variants}", "--config.clip.checkpoint=compact"
        flags = world.flags(tmp_path / str(variants), *more, arguments="k=8,method=paper")
        flags = [x.replace("cache=", f"cache={tmp_path}/") for x in flags]
        command = [sys.executable, "-m", "medclip_jax.main", *flags, "--config.steps=4"]
        env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        with (tmp_path / "said").open("w") as said:
            process = subprocess.Popen(command, cwd=ROOT, stderr=said, stdout=said, env=env)
        most, status = 0, Path(f"/proc/{process.pid}/status")
        while process.poll() is None:  # tokens are mapped from files: those pages are no demand
            held = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
            most = max(most, int(held[1]) if held else 0)
            time.sleep(0.05)
        assert process.returncode == 0, (tmp_path / "said").read_text()[-3000:]
        return most / 1000  # MB

    few, many = peak(24), peak(96)
    print(f"{few:.0f} MB with 24 variants of each support, {many:.0f} MB with 96")
    assert many < few + 100


@pytest.mark.parametrize("k, method", [(0, "zero_shot"), (1, "memory"), (1, "ours")])
def test_none_and_one_support_promise_nothing(world, tmp_path, k, method):
    arguments = f"k={k},method={'ours' if k == 0 else method}"
    metrics = world.train(tmp_path, arguments, branches=("learned", "memory", "zero_shot"))
    found = metrics["calibration"]
    assert metrics["method"] == method and metrics["k"] == found["k"] == k
    assert found["alpha_attained"] is None and found["least_attainable"] is None
    assert found["attainable"] is False and 0 <= found["false_alarm_rate"] <= 1
    assert ("no threshold can be set" if k == 0 else "none can be held out") in found["message"]
    rows = predictions(tmp_path)
    assert np.isnan(rows["p_value"]).all() and len(np.unique(rows["score"])) > 6
    assert np.isfinite(rows["maps"]).all()
    if method == "ours":
        assert set(metrics["fusion"]["image"]) == {"learned", "memory", "zero_shot"}
        assert sum(metrics["fusion"]["map"].values()) == pytest.approx(1, abs=1e-3)


def test_mediclip_preset_on_two_supports(world, tmp_path):
    metrics = world.train(tmp_path, "k=2,method=mediclip", validations=1)
    (row,) = log(tmp_path)
    validation = {"held_out_accuracy", "held_out_auroc"}
    assert set(row) == {"step", "loss", "focal", "dice"} | validation  # no alignment in that peer
    assert metrics["method"] == "mediclip" and metrics["k"] == 2
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["prompts"]["phrases"] == "words" and not settings["prompts"]["causal"]
    assert (predictions(tmp_path)["uncertainty"] == 0).all()  # it has no dropout


def test_joint_is_ours_without_episodes_and_predicts(world, tmp_path):
    """Its memory is kept for other images as that of ours is."""
    joint = world.train(tmp_path / "joint", "k=4,method=joint")
    world.train(tmp_path / "ours", "k=4")
    rows = predictions(tmp_path / "joint")
    for name in ("score", "maps", "p_value"):
        np.testing.assert_array_equal(rows[name], predictions(tmp_path / "ours")[name])
    assert (joint["method"], joint["learner"]) == ("joint", "joint")
    assert set(joint["fusion"]["map"]) == {"learned", "memory", "zero_shot_image"}
    found = medclip_jax.load(tmp_path / "joint").predict([world.data / x for x in rows["id"]])
    np.testing.assert_allclose([r.score for r in found], rows["score"], atol=1e-4)


def test_the_papers_preset_meta_learns_and_predicts(world, tmp_path):
    metrics = world.train(tmp_path / "run", "k=4,method=paper", synthesis__variants=16)
    assert {"focal", "dice", "align", "prompt", "simclr"} <= set(log(tmp_path / "run")[0])
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["learner"] == "maml" and settings["model"]["form"] == "distance"
    assert metrics["method"] == "paper"
    rows = predictions(tmp_path / "run")
    assert np.isfinite(rows["maps"]).all() and (rows["uncertainty"] > 0).any()
    assert predict(tmp_path / "run", tmp_path / "out", world.data / "test" / "lesion") == 0


def test_too_few_variants_for_episodes_are_refused_before_anything_is_encoded(
    world, tmp_path, capsys
):
    fields = ("--config.learner=maml", "--config.synthesis.variants=4")
    code = world.main(tmp_path / "run", *fields, f"--config.cache={tmp_path / 'cache'}")
    said = capsys.readouterr().err
    assert code == 2 and "config.synthesis.variants is 4: 3 image(s)" in said, said
    assert not (tmp_path / "run" / "config.json").exists() and not [
        *tmp_path.glob("cache/**/*.safetensors")
    ]


@pytest.mark.slow
def test_prompts_without_learnable_context_train_resume_and_predict(world, tmp_path):
    plain = {"prompts.context": 0, "learner": "anil", "synthesis.variants": 16}
    world.train(tmp_path / "a", "k=4", **plain)  # episodes need two variants of a kind
    first = predictions(tmp_path / "a")
    world.train(tmp_path / "a", "k=4", **plain | {"seed": 0})
    np.testing.assert_array_equal(predictions(tmp_path / "a")["score"], first["score"])
    assert predict(tmp_path / "a", tmp_path / "out", world.data / "test" / "lesion") == 0
    assert np.isfinite(first["maps"]).all() and len(np.unique(first["score"])) > 6
