"""The learners on a pool in memory, where anomalous patches carry a planted shift.

Most tests use a small loss of the same form as model.loss, which compiles in no time.
"""

import os
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medclip_jax import build, config
from medclip_jax.distributed import runtime, sharding
from medclip_jax.errors import ConfigError
from medclip_jax.models import losses, model
from medclip_jax.training import loop, maml
from medclip_jax.training import step as training_step
from medclip_jax.training.state import TrainState
from tests.support.pools import settings

WEIGHTS = dict(focal=1.0, dice=1.0, align=0.1, prompt=0.0)
SIZES = dict(tasks=3, k=4, shots=4, query=2)


def toy_init(key, width):
    kernel, bias, context = jax.random.split(key, 3)
    return {
        "adapters": (
            {
                "kernel": jax.random.normal(kernel, (width, 4)) / width,
                "bias": jax.random.normal(bias, (4,)),
            },
        ),
        "context": jax.random.normal(context, (4,)),
        "scale": jnp.asarray(0.1),
    }


def toy_loss(params, frozen, batch, key):
    """Two layers on the first patch of every image, which shows the shift or not."""
    x = batch.features.levels[0][:, 0]
    if key is not None:
        keep = jax.random.bernoulli(key, 0.7, x.shape)
        x = jnp.where(keep, x / 0.7, 0.0)
    (p,) = params["adapters"]
    hidden = jnp.tanh(x @ p["kernel"] + p["bias"][None])
    z = jnp.exp(params["scale"]) * (hidden @ params["context"])
    y = batch.mask[:, 0, 0]
    loss = losses.row_mean(jax.nn.softplus(z) - y * z, batch.valid)
    return loss, {"loss": loss}


def set_up(tower, optimizer, copies=1, **fields):
    """(settings, frozen, loss, state)"""
    c = settings(**fields)
    params = toy_init(jax.random.key(0), tower.widths[0])
    if c.meta.learn_rate:
        params = maml.meta_sgd(params, c.meta.inner_rate)
    params = jax.tree.map(lambda x: jnp.stack([x] * copies), params)
    opt = jax.vmap(optimizer.init)(params)
    state = TrainState(jnp.asarray(0), params, opt, jax.random.key_data(jax.random.key(0)))
    return c, {}, toy_loss, state


def step_of(c, loss, optimizer, **changes):
    inner = training_step.inner(c.learner, c.meta.inner_steps, c.meta.inner_rate, c.meta.learn_rate)
    inner = inner._replace(**changes)
    return training_step.make_step(
        loss if c.learner == "joint" else training_step.meta_objective(loss, inner), optimizer
    ), inner


def at(pool, step, copies=((0, 1, 2, 3),), **sizes):
    members = [[np.array(own)] for own in copies]
    return training_episodes.episodes_batch(step, pool, members, 0, **(SIZES | sizes))


def close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(np.abs(y).max()))


@pytest.mark.parametrize(
    ("learner", "learned"),
    [("joint", False), ("maml", False), ("maml", True), ("fomaml", False), ("anil", False)],
)
def test_every_learner_learns_and_adapting_helps(tower, pool, learner, learned):
    optimizer = optax.adam(3e-2)
    fields = {"learner": learner, "meta.learn_rate": learned, "meta.inner_rate": 0.05}
    c, frozen, loss, state = set_up(tower, optimizer, **fields)
    step, inner = step_of(c, loss, optimizer)
    rows = training_episodes.adaptation_batch(pool, [np.arange(4)])
    flat = jax.tree.map(lambda x: x[:, 0], rows)

    def value(params):
        return float(jax.jit(loss)(jax.tree.map(lambda x: x[0], params), frozen, flat, None)[0])

    def plain(params):
        return params.params if learned else params

    before, held = value(plain(state.params)), jax.tree.map(np.array, state.params)
    for i in range(15):
        if learner == "joint":
            batch = training_batches.joint_batch(i, pool, [np.arange(4)], 4, 0)
        else:
            batch = at(pool, i)
        state, parts = step(state, frozen, batch)
    assert int(state.step) == 15 and np.isfinite(float(parts["loss"]))
    assert value(plain(state.params)) < 0.9 * before
    if learner == "joint":
        return
    adapted, support = training_step.adapt(state.params, frozen, rows, loss=loss, inner=inner)
    assert support.shape == (1, 1)
    assert value(adapted) < value(plain(state.params)) == pytest.approx(float(support[0, 0]))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), adapted, plain(state.params))
    assert moved["context"] == (learner != "anil")
    assert moved["scale"] and all(p["kernel"] and p["bias"] for p in moved["adapters"])
    assert not np.array_equal(plain(state.params)["context"], plain(held)["context"])
    if learned:
        rates = jax.tree.map(lambda a, b: bool((a != b).any()), state.params.rate, held.rate)
        assert all(jax.tree.leaves(rates))


def test_no_inner_step_is_joint_training_on_the_query(tower, pool):
    optimizer = optax.sgd(0.1)
    _, frozen, _, state = set_up(tower, optimizer)
    episode = at(pool, 0, tasks=1)

    def loss(params, frozen, batch, _):  # dropout off: the two draw it from different keys
        return toy_loss(params, frozen, batch, None)

    meta, _ = step_of(settings(learner="maml"), loss, optimizer, steps=0)
    joint, _ = step_of(settings(), loss, optimizer)
    query = jax.tree.map(lambda x: x[0].swapaxes(0, 1), episode.query)  # [row, copy]
    (one, parts), (other, same) = (
        f(jax.tree.map(jnp.copy, state), frozen, batch)
        for f, batch in ((meta, episode), (joint, query))
    )
    close(parts, same, 1e-6)
    close(one.params, other.params, 1e-6)


def test_orders_and_heads_give_different_gradients(tower, pool):
    """One SGD step from the same state is the outer gradient; fomaml, anil and maml all differ."""
    optimizer = optax.sgd(0.1)
    after = {}
    for learner in ("maml", "fomaml", "anil"):
        c, frozen, loss, state = set_up(tower, optimizer, learner=learner)
        step, _ = step_of(c, loss, optimizer)
        state, _ = step(state, frozen, at(pool, 0))
        after[learner] = np.asarray(state.params["adapters"][0]["kernel"])
    size = np.abs(after["maml"]).max()
    for a, b in (("maml", "fomaml"), ("maml", "anil"), ("fomaml", "anil")):
        assert np.abs(after[a] - after[b]).max() > 1e-5 * size


@pytest.mark.parametrize("learner", ["joint", "maml", "model"])
def test_eight_devices_equal_one_with_dropout_and_uneven_tasks(tower, pool, learner):
    """The last case is exact MAML of the model itself, one copy; the others are the small loss."""
    optimizer, copies = optax.sgd(0.1), ((0, 1, 2, 3), (0, 2))[: 1 if learner == "model" else 2]
    fields = {
        "learner": "joint" if learner == "joint" else "maml",
        "meta.inner_steps": 1 if learner == "model" else 2,
    }
    results = []
    for mesh in (sharding.mesh(), sharding.mesh(jax.devices()[:1])):
        c, frozen, loss, state = set_up(tower, optimizer, len(copies), **fields)
        if learner == "model":
            design, frozen = build.build(c, tower)
            design = design._replace(dropout=0.3)
            loss = partial(model.loss, design=design, weights=WEIGHTS)
            state = loop.start(c, tower, design, optimizer, 1)
        step, _ = step_of(c, loss, optimizer)
        state, frozen = sharding.replicate((state, frozen), mesh)
        if learner == "joint":
            host = training_batches.joint_batch(0, pool, [np.array(own) for own in copies], 3, 0)
        else:
            host = at(pool, 0, copies)
        batch, valid = sharding.spread(host, mesh)
        assert len(valid) == (8 if mesh.size == 8 else 3)
        batch = batch._replace(valid=batch.valid & valid[:, None])
        old = state.params["context"]
        state, parts = step(state, frozen, batch)
        assert old.is_deleted()  # donated
        results.append((jax.device_get(state.params), jax.device_get(parts)))
    close(*results, 2e-5)


def test_a_copy_sees_its_own_images_alone(tower, pool):
    """Tokens of image 0 are NaN: the copy without it must not notice, the copy with it must."""
    bad = {f"level{i}": pool.clean[0](f"level{i}") * np.nan for i in range(pool.levels)}

    def broken(read):
        return lambda name: (
            np.broadcast_to(bad[name], read(name).shape) if name in bad else read(name)
        )

    first = (broken(pool.clean[0]),), (broken(pool.anomalous[0]),)
    pool = pool._replace(clean=first[0] + pool.clean[1:], anomalous=first[1] + pool.anomalous[1:])
    optimizer = optax.sgd(0.1)
    c, frozen, loss, state = set_up(tower, optimizer, 2, learner="maml")
    step, inner = step_of(c, loss, optimizer)
    copies = training_batches.members(4, [np.array([0])], (), target=True)
    state, _ = step(state, frozen, training_episodes.episodes_batch(0, pool, copies, 0, **SIZES))
    rows = training_episodes.adaptation_batch(pool, training_batches.supports(4, [np.array([0])]))
    adapted, _ = training_step.adapt(state.params, frozen, rows, loss=loss, inner=inner)
    for params in (state.params, adapted):
        finite = np.isfinite(params["adapters"][0]["kernel"]).all((1, 2))
        assert finite.tolist() == [False, True]


def test_rows_that_fill_a_shorter_copy_do_not_count(tower, pool):
    c, frozen, loss, state = set_up(tower, optax.sgd(0.1), 2, learner="maml")
    inner = training_step.inner("maml", 2, 0.1, False)
    both = training_episodes.adaptation_batch(pool, [np.arange(4), np.array([1, 3])])
    assert both.valid.sum(0).tolist() == [16, 8]
    padded, _ = training_step.adapt(state.params, frozen, both, loss=loss, inner=inner)
    alone = training_episodes.adaptation_batch(pool, [np.array([1, 3])])
    own = jax.tree.map(lambda x: x[1:], state.params)
    exact, _ = training_step.adapt(own, frozen, alone, loss=loss, inner=inner)
    close(jax.tree.map(lambda x: x[1:], padded), exact, 1e-6)


def test_members_of_other_data_sets_follow_the_supports():
    groups = [np.array([0, 2]), np.array([1])]
    copies = training_batches.members(3, groups, (4, 2), target=True)
    assert [[x.tolist() for x in sets] for sets in copies] == [
        [[0, 1, 2], [3, 4, 5, 6], [7, 8]],
        [[1], [3, 4, 5, 6], [7, 8]],
        [[0, 2], [3, 4, 5, 6], [7, 8]],
    ]
    assert [len(sets) for sets in training_batches.members(3, groups, (4, 2), target=False)] == [
        2,
        2,
        2,
    ]


def test_steps_derive_from_an_equal_number_of_gradients():
    joint = settings(epochs=96)
    assert (joint.steps, config.gradients(joint)) == (96, 1)
    for learner in ("maml", "fomaml", "anil"):
        for inner_steps in (1, 2, 5):
            c = settings(epochs=96, learner=learner, **{"meta.inner_steps": inner_steps})
            assert c.steps * config.gradients(c) == 96
    assert settings(learner="maml", steps=7).steps == 7
    assert settings(learner="maml", method="mediclip").learner == "joint"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learner": "reptile"}, "config.learner is 'reptile': give one of joint, maml"),
        ({"meta.tasks": 0}, "config.meta.tasks is 0: give 1 or more"),
        ({"meta.shots": 1}, "config.meta.shots is 1: give 2 or more"),
        ({"meta.inner_rate": 0.0}, "config.meta.inner_rate is 0.0: give more than 0"),
    ],
)
def test_settings_that_cannot_be_used(fields, message):
    with pytest.raises(ConfigError, match=message):
        settings(**fields)


def fitted(c, workdir, tower, pool):
    design, frozen = build.build(c, tower)
    groups, mesh = [np.array([0, 1]), np.array([2, 3])], sharding.mesh()
    return loop.run(c, workdir, tower, design, frozen, [pool], groups, mesh, True)


@pytest.mark.parametrize("learner", ["joint", "maml"])
def test_sigterm_saves_and_resuming_equals_the_whole_run(
    tower, pool, learner, tmp_path, monkeypatch
):
    fields = {"learner": learner, "model.dropout": 0.2, "meta.learn_rate": learner == "maml"}
    c = settings(steps=7, log_every=2, validations=0, **fields)
    monkeypatch.setattr(model, "init", lambda key, model, **_: toy_init(key, model.widths[0]))
    monkeypatch.setattr(model, "loss", lambda *given, design, weights, text=None: toy_loss(*given))
    monkeypatch.setattr(model, "text_features", lambda params, frozen, design: params["context"])
    whole = fitted(c, tmp_path / "whole", tower, pool)
    report = loop.report

    def asked(log, step, parts):
        report(log, step, parts)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "report", asked)
    with pytest.raises(runtime.Preempted, match=r"^stopped by SIGTERM at step 3 of 7$"):
        fitted(c, tmp_path / "cut", tower, pool)
    assert signal.getsignal(signal.SIGTERM) is before
    kept = [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert kept == ["3"]
    monkeypatch.setattr(loop, "report", report)
    resumed = fitted(c, tmp_path / "cut", tower, pool)
    for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(x, y)
    a, b = ((tmp_path / w / "metrics.jsonl").read_text().splitlines() for w in ("cut", "whole"))
    assert [x.split('"seconds"')[0] for x in a] == [x.split('"seconds"')[0] for x in b]
