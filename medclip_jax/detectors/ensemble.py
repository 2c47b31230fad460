"""Several detectors, its branches, as one: the trained prompts, the memory, and plain prompts.

Every branch is standardised on its scores of the held-out supports, and all count equally. Maps
are sums of standardised values, image scores means of their asinh: the value itself near the
healthy, its logarithm far from them, so that no branch with a narrow spread drowns the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from medclip_jax.detectors import calibration
from medclip_jax.detectors.detector import Detector, Scores

RAYS, STEPS = 40, 40  # of the search of `healthy_scores`
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
    names, supports = tuple(branches), [b.calibration for b in branches.values()]
    units = units_of(supports)
    folds = {n: b.fold_params for n, b in branches.items() if b.fold_params is not None}
    first = next(iter(branches.values()))
    return first._replace(
        apply=scorer({name: b.apply for name, b in branches.items()}),
        params={name: b.params for name, b in branches.items()} | {UNITS: jnp.asarray(units)},
        fold_params=folds or None,
        calibration=calibrating(names, supports, first.k),
        stochastic=any(b.stochastic for b in branches.values()),
        proven=(),
    )


def units_of(supports: Sequence[Any]) -> Float[np.ndarray, "2 2 b"]:
    """The units of `scorer` from every branch's scores of the supports."""
    spread = calibration.spread
    patch = [(s.patch.mean(), spread(s.patch.ravel())) for s in supports]
    image = [(s.image.mean(), spread(s.image)) for s in supports]
    return np.asarray([np.transpose(patch), np.transpose(image)], np.float32)


def calibrating(names: Sequence[str], supports: Sequence[Scores], k: int) -> Scores:
    """What fused scores of the k supports a new image is to be compared with.

    supports: per branch, each support held out; of a single one, rows of views, which are
    standardised together.
    """
    if k < 2:
        return jax.device_get(fused(names, supports, units_of(supports)))
    maps: list[Any] = []
    for i in range(k):
        own = jax.tree.map(lambda x, i=i: x[i : i + 1], list(supports))
        others = jax.tree.map(lambda x, i=i: np.delete(x, i, 0), list(supports))
        maps.append(jax.device_get(fused(names, own, units_of(others)).patch))
    image: Any = healthy_scores(np.stack([s.image for s in supports], -1))
    patch: Any = np.concatenate(maps)
    return Scores(patch, image)


def healthy_scores(images: Num[np.ndarray, "*n k b"]) -> Float[np.ndarray, "*n k"]:
    """Fused scores of the supports, such that a new image beats too many of them too rarely.

    images: of k supports by b branches. A new image v is standardised by all supports. Were it
    exchangeable with them, so would be its fused score f(v) and those of the supports, each
    standardised by v and the other supports: let T_r(v) be the r-th smallest of these. Then
    P(f(v) > T_r(v)) <= 1 - r / (k + 1), full conformal prediction (Vovk et al. 2005), but no
    threshold on f alone. The r-th smallest value returned is one: the largest f(v) of any v that
    has f(v) <= T_r(v), searched along rays from the mean. (Standardised by all supports, their own
    scores are too small: 26 false alarms in place of 20, for k = 4 and skewed scores.)
    """
    images = np.asarray(images, np.float64)
    k, b = images.shape[-2:]
    centre, scale = images.mean(-2, keepdims=True), images.std(-2, keepdims=True, ddof=1)
    scale = np.maximum(scale, 1e-6 * np.abs(images).max(-2, keepdims=True))
    z = (images - centre) / np.where(scale > 0, scale, 1)
    inside = np.arcsinh(z).mean(-1)
    best = np.sort(inside, -1)
    one = np.eye(b)
    random = np.random.default_rng(0).normal(size=(RAYS, b))
    rays = np.concatenate([one, -one, np.ones((1, b)), -np.ones((1, b)), random])
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    rest, square = z.sum(-2, keepdims=True) - z, (z**2).sum(-2, keepdims=True) - z**2
    before: Any = -np.inf
    behind: Any = np.inf  # f(v) and T_r(v) one step nearer to the mean
    for far in np.geomspace(0.03, 30, STEPS):
        new = (far * rays)[:, None]  # [ray, 1, b]
        mean = (rest[..., None, :, :] + new) / k
        variance = (square[..., None, :, :] + new**2 - k * mean**2) / (k - 1)
        width = np.sqrt(np.maximum(variance, 1e-12))
        least = np.sort(np.arcsinh((z[..., None, :, :] - mean) / width).mean(-1), -1)
        own = np.broadcast_to(np.arcsinh(new).mean(-1), least.shape)
        reached = np.where(own <= least, own, -np.inf)
        crossed = (own > least) & (before <= behind) & np.isfinite(before)
        with np.errstate(invalid="ignore"):
            share = (behind - before) / (own - least + behind - before)
            reached = np.where(crossed, before + share * (own - before), reached)
        best = np.maximum(best, reached.max(-2))
        before, behind = own, least
    return np.take_along_axis(best, inside.argsort(-1).argsort(-1), -1)


def shares(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each branch's share of the weights, for maps and for image scores."""
    mapped = [name for name in names if not name.endswith(IMAGE_ONLY)]
    return {
        "map": {n: round((n in mapped) / len(mapped), 4) for n in names},
        "image": {n: round(1 / len(names), 4) for n in names},
    }
