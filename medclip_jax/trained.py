"""A trained workdir, loaded: images in the tower frame -> scores, p-values, doubt and maps."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from medclip_jax import calibrate, clip, detector, evaluate, features, scorer, sharding, train
from medclip_jax.errors import CheckpointError
from medclip_jax.structs import Features


class Trained(NamedTuple):
    """All that scoring needs, on the devices."""

    config: ConfigDict
    bank: features.Bank  # the tower; nothing is read from or written to its folder
    detector: detector.Detector
    limits: evaluate.Limits
    readings: evaluate.Readings
    keys: Any  # [t] of MC-dropout
    digest: str  # names the scorer


class Scores(NamedTuple):
    """Scores of n images."""

    score: Float[np.ndarray, " n"]  # [0, 1], 0.5 is the threshold
    p_value: Float[np.ndarray, " n"]
    alarm: Bool[np.ndarray, " n"]  # the decision at the false-alarm rate asked for in training
    uncertainty: Float[np.ndarray, " n"]  # sd of the score over MC-dropout passes
    maps: Float[np.ndarray, "n s s"]  # tower frame, [0, 1], 0.5 is the pixel threshold


def load(workdir: Path) -> Trained:
    """The scorer of a trained workdir; the supports' files are not needed.

    Raises WorkdirError if there is no whole scorer, CheckpointError if its CLIP is not the one
    that it was trained with.
    """
    held = scorer.read(workdir)
    c = ConfigDict(held.config)
    tower = clip.load(c.clip.checkpoint, tuple(c.clip.levels), c.clip.dtype)
    if tower.digest != held.checkpoint:
        raise CheckpointError(
            f"{workdir} was trained with another checkpoint than {c.clip.checkpoint} is now "
            f"({held.checkpoint}, not {tower.digest}): restore that one"
        )
    mesh = sharding.mesh()
    bank = features.open_bank(workdir, tower, c.data.fit, c.bank_dtype, mesh)
    design, frozen = train.build(c, tower)
    # Held-out values made the limits, which are kept: where a method does not compare with the
    # supports themselves, one blank row stands for them.
    tokens = _blank(tower) if held.tokens is None else held.tokens
    tokens = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tokens)
    theta = jax.tree.map(lambda x: jnp.asarray(x)[None], held.theta)
    made = detector.assemble(c.method, theta, frozen, design, tower, tokens, [])
    keys = jax.random.split(jax.random.key(c.seed), c.score.passes)
    readings = evaluate.readings(tower.size, c.score.top)
    return Trained(c, bank, made, held.limits, readings, keys, held.digest)


def batch_size(trained: Trained) -> int:
    """Images that `score` takes at a time without another compilation."""
    return features.batch_size(trained.bank)


def score(trained: Trained, images: Float[np.ndarray, "n s s"]) -> Scores:
    """Score images in the tower frame, [0, 1]; any number, `batch_size` at a time."""
    size = batch_size(trained)
    parts = [_batch(trained, images[i : i + size]) for i in range(0, len(images), size)]
    return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _batch(trained: Trained, images: Float[np.ndarray, "n s s"]) -> Scores:
    full = np.resize(images, (batch_size(trained), *images.shape[1:]))  # one shape, one compilation
    tokens = features.encode(trained.bank, full)
    found = evaluate.score_batch(
        trained.detector, tokens, trained.limits, trained.readings, trained.keys
    )
    raw, heat, doubt = (x[: len(images)] for x in found)
    image = trained.limits.image
    return Scores(
        calibrate.to_unit(raw, image.value, trained.limits.image_width),
        calibrate.p_values(raw, trained.limits.healthy),
        raw > image.value,
        doubt,
        heat,
    )


def _blank(tower: clip.Clip) -> Features:
    level = np.zeros((1, tower.grid**2, tower.width), np.float32)
    pooled = np.zeros((1, tower.joint), np.float32)
    return Features(pooled, (level,) * len(tower.vision_tower.levels))
