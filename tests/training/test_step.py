"""The step of every learner on a pool in memory, where anomalous patches carry a planted shift.

Most tests use a small loss of the same form as model.loss, which compiles in no time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medclip_jax import build
from medclip_jax.distributed import sharding
from medclip_jax.features import training_pool
from medclip_jax.models import model
from medclip_jax.training import episodes, maml, step
from medclip_jax.training.step import start
from tests.support.pools import settings
from tests.support.toy import toy_loss, toy_params

WEIGHTS = dict(focal=1.0, dice=1.0, align=0.1, prompt=0.0)
SIZES = episodes.Sizes(tasks=3, k=4, shots=4)
ALL = np.arange(4)


def begin(clip, optimizer, count=1, learner="joint"):
    params = toy_params(clip.widths[0])
    params = maml.meta_sgd(params, 0.05) if learner == "meta_sgd" else params
    return start(params, optimizer, count, seed=0)


def step_of(learner, optimizer, loss=toy_loss, inner_steps=1):
    inner = step.Learner(learner).inner(inner_steps)
    return step.make_step(
        loss if learner == "joint" else step.meta_objective(loss, inner), optimizer
    )


def tasks_of(pool, number, members=(ALL,)):
    return episodes.episodes_batch(number, pool, [[own] for own in members], SIZES, 0)


def adapted_to(pool, state, members=(ALL,), learner="maml", steps=1):
    inner = step.Learner(learner, inner_rate=0.1).inner(steps)
    run = jax.jit(partial(step.adapt, loss=toy_loss, inner=inner))
    batches = enumerate(episodes.adaptation_batches(pool, members))
    each = [run(state.params, index, {}, rows) for index, rows in batches]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(np.abs(y).max()))


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


@pytest.mark.parametrize("learner", ["joint", "maml", "meta_sgd", "fomaml", "anil"])
def test_every_learner_learns_and_adapting_helps(clip, pool, learner):
    optimizer = optax.adam(3e-2)
    state, take_step = begin(clip, optimizer, learner=learner), step_of(learner, optimizer)
    rows = jax.tree.map(jnp.asarray, next(episodes.adaptation_batches(pool, [ALL])))
    value = jax.jit(lambda params: toy_loss(first(params), {}, rows, None)[0])

    def plain(params):
        return params.params if learner == "meta_sgd" else params

    before, old = float(value(plain(state.params))), jax.tree.map(np.array, state.params)
    for i in range(15):
        joint = learner == "joint"
        batch = training_pool.joint_batch(i, pool, [ALL], 4, 0) if joint else tasks_of(pool, i)
        state, parts = take_step(state, {}, batch)
    assert int(state.step) == 15 and np.isfinite(float(parts["loss"]))
    assert value(plain(state.params)) < 0.9 * before
    if learner == "joint":
        return
    adapted = adapted_to(pool, state, learner=learner)
    assert value(adapted) < value(plain(state.params))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), adapted, plain(state.params))
    assert moved["context"] == (learner != "anil")
    assert moved["scale"] and all(p["kernel"] and p["bias"] for p in moved["adapters"])
    assert not np.array_equal(plain(state.params)["context"], plain(old)["context"])
    if learner == "meta_sgd":
        rates = jax.tree.map(lambda a, b: bool((a != b).any()), state.params.rate, old.rate)
        assert all(jax.tree.leaves(rates))


def test_no_inner_step_is_joint_training_on_the_query(clip, pool):
    optimizer = optax.sgd(0.1)
    state, tasks = begin(clip, optimizer), tasks_of(pool, 0)

    def loss(params, frozen, batch, _):  # dropout off: the two take it from different keys
        return toy_loss(params, frozen, batch, None)

    one_task = jax.tree.map(lambda x: x[:1], tasks)
    query = jax.tree.map(lambda x: x[0].swapaxes(0, 1), tasks.query)  # [row, 1 + folds]
    (one, parts), (other, same) = (
        take_step(jax.tree.map(jnp.copy, state), {}, batch)
        for take_step, batch in (
            (step_of("maml", optimizer, loss, 0), one_task),
            (step_of("joint", optimizer, loss), query),
        )
    )
    close(parts, same, 1e-6)
    close(one.params, other.params, 1e-6)


def test_orders_and_heads_give_different_gradients(clip, pool):
    """One SGD step from the same state is the outer gradient; fomaml, anil and maml all differ."""
    optimizer, after = optax.sgd(0.1), {}
    for learner in ("maml", "fomaml", "anil"):
        state, _ = step_of(learner, optimizer)(begin(clip, optimizer), {}, tasks_of(pool, 0))
        after[learner] = np.asarray(state.params["adapters"][0]["kernel"])
    size = np.abs(after["maml"]).max()
    for a, b in (("maml", "fomaml"), ("maml", "anil"), ("fomaml", "anil")):
        assert np.abs(after[a] - after[b]).max() > 1e-5 * size


@pytest.mark.parametrize("learner", ["joint", "maml"])
def test_four_devices_equal_one_with_dropout_and_uneven_tasks(clip, pool, learner):
    """Joint learning of the small loss; exact MAML of the model itself, one params alone."""
    optimizer, members = optax.sgd(0.1), [ALL, np.array([0, 2])][: 1 if learner == "maml" else 2]
    frozen, loss, params, results = {}, toy_loss, toy_params(clip.widths[0]), []
    if learner == "maml":
        design, frozen = build.model_parts(settings(learner="maml"), clip)
        design = design._replace(dropout=0.3)
        loss = partial(model.loss, design=design, weights=WEIGHTS)
        params = model.init(jax.random.key(0), clip, design, 2, False)
    take_step = step_of(learner, optimizer, loss)
    joint = training_pool.joint_batch(0, pool, members, 3, 0)
    for mesh in (sharding.mesh(), sharding.mesh(jax.devices()[:1])):
        state = start(params, optimizer, len(members), 0)
        state, placed = sharding.replicate((state, frozen), mesh)
        host = joint if learner == "joint" else tasks_of(pool, 0, members)
        batch, valid = sharding.spread(host, mesh)
        assert len(valid) == (4 if mesh.size == 4 else 3)
        batch = batch._replace(valid=batch.valid & valid[:, None])
        old = state.params["context"]
        state, parts = take_step(state, placed, batch)
        assert old.is_deleted()  # donated
        results.append((jax.device_get(state.params), jax.device_get(parts)))
    close(*results, 2e-5)


def test_fold_params_see_their_own_images_alone(clip, pool):
    """Tokens of image 0 are NaN: params without it must not notice, the main params must."""

    def broken(read):
        return lambda name: read(name) * (np.nan if name.startswith("level") else 1)

    pool = pool._replace(
        clean=(broken(pool.clean[0]), *pool.clean[1:]),
        anomalous=(broken(pool.anomalous[0]), *pool.anomalous[1:]),
    )
    optimizer, own = optax.sgd(0.1), training_pool.supports(4, [np.array([0])])
    take_step = step_of("maml", optimizer)
    state, _ = take_step(begin(clip, optimizer, 2), {}, tasks_of(pool, 0, own))
    for params in (state.params, adapted_to(pool, state, own)):
        finite = np.isfinite(params["adapters"][0]["kernel"]).all((1, 2))
        assert finite.tolist() == [False, True]


def test_rows_that_fill_a_shorter_one_do_not_count(clip, pool):
    state, few = begin(clip, optax.sgd(0.1), 2), np.array([1, 3])
    batches = episodes.adaptation_batches(pool, [ALL, few])
    assert [b.valid.sum() for b in batches] == [16, 8]
    padded = adapted_to(pool, state, [ALL, few], steps=2)
    own = state._replace(params=jax.tree.map(lambda x: x[1:], state.params))
    exact = adapted_to(pool, own, [few], steps=2)
    close(jax.tree.map(lambda x: x[1:], padded), exact, 1e-6)


def test_one_step_is_plain_gradient_descent_of_each_params():
    """Mean squared distance to the row, stacked for two params; the parts are of the main ones."""

    def loss(params, frozen, batch, key):
        error = jnp.mean((params["w"][None] - batch["x"]) ** 2)
        return error, {"loss": error, "random": jax.random.uniform(key)}

    optimizer = optax.sgd(0.1)
    state, take_step = start({"w": jnp.zeros(3)}, optimizer, 2, 0), step.make_step(loss, optimizer)
    batch = {"x": np.array([[1.0, 10.0], [3.0, 30.0]], np.float32)[..., None].repeat(3, 2)}
    random = []
    for i in range(3):
        state, parts = take_step(state, {}, batch)
        random.append(float(parts["random"]))
        if i == 0:  # d/dw mean((w - x)^2) over 3 entries at w = 0 is -2 mean(x) / 3
            np.testing.assert_allclose(state.params["w"][:, 0], [0.4 / 3, 4 / 3], rtol=1e-6)
            assert float(parts["loss"]) == pytest.approx((1 + 9) / 2)
    assert int(state.step) == 3 and len(set(random)) == 3
