"""The tables over all items of a prediction: results.csv and unreadable.csv."""

import csv
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medclip_jax import files
from medclip_jax.inference.inputs import Item

COLUMNS = (
    *("source", "frame", "score", "p_value", "alarm", "uncertainty", "boxes"),
    *("row0", "col0", "row1", "col1", "height_mm", "width_mm", "height", "width", "result"),
)
STALE = 86400  # seconds


def rows(page: dict[str, Any], item: Item) -> list[dict[str, Any]]:
    """One row of the table per frame of an item's JSON, with its first box."""
    found = []
    for frame in page["frames"]:
        first = frame["boxes"][0] if frame["boxes"] else {}
        row = {name: first[name] for name in COLUMNS if name in first}
        row |= {name: frame[name] for name in ("frame", "score", "p_value", "uncertainty")}
        row |= {"alarm": int(frame["alarm"]), "boxes": len(frame["boxes"])}
        row |= {"height": page["height"], "width": page["width"]}
        found.append(row | {"source": page["source"], "result": f"{item.output}.json"})
    return found


@contextmanager
def writer(path: Path) -> Iterator[Callable[[Item, list[dict], str], None]]:
    """What adds an item's rows to results.csv, or its error to unreadable.csv.

    Both files appear when the block is left without an error. Raises WorkdirError if they cannot
    be written.
    """
    bad = path.with_name(unreadable_name(path.name))
    parts = [p.with_name(f".{p.name}.{os.getpid()}.tmp") for p in (path, bad)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with parts[0].open("w", newline="") as one, parts[1].open("w", newline="") as two:
            scored = csv.DictWriter(one, COLUMNS)
            unreadable = csv.DictWriter(two, ("source", "reason"))
            scored.writeheader()
            unreadable.writeheader()

            def add(item: Item, found: list[dict[str, Any]], error: str) -> None:
                scored.writerows(found)
                if error:
                    unreadable.writerow({"source": item.source, "reason": error})

            yield add
        for part, whole in zip(parts, (path, bad), strict=True):
            os.replace(part, whole)
    except OSError as error:
        raise files.cannot_write(path, error) from error
    finally:
        for part in parts:
            with suppress(OSError):  # also where there is no such folder
                part.unlink()


def clean(folder: Path) -> int:
    """Delete temporary files that killed processes left in an output folder; returns how many.

    Only those of `files` and `writer` that are a day old and name no process of this machine: the
    others may be written at this moment, also where a clock jumped.
    """
    old, count = time.time() - STALE, 0
    for path in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if match is None or path.is_symlink() or not path.is_file():
            continue
        with suppress(FileNotFoundError):  # its process, or another one like this, was faster
            if path.stat().st_mtime < old and not Path("/proc", match[1]).exists():
                path.unlink()
                count += 1
    return count


def unreadable_name(table: str) -> str:
    """The name of the table of unreadable items that goes with a table of results."""
    return table.replace("results", "unreadable", 1)


def read(path: Path, most: int) -> list[dict[str, str]]:
    """The first rows of a table."""
    with path.open(newline="") as file:
        return [row for row, _ in zip(csv.DictReader(file), range(most), strict=False)]
