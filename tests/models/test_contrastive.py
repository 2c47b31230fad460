"""NT-Xent against optax, the reference and a published value; the head and its rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medclip_jax import build
from medclip_jax.distributed import sharding
from medclip_jax.errors import ConfigError
from medclip_jax.features import training_pool
from medclip_jax.models import losses, model
from medclip_jax.training import loop
from tests.support.pools import settings
from tests.support.reference import reference_params

FILES = reference_params("losses_*.npz")


def whole(one, two, tau):
    n = len(one)
    return losses.ntxent(one, two, jnp.arange(n), jnp.ones(n, bool), tau)


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_ntxent_equals_the_reference_and_optax(path, tau):
    ref = np.load(path)
    both = jnp.asarray(ref["ntxent_z1"]), jnp.asarray(ref["ntxent_z2"])
    value, grads = jax.value_and_grad(lambda a, b: whole(a, b, tau), argnums=(0, 1))(*both)
    np.testing.assert_allclose(value, ref[f"ntxent_tau{tau}_loss"], rtol=2e-6)
    for got, name in zip(grads, ("z1", "z2"), strict=True):
        want = ref[f"ntxent_tau{tau}_grad_{name}"]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    labels = jnp.tile(jnp.arange(len(both[0])), 2)
    np.testing.assert_allclose(
        value, optax.losses.ntxent(jnp.concatenate(both), labels, tau), rtol=2e-6
    )


@pytest.mark.parametrize(
    ("one", "two", "value"),
    [  # MONAI's ContrastiveLoss, temperature 0.5: tests/losses/test_contrastive_loss.py
        ([[1, 1, 0, 0], [1, 1, 0, 0]], [[1, 1, 0, 0], [1, 1, 0, 0]], 1.0986),
        ([[1, 2, 3, 4], [1, 1, 0, 0]], [[0, 0, 0, 0], [1, 1, 0, 0]], 0.8719),
    ],
)
def test_ntxent_equals_monai(one, two, value):
    got = whole(jnp.asarray(one, jnp.float32), jnp.asarray(two, jnp.float32), 0.5)
    assert abs(float(got) - value) < 1e-4


def test_rows_that_fill_and_rows_of_the_same_image_are_no_negatives():
    one, two = jax.random.normal(jax.random.key(0), (2, 5, 4))
    image, valid = jnp.array([0, 1, 2, 2, 0]), jnp.array([1, 1, 1, 0, 0], bool)
    got = losses.ntxent(one, two, image, valid)
    np.testing.assert_allclose(got, whole(one[:3], two[:3], 0.5), rtol=1e-6)
    alike = losses.ntxent(one[:2], two[:2], jnp.array([7, 7]), valid[:2])
    grad = jax.grad(lambda x: losses.ntxent(x, two[:1], image[:1], valid[:1]))(one[:1])
    assert float(alike) == 0 and not np.asarray(grad).any()  # one support: nothing to tell apart
    nothing = losses.ntxent(one, two, image, jnp.zeros(5, bool))
    assert float(nothing) == 0


def augmented(pool):
    """The pool with its last three variants as augmented copies."""
    return pool._replace(variants=pool.variants - 3, copies=3, kinds=pool.kinds[:, :-3])


def test_weight_zero_leaves_params_as_it_was_and_the_head_learns(clip, pool):
    off, on = settings(), settings(**{"loss.simclr": 0.3, "augment": "rotate=10"})
    design, frozen = build.model_parts(off, clip)
    bare, full = (build.fresh_params(c, clip, design) for c in (off, on))
    assert set(full) - set(bare) == {"head"}
    jax.tree.map(np.testing.assert_array_equal, bare, {n: full[n] for n in bare})

    batch = training_pool.joint_batch(0, augmented(pool), [np.arange(4)], 4, 0, views=True)
    batch = jax.tree.map(lambda x: jnp.asarray(x[:, 0]), batch)

    @jax.jit
    def both(params):
        grads = jax.grad(lambda t: value(t, on)[0])(params)
        return value(params, on)[1], value(params, off)[1], grads

    def value(params, c):
        return model.loss(params, frozen, batch, None, design=design, weights=c.loss.to_dict())

    with_head, without, grads = both(full)
    assert "simclr" not in without and float(with_head["simclr"]) > 0
    np.testing.assert_allclose(
        with_head["loss"], without["loss"] + 0.3 * with_head["simclr"], rtol=1e-5
    )
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["head"]["hidden"]))
    assert all(np.abs(p["kernel"]).max() > 0 for p in grads["adapters"])


def test_simclr_needs_augmentation():
    with pytest.raises(ConfigError, match=r"config\.loss\.simclr is 0\.1.*rotate=10"):
        settings(**{"loss.simclr": 0.1})
    assert settings(**{"loss.simclr": 0.1, "method": "memory"}).steps == 0


def test_training_with_simclr_logs_it(tmp_path, clip, pool):
    c = settings(**{"loss.simclr": 0.3, "augment": "flip=0.5", "steps": 2, "batch": 3})
    design, frozen = build.model_parts(c, clip)
    params = loop.fit(
        *(build.fresh_params(c, clip, design), frozen, [augmented(pool)], []),
        workdir=tmp_path,
        mesh=sharding.mesh(),  # four devices and three rows: one only fills
        **build.training(c, clip, design, ()),
    )
    assert np.isfinite(params["head"]["out"]["kernel"]).all()
    assert '"simclr"' in (tmp_path / "metrics.jsonl").read_text()
