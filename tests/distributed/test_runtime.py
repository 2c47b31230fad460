"""Reading ahead, SIGTERM, and two real processes on loopback that equal one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from medclip_jax.distributed import runtime
from medclip_jax.errors import ProcessError
from tests.support.paths import ROOT
from tests.support.ports import free_port


def test_items_come_in_order_one_ahead_and_errors_at_their_turn():
    started = []

    def make(i):
        started.append(i)
        if i == 3:
            raise ValueError("the fourth")
        return 10 * i

    items, found = runtime.prefetch(make, range(6)), []
    with pytest.raises(ValueError, match="the fourth"):
        for item in items:
            found.append(item)
            assert len(started) <= len(found) + 1
    assert found == [0, 10, 20] and list(runtime.prefetch(make, [])) == []


def test_batches_hold_all_items():
    assert list(runtime.batches(range(5), 2)) == [[0, 1], [2, 3], [4]]


def test_sigterm_sets_the_event_until_the_block_is_left():
    before = signal.getsignal(signal.SIGTERM)
    with runtime.sigterm() as event:
        os.kill(os.getpid(), signal.SIGTERM)
        assert event.wait(5)
    assert signal.getsignal(signal.SIGTERM) is before
    other = threading.Thread(target=lambda: runtime.sigterm().__enter__().set())
    other.start()  # of another thread the handler stays as it is
    other.join()
    assert signal.getsignal(signal.SIGTERM) is before


PROCESS = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from medclip_jax import files
from pathlib import Path
from medclip_jax.distributed import runtime, sharding
from medclip_jax.training import checkpoints, step

port, process = int(sys.argv[1]), int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
runtime.start(f"localhost:{port}", 2, process, timeout=60)
mesh, n = sharding.mesh(), 7
whole = np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)
index = sharding.local_rows(n, mesh)
x = sharding.place(whole[index], mesh)            # each process has only its own rows
again, valid = sharding.spread(whole, mesh)
weight = sharding.replicate(np.arange(3, dtype=np.float32), mesh)
total = jax.jit(
    lambda x, v, w: jnp.where(v, jnp.tanh(x @ w), 0).sum(), out_shardings=sharding.replicated(mesh)
)(x, valid, weight)
own = runtime.process_rows(n)
stored = files.temporary_array((len(own), 3), np.float64)
stored[:] = whole[own] / np.float64(3)
def state(at):
    values = np.float32([-0.0, np.nan, 1 / 3]) + np.float32(at)
    all = step.TrainState(np.int32(at), {"a": values}, (), np.uint32([7, at]))
    return sharding.replicate(all, mesh)
manager = checkpoints.open(Path(sys.argv[3])) if sharding.is_main() else None
if manager:
    checkpoints.save(manager, state(5))
    manager.wait_until_finished()
resumed = checkpoints.resume(manager, state(0), mesh)
if manager:
    manager.close()
print(json.dumps(dict(
    resumed=[np.asarray(x.addressable_data(0)).tobytes().hex() for x in jax.tree.leaves(resumed)],
    main=sharding.is_main(), devices=mesh.size, index=index.tolist(), total=float(total),
    rows=sharding.fetch(x, n).tolist(), again=sharding.fetch(again, n).tolist(),
    any=runtime.any_process([process == 0, process == 1, False]).tolist(),
    gathered=runtime.gather(whole[own] / np.float64(3), n).tolist(),
    from_disk=np.asarray(runtime.gather_rows(stored, n, 3, None)).tolist(),
)))
"""


def test_one_process_is_the_identity():
    assert not runtime.several() and runtime.process_rows(3).tolist() == [0, 1, 2]
    assert runtime.any_process([True, False]).tolist() == [True, False]
    rows = np.arange(3)
    assert runtime.gather(rows, 3) is rows and runtime.gather_rows(rows, 3, 2, None) is rows


def test_two_processes_equal_one(tmp_path):
    """The second has no folder of checkpoints."""
    port = str(free_port())
    environment = os.environ | {"JAX_ENABLE_X64": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(i), str(tmp_path / str(i))],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        ended = [(*p.communicate(timeout=120), p.returncode) for p in running]
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
    values = np.float32([-0.0, np.nan, 1 / 3]) + np.float32(5)
    saved = [x.tobytes().hex() for x in (np.int32(5), values, np.uint32([7, 5]))]
    assert first["resumed"] == second["resumed"] == saved
    assert not (tmp_path / "1").exists()
    for found in (first, second):
        np.testing.assert_array_equal(np.float32(found["rows"]), whole)
        np.testing.assert_array_equal(np.float32(found["again"]), whole)
        np.testing.assert_allclose(found["total"], np.tanh(whole @ np.arange(3)).sum(), rtol=1e-5)
        assert found["any"] == [True, True, False]
        for name in ("gathered", "from_disk"):  # bit for bit, in float64
            np.testing.assert_array_equal(found[name], whole / np.float64(3))


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("INTERNAL: Connection closed by peer"),
        ValueError("The program failed.\nGather failed: [external/gloo/pair.cc] Connection reset"),
    ],
)
def test_a_lost_process_is_a_sentence_whichever_way_it_shows(monkeypatch, error):
    monkeypatch.setattr(runtime, "several", lambda: True)
    with pytest.raises(ProcessError, match="has ended or cannot be reached.*(closed|reset)"):
        with runtime.exit_together():
            raise error


def test_a_jax_that_knows_no_shutdown_timeout_joins_without(monkeypatch):
    how = []

    def initialize(
        address=None,
        processes=None,
        process=None,
        initialization_timeout=300,
        coordinator_bind_address=None,
        heartbeat_timeout_seconds=100,
    ):
        how.append((initialization_timeout, coordinator_bind_address, heartbeat_timeout_seconds))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    runtime.start(timeout=7)
    assert how == [(7, None, 20)]


def test_another_fault_of_several_processes_ends_this_one_at_once(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(runtime, "several", lambda: True)
    monkeypatch.setattr(runtime, "_exit_now", codes.append)
    with runtime.exit_together():
        raise ValueError("socket of an electrode")
    assert codes == [1] and "socket of an electrode" in capsys.readouterr().err


# --- compiled programs on disk --------------------------------------------------------------


@pytest.fixture
def own_programs():
    """JAX as a user has it, without the tests' cache of compiled programs."""
    names = (
        *("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches"),
        *("jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache"),
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_with(cache, factor: float) -> set[str]:
    """Compile a program with this cache as a new process would; the files that hold programs."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    runtime.keep_compiled(cache)
    assert jax.jit(lambda x: x * factor + 1)(jnp.ones(3)).sum() == 3 * factor + 3
    return {path.name for path in (cache / "compiled").glob("*-cache")}


def test_nothing_is_compiled_again_in_a_cache_that_was_moved(tmp_path, own_programs):
    first = compile_with(tmp_path / "cache", 7.25)
    assert first
    (tmp_path / "cache").rename(tmp_path / "moved")
    assert compile_with(tmp_path / "moved", 7.25) == first
    assert compile_with(tmp_path / "moved", 7.75) > first


def test_a_cache_that_cannot_be_written_is_one_warning(tmp_path, own_programs, read_only, caplog):
    """What it holds is used as it is; what it lacks is compiled, and said once for all."""
    first = compile_with(tmp_path / "cache", 8.25)
    place = read_only(tmp_path / "cache")
    hits: list[str] = []

    def note(name: str, **_) -> None:
        hits.append(name)

    monitoring.register_event_listener(note)
    try:
        assert compile_with(place, 8.25) == first
        assert "/jax/compilation_cache/cache_hits" in hits
        assert compile_with(place, 8.75) == first  # compiled, and not kept
        assert compile_with(place, 8.875) == first
    finally:
        with contextlib.suppress(AttributeError):  # jax 0.7 has none
            monitoring.unregister_event_listener(note)
    said = [message for message in caplog.messages if "cannot be written" in message]
    assert set(said) == {f"{place} cannot be written: what it lacks is compiled again each time"}
    assert not [w for w in own_programs if "Error writing" in str(w.message)]
