"""Rows on disk: what comes back, what a full disk says, and the .npz that holds them."""

import errno
import os

import numpy as np
import pytest

from medclip_jax.distributed import multihost, spool
from medclip_jax.errors import WorkdirError


def test_rows_come_back_as_they_were_put(tmp_path):
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(7, 3, 4)).astype(np.float16)
    rows = spool.Rows(7, (3, 4), np.float16, tmp_path)
    rows.put(4, wanted[4:])
    assert not np.array(rows)[:4].any()  # zeros until they are written
    rows.put(0, wanted[:4].astype(np.float64))  # as its own type
    np.testing.assert_array_equal(np.array(rows), wanted)
    np.testing.assert_array_equal(rows[np.int64(6)], wanted[6])
    assert rows.shape == (7, 3, 4) and len(list(rows)) == 7
    for i in (7, -1):
        with pytest.raises(IndexError):
            rows[i]
    assert list(tmp_path.iterdir()) == []  # a killed process leaves nothing
    empty = spool.Rows(0, (3, 4), np.float16, tmp_path)
    assert np.array(empty).shape == (0, 3, 4)
    assert multihost.gather_rows(rows, 7, 2, tmp_path) is rows  # one process has them all


def test_an_npz_of_rows_is_numpys(tmp_path):
    rows = spool.Rows(5, (2, 2), np.float16, tmp_path)
    rows.put(0, np.arange(20, dtype=np.float16).reshape(5, 2, 2))
    arrays = {"maps": rows, "id": np.array(["a", "é"]), "one": 3.0}
    spool.write_npz(tmp_path / "ours.npz", arrays)
    np.savez(tmp_path / "theirs.npz", **{**arrays, "maps": np.array(rows)})
    ours, theirs = ((tmp_path / f"{name}.npz").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs
    with pytest.raises(ValueError, match="pickle|Object"):
        spool.write_npz(tmp_path / "bad.npz", {"x": np.array([{}])})
    assert not (tmp_path / "bad.npz").exists()


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    rows = spool.Rows(2, (4,), np.float32, tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WorkdirError, match="No space left on device"):
        rows.put(0, np.ones((1, 4)))
    with pytest.raises(WorkdirError, match="Cannot write"):
        spool.Rows(2, (4,), np.float32, tmp_path / "absent")
