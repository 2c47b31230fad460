"""Distillation (equation 13): the patch logits of a trained model teach this run.

The teacher, of any CLIP and grid, reads the very images that this run learns from, once before
training, in its own frame; its logits are brought to this run's grid.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from medclip_jax.data import preprocessing
from medclip_jax.data.augmentation import Synthesis, variants
from medclip_jax.data.layouts import Record
from medclip_jax.errors import ConfigError
from medclip_jax.features.cache import FeatureCache
from medclip_jax.features.training_pool import TrainingPool
from medclip_jax.io import read

BATCH = 16  # images per call of the teacher's encoder


class Teacher(NamedTuple):
    """A trained model that gives patch logits (build_detector.load_teacher)."""

    size: int  # pixels per side of its frame
    recipe: tuple[str, ...]  # of preprocessing.STEPS
    logits: Callable[[Any], Any]  # [n, s, s] in its own frame -> [n, p]; compiled


def check(
    workdir: Path, teacher: Any, student: Any, supports: Sequence[str], unseen: Sequence[str]
) -> None:
    """Raise ConfigError if this teacher cannot teach this run.

    teacher and student are configs, supports and unseen sha256: of the teacher's supports, and of
    what this run tests and calibrates on (config.calibration.extra).
    """
    name = f"config.teacher {workdir}"
    if not teacher["steps"] or "learned" not in teacher["branches"]:
        raise ConfigError(f"{name} learned nothing (method {teacher['method']}): set a trained one")
    for field in ("name", "fit", "window"):
        if teacher["data"][field] != student["data"][field]:
            raise ConfigError(
                f"{name} was trained with config.data.{field} {teacher['data'][field]!r} and this "
                f"run has {student['data'][field]!r}: set a teacher of the same"
            )
    forms = teacher["model"]["form"], student["model"]["form"]
    if forms[0] != forms[1]:
        raise ConfigError(
            f"{name} has model.form {forms[0]!r} and this run {forms[1]!r}, whose logits differ in "
            "meaning: set a teacher of the same form"
        )
    if seen := set(supports) & set(unseen):
        raise ConfigError(
            f"{name} learned from {len(seen)} of this run's test images, or of those of "
            "config.calibration.extra: set a teacher of the same config.seed, config.k and split"
        )


def add_logits(
    pool: TrainingPool,
    teacher: Teacher,
    feature_cache: FeatureCache,
    supports: Sequence[Record],
    synthesis: Synthesis,
) -> TrainingPool:
    """The pool with the teacher's logits of every row, [1 + variants + copies, p] per support."""
    size, grid = feature_cache.clip.size, feature_cache.clip.grid
    pixels = {r.id: x for r, x in read.read_all(supports, size, feature_cache.fit)}
    partners = np.stack([pixels[s.id] for s in supports])
    logits = []
    for support in supports:
        images = pixels[support.id][None]
        if synthesis.variants:
            altered, *_ = variants(support, images[0], partners, synthesis)
            images = np.concatenate([images, altered])
        logits.append(to_grid(teacher_logits(teacher, images), grid))
    return pool._replace(teacher=tuple(logits))


def teacher_logits(
    teacher: Teacher, images: Float[np.ndarray, "n s s"]
) -> Float[np.ndarray, "n p"]:
    """The teacher's logits of images in any square frame, [0, 1]."""
    if images.shape[1] != teacher.size:
        shape = len(images), teacher.size, teacher.size
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
