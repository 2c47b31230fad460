"""What the rooms of the house hand to one another.

Shape letters, used in every annotation:
  e episodes/tasks   n images   h w pixels (tower frame unless said otherwise)   f frames
  p patches (g x g grid, row-major)   l levels (tapped blocks)   d width
  c prompts   t text positions

Pytrees are NamedTuples: jaxtyping's import hook would break `flax.struct.dataclass` at unflatten.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from medclip_jax.data.records import Record
from medclip_jax.detectors.limits import Limits
from medclip_jax.distributed import spool
from medclip_jax.evaluation import ground_truth, thumbnails
from medclip_jax.io import read


class Predictions(NamedTuple):
    """A scored test set, on the host."""

    id: tuple[str, ...]
    label: Int[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]  # [0, 1], 0.5 is the calibrated threshold
    p_value: Float[np.ndarray, " n"]
    uncertainty: Float[np.ndarray, " n"]  # sd of the score over MC-dropout passes
    # tower frame, [0, 1], 0.5 is the calibrated pixel threshold; on disk: a spool.Rows, or an array
    maps: Float[np.ndarray, "n h w"] | Any


class Scored(NamedTuple):
    predictions: Predictions
    calibration: dict[str, Any]
    limits: Limits
    cams: Float[np.ndarray, "n p"] | None = None  # Grad-CAM per patch, [0, 1]
    doubts: dict[str, np.ndarray] | None = None  # measures of rejection, beside the sd; MC-dropout


def half_precision(heat: Float[np.ndarray, "*n h w"]) -> Float[np.ndarray, "*n h w"]:
    """Unit maps as float16; what is below 0.5 stays below, so every decision stays the same."""
    below = np.nextafter(np.float16(0.5), np.float16(0))
    small = heat.astype(np.float16)
    return np.where((heat < 0.5) & (small >= 0.5), below, small)


def write_predictions(
    workdir: Path,
    scored: Scored,
    test: Sequence[Record],
    fit: read.Mode,
    seed: int,
    counts: spool.Rows | None = None,
    pictures: bool = True,
) -> None:
    """predictions.npz: one row per image, maps in the encoder's frame.

    Args:
        counts: for tables, `pixel_counts` of the images whose masks are known.
        pictures: also the arrays of `thumbnails.pack`, for the report.
    """
    p = scored.predictions
    more: dict[str, Any] = {} if counts is None else {"pixel_counts": counts}
    patients = ground_truth.patients(test)
    more |= {} if patients is None else {"patient": patients}  # where one has several images
    if pictures:
        more |= thumbnails.pack(test, p.maps, fit, cams=scored.cams, seed=seed)
    arrays: dict[str, Any] = {**p._asdict(), "id": np.array(p.id), **(scored.doubts or {})}
    spool.write_npz(workdir / "predictions.npz", arrays | more)
