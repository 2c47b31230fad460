"""A detector: a pure function from tokens to scores, its parameters, its scores of the supports.

`score_batch` is the one way from tokens to calibrated scores: evaluation, prediction, export and
adaptation use it. Everything of a batch is one compiled program, in which what several results
share (a search in the memory) runs once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from medclip_jax.clip.layers import Features
from medclip_jax.data.layouts import Record
from medclip_jax.detectors import anomaly_maps, calibration
from medclip_jax.detectors.programs import jit_for_detector
from medclip_jax.distributed import sharding
from medclip_jax.features import cache
from medclip_jax.io import read
from medclip_jax.models import similarity

Place = tuple[slice, slice]  # rows and columns
MOST_COSINES = 1 << 19  # of an image's patches; with more, images are compared one by one


class Scores(NamedTuple):
    """Raw scores of n images; larger is more anomalous."""

    patch: Float[Array, "*a n p"]
    image: Float[Array, "*a n"]


class Detector(NamedTuple):
    """What scores images.

    `calibration` holds the scores of the supports, each by a detector that never saw it. A single
    support cannot be held out: its rows are gentle views of it. Without supports there are no rows.
    """

    apply: Callable[[Any, Features, Any], Scores]  # (params, features, key); key None: no dropout
    params: Any  # a dictionary
    fold_params: Any | None  # entries of params, one per held-out fold on axis 0; None: none
    calibration: Any  # Scores, on the host
    k: int  # supports
    stochastic: bool  # apply uses its key
    size: int  # pixels per side of the encoder frame
    # how images become Features (of a feature cache, records and a batch size) where these are not
    # the tokens of the whole image: pixel baselines, tiles
    read: Callable[..., Iterator[Features]] | None = None
    # "image", "map": where no score of a new healthy image is larger than it would be if each
    # support were scored as it is, so that calibration is proven; empty: that is not known;
    # "fixed": supports are scored by this very detector
    proven: tuple[str, ...] = ()
    scales: int = 1  # views of an image that its tokens are of; the whole image is the first
    corners: bool = False  # of similarity.interpolation, for the maps


class Raw(NamedTuple):
    """Scores of n images before calibration, images on axis 0 of every array."""

    image: Float[Array, " n"]
    maps: Float[Array, "n s s"]  # encoder frame
    passes: Scores  # [n, t, p] and [n, t] of MC-dropout; the scores themselves if nothing is random
    folds: Float[Array, "n f"]  # image scores by the parameters of every fold


class BatchScores(NamedTuple):
    """Calibrated scores of n images, on the host; unit values are in [0, 1], 0.5 the threshold."""

    score: Float[np.ndarray, " n"]
    p_value: Float[np.ndarray, " n"]  # NaN with fewer than two supports
    alarm: Bool[np.ndarray, " n"]  # score above the threshold
    uncertainty: Float[np.ndarray, " n"]  # standard deviation of the unit score over the passes
    maps: Float[np.ndarray, "n s s"]  # encoder frame, unit values
    patch_mean: Float[np.ndarray, "n p"]  # equation (10): of the patches' unit values over passes
    patch_variance: Float[np.ndarray, "n p"]
    passes: Float[np.ndarray, "n t"]  # unit scores of every pass
    folds: Float[np.ndarray, "n f"]  # unit scores of every fold


def image_score(
    patch: Float[Array, "n p"], *, size: int, top: float, corners: bool = False
) -> Float[Array, " n"]:
    """Image scores of patch values: the mean of the top share of the patches.

    A share of 0 is the largest pixel of their map in the encoder frame of `size` pixels, as peers
    have it, before patches share their values and maps are lowered.
    """
    if top > 0:
        return similarity.image_score(patch, top)
    return similarity.to_pixels(patch, size, corners).max((1, 2))


def with_shared_maps(
    apply: Callable, width: float, clip_levels: int | None = None
) -> Callable[..., Scores]:
    """`apply` whose maps are shared among similar patches; width 0: as it is.

    A patch's value becomes the mean over its image, weighed by `similarity.affinity` on the middle
    one of the tapped layers (the first `clip_levels`; None: all). Image scores stay; gradients are
    those of the values alone.
    """

    def shared(params, features, key):
        scores = apply(params, features, key)
        return scores._replace(patch=_shared(scores.patch, features, width, clip_levels))

    return shared if width else apply


def sharing_detector(
    detector: Detector, tokens: Features | None, width: float, clip_levels: int | None = None
) -> Detector:
    """The detector `with_shared_maps`, of what calibrates it as well; tokens: of these rows."""
    scores = detector.calibration
    if width and tokens is not None:
        patch = jax.jit(partial(_shared, width=width, clip_levels=clip_levels))(
            scores.patch, tokens
        )
        scores = scores._replace(patch=jax.device_get(patch))
    apply = with_shared_maps(detector.apply, width, clip_levels)
    return detector._replace(apply=apply, calibration=scores)


def _shared(
    patch: Float[Array, "n p"], features: Features, width: float, clip_levels: int | None
) -> Float[Array, "n p"]:
    levels = features.levels[:clip_levels]
    tokens = jax.lax.stop_gradient(levels[len(levels) // 2])

    def share(each):
        return similarity.affinity(each[1][None], width)[0] @ each[0]

    at_once = patch.shape[-1] ** 2 <= MOST_COSINES
    return (jax.vmap(share) if at_once else partial(jax.lax.map, share))((patch, tokens))


def with_fold(params: dict, fold: dict) -> dict:
    """params with the entries of one fold in the place of its own."""
    return params | {
        name: with_fold(params[name], value) if isinstance(value, dict) else value
        for name, value in fold.items()
    }


def score(detector: Detector, features: Features) -> Scores:
    """Raw scores of a batch without dropout, compiled."""
    return _score(detector.apply, detector.params, features)


@jit_for_detector(1)
def _score(apply: Callable, params, features: Features) -> Scores:
    return apply(params, features, None)


def recalibrated(
    detector: Detector, feature_cache: cache.FeatureCache, records: Sequence[Record], rows: int = 32
) -> Detector:
    """The detector with scores of healthy images that it never saw in place of its supports'.

    They are scored as every image is, so that calibration is proven for any detector.

    Args:
        records: in the feature cache; rows: how many are scored at a time.
    """
    groups = (detector.read or cache.load_images)(feature_cache, records, rows)
    filled = (sharding.fill_rows(tokens, rows) for tokens in groups)
    each = [
        jax.tree.map(lambda x, n=n: x[:n], jax.device_get(score(detector, t))) for t, n in filled
    ]
    scores = jax.tree.map(lambda *x: np.concatenate(x), *each)
    return detector._replace(calibration=scores, k=len(records), proven=("image", "map", "fixed"))


def read_batch(detector: Detector, features: Features, keys: Array) -> Raw:
    """All raw scores of a batch, compiled; keys [t]: one MC-dropout pass each."""
    static = detector._replace(params=None, fold_params=None, calibration=None)
    return _read(static, detector.params, detector.fold_params, features, keys)


@jit_for_detector(1)
def _read(static: Detector, params, fold_params, features: Features, keys) -> Raw:
    scores = static.apply(params, features, None)
    passes = jax.tree.map(lambda x: x[:, None], scores)
    if static.stochastic and len(keys):
        passes = jax.vmap(static.apply, (None, None, 0), 1)(params, features, keys)
    folds = jnp.zeros((scores.image.shape[0], 0))
    if fold_params is not None:

        def of_fold(fold):
            return static.apply(with_fold(params, fold), features, None).image

        folds = jax.vmap(of_fold, out_axes=1)(fold_params)
    maps = similarity.to_pixels(scores.patch, static.size, static.corners)
    return Raw(scores.image, maps, passes, folds)


def places(images: Iterable[tuple[Path, str]], size: int, mode: read.Mode) -> list[Place] | None:
    """Which part of the square of `size` each image fills; None where every one fills all of it.

    Padding is no pixel of an image: it is neither calibrated on nor measured.

    Args:
        images: file and CT window of each, which is opened for it.
        mode: of `read.fit`.
    """
    if mode == "stretch":
        return None
    found = []
    for path, window in images:
        height, width = read.open_image(path, window=window).shape[1:]
        top, left, rows, columns = read.box(height, width, size, mode)
        found.append(np.s_[top : top + rows, left : left + columns])
    return found


def calibrate(
    detector: Detector,
    *,
    alpha: float,
    pixel_rate: float,
    filter_steps: dict | None = None,
    mm2: Sequence[float | None] | None = None,
    peak: float = 0.0,
    inside: Sequence[Place] | None = None,
) -> calibration.Calibration:
    """Thresholds and scales from the supports' scores alone.

    Args:
        alpha: false-alarm rate that is asked for, in (0, 1).
        pixel_rate: share of a healthy image's pixels above the pixel threshold, in (0, 1).
        filter_steps: of config.score.map_filter by name; the ceiling is learned here.
        mm2: area in mm² of a pixel of each row of `detector.calibration`, None where unknown.
        peak: share of `calibration.lowered`, [0, 1).
        inside: of each map, what the image fills (`places`); None: all of it.
    """
    patch, image = detector.calibration
    maps = np.asarray(similarity.to_pixels(jnp.asarray(patch), detector.size, detector.corners))
    steps, maps = anomaly_maps.learn_filter(filter_steps or {}, maps, mm2, inside)
    if not len(image):
        return calibration.even_odds(alpha, pixel_rate)._replace(filter=steps)
    maps, proven = calibration.lowered(maps, peak), set(detector.proven)
    if peak and "fixed" not in proven:
        proven.discard("map")  # of smaller distances the peak is smaller, too
    own: Any = maps if inside is None else [x[place] for x, place in zip(maps, inside, strict=True)]
    thresholds = calibration.calibrate(
        np.asarray(image), own, detector.k, alpha, pixel_rate, steps, proven
    )
    return thresholds._replace(peak=peak)


def finish(
    raw: Raw, calibrated: calibration.Calibration, mm2: Sequence[float | None] | None = None
) -> BatchScores:
    """Calibrated scores of a batch, from its raw ones: the only way to them.

    Args:
        raw: of `read_batch`, on the host.
        mm2: area in mm² of a pixel of each map, where the map filter needs it.
    """
    unit = partial(calibration.to_unit, threshold=calibrated.image.value, scale=calibrated.scale)
    pixel_unit = partial(
        calibration.to_unit, threshold=calibrated.pixel.value, scale=calibrated.pixel_scale
    )
    image = np.asarray(raw.image, np.float64)
    p_value = np.full(len(image), np.nan)
    if calibrated.k > 1:
        steps = calibrated.image.bound is not None
        p_value = calibration.p_values(image, calibrated.healthy, steps)
    passes = unit(np.asarray(raw.passes.image))
    # a row of patches is a map of one line
    lines = calibration.lowered(np.asarray(raw.passes.patch)[:, :, None], calibrated.peak)
    patches = pixel_unit(lines[:, :, 0])
    maps = anomaly_maps.apply_filter(np.asarray(raw.maps), calibrated.filter, mm2)
    return BatchScores(
        unit(image),
        p_value,
        image > calibrated.image.value,
        passes.std(1),
        pixel_unit(calibration.lowered(maps, calibrated.peak)),
        patches.mean(1),
        patches.var(1),
        passes,
        unit(np.asarray(raw.folds)),
    )
