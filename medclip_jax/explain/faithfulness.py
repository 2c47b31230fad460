"""Do the map and its Grad-CAM point at lesions, agree, and matter to the model? Checks of one run.

    pointing     share of masked images whose largest value lies in the mask, beside chance
    deletion     the map's score while tokens of an abnormal image are replaced by a healthy
                 support's, most important first; an explanation that the model uses lets it fall
                 faster than a random order
    spearman     rank correlation of Grad-CAM and map over the patches
    randomised   rank correlation of each with itself after the tower's last block, or all blocks,
                 are drawn anew; what stays near 1 does not explain the model (Adebayo et al. 2018)

Labels and masks are read here: call it after scoring. The score of the map is the mean of its top
share, which Grad-CAM explains, as a unit value: 0.5 is the pixel threshold.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from medclip_jax.clip.outputs import Features
from medclip_jax.data import records as data_records
from medclip_jax.data.records import Record
from medclip_jax.detectors import calibration
from medclip_jax.detectors.detector import Detector
from medclip_jax.detectors.limits import Limits
from medclip_jax.distributed import sharding
from medclip_jax.explain import boxes, grad_cam
from medclip_jax.features import cache, encoder
from medclip_jax.models import anomaly_map

STEPS = 8  # of a deletion curve
ROWS = 32  # of a scoring call, as evaluate.BATCH: nothing is compiled twice
LOCATED = ("map", "grad_cam")


def pointing(
    maps: Iterable[Float[np.ndarray, "h w"]],
    cams: Float[np.ndarray, "n p"] | None,
    masks: Iterable[Bool[np.ndarray, "h w"]],
) -> dict[str, dict[str, float | int]] | None:
    """Of map and Grad-CAM (patches): hit, chance, n; None if no image has a lesion mask."""
    held: dict[str, list[tuple[float, float]]] = {name: [] for name in LOCATED}
    for i, (heat, mask) in enumerate(zip(maps, masks, strict=True)):
        if not mask.any():
            continue
        shown = {"map": heat}
        if cams is not None:
            shown["grad_cam"] = boxes.to_square(cams[i : i + 1], len(mask))[0]
        for name, values in shown.items():
            held[name].append(boxes.pointing_game(values[None], mask[None]))
    found = {name: np.mean(rows, axis=0).tolist() for name, rows in held.items() if rows}
    told = {n: {"hit": x, "chance": c, "n": len(held[n])} for n, (x, c) in found.items()}
    return told or None


def of_model(
    detector: Detector,
    feature_cache: cache.FeatureCache,
    support: Record | None,
    test: Sequence[Record],
    limits: Limits,
    *,
    top: float,
    count: int,
    seed: int,
) -> dict[str, Any] | None:
    """Deletion, spearman and randomised of `count` abnormal test images, drawn by seed.

    support: whose tokens replace others. None where the detector does not read one token per patch
    (baselines on pixels, tiles), without support or abnormal test image, and where count is 0.
    All processes of a run must call it.
    """
    abnormal = [r for r in test if r.label]
    if detector.load is not None or support is None or not (abnormal and count):
        return None
    rng = np.random.default_rng(seed)
    chosen = [abnormal[i] for i in sorted(rng.permutation(len(abnormal))[:count])]
    (tokens,) = cache.load_images(feature_cache, chosen, len(chosen))
    (healthy,) = cache.load_images(feature_cache, [support], 1)
    slope = grad_cam.slopes(detector, top)
    try:
        own = located(detector, tokens, slope)
    except boxes.NoGradientError:
        return None  # evaluate.cams has said so
    agreed = boxes.agreement(own["map"], own["grad_cam"])
    orders = {**own, "random": rng.random(own["map"].shape)}
    return {
        "images": [r.id for r in chosen],
        "spearman": mean(agreed),
        "deletion": deletion(detector, tokens, healthy, orders, limits, top),
        "randomised": randomised(detector, feature_cache, chosen, own, slope, seed),
    }


def located(detector: Detector, tokens: Features, slope: Callable) -> dict[str, np.ndarray]:
    """Map and Grad-CAM of each image, [n, p]; slope: attribution.slopes of the detector."""
    batch, n = filled(tokens)
    cams = grad_cam.weigh(batch, slope(batch))[:n]
    return {"map": np.asarray(detector.patches(batch), np.float64)[:n], "grad_cam": cams}


def filled(tokens: Features, rows: int = ROWS) -> tuple[Features, int]:
    """The rows on this process's devices, the last repeated up to a multiple of `rows`; how many.

    Raises ValueError for more than `rows`.
    """
    n = len(tokens.pooled)
    if n > rows:
        raise ValueError(f"{n} rows do not fit in {rows}")
    at = np.minimum(np.arange(rows), n - 1)
    local = sharding.mesh(jax.local_devices())
    return sharding.spread(jax.tree.map(lambda x: np.asarray(x)[at], tokens), local)[0], n


def deletion(
    detector: Detector,
    tokens: Features,
    healthy: Features,
    orders: dict[str, Float[np.ndarray, "n p"]],
    limits: Limits,
    top: float,
) -> dict[str, list[float]]:
    """Mean unit score of the map after each share of the patches is replaced, by order.

    `share` [STEPS + 1] runs from nothing to everything. healthy: tokens of one image.
    """
    patches = next(iter(orders.values())).shape[1]
    counts = np.round(np.linspace(0, patches, STEPS + 1)).astype(int)
    curves = []
    for i in range(len(tokens.pooled)):
        ranks = np.stack([np.argsort(np.argsort(-o[i], kind="stable")) for o in orders.values()])
        gone = (ranks[:, None] < counts[None, :, None]).reshape(-1, patches)  # [order x step, p]
        values = detector.patches(filled(replaced(tokens, healthy, i, gone))[0])
        pooled = anomaly_map.image_score(values, max(top, grad_cam.LEAST_TOP))
        raw = np.asarray(pooled)[: len(gone)]
        unit = calibration.to_unit(raw, limits.pixel.value, limits.pixel_width)
        curves.append(unit.reshape(len(orders), -1))
    means = np.mean(curves, axis=0)
    told = {name: row.tolist() for name, row in zip(orders, means, strict=True)}
    return {"share": (counts / patches).tolist(), **told}


def replaced(
    tokens: Features, healthy: Features, i: int, gone: Bool[np.ndarray, "m p"]
) -> Features:
    """Image i once per row of `gone`, whose patches come from the healthy image.

    Levels on a coarser grid (ResNet) lose a cell where more than half of its patches are gone.
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
    lost = np.concatenate([np.zeros((many, 1), bool), gone], 1)  # the class token stays
    inputs = tuple(
        jnp.where(lost[..., None], other[:1], x[i : i + 1])
        for x, other in zip(tokens.inputs, healthy.inputs, strict=True)
    )
    return Features(jnp.repeat(tokens.pooled[i : i + 1], many, 0), levels, inputs)


def randomised(
    detector: Detector,
    feature_cache: cache.FeatureCache,
    records: Sequence[Record],
    own: dict[str, np.ndarray],
    slope: Callable,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Mean rank correlation of each explanation with itself after blocks are drawn anew.

    Tokens of the drawn towers are kept in the feature cache, by seed. slope: as of `located`.
    """
    images = np.stack(
        [x for _, x in data_records.read_all(records, feature_cache.clip.size, feature_cache.fit)]
    )
    depth, told = grad_cam.depth(feature_cache.vision), {}
    for name, blocks in (("last_block", [depth]), ("all_blocks", range(1, depth + 1))):
        how = partial(encode_drawn, blocks=list(blocks), seed=seed)
        title = f"{name} drawn by seed {seed}"
        (tokens,) = encoder.encode_stacks(feature_cache, images[None], title, how)
        told[name] = compared(own, partial(located, detector, tokens, slope))
    return told


def encode_drawn(
    feature_cache: cache.FeatureCache,
    images: Float[np.ndarray, "n s s"],
    blocks: Sequence[int],
    seed: int,
) -> Features:
    """Tokens of the tower whose `blocks` are drawn anew."""
    vision = jax.tree.map(jnp.asarray, jax.device_get(feature_cache.vision))
    drawn = grad_cam.randomised(vision, jax.random.key(seed), blocks)
    return encoder.encode(
        feature_cache._replace(vision=sharding.replicate(drawn, feature_cache.mesh)), images
    )


def compared(own: dict, again: Callable[[], dict]) -> dict[str, float]:
    """Mean rank correlation of each explanation with its second version."""
    try:
        new = again()
    except boxes.NoGradientError:
        return dict.fromkeys(own, 0.0)  # no explanation is left at all
    return {name: mean(boxes.agreement(own[name], new[name])) for name in own}


def mean(values: Float[np.ndarray, " n"]) -> float:
    """Mean of what is defined (a constant map has no ranks); NaN if nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
