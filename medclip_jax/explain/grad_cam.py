"""Grad-CAM and Grad-CAM++ of the anomaly score at one tapped layer of the encoder.

The score that is explained is pooled (mean of the largest patch values), never the maximum, whose
gradient reaches single patches; it goes to the layer's cached tokens. At the tokens that the map is
made of, Grad-CAM is close to the map itself: it shows agreement, not independent evidence.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.clip.layers import Features
from medclip_jax.detectors.detector import Detector
from medclip_jax.detectors.programs import jit_for_detector
from medclip_jax.errors import UserError
from medclip_jax.io import read
from medclip_jax.models import similarity

LEAST_TOP = 0.05  # a smaller share of the patches would explain single patches only
Method = Literal["grad_cam", "grad_cam_pp"]
Weighted = tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n p"]]


class Explanation(NamedTuple):
    """The settings of `cam`."""

    method: Method = "grad_cam"
    layer: int = -1
    top: float = LEAST_TOP


class NoGradientError(UserError):
    """The score does not depend on the layer."""


def cam(
    detector: Detector,
    features: Features,
    *,
    method: Method = "grad_cam",
    layer: int = -1,
    top: float = LEAST_TOP,
) -> Float[np.ndarray, "n p"]:
    """The map of a method at a layer, each image's own minimum at 0 and maximum at 1.

    Args:
        detector: one that reads patch tokens.
        layer: which of the tapped layers, from 0 or, as -1 for the last, from the end. A coarser
            grid than the finest of all layers (ResNet) is brought to that one.
        top: share of the patches whose mean is the score, raised to LEAST_TOP.

    Raises:
        NoGradientError: the score of no image depends on the layer.
    """
    return weigh(features, gradients(detector, features, layer, top), method, layer)


def gradients(
    detector: Detector, features: Features, layer: int, top: float
) -> Float[Array, "n p d"]:
    """Gradients of the scores with respect to a layer, arguments as of `cam`; can be traced.

    Where the tokens are of several scales, with respect to those of the whole image.
    """
    how = detector.apply, layer, max(top, LEAST_TOP), detector.scales
    return _gradients(*how, detector.params, features)


def weigh(
    features: Features, gradients: Float[Array, "n q d"], method: Method, layer: int
) -> Float[np.ndarray, "n p"]:
    """`cam` from the gradients."""
    slopes = np.asarray(gradients)
    if not slopes.any():
        raise NoGradientError(
            f"The score does not depend on layer {layer} of the {len(features.levels)} that are "
            "tapped: give another config.explanation.layer"
        )
    tokens = np.asarray(features.levels[layer])
    scales, patches = tokens.shape[1] // slopes.shape[1], slopes.shape[1]
    raw = METHODS[method](tokens[:, :patches], slopes)[1]
    finest = max(x.shape[1] for x in features.levels) // scales
    if raw.shape[1] < finest:
        raw = read.to_square(raw, round(finest**0.5)).reshape(len(raw), -1)
    return unit(raw).astype(np.float32)


def weigh_or_zeros(
    features: Features, gradients: Float[Array, "n q d"], how: Explanation
) -> Float[np.ndarray, "n p"]:
    """`cam` from the gradients as float16; 0 and a warning where they are 0."""
    try:
        return weigh(features, gradients, how.method, how.layer).astype(np.float16)
    except NoGradientError as error:
        _warn(str(error))
        return np.zeros(gradients.shape[:2], np.float16)


@cache
def _warn(message: str) -> None:
    """Once, not with every batch."""
    logging.warning("no Grad-CAM: %s", message)


@jit_for_detector(4)
def _gradients(
    apply: Callable, layer: int, top: float, scales: int, params: Any, features: Features
):
    whole = features.levels[layer].shape[1] // scales

    def score(tokens):
        levels = list(features.levels)
        levels[layer] = jnp.concatenate([tokens, levels[layer][:, whole:]], 1)
        patch = apply(params, features._replace(levels=tuple(levels)), None).patch
        return similarity.image_score(patch, top).sum()  # images are independent

    value, pull = jax.vjp(score, features.levels[layer][:, :whole])
    return pull(jnp.ones_like(value))[0]


def grad_cam(a: Float[np.ndarray, "n p d"], g: Float[np.ndarray, "n p d"]) -> Weighted:
    """Channel weights and map before the ReLU, from activations and gradients (Selvaraju, 2017).

    The weight of a channel is the mean of the gradient over the patches; the map is the weighted
    sum of the channels. Patches of a ViT and cells of a convolution (flattened) are the same here.
    """
    a, g = np.asarray(a, np.float64), np.asarray(g, np.float64)
    weights = g.mean(1)
    return weights, np.einsum("npd,nd->np", a, weights)


def grad_cam_pp(a: Float[np.ndarray, "n p d"], g: Float[np.ndarray, "n p d"]) -> Weighted:
    """As `grad_cam` by Grad-CAM++ (Chattopadhay, 2018), with pytorch-grad-cam's constant.

    alpha = g^2 / (2 g^2 + (sum of a over patches) g^3 + 1e-6), 0 where g is 0; the weight is the
    sum of alpha relu(g). The constant makes it depend on the scale of the score.
    """
    a, g = np.asarray(a, np.float64), np.asarray(g, np.float64)
    square = g * g
    below = 2 * square + a.sum(1, keepdims=True) * square * g + 1e-6
    alpha = np.where(g != 0, square / below, 0.0)
    weights = (np.maximum(g, 0) * alpha).sum(1)
    return weights, np.einsum("npd,nd->np", a, weights)


METHODS = {"grad_cam": grad_cam, "grad_cam_pp": grad_cam_pp}


def unit(raw: Float[np.ndarray, "n *_"]) -> Float[np.ndarray, "n *_"]:
    """ReLU, then each image's minimum to 0 and maximum to about 1; all 0 stays all 0.

    As pytorch-grad-cam: (r - min) / (1e-7 + max(r - min)).
    """
    axes = tuple(range(1, raw.ndim))
    positive = np.maximum(raw, 0)
    positive = positive - positive.min(axes, keepdims=True)
    return positive / (1e-7 + positive.max(axes, keepdims=True))
