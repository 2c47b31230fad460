"""Several detectors, its branches, as one: the trained prompts, the memory, and plain prompts.

All branches count equally, as means of asinh of values standardised on the held-out supports: the
value itself near the healthy, its logarithm far from them, so that no branch with a narrow spread
drowns the rest. Of maps, sinh brings the mean back to the values' own scale; of image scores,
`ranks` makes the number of supports that the image is less healthy than.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.detectors import calibration
from medclip_jax.detectors.detector import Detector, Scores

IMAGE_ONLY = "_image"  # ends the name of a branch that has no share in the map
UNITS, SUPPORTS = "units", "supports"  # entries of params beside those of the branches


def scorer(branches: dict[str, Callable[..., Scores]]) -> Callable[..., Scores]:
    """The `apply` of branches; params: those of every branch by its name, units and supports.

    units [2, b]: mean and standard deviation of healthy patches. supports [k, b]: image scores.
    """

    def apply(params, features, key):
        each = [one(params[name], features, key) for name, one in branches.items()]
        return fused(tuple(branches), each, params[UNITS], params[SUPPORTS])

    return apply


def fused(names: Sequence[str], each: Sequence[Scores], units, supports) -> Scores:
    """The scores of all branches as one."""
    images = jnp.stack([s.image for s in each], -1)
    return Scores(fused_map(names, each, units), ranks(images, supports))


def fused_map(names: Sequence[str], each: Sequence[Scores], units) -> Float[Any, "n p"]:
    """Mean of the standardised maps by way of asinh; arrays of the host or of a device."""
    standard: list[Any] = [(s.patch - units[0][i]) / units[1][i] for i, s in enumerate(each)]
    seen = [z for name, z in zip(names, standard, strict=True) if not name.endswith(IMAGE_ONLY)]
    return jnp.sinh(jnp.arcsinh(jnp.stack(seen)).mean(0))


def ranks(images: Float[Array, "n b"], supports: Float[Array, "k b"]) -> Float[Array, " n"]:
    """How many of the k supports each image is less healthy than, interpolated; in (-inf, inf).

    The image is standardised by all supports, each support by the image and the other supports:
    were the image one of them, all k + 1 would be treated alike. So a rank above r has a
    probability of at most 1 - r / (k + 1), full conformal prediction (Vovk et al. 2005). (Supports
    standardised by themselves are too small: 26 false alarms in place of 20, for k = 4 and skewed
    scores.) Between two supports a rank is linear, beyond them of one slope.
    """
    k = len(supports)
    own, own_of_supports = (_mean_asinh(x, supports) for x in (images, supports))
    others = supports[(np.arange(k)[:, None] + np.arange(1, k)) % k]  # [k, k - 1, b]

    def compared(image):  # [k]: the supports, each by the image and the others, in rising order
        new = jnp.broadcast_to(image[None, None], (k, 1, image.shape[-1]))
        every = jnp.concatenate([others, new], 1)
        return jnp.sort(jax.vmap(lambda x, y: _mean_asinh(x[None], y)[0])(supports, every))

    def rank(score, limits):
        beaten = (limits < score).sum()
        lower, upper = limits[jnp.maximum(beaten - 1, 0)], limits[jnp.minimum(beaten, k - 1)]
        between = beaten + (score - lower) / jnp.maximum(upper - lower, 1e-12)
        beyond = jnp.where(beaten == 0, 1 + (score - upper) * slope, k + (score - lower) * slope)
        return jnp.where((beaten == 0) | (beaten == k), beyond, between)

    width = own_of_supports.std(ddof=1)
    slope = jnp.arange(k).std(ddof=1) / jnp.maximum(width, 1e-6)
    return jax.vmap(rank)(own, jax.vmap(compared)(images))


def _mean_asinh(x: Float[Array, "n b"], healthy: Float[Array, "m b"]) -> Float[Array, " n"]:
    """Mean over branches of asinh of values standardised by healthy ones."""
    centre, scale = healthy.mean(0, keepdims=True), healthy.std(0, ddof=1, keepdims=True)
    least = 1e-6 * jnp.abs(healthy).max(0, keepdims=True)
    scale = jnp.maximum(scale, least)
    return jnp.arcsinh((x - centre) / jnp.where(scale > 0, scale, 1.0)).mean(-1)


def build(branches: dict[str, Detector]) -> Detector:
    """The detector of all branches, which are of the same supports."""
    names, supports = tuple(branches), [b.calibration for b in branches.values()]
    folds = {n: b.fold_params for n, b in branches.items() if b.fold_params is not None}
    first = next(iter(branches.values()))
    own = {UNITS: jnp.asarray(units_of(supports))}
    own[SUPPORTS] = jnp.stack([jnp.asarray(s.image) for s in supports], -1)
    return first._replace(
        apply=scorer({name: b.apply for name, b in branches.items()}),
        params={name: b.params for name, b in branches.items()} | own,
        fold_params=folds or None,
        calibration=calibrating(names, supports, first.k),
        stochastic=any(b.stochastic for b in branches.values()),
        proven=(),
    )


def units_of(supports: Sequence[Any]) -> Float[np.ndarray, "2 b"]:
    """The units of `scorer` from every branch's scores of the supports."""
    units = [(s.patch.mean(), calibration.spread(s.patch.ravel())) for s in supports]
    return np.transpose(np.asarray(units, np.float32))


def calibrating(names: Sequence[str], supports: Sequence[Scores], k: int) -> Scores:
    """What fused scores of the k supports a new image is to be compared with.

    supports: per branch, each support held out; of a single one, rows of views, which are
    standardised together. Of images the ranks themselves, 1 to k, in the order of the supports.
    """
    images = jnp.stack([jnp.asarray(s.image) for s in supports], -1)
    order = np.asarray(_mean_asinh(images, images)).argsort(kind="stable")
    image: Any = order.argsort() + 1.0
    if k < 2:
        return Scores(fused_map(names, supports, units_of(supports)), image)
    maps: list[Any] = []
    for i in range(k):
        own = jax.tree.map(lambda x, i=i: x[i : i + 1], list(supports))
        others = jax.tree.map(lambda x, i=i: np.delete(x, i, 0), list(supports))
        maps.append(jax.device_get(fused_map(names, own, units_of(others))))
    patch: Any = np.concatenate(maps)
    return Scores(patch, image)


def shares(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each branch's share of the weights, for maps and for image scores."""
    mapped = [name for name in names if not name.endswith(IMAGE_ONLY)]
    return {
        "map": {n: round((n in mapped) / len(mapped), 4) for n in names},
        "image": {n: round(1 / len(names), 4) for n in names},
    }
