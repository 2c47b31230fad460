"""Whole runs of the methods beside `ours`, and of ours with one support or none."""

import json

import numpy as np
import pytest

import medclip_jax
from tests.support.predicting import run as predict
from tests.support.runs import log, predictions


@pytest.mark.parametrize("method", ["memory", "zero_shot", "thumbnails", "grey_level"])
def test_methods_that_learn_nothing(world, tmp_path, method, capfd):
    assert world.main(tmp_path, arguments=f"k=2,method={method}") == 0
    held = json.loads((tmp_path / "metrics.json").read_text())
    assert held["method"] == method and held["k"] == held["calibration"]["k"] == 2
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert not (tmp_path / "checkpoints").exists()
    assert len(np.unique(predictions(tmp_path)["score"])) > 6
    code, said = predict(tmp_path, tmp_path / "out", world.data), capfd.readouterr().err
    if method in ("thumbnails", "grey_level"):  # for tables alone
        assert code == 2 and f"holds the baseline {method}" in said, said
    else:
        assert code == 0, said


@pytest.mark.parametrize("k, method", [(0, "zero_shot"), (1, "memory"), (1, "ours")])
def test_none_and_one_support_promise_nothing(world, tmp_path, k, method):
    asked = "ours" if k == 0 else method
    fuse = "--config.fusion.branches=('learned','memory','zero_shot')"
    fuse = (fuse, "--config.fusion.weights=probes")
    assert world.main(tmp_path, "--config.steps=2", *fuse, arguments=f"k={k},method={asked}") == 0
    held = json.loads((tmp_path / "metrics.json").read_text())
    found = held["calibration"]
    assert held["method"] == method and held["k"] == found["k"] == k
    assert found["alpha_attained"] is None and found["least_attainable"] is None
    assert found["attainable"] is False and 0 <= found["false_alarm_rate"] <= 1
    assert ("no threshold can be set" if k == 0 else "none can be held out") in found["message"]
    rows = predictions(tmp_path)
    assert np.isnan(rows["p_value"]).all() and len(np.unique(rows["score"])) > 6
    assert np.isfinite(rows["maps"]).all()
    assert (tmp_path / "report.html").is_file()
    if method == "ours":
        assert set(held["fusion"]["image"]) == {"learned", "memory", "zero_shot"}
        assert sum(held["fusion"]["map"].values()) == pytest.approx(1, abs=1e-3)


def test_mediclip_preset_on_two_supports(world, tmp_path):
    few = ("--config.steps=2", "--config.log_every=1")
    assert world.main(tmp_path, *few, arguments="k=2,method=mediclip") == 0
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    told = {"held_out_accuracy", "held_out_auroc"}
    assert set(rows[0]) == {"step", "loss", "focal", "dice"} | told  # no alignment in that peer
    held = json.loads((tmp_path / "metrics.json").read_text())
    assert held["method"] == "mediclip" and held["k"] == 2
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["prompts"]["phrases"] == "words" and not settings["prompts"]["causal"]
    assert (predictions(tmp_path)["uncertainty"] == 0).all()  # it has no dropout


def test_joint_is_ours_without_episodes_and_predicts(world, tmp_path):
    """Whatever the learner of ours is; its memory is kept for other images as that of ours is."""
    few = ("--config.steps=2",)
    maml = "--config.learner=maml"
    assert world.main(tmp_path / "joint", *few, maml, arguments="k=3,method=joint") == 0
    assert world.main(tmp_path / "ours", *few, arguments="k=3") == 0
    rows = predictions(tmp_path / "joint")
    for name in ("score", "maps", "p_value"):
        np.testing.assert_array_equal(rows[name], predictions(tmp_path / "ours")[name])
    held = json.loads((tmp_path / "joint" / "metrics.json").read_text())
    assert (held["method"], held["learner"]) == ("joint", "joint")
    found = medclip_jax.load(tmp_path / "joint").predict([world.data / x for x in rows["id"]])
    np.testing.assert_allclose([r.score for r in found], rows["score"], atol=1e-4)


def test_the_papers_preset_meta_learns_and_predicts(world, tmp_path):
    few = ("--config.steps=2", "--config.log_every=1", "--config.synthesis.variants=50")
    few += ("--config.explained=0", "--config.validations=0")
    assert world.main(tmp_path / "run", *few, arguments="k=2,method=paper") == 0
    terms = {"focal", "dice", "align", "prompt", "simclr"}
    assert terms <= set(log(tmp_path / "run")[0])
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["learner"] == "maml" and settings["model"]["form"] == "distance"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["method"] == "paper"
    rows = predictions(tmp_path / "run")
    assert np.isfinite(rows["maps"]).all() and (rows["uncertainty"] > 0).any()
    assert predict(tmp_path / "run", tmp_path / "out", world.data) == 0


@pytest.mark.parametrize("learner", ["joint", "anil"])
def test_prompts_without_learnable_context_train_resume_and_predict(world, tmp_path, learner):
    plain = ("--config.prompts.context=0", f"--config.learner={learner}", "--config.steps=4")
    plain += ("--config.synthesis.variants=50",)  # episodes need two of a kind
    assert world.main(tmp_path / "a", *plain, arguments="k=2") == 0
    first = predictions(tmp_path / "a")
    assert world.main(tmp_path / "a", *plain, "--mode=evaluate", arguments="k=2") == 0
    np.testing.assert_array_equal(predictions(tmp_path / "a")["score"], first["score"])
    assert predict(tmp_path / "a", tmp_path / "out", world.data) == 0
    assert np.isfinite(first["maps"]).all() and len(np.unique(first["score"])) > 6


def test_prediction_reads_the_mirrored_memory_and_plain_prompts_as_training_did(world, tmp_path):
    parts = ("--config.memory.mirror=True", "--config.steps=2")
    parts += ("--config.fusion.branches=('learned','memory','zero_shot_image')",)
    assert world.main(tmp_path / "a", *parts, arguments="k=3") == 0
    rows = predictions(tmp_path / "a")
    found = medclip_jax.load(tmp_path / "a").predict([world.data / x for x in rows["id"]])
    np.testing.assert_allclose([r.score for r in found], rows["score"], atol=1e-4)
    held = json.loads((tmp_path / "a" / "metrics.json").read_text())["fusion"]
    assert held["map"] == {"learned": 0.5, "memory": 0.5, "zero_shot_image": 0.0}
    assert held["image"]["zero_shot_image"] == pytest.approx(1 / 3, abs=1e-3)
