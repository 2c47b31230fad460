"""SIGTERM, as a scheduler sends it before it takes the machine away.

While training, it ends the run after the step under way, with a whole checkpoint, by `Preempted`.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 143  # 128 + SIGTERM, as a shell reports it


class Preempted(Exception):
    """The run was asked to stop and has saved its state; the message says where it stands."""


@contextmanager
def notice() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process, until the block is left.

    Python delivers signals to the main thread only; in another thread the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
