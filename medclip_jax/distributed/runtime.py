"""What a process does beside computing: compiled programs on disk, reading ahead, SIGTERM."""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track


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
