"""A trained workdir, loaded: images in the encoder frame -> calibrated scores and maps.

`trained.load_predictor` makes one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.clip.layers import Features
from medclip_jax.detectors.calibration import Calibration
from medclip_jax.detectors.detector import BatchScores, Detector, Raw, finish, read_batch
from medclip_jax.explain import grad_cam
from medclip_jax.features import cache, encoder
from medclip_jax.io import read as io_read


class Predictor(NamedTuple):
    """All that scoring needs, on the devices."""

    detector: Detector
    calibration: Calibration
    encoder: cache.FeatureCache  # nothing is read from or written to its folder
    keys: Array  # [t] of MC-dropout
    digest: str  # names the trained detector
    window: str  # of CT images
    about: dict[str, Any]  # method, data set, K, ... for what is written
    explanation: grad_cam.Explanation | None = None  # how scores are explained; None: they are not

    @property
    def size(self) -> int:
        """Pixels per side of the encoder frame."""
        return self.encoder.clip.size

    @property
    def fit(self) -> io_read.Mode:
        """How images are brought to the encoder frame."""
        return self.encoder.fit


def batch_size(predictor: Predictor) -> int:
    """Images that `score` takes at a time without another compilation."""
    return encoder.batch_size(predictor.encoder)


def score(
    predictor: Predictor,
    images: Float[np.ndarray, "n s s"],
    mm2: Sequence[float | None] | None = None,
) -> BatchScores:
    """Score any number of images, `batch_size` at a time.

    Args:
        images: in the encoder frame, [0, 1].
        mm2: area in mm² of a pixel of the encoder frame of each, None where it is unknown.
    """
    size = batch_size(predictor)
    mm2 = [None] * len(images) if mm2 is None else mm2
    parts = []
    for i in range(0, len(images), size):
        group = images[i : i + size]
        raw = read(predictor, encode(predictor, group), len(group))
        parts.append(finish(raw, predictor.calibration, mm2[i : i + size]))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


# Scoring in three steps, which prediction overlaps, each on its own thread; the last is `finish`.


def encode(predictor: Predictor, images: Float[np.ndarray, "n s s"]) -> Features:
    """Tokens of 1 to `batch_size` images, filled up with copies: one shape, one compilation."""
    full = images[np.arange(batch_size(predictor)) % len(images)]
    return encoder.encode(predictor.encoder, full)


def read(predictor: Predictor, tokens: Features, n: int) -> Raw:
    """Raw scores, on the host, of the first n images of `encode`."""
    raw = jax.device_get(read_batch(predictor.detector, tokens, predictor.keys))
    return jax.tree.map(lambda x: x[:n], raw)


def explain(predictor: Predictor, tokens: Features, n: int) -> Float[np.ndarray, "n p"]:
    """Grad-CAM of the first n images of `encode`; no column if the predictor does not explain."""
    how = predictor.explanation
    if how is None:
        return np.zeros((n, 0), np.float16)
    gradients = grad_cam.gradients(predictor.detector, tokens, how.layer, how.top)
    return grad_cam.weigh_or_zeros(tokens, gradients, how)[:n]
