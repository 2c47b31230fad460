"""Score files, folders, globs, DICOM series and NIfTI volumes; write results and two tables.

Reading, scoring and writing overlap and hold a bounded number of images: a few small ones per core,
or one volume. An item with the bytes and detector of a finished result is skipped, so the same
command resumes a stopped one. What cannot be read is listed, not fatal.
"""

import collections
import csv
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple

from medclip_jax import files
from medclip_jax.distributed import runtime
from medclip_jax.errors import DataError, Preempted, printable
from medclip_jax.inference import inputs, loading, pipeline, pseudonyms, results
from medclip_jax.inference.inputs import Item
from medclip_jax.inference.loading import Job
from medclip_jax.inference.predictor import Predictor, batch_size
from medclip_jax.inference.results import Outcome, Privacy
from medclip_jax.io import dicom_write

FORMAT = 6  # of the outputs; with another number finished items are scored again
PENDING = 1 << 28  # bytes of items whose results are being written, if there are several
LISTED = 20  # unreadable files named on the terminal


# reads, scores and writes items below a folder, in order, until the event is set
Score = Callable[[Sequence[Item], Path, Privacy, threading.Event], Generator[Outcome, None, None]]


class Summary(NamedTuple):
    """What a call did."""

    scored: int
    skipped: int  # finished before
    unreadable: int
    alarms: int  # frames over the threshold
    table: Path  # results.csv


def in_process(predictor: Predictor, cam: bool = False, boxes_of_passed: bool = False) -> Score:
    """Scoring in this process; cam: also write the Grad-CAM of each item."""
    predictor = predictor if cam else predictor._replace(explanation=None)
    return partial(_stream, predictor._replace(boxes_of_passed=boxes_of_passed))


def run(
    score: Score,
    items: Sequence[Item],
    output: Path,
    part: str = "",
    pseudonymise: bool = False,
    burned_in: bool = False,
) -> Summary:
    """Score items and write their results below `output`.

    Args:
        score: where: `in_process`, or on the workers of `ray_engine`.
        items: as `inputs.find` names them.
        part: "i/n" takes the i-th of n shares, for several processes; each writes its own table,
            and one call without it joins them.
        pseudonymise: no names or identifiers of the sources in any output, on the terminal or in
            logs, also where DICOM would have them copied; pseudonyms are of the output folder.
        burned_in: pseudonymised pictures also of sources that say they have text in their pixels.

    Raises DataError if nothing could be read, ConfigError for a bad `part`, WorkdirError if the
    output cannot be written, Preempted on SIGTERM.
    """
    dicom_write.quieten()
    items = inputs.share(items, part)
    privacy = Privacy(pseudonyms.salt_of(output) if pseudonymise else None, burned_in)
    if privacy.salt is None:
        return _run(score, items, output, part, privacy)
    items = pseudonyms.rename(items, privacy.salt)
    with pseudonyms.nameless_log(items):
        return _run(score, items, output, part, privacy)


def _run(score: Score, items: Sequence[Item], output: Path, part: str, privacy: Privacy) -> Summary:
    results.refuse_others(output, items)
    logging.info("%d item(s) to score", len(items))
    files.sweep(output)
    share = f".{part.replace('/', '-of-')}" if part else ""
    table, bad = output / f"results{share}.csv", output / f"unreadable{share}.csv"
    counts: collections.Counter[str] = collections.Counter()
    reasons: list[str] = []
    notes: dict[str, list[str]] = collections.defaultdict(list)  # sources by note
    with _open_tables(table, bad) as add, runtime.sigterm() as stop:
        with closing(score(items, output, privacy, stop)) as stream:
            for item, rows, error, own, scored in runtime.progress(stream, "predict", len(items)):
                if privacy.salt and error:
                    error = pseudonyms.without_names(error, item.paths, item.source)
                add(item, rows, error)
                for note in own:
                    notes[note].append(item.source)
                counts["unreadable" if error else "scored" if scored else "skipped"] += 1
                counts["alarms"] += sum(row["alarm"] for row in rows)
                if error and len(reasons) < LISTED:
                    reasons.append(f"{item.source}: {error}")
        if stop.is_set():
            done = counts.total() - counts["alarms"]
            raise Preempted(f"stopped by SIGTERM after {done} of {len(items)} items")
    if reasons:
        text = "%d item(s) could not be read, or are no images (all in %s):"
        logging.warning(text, counts["unreadable"], bad)
        for reason in reasons:
            logging.warning("  %s", reason)
    for note, sources in notes.items():
        logging.warning("%s: %d item(s), the first is %s", note, len(sources), sources[0])
    if counts["unreadable"] == len(items) > 0:
        raise DataError(f"none of the {len(items)} item(s) could be read: {bad} says why")
    scored, skipped, unreadable, alarms = (counts[name] for name in Summary._fields[:4])
    return Summary(scored, skipped, unreadable, alarms, table)


def _stream(
    predictor: Predictor,
    items: Sequence[Item],
    output: Path,
    privacy: Privacy,
    stop: threading.Event,
) -> Generator[Outcome, None, None]:
    """Read, score and write items on threads."""
    how = predictor.explanation, predictor.boxes_of_passed
    settings = f"{FORMAT} {predictor.digest} {privacy} {how}"
    stamp = hashlib.sha256(settings.encode()).hexdigest()
    size = batch_size(predictor)
    load = partial(loading.load, predictor=predictor, output=output, stamp=stamp)
    objects = dicom_write.builder(sum(item.kind == "dicom" for item in items))
    # threads end first: they wait for objects
    with objects as build, _threads(1) as readers, _threads(2) as writers:
        write = partial(_write, predictor, output, privacy, build, results.numbered(output))
        weigh = partial(loading.weight, map_bytes=2 * predictor.size**2)
        reading = pipeline.read_ahead(readers, items, load, 2 * size, stop, weigh)
        with closing(reading):
            jobs = pipeline.score(predictor, reading, writers)
            # so many that the encoder does not wait for writers
            for job, rows in _written(jobs, writers, write, 4 * size):
                yield Outcome(job.item, rows, job.error, job.notes, job.rows is None)


def _written(
    jobs: Iterable[Job | None], pool: ThreadPoolExecutor, write: Callable, most: int
) -> Iterator[tuple[Job, list[dict]]]:
    """Hand jobs to `write` on threads; yields them, in order, with their rows.

    At None all jobs are written, and their memory is free, before the next one is asked for.
    """
    writing: collections.deque[tuple[Job, Future]] = collections.deque()

    def crowded() -> bool:
        return len(writing) > most or sum(job.size() for job, _ in writing) > PENDING

    for new in jobs:
        if new is not None:
            writing.append((new, pool.submit(write, new)))
        while writing and (new is None or writing[0][1].done() or crowded()):
            job, future = writing.popleft()
            yield job, future.result()
            if new is None:
                job.forget()
    for job, future in writing:
        yield job, future.result()


@contextmanager
def _threads(per_core: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(per_core * (os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write(
    predictor: Predictor,
    output: Path,
    privacy: Privacy,
    build: dicom_write.Build,
    earlier: Mapping[str, Sequence[str]],
    job: Job,
) -> list[dict]:
    """Write what was scored; the rows of the table. An input that vanished has an error instead.

    Of an item with an error no earlier result stays.
    """
    if job.rows is None and not job.error:  # else it was finished, or a frame could not be made
        try:
            return _write_scored(predictor, output, privacy, build, earlier, job)
        except (DataError, OSError, MemoryError) as error:  # of the output it is a WorkdirError
            job.error = loading.reason(error, job.item)
    if job.error:
        results.remove_results(output, job.item, earlier)
    return job.rows or []


def _write_scored(predictor, output, privacy, build, earlier, job: Job) -> list[dict]:
    image = predictor.calibration.image
    model = {
        "scorer": predictor.digest,
        "checkpoint": predictor.about["checkpoint"],
        "method": predictor.about["method"],
        "alpha_requested": image.alpha_requested,
        "alpha_attained": image.alpha_attained,
    }
    parts = [future.result() for future in job.parts]  # submitted to the same pool, but before
    loaded = job.content()
    fit = predictor.fit
    with loading.in_turn(loading.one_drawn, loaded.codes[0].size):
        how = fit, model, privacy, build, earlier
        rows, job.notes = results.write(output, job.item, loaded, parts, *how)
    return rows


@contextmanager
def _open_tables(table: Path, bad: Path) -> Iterator[Callable[[Item, list[dict], str], None]]:
    """What adds an item's rows to results.csv, or its error to unreadable.csv.

    Both files appear when the block is left without an error. Raises WorkdirError if they cannot
    be written.
    """
    with files.writing(table) as one, files.writing(bad) as two:
        texts = [TextIOWrapper(f, "utf-8", newline="", write_through=True) for f in (one, two)]
        scored = csv.DictWriter(texts[0], results.COLUMNS)
        unreadable = csv.DictWriter(texts[1], ("source", "reason"))
        scored.writeheader()
        unreadable.writeheader()

        def add(item: Item, rows: list[dict], error: str) -> None:
            scored.writerows(rows)
            if error:
                unreadable.writerow({"source": item.source, "reason": printable(error)})

        yield add
