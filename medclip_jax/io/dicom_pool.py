"""Derived DICOM objects of many files, built in processes of their own.

highdicom and pydicom are Python: threads that build objects hold each other up, and the encoder's
caller with them. The objects are the same wherever they are built.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool

from medclip_jax.io import dicom_write
from medclip_jax.io.dicom_write import Made

WORTH = 128  # files; processes for fewer would start for longer than they work
IDLE = 10  # seconds, after which a process without work ends
Build = Callable[..., Made]  # as dicom_objects.build


@contextmanager
def builder(count: int) -> Iterator[Build]:
    """What builds the objects of `count` files: processes, or the caller's thread for few.

    Where a process is killed, the objects are built in the caller's thread from then on. All
    processes have ended when the block is left; if this one is killed, they end by themselves.
    """
    if count < WORTH:
        yield dicom_write.build
        return
    pool = ProcessPoolExecutor(os.cpu_count() or 1, timeout=IDLE, initializer=_begin)

    def build(*args) -> Made:
        try:
            return pool.submit(dicom_write.build, *args).result()
        except (BrokenProcessPool, OSError) as error:
            logging.debug("no process to build DICOM objects (%s)", type(error).__name__)
            return dicom_write.build(*args)

    try:
        yield build
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def _begin() -> None:
    """A worker prints nothing of headers, and Ctrl-C, which reaches it too, is its caller's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    dicom_write.quieten()
