"""Where the anomaly is and why, in forms a reader can check: boxes, Grad-CAM, agreement.

Plain numpy on arrays; `attribution` makes the activations and gradients. Grad-CAM at the tokens
that the map is made of is close to the map itself: it shows agreement, not independent evidence
(PEERS 6.1). `pointing_game` and `deletion` say how well a map agrees with masks and with the model.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num

from medclip_jax.errors import UserError


class NoGradientError(UserError):
    """The score does not depend on the layer that was asked for."""


class Box(NamedTuple):
    """Rows row0..row1-1 and columns col0..col1-1 of the map, in its pixel frame."""

    row0: int
    col0: int
    row1: int  # one past the last row
    col1: int  # one past the last column
    score: float  # of the map inside the component, in the map's range
    area: int  # pixels in the component, at most the box's own area


def boxes(
    map: Float[np.ndarray, "h w"],
    threshold: float,
    *,
    min_area: int = 1,
    scores: Literal["max", "mean"] = "max",
    n: int = 10,
) -> list[Box]:
    """Boxes around the 8-connected components of map > threshold, highest score first, at most n.

    A component's score is the `scores` ("max" or "mean") of the map over the component's own
    pixels. Components of fewer than `min_area` pixels are dropped. NaN counts as not marked.
    Equal scores are ordered by area, larger first, then from the top left.

    Raises ValueError for another `scores`.
    """
    from scipy import ndimage  # scipy takes half a second to import and only callers need it

    if scores not in ("max", "mean"):
        raise ValueError(f"scores must be 'max' or 'mean', not {scores!r}")
    marked = map > threshold
    if not marked.any():
        return []
    labels, count = ndimage.label(marked, structure=np.ones((3, 3)))
    # of marked pixels alone: sorting or summing all of them would be most of the time
    label = labels[marked] - 1
    areas = np.bincount(label, minlength=count)
    # float32 at least: half precision loses digits in a mean
    inside = map[marked].astype(np.promote_types(map.dtype, np.float32))
    if scores == "max":
        values = np.full(count, -np.inf, inside.dtype)
        np.maximum.at(values, label, inside)
    else:
        values = np.bincount(label, inside, count) / areas
    found = [
        Box(rows.start, cols.start, rows.stop, cols.stop, float(value), int(area))
        for (rows, cols), value, area in zip(
            ndimage.find_objects(labels, count), values, areas, strict=True
        )
        if area >= min_area
    ]
    return sorted(found, key=lambda box: (-box.score, -box.area, box.row0, box.col0))[:n]


def grad_cam(
    activations: Float[np.ndarray, "n p d"], gradients: Float[np.ndarray, "n p d"]
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n p"]]:
    """Channel weights and map before the ReLU (Selvaraju et al., ICCV 2017).

    The weight of a channel is the mean of the gradient over the patches; the map is the weighted
    sum of the channels. Patches of a ViT and cells of a convolution (flattened) are the same here.
    """
    a, g = _float64(activations, gradients)
    weights = g.mean(1)
    return weights, np.einsum("npd,nd->np", a, weights)


def grad_cam_pp(
    activations: Float[np.ndarray, "n p d"], gradients: Float[np.ndarray, "n p d"]
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n p"]]:
    """Grad-CAM++ (Chattopadhay et al., WACV 2018) as pytorch-grad-cam has it (PEERS 6.2).

    alpha = g^2 / (2 g^2 + (sum of a over patches) g^3 + 1e-6), 0 where g is 0; the weight is the
    sum of alpha relu(g). The constant makes it depend on the scale of the score.
    """
    a, g = _float64(activations, gradients)
    square = g * g
    below = 2 * square + a.sum(1, keepdims=True) * square * g + 1e-6
    alpha = np.where(g != 0, square / below, 0.0)
    weights = (np.maximum(g, 0) * alpha).sum(1)
    return weights, np.einsum("npd,nd->np", a, weights)


CAMS = {"grad_cam": grad_cam, "grad_cam_pp": grad_cam_pp}


def unit(raw: Float[np.ndarray, "n *_"]) -> Float[np.ndarray, "n *_"]:
    """ReLU, then each image's minimum to 0 and maximum to about 1; all 0 stays all 0.

    As pytorch-grad-cam: (r - min) / (1e-7 + max(r - min)).
    """
    axes = tuple(range(1, raw.ndim))
    positive = np.maximum(raw, 0)
    positive = positive - positive.min(axes, keepdims=True)
    return positive / (1e-7 + positive.max(axes, keepdims=True))


def to_square(patch: Num[np.ndarray, "n p"], size: int) -> Float[np.ndarray, "n s s"]:
    """A value per patch (square grid, row-major) -> pixels, bilinear with pixel centres at halves.

    As OpenCV's INTER_LINEAR. The anomaly map itself aligns corners instead (score.to_pixels).
    """
    grid = round(patch.shape[1] ** 0.5)
    at = np.clip((np.arange(size) + 0.5) * grid / size - 0.5, 0, grid - 1)
    low = np.minimum(at.astype(int), max(grid - 2, 0))
    weights = np.zeros((size, grid))
    weights[np.arange(size), low] = 1 - (at - low)
    weights[np.arange(size), np.minimum(low + 1, grid - 1)] += at - low
    return weights @ patch.reshape(-1, grid, grid) @ weights.T


def check_gradient(gradients: Float[np.ndarray, "n p d"], layer: str) -> None:
    """Raise NoGradientError if the score does not depend on the patches of `layer` at all.

    The trap of a class-token score: the last block mixes patches into the class token before its
    output, so the gradient with respect to the last block's patch outputs is exactly 0 and every
    map of it is empty. Take the last block's first norm, or a score of the patches.
    """
    if not np.any(np.asarray(gradients) != 0):
        raise NoGradientError(
            f"The gradient at {layer} is exactly 0: the score does not depend on its patch outputs "
            "(a class-token score never depends on the last block's), so take the last block's "
            "first norm or an earlier block."
        )


def pointing_game(
    maps: Num[np.ndarray, "n h w"], masks: Bool[np.ndarray, "n h w"], tolerance: int = 0
) -> tuple[float, float]:
    """Share of images whose largest value lies in the mask, and the share expected by chance.

    Images with an empty mask are left out; a hit may be off by up to `tolerance` pixels (square).
    Of several equal largest values the share inside counts. NaN if no mask is left. Chance is the
    mean share of the image that would be a hit (Zhang et al., IJCV 2018).
    """
    from scipy import ndimage

    hits, chances = [], []
    for heat, mask in zip(maps, masks, strict=True):
        if not mask.any():
            continue
        near = ndimage.binary_dilation(mask, np.ones((3, 3)), tolerance) if tolerance else mask
        hits.append(near[heat == heat.max()].mean())
        chances.append(near.mean())
    if not hits:
        return float("nan"), float("nan")
    return float(np.mean(hits)), float(np.mean(chances))


def deletion(
    score: Callable[[Float[np.ndarray, "p d"]], float],
    tokens: Float[np.ndarray, "p d"],
    healthy: Float[np.ndarray, "p d"],
    importance: Float[np.ndarray, " p"],
    steps: int = 14,
) -> Float[np.ndarray, " _"]:
    """Score after the most important share of the tokens is replaced by healthy ones, [steps + 1].

    From nothing replaced to everything replaced, most important first (Petsiuk et al., BMVC 2018).
    An explanation that agrees with the model lets the curve fall at once; compare its mean with
    that of a random order.
    """
    order = np.argsort(-importance, kind="stable")
    curve = []
    for count in np.round(np.linspace(0, len(order), steps + 1)).astype(int):
        changed = np.array(tokens)
        changed[order[:count]] = healthy[order[:count]]
        curve.append(float(score(changed)))
    return np.array(curve)


def agreement(a: Num[np.ndarray, "n p"], b: Num[np.ndarray, "n p"]) -> Float[np.ndarray, " n"]:
    """Rank correlation (Spearman) of two maps of each image; NaN where one is constant."""
    from scipy import stats

    ranks = [stats.rankdata(x, axis=1) for x in (a, b)]
    centred = [r - r.mean(1, keepdims=True) for r in ranks]
    below = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    above = (centred[0] * centred[1]).sum(1)
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def _float64(*arrays) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]
