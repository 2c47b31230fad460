"""From the configuration to the detector of a run, and its thresholds."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from medclip_jax import config_validation
from medclip_jax.clip.checkpoint import Clip
from medclip_jax.config_validation import FUSED_METHODS
from medclip_jax.data.layouts import Record
from medclip_jax.detectors import (
    calibration,
    detector,
    ensemble,
    memory_bank,
    prompt_detector,
    tiling,
)
from medclip_jax.features import cache
from medclip_jax.io import read
from medclip_jax.models import model


def score_function(
    c: ConfigDict, clip: Clip, design: model.Design
) -> Callable[..., detector.Scores]:
    """The pure scoring function of the config's method; `assemble` builds its parameters."""
    names, image_score = branch_names(c), image_score_of(c, clip)
    branches = {name: branch_function(name, clip, design, image_score) for name in names}
    return ensemble.scorer(branches) if len(names) > 1 else branches[names[0]]


def branch_function(name: str, clip: Clip, design: model.Design, image_score: Callable) -> Callable:
    """The pure scoring function of one branch."""
    if name == "memory":
        return memory_bank.scorer(image_score)
    if name.startswith("zero_shot"):
        return prompt_detector.zero_shot_scorer(clip, design.prompts.label)
    return prompt_detector.scorer(design, image_score)


def image_score_of(c: ConfigDict, clip: Clip) -> Callable:
    """Patch values [n, p] -> image scores [n]."""
    return partial(detector.image_score, size=clip.size, top=c.score.top)


def branch_names(c: ConfigDict) -> tuple[str, ...]:
    """The branches of the config's method; a method that does not fuse is its own branch."""
    return tuple(c.branches) if c.method in FUSED_METHODS else (c.method,)


def branch_shares(c: ConfigDict) -> dict | None:
    """Each branch's share of the map and of the image score; None where nothing is fused."""
    names = branch_names(c)
    return ensemble.shares(names) if len(names) > 1 else None


def supports(
    c: ConfigDict, feature_cache: cache.FeatureCache, records: Sequence[Record]
) -> tiling.Supports | None:
    """Tokens of the supports; thumbnails for a baseline on pixels, None where there are none."""
    if not records:
        return None
    if c.method in memory_bank.PIXEL_BASELINES:
        images = tiling.healthy_images(feature_cache, records)
        features = memory_bank.to_thumbnails(images)
        return tiling.Supports(len(records), features, features, None, None)
    return tiling.load_supports(feature_cache, records, c.score.tiles)


def assemble(
    c: ConfigDict,
    clip: Clip,
    design: model.Design,
    plain_design: model.Design,
    frozen: dict,
    params: Any,
    images: tiling.Supports | None,
    folds: Sequence[np.ndarray],
) -> detector.Detector:
    """The detector that the config asks for.

    Args:
        plain_design: of prompts without learnable context, for zero-shot.
        params: [1 + folds, ...] as training leaves them.
        images: tokens of the supports; None: zero-shot without any.
        folds: the supports of each fold.
    """
    if c.method in memory_bank.PIXEL_BASELINES and images is not None:
        return memory_bank.PIXEL_BASELINES[c.method](images.calibrating, images.k, clip.size)
    branches = {
        n: branch(n, c, clip, design, plain_design, frozen, params, images, folds)
        for n in branch_names(c)
    }
    return ensemble.build(branches) if len(branches) > 1 else next(iter(branches.values()))


def branch(
    name: str, c: ConfigDict, clip, design, plain_design, frozen, params, images, folds
) -> detector.Detector:
    """The detector of one branch, of whole images or with their tiles."""
    image_score = image_score_of(c, clip)
    plain = name.startswith("zero_shot")
    if images is None:
        return prompt_detector.zero_shot(clip, frozen, plain_design, None, 0)

    def scale(tokens, calibrating):
        if name == "memory":
            like = {"k": images.k, "coreset": c.memory_coreset, "calibrating": calibrating}
            return memory_bank.build(tokens, image_score, clip.size, **like)
        if plain:
            return prompt_detector.zero_shot(clip, frozen, plain_design, calibrating, images.k)
        return prompt_detector.build(
            params, frozen, design, image_score, calibrating, folds, images.k
        )

    whole = scale(images.tokens, images.calibrating)
    if c.score.tiles == 1:
        return whole
    small = scale(images.tile_tokens, images.tile_calibrating)
    return tiling.build(whole, small, c.score.tiles, clip.grid, None if plain else image_score)


def calibrate(
    c: ConfigDict,
    scores: detector.Detector,
    feature_cache: cache.FeatureCache,
    records: Sequence[Record],
) -> calibration.Calibration:
    """Thresholds of a detector, from its scores of the supports."""
    steps, mm2 = config_validation.map_filter(c), None
    if steps:
        mm2 = read.pixel_areas(records, feature_cache.clip.size, feature_cache.fit)
        mm2 = mm2 * len(scores.calibration.image) if c.k == 1 else mm2  # views of the one support
    return detector.calibrate(
        scores,
        alpha=c.calibration.alpha,
        pixel_rate=c.calibration.pixel_rate,
        filter_steps=steps,
        mm2=mm2,
    )
