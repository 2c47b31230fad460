"""Whole runs through the door, on a tiny CLIP and tiny phantoms: files, kill and resume, modes."""

import json
import re
import shutil
import signal
import time
from functools import cache
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from medclip_jax import files, train
from medclip_jax.evaluation import metrics, pixel_metrics
from medclip_jax.io import read
from tests.support.runs import EVERY, STEPS, finished, log, predictions

IMAGE = "auroc auprc accuracy precision recall f1 specificity balanced_accuracy mcc fpr tpr"
PIXEL = (
    "auroc auprc accuracy precision recall f1 specificity balanced_accuracy mcc iou dice "
    "tp tn fp fn hausdorff hausdorff95 boundary_f1 aupro"
)


def state(workdir: Path, step: int):
    manager = ocp.CheckpointManager(workdir / "checkpoints")
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]


def leaves(tree) -> list[np.ndarray]:
    return (
        [x for name in sorted(tree) for x in leaves(tree[name])]
        if isinstance(tree, dict)
        else [x for item in tree for x in leaves(item)]
        if isinstance(tree, list | tuple)
        else [np.asarray(tree)]
    )


# --- what a run leaves ----------------------------------------------------------------------


def test_a_run_leaves_the_files_of_the_contract(whole):
    held = {str(p.relative_to(whole)) for p in whole.rglob("*") if "checkpoints" not in p.parts}
    charts = "loss deletion roc scores calibration risk_coverage gallery"
    assert held == {
        *("config.json", "metrics.jsonl", "split.json", "predictions.npz", "metrics.json"),
        *(
            "report.html",
            "scorer.json",
            "scorer.safetensors",
            "figures",
            *(f"figures/{name}.png" for name in charts.split()),
        ),
    }
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {str(STEPS - EVERY), str(STEPS)}
    settings = json.loads((whole / "config.json").read_text())
    assert settings["steps"] == STEPS and settings["batch"] == 4 and settings["k"] == 4
    rows = log(whole)
    assert [row["step"] for row in rows] == list(range(10, STEPS + 1, 10))
    validation = {"held_out_accuracy", "held_out_auroc"}
    parts = {"step", "loss", "focal", "dice", "align"}
    assert all(set(row) in (parts, parts | validation) for row in rows)
    assert validation <= set(rows[-1])


def test_metrics_json_has_the_keys_of_the_contract(whole):
    held = json.loads((whole / "metrics.json").read_text())
    assert list(held) == (
        "dataset k seed split method learner gradients backbone image pixel calibration intervals "
        "uncertainty explanations fusion timing versions finished".split()
    )
    assert set(held["image"]) == {*IMAGE.split(), "threshold"}
    assert set(held["pixel"]) == {*PIXEL.split(), "distance_unit", "boundary_tolerance"}
    assert (held["dataset"], held["k"], held["seed"]) == ("folder", 4, 0)
    assert (held["split"], held["method"]) == ("peer", "ours")
    assert set(held["timing"]) == {"load", "encode", "train", "score", "metrics"}
    assert held["calibration"]["k"] == 4 and held["calibration"]["n_healthy_test"] == 6
    assert held["versions"]["medclip-jax"] and held["versions"]["jax"]


def test_a_level_that_cannot_be_held_is_said_on_the_terminal(tmp_path_factory):
    said = finished(tmp_path_factory.getbasetemp()).stderr.splitlines()
    sentence = "with 4 healthy images the least attainable false-alarm rate is 20%, asked for 10%"
    assert said.count(sentence) == 1


def test_predictions_give_the_metrics_again(world, whole):
    held = predictions(whole)
    n = len(held["id"])
    assert n == 12 and held["maps"].shape == (12, 32, 32)
    assert {held[name].shape for name in ("label", "score", "p_value", "uncertainty")} == {(n,)}
    for name in ("score", "p_value", "maps"):
        assert 0 <= held[name].min() and held[name].max() <= 1
    assert held["uncertainty"].max() > 0  # MC-dropout ran
    assert all(
        label == ("lesion" in name) for name, label in zip(held["id"], held["label"], strict=True)
    )
    masks = []
    for name in held["id"]:
        path = world.data / "ground_truth/lesion" / f"{Path(name).stem}_mask.png"
        mask = read.read(path).pixels[0] > 0.5 if path.is_file() else np.zeros((64, 64), bool)
        masks.append(read.fit_mask(mask, 32))
    written = json.loads((whole / "metrics.json").read_text())
    image = metrics.image_level(held["score"], held["label"])
    pixel = pixel_metrics.pixel_level(held["maps"].astype(np.float32), np.stack(masks))
    assert files.plain(image) == pytest.approx(written["image"], abs=1e-12)
    pixel |= {"distance_unit": "px", "boundary_tolerance": 2}
    assert files.plain(pixel) == pytest.approx(written["pixel"], abs=1e-12)


def test_support_and_test_of_split_json_are_apart(whole):
    held = json.loads((whole / "split.json").read_text())
    support, test = ({row["id"] for row in held[part]} for part in ("support", "test"))
    assert len(support) == 4 and len(test) == 12 and not support & test
    assert {row["label"] for row in held["support"]} == {0}
    assert test == set(predictions(whole)["id"])


def test_a_run_imports_neither_tensorflow_nor_torch(whole, tmp_path_factory):
    stderr = finished(tmp_path_factory.getbasetemp()).stderr
    imported = set(re.findall(r"^import time:.*\| +(\w+)", stderr, re.MULTILINE))
    assert {"jax", "transformers", "orbax", "tensorflow_datasets"} <= imported
    assert not imported & {"tensorflow", "torch", "tf_keras", "keras"}


# --- kill, resume, modes --------------------------------------------------------------------


@cache
def killed(base: Path) -> Path:
    """A run that was killed after its first checkpoint."""
    workdir = make_world(base).base / "killed"
    finished(base)  # fills feature_cache and compilation cache, so that this one starts at once
    process = make_world(base).start(workdir)
    deadline = time.monotonic() + 200
    while not (workdir / "checkpoints" / str(EVERY)).is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (workdir / "metrics.json").exists()
    return workdir


def test_evaluate_refuses_an_unfinished_run_and_leaves_it_alone(world, tmp_path_factory, capfd):
    workdir = killed(tmp_path_factory.getbasetemp())
    assert world.main(workdir, "--mode=evaluate") == 2
    assert re.search(
        r"training stands at step \d+ of 150; run --mode train", capfd.readouterr().err
    )
    assert not (workdir / "predictions.npz").exists()


def test_a_killed_run_resumes_bit_for_bit(world, whole, tmp_path_factory):
    workdir = killed(tmp_path_factory.getbasetemp())
    at = max(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdigit())
    assert EVERY <= at < STEPS
    process = world.start(workdir)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    ours, theirs = leaves(state(workdir, STEPS)), leaves(state(whole, STEPS))
    assert len(ours) == len(theirs) > 10
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert log(workdir) == log(whole)
    a, b = predictions(workdir), predictions(whole)
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_sigterm_while_meta_training_saves_and_the_same_command_finishes(world, tmp_path):
    flags = ("--config.learner=maml", "--config.steps=100", "--config.synthesis.variants=16")
    flags = (
        *flags,
        "--config.meta.tasks=2",
        "--config.log_every=2",
        "--config.checkpoint_every=90",
    )
    workdir = tmp_path / "cut"
    process = world.start(workdir, *flags)
    lines = workdir / "metrics.jsonl"
    while process.poll() is None and not (lines.is_file() and lines.read_bytes().count(b"\n") > 2):
        time.sleep(0.005)
    process.terminate()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 143, stderr[-3000:]
    said = r"stopped by SIGTERM at step (\d+) of 100; the same command goes on from there"
    at = int(re.fullmatch(said, stderr.strip().splitlines()[-1])[1])
    assert (workdir / "checkpoints" / str(at)).is_dir() and 6 <= at < 90
    process = world.start(workdir, *flags)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    assert [row["step"] for row in log(workdir)] == [*range(2, 101, 2)]
    held = json.loads((workdir / "metrics.json").read_text())
    assert held["learner"] == "maml" and held["gradients"] == 100 * 2 * 2


def test_evaluate_scores_a_finished_run_again(world, whole):
    """In this process: eight devices where there was one, so equal to rounding."""
    before, trained = predictions(whole), (whole / "metrics.jsonl").read_bytes()
    assert world.main(whole, "--mode=evaluate") == 0
    after = predictions(whole)
    assert np.array_equal(before["id"], after["id"])
    for name in ("score", "p_value", "uncertainty", "maps"):
        np.testing.assert_allclose(after[name], before[name], atol=2e-3)
    assert (whole / "metrics.jsonl").read_bytes() == trained


def test_a_finished_run_is_not_made_again(world, whole, tmp_path, monkeypatch):
    """Unless a file of it is spoilt, or something that its result depends on has changed."""
    copy, scored = shutil.copytree(whole, tmp_path / "copy"), []
    real = train.evaluate.score_images
    monkeypatch.setattr(
        train.evaluate, "score_images", lambda *a, **k: scored.append(1) or real(*a, **k)
    )
    before = (copy / "metrics.json").read_bytes()
    (copy / "report.html").unlink()
    assert world.main(copy) == 0 and not scored
    assert (copy / "metrics.json").read_bytes() == before and (copy / "report.html").is_file()
    with (copy / "predictions.npz").open("r+b") as file:
        file.truncate(1000)
    assert world.main(copy) == 0 and len(scored) == 1
    assert world.main(copy, "--config.explained=1") == 0 and len(scored) == 2
    monkeypatch.setattr(train, "__version__", "0.0.1")
    assert world.main(copy, "--config.explained=1") == 0 and len(scored) == 3
    assert world.main(copy, "--config.explained=1", "--mode=evaluate") == 0 and len(scored) == 4
    mask = next((world.data / "ground_truth").rglob("*.png"))
    held = mask.read_bytes()
    mask.write_bytes(held + b"\0")  # another file, though the same picture
    try:
        assert world.main(copy, "--config.explained=1") == 0 and len(scored) == 5
    finally:
        mask.write_bytes(held)


def test_report_needs_no_model(world, whole, monkeypatch):
    monkeypatch.setattr(train, "run", None)
    page = (whole / "report.html").read_bytes()
    (whole / "report.html").unlink()
    assert world.main(whole, "--mode=report") == 0
    assert (whole / "report.html").read_bytes() == page
