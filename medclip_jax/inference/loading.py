"""Opening one item: what it weighs by its header, its frames, and the errors of what is broken."""

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from medclip_jax import files
from medclip_jax.errors import DataError
from medclip_jax.inference import inputs, results
from medclip_jax.inference import predictor as predictors
from medclip_jax.inference.inputs import Item
from medclip_jax.inference.predictor import Loaded, Predictor
from medclip_jax.io import dicom, dicom_header, image, nifti_header, read
from medclip_jax.io.image import Frames, parse_window
from medclip_jax.io.read import pixel_area

LARGE_IMAGE = 12_000_000  # pixels; larger ones are decoded, and drawn, one after another
PER_PIXEL = 16  # bytes of one frame while it is decoded, scored and drawn
FITTED = 16  # frames that are brought to the encoder frame while an item is read
MAX_MAPS = 1 << 29  # bytes of an item's maps
MIN_SIDE = 8  # pixels of the frames of an item that has several: each costs a run of the encoder
one_decoded, one_drawn = threading.Lock(), threading.Lock()


@contextmanager
def in_turn(lock: threading.Lock, pixels: int) -> Iterator[None]:
    """Under the lock, if a frame has so many pixels."""
    if pixels > LARGE_IMAGE:
        with lock:
            yield
    else:
        yield


@dataclass
class Job:
    """One item on its way; `rows` is set once it is finished, `error` if it cannot be read."""

    item: Item
    loaded: Loaded | None = None
    parts: list[Future] = field(default_factory=list)  # of scored.Part, in order of frames
    scored: int = 0  # frames
    rows: list[dict[str, Any]] | None = None
    error: str = ""
    notes: list[str] = field(default_factory=list)  # on outputs that are missing
    fitted: dict[int, np.ndarray] = field(default_factory=dict)  # frames, ready to be encoded

    def content(self) -> Loaded:
        """What was read; only for items that are neither finished nor refused."""
        if self.loaded is None:
            raise RuntimeError(f"{self.item.source} was not read")
        return self.loaded

    def is_scored(self) -> bool:
        """Whether all frames, if there are any, are with the detector or past it."""
        return self.loaded is None or self.scored == self.loaded.frames.shape[0]

    def forget(self) -> None:
        """Free the memory of an item that was written."""
        self.loaded, self.parts, self.fitted = None, [], {}

    def size(self) -> int:
        """Bytes in memory."""
        if self.loaded is None:
            return 0
        return self.loaded.frames.nbytes + self.loaded.codes.nbytes


def weight(item: Item, map_bytes: int) -> int:
    """Bytes that an item may take while it is read and scored, by its headers; 0 if unknown.

    Args:
        map_bytes: of one map of the encoder frame.
    """
    path = Path(item.paths[0])
    try:
        if not inputs.is_regular(item.paths[0]):
            return 0
        if item.kind == "image":
            return PER_PIXEL * _pixels(item)
        if item.kind == "nifti":
            return nifti_header.size_of(path)
        head = dicom_header.parse(path, dicom.SIZE_TAGS)
        rows, columns = (dicom_header.count(path, head, name) for name in ("Rows", "Columns"))
        frames = len(item.paths) * dicom_header.count(path, head, "NumberOfFrames")
        stored = len(item.paths) * path.stat().st_size
        return stored + frames * (rows * columns + map_bytes) + PER_PIXEL * rows * columns
    except Exception as error:  # a parser of hostile bytes may raise anything; reading says why
        logging.debug("no size of %s (%s)", path, type(error).__name__)
        return 0


def load(item: Item, predictor: Predictor, output: Path, stamp: str) -> Job:
    """Open one item, unless its finished result is there. One that cannot be read has an error."""
    if item.error:
        return Job(item, rows=[], error=item.error)
    try:
        paths = [file for path in item.paths for file in nifti_header.files_of(Path(path))]
        if sum(map(image.check_regular, paths)) > image.MAX_BYTES:
            raise DataError(
                f"{item.source} has more than {image.MAX_BYTES:,} bytes in its files and no more "
                "are read: give it in parts."
            )
        sha256 = files.sha256_of(*paths)
        named = f"{stamp} {sha256} {item.names}"  # results name the files of a series
        key = hashlib.sha256(named.encode()).hexdigest()
        rows = results.finished(output, item, key)
        if rows is not None:
            return Job(item, rows=rows)
        job = _job(item, predictor, key, sha256)
        for number in range(min(job.content().frames.shape[0], FITTED)):
            job.fitted[number] = fit(predictor, job, number)
        return job
    except Exception as error:  # decoders raise anything: one bad item is one line
        return Job(item, rows=[], error=reason(error, item))


def _job(item: Item, predictor: Predictor, key: str, sha256: str) -> Job:
    with in_turn(one_decoded, _pixels(item)):
        frames = _open(item, predictor.window)
    count, many = frames.shape[0], item.kind != "nifti" and frames.shape[0] > 1
    height, width = frames.shape[1:]
    if count > 1 and min(height, width) < MIN_SIDE:
        raise DataError(
            f"{item.source} has {count:,} frames of {width} x {height} pixels, and frames of a "
            f"series or volume need {MIN_SIDE} or more a side: slice a volume along another axis "
            "(config.data.window), or remove it if it is not yours."
        )
    keep_maps = item.kind != "nifti"
    if keep_maps and 2 * count * predictor.size**2 > MAX_MAPS:
        raise DataError(
            f"{item.source} has {count:,} frames and at most "
            f"{MAX_MAPS // (2 * predictor.size**2):,} are scored together: give it in parts"
        )
    mm2 = pixel_area(frames.spacing, (height, width), predictor.size, predictor.fit)
    codes = np.empty(frames.shape, bool if many else np.uint16)
    return Job(item, Loaded(key, sha256, frames, mm2, codes, keep_maps))


def fit(predictor: Predictor, job: Job, number: int) -> Float[np.ndarray, "v s s"]:
    """A frame as the encoder sees it; some are made while the item is read."""
    if number in job.fitted:
        return job.fitted.pop(number)
    (frame,) = job.content().frames.part(number, number + 1)
    return predictors.frame(predictor, frame)


def _pixels(item: Item) -> int:
    """What the header of an image says; 0 where it cannot be read, of which reading says why."""
    try:
        return read.pixels_of(Path(item.paths[0])) if item.kind == "image" else 0
    except Exception as error:  # a decoder fed hostile bytes may throw anything
        logging.debug("no size of %s (%s)", item.source, type(error).__name__)
        return 0


def _open(item: Item, window: str) -> Frames:
    paths = [Path(p) for p in item.paths]
    if len(paths) > 1:
        return dicom.open_slices(paths, paths[0].parent, parse_window(window))
    return read.open_image(paths[0], window=window)


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
    names = item.names or [item.source] * len(item.paths)
    instead = dict(zip(item.paths, names, strict=True))
    folder = os.path.dirname(item.paths[0])
    instead |= {folder: item.source} if len(folder) > 1 else {}
    message = inputs.replaced(message, instead)
    return inputs.printable(" ".join(message.split()))
