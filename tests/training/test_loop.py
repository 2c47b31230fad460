"""The loop: what it logs and saves, and that an interrupted run equals an uninterrupted one."""

import json
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from medclip_jax.distributed import sharding
from medclip_jax.errors import CheckpointError, ConfigError, Preempted
from medclip_jax.features import training_pool
from medclip_jax.training import loop
from medclip_jax.training.checkpoints import MetricsLog
from medclip_jax.training.step import Learner
from tests.support.toy import toy_loss, toy_params

SCHEDULE = loop.Schedule(
    steps=27, seed=0, batch=4, tasks=3, shots=2, checkpoint_every=7, validations=2
)


def fit(workdir, pool, learner="joint", loss=toy_loss, score=None, **options):
    workdir.mkdir(parents=True, exist_ok=True)
    schedule = SCHEDULE._replace(**{n: options.pop(n) for n in ("steps",) if n in options})
    return loop.fit(
        toy_params(pool.clean[0]("level0").shape[-1]),
        {},
        [pool],
        training_pool.folds(4, 2),
        loss=loss,
        optimizer=loop.adam(0.05),
        learner=Learner(learner),
        schedule=schedule,
        workdir=workdir,
        mesh=sharding.mesh(jax.devices()[:2]),
        score=score,
        **options,
    )


def lines(workdir):
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def saved(workdir):
    return {p.name for p in (workdir / "checkpoints").iterdir()}


def test_the_loss_falls_and_params_differ_by_fold(tmp_path, pool):
    def score(params, frozen, features):
        return features.levels[0][:, 0] @ params["adapters"][0]["kernel"][:, 0]

    params = fit(tmp_path, pool, score=score)
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 27] and saved(tmp_path) == {"21", "27"}
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(0 <= row["held_out_auroc"] <= 1 for row in (rows[0], rows[-1]))
    main, one, two = params["context"]
    assert (main != one).any() and (main != two).any() and (one != two).any()


def test_params_are_adapted_once_after_the_last_step(tmp_path, pool, monkeypatch):
    """For its validation and for the result, which is that of a run without validations."""
    counted, real = [], loop.episodes.adaptation_batches
    monkeypatch.setattr(
        loop.episodes, "adaptation_batches", lambda *args: counted.append(1) or real(*args)
    )
    with_score = fit(tmp_path / "a", pool, "maml", score=lambda _, __, x: x.levels[0][:, 0, 0])
    assert len(counted) == 3  # after 10, 20 and 27 steps
    without = fit(tmp_path / "b", pool, "maml")
    assert len(counted) == 4
    jax.tree.map(np.testing.assert_array_equal, with_score, without)


def test_no_steps_leaves_params_as_they_are(tmp_path, pool):
    params = fit(tmp_path, pool, steps=0)
    fresh = toy_params(pool.clean[0]("level0").shape[-1])
    np.testing.assert_array_equal(params["context"], np.stack([fresh["context"]] * 3))
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("learner", ["joint", "meta_sgd"])
def test_sigterm_saves_and_resuming_equals_the_whole_run(tmp_path, pool, learner, monkeypatch):
    whole = fit(tmp_path / "whole", pool, learner)
    write = MetricsLog.write

    def interrupted(log, step, parts):
        write(log, step, parts)
        if step == 10:
            signal.raise_signal(signal.SIGTERM)  # to this thread: no race

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(MetricsLog, "write", interrupted)
    with pytest.raises(Preempted, match=r"^stopped by SIGTERM at step 11 of 27$"):
        fit(tmp_path / "cut", pool, learner)
    assert signal.getsignal(signal.SIGTERM) is before and saved(tmp_path / "cut") == {"7", "11"}
    with pytest.raises(CheckpointError, match="stands at step 11 of 27; run --mode train"):
        fit(tmp_path / "cut", pool, learner, resume_only=True)
    monkeypatch.setattr(MetricsLog, "write", write)
    resumed = fit(tmp_path / "cut", pool, learner)
    for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(x, y)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_value_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path, pool):
    def loss(params, frozen, batch, key):
        value, parts = toy_loss(params, frozen, batch, key)
        return value * np.nan, parts | {"dice": value * np.nan}

    with pytest.raises(ConfigError, match=r"step 7: .*dice.* is not finite"):
        fit(tmp_path, pool, loss=loss)
    assert saved(tmp_path) == set() and lines(tmp_path) == []


def test_no_large_batch_is_read_while_two_are_held(tmp_path, pool, monkeypatch):
    events, read, make_step = [], training_pool.joint_batch, loop.training_step.make_step

    def slow(x):
        time.sleep(0.05)
        events.append("done")
        return x

    def make(*args):
        take, late = make_step(*args), jax.jit(lambda x: jax.pure_callback(slow, x, x))

        def step(state, frozen, batch):
            state, parts = take(state, frozen, batch)
            return state, parts | {"loss": late(parts["loss"])}

        compiled = SimpleNamespace(compile=lambda: step)
        return SimpleNamespace(lower=lambda *_: compiled)

    monkeypatch.setattr(loop, "LARGE", 0)
    monkeypatch.setattr(loop.training_step, "make_step", make)
    monkeypatch.setattr(training_pool, "joint_batch", lambda *x: events.append("read") or read(*x))
    fit(tmp_path, pool, steps=5)
    reads = [i for i, event in enumerate(events) if event == "read"]
    a_step = events.count("done") / 5  # the devices' calls
    assert len(reads) == 5 and a_step >= 1
    for step, start in enumerate(reads[2:], 1):
        assert events[:start].count("done") >= step * a_step
