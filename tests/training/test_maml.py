"""maml: closed form, torchmeta, learn2learn's properties, devices, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from medclip_jax.training.maml import (
    Inner,
    adapt,
    meta_loss,
    meta_sgd,
    reptile_loss,
    step_rates,
    step_weights,
)
from tests.support.models import mlp


def quadratic(params, centre):
    loss = 0.5 * jnp.sum((params - centre) ** 2)
    return loss, {"distance": loss}


def linear(params, x):
    """torchmeta's model: y = w.x, loss y^2 / 2."""
    y = params @ x
    return y**2 / 2, {"output": y}


def gradient(params, episodes, **kwargs):
    return jax.jit(jax.grad(lambda t: meta_loss(t, episodes, **kwargs)[0]))(params)


# Closed forms


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_quadratic(steps):
    rate = 0.3
    params, support, query = (jax.random.normal(jax.random.key(i), (4,)) for i in range(3))
    adapted, losses = adapted_once(params, support, Inner(rate, steps), quadratic)
    np.testing.assert_allclose(
        adapted, support + (1 - rate) ** steps * (params - support), rtol=1e-5
    )
    start = 0.5 * jnp.sum((params - support) ** 2)
    np.testing.assert_allclose(losses, start * (1 - rate) ** (2.0 * np.arange(steps)), rtol=1e-5)
    for first_order, factor in ((False, (1 - rate) ** steps), (True, 1.0)):
        grad = gradient(
            params,
            (support[None], query[None]),
            loss=quadratic,
            inner=Inner(rate, steps, first_order),
        )
        np.testing.assert_allclose(grad, factor * (adapted - query), rtol=2e-5, atol=1e-6)


def test_meta_sgd_quadratic():
    """params' = c + (1-r)^K d, so d loss / d r is -K (1-r)^(K-1) d . (params' - q), per tensor."""
    steps = 3
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
    support = {"a": jnp.array([0.2, 0.3]), "b": jnp.array([-1.0])}
    query = {"a": jnp.array([0.1, 0.9]), "b": jnp.array([2.0])}
    rates = {"a": 0.1, "b": 0.4}

    def loss(params, batch):
        value = sum(quadratic(params[k], batch[k])[0] for k in params)
        return value, {}

    state = meta_sgd(params, 0.1)
    state = state._replace(rate=state.rate | {"b": jnp.array(0.4)})
    episodes = jax.tree.map(lambda x: x[None], (support, query))
    for first_order in (False, True):
        grad = gradient(
            state, episodes, loss=loss, inner=Inner(steps=steps, first_order=first_order)
        )
        for k, r in rates.items():
            d = params[k] - support[k]
            away = support[k] + (1 - r) ** steps * d - query[k]
            chain = 1.0 if first_order else (1 - r) ** steps
            np.testing.assert_allclose(grad.params[k], chain * away, rtol=1e-5)
            # First order: each step adds -g_k = -(1-r)^k d, and nothing flows through g_k.
            each = [(1 - r) ** (k if first_order else steps - 1) for k in range(steps)]
            np.testing.assert_allclose(grad.rate[k], -sum(each) * d @ away, rtol=1e-5)
    fixed = gradient(params, episodes, loss=loss, inner=Inner(rates, steps))
    learned = gradient(state, episodes, loss=loss, inner=Inner(steps=steps))
    jax.tree.map(np.testing.assert_array_equal, fixed, learned.params)


def three_tasks():
    draw = np.random.default_rng(3).standard_normal
    return np.float32([1.0, -2.0, 0.5]), *(draw((3, 3)).astype(np.float32) for _ in range(2))


def test_step_rates_quadratic():
    """A rate for each step: params - c shrinks by each 1 - r_t, and every r_t has its slope."""
    params, support, query = three_tasks()
    rates = np.float32([0.1, 0.3, 0.6])
    state = step_rates(params, 0.2, 3)
    assert state.rate.tolist() == pytest.approx([0.2] * 3)
    state = state._replace(rate=rates)
    left = 1 - rates
    adapted, losses = adapt(state, support[0], loss=quadratic, inner=Inner(steps=3))
    away = params - support[0]
    np.testing.assert_allclose(adapted, support[0] + left.prod() * away, rtol=1e-5)
    shrunk = np.cumprod([1, 0.9, 0.7])
    np.testing.assert_allclose(losses, 0.5 * shrunk**2 * (away @ away), rtol=1e-5)
    grad = gradient(state, (support, query), loss=quadratic, inner=Inner(steps=3))
    off = support + left.prod() * (params - support) - query
    np.testing.assert_allclose(grad.params, left.prod() * off.mean(0), rtol=1e-5)
    slope = ((params - support) * off).sum(1).mean()
    np.testing.assert_allclose(grad.rate, -left.prod() / left * slope, rtol=1e-5)


def test_step_weights():
    """Equal at first; at the end the last step has nearly all. Antoniou et al. 2019, section 4."""
    np.testing.assert_allclose(step_weights(4, 0.0), 0.25)
    np.testing.assert_allclose(step_weights(4, 0.5), [0.125] * 3 + [0.625])
    np.testing.assert_allclose(step_weights(4, 1.0), [0.0075] * 3 + [0.9775], rtol=1e-6)
    np.testing.assert_allclose(step_weights(1, 0.3), 1.0)


def test_multi_step_loss_quadratic():
    """The weighted sum of the query losses after 1, 2, ... steps; its last weight alone is MAML."""
    params, support, query = three_tasks()
    weights, left = jnp.array([0.2, 0.3, 0.5]), 0.7 ** np.arange(1, 4)
    offs = [support + share * (params - support) - query for share in left]
    kwargs = {"loss": quadratic, "inner": Inner(0.3, 3)}
    value, parts = meta_loss(params, (support, query), weights=weights, **kwargs)
    each = [0.5 * (off**2).sum(1).mean() for off in offs]
    assert value == pytest.approx(float(weights @ jnp.array(each)), rel=1e-5)
    assert parts["distance"] == pytest.approx(float(each[-1]), rel=1e-5)
    grad = gradient(params, (support, query), weights=weights, **kwargs)
    wanted = sum(float(w) * s * off.mean(0) for w, s, off in zip(weights, left, offs, strict=True))
    np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-6)
    last = gradient(params, (support, query), weights=jnp.array([0, 0, 1.0]), **kwargs)
    plain = gradient(params, (support, query), **kwargs)
    np.testing.assert_allclose(last, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_reptile_quadratic(steps):
    """Gradient params - mean of the adapted, (1 - (1-r)^n) (params - mean centre); MAML's value."""
    params, support, query = three_tasks()
    valid = jnp.array([True, True, False])
    kwargs = {"loss": quadratic, "inner": Inner(0.3, steps)}
    for tasks in (None, valid):
        real = slice(3) if tasks is None else slice(2)
        run = jax.value_and_grad(functools.partial(reptile_loss, **kwargs), has_aux=True)
        (value, parts), grad = run(params, (support, query), valid=tasks)
        wanted = (1 - 0.7**steps) * (params - support[real].mean(0))
        np.testing.assert_allclose(grad, wanted, rtol=1e-5)
        exact, _ = meta_loss(params, (support, query), valid=tasks, **kwargs)
        assert value == pytest.approx(float(exact)) == pytest.approx(float(parts["distance"]))


def test_implicit_quadratic():
    """argmin L + p/2 |x - params|^2 is (c + p params) / (1 + p): slope p / (1 + p)."""
    params, support, query = three_tasks()
    inner = Inner(0.3, 60, proximal=0.5)
    adapted, losses = adapt(params, support[0], loss=quadratic, inner=inner)
    np.testing.assert_allclose(adapted, (support[0] + 0.5 * params) / 1.5, rtol=1e-4)
    assert losses[0] == pytest.approx(0.5 * float(((params - support[0]) ** 2).sum()))
    grad = gradient(params, (support, query), loss=quadratic, inner=inner)
    wanted = (((support + 0.5 * params) / 1.5 - query) / 3).mean(0)
    np.testing.assert_allclose(grad, wanted, rtol=1e-4)


def test_implicit_agrees_with_exact_maml_of_the_same_long_inner_loop():
    """Of the model's curved loss with what does not adapt: through the steps, or by the minimum."""
    params, (support, query) = problem(tasks=2)
    head = {"head": params["head"], "body": params["body"]}

    def near(moved, batch):  # exact MAML of the loss with the proximal term written out
        start, rows = batch
        away = jax.tree.map(lambda p, q: jnp.sum((p - q) ** 2), moved["head"], start["head"])
        return nested(moved, rows)[0] + 0.5 * sum(jax.tree.leaves(away)), {}

    def exact(start, support, query):
        def step(moved, _):
            grads = jax.grad(lambda h: near({**start, "head": h}, (start, support))[0])(moved)
            return jax.tree.map(lambda p, g: p - 0.03 * g, moved, grads), None

        moved, _ = jax.lax.scan(step, start["head"], length=300)
        return nested({**start, "head": moved}, query)[0]

    wanted = jax.jit(
        jax.grad(lambda t: jax.vmap(lambda s, q: exact(t, s, q))(support, query).mean())
    )(head)
    inner = Inner(0.03, 300, adapts=lambda path: path.startswith("head/"), proximal=1.0)
    grad = gradient(head, (support, query), loss=nested, inner=inner._replace(solver_steps=30))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), grad, wanted)


def test_torchmeta():
    w = jnp.array([2.0, 3.0, 5.0])
    a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0])
    adapted, losses = adapt(w, a, loss=linear, inner=Inner(0.5))
    assert adapted.tolist() == [-9.5, -20, -29.5] and losses.tolist() == [264.5]
    value, parts = meta_loss(w, (a[None], b[None]), loss=linear, inner=Inner(0.5))
    assert value == 49612.5 and parts["output"] == -315
    grad = gradient(w, (a[None], b[None]), loss=linear, inner=Inner(0.5))
    assert grad.tolist() == [3780, 8505, 13230]

    first = Inner(0.5, first_order=True)
    adapted, losses = adapt(w, b, loss=linear, inner=first)
    assert adapted.tolist() == [-104, -129.5, -154] and losses.tolist() == [1404.5]
    assert meta_loss(w, (b[None], a[None]), loss=linear, inner=first)[0] == 340312.5
    grad = gradient(w, (b[None], a[None]), loss=linear, inner=first)
    assert grad.tolist() == [-825, -1650, -2475]


def test_torchmeta_three_steps():
    w = jnp.array([2.0, 3.0, 5.0])
    a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0])
    wanted = [[-21, -43, -64], [278, 555, 833], [-3609, -7219, -10828]]
    for steps, values in enumerate(wanted, 1):
        adapted, losses = adapt(w, a, loss=linear, inner=Inner(1.0, steps))
        assert adapted.tolist() == values
    assert losses.tolist() == [264.5, 44700.5, 7554384.5]

    def output(w):
        return adapt(w, a, loss=linear, inner=Inner(1.0, 3))[0] @ b

    value, grad = jax.value_and_grad(output)(w)
    assert value == -115499 and grad.tolist() == [-5020, -10043, -15066]


# Properties (after learn2learn's tests) and switches


def problem(tasks=4, width=8):
    draw = np.random.default_rng(7).standard_normal
    params = {
        "body": {"W1": draw((2, width)), "b1": draw(width)},
        "head": {"W2": draw((width, 1)), "b2": draw(1)},
    }
    support, query = ((draw((tasks, n, 2)), draw((tasks, n, 1))) for n in (5, 7))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, (support, query)))


def nested(params, batch):
    return mlp(params["body"] | params["head"], batch)


def adapted_once(params, support, inner, loss=nested):
    return jax.jit(functools.partial(adapt, loss=loss, inner=inner))(params, support)


def first_task(batch):
    return jax.tree.map(lambda x: x[0], batch)


def test_no_steps_is_a_clone_and_joint_training():
    params, episodes = problem()
    joint = Inner(0.1, steps=0)
    clone, losses = adapted_once(params, first_task(episodes[0]), joint)
    jax.tree.map(np.testing.assert_array_equal, clone, params)
    assert losses.shape == (0,)
    plain = jax.jit(jax.grad(lambda t: jax.vmap(lambda q: nested(t, q)[0])(episodes[1]).mean()))(
        params
    )
    grad = gradient(params, episodes, loss=nested, inner=joint)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grad, plain)


def test_first_order_is_the_plain_gradient_at_the_adapted_point():
    params, episodes = problem(tasks=1)
    inner = Inner(0.1, 3, True)
    adapted, _ = adapted_once(params, first_task(episodes[0]), inner)
    plain = jax.jit(jax.grad(lambda t: nested(t, first_task(episodes[1]))[0]))(adapted)
    grad = gradient(params, episodes, loss=nested, inner=inner)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grad, plain)


def test_a_small_step_does_not_raise_the_support_loss():
    params, (support, _) = problem()
    run = functools.partial(adapt, loss=nested, inner=Inner(0.01, 5))
    _, losses = jax.jit(jax.vmap(run, in_axes=(None, 0)))(params, support)
    assert (jnp.diff(losses, axis=1) < 0).all()


@pytest.mark.parametrize("first_order", [False, True])
def test_every_parameter_gets_outer_gradient_and_unused_ones_are_allowed(first_order):
    params, episodes = problem()
    params["head"]["unused"] = jnp.ones(3)
    grad = gradient(params, episodes, loss=nested, inner=Inner(0.1, 2, first_order))
    assert (grad["head"].pop("unused") == 0).all()
    assert all((g != 0).all() for g in jax.tree.leaves(grad))


@pytest.mark.parametrize("first_order", [False, True])
def test_anil(first_order):
    """Only the head moves; the gradient is that of the same steps written out by hand."""
    params, episodes = problem()
    inner = Inner(0.1, 2, first_order, lambda path: path.startswith("head/"))
    adapted, _ = adapted_once(params, first_task(episodes[0]), inner)
    jax.tree.map(np.testing.assert_array_equal, adapted["body"], params["body"])
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).all(), adapted["head"], params["head"]))
    )

    def by_hand(params, support, query):
        head = params["head"]
        for _ in range(2):
            grads = jax.grad(lambda h: nested({"body": params["body"], "head": h}, support)[0])(
                head
            )
            grads = jax.lax.stop_gradient(grads) if first_order else grads
            head = jax.tree.map(lambda p, g: p - 0.1 * g, head, grads)
        return nested({"body": params["body"], "head": head}, query)[0]

    wanted = jax.jit(jax.grad(lambda t: jax.vmap(lambda s, q: by_hand(t, s, q))(*episodes).mean()))(
        params
    )
    grad = gradient(params, episodes, loss=nested, inner=inner)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grad, wanted)


def test_padded_tasks_weigh_nothing():
    params, episodes = problem(tasks=4)
    valid = np.array([True, True, True, False])
    inner = Inner(0.1, 2)
    three = jax.tree.map(lambda x: x[:3], episodes)

    @jax.jit
    def run(episodes, valid):
        outer = jax.value_and_grad(meta_loss, has_aux=True)
        return outer(params, episodes, loss=nested, inner=inner, valid=valid)

    wanted, got = run(three, None), run(episodes, valid)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)
    (none, _), _ = run(episodes, np.zeros(4, bool))
    assert np.isnan(none)


# Devices and memory


@pytest.mark.parametrize("devices, first_order", [(2, False), (4, False), (4, True)])
def test_sharded_equals_unsharded(devices, first_order):
    params, episodes = problem(tasks=8)
    inner = Inner(0.1, 3, first_order)
    mesh = jax.make_mesh((devices,), ("e",), (AxisType.Auto,), devices=jax.devices()[:devices])
    rows, copies = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("e",), ()))
    run = jax.value_and_grad(functools.partial(meta_loss, loss=nested, inner=inner), has_aux=True)
    alone = jax.jit(run)(params, episodes)
    sharded = jax.jit(run, in_shardings=(copies, rows), out_shardings=copies)(
        jax.device_put(params, copies), jax.device_put(episodes, rows)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), sharded, alone
    )
    assert all(len(g.sharding.device_set) == devices for g in jax.tree.leaves(sharded))


def peak_memory(inner):
    """Bytes of temporaries of one meta-gradient whose activations dwarf its parameters."""
    layers, width, rows = 8, 32, 256
    params = jnp.zeros((layers, width, width))

    def loss(params, x):
        out, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)
        return jnp.mean(out**2), {}

    batch = jnp.ones((2, rows, width))
    run = jax.jit(jax.grad(lambda t, e: meta_loss(t, e, loss=loss, inner=inner)[0]))
    return run.lower(params, (batch, batch)).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_slowly_with_steps():
    one, five = (peak_memory(Inner(0.1, steps)) for steps in (1, 5))
    assert five < 2.5 * one


@pytest.mark.parametrize("steps, proximal", [(1, 0.0), (2, 0.0), (4, 0.0), (3, 1.0)])
def test_a_loss_may_close_over_what_is_traced(steps, proximal):
    """As the step does: frozen parameters are arguments of jit, and params a row of lax.map."""
    rng = np.random.default_rng(steps)
    frozen, start, target = (jnp.asarray(rng.normal(size=s)) for s in ((3, 3), (2, 3), (4, 3)))

    def outer(params, frozen):
        def loss(p, y):
            value = jnp.sum((jnp.tanh(jnp.tanh(frozen @ p)) - y) ** 2)
            return value, {"loss": value}

        inner = Inner(0.1, steps, proximal=proximal)
        return meta_loss(params, (target, target[::-1]), loss=loss, inner=inner)[0]

    @jax.jit
    def gradients(start, frozen):
        return jax.lax.map(lambda p: jax.grad(outer)(p, frozen), start)

    def plain(params):
        def one(support, query):
            def value(p, y):
                return jnp.sum((jnp.tanh(jnp.tanh(frozen @ p)) - y) ** 2)

            p = params
            for _ in range(steps):
                p = p - 0.1 * jax.grad(value)(p, support)
            return value(p, query)

        return jnp.mean(jax.vmap(one)(target, target[::-1]))

    reference = (lambda p: outer(p, frozen)) if proximal else plain
    want = jnp.stack([jax.grad(reference)(p) for p in start])
    np.testing.assert_allclose(gradients(start, frozen), want, rtol=1e-4, atol=1e-5)
