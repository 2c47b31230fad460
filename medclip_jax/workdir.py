"""The folder of a run: its lock, its settings, its split, and whether it is finished."""

import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from medclip_jax import config, files, stored
from medclip_jax.data import splits
from medclip_jax.data.layouts import Record, Split
from medclip_jax.distributed import runtime
from medclip_jax.errors import WorkdirError
from medclip_jax.io.nifti_header import files_of

LOCK = ".lock"
FILES = (
    *("config.json", "split.json", "metrics.jsonl", "metrics.json", "report.html"),
    *("scorer.json", "scorer.safetensors", "predictions.npz"),
)
FOLDERS = ("checkpoints", "figures", "tensorboard")


@contextmanager
def locked(workdir: Path, new: bool = True) -> Iterator[None]:
    """Make the folder, if it may be new, and keep other runs out of it until the block is left.

    The kernel holds the lock for as long as the process lives, so a dead one leaves none behind.
    Of several processes of one run, process 0 holds it for all.

    Raises:
      WorkdirError: the folder cannot be made or written, another run is in it, or one of its names
        is taken by a link or a special file; there is no run although it is not `new`.
    """
    refusal, main = None, runtime.is_main()
    with ExitStack() as stack:
        if main:
            try:
                if new or workdir.exists():
                    stack.callback(_lock(workdir).release)
                    check_names(workdir)
                if not new and not (workdir / "config.json").exists():
                    raise WorkdirError(
                        f"{workdir}/config.json is missing: run --mode train with this workdir "
                        "first, or give that of a run"
                    )
                for folder in (workdir, workdir / "figures"):
                    files.sweep(folder)
            except WorkdirError as error:
                refusal = error
        if runtime.any_process(refusal is not None).any():
            raise refusal or WorkdirError(f"{workdir} cannot be used: process 0 says why")
        yield


def _lock(workdir: Path) -> FileLock:
    """A lock that is held; WorkdirError if it cannot be."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _refuse_unless(stat.S_ISREG, workdir / LOCK)
        lock = FileLock(workdir / LOCK, timeout=0)
        lock.acquire()
        return lock
    except Timeout:
        raise WorkdirError(
            f"{workdir} is in use by another run: wait until it ends or give another --workdir"
        ) from None
    except OSError as error:
        raise WorkdirError(
            f"{workdir} cannot be written ({error.strerror}): give another --workdir"
        ) from None


def check_names(workdir: Path) -> None:
    """Raise WorkdirError if a name that a run uses is a link or no regular file or folder.

    A workdir may come from elsewhere: a link would lead what is written to another place, and a
    pipe would be waited for.
    """
    for name in FILES:
        _refuse_unless(stat.S_ISREG, workdir / name)
    for name in FOLDERS:
        _refuse_unless(stat.S_ISDIR, workdir / name)
        for folder, folders, names in os.walk(workdir / name):
            for wanted, below in ((stat.S_ISDIR, folders), (stat.S_ISREG, names)):
                for other in below:
                    _refuse_unless(wanted, Path(folder, other))


def _refuse_unless(wanted: Callable[[int], bool], path: Path) -> None:
    with suppress(OSError):
        status = path.lstat()
        # some lock by truncating: the lock must not be another name of somebody's file
        linked = path.name == LOCK and status.st_size and status.st_nlink > 1
        if not wanted(status.st_mode) or linked:
            raise WorkdirError(
                f"{path} is a link, or no {'file' if wanted is stat.S_ISREG else 'folder'}: "
                "remove it or give another --workdir"
            )


def claim(workdir: Path, c: ConfigDict, main: bool = True) -> None:
    """Write config.json, or refuse a folder that holds a run with other settings.

    Fields that one of two versions lacks do not count. Of several processes only the `main` one
    writes; the others need not see it.
    """
    path = workdir / "config.json"
    settings = json.loads(c.to_json_best_effort())
    try:
        before = stored.read_json(path) if path.exists() else None
    except ValueError:
        before = None  # a foreign or corrupt file: ours appears in one piece
    except OSError as error:
        raise WorkdirError(
            f"{path} cannot be read ({error.strerror}): give another --workdir"
        ) from None
    if before is not None:
        old = dict(config.flat(config.comparable(before)))
        for name, value in config.flat(config.comparable(settings)):
            if name in old and value != old[name]:
                raise WorkdirError(
                    f"{workdir} holds a run with {name} = {old[name]}, not "
                    f"{value}: give another --workdir, or the settings it began with"
                )
    if main:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(path, settings)


def keep_split(workdir: Path, split: Split, c: ConfigDict, main: bool = True) -> None:
    """Write split.json, or check that the data still match the one that is there."""
    path = workdir / "split.json"
    if path.is_file():
        splits.check_split(path, split)
    elif main:
        splits.write_split(split, path, name=c.data.name, seed=c.seed, kind=c.data.split)


def truth_of(test: Sequence[Record]) -> list[list[Any]]:
    """All that a result reads of test images, for its key: a corrected label or mask changes it."""
    return [
        [
            *(r.id, r.sha256, int(r.label), r.patient),
            [files.sha256_of(*files_of(mask)) for mask in r.masks],
        ]
        for r in test
    ]


def seal(workdir: Path, key: str) -> dict[str, Any]:
    """What metrics.json says of a finished run: what it was made from, and the files it left."""
    settings = config.comparable(stored.read_json(workdir / "config.json"))
    digests = {name: files.sha256_of(workdir / name) for name in stored.RESULTS}
    return {"key": key, "config": stored.digest(settings), "files": digests}


def finish(workdir: Path, key: str, result: dict[str, Any]) -> dict[str, Any]:
    """Write metrics.json, sealed, after all other files; returns what it holds."""
    metrics = stored.sealed(files.plain(result | {"finished": seal(workdir, key)}))
    files.write_json(workdir / "metrics.json", metrics)
    return metrics


def finished(workdir: Path, key: str) -> dict[str, Any] | None:
    """metrics.json of a run that was finished with this key and whose files are whole, or None."""
    try:
        metrics = stored.read_json(workdir / "metrics.json")
        stored.check_seal(metrics)
        if metrics["finished"] != seal(workdir, key):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not finished, or corrupt: the run is repeated
    logging.info("%s is finished: nothing to do (--mode evaluate scores it again)", workdir)
    return metrics
