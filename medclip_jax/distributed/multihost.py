"""Several processes as one run: who does what, what they agree on, and how they end together.

Every process runs the whole program on its share of the rows; process 0 alone writes. In a run of
one process everything here is the identity. `sharding.start` joins the processes.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int, PyTree

from medclip_jax.distributed import spool
from medclip_jax.distributed.runtime import Preempted
from medclip_jax.errors import ProcessError, UserError, WorkdirError

PATIENCE = 60  # seconds until a file of process 0 must be seen by all; network folders lag
SIGNS = ("gloo", "connection closed", "connection reset", "socket", "unavailable", "heartbeat")


def several() -> bool:
    """Is this one of several processes? Asking does not start JAX."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


@contextmanager
def together() -> Iterator[None]:
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
        said = str(error).strip().partition("\n")[0]
        if isinstance(error, jax.errors.JaxRuntimeError) and any(s in said.lower() for s in SIGNS):
            raise ProcessError(
                f"another process of the run has ended or cannot be reached ({said}): "
                "start all of them again, the same commands go on from the last checkpoint"
            ) from error
        traceback.print_exc()
        end(1)


def leave(code: int) -> None:
    """End this process with `code`; without waiting for the others if it failed."""
    if code in (0, 143) or not several():
        sys.exit(code)  # at the end of a whole run, or a stop that all agreed on, all arrive
    end(code)


def end(code: int) -> None:
    """Exit now: no handler runs that would wait for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def agreed(flags: Sequence[bool] | bool) -> np.ndarray:
    """True where any process says so, in every process alike. All processes must call it."""
    own = np.atleast_1d(np.asarray(flags, bool))
    if not several():
        return own
    everyone = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, len(own))
    return np.logical_or.reduce(everyone, axis=0)


def part(n: int) -> Int[np.ndarray, " m"]:
    """Which of `n` rows this process works on; the last is repeated so that all have as many."""
    count = -(-n // jax.process_count())
    first = jax.process_index() * count
    return np.minimum(np.arange(first, first + count), n - 1)


def gather(tree: PyTree, n: int) -> PyTree:
    """Rows of every process's `part` -> all `n` rows, on the host in every process, bit for bit.

    Leaves are numpy arrays with the rows of `part(n)` on axis 0.
    """
    if not several():
        return tree

    def one(x):
        # as bytes: JAX would round float64
        raw = np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(raw, tiled=True))[:n]
        return np.ascontiguousarray(rows).view(x.dtype).reshape(n, *x.shape[1:])

    return jax.tree.map(one, tree)


def gather_rows(own: spool.Rows, n: int, batch: int, folder: Path | None) -> spool.Rows:
    """`gather` of rows on disk, `batch` of each process at a time."""
    if not several():
        return own
    whole = spool.Rows(n, own.shape[1:], own.dtype, folder)
    for start in range(0, len(own), batch):
        rows = np.stack([own[i] for i in range(start, min(start + batch, len(own)))])
        everyone = gather(rows, len(rows) * jax.process_count())
        for process, part in enumerate(np.split(everyone, jax.process_count())):
            first = process * len(own) + start
            whole.put(first, part[: max(0, n - first)])
    return whole


def seen(paths: Sequence[Path]) -> None:
    """Wait until files that process 0 has written are there for this process too.

    Raises WorkdirError if they do not appear: the folder is not one that all processes share.
    """
    if not several():
        return
    agreed(False)  # process 0 comes here when it has written
    deadline = time.monotonic() + PATIENCE
    for path in paths:
        while not path.is_file():
            if time.monotonic() > deadline:
                raise WorkdirError(
                    f"{path} of process 0 is not seen by process {jax.process_index()}: "
                    "give a cache and a workdir on a folder that all processes share"
                )
            time.sleep(0.2)
