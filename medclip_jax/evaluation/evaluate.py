"""Score a test set: map, image score, uncertainty and p-value per image, then the metrics."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import track

from medclip_jax.clip.outputs import Features
from medclip_jax.data.records import Record
from medclip_jax.detectors import calibration as detectors_calibration
from medclip_jax.detectors import limits, map_filter
from medclip_jax.detectors.detector import Detector
from medclip_jax.detectors.limits import Limits
from medclip_jax.distributed import multihost, spool
from medclip_jax.evaluation import (
    bootstrap,
    ground_truth,
    metrics,
    pixel_metrics,
    uncertainty,
)
from medclip_jax.evaluation import predictions as evaluation_predictions
from medclip_jax.evaluation.metrics import MetricError
from medclip_jax.evaluation.predictions import Predictions
from medclip_jax.explain import faithfulness, grad_cam
from medclip_jax.features import cache
from medclip_jax.io import read
from medclip_jax.models import anomaly_map

BATCH = 32  # images per scoring call
TOLERANCE = 2  # of boundary F1, in the unit of the distances


def score_images(
    detector: Detector,
    feature_cache: cache.FeatureCache,
    test: Sequence[Record],
    *,
    top: float,
    alpha: float,
    pixel_rate: float,
    passes: int,
    seed: int,
    quiet: map_filter.Learned | None = None,
    how: grad_cam.Explanation | None = None,
    folder: Path | None = None,
) -> evaluation_predictions.Scored:
    """Scores of the test set, calibrated on the held-out supports alone. Labels are not read.

    top: share of the largest patches whose mean is the image score (0: the map's maximum).
    alpha: false-alarm rate asked for. pixel_rate: of healthy pixels. passes: of MC-dropout.
    quiet: outlier suppression of the maps, learned on these supports.
    how: Grad-CAM of each image; None for the default.
    folder: on whose disk the maps lie until they are written; None for the temporary folder.
    """
    size = feature_cache.clip.size
    maps, image_scores = jax.jit(partial(anomaly_map.to_pixels, size=size)), scorer(size, top)
    found = calibrated(detector, size, top, alpha, pixel_rate, quiet)
    keys = jax.random.split(jax.random.key(seed), passes)
    how = how or grad_cam.Explanation(top=top)

    rows, doubt, why = [], [], []
    mine = [test[i] for i in multihost.process_rows(len(test))]
    out = spool.Rows(len(mine), (size, size), np.float16, folder)
    groups = (detector.load or cache.load_images)(feature_cache, mine, BATCH)
    groups = track(groups, "score", -(-len(mine) // BATCH), console=Console(stderr=True))
    for i, batch in enumerate(groups):
        batch, real = faithfulness.filled(batch, BATCH)  # one shape, whatever is left for the last
        values = detector.patches(batch)
        raw = image_scores(values) if detector.image is None else detector.image(batch)
        rows.append(np.asarray(raw, np.float64)[:real])
        heat = np.asarray(maps(values))[:real]
        finite(mine[i * BATCH :], rows[-1], heat)
        if quiet is not None:
            shown = mine[i * BATCH : i * BATCH + real]
            heat = map_filter.treat(
                heat, quiet.steps, list(map_filter.areas(shown, size, feature_cache.fit))
            )
        heat = detectors_calibration.to_unit(heat, found.pixel.value, found.pixel_width)
        out.put(i * BATCH, evaluation_predictions.half_precision(heat))
        doubt.append(doubts(detector, batch, keys, image_scores, found)[:real])
        why.append(grad_cam.cam_or_zeros(detector, batch, how)[:real])
    held = (np.concatenate(rows), np.concatenate(doubt), np.concatenate(why))
    raw, doubt, why = multihost.gather(held, len(test))
    predictions = Predictions(
        tuple(r.id for r in test),
        np.array([r.label for r in test]),
        detectors_calibration.to_unit(raw, found.image.value, found.image_width),
        detectors_calibration.p_values(raw, found.healthy)
        if detector.k > 1
        else np.full(len(raw), np.nan),
        doubt[:, 0],
        multihost.gather_rows(out, len(test), BATCH, folder),
    )
    explained = why if why.any() else None
    told = uncertainty.named(doubt[:, 1:]) if detector.passes is not None and passes else None
    return evaluation_predictions.Scored(
        predictions, limits.described(found, alpha, detector.k), found, explained, told
    )


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
    quiet: map_filter.Learned | None = None,
) -> Limits:
    """Limits of a detector that reads frames of `size` pixels; the rest as in `score_images`."""
    maps = jax.jit(partial(anomaly_map.to_pixels, size=size))
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
    unit = detectors_calibration.to_unit(np.asarray(each), found.image.value, found.image_width)
    copies = np.full(n, np.nan)
    if detector.copies is not None:
        if detector.image_copies is not None:
            read = detector.image_copies(batch)
        else:
            read = jax.vmap(image_scores)(detector.copies(batch))
        each = detectors_calibration.to_unit(np.asarray(read), found.image.value, found.image_width)
        copies = each.std(0)
    return np.stack([unit.std(0), *uncertainty.of_passes(unit), copies], 1)


def scorer(size: int, top: float):
    """`from_patches` with its settings, compiled: values [n, p] -> scores [n]."""
    return jax.jit(partial(from_patches, size=size, top=top))


def from_patches(values, size: int, top: float):
    """Image score [n] of patch values [n, p]: mean of the top share of the patches.

    A share of 0 is the peers' score, the maximum of the up-sampled map.
    """
    if top > 0:
        return anomaly_map.image_score(values, top)
    return anomaly_map.to_pixels(values, size).max((1, 2))


def measure(
    scored: evaluation_predictions.Scored,
    test: Sequence[Record],
    fit: read.Mode,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Labels and masks are read here, after scoring: image, pixel and calibration metrics.

    `pixel_counts` are rows on the disk of `folder`, for write_predictions; all else is for
    metrics.json.
    """
    p = scored.predictions
    image = metrics.image_level(p.score, p.label)
    pixel, each, counts, points = of_pixels(scored, test, fit, folder)
    of = ground_truth.patients(test)
    intervals = {"image": bootstrap.image(p.score, p.label, groups=of), "pixel": {}}
    if counts is not None:
        known = [i for i in range(len(test)) if counts[i].any()]
        among = None if of is None else of[known]
        rows = ground_truth.Rows(counts, known)
        intervals["pixel"] = bootstrap.pixel(rows, p.label[known], groups=among)
        intervals["pixel"] |= bootstrap.means(each, p.label[known], groups=among)
    kept = dict(scored.calibration)
    k, alpha = kept.pop("k"), kept.pop("alpha")
    summary: dict[str, Any] = {}
    if k > 1:
        summary |= detectors_calibration.calibration_summary(p.p_value[p.label == 0], k, alpha)
    else:
        summary |= detectors_calibration.no_promise(p.score[p.label == 0], k, alpha)
    calibration = {**summary, **kept}
    doubts = {"sd": p.uncertainty, **scored.doubts} if scored.doubts else {}
    doubt = {"uncertainty": uncertainty.measure(p.score, p.label, doubts)}
    found = {"image": image, "pixel": pixel, "calibration": calibration, "intervals": intervals}
    told = {"explanations": points and {"pointing": points}, "pixel_counts": counts}
    return found | doubt | told


def of_pixels(
    scored: evaluation_predictions.Scored,
    test: Sequence[Record],
    fit: read.Mode,
    folder: Path | None = None,
):
    """Pixel metrics, distances of each image that has masks (PixelMetrics.averaged), each image's
    histograms (PixelMetrics.add) and the pointing game; None for all without masks.

    Healthy images count as empty masks; an abnormal image whose mask is unknown is left out, and
    its counts are 0.
    """
    p = scored.predictions
    known = [i for i, r in enumerate(test) if r.masks or r.label == 0]
    if not any(test[i].label for i in known):
        return None, None, None, None
    records, maps = [test[i] for i in known], ground_truth.Rows(p.maps, known)
    masks = ground_truth.Masks(records, p.maps.shape[-1], fit)
    mm = ground_truth.spacings(records, p.maps.shape[-1], fit)
    measured = pixel_metrics.PixelMetrics(tolerance=TOLERANCE)
    counts = spool.Rows(len(test), (3, pixel_metrics.IMAGE_BINS), np.float32, folder)
    sizes = mm or [(1.0, 1.0)] * len(known)
    for i, values, mask, size in zip(known, maps, masks, sizes, strict=True):
        counts.put(i, measured.add(values, mask, size)[None])
    # px: of the encoder frame; one image without spacing makes all distances so
    pixel: dict[str, Any] = measured.pooled() | {
        "distance_unit": "mm" if mm else "px",
        "boundary_tolerance": TOLERANCE,
    }
    why = None if scored.cams is None else scored.cams[known]
    return pixel, measured.averaged(), counts, faithfulness.pointing(maps, why, masks)
