"""Exact meta-learning of the model's own loss: text encoder and all, against steps written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax import build, config
from medclip_jax.clip.layers import Features
from medclip_jax.features.training_pool import Batch
from medclip_jax.models import model
from medclip_jax.training import step
from medclip_jax.training.episodes import Episodes

WEIGHTS = dict(focal=1.0, dice=1.0, align=0.1, prompt=0.5)
TASKS, ROWS, RATE = 2, 2, 0.3


@pytest.fixture(scope="module")
def given(tiny):
    """(loss, params, frozen, episodes) of two tasks of two rows each, without dropout."""
    c = config.base("k=4,seed=0", name="folder", anatomy="breast", conditions=("mass",))
    c.update_from_flattened_dict({"learner": "maml", "prompts.context": 2, "model.dropout": 0.0})
    design, frozen = build.model_parts(config.resolve(c), tiny)
    key, rng = jax.random.key(0), np.random.default_rng(0)
    params = model.init(key, model=tiny, design=design, context=2, shared=False)

    def side():
        def normal(*shape):
            return jnp.asarray(rng.standard_normal((TASKS, ROWS, *shape)), jnp.float32)

        levels = tuple(normal(tiny.grid**2, width) for width in tiny.widths)
        mask = np.zeros((TASKS, ROWS, tiny.size, tiny.size), np.float32)
        mask[:, 1, : tiny.size // 2] = 1
        label = np.broadcast_to(np.arange(ROWS), (TASKS, ROWS)).astype(np.int32)
        rows = Batch(Features(normal(tiny.joint), levels), mask, label, np.ones_like(label, bool))
        return jax.tree.map(jnp.asarray, rows)

    episodes = Episodes(side(), side(), jnp.ones(TASKS, bool))
    return partial(model.loss, design=design, weights=WEIGHTS), params, frozen, episodes


def by_hand(loss, frozen, learner):
    """Equation (11) of one task: two gradient steps, then the query's loss; and its gradient."""

    def moved(params, rows):
        grads = jax.grad(lambda t: loss(t, frozen, rows, None)[0])(params)
        if learner == "fomaml":
            grads = jax.lax.stop_gradient(grads)
        if learner == "anil":
            grads["context"] = jnp.zeros_like(grads["context"])
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    def outer(params, support, query):
        return loss(moved(moved(params, support), support), frozen, query, None)[0]

    return jax.jit(jax.value_and_grad(outer))


@pytest.mark.parametrize(
    "learner", ["maml", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fomaml", "anil"))]
)
def test_the_gradient_of_the_models_loss_is_that_of_the_steps_written_out(given, learner):
    loss, params, frozen, episodes = given
    objective = step.meta_objective(loss, step.Learner(learner, inner_rate=RATE).inner(2))

    def ours(params):
        return objective(params, frozen, episodes, jax.random.key(0))[0]

    value, grad = jax.jit(jax.value_and_grad(ours))(params)
    task = by_hand(loss, frozen, learner)
    rows = [jax.tree.map(lambda x, i=i: x[i], episodes[:2]) for i in range(TASKS)]
    each = [task(params, *sides) for sides in rows]
    wanted_value, wanted = jax.tree.map(lambda *x: sum(x) / TASKS, *each)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    assert float(jnp.abs(wanted["context"]).max()) > 1e-6
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * max(float(jnp.abs(b).max()), 1e-4))
