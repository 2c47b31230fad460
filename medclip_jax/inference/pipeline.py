"""Items through reading and scoring, in order, overlapped and in bounded memory.

Threads of a pool read ahead; the encoder runs in the caller's thread on batches that neighbouring
items share; the detector runs in a second thread; and what needs no device (thresholds, boxes,
maps in the image's own frame) goes back to a pool.
"""

import collections
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Float

from medclip_jax.clip.layers import Features
from medclip_jax.detectors.detector import Raw, finish
from medclip_jax.distributed import runtime
from medclip_jax.inference import predictor as predictors
from medclip_jax.inference.inputs import Item
from medclip_jax.inference.loading import Job, fit, in_turn, one_drawn, reason
from medclip_jax.inference.predictor import Loaded, Predictor

LARGE_FILE = 16 << 20  # bytes; a larger file is read alone
READ_AHEAD = 1 << 28  # bytes of images that were read and wait for the encoder or a whole batch
HEAVY = 1 << 27  # bytes; what takes more is in memory alone


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
    pool,
    items: Sequence[Item],
    read: Callable[[Item], Job],
    most: int,
    stop: threading.Event,
    weigh: Callable[[Item], int] = lambda item: 0,
) -> Generator[Job | None, None, None]:
    """read(item) of the items in order, on threads of the pool: `most` at a time, or one large.

    An item that weighs more than HEAVY bytes is in memory alone: None comes before and after it,
    for the caller to finish and forget all jobs it has.
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
            heavy = weigh(item) > HEAVY
            large = heavy or _is_large(item)
            while running and (large or len(running) >= most):
                yield take()
            if heavy:
                yield None
            running.append(pool.submit(enter, number, item))
            if large:
                yield take()
            if heavy:
                yield None
                runtime.trim()
        while running and not stop.is_set():
            yield take()
    finally:
        room.close()


def _is_large(item: Item) -> bool:
    try:
        return len(item.paths) > 1 or os.path.getsize(item.paths[0]) > LARGE_FILE
    except OSError:  # reading will say what is wrong
        return False


Group = list[tuple[Job, int]]  # frames by their numbers
Read = tuple[Raw, Float[np.ndarray, "n p"]]  # scores and Grad-CAM


def score(
    predictor: Predictor, arriving: Iterator[Job | None], pool: ThreadPoolExecutor
) -> Iterator[Job | None]:
    """The same jobs in order, each with the parts of all its frames, done or under way.

    A batch is filled before it is encoded, unless the images that wait for it take much memory, or
    None comes, which is passed on after all jobs before it.
    """
    size = predictors.batch_size(predictor)
    line: collections.deque[Job] = collections.deque()  # in order, not yet scored or behind such
    waiting: collections.deque[tuple[Job, int]] = collections.deque()
    with ThreadPoolExecutor(1) as device:
        running: collections.deque[tuple[Group, Future]] = collections.deque()

        def encode() -> None:
            group = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            frames = list(pool.map(lambda place: _frame(predictor, *place), group))
            tokens = predictors.encode(predictor, np.stack(frames))
            running.append((group, device.submit(_read, predictor, tokens, len(group))))

        def hand_out(most: int) -> None:
            while len(running) > most:
                group, future = running.popleft()
                _submit(predictor, group, future.result(), pool)

        for job in arriving:
            if job is not None:
                line.append(job)
                if job.loaded is not None:
                    waiting.extend((job, number) for number in range(job.loaded.frames.shape[0]))
            crowded = job is None or sum(job.size() for job in line) > READ_AHEAD
            while len(waiting) >= size or (waiting and crowded):
                encode()
                hand_out(1)
            if crowded:
                hand_out(0)
            while line and line[0].is_scored():
                yield line.popleft()
            if job is None:
                yield None
        if waiting:
            encode()
        hand_out(0)
        yield from line


def _frame(predictor: Predictor, job: Job, number: int) -> Float[np.ndarray, "v s s"]:
    """A frame as the encoder sees it; black, and an error of its item, where it cannot be made."""
    try:
        return fit(predictor, job, number)
    except Exception as error:  # decoders raise anything, and files vanish
        job.error = job.error or reason(error, job.item)
        return predictors.frame(predictor, np.zeros((2, 2), np.float32))


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


def _part(predictor: Predictor, loaded: Loaded, first: int, read: Read) -> predictors.Part:
    raw, cams = read
    scores = finish(raw, predictor.calibration, [loaded.mm2] * len(raw.image))
    codes = loaded.codes[first : first + len(raw.image)]
    spacing, keep = loaded.frames.spacing, loaded.keep_maps
    with in_turn(one_drawn, codes[0].size):
        how = cams, keep, predictor.boxes_of_passed
        return predictors.part(scores, codes, first, spacing, predictor.fit, *how)
