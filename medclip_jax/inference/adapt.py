"""A new site: a handful of healthy images and meta-trained parameters become a detector.

Nothing is written. The first call of a number of images compiles; later ones are quick.
`build_detector.load_start` reads what it starts from.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from medclip_jax.clip import checkpoint
from medclip_jax.data import preprocessing
from medclip_jax.detectors.calibration import Calibration
from medclip_jax.detectors.detector import Detector, Scores, calibrate, places
from medclip_jax.errors import ConfigError, DataError
from medclip_jax.features.training_pool import Batch
from medclip_jax.io import read as io_read
from medclip_jax.models import model
from medclip_jax.synthesis import generate
from medclip_jax.training import maml

LEAST = 2  # images: each is held out once


class Site(NamedTuple):
    """What a site takes over from the run."""

    fit: io_read.Mode  # of images into the encoder frame
    window: str  # of CT
    recipe: tuple[str, ...]  # preprocessing
    preset: generate.Preset  # of the synthetic anomalies
    seed: int
    folds: int
    alpha: float  # false-alarm rate that is asked for
    pixel_rate: float  # share of the healthy pixels above the pixel threshold
    peak: float  # of calibration.lowered
    corners: bool  # of similarity.interpolation


class Start(NamedTuple):
    """Meta-trained parameters with all that stays the same from site to site."""

    clip: checkpoint.Clip
    frozen: dict
    params: Any  # a maml.MetaSGD if the rates were learned
    learn: Callable  # `learned` of this model, compiled
    apply: Callable  # of the detector
    site: Site


def adapt(start: Start, images: Sequence[Path]) -> tuple[Detector, Calibration]:
    """Adapt to a site's healthy images (files, 2 or more) and calibrate on them.

    One set of parameters adapts to all of them, and one more to those outside each fold, which
    scores that fold: so no image calibrates what has seen it. Raises DataError for a file that
    cannot be read or has several frames, ConfigError for fewer than two or one that is there twice.
    """
    if len(images) < LEAST:
        raise ConfigError(f"{len(images)} images to adapt to: give {LEAST} or more")
    site, k = start.site, len(images)
    rows = altered_rows(start, images)
    folds = np.arange(min(site.folds, k))[:, None]
    held_out = np.arange(k) % len(folds) == folds  # [fold, image]
    own = np.concatenate([np.ones((1, k), bool), ~held_out])  # [1 + fold, image]
    valid = np.tile(own, (1, len(rows.label) // k))
    params, scores = start.learn(start.params, start.frozen, rows, valid, held_out)
    scores = jax.device_get(scores)
    detector = Detector(
        *(start.apply, params, None, scores, k, False, start.clip.size), corners=site.corners
    )
    inside = places([(path, site.window) for path in images], start.clip.size, site.fit)
    thresholds = calibrate(
        detector, alpha=site.alpha, pixel_rate=site.pixel_rate, peak=site.peak, inside=inside
    )
    return detector, thresholds


def altered_rows(start: Start, images: Sequence[Path]) -> Batch:
    """Tokens of the images as they are, then of a variant of each kind of all: [(1 + kinds) k]."""
    clip, site = start.clip, start.site

    def read(path):
        frames = io_read.read(path, window=site.window).pixels
        if len(frames) != 1:
            raise DataError(f"{path} holds {len(frames)} frames: give images of one frame")
        return io_read.fit(frames[0], clip.size, site.fit)

    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(read, images))).astype(np.float32)
    names = [int(hashlib.sha256(x.tobytes()).hexdigest()[:16], 16) for x in pixels]
    if len(set(names)) < len(names):
        raise ConfigError("an image is there twice, and would calibrate what saw it: give it once")
    places = generate.places_of(site.preset)
    kinds, count = np.repeat(places, len(images)), len(places)
    keys = [generate.key_for(site.seed, name, v) for v in range(count) for name in names]
    repeated = np.tile(pixels, (count, 1, 1))
    changed, masks = generate.batch(jnp.stack(keys), repeated, repeated, kinds, site.preset)
    tokens = checkpoint.encode_images(
        clip.vision,
        preprocessing.batch(np.concatenate([pixels, changed]), site.recipe),
        encoder=clip.image_encoder,
        mean=clip.mean,
        std=clip.std,
    )
    label: Any = (np.arange((1 + count) * len(images)) >= len(images)).astype(np.int32)
    mask: Any = np.concatenate([np.zeros_like(pixels), masks.astype(np.float32)])
    valid: Any = np.ones(len(label), bool)
    return Batch(tokens, mask, label, valid)


def learned(
    params: Any,
    frozen: dict,
    rows: Batch,
    valid: Bool[Any, "sets n"],
    held_out: Bool[Any, "folds k"],
    *,
    loss: Callable,
    inner: maml.Inner,
    design: model.Design,
    apply: Callable,
) -> tuple[dict, Scores]:
    """Every set of parameters adapts to its valid rows; each fold's scores its held-out images.

    Returns the detector's params, adapted to all images, and the scores of the images as they are.
    """

    def one(own):
        batch = rows._replace(valid=own)
        adapted, _ = maml.adapt(
            params,
            batch,
            loss=lambda p, batch: loss(p, frozen=frozen, batch=batch, key=None),
            inner=inner,
        )
        both = {"model": adapted, "text": model.text_features(adapted, frozen, design)}
        clean = jax.tree.map(lambda x: x[: held_out.shape[1]], rows.features)
        return both, apply(both, clean, None)

    every, scores = jax.vmap(one)(valid)
    own = jnp.argmax(held_out, axis=0) + 1  # set of each image's fold
    place = own, jnp.arange(held_out.shape[1])
    return jax.tree.map(lambda x: x[0], every), Scores(*(x[place] for x in scores))
