"""A trained workdir, loaded: images in the tower frame -> scores, p-values, doubt and maps."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from medclip_jax import build
from medclip_jax.clip import text_adapter, vit
from medclip_jax.clip.outputs import Features
from medclip_jax.detectors import (
    calibration,
    detector,
    ensemble,
    limits,
    map_filter,
    memory_bank,
    pixel_baselines,
    prompt_detector,
    saved,
    zero_shot,
)
from medclip_jax.distributed import sharding
from medclip_jax.errors import CheckpointError, ConfigError
from medclip_jax.evaluation import evaluate
from medclip_jax.features import cache, encoder
from medclip_jax.models.anomaly_map import to_pixels


class Readings(NamedTuple):
    """Compiled readers of patch values [n, p]."""

    maps: Any  # -> [n, size, size]
    image_scores: Any  # -> [n]


class Trained(NamedTuple):
    """All that scoring needs, on the devices."""

    config: ConfigDict
    feature_cache: cache.FeatureCache  # the tower; nothing is read from or written to its folder
    detector: detector.Detector
    limits: limits.Limits
    readings: Readings
    keys: Any  # [t] of MC-dropout
    digest: str  # names the scorer
    k: int  # supports; with fewer than 2 there are no p-values (NaN)
    steps: map_filter.Steps | None = None  # outlier suppression of the maps


class Scores(NamedTuple):
    """Scores of n images."""

    score: Float[np.ndarray, " n"]  # [0, 1], 0.5 is the threshold
    p_value: Float[np.ndarray, " n"]
    alarm: Bool[np.ndarray, " n"]  # the decision at the false-alarm rate asked for in training
    uncertainty: Float[np.ndarray, " n"]  # sd of the score over MC-dropout passes
    maps: Float[np.ndarray, "n s s"]  # tower frame, [0, 1], 0.5 is the pixel threshold


class Raw(NamedTuple):
    """What the detector says of n images, before thresholds."""

    score: Float[np.ndarray, " n"]
    maps: Float[np.ndarray, "n s s"]  # tower frame
    doubt: Float[np.ndarray, " n"]  # sd of the unit score over MC-dropout passes


def load(workdir: Path) -> Trained:
    """The scorer of a trained workdir; the supports' files are not needed.

    Raises WorkdirError if there is no whole scorer, CheckpointError if its CLIP is not the one
    that it was trained with, ConfigError for what only a table scores: baselines and tiles.
    """
    held = saved.read(workdir)
    c = ConfigDict(held.config)
    if c.method in pixel_baselines.METHODS:
        raise ConfigError(
            f"{workdir} holds the baseline {c.method}, which is made for comparison in tables and "
            "not kept for other images: train with method=ours"
        )
    if c.score.tiles > 1:
        raise ConfigError(
            f"{workdir} scores tiles (config.score.tiles), which --mode predict cannot: "
            "train with tiles=1"
        )
    tower = vit.load(c.clip.checkpoint, tuple(c.clip.layers), c.clip.dtype, c.model.refine)
    if tower.digest != held.checkpoint:
        raise CheckpointError(
            f"{workdir} was trained with another checkpoint than {c.clip.checkpoint} is now "
            f"({held.checkpoint}, not {tower.digest}): restore that one"
        )
    if text_adapter.digest(c.model.language) != held.language:
        raise CheckpointError(
            f"{workdir} was trained with another language adapter than {c.model.language} is now: "
            "restore that one"
        )
    mesh = sharding.mesh()
    like = (tower, c.data.fit, c.clip.dtype, mesh, c.data.recipe, c.data.window)
    feature_cache = cache.open(workdir, *like)
    keys = jax.random.split(jax.random.key(c.seed), c.score.passes)
    readings = Readings(
        jax.jit(partial(to_pixels, size=tower.size)), evaluate.scorer(tower.size, c.score.top)
    )
    made = _detector(c, held, tower, readings)
    return Trained(
        c, feature_cache, made, held.limits, readings, keys, held.digest, held.k, held.steps
    )


def _detector(c, held: saved.Stored, tower: vit.Clip, readings: Readings) -> detector.Detector:
    """The detector as training assembled it.

    Its held-out values made the limits and the mix, which are kept. So where a branch does not
    compare with the supports themselves, one blank row stands for them.
    """
    rows = tower.grid**2
    levels = tuple(jnp.zeros((1, rows, width)) for width in tower.widths)
    blank = Features(jnp.zeros((1, tower.joint)), levels)
    if tower.vision_tower.inputs:
        read = tuple(jnp.zeros((1, rows + 1, width)) for width in tower.widths)
        blank = blank._replace(inputs=read)
    params = jax.tree.map(lambda x: jnp.asarray(x)[None], held.params)

    def branch(name: str) -> detector.Detector:
        name = name.removesuffix(ensemble.IMAGE_ONLY)
        if name == "memory":
            tokens = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), held.tokens)
            return memory_bank.remember(tokens, c.memory_coreset)
        if name == "zero_shot":
            design, frozen = build.build(c, tower, context=0)
            return zero_shot.zero_shot(params, frozen, design, tower, None)
        design, frozen = build.build(c, tower)
        return prompt_detector.learned(params, frozen, design, blank, [])

    if held.mix is None:
        return branch(c.branches[0] if c.method in ensemble.METHODS else c.method)
    nothing = ensemble.Evidence(
        np.zeros((1, rows)), np.zeros(1), np.zeros((1, 1, rows)), np.zeros((1, 1))
    )
    branches = {name: branch(name) for name in held.mix.names}
    found = dict.fromkeys(branches, nothing)
    return ensemble.combine(branches, found, held.mix, readings.image_scores)


def batch_size(trained: Trained) -> int:
    """Images that `score` takes at a time without another compilation."""
    return encoder.batch_size(trained.feature_cache)


def score(
    trained: Trained, images: Float[np.ndarray, "n s s"], mm2: Sequence[float | None] | None = None
) -> Scores:
    """Score images in the tower frame, [0, 1]; any number, `batch_size` at a time.

    mm2: area of a pixel of the tower frame of each, None where it is unknown (suppress.area).
    """
    size = batch_size(trained)
    mm2 = [None] * len(images) if mm2 is None else mm2
    parts = [
        _batch(trained, images[i : i + size], mm2[i : i + size])
        for i in range(0, len(images), size)
    ]
    return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _batch(trained: Trained, images: Float[np.ndarray, "n s s"], mm2) -> Scores:
    return finish(trained, read(trained, encode(trained, images), len(images)), mm2)


# Scoring in three steps, which prediction runs one beside another: each on its own thread.


def encode(trained: Trained, images: Float[np.ndarray, "n s s"]) -> Features:
    """Tokens of 1 to `batch_size` images, filled up with copies: one shape, one compilation."""
    full = images[np.arange(batch_size(trained)) % len(images)]
    return encoder.encode(trained.feature_cache, full)


def read(trained: Trained, tokens: Features, real: int) -> Raw:
    """What the detector says of the first `real` images of `encode`."""
    return Raw(*(x[:real] for x in _read(trained, tokens)))


def finish(trained: Trained, raw: Raw, mm2: Sequence[float | None]) -> Scores:
    """Raw values -> unit scores, decisions and maps; on the host, each image for itself."""
    maps = raw.maps
    if trained.steps is not None:
        maps = map_filter.treat(maps, trained.steps, mm2)
    heat = calibration.to_unit(maps, trained.limits.pixel.value, trained.limits.pixel_width)
    image, nothing = trained.limits.image, np.full(len(raw.score), np.nan)
    return Scores(
        calibration.to_unit(raw.score, image.value, trained.limits.image_width),
        calibration.p_values(raw.score, trained.limits.healthy) if trained.k > 1 else nothing,
        raw.score > image.value,
        raw.doubt,
        heat,
    )


def _read(trained: Trained, batch: Features):
    """Raw image scores [n], raw maps [n, s, s] and uncertainty [n], on the host."""
    made, found, readings = trained.detector, trained.limits, trained.readings
    values = made.patches(batch)
    raw = readings.image_scores(values) if made.image is None else made.image(batch)
    maps = np.asarray(readings.maps(values))
    doubt = np.zeros(len(raw))
    each = passes(made, readings, batch, trained.keys)
    if each is not None:
        doubt = calibration.to_unit(np.asarray(each), found.image.value, found.image_width).std(0)
    return np.asarray(raw, np.float64), maps, doubt


def passes(made: detector.Detector, readings: Readings, batch: Features, keys):
    """Raw image scores of the MC-dropout passes [t, n]; None where nothing is random."""
    if made.passes is None or not len(keys):
        return None
    if made.image_passes is not None:
        return made.image_passes(batch, keys)
    return jax.vmap(readings.image_scores)(made.passes(batch, keys))
