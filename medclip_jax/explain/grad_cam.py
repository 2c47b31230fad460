"""Gradients of the anomaly score with respect to the tower's tokens, for `explain`'s Grad-CAM.

Two gradients are meant by "Grad-CAM at level l", and they differ for all levels but the last:

    direct   the level's tokens feed the map through their own adapter; later levels stay as they
             are. It needs cached tokens only and works for every tower (ViT or ResNet).
    through  the level's tokens feed the map directly and through the blocks after them. It needs
             the image and a ViT, since the blocks after the level run again.

The score is pooled (mean of the top share), never the maximum, whose gradient reaches four patches.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.clip import vit
from medclip_jax.clip.outputs import Features
from medclip_jax.detectors.detector import Detector
from medclip_jax.explain import boxes
from medclip_jax.models import anomaly_map

LEAST_TOP = 0.05  # a smaller share of the patches would explain single patches only
Patches = Callable[[Features], Float[Array, "n p"]]
Levels = tuple[Float[Array, "n _ _"], ...]


def direct(patches: Patches, features: Features, top: float) -> Levels:
    """Gradient of each image's score with respect to every level's tokens.

    patches: features -> anomaly per patch (Detector.patches). top: share of the patches in the
    score, at least 0.05.
    """
    return gradient(lambda f, _: patches(f), top)(features, None)


def gradient(chosen: Callable[[Features, Any], Array], top: float) -> Callable:
    """`direct` for many batches, compiled: (features, choice) -> gradients.

    chosen: as Detector.chosen, features and what `choose` found in them -> anomaly per patch.
    """

    def total(levels, features, choice):
        values = chosen(features._replace(levels=levels), choice)
        return anomaly_map.image_score(values, max(top, LEAST_TOP)).sum()  # images are independent

    one = jax.jit(jax.grad(total))
    return lambda features, choice: one(features.levels, features, choice)


def cams(
    patches: Patches,
    features: Features,
    top: float,
    method: str = "grad_cam",
    level: int | None = None,
) -> Float[np.ndarray, "n p"]:
    """Direct Grad-CAM per patch, in [0, 1]: mean over the levels of each level's ReLU map.

    level: one tapped level alone, from 0, on its own grid. Without it, levels on coarser grids
    (ResNet) are brought to the finest. Raises NoGradientError if no image has a gradient there.
    """
    gradients = direct(patches, features, top)
    if level is None:
        return weigh(features, gradients, method)
    alone = features._replace(levels=(features.levels[level],))
    return weigh(alone, (gradients[level],), method, f"tapped level {level}")


def weigh(
    features: Features, gradients: Levels, method: str = "grad_cam", named: str = "all levels"
) -> Float[np.ndarray, "n p"]:
    """`cams` from the gradients; `named` says in errors where they were taken."""
    held = [np.asarray(x, np.float32) for x in features.levels]
    slopes = [np.asarray(x) for x in gradients]
    boxes.check_gradient(np.concatenate([g.ravel() for g in slopes])[None, None], named)
    finest = max(x.shape[1] for x in held)
    each = []
    for a, g in zip(held, slopes, strict=True):
        raw = boxes.CAMS[method](a, g)[1]
        if raw.shape[1] < finest:
            raw = boxes.to_square(raw, round(finest**0.5)).reshape(len(raw), -1)
        each.append(boxes.unit(raw))
    return np.stack(each).mean(0, dtype=np.float32)


def slopes(detector: Detector, top: float) -> Callable[[Features], Levels]:
    """`direct` of a detector for many batches.

    Compiled once. What the detector learned or remembers is an argument (its choice), not a
    constant of the program, so that other runs of the same shapes find it compiled.
    """
    choose = detector.choose or (lambda _: ())
    chosen = detector.chosen or (lambda batch, _: detector.patches(batch))
    slope = gradient(chosen, top)
    return lambda batch: slope(batch, choose(batch))


def explainer(detector: Detector, top: float) -> Callable[[Features], np.ndarray]:
    """features -> Grad-CAM per patch [n, p] of what the detector reads, float16.

    One column of 0 for a detector that reads pixels.
    """
    slope = slopes(detector, top)

    def cams(batch):
        if detector.load is not None:
            return np.zeros((len(batch.pooled), 1), np.float16)
        try:
            return weigh(batch, slope(batch)).astype(np.float16)
        except boxes.NoGradientError as error:
            logging.warning("no Grad-CAM: %s", error)
            return np.zeros(batch.levels[0].shape[:2], np.float16)

    return cams


def through(
    vision: dict,
    pixels: Float[Array, "n h w 3"],
    tower: vit.Tower,
    target: Callable[[Features], Float[Array, " n"]],
    block: int,
    norm: bool = False,
) -> tuple[Float[np.ndarray, "n p d"], Float[np.ndarray, "n p d"]]:
    """Patch activations of a ViT block and the gradient of `target` through all that follows.

    pixels: normalised images. target: features -> one score per image. block: from 1; its output
    tokens, or with `norm` what its first norm hands to its attention. A level tapped at `block`
    itself counts directly. Raises NoGradientError where the score does not depend on the patches.
    """
    depth = vision["blocks"]["fc1"]["bias"].shape[0]
    if not 1 <= block <= depth:
        raise ValueError(f"block {block} is not one of 1 to {depth}")

    def embed(x):
        after = {0: vit.embed(vision, x, tower)}  # tokens after each block
        for number in range(1, block):
            after[number] = vit.run_block(vision, after[number - 1], number, tower)
        return after

    def follow(shift, after):
        """The score when the chosen activations move by `shift`."""
        after = dict(after)
        x = vit.run_block(vision, after[block - 1], block, tower, shift=shift if norm else None)
        after[block] = x if norm else x + shift
        for number in range(block + 1, depth + 1):
            after[number] = vit.run_block(vision, after[number - 1], number, tower)
        tapped = tuple(after[number][:, 1:].astype(jnp.float32) for number in tower.levels)
        read = tower.levels if tower.inputs else ()  # by refinement
        inputs = tuple(after[number - 1].astype(jnp.float32) for number in read)
        pooled = vit.pool(vision, after[depth], tower).astype(jnp.float32)
        return target(Features(pooled, tapped, inputs)).sum()

    after = embed(pixels)
    before = after[block - 1]
    if norm:
        activations = vit.first_norm(vision, before, block, tower)
    else:
        activations = vit.run_block(vision, before, block, tower)
    gradients = jax.grad(follow)(jnp.zeros_like(activations), after)
    held = np.asarray(activations[:, 1:]), np.asarray(gradients[:, 1:])
    boxes.check_gradient(held[1], f"block {block}{' (first norm)' if norm else ''}")
    return held


def depth(vision: dict) -> int:
    """Blocks of a ViT, stages of a ResNet."""
    return len(vision["blocks"]["fc1"]["bias"] if "blocks" in vision else vision["stages"])


def randomised(vision: dict, key: jax.Array, blocks: Sequence[int]) -> dict:
    """The tower with the given blocks (from 1) drawn anew, for the sanity check of explanations.

    Every weight matrix of a block (ResNet: every kernel of a stage) gets normal values of its own
    standard deviation; norms and biases stay. A map that hardly changes does not explain the model
    (Adebayo et al., 2018).
    """
    chosen = np.asarray(blocks, int) - 1
    if "stages" in vision:
        flat, shape = jax.tree.flatten([vision["stages"][i] for i in chosen])
        fresh = [
            x.std() * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
            if x.ndim == 4  # [h, w, in, out]
            else x
            for i, x in enumerate(flat)
        ]
        stages = dict(zip(chosen.tolist(), jax.tree.unflatten(shape, fresh), strict=True))
        kept = enumerate(vision["stages"])
        return {**vision, "stages": type(vision["stages"])(stages.get(i, s) for i, s in kept)}
    leaves, tree = jax.tree.flatten(vision["blocks"])
    drawn = []
    for i, leaf in enumerate(leaves):
        if leaf.ndim == 3:  # [block, in, out]
            sd = leaf[chosen].std((1, 2), keepdims=True)
            new = sd * jax.random.normal(jax.random.fold_in(key, i), leaf[chosen].shape, leaf.dtype)
            leaf = leaf.at[chosen].set(new)
        drawn.append(leaf)
    return {**vision, "blocks": jax.tree.unflatten(tree, drawn)}
