"""sharding: uneven rows, equal values, donation, and two real processes on loopback."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from medclip_jax.distributed import multihost, sharding
from medclip_jax.errors import ConfigError
from tests.support.paths import ROOT
from tests.support.ports import free_port

ROWS = (1, 7, 8, 13)


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
    assert mesh.size == 8 and len(mesh.axis_names) == 1
    assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)
    assert sharding.mesh(jax.devices()[2:5]).size == 3
    assert list(sharding.mesh(jax.devices()[::-1]).devices) == jax.devices()


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("n", ROWS)
def test_put_pads_and_marks(n, devices):
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
    assert out.sharding.spec == PartitionSpec("rows") and len(out.sharding.device_set) == 8
    np.testing.assert_allclose(sharding.fetch(out, n), row_wise(tree, weight), rtol=1e-6)
    mean = jax.jit(lambda x, v: jnp.where(v[:, None], x, 0).sum(0) / v.sum())(placed["x"], valid)
    np.testing.assert_allclose(mean, tree["x"].mean(0), rtol=1e-5, atol=1e-7)


def test_put_refuses_what_has_no_rows():
    mesh = sharding.mesh()
    with pytest.raises(ValueError, match="agree in their number of rows"):
        sharding.spread({"a": np.zeros(3), "b": np.zeros(4)}, mesh)
    with pytest.raises(ValueError, match="agree in their number of rows"):
        sharding.spread(np.float32(1), mesh)
    with pytest.raises(ValueError, match="0 rows"):
        sharding.spread(np.zeros((0, 2)), mesh)
    with pytest.raises(ValueError, match="9 rows do not spread over 8"):
        sharding.place(np.zeros(9), mesh)


def test_replicated_state_can_be_donated():
    mesh, params = sharding.mesh(), {"w": jnp.arange(4.0), "b": jnp.ones(2)}
    state = sharding.replicate(params, mesh)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    assert len(state["w"].addressable_shards) == 8
    stepped = jax.jit(lambda s: s | {"w": s["w"] + 1}, donate_argnums=0)(state)
    assert state["w"].is_deleted()
    np.testing.assert_array_equal(params["w"] + 1, stepped["w"])


def test_start_refuses_half_an_address():
    with pytest.raises(ConfigError, match="set all three"):
        multihost.start("localhost:1", None, None, 1, 1)
    with pytest.raises(ConfigError, match="count from 0"):
        multihost.start("localhost:1", 2, 2, 1, 1)


# Two processes

PROCESS = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from medclip_jax.distributed import multihost, sharding

port, process = int(sys.argv[1]), int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
multihost.start(f"localhost:{port}", 2, process, 30, 100)
mesh, n = sharding.mesh(), 7
whole = np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)
index = sharding.local_rows(n, mesh)
x = sharding.place(whole[index], mesh)            # each process gives only its own rows
again, valid = sharding.spread(whole, mesh)
weight = sharding.replicate({"w": np.arange(3, dtype=np.float32)}, mesh)
total = jax.jit(
    lambda x, v, w: jnp.where(v, jnp.tanh(x @ w), 0).sum(), out_shardings=sharding.replicated(mesh)
)(x, valid, weight["w"])
print(json.dumps(dict(
    main=sharding.is_main(), devices=mesh.size, index=index.tolist(), total=float(total),
    rows=sharding.fetch(x, n).tolist(), again=sharding.fetch(again, n).tolist(),
)))
"""

WATCHER = """
import sys, time
import jax
from medclip_jax.distributed import multihost, sharding

port, process = int(sys.argv[1]), int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
multihost.start(f"localhost:{port}", 2, process, 30, 4)
print("joined", flush=True)
time.sleep(60)
"""


def launch(source):
    """Two processes of `source`, given a free port and their number."""
    port, root = str(free_port()), ROOT
    return [
        subprocess.Popen(
            [sys.executable, "-c", source, port, str(i)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def test_two_processes_equal_one():
    running = launch(PROCESS)
    try:
        ended = [(*p.communicate(timeout=90), p.returncode) for p in running]
    finally:
        for p in running:
            p.kill()
    assert [code for _, _, code in ended] == [0, 0], ended
    first, second = (json.loads(out.splitlines()[-1]) for out, _, _ in ended)

    n = 7
    whole = np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)
    assert (first["main"], second["main"]) == (True, False)
    assert first["devices"] == second["devices"] == 4
    assert first["index"] == [0, 1, 2, 3] and second["index"] == [4, 5, 6, 6]
    for got in (first, second):
        np.testing.assert_array_equal(np.float32(got["rows"]), whole)
        np.testing.assert_array_equal(np.float32(got["again"]), whole)
        np.testing.assert_allclose(got["total"], np.tanh(whole @ np.arange(3)).sum(), rtol=1e-5)


def test_a_killed_process_ends_the_other():
    running = launch(WATCHER)
    try:
        assert [p.stdout.readline().strip() for p in running] == ["joined", "joined"]
        running[1].kill()
        _, said = running[0].communicate(timeout=50)
    finally:
        for p in running:
            p.kill()
            p.communicate()
    assert running[0].returncode != 0
    assert "stopped sending heartbeats" in said and "another task died" in said, said
