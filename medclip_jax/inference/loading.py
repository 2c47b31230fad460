"""Reading what prediction is to score, ahead of the scorer and on threads, in bounded memory."""

import collections
import hashlib
import logging
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8, UInt16

from medclip_jax.detectors import map_filter
from medclip_jax.errors import DataError
from medclip_jax.inference import inputs, predictor, results
from medclip_jax.inference.inputs import Item
from medclip_jax.io import dicom, read
from medclip_jax.io.image import Image, parse_window

LARGE = 16 << 20  # bytes; a larger file is read alone
LIMIT = 1 << 28  # bytes of images that were read and wait for the scorer
MANY = 1 << 24  # pixels; a decoded one takes up to 12 bytes while it becomes grey
one_large = threading.Lock()


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
    codes: UInt16[np.ndarray, "f h w"] | None = None  # maps, filled as frames are scored
    marks: list[Future] = field(default_factory=list)  # of marks.Marks, in order of frames
    scored: int = 0  # frames
    rows: list[dict[str, Any]] | None = None
    error: str = ""

    def read(self) -> Loaded:
        """What was read; only for items that are neither done nor refused."""
        if self.loaded is None:
            raise RuntimeError(f"{self.item.source} was not read")
        return self.loaded

    def coded(self) -> UInt16[np.ndarray, "f h w"]:
        """Its maps; filled once `marks` are done."""
        if self.codes is None:
            self.codes = np.empty(self.read().pixels.shape, np.uint16)
        return self.codes

    def whole(self) -> bool:
        return self.loaded is None or self.scored == len(self.loaded.fitted)

    def size(self) -> int:
        """Bytes that it holds."""
        if self.loaded is None:
            return 0
        return self.loaded.fitted.nbytes + 3 * self.loaded.pixels.nbytes  # codes have two bytes


class Room:
    """Memory for what was read and not yet taken: readers wait while LIMIT is passed.

    Items are taken in order, so the one that is next may always be read, however much others hold.
    """

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.held = self.taken = 0
        self.closed = False

    def enter(self, number: int) -> bool:
        """Wait for room to read the item of this number; False: it is not wanted any more."""
        with self.change:
            self.change.wait_for(lambda: self.closed or self.held < LIMIT or number <= self.taken)
            return not self.closed

    def keep(self, size: int) -> None:
        with self.change:
            self.held += size

    def take(self, size: int) -> None:
        with self.change:
            self.held -= size
            self.taken += 1
            self.change.notify_all()

    def close(self) -> None:
        with self.change:
            self.closed = True
            self.change.notify_all()


def ahead(
    pool, items: Sequence[Item], model, output: Path, stamp: str, asked
) -> Generator[Job, None, None]:
    """Items in order, read ahead on threads: enough for the next batches, or one large.

    Ends early once `asked` is set. Close it if it is not read to its end.
    """
    most, room = 2 * predictor.batch_size(model), Room()
    running: collections.deque[Future] = collections.deque()

    def read(number: int, item: Item) -> Job:
        if not room.enter(number):
            return Job(item)  # nobody waits for it
        job = load(item, model, output, stamp)
        room.keep(job.size())
        return job

    def take() -> Job:
        job = running.popleft().result()
        room.take(job.size())
        return job

    try:
        for number, item in enumerate(items):
            if asked.is_set():
                return
            large = _is_large(item)
            while running and (large or len(running) >= most):
                yield take()
            running.append(pool.submit(read, number, item))
            if large:
                yield take()
        while running and not asked.is_set():
            yield take()
    finally:
        room.close()


def _is_large(item: Item) -> bool:
    try:
        return len(item.paths) > 1 or os.path.getsize(item.paths[0]) > LARGE
    except OSError:  # reading will say what is wrong
        return False


def load(item: Item, model: predictor.Predictor, output: Path, stamp: str) -> Job:
    """Read one item, unless its finished result is there."""
    try:
        for path in item.paths:
            if not inputs.is_regular(path):
                raise DataError(f"{inputs.printable(path)} is not there or is no regular file")
        sha256 = _content(item)
        key = hashlib.sha256(f"{stamp} {sha256}".encode()).hexdigest()
        held = results.finished(output, item, key)
        if held is not None:
            return Job(item, rows=held)
        with _turn(item):
            image = _image(item, model.window)
        size, mode = model.size, model.fit
        fitted = [read.fit(frame, size, mode) for frame in image.pixels]
        if not np.isfinite(fitted).all():
            raise DataError(f"{item.source} holds NaN or infinite pixels: set them to a number")
        shown = np.stack([np.round(255 * frame).astype(np.uint8) for frame in image.pixels])
        height, width = image.pixels.shape[1:]
        mm2 = map_filter.area(image.spacing, height, width, size, mode)
        kept = Loaded(key, sha256, shown, np.stack(fitted), image.spacing, image.meta, mm2)
        return Job(item, kept)
    except (DataError, OSError, MemoryError) as error:
        return Job(item, rows=[], error=_reason(error, item))


@contextmanager
def _turn(item: Item) -> Iterator[None]:
    """Images of MANY pixels are decoded one after another: each takes far more than its file."""
    if item.kind == "image" and _pixels(item.paths[0]) > MANY:
        with one_large:
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
        with open(path, "rb") as file:
            each.append(hashlib.file_digest(file, "sha256").hexdigest())
    return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()


def _reason(error: Exception, item: Item) -> str:
    """One line without the folders of this machine."""
    said = str(error) or type(error).__name__
    for path in item.paths[:1]:
        said = said.replace(path, item.source)
    return inputs.printable(" ".join(said.split()))
