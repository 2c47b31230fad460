"""Distillation (equation 13): a trained workdir's patch logits teach this run.

The teacher is the params of another run, of any CLIP and grid. It reads the very images that this
run learns from (supports, variants, augmented copies), brought to its own frame, and its logits are
brought to this run's grid. It speaks once per image, before training; nothing is learned from a
test image: a teacher whose supports are among them is refused.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from medclip_jax.clip import vit
from medclip_jax.data import preprocessing, records, synthetic_variants
from medclip_jax.data.records import Record
from medclip_jax.detectors import saved
from medclip_jax.errors import ConfigError
from medclip_jax.features import cache, training_pool
from medclip_jax.models import model

BATCH = 16  # images per call of the teacher's tower


class Teacher(NamedTuple):
    """A trained model that gives patch logits."""

    tower: vit.Clip
    recipe: tuple[str, ...]  # of preprocess.STEPS
    logits: Callable  # [n, s, s] in its own frame -> [n, p]


def load(c, tower: vit.Clip, test: Sequence[Record], build: Callable) -> Teacher:
    """The teacher config.teacher of a run with config `c`.

    tower: of the run. build: (config, tower) -> (model.Design, frozen), as train.build. Raises
    WorkdirError if the workdir holds no scorer, CheckpointError if its CLIP cannot be had,
    ConfigError if it cannot teach this run.
    """
    workdir = Path(c.teacher).expanduser()
    held = saved.read(workdir)
    theirs = ConfigDict(held.config)
    refuse(workdir, theirs, held.params, c, test)
    other = tower
    same = held.checkpoint == tower.digest and theirs.model.refine == c.model.refine
    if not same or tuple(theirs.clip.layers) != tuple(c.clip.layers):
        checkpoint = theirs.clip.checkpoint
        other = vit.load(
            checkpoint, tuple(theirs.clip.layers), theirs.clip.dtype, theirs.model.refine
        )
        if other.digest != held.checkpoint:
            raise ConfigError(
                f"config.teacher {workdir} was trained with another CLIP than {checkpoint} "
                f"is now ({held.checkpoint}, not {other.digest}): restore that one"
            )
    design, frozen = build(theirs, other)
    params = jax.tree.map(jnp.asarray, held.params)
    text = jax.jit(partial(model.text_features, design=design))(params, frozen)

    @jax.jit
    def logits(images):
        like = dict(tower=other.vision_tower, mean=other.mean, std=other.std)
        tokens = vit.encode_images(other.vision, images, **like)
        return model.forward(params, text, tokens, design).logit

    return Teacher(other, preprocessing.steps(theirs.data.recipe), logits)


def refuse(workdir: Path, theirs: ConfigDict, params: Any, c, test: Sequence[Record]) -> None:
    """Raise ConfigError if this teacher cannot teach a run with config `c`."""
    said = f"config.teacher {workdir}"
    if not theirs.steps or "adapters" not in params:
        raise ConfigError(f"{said} learned nothing (method {theirs.method}): give a trained one")
    for name in ("name", "fit"):
        if theirs.data[name] != c.data[name]:
            raise ConfigError(
                f"{said} was trained with config.data.{name} {theirs.data[name]!r} and this run "
                f"has {c.data[name]!r}: give a teacher of the same"
            )
    if theirs.model.form != c.model.form:
        raise ConfigError(
            f"{said} has model.form {theirs.model.form!r} and this run {c.model.form!r}, whose "
            "logits differ in meaning: give a teacher of the same form"
        )
    supports = json.loads((workdir / saved.SETTINGS).read_text())["supports"]
    seen = set(supports) & {r.sha256 for r in test}
    if seen:
        raise ConfigError(
            f"{said} learned from {len(seen)} of this run's test images: give a teacher of the "
            "same config.seed, config.k and split"
        )


def pool(
    teacher: Teacher,
    held: training_pool.Pool,
    feature_cache: cache.FeatureCache,
    supports: Sequence[Record],
    recipe: synthetic_variants.Synthesis,
) -> training_pool.Pool:
    """The pool with the teacher's logits of every row, [1 + variants + copies, p] per support."""
    side, grid = feature_cache.clip.size, feature_cache.clip.grid
    pixels = {r.id: x for r, x in records.read_all(supports, side, feature_cache.fit)}
    partners = np.stack([pixels[s.id] for s in supports])
    taught = []
    for support in supports:
        own = pixels[support.id]
        images = own[None]
        if recipe.variants:
            made = synthetic_variants.variants(support, own, partners, recipe)[0]
            images = np.concatenate([images, made])
        taught.append(to_grid(speak(teacher, images), grid))
    return held._replace(teacher=tuple(taught))


def speak(teacher: Teacher, images: Float[np.ndarray, "n s s"]) -> Float[np.ndarray, "n p"]:
    """The teacher's logits of images in any square frame, [0, 1]."""
    size = teacher.tower.size
    if images.shape[1] != size:
        shape = len(images), size, size
        images = np.asarray(jax.image.resize(images, shape, "linear"))
    images = preprocessing.batch(images, teacher.recipe)
    parts = []
    for start in range(0, len(images), BATCH):
        group = images[start : start + BATCH]
        full = np.resize(group, (BATCH, *group.shape[1:]))  # one shape, one compilation
        parts.append(np.asarray(teacher.logits(full))[: len(group)])
    return np.concatenate(parts)


def to_grid(logit: Float[np.ndarray, "n p"], grid: int) -> Float[np.ndarray, "n q"]:
    """Patch logits on a grid x grid tiling, bilinear (half-pixel centres, as patches tile)."""
    old = round(logit.shape[1] ** 0.5)
    if old == grid:
        return logit
    square = logit.reshape(-1, old, old)
    new = jax.image.resize(square, (len(logit), grid, grid), "linear")
    return np.asarray(new).reshape(len(logit), grid * grid)
