"""maml against PyTorch's values. One compilation serves all files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medclip_jax.training.maml import Inner, adapt, meta_loss
from tests.support.models import mlp
from tests.support.reference import reference_params

NAMES = {"mlp": ("W1", "b1", "W2", "b2"), "logistic": ("w", "b")}


def logistic(params, batch):
    x, y = batch
    z = x @ params["w"] + params["b"]
    loss = jnp.mean(jax.nn.softplus(z) - y * z)
    return loss, {"ce": loss}


LOSSES = {"mlp": mlp, "logistic": logistic}


def close(actual, wanted, rel):
    """max|a - b| <= rel * max|b|, the README's measure."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max() <= rel * np.abs(wanted).max()


@functools.cache
def arrays(path):
    with np.load(path) as file:
        return dict(file)


def reference(path, model):
    """params, (support, query), the inner rate and all arrays of one file."""
    data = arrays(path)
    params = {n: jnp.asarray(data[f"{model}_{n}"]) for n in NAMES[model]}
    batch = {
        k: tuple(jnp.asarray(data[f"{model}_{k}_{v}"]) for v in "xy") for k in ("support", "query")
    }
    return params, (batch["support"], batch["query"]), float(data[f"{model}_inner_lr"]), data


each_file = pytest.mark.parametrize("path", reference_params("maml_*.npz"))
each_model = pytest.mark.parametrize("model", LOSSES)


@functools.cache
def everything(model, steps):
    """All that the reference holds for one model and number of steps, in one jitted function."""
    loss = LOSSES[model]

    def task(params, support, query, rate):
        adapted, losses = adapt(params, support, loss=loss, inner=Inner(rate, steps))
        losses = jnp.append(losses, loss(adapted, support)[0])
        return {"adapted": adapted, "support_loss": losses, "query_loss": loss(adapted, query)[0]}

    def run(params, episodes, rate):
        outer = jax.value_and_grad(meta_loss, has_aux=True)
        inner = Inner(rate, steps)
        (value, parts), exact = outer(params, episodes, loss=loss, inner=inner)
        _, first = outer(params, episodes, loss=loss, inner=inner._replace(first_order=True))
        tasks = jax.vmap(task, in_axes=(None, 0, 0, None))(params, *episodes, rate)
        return tasks | {"meta_loss": value, "metagrad": exact, "fomaml": first}, parts

    return jax.jit(run)


@functools.cache
def outer_step(model, first_order):
    optimizer = optax.adam(1e-2)

    def step(params, opt, episodes, rate):
        inner = Inner(rate, 3, first_order)
        value, grads = jax.value_and_grad(
            lambda p: meta_loss(p, episodes, loss=LOSSES[model], inner=inner)[0]
        )(params)
        updates, opt = optimizer.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    return optimizer, jax.jit(step)


@each_file
@each_model
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_reference(path, model, steps):
    params, episodes, rate, data = reference(path, model)
    got, parts = everything(model, steps)(params, episodes, rate)
    at = f"{model}_K{steps}_"
    for name in ("support_loss", "query_loss", "meta_loss"):
        close(got[name], data[at + name], 1e-6)
    assert list(parts.values()) == [got["meta_loss"]]
    for kind, rel in (("adapted", 1e-6), ("metagrad", 1e-5), ("fomaml", 1e-5)):
        for name in params:
            close(got[kind][name], data[f"{at}{kind}_{name}"], rel)


@each_file
@each_model
@pytest.mark.parametrize("first_order, name", [(False, "maml"), (True, "fomaml")])
def test_reference_trajectory(path, model, first_order, name):
    params, episodes, rate, data = reference(path, model)
    optimizer, step = outer_step(model, first_order)
    opt, losses = optimizer.init(params), []
    for _ in range(20):
        params, opt, value = step(params, opt, episodes, rate)
        losses.append(value)
    losses.append(everything(model, 3)(params, episodes, rate)[0]["meta_loss"])
    np.testing.assert_allclose(losses, data[f"{model}_traj_{name}_losses"], rtol=0, atol=2e-5)
    for key, value in params.items():
        wanted = data[f"{model}_traj_{name}_final_{key}"]
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5)
