"""Training state on disk: whole, or absent, or skipped."""

import logging
import os
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.distributed import sharding
from medclip_jax.errors import CheckpointError, WorkdirError
from medclip_jax.training import checkpoints
from medclip_jax.training.step import TrainState
from tests.support.damaged import one_bit

# tensorstore leaves coroutines behind when a file it reads or writes is broken
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step: int, n: int = 6) -> TrainState:
    key = jax.random.key(step)
    params = {"context": jax.random.normal(key, (n, 4)), "scale": jnp.asarray(float(step))}
    return TrainState(jnp.asarray(step), params, (params, ()), jax.random.key_data(key))


def written(workdir: Path, *steps: int) -> Path:
    manager = checkpoints.open(workdir)
    with checkpoints.closing(manager):
        for step in steps:
            checkpoints.save(manager, state(step))
    return workdir / "checkpoints"


def restored(workdir: Path, template: TrainState | None = None) -> TrainState | None:
    manager = checkpoints.open(workdir)
    with checkpoints.closing(manager):
        return checkpoints.restore(manager, template or state(0))


def damage(folder: Path) -> None:
    """Cut every file of a checkpoint in half."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def assert_equal(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


def test_nothing_to_restore(tmp_path):
    assert restored(tmp_path) is None


def test_round_trip_keeps_the_newest_two(tmp_path):
    folder = written(tmp_path, 10, 20, 30)
    assert sorted(p.name for p in folder.iterdir()) == ["20", "30"]
    assert_equal(restored(tmp_path), state(30))


def test_what_is_saved_is_not_touched_by_a_donated_step(tmp_path):
    """Training overwrites the buffers of the state while it is being written."""
    step = jax.jit(
        lambda s: s._replace(step=s.step + 1, params=jax.tree.map(lambda x: x + 1, s.params)),
        donate_argnums=0,
    )
    big = {"a": jnp.zeros((1_000_000,))}
    now = TrainState(jnp.asarray(0), big, (), jax.random.key_data(jax.random.key(0)))
    manager = checkpoints.open(tmp_path)
    with checkpoints.closing(manager):
        for _ in range(3):
            now = step(now)
            checkpoints.save(manager, now)
            for _ in range(4):
                now = step(now)
    stored = restored(tmp_path, now)
    assert int(stored.step) == 11 and np.unique(stored.params["a"]).tolist() == [11.0]


def test_what_was_learned_with_another_clip_or_other_prompts_is_refused(tmp_path):
    manager = checkpoints.open(tmp_path)
    with checkpoints.closing(manager):
        checkpoints.save(manager, state(10), "one")
    manager = checkpoints.open(tmp_path)
    with checkpoints.closing(manager):
        assert_equal(checkpoints.restore(manager, state(0), "one"), state(10))
        with pytest.raises(CheckpointError, match="learned with another CLIP, language adapter,"):
            checkpoints.restore(manager, state(0), "two")


def test_a_damaged_newest_is_skipped_and_replaced(tmp_path, caplog):
    folder = written(tmp_path, 10, 20)
    damage(folder / "20")
    manager = checkpoints.open(tmp_path)
    with checkpoints.closing(manager), caplog.at_level(logging.WARNING):
        assert_equal(checkpoints.restore(manager, state(0)), state(10))
        assert "checkpoint 20 cannot be read and is skipped" in caplog.text
        checkpoints.save(manager, state(15))  # below the damaged one, saved all the same
        checkpoints.save(manager, state(20))
    caplog.clear()
    assert_equal(restored(tmp_path), state(20))
    assert not caplog.text


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path, caplog):
    """Whatever is restored has the values that were saved, of this checkpoint or the one before."""
    folder = written(tmp_path, 10, 20)
    files = sorted(p for p in (folder / "20").rglob("*") if p.is_file())
    skipped = 0
    for path in files:
        whole = path.read_bytes()
        for flipped in one_bit(whole, 6, seed=len(whole)):
            path.write_bytes(flipped)
            state_read = restored(tmp_path)
            skipped += int(state_read.step) == 10
            assert_equal(state_read, state(int(state_read.step)))
        path.write_bytes(whole)
    assert len(files) > 4 and skipped >= len(files)
    assert "checkpoint 20 cannot be read and is skipped" in caplog.text
    assert_equal(restored(tmp_path), state(20))


def test_an_array_that_changed_is_named(tmp_path, caplog, monkeypatch):
    written(tmp_path, 10)
    monkeypatch.setattr(checkpoints.zlib, "crc32", lambda raw: 1)
    written(tmp_path, 20)
    monkeypatch.undo()
    assert_equal(restored(tmp_path), state(10))
    assert "its checksums differ" in caplog.text


def test_a_giant_or_a_pipe_where_orbax_reads_whole_files(tmp_path):
    folder = written(tmp_path, 10, 20) / "20"
    paths = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != "d"]
    assert {"_METADATA", "_sharding", "metadata", "manifest.ocdbt"} <= {p.name for p in paths}
    for path in paths:
        whole = path.read_bytes()
        os.truncate(path, 1 << 30)
        with pytest.raises(WorkdirError, match=f"{path} cannot be used, it has 1073741824 bytes"):
            checkpoints.open(tmp_path)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(WorkdirError, match=f"{path} cannot be used, it is not a regular file"):
            checkpoints.open(tmp_path)
        path.unlink()
        path.write_bytes(whole)
    assert_equal(restored(tmp_path), state(20))


def test_all_damaged_is_an_error(tmp_path):
    folder = written(tmp_path, 10, 20)
    damage(folder / "10")
    damage(folder / "20")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[20, 10\] can be read"):
        restored(tmp_path)
    assert folder.is_dir()  # it is the user's to remove


def test_a_state_of_another_shape_is_an_error(tmp_path):
    written(tmp_path, 10)
    with pytest.raises(CheckpointError, match="of another model; remove that folder"):
        restored(tmp_path, state(0, n=7))


def test_a_half_written_checkpoint_is_not_a_checkpoint(tmp_path):
    folder = written(tmp_path, 10, 20)
    (folder / "20").rename(folder / "20.orbax-checkpoint-tmp")
    assert_equal(restored(tmp_path), state(10))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(WorkdirError, match="cannot be written"):
        checkpoints.open(tmp_path)


def test_a_disk_that_refuses_a_checkpoint(tmp_path):
    """The limit on a file's size fails a write as a full disk does, half way through."""
    written(tmp_path, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    manager = checkpoints.open(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(WorkdirError, match="checkpoint cannot be written .*too large"):
            with checkpoints.closing(manager):
                checkpoints.save(manager, state(20, n=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_equal(restored(tmp_path), state(10))


def test_a_state_of_four_devices_resumes_on_one(tmp_path):
    """And back: what is restored has the values that were saved, on the devices asked for."""
    four, one = sharding.mesh(), sharding.mesh(jax.devices()[:1])
    for name, saved, wanted in (("down", four, one), ("up", one, four)):
        manager = checkpoints.open(tmp_path / name)
        with checkpoints.closing(manager):
            checkpoints.save(manager, sharding.replicate(state(10), saved))
        stored = restored(tmp_path / name, sharding.replicate(state(0), wanted))
        assert_equal(jax.device_get(stored), jax.device_get(state(10)))
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(stored)} == {wanted.size}
