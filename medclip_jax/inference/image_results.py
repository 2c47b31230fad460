"""What the maps of some frames mark, in the image's own frame: boxes and coded maps.

Host values only, so that threads can do it beside the encoder.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt16

from medclip_jax.detectors.detector import BatchScores
from medclip_jax.evaluation import predictions
from medclip_jax.explain import boxes
from medclip_jax.io import read

HALF = 32768  # the code of 0.5, where the pixel threshold lies


class Marks(NamedTuple):
    """Neighbouring frames of one item."""

    frames: list[dict[str, Any]]  # of the JSON
    scores: BatchScores  # maps as float16
    heat: Float[np.ndarray, "h w"] | None  # the map of a single frame
    cams: Float[np.ndarray, "n p"] | None = None  # Grad-CAM; no column where it is not wanted


def mark(
    scores: BatchScores,
    codes: UInt16[np.ndarray, "n h w"],
    first: int,
    spacing: tuple[float, float] | None,
    fit: read.Mode,
    cams: Float[np.ndarray, "n p"] | None = None,
) -> Marks:
    """Boxes of n frames; `codes` is filled with their maps.

    scores: of these frames, maps as `trained.score` gives them. first: number of the first frame
    in its item. spacing: mm (row, column). fit: how the image was brought to the tower frame.
    """
    scores = scores._replace(maps=predictions.half_precision(scores.maps))
    frames, heat = [], None
    for i, small in enumerate(scores.maps):
        heat = frame_map(small, codes.shape[1:], fit)
        codes[i] = sixteen_bits(heat)
        frames.append(_frame(scores, i, first + i, heat, spacing))
    return Marks(frames, scores, heat if len(frames) == 1 else None, cams)


def frame_map(
    small: Float[np.ndarray, "s s"], shape: tuple[int, ...], fit: read.Mode
) -> Float[np.ndarray, "h w"]:
    """A map in the image's own frame (rows, columns), [0, 1]; 0.5 is the pixel threshold."""
    height, width = shape
    return read.to_frame(small.astype(np.float32), height, width, fit)


def sixteen_bits(heat: Float[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
    """[0, 1] -> 0 to 65535, so that HALF or more is exactly what is at least 0.5."""
    return np.minimum(heat * np.float32(65536), 65535).astype(np.uint16)


def _frame(scores: BatchScores, i: int, number: int, heat, spacing) -> dict[str, Any]:
    return {
        "frame": number,
        "score": float(scores.score[i]),
        "p_value": float(scores.p_value[i]),
        "alarm": bool(scores.alarm[i]),
        "uncertainty": float(scores.uncertainty[i]),
        "boxes": [_box(box, spacing) for box in boxes.boxes_of(heat)],
    }


def _box(box: boxes.Box, spacing: tuple[float, float] | None) -> dict[str, Any]:
    held = {name: getattr(box, name) for name in ("row0", "col0", "row1", "col1", "score")}
    held["area_pixels"] = box.area
    if spacing is not None:
        row, column = spacing
        held["height_mm"] = (box.row1 - box.row0) * row
        held["width_mm"] = (box.col1 - box.col0) * column
        held["area_mm2"] = box.area * row * column
    return held
