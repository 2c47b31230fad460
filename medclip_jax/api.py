"""For notebooks: a trained workdir as an object that scores arrays and files.

import medclip_jax
scorer = medclip_jax.load("runs/phantom")
for result in scorer.predict(["scan.png"]):
    print(result.score, result.alarm)
"""

from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from medclip_jax import build_detector, files, object_store
from medclip_jax.detectors import calibration
from medclip_jax.detectors.detector import BatchScores
from medclip_jax.errors import ConfigError, DataError
from medclip_jax.explain import boxes as explain_boxes
from medclip_jax.inference import adapt as inference_adapt
from medclip_jax.inference import inputs, predictor
from medclip_jax.inference import predict as inference_predict
from medclip_jax.io import read as io_read
from medclip_jax.io.read import pixel_area


class Prediction(NamedTuple):
    """One image, scored."""

    score: float  # [0, 1]; 0.5 is the threshold
    p_value: float  # of "as healthy as the supports"
    alarm: bool
    uncertainty: float  # sd of the score over MC-dropout passes
    map: Float[np.ndarray, "h w"]  # in the image's own frame, [0, 1]; 0.5 is the pixel threshold
    boxes: tuple[explain_boxes.Box, ...]  # of what the map of an alarm marks, in pixels


class Scorer:
    """A trained workdir. `predict` scores images, `predict_files` writes results of files."""

    def __init__(self, workdir: str | Path):
        self.workdir = files.expanded(workdir)
        self.adapted = False  # to another site than the workdir's
        self._predictor = build_detector.load_predictor(self.workdir)
        self._start: inference_adapt.Start | None = None  # what `adapt` starts from, compiled once

    def predict(
        self, images: Iterable | str | Path, boxes_of_passed: bool = False
    ) -> list[Prediction]:
        """Score images: paths of one-frame files, or arrays [h, w] of finite values in [0, 1].

        A path alone, not in a list, is one image.

        boxes_of_passed: also boxes of what the maps of images without an alarm mark.

        Raises DataError for what cannot be read or is no such array, ConfigError for no path.
        """
        held = [_pixels(image, self._predictor.window) for image in _listed(images)]
        if not held:
            return []
        pixels, spacings = zip(*held, strict=True)
        fit, size = self._predictor.fit, self._predictor.size
        frames = np.stack([predictor.frame(self._predictor, image) for image in pixels])
        mm2 = [
            pixel_area(mm, image.shape, size, fit)
            for mm, image in zip(spacings, pixels, strict=True)
        ]
        scores = predictor.score(self._predictor, frames, mm2)
        return [
            _prediction(scores, i, image.shape, fit, boxes_of_passed)
            for i, image in enumerate(pixels)
        ]

    def predict_files(
        self,
        *named: str | Path,
        output: str | Path,
        cam: bool = False,
        follow_links: bool = False,
        pseudonymise: bool = False,
        boxes_of_passed: bool = False,
    ) -> inference_predict.Summary:
        """What --mode predict does: results of files, folders and globs below `output`.

        pseudonymise: no name or identifier of a source in the results, as --pseudonymise.

        Raises ConfigError for an adapted scorer, which is kept nowhere that files could refer to,
        or what is no path (a list: unpack it, predict_files(*paths, ...)), DataError for no image.
        """
        if self.adapted:
            raise ConfigError("an adapted scorer is in memory alone: use predict for its images")
        name = files.text_of(output)
        items = inputs.find(named, follow_links, nameless=pseudonymise)
        score = inference_predict.in_process(self._predictor, cam, boxes_of_passed)
        with object_store.folder(name) as folder:
            return inference_predict.run(score, items, folder, pseudonymise=pseudonymise)

    def adapt(self, images: Iterable[str | Path] | str | Path) -> "Scorer":
        """The scorer of a new site, from 2 or more of its healthy images; this one stays as it is.

        The workdir must have meta-learned (config.learner not joint). Nothing is written. The new
        scorer is the adapted prompts alone, without a memory, and has no uncertainty (0); its
        thresholds are of the new site. The first call loads and compiles; later ones, with as many
        images, are quick.
        Raises ConfigError for fewer images or a workdir that learned jointly, DataError for a file
        that cannot be read or has several frames.
        """
        paths = [files.expanded(image) for image in _listed(images)]
        if self._start is None:
            self._start = build_detector.load_start(self.workdir)
        detector, thresholds = inference_adapt.adapt(self._start, paths)
        again = copy(self)
        again.adapted = True
        again._predictor = self._predictor._replace(detector=detector, calibration=thresholds)
        return again


def load(workdir: str | Path) -> Scorer:
    """The scorer of a trained workdir. Raises WorkdirError or CheckpointError if it has none."""
    return Scorer(workdir)


def _listed(images: Iterable | str | Path) -> Iterable:
    """A path alone is one image, not its letters."""
    if isinstance(images, str | Path):
        return [images]
    if not np.iterable(images):
        kind = type(images).__name__
        raise DataError(f"a value of type {kind} where images are meant: give a list of them")
    return images


def _pixels(image, window: str) -> tuple[Float[np.ndarray, "h w"], tuple[float, float] | None]:
    """Pixels and spacing; that of an array is not known."""
    if isinstance(image, str | Path):
        read = io_read.read(files.expanded(image), window=window)
        if len(read.pixels) != 1:
            raise DataError(
                f"{image} holds {len(read.pixels)} frames: use predict_files for volumes"
            )
        return read.pixels[0], read.spacing
    try:
        held = np.asarray(image)
    except ValueError:
        raise DataError("an image whose rows are not of one length: give [h, w] floats") from None
    if held.ndim != 2 or not held.size or held.dtype.kind not in "fiub":
        raise DataError(f"an image of shape {held.shape} and type {held.dtype}: give [h, w] floats")
    held = held.astype(np.float32)
    if not np.isfinite(held).all() or held.min() < 0 or held.max() > 1:
        raise DataError("an image holds NaN or values outside [0, 1]: scale it to [0, 1]")
    return held, None


def _prediction(
    scores: BatchScores,
    i: int,
    shape: tuple[int, ...],
    fit: io_read.Mode,
    of_passed: bool = False,
) -> Prediction:
    height, width = shape
    small = calibration.half_precision(scores.maps[i]).astype(np.float32)  # as in files
    heat = io_read.to_frame(small, height, width, fit)
    return Prediction(
        float(scores.score[i]),
        float(scores.p_value[i]),
        bool(scores.alarm[i]),
        float(scores.uncertainty[i]),
        heat,
        tuple(explain_boxes.decided(heat, bool(scores.alarm[i]), of_passed)),
    )
