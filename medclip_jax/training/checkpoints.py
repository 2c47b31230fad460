"""Training state on disk (orbax): the newest two checkpoints, each whole or absent.

Beside the state lie the checksums of its arrays, which are compared when it is read.
"""

import logging
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from medclip_jax.errors import CheckpointError, WorkdirError
from medclip_jax.training.step import TrainState


def open(workdir: Path) -> ocp.CheckpointManager:
    """The checkpoints of a workdir. Raises WorkdirError if the folder cannot be used."""
    # orbax reports every file it touches; its errors reach us as exceptions too
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    folder = (workdir / "checkpoints").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))
    except OSError as error:
        raise WorkdirError(
            f"{workdir}/checkpoints cannot be written ({error.strerror}): set another workdir"
        ) from error


def save(manager: ocp.CheckpointManager, state: TrainState) -> None:
    """Write the state of this step in the background.

    Raises WorkdirError if the disk refuses it; that may be the error of the save before.
    """
    step = int(state.step)
    with _disk_errors(manager):
        if step in manager.all_steps():  # damaged, since the run resumed before it
            manager.delete(step)
        # forced, or nothing would be saved below the step of a damaged checkpoint
        checksums = ocp.args.JsonSave(_checksums(state))
        item = ocp.args.Composite(state=ocp.args.StandardSave(state), checksums=checksums)
        manager.save(step, args=item, force=True)


@contextmanager
def closing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Wait for the last save and close. Raises WorkdirError if the disk refused it."""
    try:
        yield
    finally:
        with _disk_errors(manager):
            manager.wait_until_finished()
            manager.close()


def restore(manager: ocp.CheckpointManager, template: TrainState) -> TrainState | None:
    """The newest whole state, with the shapes and placement of `template`; None if there is none.

    A damaged checkpoint is skipped for the one before it, with a warning. Raises CheckpointError if
    there are checkpoints and none can be read.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        try:
            wanted = {
                "state": ocp.args.StandardRestore(abstract),
                "checksums": ocp.args.JsonRestore(),
            }
            read = manager.restore(step, args=ocp.args.Composite(**wanted))
            if _checksums(read["state"]) != read["checksums"]:
                raise ValueError("its checksums differ: bits of it have changed")
            return read["state"]
        except Exception as error:  # orbax and tensorstore raise many types on damaged files
            reason = str(error).partition("\n")[0]
            logging.warning("checkpoint %d cannot be read and is skipped (%s)", step, reason)
    if steps:
        raise CheckpointError(
            f"{manager.directory}: none of the checkpoints {steps} can be read, or they are of "
            "another model; remove that folder to train from the start"
        )
    return None


def _checksums(state: TrainState) -> dict[str, str]:
    """CRC-32 of every leaf, by its path; every process has them all."""
    own = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), state)
    leaves = jax.tree_util.tree_leaves_with_path(own)
    return {
        jax.tree_util.keystr(path): f"{x.dtype}{x.shape} {zlib.crc32(x.tobytes()):08x}"
        for path, x in leaves
    }


@contextmanager
def _disk_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turn what orbax and tensorstore raise on a full or read-only disk into a WorkdirError."""
    try:
        yield
    except (OSError, ValueError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore raises ValueError
        if code:
            reason = os.strerror(int(code[1]))
        elif isinstance(error, OSError):
            reason = str(error.strerror)
        else:
            raise
        raise WorkdirError(
            f"a checkpoint cannot be written to {manager.directory} ({reason}): free space there; "
            "the same command resumes from the checkpoint before"
        ) from error
