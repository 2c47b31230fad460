"""Items through reading and scoring, in order, overlapped and in bounded memory.

Threads of a pool read ahead; the encoder runs in the caller's thread on batches that neighbouring
items share; the detector runs in a second thread; and what needs no device (thresholds, boxes,
maps in the image's own frame) goes back to a pool.
"""

import collections
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float

from medclip_jax import files
from medclip_jax.clip.outputs import Features
from medclip_jax.detectors.detector import Raw, finish
from medclip_jax.errors import DataError
from medclip_jax.inference import inputs, results
from medclip_jax.inference import predictor as predictors
from medclip_jax.inference.inputs import Item
from medclip_jax.inference.predictor import Predictor
from medclip_jax.inference.results import Loaded
from medclip_jax.io import dicom, read
from medclip_jax.io.image import Image, parse_window
from medclip_jax.io.resize import pixel_area

LARGE_FILE = 16 << 20  # bytes; a larger file is read alone
READ_AHEAD = 1 << 28  # bytes of images that were read and wait for the encoder or a whole batch
LARGE_IMAGE = 1 << 24  # pixels; a decoded one takes up to 12 bytes while it becomes grey
one_large_image = threading.Lock()


@dataclass
class Job:
    """One item on its way; `rows` is set once it is finished, `error` if it cannot be read."""

    item: Item
    loaded: Loaded | None = None
    parts: list[Future] = field(default_factory=list)  # of results.Part, in order of frames
    scored: int = 0  # frames
    rows: list[dict[str, Any]] | None = None
    error: str = ""
    notes: list[str] = field(default_factory=list)  # on outputs that are missing

    def content(self) -> Loaded:
        """What was read; only for items that are neither finished nor refused."""
        if self.loaded is None:
            raise RuntimeError(f"{self.item.source} was not read")
        return self.loaded

    def is_scored(self) -> bool:
        """Whether all frames, if there are any, are with the detector or past it."""
        return self.loaded is None or self.scored == len(self.loaded.fitted)

    def size(self) -> int:
        """Bytes in memory."""
        if self.loaded is None:
            return 0
        return self.loaded.fitted.nbytes + 3 * self.loaded.pixels.nbytes  # codes have two bytes


class ReadAhead:
    """Memory for what was read and not yet taken: readers wait while READ_AHEAD is passed.

    Items are taken in order, so the next one may always be read, however much others hold.
    """

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.bytes = self.taken = 0
        self.closed = False

    def enter(self, number: int) -> bool:
        """Wait for room to read the item of this number; False: nobody waits for it any more."""
        with self.change:
            self.change.wait_for(
                lambda: self.closed or self.bytes < READ_AHEAD or number <= self.taken
            )
            return not self.closed

    def add(self, size: int) -> None:
        with self.change:
            self.bytes += size

    def take(self, size: int) -> None:
        with self.change:
            self.bytes -= size
            self.taken += 1
            self.change.notify_all()

    def close(self) -> None:
        with self.change:
            self.closed = True
            self.change.notify_all()


def read_ahead(
    pool, items: Sequence[Item], read: Callable[[Item], Job], most: int, stop: threading.Event
) -> Generator[Job, None, None]:
    """read(item) of the items in order, on threads of the pool: `most` at a time, or one large.

    Ends early once `stop` is set. Close it if it is not read to its end.
    """
    room = ReadAhead()
    running: collections.deque[Future] = collections.deque()

    def enter(number: int, item: Item) -> Job:
        if not room.enter(number):
            return Job(item)  # nobody waits for it
        job = read(item)
        room.add(job.size())
        return job

    def take() -> Job:
        job = running.popleft().result()
        room.take(job.size())
        return job

    try:
        for number, item in enumerate(items):
            if stop.is_set():
                return
            large = _is_large(item)
            while running and (large or len(running) >= most):
                yield take()
            running.append(pool.submit(enter, number, item))
            if large:
                yield take()
        while running and not stop.is_set():
            yield take()
    finally:
        room.close()


def _is_large(item: Item) -> bool:
    try:
        return len(item.paths) > 1 or os.path.getsize(item.paths[0]) > LARGE_FILE
    except OSError:  # reading will say what is wrong
        return False


def load(item: Item, predictor: Predictor, output: Path, stamp: str) -> Job:
    """Read one item, unless its finished result is there. One that cannot be read has an error."""
    if item.error:
        return Job(item, rows=[], error=item.error)
    try:
        for path in item.paths:
            if not inputs.is_regular(path):
                raise DataError(f"{path} is not there or is no regular file")
        sha256 = _content(item)
        key = hashlib.sha256(f"{stamp} {sha256}".encode()).hexdigest()
        rows = results.finished(output, item, key)
        if rows is not None:
            return Job(item, rows=rows)
        with _in_turn(item):
            image = _image(item, predictor.window)
        fitted = np.stack([read.fit(x, predictor.size, predictor.fit) for x in image.pixels])
        if not np.isfinite(fitted).all():
            raise DataError(f"{item.source} holds NaN or infinite pixels: set them to a number")
        shown = np.stack([np.round(255 * frame).astype(np.uint8) for frame in image.pixels])
        mm2 = pixel_area(image.spacing, image.pixels.shape[1:], predictor.size, predictor.fit)
        codes = np.empty(shown.shape, np.uint16)
        return Job(item, Loaded(key, sha256, shown, fitted, image.spacing, image.meta, mm2, codes))
    except Exception as error:  # decoders raise anything: one bad item is one line
        return Job(item, rows=[], error=reason(error, item))


@contextmanager
def _in_turn(item: Item) -> Iterator[None]:
    """Large images are decoded one after another: each takes far more than its file."""
    if item.kind == "image" and _pixels(item.paths[0]) > LARGE_IMAGE:
        with one_large_image:
            yield
    else:
        yield


def _pixels(path: str) -> int:
    """What the header of an image says; 0 where it cannot be read, of which reading says why."""
    try:
        with PIL.Image.open(path) as image:  # decodes nothing
            return image.width * image.height
    except Exception as error:  # a decoder fed hostile bytes may throw anything
        logging.debug("no size of %s (%s)", path, type(error).__name__)
        return 0


def _image(item: Item, window: str) -> Image:
    paths = [Path(p) for p in item.paths]
    if len(paths) > 1:
        return dicom.read_slices(paths, paths[0].parent, parse_window(window))
    return read.read(paths[0], window=window)


def _content(item: Item) -> str:
    """SHA-256 of the bytes of one file, or of the hashes of a series' files in order."""
    each = []
    for path in item.paths:
        each.append(files.sha256_of(path))
    return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()


def reason(error: Exception, item: Item) -> str:
    """Why an item has no result: one line without the folders of this machine."""
    if isinstance(error, OSError):
        message = f"{item.source} cannot be read ({error.strerror or type(error).__name__})"
    elif isinstance(error, MemoryError):
        message = f"{item.source} needs more memory than there is"
    elif isinstance(error, DataError):
        message = str(error)
    else:  # its text may quote anything
        message = f"{item.source} cannot be read ({type(error).__name__}): it is damaged"
    for path, name in zip(item.paths, item.names or [item.source] * len(item.paths), strict=True):
        message = message.replace(path, name)
    folder = os.path.dirname(item.paths[0])
    message = message.replace(folder, item.source) if len(folder) > 1 else message
    return inputs.printable(" ".join(message.split()))


Group = list[tuple[Job, Float[np.ndarray, "s s"]]]
Read = tuple[Raw, Float[np.ndarray, "n p"]]  # scores and Grad-CAM


def score(predictor: Predictor, arriving: Iterator[Job], pool: ThreadPoolExecutor) -> Iterator[Job]:
    """The same jobs in order, each with the parts of all its frames, done or under way.

    A batch is filled before it is encoded, unless the images that wait for it take much memory.
    """
    size = predictors.batch_size(predictor)
    line: collections.deque[Job] = collections.deque()  # in order, not yet scored or behind such
    waiting: Group = []
    with ThreadPoolExecutor(1) as device:
        running: collections.deque[tuple[Group, Future]] = collections.deque()

        def encode(group: Group) -> None:
            tokens = predictors.encode(predictor, np.stack([frame for _, frame in group]))
            running.append((group, device.submit(_read, predictor, tokens, len(group))))

        def hand_out(most: int) -> None:
            while len(running) > most:
                group, future = running.popleft()
                _submit(predictor, group, future.result(), pool)

        for job in arriving:
            line.append(job)
            if job.loaded is not None:
                waiting += [(job, frame) for frame in job.loaded.fitted]
            crowded = sum(job.size() for job in line) > READ_AHEAD
            while len(waiting) >= size or (waiting and crowded):
                encode(waiting[:size])
                del waiting[:size]
                hand_out(1)
            if crowded:
                hand_out(0)
            while line and line[0].is_scored():
                yield line.popleft()
        if waiting:
            encode(waiting)
        hand_out(0)
        yield from line


def _read(predictor: Predictor, tokens: Features, n: int) -> Read:
    return predictors.read(predictor, tokens, n), predictors.explain(predictor, tokens, n)


def _submit(predictor: Predictor, group: Group, read: Read, pool: ThreadPoolExecutor) -> None:
    """Hand each item's frames of a batch to the pool."""
    start = 0
    while start < len(group):
        job, end = group[start][0], start
        while end < len(group) and group[end][0] is job:
            end += 1
        own = jax.tree.map(lambda x, rows=slice(start, end): x[rows], read)
        job.parts.append(pool.submit(_part, predictor, job.content(), job.scored, own))
        job.scored += end - start
        start = end


def _part(predictor: Predictor, loaded: Loaded, first: int, read: Read) -> results.Part:
    raw, cams = read
    scores = finish(raw, predictor.calibration, [loaded.mm2] * len(raw.image))
    codes = loaded.codes[first : first + len(raw.image)]
    return results.part(scores, codes, first, loaded.spacing, predictor.fit, cams)
