"""What a finished run stored and later commands believe: altered files are named."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save

from medclip_jax import build_detector, main, stored
from medclip_jax.detectors import saved
from medclip_jax.errors import UserError, WorkdirError
from medclip_jax.report import load
from tests.support.damaged import altered, one_bit


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trust") / "run"
    world.train(workdir)
    return workdir


@pytest.mark.parametrize("resealed", [False, True])
def test_altered_settings_of_a_detector_are_refused(small, tmp_path, resealed):
    rng = np.random.default_rng(0)
    head = json.loads((small / saved.SETTINGS).read_text())
    shutil.copy(small / saved.TENSORS, tmp_path)
    refused = 0
    for _ in range(60):
        values = json.loads(json.dumps(head))
        altered(values, rng)
        values = stored.sealed(values) if resealed else values
        (tmp_path / saved.SETTINGS).write_text(json.dumps(values))
        try:
            saved.read(tmp_path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and saved.SETTINGS in str(error)
    assert refused == 60 or resealed and refused > 40


@pytest.mark.parametrize("name", ["scorer.json", "scorer.safetensors"])
def test_a_flipped_bit_of_a_detector_is_found(small, tmp_path, name):
    for file in (saved.SETTINGS, saved.TENSORS):
        shutil.copy(small / file, tmp_path)
    for flipped in one_bit((small / name).read_bytes(), 100):
        (tmp_path / name).write_bytes(flipped)
        with pytest.raises(UserError, match="damaged|format"):
            saved.read(tmp_path)


@pytest.mark.parametrize(
    "names, said",
    [
        (("a", "a/b"), "lies in another"),
        (("a/b", "a"), "lies in another"),
        (("a/b", "a/b/c"), "lies in another"),
        (("model/[1]",), "a sequence of 1 tensors has no number 0"),
        (("model/[0]", "model/[00]"), "a sequence of 2 tensors has no number 1"),
        (("/".join("x" * 3000),), "more than 20 parts"),
        (("/".join("x" * 21),), "more than 20 parts"),
    ],
)
def test_tensors_of_a_detector_under_impossible_names_are_one_sentence(
    small, tmp_path, names, said
):
    tensors = {name: np.zeros(1, np.float32) for name in names}
    with pytest.raises(ValueError, match=said):
        saved.unflatten(tensors)
    (tmp_path / saved.TENSORS).write_bytes(raw := save(tensors))
    head = json.loads((small / saved.SETTINGS).read_text())
    head = stored.sealed(head | {"sha256": hashlib.sha256(raw).hexdigest()})
    (tmp_path / saved.SETTINGS).write_text(json.dumps(head))
    with pytest.raises(WorkdirError, match="is damaged .*: run --mode evaluate"):
        saved.read(tmp_path)


def test_names_of_tensors_come_back():
    tree = {"a": {"b": (np.ones(2), {"c": np.zeros(1)})}, "/".join("x" * 18): np.ones(3)}
    again = saved.unflatten(saved.flatten(tree))
    np.testing.assert_array_equal(again["a"]["b"][0], np.ones(2))
    np.testing.assert_array_equal(again["a"]["b"][1]["c"], np.zeros(1))


def test_a_detector_names_no_folder_of_its_data(small, tmp_path):
    """Of data sets that were given as NAME=FOLDER, their names."""
    trained = saved.read(small)
    c = trained.config.copy_and_resolve_references()
    with c.unlocked():
        c.data.root = c.teacher = c.calibration.extra = "/mnt/ward7/Miller_John"
        c.meta.data = "busi", "brain_mri=/mnt/ward7/Miller_John"
        c.meta.sources = ("bus_uc=/mnt/ward7/Miller_John",)
    detector = build_detector.load_predictor(small).detector
    rest = {name: getattr(trained, name) for name in ("checkpoint", "language", "supports")}
    settings = json.loads(c.to_json_best_effort())
    saved.write(tmp_path, detector, trained.calibration, settings=settings, **rest)
    assert "Miller" not in (tmp_path / saved.SETTINGS).read_text()
    written = json.loads((tmp_path / saved.SETTINGS).read_text())["config"]["meta"]
    assert written["data"] == ["busi", "brain_mri"] and written["sources"] == ["bus_uc"]
    with c.unlocked():
        c.meta.sources = ()  # which go with a branch that this run has not
    settings = json.loads(c.to_json_best_effort())
    saved.write(tmp_path, detector, trained.calibration, settings=settings, **rest)
    assert saved.read(tmp_path).config.meta.data == ("busi", "brain_mri")


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "split.json", "predictions.npz"])
def test_a_flipped_bit_of_what_a_report_reads_is_found(small, tmp_path, name):
    workdir = tmp_path / "run"
    shutil.copytree(small, workdir)
    load.read(workdir)
    harmless = 0
    for flipped in one_bit((small / name).read_bytes(), 60):
        (workdir / name).write_bytes(flipped)
        try:
            load.read(workdir)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            harmless += 1  # a space, or a setting that two commands of one run may differ in
    assert harmless == 0 or name in ("config.json", "metrics.json") and harmless < 20


def test_a_run_goes_on_with_its_data_elsewhere(world, small, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(world.data, moved)
    before = (small / "metrics.json").read_bytes()
    assert world._replace(data=moved).train(small)["image"] == json.loads(before)["image"]
    assert (small / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["good", "lesion"])
def test_a_test_set_of_one_class_leaves_a_detector(world, tmp_path, kind):
    data, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(world.data, data)
    shutil.rmtree(data / "test" / ("good" if kind == "lesion" else "lesion"))
    if kind == "good":
        shutil.rmtree(data / "ground_truth", ignore_errors=True)
    metrics = world._replace(data=data).train(workdir)
    assert metrics["image"]["auroc"] is None and 0 <= metrics["image"]["accuracy"] <= 1
    assert build_detector.load_predictor(workdir).calibration.k == 4


def test_names_with_control_characters_stay_text(capsys):
    code = main.main(["main", "--mode=report", "--config=x\x1b[31m\u202e\n.py", "--workdir=w"])
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "\x1b" not in said and "\u202e" not in said
