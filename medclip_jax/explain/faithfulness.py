"""Do the map and its Grad-CAM agree, and matter to the model? Checks of one run.

Labels are read here: call it after scoring. The score of the map is the mean of its top share,
which Grad-CAM explains, as a unit value: 0.5 is the pixel threshold.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Bool, Float, Num
from scipy import stats

from medclip_jax.clip import lite0
from medclip_jax.clip.layers import Features, ImageEncoder
from medclip_jax.data.layouts import Record
from medclip_jax.detectors import calibration
from medclip_jax.detectors import detector as detectors_detector
from medclip_jax.detectors.calibration import Calibration
from medclip_jax.detectors.detector import Detector
from medclip_jax.distributed import sharding
from medclip_jax.explain import grad_cam
from medclip_jax.features import cache, encoder
from medclip_jax.io import read
from medclip_jax.models import similarity

STEPS = 8  # of a deletion curve
ROWS = 32  # of a scoring call, as evaluate.BATCH: nothing is compiled twice


def of_model(
    detector: Detector,
    feature_cache: cache.FeatureCache,
    support: Record | None,
    test: Sequence[Record],
    thresholds: Calibration,
    how: grad_cam.Explanation,
    *,
    count: int,
    randomised: bool,
    seed: int,
) -> dict[str, Any] | None:
    """Checks of `count` abnormal test images; all processes of a run must call it.

        deletion    the map's score while tokens are replaced by a healthy support's, most important
                    first; an explanation that the model uses lets it fall faster than a random one
        spearman    rank correlation of Grad-CAM and map over the patches
        randomised  rank correlation of each with itself after the encoder's last block, or all, are
                    re-initialised; what stays near 1 does not explain the model (Adebayo, 2018)

    Args:
        support: whose tokens replace others.
        test: of which the abnormal images are sampled by seed.

    Returns:
        Values for metrics.json; None where the detector does not read one token per patch
        (baselines on pixels, tiles), its score does not depend on the layer, there is no support
        or no abnormal test image, and where count is 0.
    """
    abnormal = [r for r in test if r.label]
    if detector.read is not None or support is None or not (abnormal and count):
        return None
    rng = np.random.default_rng(seed)
    records = [abnormal[i] for i in sorted(rng.permutation(len(abnormal))[:count])]
    (tokens,) = cache.load_images(feature_cache, records, len(records))
    (healthy,) = cache.load_images(feature_cache, [support], 1)
    try:
        maps = explain(detector, tokens, how)
    except grad_cam.NoGradientError:
        return None  # scoring has warned of it
    orders = {**maps, "random": rng.random(maps["map"].shape)}
    checks = {
        "images": [r.id for r in records],
        "spearman": mean(rank_correlation(maps["map"], maps["grad_cam"])),
        "deletion": deletion(detector, tokens, healthy, orders, thresholds, how.top),
    }
    if randomised:
        checks["randomised"] = randomise(detector, feature_cache, records, maps, how, seed)
    return checks


def explain(
    detector: Detector, tokens: Features, how: grad_cam.Explanation
) -> dict[str, np.ndarray]:
    """Map and Grad-CAM of each image, [n, p]."""
    batch, n = sharding.fill_rows(tokens, ROWS)
    cams = grad_cam.cam(detector, batch, **how._asdict())[:n]
    patch = detectors_detector.score(detector, batch).patch
    return {"map": np.asarray(patch, np.float64)[:n], "grad_cam": cams}


def deletion(
    detector: Detector,
    tokens: Features,
    healthy: Features,
    orders: dict[str, Float[np.ndarray, "n p"]],
    thresholds: Calibration,
    top: float,
) -> dict[str, list[float]]:
    """Mean unit score of the map after each share of the patches is replaced (Petsiuk, 2018).

    Args:
        healthy: tokens of one image.
        orders: importance of each patch by name; the most important is replaced first.

    Returns:
        `share` from nothing to everything, [STEPS + 1], and the scores of each order.
    """
    patches = next(iter(orders.values())).shape[1]
    counts = np.round(np.linspace(0, patches, STEPS + 1)).astype(int)
    curves = []
    for i in range(len(tokens.pooled)):
        ranks = np.stack([np.argsort(np.argsort(-o[i], kind="stable")) for o in orders.values()])
        gone = (ranks[:, None] < counts[None, :, None]).reshape(-1, patches)  # [order x step, p]
        rows, _ = sharding.fill_rows(replaced(tokens, healthy, i, gone), ROWS)
        values = np.asarray(detectors_detector.score(detector, rows).patch)
        values = calibration.lowered(values[:, None], thresholds.peak)[:, 0]
        pooled = similarity.image_score(jnp.asarray(values), max(top, grad_cam.LEAST_TOP))
        raw = np.asarray(pooled)[: len(gone)]
        unit = calibration.to_unit(raw, thresholds.pixel.value, thresholds.pixel_scale)
        curves.append(unit.reshape(len(orders), -1))
    means = np.mean(curves, axis=0)
    scores = {name: row.tolist() for name, row in zip(orders, means, strict=True)}
    return {"share": (counts / patches).tolist(), **scores}


def replaced(
    tokens: Features, healthy: Features, i: int, gone: Bool[np.ndarray, "m p"]
) -> Features:
    """Image i once per row of `gone`, whose patches come from the healthy image.

    Layers on a coarser grid (ResNet) lose a cell where more than half of its patches are gone.
    """

    def one(level, other):
        lost = gone
        if level.shape[1] != gone.shape[1]:
            fine, coarse = (round(n**0.5) for n in (gone.shape[1], level.shape[1]))
            cells = gone.reshape(len(gone), coarse, fine // coarse, coarse, fine // coarse)
            lost = cells.mean((2, 4)).reshape(len(gone), -1) > 0.5
        return jnp.where(lost[..., None], other[:1], level[i : i + 1])

    levels = tuple(map(one, tokens.levels, healthy.levels))
    many = len(gone)

    def patches_of(x, other):
        before = x.shape[1] - gone.shape[1]  # a class token, which stays, or none
        lost = np.pad(gone, ((0, 0), (before, 0)))
        return jnp.where(lost[..., None], other[:1], x[i : i + 1])

    inputs = tuple(map(patches_of, tokens.inputs, healthy.inputs))
    return Features(jnp.repeat(tokens.pooled[i : i + 1], many, 0), levels, inputs)


def randomise(
    detector: Detector,
    feature_cache: cache.FeatureCache,
    records: Sequence[Record],
    maps: dict[str, Float[np.ndarray, "n p"]],
    how: grad_cam.Explanation,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Mean rank correlation of each explanation with itself after blocks are re-initialised."""
    images = np.stack(
        [x for _, x in read.read_all(records, feature_cache.clip.size, feature_cache.fit)]
    )
    correlations = {}
    for name, last in (("last_block", True), ("all_blocks", False)):
        encode = partial(encode_randomised, last=last, seed=seed)
        title = f"{name} random, seed {seed}"
        (tokens,) = encoder.encode_stacks(feature_cache, images[None], title, encode)
        try:
            again = explain(detector, tokens, how)
            correlations[name] = {n: mean(rank_correlation(maps[n], again[n])) for n in maps}
        except grad_cam.NoGradientError:
            correlations[name] = dict.fromkeys(maps, 0.0)  # no explanation is left at all
    return correlations


def encode_randomised(
    feature_cache: cache.FeatureCache, images: Float[np.ndarray, "n s s"], *, last: bool, seed: int
) -> Features:
    """Tokens of the encoder whose `last` block, or every block, is re-initialised."""
    vision = jax.tree.map(jnp.asarray, jax.device_get(feature_cache.vision))
    model = feature_cache.clip.image_encoder
    vision = reinitialised(model, vision, jax.random.key(seed), last)
    return encoder.encode(
        feature_cache._replace(vision=sharding.replicate(vision, feature_cache.mesh)), images
    )


def reinitialised(encoder: ImageEncoder, vision: dict, key: jax.Array, last: bool) -> dict:
    """Parameters with the `last` block, or every block (ResNet: stage), re-initialised.

    Every block: of the memory's encoder, too.

    Every kernel gets normal values of its own standard deviation; norms and biases stay.
    """
    flat = flatten_dict(encoder.restore(vision), sep="/")
    blocks = [encoder.depth] if last else range(1, encoder.depth + 1)
    chosen = tuple(
        start
        for n in blocks
        for start in (f"vision_model/encoder/layers/{n - 1}/", f"visual/layer{n}_")
    ) + (() if last else (lite0.NAME,))
    for i, (name, x) in enumerate(flat.items()):
        if name.startswith(chosen) and name.endswith("kernel"):
            noise = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
            flat[name] = x.std() * noise
    return encoder.prepare(unflatten_dict(flat, sep="/"))


def rank_correlation(
    a: Num[np.ndarray, "n p"], b: Num[np.ndarray, "n p"]
) -> Float[np.ndarray, " n"]:
    """Spearman's of two maps of each image; NaN where one is constant."""
    ranks = [stats.rankdata(x, axis=1) for x in (a, b)]
    centred = [r - r.mean(1, keepdims=True) for r in ranks]
    below = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    above = (centred[0] * centred[1]).sum(1)
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def mean(values: Float[np.ndarray, " n"]) -> float:
    """Mean of what is defined (a constant map has no ranks); NaN if nothing is."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else float("nan")
