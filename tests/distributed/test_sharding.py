"""Sharding: uneven rows, equal values, donation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from medclip_jax.distributed import sharding
from medclip_jax.errors import ConfigError

ROWS = (1, 3, 4, 13)


def table(n):
    """n rows of distinct values."""
    return {
        "x": np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32),
        "id": np.arange(n, dtype=np.int32),
    }


def row_wise(tree, weight):
    return jnp.tanh(tree["x"] @ weight) + tree["id"][:, None]


def test_mesh_has_one_auto_axis_over_all_devices():
    mesh = sharding.mesh()
    assert mesh.size == 4 and len(mesh.axis_names) == 1
    assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)
    assert sharding.mesh(jax.devices()[1:4]).size == 3
    assert list(sharding.mesh(jax.devices()[::-1]).devices) == jax.devices()


@pytest.mark.parametrize(
    "platforms, error, said",
    [
        ("cuda", AssertionError(), "is 'cuda', which JAX cannot use here (there is none): unset"),
        ("tpu", RuntimeError("no libtpu (set JAX_PLATFORMS='')"), "here (no libtpu): unset it"),
    ],
)
def test_a_named_platform_that_is_not_there_is_a_sentence(monkeypatch, platforms, error, said):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    with pytest.raises(ConfigError, match=re.escape(said)):
        sharding.devices()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # not for its sake
    with pytest.raises(type(error)):
        sharding.devices()


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("n", ROWS)
def test_spread_pads_and_marks(n, devices):
    mesh, tree = sharding.mesh(jax.devices()[:devices]), table(n)
    with jax.transfer_guard("disallow"):
        placed, valid = sharding.spread(tree, mesh)
    total = -(-n // devices) * devices
    assert placed["x"].shape == (total, 3) and placed["x"].sharding == sharding.by_rows(mesh)
    assert placed["id"].dtype == np.int32 and valid.sharding == sharding.by_rows(mesh)
    assert {s.data.shape[0] for s in placed["x"].addressable_shards} == {total // devices}
    assert valid.tolist() == [i < n for i in range(total)]
    assert placed["id"].tolist() == [min(i, n - 1) for i in range(total)]
    back = sharding.fetch(placed, n)
    for name in tree:
        assert isinstance(back[name], np.ndarray)
        np.testing.assert_array_equal(back[name], tree[name])


@pytest.mark.parametrize("n", ROWS)
def test_jitted_rows_equal_the_unsharded_ones(n):
    mesh, tree = sharding.mesh(), table(n)
    weight = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    rows, copies = sharding.by_rows(mesh), sharding.replicated(mesh)
    placed, valid = sharding.spread(tree, mesh)
    run = jax.jit(row_wise, in_shardings=(rows, copies), out_shardings=rows)
    out = run(placed, sharding.replicate(weight, mesh))
    assert out.sharding.spec == PartitionSpec("rows") and len(out.sharding.device_set) == 4
    np.testing.assert_allclose(sharding.fetch(out, n), row_wise(tree, weight), rtol=1e-6)
    mean = jax.jit(lambda x, v: jnp.where(v[:, None], x, 0).sum(0) / v.sum())(placed["x"], valid)
    np.testing.assert_allclose(mean, tree["x"].mean(0), rtol=1e-5, atol=1e-7)


def test_replicated_state_can_be_donated():
    mesh, params = sharding.mesh(), {"w": jnp.arange(4.0), "b": jnp.ones(2)}
    state = sharding.replicate(params, mesh)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    assert len(state["w"].addressable_shards) == 4
    stepped = jax.jit(lambda s: s | {"w": s["w"] + 1}, donate_argnums=0)(state)
    assert state["w"].is_deleted()
    np.testing.assert_array_equal(params["w"] + 1, stepped["w"])


def test_what_is_shared_lies_on_every_device_and_once_on_its_own():
    mesh, weights = sharding.mesh(), {"w": jnp.arange(4.0)}
    shared = sharding.share(weights, mesh)["w"]
    assert shared.sharding.is_fully_replicated and len(shared.addressable_shards) == 4
    np.testing.assert_array_equal(shared, weights["w"])
    own = [s.data.unsafe_buffer_pointer() for s in shared.addressable_shards]
    assert weights["w"].unsafe_buffer_pointer() in own
