"""Score what a user names: files, folders, globs, DICOM series, NIfTI volumes.

Reading, scoring and writing overlap and hold a bounded number of images: a few small ones per core,
or one volume. An item whose bytes and scorer are those of a finished result is skipped, so the same
command resumes where a stopped one stood. What cannot be read is listed, not fatal.
"""

import collections
import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from medclip_jax.distributed import runtime
from medclip_jax.errors import DataError
from medclip_jax.inference import inputs, pipeline, results, tables
from medclip_jax.inference.pipeline import Job
from medclip_jax.inference.predictor import Predictor, batch_size
from medclip_jax.inference.results import Result
from medclip_jax.io import dicom_write

FORMAT = 3  # of the outputs; with another number finished items are scored again
PENDING = 1 << 28  # bytes of items whose results are being written, if there are several
LISTED = 20  # unreadable files named on the terminal


class Summary(NamedTuple):
    """What a call did."""

    scored: int
    skipped: int  # finished before
    unreadable: int
    alarms: int  # frames over the threshold
    table: Path  # results.csv


def run(
    model: Predictor,
    named: Sequence[str],
    output: Path,
    part: str = "",
    pseudonymise: bool = False,
    cam: bool = False,
) -> Summary:
    """Score all images that `named` names and write their results below `output`.

    part: "i/n" takes the i-th of n shares, for several processes; each writes its own table, and
    one call without it joins them. pseudonymise: no names or identifiers of the sources in any
    output, also where DICOM would have them copied. cam: also write the Grad-CAM of each item.

    Raises DataError if nothing was found or nothing could be read, ConfigError for a bad `part`,
    WorkdirError if there is no scorer or the output cannot be written, Preempted on SIGTERM.
    """
    dicom_write.quieten()
    items = inputs.find(named, pseudonymise)
    if not items:
        raise DataError(
            f"{', '.join(named)}: no image there (PNG, JPEG, BMP, TIFF, DICOM, NIfTI): "
            "give files, folders or glob patterns"
        )
    items = inputs.share(items, part)
    logging.info("%d item(s) to score", len(items))
    model = model if cam else model._replace(explanation=None)
    settings = f"{FORMAT} {model.digest} {pseudonymise} {model.explanation}"
    stamp = hashlib.sha256(settings.encode()).hexdigest()
    tables.clean(output)
    table = output / (f"results.{part.replace('/', '-of-')}.csv" if part else "results.csv")
    done = _process(model, items, output, stamp, table, pseudonymise)
    if done.unreadable == len(items) > 0:
        raise DataError(
            f"none of the {len(items)} item(s) could be read: {table.parent}/"
            f"{tables.unreadable_name(table.name)} says why"
        )
    return done


def _process(model, items, output, stamp, table, pseudonymise) -> Summary:
    """Stream the items through readers, scorer and writers, in order."""
    counts: collections.Counter[str] = collections.Counter()
    bar = Progress(
        TextColumn("predict"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    most = 4 * batch_size(model)  # so that the encoder does not wait for writers
    objects = dicom_write.builder(sum(item.kind == "dicom" for item in items))
    with objects as build, _threads() as pools:  # threads end first: they wait for objects
        with tables.writer(table) as add, runtime.sigterm() as stop, bar:
            shown = bar.add_task("predict", total=len(items))
            load = partial(pipeline.load, model=model, output=output, stamp=stamp)
            reading = pipeline.read_ahead(pools[0], items, load, 2 * batch_size(model), stop)
            writing: collections.deque[tuple[Job, Future | None]] = collections.deque()

            def full(most: int) -> bool:
                return len(writing) > most or sum(job.size() for job, _ in writing) > PENDING

            def settle(most: int) -> None:
                while writing and (full(most) or writing[0][1] is None or writing[0][1].done()):
                    job, future = writing.popleft()
                    rows = (job.rows or []) if future is None else future.result()
                    add(job.item, rows, job.error)
                    kind = "unreadable" if job.error else "skipped" if future is None else "scored"
                    counts[kind] += 1
                    counts["alarms"] += sum(row["alarm"] for row in rows)
                    bar.advance(shown)

            with contextlib.closing(reading):
                for job in pipeline.score(model, reading, pools[1]):
                    future = None
                    if not job.error and job.rows is None:
                        future = pools[1].submit(_write, model, job, output, pseudonymise, build)
                    writing.append((job, future))
                    settle(most)
                settle(0)
            if stop.is_set():
                at = sum(counts[kind] for kind in ("scored", "skipped", "unreadable"))
                raise runtime.Preempted(f"stopped by SIGTERM after {at} of {len(items)} items")
    _warn_unreadable(counts["unreadable"], table)
    return Summary(
        *(counts["scored"], counts["skipped"], counts["unreadable"], counts["alarms"]), table
    )


@contextlib.contextmanager
def _threads() -> Iterator[list[ThreadPoolExecutor]]:
    """Readers and writers."""
    pools = [ThreadPoolExecutor(n * (os.cpu_count() or 1)) for n in (1, 2)]
    try:
        yield pools
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def _write(
    model: Predictor, job: Job, output: Path, pseudonymise: bool, build: dicom_write.Build
) -> list[dict]:
    loaded = job.read()
    result = Result(
        loaded.key,
        loaded.sha256,
        loaded.pixels,
        loaded.spacing,
        loaded.meta,
        [future.result() for future in job.parts],  # submitted to the same pool, but before
        job.coded(),
        model.fit,
        {
            "scorer": model.digest,
            "checkpoint": model.about["checkpoint"],
            "method": model.about["method"],
            "alpha_requested": model.calibration.image.alpha_requested,
            "alpha_attained": model.calibration.image.alpha_attained,
        },
    )
    return results.write(output, job.item, result, pseudonymise, build)


def _warn_unreadable(count: int, table: Path) -> None:
    if not count:
        return
    path = table.parent / tables.unreadable_name(table.name)
    lines = tables.read(path, LISTED)
    logging.warning("%d item(s) could not be read (all in %s):", count, path)
    for row in lines:
        logging.warning("  %s: %s", row["source"], row["reason"])
