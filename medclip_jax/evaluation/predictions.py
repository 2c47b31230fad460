"""A scored test set and the file that holds it, predictions.npz."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from medclip_jax import files
from medclip_jax.data.records import Record
from medclip_jax.detectors.calibration import Calibration
from medclip_jax.evaluation import ground_truth, thumbnails
from medclip_jax.io import read


class Predictions(NamedTuple):
    """A scored test set, on the host."""

    id: tuple[str, ...]
    label: Int[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]  # [0, 1], 0.5 is the calibrated threshold
    p_value: Float[np.ndarray, " n"]
    uncertainty: Float[np.ndarray, " n"]  # sd of the score over MC-dropout passes
    # encoder frame, [0, 1], 0.5 is the calibrated pixel threshold; on disk (files.temporary_array)
    maps: Float[np.ndarray, "n h w"]
    # equation (10): of every patch's unit value over the passes, g x g patches per image
    patch_mean: Float[np.ndarray, "n g g"]
    patch_variance: Float[np.ndarray, "n g g"]


class Scored(NamedTuple):
    """A scored test set, and what else is measured of it."""

    predictions: Predictions
    calibration: Calibration
    cams: Float[np.ndarray, "n p"] | None = None  # Grad-CAM per patch, [0, 1]
    uncertainties: dict[str, np.ndarray] | None = None  # measures beside the sd; None: no dropout


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
    counts: Float[np.ndarray, "n _ _"] | None = None,
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
        deviations = None  # nothing is random
        if scored.uncertainties is not None:
            deviations = np.sqrt(p.patch_variance).reshape(len(test), -1)
        more |= thumbnails.pack(
            test, p.maps, fit, cams=scored.cams, deviations=deviations, seed=seed
        )
    arrays: dict[str, Any] = {**p._asdict(), "id": np.array(p.id), **(scored.uncertainties or {})}
    with files.writing(workdir / "predictions.npz") as file:
        np.savez(file, **arrays, **more)
