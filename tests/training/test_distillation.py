"""Equation (13) against the reference; a teacher's logits reach the rows; who may not teach."""

import logging
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medclip_jax
from medclip_jax import config, train
from medclip_jax.data import augmentation
from medclip_jax.data.augmentation import Strengths
from medclip_jax.data.layouts import Split
from medclip_jax.errors import CheckpointError, ConfigError
from medclip_jax.features import encoder, training_pool
from medclip_jax.files import read_steps
from medclip_jax.models import losses
from medclip_jax.training import distillation
from tests.support.pictures import opened
from tests.support.reference import reference_params
from tests.support.runs import predictions


@pytest.mark.parametrize("path", reference_params("losses_*.npz"))
@pytest.mark.parametrize("temperature", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.3, 0.7])
@pytest.mark.parametrize("squared", [False, True])
def test_distill_equals_the_reference(path, temperature, alpha, squared):
    ref = np.load(path)
    student, teacher, label = (
        jnp.asarray(ref[f"kd_{x}"]) for x in ("student_logits", "teacher_logits", "labels")
    )
    like = losses.Distill(1.0, alpha, float(temperature), squared)
    value, grad = jax.value_and_grad(lambda s: losses.distill(s, teacher, label, like).mean())(
        student
    )
    name = f"kd_T{temperature}_a{alpha}_{'T2' if squared else 'noT2'}"
    np.testing.assert_allclose(value, ref[name], rtol=2e-6)
    want = ref[f"{name}_grad_student"]
    np.testing.assert_allclose(grad, want, atol=1e-5 * np.abs(want).max())


def test_patches_by_hand():
    """One patch of two is masked; the second row only fills."""
    student, teacher = jnp.array([[0.4, -1.0], [9.0, 9.0]]), jnp.array([[1.5, 0.2], [0.0, 0.0]])
    share = jnp.array([[0.8, 0.1], [0.0, 0.0]])
    like = losses.Distill(1.0, 0.25, 2.0, False)
    got = losses.distill_patches(student, teacher, share, jnp.array([True, False]), like)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    s, t = np.array([0.4, -1.0]), np.array([1.5, 0.2])
    ce = -np.log([sigmoid(0.4), 1 - sigmoid(-1.0)])
    q, p = sigmoid(t / 2), sigmoid(s / 2)
    kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    np.testing.assert_allclose(got, (0.25 * ce + 0.75 * kl).mean(), rtol=1e-5)


def test_every_row_carries_the_logits_of_its_own_image(tmp_path, tiny, pictures):
    """A teacher whose logit is the mean grey value of each patch."""
    grid, size = tiny.grid, tiny.size

    def logits(images):
        tiles = images.reshape(-1, grid, size // grid, grid, size // grid)
        return tiles.mean((2, 4)).reshape(len(images), -1)

    feature_cache = opened(tmp_path, tiny)
    recipe = augmentation.Synthesis("medclip", 3, 0, "self", 2, Strengths(flip=1.0))
    supports = pictures[:2]
    plain = encoder.open_pool(feature_cache, supports, recipe)
    teacher = distillation.Teacher(size, (), logits)
    pool = distillation.add_logits(plain, teacher, feature_cache, supports, recipe)
    assert [x.shape for x in pool.teacher] == [(6, grid**2)] * 2
    rows = np.array([0, 1, 1, 0, 1]), np.array([-1, 0, 2, -2, -3])
    got, bare = training_pool.take(pool, *rows), training_pool.take(plain, *rows)
    assert bare.teacher is None
    jax.tree.map(np.testing.assert_array_equal, bare, got._replace(teacher=None))
    for logit, s, row in zip(got.teacher, rows[0], (0, 1, 3, 4, 5), strict=True):
        np.testing.assert_array_equal(logit, pool.teacher[s][row])
    # an image that was only mirrored has mirrored patches
    mirrored = pool.teacher[0][0].reshape(grid, grid)[:, ::-1].ravel()
    np.testing.assert_allclose(pool.teacher[0][4], mirrored, atol=1e-5)
    batch = training_pool.joint_batch(0, pool, [np.arange(2)], 2, 0)
    assert batch.teacher.shape == (2, 1, grid**2)


def test_another_frame_and_grid():
    ramp = np.tile(np.arange(4.0, dtype=np.float32), (4, 1)).reshape(1, 16)
    np.testing.assert_array_equal(distillation.to_grid(ramp, 4), ramp)
    assert distillation.to_grid(ramp, 8).reshape(8, 8)[0] == pytest.approx(
        [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    )
    np.testing.assert_allclose(distillation.to_grid(np.ones((2, 49), np.float32), 4), 1, rtol=1e-6)


def test_a_workdir_teaches_another(world, whole, tmp_path):
    """Its patch logits reach the loss; the run that it came from is the shared one."""
    c = config.base("k=4", name="folder", root=str(world.data))
    changes = {"clip.checkpoint": str(world.clip), "cache": str(world.base / "cache"), "steps": 2}
    changes |= {"synthesis.variants": 2, "teacher": str(whole), "validations": 0}
    c.update_from_flattened_dict(changes)
    prepared = train.prepare(c)
    encoded = train.encode(prepared)
    train.fit(prepared, encoded, tmp_path)
    (line,) = read_steps(tmp_path / "metrics.jsonl")
    assert np.isfinite(line["distill"])


def test_a_run_of_tiles_alone_teaches_and_predicts_as_it_was_measured(world, tmp_path, caplog):
    """As the paper's recipe: no branch has a name, and each scale has parameters of its own."""
    world.train(tmp_path / "tiles", branches=("learned",), score__tiles=2)
    held = predictions(tmp_path / "tiles")
    files = [world.data / name for name in held["id"][:4]]
    got = medclip_jax.load(tmp_path / "tiles").predict(files)
    np.testing.assert_allclose([x.uncertainty for x in got], held["uncertainty"][:4], atol=2e-3)
    assert min(x.uncertainty for x in got) > 0
    world.train(tmp_path / "student", teacher=str(tmp_path / "tiles"))
    (line,) = read_steps(tmp_path / "student" / "metrics.jsonl")
    assert line["distill"] > 0
    with caplog.at_level(logging.INFO):
        world.train(tmp_path / "student", teacher=str(tmp_path / "tiles"))
    assert "is finished: nothing to do" in caplog.text
    shutil.rmtree(tmp_path / "tiles")  # and another one takes its place
    world.train(tmp_path / "tiles", branches=("learned",), score__tiles=2, learning_rate=0.5)
    with pytest.raises(CheckpointError, match="language adapter, teacher, other prompts"):
        world.train(tmp_path / "student", teacher=str(tmp_path / "tiles"))


def test_what_a_teacher_learned_from_calibrates_no_student(monkeypatch):
    """Images of calibration.extra prove a rate: they may be its supports no more than tests may."""
    monkeypatch.setattr(train.build_detector, "load_teacher", lambda c, clip, unseen: unseen)
    prepared = train.Prepared(
        *(SimpleNamespace(teacher="x", steps=2), None, Split(("support",), ("test",)), ()),
        *(None, {}, None, ("extra",)),
    )
    assert train.teacher_of(prepared) == ("test", "extra")


CONFIG = {"steps": 5, "method": "ours", "data": {"name": "folder", "fit": "pad", "window": ""}}
CONFIG |= {"model": {"form": "softmax"}, "branches": ["learned", "memory"]}


@pytest.mark.parametrize(
    "teacher, test, message",
    [
        ({"steps": 0}, [], "learned nothing"),
        ({"branches": ["meta"]}, [], "learned nothing"),
        ({"data": CONFIG["data"] | {"name": "busi"}}, [], "'busi' and this run has 'folder'"),
        ({"data": CONFIG["data"] | {"window": "lung"}}, [], "window 'lung' and this run has ''"),
        ({"model": {"form": "distance"}}, [], "same form"),
        ({}, ["a"], "1 of this run's test images"),
    ],
)
def test_teachers_that_are_refused(tmp_path, teacher, test, message):
    distillation.check(tmp_path, CONFIG, CONFIG, ["a", "b"], ["c"])
    with pytest.raises(ConfigError, match=f"config.teacher .*{message}"):
        distillation.check(tmp_path, CONFIG | teacher, CONFIG, ["a", "b"], test)
