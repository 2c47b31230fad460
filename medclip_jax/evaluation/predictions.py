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


GALLERY = (8, 4)  # abnormal and healthy images shown, drawn by seed


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
    """predictions.npz: one row per image, maps in the tower frame, and a gallery in image frames.

    Gallery arrays: gallery_index (rows shown), gallery_image_i uint8, gallery_map_i float16,
    gallery_mask_i uint8 (absent where no mask is known), i = 0, 1, ...
    If `pictures`, for the report: the arrays of `thumbnails.pack`, of every image or of
    thumbnails.MOST drawn by seed. For tables:
    `pixel_counts` (histograms of PixelMetrics.add, where masks are known) and `patient`, where some
    has several images.
    """
    p = scored.predictions
    rng = np.random.default_rng(seed)
    shown = [
        i
        for label, count in zip((1, 0), GALLERY, strict=True)
        for i in sorted(rng.permutation(np.flatnonzero(p.label == label))[:count])
    ]
    gallery: dict[str, Any] = {"gallery_index": np.array(shown)}
    for place, i in enumerate(shown):
        pixels = read.read(test[i].path, window=test[i].window).pixels[0]
        height, width = pixels.shape
        heat = read.to_frame(p.maps[i].astype(np.float32), height, width, fit)
        gallery[f"gallery_image_{place}"] = np.round(255 * pixels).astype(np.uint8)
        gallery[f"gallery_map_{place}"] = heat.astype(np.float16)
        if test[i].masks or test[i].label == 0:
            mask = (
                ground_truth.lesion_mask(test[i]) if test[i].label else np.zeros(pixels.shape, bool)
            )
            gallery[f"gallery_mask_{place}"] = mask.astype(np.uint8)
    gallery |= {} if counts is None else {"pixel_counts": counts}
    of = ground_truth.patients(test)
    gallery |= {} if of is None else {"patient": of}
    if pictures:
        gallery |= thumbnails.pack(test, p.maps, fit, scored.cams, seed)
    arrays: dict[str, Any] = {**p._asdict(), "id": np.array(p.id), **(scored.doubts or {})}
    spool.write_npz(workdir / "predictions.npz", arrays | gallery)
