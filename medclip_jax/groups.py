"""Work on the host in groups: what is the same once, so many at a time, shown as it goes on."""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.progress import track

from medclip_jax.structs import Record


def unique(records: Iterable[Record]) -> list[Record]:
    """Records with different content: equal files are encoded once."""
    return list({r.sha256: r for r in records}.values())


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


def progress(items: Iterable, what: str, steps: int) -> Iterable:
    """Show progress on the terminal; nothing where there is nothing to do."""
    return track(items, what, steps, console=Console(stderr=True)) if steps else items


def ahead(make: Callable[[Any], Any], items: Iterable) -> Generator[Any, None, None]:
    """make(item) of each item, in order; the one after is made on a thread meanwhile.

    An error of `make` is raised at its item's turn. Close it if it is not read to its end.
    """
    with ThreadPoolExecutor(1) as pool:
        next_one = None
        for item in items:
            last, next_one = next_one, pool.submit(make, item)
            if last is not None:
                yield last.result()
        if next_one is not None:
            yield next_one.result()
