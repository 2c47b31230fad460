"""Whole runs by the command line, on a tiny CLIP: files, kill and resume, modes."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from medclip_jax import files, train
from medclip_jax.evaluation import metrics
from medclip_jax.io import read
from tests.support.pixels import pixel_level
from tests.support.runs import EVERY, EXPLAINED, META, STEPS, log, predictions

IMAGE = "auroc auprc accuracy precision recall f1 specificity balanced_accuracy mcc fpr tpr"
PIXEL = (
    "auroc auprc accuracy precision recall f1 specificity balanced_accuracy mcc iou dice "
    "tp tn fp fn hausdorff hausdorff95 boundary_f1 aupro oracle_dice "
    "hausdorff_or_diagonal hausdorff95_or_diagonal hausdorff_images "
    "hausdorff95_images hausdorff_or_diagonal_images hausdorff95_or_diagonal_images "
    "boundary_f1_images"
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
        *(".lock", "config.json", "metrics.jsonl", "split.json", "predictions.npz", "metrics.json"),
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
        "dataset k seed split method learner gradients backbone image pixel lesions calibration "
        "intervals uncertainty explanations fusion timing versions finished digest".split()
    )
    assert set(held["image"]) == {*IMAGE.split(), "threshold"}
    assert set(held["pixel"]) == {*PIXEL.split(), "distance_unit", "boundary_tolerance"}
    assert (held["dataset"], held["k"], held["seed"]) == ("folder", 4, 0)
    assert (held["split"], held["method"]) == ("peer", "ours")
    assert set(held["timing"]) == {"load", "encode", "train", "score", "metrics"}
    assert held["calibration"]["k"] == 4 and held["calibration"]["n_healthy_test"] == 6
    assert held["versions"]["medclip-jax"] and held["versions"]["jax"]


def test_an_unattainable_rate_is_a_warning_on_the_terminal(finished):
    said = finished.stderr.splitlines()
    sentence = (
        "with 4 healthy images the least attainable false-alarm rate is about 20%, with no proven "
        "bound, asked for 10%"
    )
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
    pixel = pixel_level(held["maps"].astype(np.float32), np.stack(masks))
    assert files.plain(image) == pytest.approx(written["image"], abs=1e-12)
    pixel |= {"distance_unit": "px", "boundary_tolerance": 2}
    assert files.plain(pixel) == pytest.approx(written["pixel"], abs=1e-12)


def test_support_and_test_of_split_json_are_apart(whole):
    held = json.loads((whole / "split.json").read_text())
    support, test = ({row["id"] for row in held[part]} for part in ("support", "test"))
    assert len(support) == 4 and len(test) == 12 and not support & test
    assert {row["label"] for row in held["support"]} == {0}
    assert test == set(predictions(whole)["id"])


def test_a_run_imports_neither_tensorflow_nor_torch(finished):
    imported = set(re.findall(r"^import time:.*\| +(\w+)", finished.stderr, re.MULTILINE))
    assert {"jax", "transformers", "orbax", "tensorflow_datasets"} <= imported
    assert not imported & {"tensorflow", "torch", "tf_keras", "keras"}


# --- kill, resume, modes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(world, whole, tmp_path_factory) -> Path:
    """A run like `whole`, killed after its first checkpoint."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    process = world.start(workdir, *EXPLAINED)
    deadline = time.monotonic() + 200
    while not (workdir / "checkpoints" / str(EVERY)).is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (workdir / "metrics.json").exists()
    return workdir


def test_evaluate_refuses_an_unfinished_run_and_leaves_it_alone(world, killed, tmp_path, capfd):
    copy = shutil.copytree(killed, tmp_path / "copy")
    assert world.main(copy, *EXPLAINED, "--mode=evaluate") == 2
    said = rf"training stands at step \d+ of {STEPS}; run --mode train"
    assert re.search(said, capfd.readouterr().err)
    assert not (copy / "predictions.npz").exists()


def test_a_killed_run_resumes_bit_for_bit(world, whole, killed, tmp_path):
    workdir = shutil.copytree(killed, tmp_path / "copy")
    at = max(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdigit())
    assert EVERY <= at < STEPS
    assert world.main(workdir, *EXPLAINED, report=False) == 0
    ours, theirs = leaves(state(workdir, STEPS)), leaves(state(whole, STEPS))
    assert len(ours) == len(theirs) > 10
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert log(workdir) == log(whole)
    a, b = predictions(workdir), predictions(whole)
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_sigterm_while_meta_training_saves_and_the_same_command_finishes(world, tmp_path):
    workdir = tmp_path / "cut"
    flags = (*META, f"--config.steps={STEPS}", "--config.branches=('learned',)")
    process = world.start(workdir, *flags)
    lines = workdir / "metrics.jsonl"
    while process.poll() is None and not (lines.is_file() and lines.read_bytes().count(b"\n") > 1):
        time.sleep(0.005)
    process.terminate()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 143, stderr[-3000:]
    at = int(re.search(rf"stopped by SIGTERM at step (\d+) of {STEPS}", stderr)[1])
    assert "Re-run the same command to resume" in stderr
    assert (workdir / "checkpoints" / str(at)).is_dir() and 20 <= at < STEPS
    assert world.main(workdir, *flags, report=False) == 0
    assert [row["step"] for row in log(workdir)] == [*range(10, STEPS + 1, 10)]
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert metrics["learner"] == "maml" and metrics["gradients"] == STEPS * 3 * 2


def test_evaluate_scores_a_finished_run_again(world, whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    before, trained = predictions(copy), (copy / "metrics.jsonl").read_bytes()
    assert world.main(copy, *EXPLAINED, "--mode=evaluate", report=False) == 0
    after = predictions(copy)
    assert np.array_equal(before["id"], after["id"])
    for name in ("score", "p_value", "uncertainty", "maps"):
        np.testing.assert_array_equal(after[name], before[name])
    assert (copy / "metrics.jsonl").read_bytes() == trained


def test_a_finished_run_is_scored_again_only_where_something_changed(world, tmp_path, monkeypatch):
    """A file of it, or something that its result depends on; a report alone is written again."""
    data = shutil.copytree(world.data, tmp_path / "data")
    here, run, scored = world._replace(data=data), tmp_path / "run", []
    real = train.evaluate.score_images
    monkeypatch.setattr(
        train.evaluate, "score_images", lambda *a, **k: scored.append(1) or real(*a, **k)
    )

    def scorings(*more: str, report: bool = False) -> int:
        scored.clear()
        assert here.main(run, *more, arguments="k=4,method=memory", report=report) == 0
        return len(scored)

    assert scorings() == 1
    before = (run / "metrics.json").read_bytes()
    assert not (run / "report.html").exists()
    assert scorings(report=True) == 0
    assert (run / "metrics.json").read_bytes() == before and (run / "report.html").is_file()
    with (run / "predictions.npz").open("r+b") as file:
        file.truncate(1000)
    assert scorings() == 1
    assert scorings("--config.explained=1") == 1
    monkeypatch.setattr(train, "__version__", "0.0.1")
    assert scorings() == 1
    assert scorings("--mode=evaluate") == 1
    mask = next((data / "ground_truth").rglob("*.png"))
    mask.write_bytes(mask.read_bytes() + b"\0")  # another file, though the same picture
    assert scorings() == 1


def test_report_needs_no_model(world, whole, tmp_path, monkeypatch):
    copy = shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.setattr(train, "run", None)
    page = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    assert world.main(copy, "--mode=report") == 0
    assert (copy / "report.html").read_bytes() == page
