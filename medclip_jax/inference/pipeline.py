"""Jobs through the scorer: frames of neighbouring items share a batch, and three steps overlap.

The encoder runs in the caller's thread, what reads its tokens in a second one, and what needs no
device in a pool: thresholds, boxes and maps in the image's own frame.
"""

import collections
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Float

from medclip_jax.clip.outputs import Features
from medclip_jax.detectors.detector import Raw, finish
from medclip_jax.inference import image_results, predictor
from medclip_jax.inference.loading import Job, Loaded

CROWDED = 1 << 28  # bytes of images that wait for a whole batch

Group = list[tuple[Job, Float[np.ndarray, "s s"]]]
Read = tuple[Raw, Float[np.ndarray, "n p"]]  # scores and Grad-CAM


def run(
    model: predictor.Predictor, arriving: Iterator[Job], pool: ThreadPoolExecutor
) -> Iterator[Job]:
    """The same jobs in order, each with the marks of all its frames, done or under way.

    A batch is filled before it is encoded, unless the images that wait for it hold much memory.
    """
    size = predictor.batch_size(model)
    line: collections.deque[Job] = collections.deque()  # in order, not yet whole or behind such
    waiting: Group = []
    with ThreadPoolExecutor(1) as reader:
        reading: collections.deque[tuple[Group, Future]] = collections.deque()

        def encode(group: Group) -> None:
            tokens = predictor.encode(model, np.stack([frame for _, frame in group]))
            reading.append((group, reader.submit(_read, model, tokens, len(group))))

        def hand_out(most: int) -> None:
            while len(reading) > most:
                group, future = reading.popleft()
                _submit(model, group, future.result(), pool)

        for job in arriving:
            line.append(job)
            if job.loaded is not None:
                waiting += [(job, frame) for frame in job.loaded.fitted]
            crowded = sum(job.size() for job in line) > CROWDED
            while len(waiting) >= size or (waiting and crowded):
                encode(waiting[:size])
                del waiting[:size]
                hand_out(1)
            if crowded:
                hand_out(0)
            while line and line[0].whole():
                yield line.popleft()
        if waiting:
            encode(waiting)
        hand_out(0)
        yield from line


def _read(model: predictor.Predictor, tokens: Features, n: int) -> Read:
    return predictor.read(model, tokens, n), predictor.explain(model, tokens, n)


def _submit(model: predictor.Predictor, group: Group, read: Read, pool) -> None:
    """Hand each item's frames of a batch to the pool."""
    start = 0
    while start < len(group):
        job, end = group[start][0], start
        while end < len(group) and group[end][0] is job:
            end += 1
        part = jax.tree.map(lambda x, rows=slice(start, end): x[rows], read)
        codes = job.coded()[job.scored : job.scored + end - start]
        job.marks.append(pool.submit(_mark, model, job.read(), codes, job.scored, part))
        job.scored += end - start
        start = end


def _mark(
    model: predictor.Predictor, loaded: Loaded, codes: np.ndarray, first: int, read: Read
) -> image_results.Marks:
    raw, cams = read
    scores = finish(raw, model.calibration, [loaded.mm2] * len(raw.image))
    return image_results.mark(scores, codes, first, loaded.spacing, model.fit, cams)
