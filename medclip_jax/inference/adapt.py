"""A new site: a handful of healthy images and a meta-trained params become a ready detector.

What training does with its supports at its end, alone: decode, encode, adapt, calibrate. Nothing
is written. The first call of a number of images compiles; later ones are quick.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from medclip_jax import build
from medclip_jax.clip import vit
from medclip_jax.clip.outputs import Features
from medclip_jax.data import preprocessing
from medclip_jax.detectors import limits
from medclip_jax.detectors.detector import Detector
from medclip_jax.errors import CheckpointError, ConfigError, WorkdirError
from medclip_jax.evaluation import evaluate
from medclip_jax.features.batch import Batch
from medclip_jax.io import read as io_read
from medclip_jax.models import anomaly_map, model
from medclip_jax.synthesis import generate
from medclip_jax.training import batches, checkpoints, episodes, loop, maml, state

LEAST = 2  # images: each is held out once


class Start(NamedTuple):
    """A meta-trained params with all that stays the same from site to site."""

    config: ConfigDict
    tower: vit.Clip
    frozen: dict
    params: Any  # one copy, with its rates if they were learned
    design: model.Design
    learned: Callable  # compiled parts
    patches: Callable
    maps: Callable
    image_scores: Callable


class Ready(NamedTuple):
    """`detector.patches` scores tokens of new images, `limits` say what of it is abnormal."""

    detector: Detector
    limits: limits.Limits


def load(workdir: Path) -> Start:
    """The newest checkpoint of a run with a learner other than joint.

    Raises WorkdirError if there is no run, ConfigError if it did not meta-learn, CheckpointError
    if it has no checkpoint.
    """
    try:
        c = ConfigDict(json.loads((workdir / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{workdir} holds no run ({error}): give one that was trained") from None
    if c.learner == "joint":
        raise ConfigError(f"{workdir} learned jointly: train one with --config.learner=maml")
    tower = vit.load(c.clip.checkpoint, tuple(c.clip.layers), c.clip.dtype, c.model.refine)
    design, frozen = build.build(c, tower)
    count = 1 + len(batches.folds(c.k, build.FOLDS))
    params = build.fresh_params(c, tower, design)
    if c.learner == "meta_sgd":
        params = maml.meta_sgd(params, c.meta.inner_rate)
    template = state.start(params, loop.adam(c.learning_rate), count, c.seed)
    manager = checkpoints.open(workdir)
    with checkpoints.closing(manager):
        newest = checkpoints.restore(manager, template)
    if newest is None:
        raise CheckpointError(f"{workdir} has no checkpoint: run --mode train first")
    return prepare(c, tower, design, frozen, jax.tree.map(lambda x: x[0], newest.params))


def prepare(c: ConfigDict, tower: vit.Clip, design: model.Design, frozen: dict, params) -> Start:
    """The same from a params at hand (a maml.MetaSGD if its rates were learned)."""
    if c.score.map_filter or c.score.tiles > 1:
        raise ConfigError("a site has no config.score.map_filter and tiles: train without them")
    inner = build.learner(c).inner(c.meta.adapt_steps)
    loss = partial(model.loss, design=design, weights=c.loss.to_dict())
    return Start(
        *(c, tower, frozen, params, design),
        jax.jit(partial(learned, loss=loss, inner=inner, design=design)),
        jax.jit(lambda params, text, batch: model.forward(params, text, batch, design).logit),
        jax.jit(partial(anomaly_map.to_pixels, size=tower.size)),
        jax.jit(partial(evaluate.from_patches, size=tower.size, top=c.score.top)),
    )


def adapt(start: Start | Path, images: Sequence[Path]) -> Ready:
    """Adapt to a site's healthy images (files, 2 or more) and calibrate on them.

    A copy of params adapts to all of them, and one more to those outside each fold, which scores
    that fold: so no image calibrates what has seen it. Raises DataError for a file that cannot be
    read, ConfigError for fewer than two.
    """
    start = start if isinstance(start, Start) else load(start)
    if len(images) < LEAST:
        raise ConfigError(f"{len(images)} images to adapt to: give {LEAST} or more")
    c, k = start.config, len(images)
    rows = altered_rows(start, images)
    groups = batches.folds(k, build.FOLDS)
    held = np.stack([np.isin(np.arange(k), g) for g in groups])  # [fold, image]
    own = np.concatenate([np.ones((1, k), bool), ~held])  # [copy, image]
    valid = np.tile(own, (1, len(rows.label) // k))
    params, text, values = start.learned(start.params, start.frozen, rows, valid, held)
    first = jax.tree.map(lambda x: x[0], (params, text))
    detector = Detector(partial(start.patches, *first), np.asarray(values), None)
    asked = (c.calibration.alpha, c.calibration.pixel_rate)
    return Ready(detector, limits.find(detector, start.maps, start.image_scores, *asked))


def altered_rows(start: Start, images: Sequence[Path]) -> Batch:
    """Tokens of the images as they are, then of one variant of each kind of all: [4 k] rows."""
    tower, c = start.tower, start.config

    def read(path):
        image = io_read.read(path, window=c.data.window)
        return io_read.fit(image.pixels[0], tower.size, c.data.fit)

    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(read, images))).astype(np.float32)
    names = [int(hashlib.sha256(x.tobytes()).hexdigest()[:16], 16) for x in pixels]
    kinds = np.repeat(np.arange(episodes.IDENTITY), len(images))
    keys = [generate.key_for(c.seed, name, v) for v in range(episodes.IDENTITY) for name in names]
    again = np.tile(pixels, (episodes.IDENTITY, 1, 1))
    changed, masks = generate.batch(jnp.stack(keys), again, again, kinds, c.synthesis.preset)
    tokens = vit.encode_images(
        tower.vision,
        preprocessing.batch(np.concatenate([pixels, changed]), c.data.recipe),
        tower=tower.vision_tower,
        mean=tower.mean,
        std=tower.std,
    )
    label: Any = (np.arange(4 * len(images)) >= len(images)).astype(np.int32)
    mask: Any = np.concatenate([np.zeros_like(pixels), masks.astype(np.float32)])
    valid: Any = np.ones(len(label), bool)
    return Batch(tokens, mask, label, valid)


def learned(
    params: Any,
    frozen: dict,
    rows: Batch,
    valid: Bool[Any, "copy n"],
    held: Bool[Any, "fold k"],
    *,
    loss: Callable,
    inner: maml.Inner,
    design: model.Design,
) -> tuple[Any, Float[Any, "copy c j"], Float[Any, "k p"]]:
    """Every copy adapts to its valid rows; the held-out images are scored by their fold's copy.

    Returns params and text features of all copies, and the patch values of the clean images.
    """

    def one(own):
        plain = partial(loss, frozen=frozen, key=None)
        adapted, _ = maml.adapt(
            params,
            rows._replace(valid=own),
            loss=lambda t, batch: plain(t, batch=batch),
            inner=inner,
        )
        text = model.text_features(adapted, frozen, design)
        clean = jax.tree.map(lambda x: x[: held.shape[1]], rows.features)
        return adapted, text, model.forward(adapted, text, Features(*clean), design).logit

    adapted, text, values = jax.vmap(one)(valid)
    seen_by = jnp.argmax(held, axis=0) + 1  # copy of each image's fold
    return adapted, text, values[seen_by, jnp.arange(held.shape[1])]
