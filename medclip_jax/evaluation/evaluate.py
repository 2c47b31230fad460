"""Score a test set: map, image score, uncertainty and p-value per image, then the metrics."""

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from medclip_jax import files
from medclip_jax.clip.layers import Features
from medclip_jax.data import splits
from medclip_jax.data.layouts import Record
from medclip_jax.detectors import calibration as detectors_calibration
from medclip_jax.detectors.calibration import Calibration
from medclip_jax.detectors.detector import Detector, Raw, finish, places, read_batch
from medclip_jax.detectors.programs import jit_for_detector
from medclip_jax.distributed import runtime, sharding
from medclip_jax.distributed.runtime import progress
from medclip_jax.evaluation import bootstrap, detection, metrics, pixel_metrics
from medclip_jax.evaluation.metrics import MetricError
from medclip_jax.evaluation.predictions import Predictions, Scored
from medclip_jax.explain import grad_cam
from medclip_jax.features import cache
from medclip_jax.io import read

BATCH = 32  # images per scoring call
TOLERANCE = 2  # of boundary F1, in the unit of the distances


def score_images(
    detector: Detector,
    calibration: Calibration,
    feature_cache: cache.FeatureCache,
    test: Sequence[Record],
    *,
    how: grad_cam.Explanation,
    passes: int,
    seed: int,
    folder: Path | None = None,
) -> Scored:
    """Scores and Grad-CAM of the test set. Labels are not read.

    Args:
        folder: on whose disk the maps lie until they are written; None for the temporary folder.

    Raises MetricError naming an image whose score or map is not finite.
    """
    keys = jax.random.split(jax.random.key(seed), passes)
    mine = [test[i] for i in runtime.process_rows(len(test))]
    maps = files.temporary_array((len(mine), detector.size, detector.size), np.float16, folder)
    parts = []
    groups = (detector.read or cache.load_images)(feature_cache, mine, BATCH)

    def score(batch: Features) -> tuple[Raw, np.ndarray]:  # while the maps before are filtered
        batch, n = sharding.fill_rows(batch, BATCH)  # one shape, whatever is left for the last
        return jax.tree.map(lambda x: x[:n], explained(detector, batch, keys, how))

    with closing(runtime.prefetch(score, groups)) as scored:
        for i, (raw, own) in enumerate(progress(scored, "score", -(-len(mine) // BATCH))):
            rows = slice(i * BATCH, i * BATCH + len(own))
            check_finite(mine[rows], raw)
            mm2 = None
            if calibration.filter.min_area_mm2 or calibration.filter.min_area_pixels:
                mm2 = read.pixel_areas(mine[rows], detector.size, feature_cache.fit)
            scores = finish(raw, calibration, mm2)
            maps[rows] = detectors_calibration.half_precision(scores.maps)
            parts.append((scores._replace(maps=np.zeros(len(own))), own))
    scores, cams = runtime.gather(jax.tree.map(lambda *x: np.concatenate(x), *parts), len(test))
    grid = round(scores.patch_mean.shape[1] ** 0.5)
    predictions = Predictions(
        tuple(r.id for r in test),
        np.array([r.label for r in test]),
        scores.score,
        scores.p_value,
        scores.uncertainty,
        runtime.gather_rows(maps, len(test), BATCH, folder),
        *(x.reshape(-1, grid, grid).astype(np.float32) for x in scores[5:7]),
    )
    measures = None
    if detector.stochastic:
        columns = [*metrics.of_passes(scores.passes.T)]
        columns += [scores.folds.std(1)] if scores.folds.shape[1] > 1 else []
        measures = dict(zip(metrics.UNCERTAINTIES, columns, strict=False))
    return Scored(predictions, calibration, cams if cams.any() else None, measures)


def explained(detector: Detector, batch: Features, keys, how: grad_cam.Explanation):
    """Raw scores of a batch, on the host, and Grad-CAM per patch [n, p], float16.

    One program: what both share runs once. One column of 0 if patches do not have one token each.
    """
    static = detector._replace(params=None, fold_params=None, calibration=None)
    raw, slopes = _both(static, how, (detector.params, detector.fold_params), batch, keys)
    if slopes is None:
        return jax.device_get(raw), np.zeros((len(batch.pooled), 1), np.float16)
    return jax.device_get(raw), grad_cam.weigh_or_zeros(batch, slopes, how)


@jit_for_detector(2)
def _both(static: Detector, how: grad_cam.Explanation, params, batch: Features, keys):
    detector = static._replace(params=params[0], fold_params=params[1])
    plain = detector.read is None or detector.scales > 1
    slopes = grad_cam.gradients(detector, batch, how.layer, how.top) if plain else None
    return read_batch(detector, batch, keys), slopes


def check_finite(records: Sequence[Record], raw: Raw) -> None:
    """Raise MetricError naming the first of the images whose score or map holds NaN or inf."""
    bad = ~(np.isfinite(raw.image) & np.isfinite(raw.maps).all((1, 2)))
    if bad.any():
        name = records[int(np.argmax(bad))].id
        raise MetricError(f"{name}: its score or map is not finite; check that image file.")


def measure(
    scored: Scored,
    test: Sequence[Record],
    fit: read.Mode,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Labels and masks are read here, after scoring: image, pixel and calibration metrics.

    `pixel_counts` are rows on the disk of `folder`, for write_predictions; all else is for
    metrics.json.
    """
    p = scored.predictions
    pixel, each, counts, points, lesions = of_pixels(scored, test, fit, folder)
    of = splits.unit_numbers(test)
    intervals = {"image": bootstrap.image(p.score, p.label, groups=of), "pixel": {}}
    if counts is not None:
        known = [i for i in range(len(test)) if counts[i].any()]
        among = None if of is None else of[known]
        rows = Rows(counts, known)
        intervals["pixel"] = bootstrap.pixel(rows, p.label[known], groups=among)
        intervals["pixel"] |= bootstrap.means(each, p.label[known], groups=among)
    k, alpha, healthy = scored.calibration.k, scored.calibration.image.alpha_requested, p.label == 0
    if k > 1:
        proven = scored.calibration.image.bound is not None
        summary = detectors_calibration.calibration_summary(p.p_value[healthy], k, alpha, proven)
    else:
        image = scored.calibration.image
        summary = detectors_calibration.no_promise(p.score[healthy], k, image)
    found = p.score[~healthy] >= 0.5
    summary["sensitivity"] = float(found.mean()) if len(found) else metrics.NAN
    summary["oracle_sensitivity"] = metrics.sensitivity_at(p.score, p.label, 1 - alpha)
    sd = {"sd": p.uncertainty, **scored.uncertainties} if scored.uncertainties else {}
    return {
        "image": metrics.image_level(p.score, p.label),
        "pixel": pixel,
        "lesions": lesions,
        "calibration": {**summary, **detectors_calibration.described(scored.calibration)},
        "intervals": intervals,
        "uncertainty": metrics.risk_and_coverage(p.score, p.label, sd),
        "explanations": points and {"pointing": points},
        "pixel_counts": counts,
    }


def of_pixels(
    scored: Scored,
    test: Sequence[Record],
    fit: read.Mode,
    folder: Path | None = None,
):
    """Pixel metrics, distances of each image that has masks (PixelMetrics.averaged), each image's
    histograms (PixelMetrics.add), the pointing game and detection; None for all without masks.

    Healthy images count as empty masks; an abnormal image whose mask is unknown is left out, and
    its counts are 0. Padding is not measured.
    """
    p = scored.predictions
    known = [i for i, r in enumerate(test) if r.masks or r.label == 0]
    if not any(test[i].label for i in known):
        return None, None, None, None, None
    records, maps = [test[i] for i in known], Rows(p.maps, known)
    masks = Masks(records, p.maps.shape[-1], fit)
    mm = spacings(records, p.maps.shape[-1], fit)
    measured = pixel_metrics.PixelMetrics(tolerance=TOLERANCE)
    shape = len(test), 3, pixel_metrics.IMAGE_BINS
    counts = files.temporary_array(shape, np.float32, folder)
    sizes = mm or [(1.0, 1.0)] * len(known)
    named = ((r.path, r.window) for r in records)
    inside = places(named, p.maps.shape[-1], fit) or [np.s_[:, :]] * len(known)
    lesions: list[detection.Image] = []
    for i, *whole, size, place in zip(known, maps, masks, sizes, inside, strict=True):
        values, mask = (x[place] for x in whole)
        counts[i] = measured.add(values, mask, size)
        lesions.append(detection.image_of(values, bool(p.score[i] >= 0.5), mask))
    # px: of the encoder frame; one image without spacing makes all distances so
    pixel: dict[str, Any] = measured.pooled() | {
        "distance_unit": "mm" if mm else "px",
        "boundary_tolerance": TOLERANCE,
    }
    why = None if scored.cams is None else scored.cams[known]
    points = pixel_metrics.pointing(maps, why, masks, inside)
    return pixel, measured.averaged(), counts, points, detection.measured(lesions, p.label[known])


# --- what is known of test images: read after scoring only ---


class Masks:
    """Lesion masks in the encoder frame, bool [s, s] each; all False for an image without mask.

    Read once and stored compressed, about 300 bytes each; iterating unpacks one at a time.
    Raises DataError for a mask that cannot be read or is of another size than its image.
    """

    def __init__(self, records: Sequence[Record], size: int, fit: read.Mode):
        self.size = size

        def pack(record: Record) -> bytes:
            if not record.masks:
                return b""
            return zlib.compress(np.packbits(read.fit_mask(lesion_mask(record), size, fit)).data, 1)

        with ThreadPoolExecutor() as pool:
            self.packed = list(pool.map(pack, records))

    def __len__(self) -> int:
        return len(self.packed)

    def __iter__(self) -> Iterator[Bool[np.ndarray, "s s"]]:
        shape = self.size, self.size
        for packed in self.packed:
            if not packed:
                yield np.zeros(shape, bool)
                continue
            bits = np.frombuffer(zlib.decompress(packed), np.uint8)
            yield np.unpackbits(bits, count=self.size**2).astype(bool).reshape(shape)


def spacings(
    records: Sequence[Record], size: int, fit: read.Mode
) -> list[tuple[float, float]] | None:
    """Millimetres per pixel of the encoder frame (row, column) of each image; None if any lacks it.

    Distances of one table must have one unit, so one image without spacing makes all of them
    pixels.
    """
    sizes = []
    for record in records:
        image = read.open_image(record.path, window=record.window)
        if image.spacing is None:
            return None
        row, column = image.spacing
        height, width = image.shape[1:] if fit == "stretch" else (max(image.shape[1:]),) * 2
        sizes.append((row * height / size, column * width / size))
    return sizes


def lesion_mask(record: Record) -> Bool[np.ndarray, "h w"]:
    """The lesion mask of one image in its own frame: the union of its mask files.

    Raises DataError for a mask of another size than its image.
    """
    shape = read.open_image(record.path, window=record.window).shape[1:]
    return read.read_mask(record.masks, shape, record.path)


class Rows(Sequence):
    """Some rows of stored arrays as float32, one at a time: a copy of all would take the memory."""

    def __init__(self, stored: Any, rows: Sequence[int]):
        self.stored, self.rows = stored, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.stored[self.rows[place]].astype(np.float32)
