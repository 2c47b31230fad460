"""Score a test set: map, image score, uncertainty and p-value per image, then the metrics."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import track

from medclip_jax import (
    agreement,
    attribution,
    calibrate,
    features,
    intervals,
    lesions,
    limits,
    metrics,
    processes,
    rejection,
    score,
    spool,
    suppress,
    thumbnails,
)
from medclip_jax.data import readers
from medclip_jax.detector import Detector
from medclip_jax.limits import Limits
from medclip_jax.pixels import MetricError
from medclip_jax.structs import Features, Predictions, Record

BATCH = 32  # images per scoring call
TOLERANCE = 2  # of boundary F1, in the unit of the distances
GALLERY = (8, 4)  # abnormal and healthy images shown, drawn by seed


class Scored(NamedTuple):
    predictions: Predictions
    calibration: dict[str, Any]
    limits: Limits
    cams: Float[np.ndarray, "n p"] | None = None  # Grad-CAM per patch, [0, 1]
    doubts: dict[str, np.ndarray] | None = None  # measures of rejection, beside the sd; MC-dropout


def score_images(
    detector: Detector,
    bank: features.Bank,
    test: Sequence[Record],
    *,
    top: float,
    alpha: float,
    pixel_rate: float,
    passes: int,
    seed: int,
    quiet: suppress.Learned | None = None,
    folder: Path | None = None,
) -> Scored:
    """Scores of the test set, calibrated on the held-out supports alone. Labels are not read.

    top: share of the largest patches whose mean is the image score (0: the map's maximum).
    alpha: false-alarm rate asked for. pixel_rate: of healthy pixels. passes: of MC-dropout.
    quiet: outlier suppression of the maps, learned on these supports.
    folder: on whose disk the maps lie until they are written; None for the temporary folder.
    """
    size = bank.clip.size
    maps, image_scores = jax.jit(partial(score.to_pixels, size=size)), scorer(size, top)
    found = calibrated(detector, size, top, alpha, pixel_rate, quiet)
    keys = jax.random.split(jax.random.key(seed), passes)
    cams = attribution.explainer(detector, top)

    rows, doubt, why = [], [], []
    mine = [test[i] for i in processes.part(len(test))]
    out = spool.Rows(len(mine), (size, size), np.float16, folder)
    groups = (detector.load or features.load_images)(bank, mine, BATCH)
    groups = track(groups, "score", -(-len(mine) // BATCH), console=Console(stderr=True))
    for i, batch in enumerate(groups):
        batch, real = agreement.filled(batch, BATCH)  # one shape, whatever is left for the last
        values = detector.patches(batch)
        raw = image_scores(values) if detector.image is None else detector.image(batch)
        rows.append(np.asarray(raw, np.float64)[:real])
        heat = np.asarray(maps(values))[:real]
        finite(mine[i * BATCH :], rows[-1], heat)
        if quiet is not None:
            shown = mine[i * BATCH : i * BATCH + real]
            heat = suppress.treat(heat, quiet.steps, list(suppress.areas(shown, size, bank.fit)))
        heat = calibrate.to_unit(heat, found.pixel.value, found.pixel_width)
        out.put(i * BATCH, half_precision(heat))
        doubt.append(doubts(detector, batch, keys, image_scores, found)[:real])
        why.append(cams(batch)[:real])
    held = (np.concatenate(rows), np.concatenate(doubt), np.concatenate(why))
    raw, doubt, why = processes.gather(held, len(test))
    predictions = Predictions(
        tuple(r.id for r in test),
        np.array([r.label for r in test]),
        calibrate.to_unit(raw, found.image.value, found.image_width),
        calibrate.p_values(raw, found.healthy) if detector.k > 1 else np.full(len(raw), np.nan),
        doubt[:, 0],
        processes.gather_rows(out, len(test), BATCH, folder),
    )
    explained = why if why.any() else None
    told = rejection.named(doubt[:, 1:]) if detector.passes is not None and passes else None
    return Scored(predictions, limits.described(found, alpha, detector.k), found, explained, told)


def finite(records: Sequence[Record], scores: Float[np.ndarray, " n"], maps) -> None:
    """Raise MetricError naming the first of the images whose score or map holds NaN or inf."""
    bad = ~(np.isfinite(scores) & np.isfinite(maps).all((1, 2)))
    if bad.any():
        name = records[int(np.argmax(bad))].id
        raise MetricError(f"{name}: its score or map is not finite; check that image file.")


def calibrated(
    detector: Detector,
    size: int,
    top: float,
    alpha: float,
    pixel_rate: float,
    quiet: suppress.Learned | None = None,
) -> Limits:
    """Limits of a detector that reads frames of `size` pixels; the rest as in `score_images`."""
    maps = jax.jit(partial(score.to_pixels, size=size))
    held_maps = maps if quiet is None else lambda _: quiet.supports
    return limits.find(detector, held_maps, scorer(size, top), alpha, pixel_rate)


def doubts(detector: Detector, batch: Features, keys, image_scores, found: Limits):
    """[n, 4]: sd of the unit scores of the passes, then rejection.NAMES; 0 if nothing is random.

    The copies held out are a small ensemble; NaN where there are none.
    """
    n = len(batch.pooled)
    if detector.passes is None or not len(keys):
        return np.zeros((n, 4))
    if detector.image_passes is None:
        each = jax.vmap(image_scores)(detector.passes(batch, keys))
    else:
        each = detector.image_passes(batch, keys)
    unit = calibrate.to_unit(np.asarray(each), found.image.value, found.image_width)
    copies = np.full(n, np.nan)
    if detector.copies is not None:
        if detector.image_copies is not None:
            read = detector.image_copies(batch)
        else:
            read = jax.vmap(image_scores)(detector.copies(batch))
        each = calibrate.to_unit(np.asarray(read), found.image.value, found.image_width)
        copies = each.std(0)
    return np.stack([unit.std(0), *rejection.of_passes(unit), copies], 1)


def half_precision(heat: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n h w"]:
    """Unit maps as float16; what is below 0.5 stays below, so every decision stays the same."""
    below = np.nextafter(np.float16(0.5), np.float16(0))
    small = heat.astype(np.float16)
    return np.where((heat < 0.5) & (small >= 0.5), below, small)


def scorer(size: int, top: float):
    """`from_patches` with its settings, compiled: values [n, p] -> scores [n]."""
    return jax.jit(partial(from_patches, size=size, top=top))


def from_patches(values, size: int, top: float):
    """Image score [n] of patch values [n, p]: mean of the top share of the patches.

    A share of 0 is the peers' score, the maximum of the up-sampled map.
    """
    if top > 0:
        return score.image_score(values, top)
    return score.to_pixels(values, size).max((1, 2))


def measure(
    scored: Scored, test: Sequence[Record], fit: readers.Mode, folder: Path | None = None
) -> dict[str, Any]:
    """Labels and masks are read here, after scoring: image, pixel and calibration metrics.

    `pixel_counts` are rows on the disk of `folder`, for write_predictions; all else is for
    metrics.json.
    """
    p = scored.predictions
    image = metrics.image_level(p.score, p.label)
    pixel, each, counts, points = of_pixels(scored, test, fit, folder)
    of = lesions.patients(test)
    sure = {"image": intervals.image(p.score, p.label, groups=of), "pixel": {}}
    if counts is not None:
        known = [i for i in range(len(test)) if counts[i].any()]
        among = None if of is None else of[known]
        held = lesions.Chosen(counts, known)
        sure["pixel"] = intervals.of_counts(held, p.label[known], groups=among)
        sure["pixel"] |= intervals.of_means(each, p.label[known], groups=among)
    kept = dict(scored.calibration)
    k, alpha = kept.pop("k"), kept.pop("alpha")
    summary: dict[str, Any] = {}
    if k > 1:
        summary |= calibrate.calibration_summary(p.p_value[p.label == 0], k, alpha)
    else:
        summary |= calibrate.no_promise(p.score[p.label == 0], k, alpha)
    calibration = {**summary, **kept}
    doubts = {"sd": p.uncertainty, **scored.doubts} if scored.doubts else {}
    doubt = {"uncertainty": rejection.measure(p.score, p.label, doubts)}
    found = {"image": image, "pixel": pixel, "calibration": calibration, "intervals": sure}
    told = {"explanations": points and {"pointing": points}, "pixel_counts": counts}
    return found | doubt | told


def of_pixels(
    scored: Scored, test: Sequence[Record], fit: readers.Mode, folder: Path | None = None
):
    """Pixel metrics, those of each image that has masks (metrics.pixel_level_each),
    intervals.pixel_counts and the pointing game; None for all without masks.

    Healthy images count as empty masks; an abnormal image whose mask is unknown is left out, and
    its counts are 0.
    """
    p = scored.predictions
    known = [i for i, r in enumerate(test) if r.masks or r.label == 0]
    if not any(test[i].label for i in known):
        return None, None, None, None
    measured, maps = [test[i] for i in known], lesions.Chosen(p.maps, known)
    masks = lesions.Truths(measured, p.maps.shape[-1], fit)
    mm = lesions.spacings(measured, p.maps.shape[-1], fit)
    found, each = metrics.pixel_level_each(maps, masks, spacing=mm, tolerance=TOLERANCE)
    # px: of the tower frame; one image without spacing makes all distances so
    pixel: dict[str, Any] = found | {
        "distance_unit": "mm" if mm else "px",
        "boundary_tolerance": TOLERANCE,
    }
    why = None if scored.cams is None else scored.cams[known]
    counts = spool.Rows(len(test), (3, intervals.BINS), np.float32, folder)
    for i, held in zip(known, intervals.each_counts(maps, masks), strict=True):
        counts.put(i, held[None])
    return pixel, each, counts, agreement.pointing(maps, why, masks)


def write_predictions(
    workdir: Path,
    scored: Scored,
    test: Sequence[Record],
    fit: readers.Mode,
    seed: int,
    counts: spool.Rows | None = None,
    pictures: bool = True,
) -> None:
    """predictions.npz: one row per image, maps in the tower frame, and a gallery in image frames.

    Gallery arrays: gallery_index (rows shown), gallery_image_i uint8, gallery_map_i float16,
    gallery_mask_i uint8 (absent where no mask is known), i = 0, 1, ...
    If `pictures`, for the report: the arrays of `thumbnails.pack`, of every image or of
    thumbnails.MOST drawn by seed. For tables:
    `pixel_counts` (intervals.pixel_counts, where masks are known) and `patient`, where some has
    several images.
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
        pixels = readers.read(test[i].path).pixels[0]
        height, width = pixels.shape
        heat = readers.to_frame(p.maps[i].astype(np.float32), height, width, fit)
        gallery[f"gallery_image_{place}"] = np.round(255 * pixels).astype(np.uint8)
        gallery[f"gallery_map_{place}"] = heat.astype(np.float16)
        if test[i].masks or test[i].label == 0:
            mask = lesions.truth(test[i]) if test[i].label else np.zeros(pixels.shape, bool)
            gallery[f"gallery_mask_{place}"] = mask.astype(np.uint8)
    gallery |= {} if counts is None else {"pixel_counts": counts}
    of = lesions.patients(test)
    gallery |= {} if of is None else {"patient": of}
    if pictures:
        gallery |= thumbnails.pack(test, p.maps, fit, scored.cams, seed)
    arrays: dict[str, Any] = {**p._asdict(), "id": np.array(p.id), **(scored.doubts or {})}
    spool.write_npz(workdir / "predictions.npz", arrays | gallery)
