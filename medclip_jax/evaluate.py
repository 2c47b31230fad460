"""Score a test set: map, image score, uncertainty and p-value per image, then the metrics."""

import io
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import track

from medclip_jax import (
    attribution,
    calibrate,
    explain,
    features,
    files,
    intervals,
    limits,
    metrics,
    processes,
    rejection,
    score,
    sharding,
    suppress,
    thumbnails,
)
from medclip_jax.data import readers
from medclip_jax.detector import Detector
from medclip_jax.limits import Limits
from medclip_jax.structs import Features, Predictions, Record

BATCH = 32  # images per scoring call
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
) -> Scored:
    """Scores of the test set, calibrated on the held-out supports alone. Labels are not read.

    top: share of the largest patches whose mean is the image score (0: the map's maximum).
    alpha: false-alarm rate asked for. pixel_rate: of healthy pixels. passes: of MC-dropout.
    quiet: outlier suppression of the maps, learned on these supports.
    """
    size = bank.clip.size
    maps, image_scores = jax.jit(partial(score.to_pixels, size=size)), scorer(size, top)
    found = calibrated(detector, size, top, alpha, pixel_rate, quiet)
    keys = jax.random.split(jax.random.key(seed), passes)
    cams = explainer(detector, top)

    local = sharding.mesh(jax.local_devices())
    rows, doubt, why = [], [], []
    mine = [test[i] for i in processes.part(len(test))]
    out = np.empty((len(mine), size, size), np.float16)
    groups = (detector.load or features.load_images)(bank, mine, BATCH)
    groups = track(groups, "score", -(-len(mine) // BATCH), console=Console(stderr=True))
    for i, batch in enumerate(groups):
        real = len(batch.pooled)
        batch, _ = sharding.put(batch, local)
        values = detector.patches(batch)
        raw = image_scores(values) if detector.image is None else detector.image(batch)
        rows.append(np.asarray(raw, np.float64)[:real])
        heat = np.asarray(maps(values))[:real]
        if quiet is not None:
            shown = mine[i * BATCH : i * BATCH + real]
            heat = suppress.treat(heat, quiet.steps, list(suppress.areas(shown, size, bank.fit)))
        heat = calibrate.to_unit(heat, found.pixel.value, found.pixel_width)
        out[i * BATCH : i * BATCH + len(heat)] = half_precision(heat)
        doubt.append(doubts(detector, batch, keys, image_scores, found)[:real])
        why.append(cams(batch)[:real])
    held = (np.concatenate(rows), np.concatenate(doubt), out, np.concatenate(why))
    raw, doubt, out, why = processes.gather(held, len(test))
    predictions = Predictions(
        tuple(r.id for r in test),
        np.array([r.label for r in test]),
        calibrate.to_unit(raw, found.image.value, found.image_width),
        calibrate.p_values(raw, found.healthy) if detector.k > 1 else np.full(len(raw), np.nan),
        doubt[:, 0],
        out,
    )
    explained = why if why.any() else None
    told = rejection.named(doubt[:, 1:]) if detector.passes is not None and passes else None
    return Scored(predictions, limits.described(found, alpha, detector.k), found, explained, told)


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
        read = detector.image_copies or (lambda b: jax.vmap(image_scores)(detector.copies(b)))
        each = calibrate.to_unit(np.asarray(read(batch)), found.image.value, found.image_width)
        copies = each.std(0)
    return np.stack([unit.std(0), *rejection.of_passes(unit), copies], 1)


def explainer(detector: Detector, top: float) -> Callable[[Features], np.ndarray]:
    """features -> Grad-CAM per patch [n, p] of what the detector reads, float16.

    One column of 0 for a detector that reads pixels.
    """
    choose = detector.choose or (lambda _: ())
    chosen = detector.chosen or (lambda batch, _: detector.patches(batch))
    gradient = attribution.gradient(chosen, top)

    def cams(batch):
        if detector.load is not None:
            return np.zeros((len(batch.pooled), 1), np.float16)
        try:
            return attribution.weigh(batch, gradient(batch, choose(batch))).astype(np.float16)
        except explain.NoGradientError as error:
            logging.warning("no Grad-CAM: %s", error)
            return np.zeros(batch.levels[0].shape[:2], np.float16)

    return cams


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


def measure(scored: Scored, test: Sequence[Record], fit: str) -> dict[str, Any]:
    """Labels and masks are read here, after scoring: image, pixel and calibration metrics."""
    p = scored.predictions
    image = metrics.image_level(p.score, p.label)
    known = [i for i, r in enumerate(test) if r.masks or r.label == 0]
    pixel = None
    if any(test[i].label for i in known):
        measured = [test[i] for i in known]
        masks = truths(measured, p.maps.shape[-1], fit)
        mm = spacings(measured, p.maps.shape[-1], fit)
        pixel = metrics.pixel_level(p.maps[known].astype(np.float32), masks, spacing=mm)
        pixel |= {"distance_unit": "mm"} if mm else {}  # pixels of the tower frame otherwise
    sure = {"image": intervals.image(p.score, p.label)}
    sure["pixel"] = intervals.pixel(p.maps[known], masks, p.label[known]) if pixel else {}
    kept = dict(scored.calibration)
    k, alpha = kept.pop("k"), kept.pop("alpha")
    if k > 1:
        summary = calibrate.calibration_summary(p.p_value[p.label == 0], k, alpha)
    else:
        summary = calibrate.no_promise(p.score[p.label == 0], k, alpha)
    calibration = {**summary, **kept}
    doubts = {"sd": p.uncertainty, **scored.doubts} if scored.doubts else {}
    doubt = {"uncertainty": rejection.measure(p.score, p.label, doubts)}
    return {"image": image, "pixel": pixel, "calibration": calibration, "intervals": sure} | doubt


def truths(test: Sequence[Record], size: int, fit: str) -> Bool[np.ndarray, "n s s"]:
    """Lesion masks in the tower frame; all False for an image without mask."""

    def one(record):
        return readers.fit_mask(truth(record), size, fit) if record.masks else empty

    empty = np.zeros((size, size), bool)
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(one, test)))


def spacings(test: Sequence[Record], size: int, fit: str) -> list[tuple[float, float]] | None:
    """Millimetres per pixel of the tower frame (row, column) of each image; None if any lacks it.

    Distances of one table must have one unit, so one image without spacing makes all of them
    pixels.
    """
    found = []
    for record in test:
        image = readers.read(record.path)
        if image.spacing is None:
            return None
        sides = image.pixels.shape[1:]
        sides = sides if fit == "stretch" else (max(sides),) * 2
        found.append(tuple(mm * side / size for mm, side in zip(image.spacing, sides, strict=True)))
    return found


def truth(record: Record) -> Bool[np.ndarray, "h w"]:
    """The lesion mask of one image in its own frame: the union of its mask files.

    Raises DataError for a mask of another size than its image.
    """
    shape = readers.read(record.path).pixels.shape[1:]
    return readers.read_mask(record.masks, shape)


def write_predictions(
    workdir: Path, scored: Scored, test: Sequence[Record], fit: str, seed: int
) -> None:
    """predictions.npz: one row per image, maps in the tower frame, and a gallery in image frames.

    Gallery arrays: gallery_index (rows shown), gallery_image_i uint8, gallery_map_i float16,
    gallery_mask_i uint8 (absent where no mask is known), i = 0, 1, ...
    Of every image, for the report: the arrays of `thumbnails.pack`.
    """
    p = scored.predictions
    rng = np.random.default_rng(seed)
    shown = [
        i
        for label, count in zip((1, 0), GALLERY, strict=True)
        for i in sorted(rng.permutation(np.flatnonzero(p.label == label))[:count])
    ]
    gallery: dict[str, np.ndarray] = {"gallery_index": np.array(shown)}
    for place, i in enumerate(shown):
        pixels = readers.read(test[i].path).pixels[0]
        heat = readers.to_frame(p.maps[i].astype(np.float32), *pixels.shape, fit)
        gallery[f"gallery_image_{place}"] = np.round(255 * pixels).astype(np.uint8)
        gallery[f"gallery_map_{place}"] = heat.astype(np.float16)
        if test[i].masks or test[i].label == 0:
            mask = truth(test[i]) if test[i].label else np.zeros(pixels.shape, bool)
            gallery[f"gallery_mask_{place}"] = mask.astype(np.uint8)
    gallery |= thumbnails.pack(test, p.maps, fit, scored.cams)
    whole = io.BytesIO()
    np.savez(whole, **{**p._asdict(), "id": np.array(p.id)}, **(scored.doubts or {}), **gallery)
    files.write_bytes(workdir / "predictions.npz", whole.getvalue())
