"""From the configuration to the detector of a run, and its thresholds."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from medclip_jax import build, config_validation
from medclip_jax.clip import checkpoint
from medclip_jax.config_validation import FUSED_METHODS
from medclip_jax.data.records import Record
from medclip_jax.detectors import (
    calibration,
    detector,
    ensemble,
    map_filter,
    memory_bank,
    pixel_baselines,
    prompt_detector,
    tiling,
    zero_shot,
)
from medclip_jax.features import cache, support_images, thumbnails
from medclip_jax.models import model


def scorer(
    c: ConfigDict, clip: checkpoint.Clip, design: model.Design
) -> Callable[..., detector.Scores]:
    """The pure scoring function of the config's method; `detector` builds its parameters."""
    names, pool = branch_names(c), image_pool(c, clip)
    made = {name: branch_scorer(name, clip, design, pool) for name in names}
    return ensemble.scorer(made) if len(names) > 1 else made[names[0]]


def branch_scorer(
    name: str, clip: checkpoint.Clip, design: model.Design, pool: Callable
) -> Callable:
    """The pure scoring function of one branch."""
    if name == "memory":
        return memory_bank.scorer(pool)
    if name.startswith("zero_shot"):
        return zero_shot.scorer(clip, design.prompts.label)
    return prompt_detector.scorer(design, pool)


def image_pool(c: ConfigDict, clip: checkpoint.Clip) -> Callable:
    """Patch values [n, p] -> image scores [n]."""
    return partial(detector.image_score, size=clip.size, top=c.score.top)


def branch_names(c: ConfigDict) -> tuple[str, ...]:
    """The branches of the config's method; a method that does not fuse is its own branch."""
    return tuple(c.branches) if c.method in FUSED_METHODS else (c.method,)


def supports(
    c: ConfigDict, feature_cache: cache.FeatureCache, records: Sequence[Record]
) -> support_images.Supports | None:
    """Tokens of the supports; thumbnails for a baseline on pixels, None where there are none."""
    if not records:
        return None
    if c.method in pixel_baselines.METHODS:
        images = support_images.healthy_images(feature_cache, records)
        features = thumbnails.of_images(images)
        return support_images.Supports(len(records), features, features, None, None)
    return support_images.load(feature_cache, records, c.score.tiles)


def assemble(
    c: ConfigDict,
    clip: checkpoint.Clip,
    design: model.Design,
    frozen: dict,
    params: Any,
    found: support_images.Supports | None,
    folds: Sequence[np.ndarray],
) -> detector.Detector:
    """The detector that the config asks for.

    Args:
        params: [1 + folds, ...] as training leaves them.
        found: tokens of the supports; None: zero-shot without any.
        folds: the supports of each fold.
    """
    if c.method in pixel_baselines.METHODS:
        return pixel_baselines.METHODS[c.method](found.calibrating, found.k, clip.size)
    branches = {
        n: branch(n, c, clip, design, frozen, params, found, folds) for n in branch_names(c)
    }
    return ensemble.build(branches) if len(branches) > 1 else next(iter(branches.values()))


def branch(
    name: str, c: ConfigDict, clip, design, frozen, params, found, folds
) -> detector.Detector:
    """The detector of one branch, of whole images or with their tiles."""
    pool = image_pool(c, clip)
    plain = name.startswith("zero_shot")
    if plain:
        design, _ = build.build(c, clip, context=0)
    if found is None:
        return zero_shot.build(clip, frozen, design, None, 0)

    def scale(tokens, calibrating):
        if name == "memory":
            like = {"k": found.k, "coreset": c.memory_coreset, "calibrating": calibrating}
            return memory_bank.build(tokens, pool, clip.size, **like)
        if plain:
            return zero_shot.build(clip, frozen, design, calibrating, found.k)
        return prompt_detector.build(params, frozen, design, pool, calibrating, folds, found.k)

    whole = scale(found.tokens, found.calibrating)
    if c.score.tiles == 1:
        return whole
    small = scale(found.tile_tokens, found.tile_calibrating)
    return tiling.build(whole, small, c.score.tiles, clip.grid, None if plain else pool)


def calibrate(
    c: ConfigDict,
    scorer: detector.Detector,
    feature_cache: cache.FeatureCache,
    records: Sequence[Record],
) -> calibration.Calibration:
    """Thresholds of a detector, from its scores of the supports."""
    steps, mm2 = config_validation.map_filter(c), None
    if steps:
        mm2 = list(map_filter.areas(records, feature_cache.clip.size, feature_cache.fit))
        mm2 = mm2 * len(scorer.calibration.image) if c.k == 1 else mm2  # views of the one support
    return detector.calibrate(
        scorer,
        alpha=c.calibration.alpha,
        pixel_rate=c.calibration.pixel_rate,
        filter_steps=steps,
        mm2=mm2,
    )
