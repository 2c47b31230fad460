"""What a process does beside computing: compiled programs on disk, reading ahead, SIGTERM.

And several processes as one run: how they join, what they agree on, how they end. Each runs the
whole program on its share of the rows; process 0 alone writes. One alone: all is the identity.
"""

import atexit
import ctypes
import inspect
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int, PyTree
from rich.console import Console
from rich.progress import track

from medclip_jax import files
from medclip_jax.distributed import rendezvous, sharding
from medclip_jax.errors import (
    TERMINATED,
    ConfigError,
    Preempted,
    ProcessError,
    UserError,
    WorkdirError,
)

# seconds: until a file of process 0 must be seen (network folders lag), a loss be noticed
PATIENCE, GRACE, A_DAY = 60, 2, 86400
_LINKS: list[rendezvous.Links] = []  # to the other processes, where they were given an address
# words of the messages with which JAX reports a process that it cannot reach
LOST = ("gloo", "connection closed", "connection reset", "socket", "unavailable", "heartbeat")


def keep_compiled(cache: Path) -> None:
    """Keep compiled programs below `cache`, unless JAX is set to another folder (or to none).

    JAX names them by program, version and machine, so that a folder may serve all runs. Call it
    before anything is compiled.
    """
    settings: Any = jax.config  # its fields appear when jax is imported: unknown to a type checker
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))
    # XLA's own caches would put this path into the names: nothing is compiled again in a moved one
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if cache.is_dir() and not os.access(cache, os.W_OK):
        logging.warning("%s cannot be written: what it lacks is compiled again each time", cache)
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache")
    # small ones too: a job has some two hundred, and each is read faster than it is compiled
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def trim() -> None:
    """Give the memory that is free in the process back to the system; glibc alone keeps it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of up to `size` items."""
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def progress(items: Iterable, title: str, steps: int) -> Iterable:
    """Show progress on the terminal; nothing where there is nothing to do."""
    return track(items, title, steps, console=Console(stderr=True)) if steps else items


def prefetch(make: Callable[[Any], Any], items: Iterable) -> Generator[Any, None, None]:
    """make(item) of each item, in order; the next one is made on a thread meanwhile.

    An error of `make` is raised at its item's turn. Close it if it is not read to its end.
    """
    with ThreadPoolExecutor(1) as pool:
        following = None
        for item in items:
            current, following = following, pool.submit(make, item)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process, until the block is left.

    Python delivers signals to the main thread only; in another thread the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = 20,
    facts: rendezvous.Facts | None = None,
) -> None:
    """Join the other processes of the run; call it once, before anything else touches JAX.

    Args:
      coordinator: "host:port" of process 0; None, as the next, where the environment has them.
      processes, process: their number, and which one this is, from 0.
      timeout: seconds to wait for the others; ProcessError if they do not come.
      facts: of `agree`.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    bind, joined = None, None
    if processes == 1:
        return
    if coordinator is not None and processes is not None and process is not None:
        joined = rendezvous.join(coordinator, processes, process, timeout, facts or {})
        # JAX starts a service in process 0 always: this one nobody uses
        coordinator, bind = joined.service, f"127.0.0.1:{rendezvous.free_port()}"
        _LINKS.append(joined)
    how: dict[str, Any] = {"initialization_timeout": timeout, "coordinator_bind_address": bind}
    how["heartbeat_timeout_seconds"] = A_DAY if joined else 20
    how["shutdown_timeout_seconds"] = PATIENCE if joined else A_DAY  # a report may be written
    known = inspect.signature(jax.distributed.initialize).parameters  # the last since jax 0.8.1
    try:
        jax.distributed.initialize(
            coordinator, processes, process, **{n: x for n, x in how.items() if n in known}
        )
    except ValueError as error:  # JAX's way to say that it found no address
        raise ConfigError(
            f"config.distributed is auto and nothing tells who takes part ({error}): "
            "set HOST:PORT,PROCESS/PROCESSES"
        ) from error
    if joined:  # with the same facts
        atexit.register(joined.part)
    sharding.devices()
    agree({**(facts or {}), "local devices": jax.local_device_count()})


def agree(facts: rendezvous.Facts) -> None:
    """Raise ConfigError, in every process alike, if these values of JSON's types differ in any."""
    if _LINKS:
        _LINKS[0].agree(facts)
    elif several():
        raw = np.frombuffer(json.dumps(facts, sort_keys=True).encode(), np.uint8)
        length = int(np.max(multihost_utils.process_allgather(np.array(len(raw)))))
        rows = multihost_utils.process_allgather(np.pad(raw, (0, length - len(raw))))
        every = [json.loads(bytes(row).rstrip(b"\0")) for row in np.asarray(rows)]
        if text := rendezvous.difference(every):
            raise ConfigError(text)


def several() -> bool:
    """Is this one of several processes?"""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Is this the process that writes? Asking does not start JAX."""
    return not several() or jax.process_index() == 0


@contextmanager
def exit_together() -> Iterator[None]:
    """Run a block that all processes run; one that fails does not wait for the others.

    A lost process shows as a failed collective operation: it becomes a ProcessError. Any other
    fault of ours ends this process at once with exit code 1: the usual end would wait for
    processes that in turn wait for this one.
    """
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception as error:
        if not several():
            raise
        if _LINKS and _LINKS[0].lost.wait(GRACE):
            raise ProcessError(rendezvous.LOST) from error
        words = LOST if isinstance(error, jax.errors.JaxRuntimeError) else LOST[:1]
        lines = str(error).strip().splitlines()
        reason = next((x for x in lines if any(word in x.lower() for word in words)), "")
        if reason:
            raise ProcessError(
                f"Another process of the run has ended or cannot be reached ({reason}): "
                "start all of them again, the same commands resume from the last checkpoint."
            ) from error
        traceback.print_exc()
        _exit_now(1)


def leave(code: int) -> None:
    """End this process with `code`; without waiting for the others if it failed."""
    if code in (0, TERMINATED) or not jax.distributed.is_initialized():
        sys.exit(code)  # at the end of a whole run, or a stop that all agreed on, all arrive
    _exit_now(code)


def _exit_now(code: int) -> None:
    """No handler runs that would wait for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def any_process(flags: Sequence[bool] | bool) -> np.ndarray:
    """True where any process has True, in every process alike. All processes must call it."""
    own = np.atleast_1d(np.asarray(flags, bool))
    if not several():
        return own
    everyone = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, len(own))
    return np.logical_or.reduce(everyone, axis=0)


def process_rows(n: int) -> Int[np.ndarray, " m"]:
    """Which of `n` rows this process works on; the last is repeated so that all have as many."""
    count = -(-n // jax.process_count())
    first = jax.process_index() * count
    return np.minimum(np.arange(first, first + count), n - 1)


def gather(tree: PyTree, n: int) -> PyTree:
    """Rows of every process's `process_rows(n)` -> all `n` rows on every host, bit for bit.

    Leaves are numpy arrays with those rows on axis 0.
    """
    if not several():
        return tree

    def one(x):
        # as bytes: JAX would round float64
        raw = np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(raw, tiled=True))[:n]
        return np.ascontiguousarray(rows).view(x.dtype).reshape(n, *x.shape[1:])

    return jax.tree.map(one, tree)


def gather_rows(own: np.ndarray, n: int, batch: int, folder: Path | None) -> np.ndarray:
    """`gather` of rows on disk (files.temporary_array), `batch` of each process at a time."""
    if not several():
        return own
    whole = files.temporary_array((n, *own.shape[1:]), own.dtype, folder)
    for start in range(0, len(own), batch):
        rows = np.asarray(own[start : start + batch])
        everyone = gather(rows, len(rows) * jax.process_count())
        for process, part in enumerate(np.split(everyone, jax.process_count())):
            first = process * len(own) + start
            part = part[: max(0, n - first)]
            whole[first : first + len(part)] = part
    return whole


def wait_for_files(paths: Sequence[Path]) -> None:
    """Wait until files that process 0 has written are there for this process too.

    Raises WorkdirError if they do not appear: the folder is not one that all processes share.
    """
    if not several():
        return
    any_process(False)  # process 0 comes here when it has written
    deadline = time.monotonic() + PATIENCE
    for path in paths:
        while not path.is_file():
            if time.monotonic() > deadline:
                raise WorkdirError(
                    f"{path}, written by process 0, is not seen by process {jax.process_index()}: "
                    "set a cache on a disk of its own, or on one that all processes share."
                )
            time.sleep(0.2)
