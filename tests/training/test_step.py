"""The schedule, the folds, the step and the claim on a workdir."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medclip_jax import config
from medclip_jax.clip.outputs import Features
from medclip_jax.errors import WorkdirError
from medclip_jax.features import training_pool
from medclip_jax.features.batch import Batch
from medclip_jax.models import model
from medclip_jax.training import loop, metrics_log, step
from medclip_jax.training.state import TrainState
from medclip_jax.workdir import claim


def schedule(own, size, steps, seed=0, variants=5):
    rows = [batches.joint_rows(i, np.asarray(own), size, seed, variants) for i in range(steps)]
    support, variant = (np.concatenate(x) for x in zip(*rows, strict=True))
    return support, variant


@pytest.mark.parametrize("k, size", [(1, 1), (4, 4), (10, 4), (5, 8)])
def test_every_support_comes_once_per_epoch(k, size):
    own = 100 + np.arange(k)
    support, _ = schedule(own, size, steps=k * 6)
    epochs = support.reshape(-1, k)
    assert len(epochs) == 6 * size
    assert (np.sort(epochs, axis=1) == own).all()
    if k >= 4:
        assert len({tuple(e) for e in epochs}) > 1  # in another order


def test_rows_are_a_function_of_the_position_alone():
    support, variant = schedule(range(10), 4, steps=9)
    again = batches.joint_rows(7, np.arange(10), 4, 0, 5)
    assert np.array_equal(again[0], support[28:32]) and np.array_equal(again[1], variant[28:32])
    halves = schedule(range(10), 2, steps=18)
    assert np.array_equal(halves[0], support) and np.array_equal(halves[1], variant)
    assert not np.array_equal(schedule(range(10), 4, steps=9, seed=1)[0], support)


def test_a_quarter_is_identity_and_variants_take_turns():
    support, variant = schedule(range(16), 8, steps=2 * 400, variants=7)
    epoch = np.arange(len(variant)) // 16
    assert (variant < 0).mean() == pytest.approx(0.25, abs=0.02)  # 6400 draws: sd 0.0054
    used = variant >= 0
    assert (variant[used] == epoch[used] % 7).all()
    share = [(variant[support == s] < 0).mean() for s in range(16)]
    assert max(share) < 0.35 and min(share) > 0.15  # 400 draws each: sd 0.022


def test_without_variants_all_rows_are_identity():
    assert (schedule(range(4), 4, steps=5, variants=0)[1] == -1).all()


@pytest.mark.parametrize(
    "k, parts, sizes", [(8, 4, [2] * 4), (5, 4, [2, 1, 1, 1]), (3, 4, [1] * 3)]
)
def test_folds_partition_the_supports(k, parts, sizes):
    groups = batches.folds(k, parts)
    assert [len(g) for g in groups] == sizes
    assert sorted(np.concatenate(groups)) == list(range(k))


def test_one_support_or_one_part_has_no_folds():
    assert batches.folds(1, 4) == [] and batches.folds(8, 0) == [] and batches.folds(8, 1) == []


# --- a step on a tiny problem -----------------------------------------------------------------


def tensor(name: str, support: int):
    """Row v of the variants (or the image) of a support: numbers that tell where they are from."""
    level = np.zeros((8, 4, 3), np.float32) + support + np.arange(8)[:, None, None] / 10
    mask = np.zeros((8, 8), np.uint8) + 255
    return {"pooled": level[:, 0], "level0": level, "mask": mask}[name]


@pytest.fixture
def pool():
    rows = tuple(partial(tensor, support=s) for s in range(4))
    return training_pool.TrainingPool(rows, rows, 1, 8, 8, np.zeros((len(rows), 8), int))


def test_a_batch_holds_the_rows_of_every_copy(pool):
    members = [np.arange(4), np.array([1, 2, 3])]
    batch = batches.joint_batch(3, pool, members, 2, seed=0)
    assert batch.features.levels[0].shape == (2, 2, 4, 3)  # row, copy, patch, width
    assert batch.mask.shape == (2, 2, 8, 8) and batch.label.shape == (2, 2)
    for copy, own in enumerate(members):
        support, variant = batches.joint_rows(3, own, 2, 0, 8)
        expected = support + np.maximum(variant, 0) / 10
        np.testing.assert_allclose(batch.features.levels[0][:, copy, 0, 0], expected, rtol=1e-6)
        assert (batch.label[:, copy] == (variant >= 0)).all()
        assert (batch.mask[:, copy].mean((1, 2)) == (variant >= 0)).all()


def quadratic(params, frozen, batch, key):
    """Mean squared distance of w to the tokens; its minimum is the tokens' mean."""
    error = jnp.mean((params["w"] - batch.features.pooled) ** 2)
    return error, {"loss": error, "draw": jax.random.uniform(key)}


def problem(copies: int, lr: float = 0.1):
    optimizer = optax.sgd(lr)
    params = {"w": jnp.zeros((copies, 1, 3))}
    key = jax.random.key_data(jax.random.key(0))
    return (
        TrainState(jnp.asarray(0), params, jax.vmap(optimizer.init)(params), key),
        step.make_step(quadratic, optimizer),
    )


def batch_of(values: np.ndarray) -> Batch:
    """values [row, copy] as tokens."""
    tokens = np.repeat(values[..., None].astype(np.float32), 3, axis=-1)
    n, c = values.shape
    return Batch(
        Features(tokens, ()),
        np.zeros((n, c, 2, 2), np.float32),
        np.zeros((n, c), np.int32),
        np.ones((n, c), bool),
    )


def test_copies_take_their_own_steps_and_the_first_is_reported():
    state, step = problem(copies=2)
    batch = batch_of(np.array([[1.0, 10.0], [3.0, 30.0]]))
    losses, draws = [], []
    for i in range(60):
        state, parts = step(state, {}, batch)
        assert int(state.step) == i + 1
        losses.append(float(parts["loss"]))
        draws.append(float(parts["draw"]))
    assert losses[0] == pytest.approx((1 + 9) / 2)  # of copy 0
    assert all(b <= a + 1e-6 for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] == pytest.approx(1.0, abs=0.02)  # the variance of 1 and 3
    np.testing.assert_allclose(state.params["w"][:, 0, 0], [2.0, 20.0], rtol=0.02)
    assert len(set(draws)) == 60  # each step draws anew


def test_one_step_is_plain_gradient_descent():
    state, step = problem(copies=1)
    after, _ = step(state, {}, batch_of(np.array([[1.0], [3.0]])))
    # d/dw mean((w - x)^2) over 3 entries at w = 0 is -2 * 2 / 3 each
    np.testing.assert_allclose(after.params["w"], 0.1 * 4 / 3, rtol=1e-6)


def test_a_loss_that_is_not_finite_names_step_and_part(tmp_path):
    with metrics_log.MetricsLog(tmp_path) as log:
        loop.report(log, 10, {"loss": jnp.asarray(1.0), "dice": jnp.asarray(0.5)})
        with pytest.raises(FloatingPointError, match=r"step 20: dice is not finite"):
            loop.report(log, 20, {"loss": jnp.asarray(1.0), "dice": jnp.asarray(jnp.nan)})
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["nonfinite"] == ["dice"]


# --- fit: the loop ----------------------------------------------------------------------------


def fitted(workdir: Path, pool, monkeypatch, scale=1.0, steps=30):
    """fit.run with a small params and a loss that pulls it to the tokens."""

    def init(key, **_):
        return {"w": jax.random.normal(key, (1, 3))}

    def loss(params, frozen, batch, key, **_):
        error = jnp.mean((params["w"] - scale * batch.features.pooled) ** 2)
        return error, {"loss": error}

    monkeypatch.setattr(model, "init", init)
    monkeypatch.setattr(model, "loss", loss)
    c = config.base("k=4")
    c.update({"batch": 4, "steps": steps, "checkpoint_every": 7, "log_every": 5, "validations": 0})
    c.optimizer.update({"learning_rate": 0.1})
    from medclip_jax.distributed import sharding

    mesh = sharding.mesh(jax.devices()[:1])
    groups = batches.folds(4, 2)
    design = SimpleNamespace(sets=())  # prompts are the loss's own matter
    args = (c, workdir, SimpleNamespace(), design, {}, [pool], groups, mesh, True)
    return loop.run(*args)


def test_fit_lowers_the_loss_and_copies_learn_without_their_fold(tmp_path, pool, monkeypatch):
    params = fitted(tmp_path, pool, monkeypatch)
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    # folds of 4 supports are {0, 2} and {1, 3}: the copies tend to the mean of the others
    whole, without_even, without_odd = params["w"].mean((1, 2))
    assert without_odd < whole < without_even
    held = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert held == {"28", "30"}


def test_fit_resumes_bit_for_bit(tmp_path, pool, monkeypatch):
    whole = fitted(tmp_path / "a", pool, monkeypatch)
    fitted(tmp_path / "b", pool, monkeypatch, steps=14)
    parted = fitted(tmp_path / "b", pool, monkeypatch)
    assert np.array_equal(whole["w"], parted["w"])


def test_fit_stops_at_a_value_that_is_not_finite_and_saves_nothing_of_it(
    tmp_path, pool, monkeypatch
):
    with pytest.raises(FloatingPointError, match=r"step 5: loss is not finite"):
        fitted(tmp_path, pool, monkeypatch, scale=np.float32("nan"))
    assert list((tmp_path / "checkpoints").iterdir()) == []


# --- the claim on a workdir -------------------------------------------------------------------


def settings(arg="k=4", **given):
    c = config.base(arg, name="folder")
    c.update(given)
    return config.resolve(c)


def test_a_claim_is_kept_and_renewed(tmp_path):
    claim(tmp_path, settings())
    first = json.loads((tmp_path / "config.json").read_text())
    assert first["k"] == 4 and first["steps"] > 0 and first["data"]["name"] == "folder"
    claim(tmp_path, settings(cache="/elsewhere", log_every=1, checkpoint_every=3))
    held = json.loads((tmp_path / "config.json").read_text())
    assert held["cache"] == "/elsewhere" and held["log_every"] == 1


@pytest.mark.parametrize(
    "arg, given, named",
    [
        ("k=8", {}, "k = 4, not 8"),
        ("k=4,seed=1", {}, "seed = 0, not 1"),
        ("k=4,method=memory", {}, "method = ours, not memory"),
        ("k=4", {"steps": 7}, "steps = .*, not 7"),
        ("k=4", {"loss": {"dice": 0.5}}, "loss"),
    ],
)
def test_a_claim_on_another_run_is_refused(tmp_path, arg, given, named):
    claim(tmp_path, settings())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(WorkdirError, match=named):
        claim(tmp_path, settings(arg, **given))
    assert (tmp_path / "config.json").read_bytes() == before
