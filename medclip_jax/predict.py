"""Score what a user names: files, folders, globs, DICOM series, NIfTI volumes.

Reading, scoring and writing overlap and hold a bounded number of images: a few small ones per core,
or one volume. An item whose bytes and scorer are those of a finished result is skipped, so the same
command goes on where a stopped one stood. What cannot be read is listed, not fatal.
"""

import collections
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medclip_jax import inputs, outputs, preemption, suppress, trained
from medclip_jax.data import dicom, readers
from medclip_jax.errors import DataError
from medclip_jax.inputs import Item
from medclip_jax.outputs import Result
from medclip_jax.structs import Image

FORMAT = 1  # of the outputs; another number makes finished items anew
LARGE = 16 << 20  # bytes; a larger file is read alone
LISTED = 20  # unreadable files named on the terminal


class Loaded(NamedTuple):
    """One item, read: in its own frame for the eye, in the tower frame for the scorer."""

    key: str  # names content, scorer and settings
    sha256: str
    pixels: UInt8[np.ndarray, "f h w"]
    fitted: Float[np.ndarray, "f s s"]
    spacing: tuple[float, float] | None
    meta: dict[str, str]
    mm2: float | None = None  # area of a pixel of the tower frame


@dataclass
class Job:
    """One item on its way; `rows` is set once it is done, `error` if it cannot be."""

    item: Item
    loaded: Loaded | None = None
    scored: list[trained.Scores] = field(default_factory=list)
    rows: list[dict[str, Any]] | None = None
    error: str = ""

    def frames(self) -> int:
        return sum(len(part.score) for part in self.scored)

    def whole(self) -> bool:
        return self.loaded is None or self.frames() == len(self.loaded.fitted)


class Summary(NamedTuple):
    """What a call did."""

    scored: int
    skipped: int  # finished before
    unreadable: int
    alarms: int  # frames over the threshold
    table: Path  # results.csv


def run(
    workdir: Path,
    named: Sequence[str],
    output: Path,
    part: str = "",
    pseudonymise: bool = False,
) -> Summary:
    """Score all images that `named` names and write their results below `output`.

    part: "i/n" takes the i-th of n shares, for several processes; each writes its own table, and
    one call without it joins them. pseudonymise: no names or identifiers of the sources in any
    output, also where DICOM would have them copied.

    Raises DataError if nothing was found or nothing could be read, ConfigError for a bad `part`,
    WorkdirError if there is no scorer or the output cannot be written, Preempted on SIGTERM.
    """
    quieten()
    items = inputs.find(named, pseudonymise)
    if not items:
        raise DataError(
            f"{', '.join(named)}: no image there (PNG, JPEG, BMP, TIFF, DICOM, NIfTI): "
            "give files, folders or glob patterns"
        )
    chosen = inputs.share(items, part)
    model = trained.load(workdir)
    logging.info("%d item(s) to score with %s", len(chosen), workdir)
    stamp = hashlib.sha256(f"{FORMAT} {model.digest} {pseudonymise}".encode()).hexdigest()
    outputs.sweep(output)
    table = output / (f"results.{part.replace('/', '-of-')}.csv" if part else "results.csv")
    done = _process(model, chosen, output, stamp, table, pseudonymise)
    if done.unreadable == len(chosen) > 0:
        raise DataError(
            f"none of the {len(chosen)} item(s) could be read: {table.parent}/"
            f"{outputs.unreadable_name(table.name)} says why"
        )
    return done


def _process(model, chosen, output, stamp, table, pseudonymise) -> Summary:
    """Stream the items through readers, scorer and writers, in order."""
    counts = collections.Counter()
    bar = Progress(
        TextColumn("predict"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    cores = os.cpu_count() or 1
    readers_pool, writers_pool = ThreadPoolExecutor(cores), ThreadPoolExecutor(cores)
    try:
        with outputs.tables(table) as tell, preemption.notice() as asked, bar:
            shown = bar.add_task("predict", total=len(chosen), rate="")
            arriving = _read(readers_pool, chosen, model, output, stamp, asked)
            writing: collections.deque[tuple[Job, Future]] = collections.deque()

            def settle(most: int) -> None:
                while len(writing) > most:
                    job, future = writing.popleft()
                    rows = job.rows if future is None else future.result()
                    tell(job.item, rows, job.error)
                    kind = "unreadable" if job.error else "skipped" if future is None else "scored"
                    counts[kind] += 1
                    counts["alarms"] += sum(row["alarm"] for row in rows)
                    bar.advance(shown)
                    speed = bar.tasks[0].speed
                    bar.update(shown, rate=f"{speed:.1f}/s" if speed else "")

            for job in _score(model, arriving):
                future = None
                if not job.error and job.rows is None:
                    future = writers_pool.submit(_write, model, job, output, pseudonymise)
                writing.append((job, future))
                settle(2 * cores)
            settle(0)
            if asked.is_set():
                at = sum(counts[kind] for kind in ("scored", "skipped", "unreadable"))
                raise preemption.Preempted(f"stopped by SIGTERM after {at} of {len(chosen)} items")
    finally:
        for pool in (readers_pool, writers_pool):
            pool.shutdown(wait=True, cancel_futures=True)
    _tell_unreadable(counts["unreadable"], table)
    return Summary(*(counts[name] for name in Summary._fields[:-1]), table)


def _read(pool, items: Sequence[Item], model, output: Path, stamp: str, asked) -> Iterator[Job]:
    """Items in order, read ahead on threads: a few small ones, or one large."""
    ahead = 2 * (os.cpu_count() or 1)
    running: collections.deque[Future] = collections.deque()
    for item in items:
        if asked.is_set():
            return
        large = _is_large(item)
        while running and (large or len(running) >= ahead):
            yield running.popleft().result()
        running.append(pool.submit(_load, item, model, output, stamp))
        if large:
            yield running.popleft().result()
    while running and not asked.is_set():
        yield running.popleft().result()


def _is_large(item: Item) -> bool:
    try:
        return len(item.paths) > 1 or os.path.getsize(item.paths[0]) > LARGE
    except OSError:  # reading will say what is wrong
        return False


def _load(item: Item, model: trained.Trained, output: Path, stamp: str) -> Job:
    """Read one item, unless its finished result is there."""
    try:
        for path in item.paths:
            if not inputs.is_regular(path):
                raise DataError(f"{inputs.printable(path)} is not there or is no regular file")
        sha256 = _content(item)
        key = hashlib.sha256(f"{stamp} {sha256}".encode()).hexdigest()
        held = outputs.finished(output, item, key)
        if held is not None:
            return Job(item, rows=held)
        image = _image(item)
        size, mode = model.bank.clip.size, model.config.data.fit
        fitted = [readers.fit(frame, size, mode) for frame in image.pixels]
        if not np.isfinite(fitted).all():
            raise DataError(f"{item.source} holds NaN or infinite pixels: set them to a number")
        shown = np.stack([np.round(255 * frame).astype(np.uint8) for frame in image.pixels])
        mm2 = suppress.area(image.spacing, *image.pixels.shape[1:], size, mode)
        kept = Loaded(key, sha256, shown, np.stack(fitted), image.spacing, image.meta, mm2)
        return Job(item, kept)
    except (DataError, OSError, MemoryError) as error:
        return Job(item, rows=[], error=_reason(error, item))


def _image(item: Item) -> Image:
    if len(item.paths) > 1:
        return dicom.read_slices([Path(p) for p in item.paths], Path(item.paths[0]).parent)
    return readers.read(Path(item.paths[0]))


def _content(item: Item) -> str:
    """SHA-256 of the bytes of one file, or of the hashes of a series' files in order."""
    each = []
    for path in item.paths:
        with open(path, "rb") as file:
            each.append(hashlib.file_digest(file, "sha256").hexdigest())
    return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()


def _score(model: trained.Trained, arriving: Iterator[Job]) -> Iterator[Job]:
    """The same jobs in order, scored; frames of neighbouring items share a batch."""
    size = trained.batch_size(model)
    line: collections.deque[Job] = collections.deque()  # in order, not yet whole or behind such
    waiting: list[tuple[Job, Float[np.ndarray, "s s"]]] = []

    def flush(least: int) -> None:
        while len(waiting) >= least and waiting:
            group = waiting[:size]
            del waiting[:size]
            mm2 = [job.loaded.mm2 for job, _ in group]
            scores = trained.score(model, np.stack([frame for _, frame in group]), mm2)
            scores = scores._replace(maps=outputs.half(scores.maps))
            start = 0
            while start < len(group):
                job, end = group[start][0], start
                while end < len(group) and group[end][0] is job:
                    end += 1
                job.scored.append(trained.Scores(*(column[start:end] for column in scores)))
                start = end

    for job in arriving:
        line.append(job)
        if job.loaded is not None:
            waiting += [(job, frame) for frame in job.loaded.fitted]
        flush(size)
        while line and line[0].whole():
            yield line.popleft()
    flush(1)
    yield from line


def _write(model: trained.Trained, job: Job, output: Path, pseudonymise: bool) -> list[dict]:
    loaded = job.loaded
    columns = trained.Scores(*(np.concatenate(x) for x in zip(*job.scored, strict=True)))
    result = Result(
        loaded.key,
        loaded.sha256,
        loaded.pixels,
        loaded.spacing,
        loaded.meta,
        columns,
        model.config.data.fit,
        {
            "scorer": model.digest,
            "checkpoint": model.bank.clip.digest,
            "method": model.config.method,
            "alpha_requested": model.limits.image.alpha_requested,
            "alpha_attained": model.limits.image.alpha_attained,
        },
    )
    return outputs.write(output, job.item, result, pseudonymise)


def _reason(error: Exception, item: Item) -> str:
    """One line without the folders of this machine."""
    said = str(error) or type(error).__name__
    for path in item.paths[:1]:
        said = said.replace(path, item.source)
    return inputs.printable(" ".join(said.split()))


def _tell_unreadable(count: int, table: Path) -> None:
    if not count:
        return
    path = table.parent / outputs.unreadable_name(table.name)
    lines = outputs.read_table(path, LISTED)
    logging.warning("%d item(s) could not be read (all in %s):", count, path)
    for row in lines:
        logging.warning("  %s: %s", row["source"], row["reason"])


def quieten() -> None:
    """Silence libraries that quote header values, which may name a patient, in their warnings."""
    for name in ("pydicom", "highdicom", "nibabel", "PIL"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module=rf"{name}(\..*)?")
