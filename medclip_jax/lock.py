"""One run at a time in a workdir.

The kernel holds the lock for as long as the process lives, so one that died leaves none behind; its
file is taken over.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medclip_jax.errors import WorkdirError

NAME = ".lock"


@contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keep other runs out of a workdir until the block is left.

    Raises WorkdirError naming the process that is in it, or if no file can be made there.
    """
    path = workdir / NAME
    held = _take(path)
    try:
        os.truncate(held, 0)
        os.write(held, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is let go, so that nobody waits on a ghost
        os.close(held)


def _take(path: Path) -> int:
    while True:
        try:
            held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise WorkdirError(
                f"{path.parent} is not writable ({error.strerror}): give another --workdir"
            ) from None
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(held), os.stat(path)):
                return held
        except BlockingIOError:
            who = os.read(held, 200).decode(errors="replace") or "another process"
            os.close(held)
            raise WorkdirError(
                f"{path.parent} is in use by {who}: wait until it ends or give another --workdir"
            ) from None
        except FileNotFoundError:  # its holder removed it between open and lock: once more
            pass
        os.close(held)
