"""Several detectors, its branches, as one: the trained prompts, the memory, and plain prompts.

Every branch is standardised on its scores of the held-out supports, and all count equally. Maps
are sums of standardised values, image scores means of their asinh: it is the value itself near the
healthy and its logarithm far from them, so that a branch whose healthy values happen to lie close
together does not drown the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medclip_jax.detectors import calibration
from medclip_jax.detectors.detector import Detector, Scores

IMAGE_ONLY = "_image"  # ends the name of a branch that has no share in the map
UNITS = "units"  # entry of params beside those of the branches


def scorer(branches: dict[str, Callable[..., Scores]]) -> Callable[..., Scores]:
    """The `apply` of branches; params: those of every branch by its name, and units [2, 2, b].

    units: mean and standard deviation of healthy patches, then of healthy images, per branch.
    """

    def apply(params, features, key):
        each = [one(params[name], features, key) for name, one in branches.items()]
        return fused(tuple(branches), each, params[UNITS])

    return apply


def fused(names: Sequence[str], each: Sequence[Scores], units) -> Scores:
    """The scores of all branches as one; arrays of the host or of a device."""
    (centre, scale), (image_centre, image_scale) = units
    standard = [(s.patch - centre[i]) / scale[i] for i, s in enumerate(each)]
    seen = [z for name, z in zip(names, standard, strict=True) if not name.endswith(IMAGE_ONLY)]
    images = [(s.image - image_centre[i]) / image_scale[i] for i, s in enumerate(each)]
    patch: Any = sum(seen)
    image: Any = sum(map(jnp.arcsinh, images)) / len(images)
    return Scores(patch, image)


def build(branches: dict[str, Detector]) -> Detector:
    """The detector of all branches, which are of the same supports."""
    supports = [b.calibration for b in branches.values()]
    spread = calibration.spread
    patch = [(s.patch.mean(), spread(s.patch.ravel())) for s in supports]
    image = [(s.image.mean(), spread(s.image)) for s in supports]
    units = np.asarray([np.transpose(patch), np.transpose(image)], np.float32)
    folds = {n: b.fold_params for n, b in branches.items() if b.fold_params is not None}
    first = next(iter(branches.values()))
    return first._replace(
        apply=scorer({name: b.apply for name, b in branches.items()}),
        params={name: b.params for name, b in branches.items()} | {UNITS: jnp.asarray(units)},
        fold_params=folds or None,
        calibration=jax.device_get(fused(tuple(branches), supports, units)),
        stochastic=any(b.stochastic for b in branches.values()),
    )


def shares(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each branch's share of the weights, for maps and for image scores."""
    mapped = [name for name in names if not name.endswith(IMAGE_ONLY)]
    return {
        "map": {n: round((n in mapped) / len(mapped), 4) for n in names},
        "image": {n: round(1 / len(names), 4) for n in names},
    }
