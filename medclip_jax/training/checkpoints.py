"""What training leaves on disk: the newest two checkpoints (orbax), whole or absent, and its log.

Beside a state lie the checksums of its arrays, which are compared when it is read. The log is
metrics.jsonl, line by line, and TensorBoard event files.
"""

import json
import logging
import math
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from medclip_jax import stored
from medclip_jax.distributed import runtime, sharding
from medclip_jax.errors import CheckpointError, WorkdirError
from medclip_jax.files import disk_errors, plain, read_steps, write_bytes
from medclip_jax.training.step import TrainState

MOST_METADATA = 1 << 24  # bytes of a file that orbax reads whole, a few thousand as a rule
MOST_DATA = 1 << 40  # of arrays, of which it reads the parts that it needs
ORIGIN = "learned from"  # an entry next to the checksums


def open(workdir: Path) -> ocp.CheckpointManager:
    """The checkpoints of a workdir, which this process alone reads and writes.

    Raises WorkdirError if it, or a file of it, cannot be used.
    """
    # orbax reports every file it touches; its errors reach us as exceptions too
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    folder = (workdir / "checkpoints").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_files(folder)
        own = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=own,
            active_processes={own} if runtime.several() else None,
            barrier_sync_key_prefix="main" if runtime.several() else None,
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            create=not runtime.several(),  # it is there
            multiprocessing_options=alone,
        )
        return ocp.CheckpointManager(folder, options=options)
    except ValueError as error:
        raise WorkdirError(f"{error}: remove it or set another workdir") from error
    except OSError as error:
        raise WorkdirError(
            f"{workdir}/checkpoints cannot be written ({error.strerror}): set another workdir"
        ) from error


def save(manager: ocp.CheckpointManager, state: TrainState, origin: str = "") -> None:
    """Write the state of this step in the background.

    origin: names what it was learned from, for `restore`.

    Raises WorkdirError if the disk refuses it; that may be the error of the save before.
    """
    step, state = int(state.step), _on_host(state)
    with _disk_errors(manager):
        if step in manager.all_steps():  # damaged, since the run resumed before it
            manager.delete(step)
        # forced, or nothing would be saved below the step of a damaged checkpoint
        checksums = ocp.args.JsonSave({**_checksums(state), ORIGIN: origin})
        item = ocp.args.Composite(state=ocp.args.StandardSave(state), checksums=checksums)
        manager.save(step, args=item, force=True)


def resume(
    manager: ocp.CheckpointManager | None, fresh: TrainState, mesh: Any, origin: str = ""
) -> TrainState:
    """The state to go on from, in every process: of process 0's checkpoints, else the fresh one.

    manager: None in the processes that have none. origin: as of `restore`.
    """
    if not runtime.several():
        assert manager is not None
        return restore(manager, fresh, origin) or fresh
    own = _on_host(fresh)
    found = restore(manager, own, origin) if manager else None
    if not runtime.any_process(found is not None)[0]:
        return fresh
    return sharding.replicate(sharding.broadcast(found or own), mesh)


def _on_host(state: TrainState) -> TrainState:
    """What this process can save of a state that all have; of a run of one process, the state."""
    if not runtime.several():
        return state
    return jax.tree.map(lambda x: np.array(x.addressable_data(0)), state)


@contextmanager
def closing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Wait for the last save and close. Raises WorkdirError if the disk refused it."""
    try:
        yield
    finally:
        with _disk_errors(manager):
            manager.wait_until_finished()
            manager.close()


def restore(
    manager: ocp.CheckpointManager, template: TrainState, origin: str = ""
) -> TrainState | None:
    """The newest whole state, with the shapes and placement of `template`; None if there is none.

    A damaged checkpoint is skipped for the one before it, with a warning. Raises CheckpointError if
    there are checkpoints and none can be read, or the name of what they were learned from does not
    begin with `origin`.
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
            checksums = dict(read["checksums"])
            own = checksums.pop(ORIGIN, origin)
            if _checksums(read["state"]) != checksums:
                raise ValueError("its checksums differ: bits of it have changed")
        except Exception as error:  # orbax and tensorstore raise many types on damaged files
            reason = re.split(r"\n| See full TensorStore", str(error))[0]
            logging.warning("checkpoint %d cannot be read and is skipped (%s)", step, reason)
            continue
        if not own.startswith(origin):
            raise CheckpointError(
                f"{manager.directory}: learned with another CLIP, language adapter, teacher, other "
                "prompts (config.prompts.ontology_file) or other images of config.meta.data than "
                "now: restore these, or give another --workdir"
            )
        return read["state"]
    if steps:
        raise CheckpointError(
            f"{manager.directory}: none of the checkpoints {steps} can be read, or they are of "
            "another model; remove that folder to train from the start"
        )
    return None


def _check_files(folder: Path) -> None:
    """Raise ValueError for what orbax would read whole and is too large, or would wait for."""
    for path in folder.rglob("*"):
        if not path.is_dir():
            try:
                stored.check_file(path, MOST_DATA if path.parent.name == "d" else MOST_METADATA)
            except ValueError as error:
                raise ValueError(f"{path} cannot be used, {error}") from None


def _checksums(state: TrainState) -> dict[str, str]:
    """CRC-32 of every leaf, by its path."""
    own = jax.tree.map(np.asarray, state)
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


class MetricsLog:
    """Appends one JSON line per logged step to `<workdir>/metrics.jsonl`, flushed at once.

    A line is `{"step": 10, <part>: value, ..., "seconds": 1.5}`; seconds run from the start of the
    run and continue after a resume. A value that is not finite is written as null and its name is
    listed under "nonfinite".
    """

    def __init__(self, workdir: Path, resume_step: int = 0, tensorboard: bool = False) -> None:
        """Open the log of a workdir, which is made if it is not there.

        Lines after `resume_step` are dropped, and a half-written last line. With `tensorboard`
        event files go to `<workdir>/tensorboard`. Raises WorkdirError if the folder cannot be
        written or an old line cannot be read.
        """
        self._path = workdir / "metrics.jsonl"
        old = read_steps(self._path) if self._path.exists() else []
        old = [line for line in old if line["step"] <= resume_step]
        self._start = time.monotonic() - (old[-1]["seconds"] if old else 0.0)
        self._events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            folder = str(workdir / "tensorboard")
            self._events = SummaryWriter(logdir=folder, purge_step=resume_step + 1)
        write_bytes(self._path, "".join(json.dumps(line) + "\n" for line in old).encode())
        with disk_errors(self._path):
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, parts: Mapping[str, Any]) -> None:
        """Log the parts of one step. Raises WorkdirError if the disk is full or read-only."""
        values = {name: float(value) for name, value in parts.items()}
        seconds = round(time.monotonic() - self._start, 3)
        line: dict[str, Any] = {"step": step, **values, "seconds": seconds}
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        if nonfinite:
            line["nonfinite"] = nonfinite
        with disk_errors(self._path):
            self._file.write(json.dumps(plain(line), allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()
        with disk_errors(self._path):
            self._file.close()
