"""A trained workdir, loaded: images in the encoder frame -> calibrated scores and maps.

`build_detector.load_predictor` makes one. Also one item between reading and its files: frames,
maps, boxes, as host values only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, UInt8, UInt16

from medclip_jax.clip.layers import Features, widened
from medclip_jax.detectors import calibration, tiling
from medclip_jax.detectors.calibration import Calibration
from medclip_jax.detectors.detector import BatchScores, Detector, Raw, finish, read_batch
from medclip_jax.explain import boxes, grad_cam
from medclip_jax.features import cache, encoder
from medclip_jax.io import read as io_read
from medclip_jax.io.image import Frames, bands

HALF = 32768  # the code of 0.5, where the pixel threshold lies


class Predictor(NamedTuple):
    """All that scoring needs, on the devices."""

    detector: Detector
    calibration: Calibration
    encoder: cache.FeatureCache  # nothing is read from or written to its folder
    keys: Array  # [t] of MC-dropout
    digest: str  # names the trained detector
    window: str  # of CT images
    about: dict[str, Any]  # method, data set, K, ... for what is written
    explanation: grad_cam.Explanation | None = None  # how scores are explained; None: they are not
    tiles: int = 1  # per side, scored with the whole image
    boxes_of_passed: bool = False  # also of images without an alarm

    @property
    def size(self) -> int:
        """Pixels per side of the encoder frame."""
        return self.encoder.clip.size

    @property
    def fit(self) -> io_read.Mode:
        """How images are brought to the encoder frame."""
        return self.encoder.fit


def frame(predictor: Predictor, pixels: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "v s s"]:
    """What the encoder sees of an image: the whole in its frame, then tiles if there are any."""
    return tiling.views(pixels, predictor.size, predictor.tiles, predictor.fit)


def batch_size(predictor: Predictor) -> int:
    """Images that `score` takes at a time without another compilation."""
    return encoder.batch_size(predictor.encoder)


def score(
    predictor: Predictor,
    images: Float[np.ndarray, "n *v s s"],
    mm2: Sequence[float | None] | None = None,
) -> BatchScores:
    """Score any number of images, `batch_size` at a time.

    Args:
        images: of `frame`, [0, 1]; without axis v where there are no tiles. One alone is
            not filled up to a batch; it has programs of its own.
        mm2: area in mm² of a pixel of the encoder frame of each, None where it is unknown.
    """
    size = 1 if len(images) == 1 and predictor.encoder.mesh.size == 1 else batch_size(predictor)
    mm2 = [None] * len(images) if mm2 is None else mm2
    parts = []
    for i in range(0, len(images), size):
        group = images[i : i + size]
        raw = read(predictor, encode(predictor, group, size), len(group))
        parts.append(finish(raw, predictor.calibration, mm2[i : i + size]))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


# Scoring in three steps, which prediction overlaps, each on its own thread; the last is `finish`.


def encode(predictor: Predictor, images: Float[np.ndarray, "n *v s s"], size: int = 0) -> Features:
    """Tokens of 1 to `size` (0: `batch_size`) images, filled up with copies: one compilation."""
    full = images[np.arange(size or batch_size(predictor)) % len(images)]
    views = full.reshape(-1, predictor.size, predictor.size)
    tokens = encoder.encode(predictor.encoder, views, min(len(views), batch_size(predictor)))
    return widened(tiling.join_views(tokens, len(views) // len(full)))


def read(predictor: Predictor, tokens: Features, n: int) -> Raw:
    """Raw scores, on the host, of the first n images of `encode`."""
    raw = jax.device_get(read_batch(predictor.detector, tokens, predictor.keys))
    return jax.tree.map(lambda x: x[:n], raw)


def explain(predictor: Predictor, tokens: Features, n: int) -> Float[np.ndarray, "n p"]:
    """Grad-CAM of the first n images of `encode`; no column if the predictor does not explain."""
    how = predictor.explanation
    if how is None:
        return np.zeros((n, 0), np.float16)
    gradients = grad_cam.gradients(predictor.detector, tokens, how.layer, how.top)
    return grad_cam.weigh_or_zeros(tokens, gradients, how)[:n]


class Loaded(NamedTuple):
    """One item, opened; its frames are made when they are needed."""

    key: str  # names content, detector and settings
    sha256: str
    frames: Frames
    mm2: float | None  # area of a pixel of the encoder frame
    codes: UInt16[np.ndarray, "f h w"] | Bool[np.ndarray, "f h w"]  # maps; where marked, for many
    keep_maps: bool  # those of the encoder frame are written too

    def marked(self) -> Bool[np.ndarray, "f h w"]:
        """Pixels over the threshold."""
        return self.codes if self.codes.dtype == bool else self.codes >= HALF

    def shown(self, index: int) -> UInt8[np.ndarray, "h w"]:
        """A frame for display."""
        frame = self.frames.part(index, index + 1)[0]
        shown = np.empty(frame.shape, np.uint8)
        for rows in bands(frame.shape):
            shown[rows] = np.round(255 * frame[rows])
        return shown


class Part(NamedTuple):
    """Results of neighbouring frames of one item."""

    frames: list[dict[str, Any]]  # of the JSON
    scores: BatchScores  # maps as float16, of all frames or of the first with the highest score
    cams: Float[np.ndarray, "n p"] | None  # Grad-CAM; no column where it is not wanted


def part(
    scores: BatchScores,
    codes: UInt16[np.ndarray, "n h w"] | Bool[np.ndarray, "n h w"],
    first: int,
    spacing: tuple[float, float] | None,
    fit: io_read.Mode,
    cams: Float[np.ndarray, "n p"] | None = None,
    keep_maps: bool = True,
    boxes_of_passed: bool = False,
) -> Part:
    """Results of n frames.

    Args:
        scores: of these frames.
        codes: to be filled with 16-bit values of the frames' maps, or with where they are marked.
        first: number of the first frame in its item.
        spacing: mm (row, column).
        fit: how the image was brought to the encoder frame.
        cams: Grad-CAM of the patches, if it is wanted.
        keep_maps: for all frames, else for the one with the highest score.
        boxes_of_passed: boxes also of frames without an alarm.
    """
    scores = scores._replace(maps=calibration.half_precision(scores.maps))
    frames = []
    for i, small in enumerate(scores.maps):
        heat = frame_map(small, codes.shape[1:], fit)
        if codes.dtype == bool:
            np.greater_equal(heat, 0.5, out=codes[i])
        else:  # HALF or more is exactly what is at least 0.5
            _encode(heat, codes[i])
        marked = boxes.decided(heat, bool(scores.alarm[i]), boxes_of_passed)
        frames.append(_frame(scores, i, first + i, marked, spacing))
    if not keep_maps:
        best = int(np.argmax(scores.score))
        scores = scores._replace(maps=scores.maps[best : best + 1].copy())
    return Part(frames, scores, cams)


def _encode(heat: Float[np.ndarray, "h w"], codes: UInt16[np.ndarray, "h w"]) -> None:
    """65536 times the map."""
    for part in bands(heat.shape):
        codes[part] = np.minimum(heat[part] * np.float32(65536), 65535)


def frame_map(
    small: Float[np.ndarray, "s s"], shape: tuple[int, ...], fit: io_read.Mode
) -> Float[np.ndarray, "h w"]:
    """A map in the image's own frame (rows, columns), [0, 1]; 0.5 is the pixel threshold."""
    height, width = shape
    return io_read.to_frame(small.astype(np.float32), height, width, fit)


def _frame(scores: BatchScores, i: int, number: int, marked, spacing) -> dict[str, Any]:
    return {
        "frame": number,
        "score": float(scores.score[i]),
        "p_value": float(scores.p_value[i]),
        "alarm": bool(scores.alarm[i]),
        "uncertainty": float(scores.uncertainty[i]),
        "patch_variance_mean": float(scores.patch_variance[i].mean()),
        "patch_variance_max": float(scores.patch_variance[i].max()),
        "boxes": [_box(box, spacing) for box in marked],
    }


def _box(box: boxes.Box, spacing: tuple[float, float] | None) -> dict[str, Any]:
    values = {name: getattr(box, name) for name in ("row0", "col0", "row1", "col1", "score")}
    values["area_pixels"] = box.area
    if spacing is not None:
        row, column = spacing
        values["height_mm"] = (box.row1 - box.row0) * row
        values["width_mm"] = (box.col1 - box.col0) * column
        values["area_mm2"] = box.area * row * column
    return values


def joined(parts: Sequence[Part]) -> BatchScores:
    """Scores of all frames without maps, of which only some may be there."""
    each = [part.scores._replace(maps=part.scores.maps[:0]) for part in parts]
    return BatchScores(*map(np.concatenate, zip(*each, strict=True)))


def top_map(parts: Sequence[Part], top: int) -> Float16[np.ndarray, "s s"]:
    """The map of the frame with the highest score, whichever maps the parts have."""
    first = 0
    for part in parts:
        count = len(part.frames)
        if top < first + count:
            return part.scores.maps[top - first if len(part.scores.maps) == count else 0]
        first += count
    raise RuntimeError(f"no part has frame {top}")
