"""Three branches in one detector: the trained prompt map, the memory, and plain prompts.

Each branch's values are standardised on the held-out supports. Standardised values count equally,
or are weighed by what a branch sees of anomalies that training never showed (data/probes). Only
healthy images and probes painted on them are read, never a test image or label.

Maps are sums of standardised values, image scores sums of their asinh: it is the value itself near
the healthy and its logarithm far from them, so that a branch whose healthy values happen to lie
close together, and whose others therefore lie tens of their standard deviations away, does not
drown the rest.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy import stats

from medclip_jax.clip.outputs import Features
from medclip_jax.detectors import calibration, memory_bank, tiling
from medclip_jax.detectors.detector import Detector
from medclip_jax.features import cache, encoder, support_images
from medclip_jax.io import read
from medclip_jax.synthesis import probes

METHODS = ("ours", "joint")  # fuse branches; joint is ours that never learns from episodes
IMAGE_ONLY = "_image"  # ends the name of a branch that speaks for the image score alone
FINEST = 4.0  # standard deviations: no branch is trusted as if it separated better than this


class Evidence(NamedTuple):
    """What one branch says of the healthy images and of the probes on them, each held out."""

    patch: Float[np.ndarray, "k p"]
    image: Float[np.ndarray, " k"]
    probe_patch: Float[np.ndarray, "k v p"]
    probe_image: Float[np.ndarray, "k v"]


class Mix(NamedTuple):
    """Patches: sum over branches of gain * (value - centre); images: of weight * asinh of that.

    A patch's gain is its weight over the spread of the healthy, an image's is one over it.
    """

    names: tuple[str, ...]
    patch_centre: Float[np.ndarray, " b"]
    patch_gain: Float[np.ndarray, " b"]
    image_centre: Float[np.ndarray, " b"]
    image_gain: Float[np.ndarray, " b"]
    patch_weight: Float[np.ndarray, " b"]  # shares, sum 1
    image_weight: Float[np.ndarray, " b"]

    def shares(self) -> dict[str, dict[str, float]]:
        """Each branch's share of the weights, for maps and for image scores."""
        both = {"map": self.patch_weight, "image": self.image_weight}
        return {
            what: {n: round(float(w), 4) for n, w in zip(self.names, weights, strict=True)}
            for what, weights in both.items()
        }


def fuse(
    branches: dict[str, Detector],
    feature_cache: cache.FeatureCache,
    supports: Sequence,
    *,
    weights: str,
    modality: str,
    variants: int,
    seed: int,
    image_scores: Callable,
    tiles: int = 1,
) -> tuple[Detector, Mix]:
    """The fused detector and how it mixes.

    weights: "equal", or "probes": by what a branch sees of `variants` probes per support.
    branches: one whose name ends with IMAGE_ONLY has no share in the map.
    image_scores: patch values [n, p] -> image scores [n], for branches without their own.
    modality: names the kinds of probe, see data/probes.
    tiles: as the branches were built, see scales. Tokens of probes are kept in the feature cache.
    """
    if weights == "equal":
        found = {name: unprobed(branch, image_scores) for name, branch in branches.items()}
        ones = np.ones((len(found), 2))
        return combine(branches, found, made := weighed(found, ones), image_scores), made
    size = feature_cache.clip.size
    images = support_images.healthy_images(feature_cache, supports, tiling.side(size, tiles))
    painted = probes.paint(images, probes.kinds_of(modality), variants, seed)
    tokens = encoder.encode_stacks(
        feature_cache, painted.images, f"{tiles} tiles", partial(tiling.encode, tiles=tiles)
    )
    held = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t) for t in tokens]
    inside = covered(
        painted.masks, size, feature_cache.clip.grid * (tiling.FINE if tiles > 1 else 1)
    )
    found = {name: evidence(d, held, image_scores) for name, d in branches.items()}
    made = mix(found, inside, len(painted.kinds))
    return combine(branches, found, made, image_scores), made


def covered(masks: np.ndarray, size: int, grid: int) -> np.ndarray:
    """Masks [k, v, b, b] -> [k, v, p]: the patches of which more than half is marked."""
    if masks.shape[-1] != size:
        shape = masks.shape[:2]
        masks = np.stack([read.fit_mask(m, size) for m in masks.reshape(-1, *masks.shape[2:])])
        masks = masks.reshape(*shape, size, size)
    cut = masks.reshape(*masks.shape[:2], grid, size // grid, grid, size // grid)
    return cut.mean((3, 5)).reshape(*masks.shape[:2], grid * grid) > 0.5


def unprobed(branch: Detector, image_scores: Callable) -> Evidence:
    """What a branch says of the healthy images, each held out; there are no probes."""
    healthy = branch.held_out_image
    if healthy is None:
        healthy = image_scores(jnp.asarray(branch.held_out))
    k, p = branch.held_out.shape
    return Evidence(branch.held_out, np.asarray(healthy), np.zeros((k, 0, p)), np.zeros((k, 0)))


def evidence(branch: Detector, held: Sequence[Features], image_scores: Callable) -> Evidence:
    """Run a branch on the probes of each support as if it had never seen that support."""
    without: Any = branch.without
    values = [np.asarray(without(i, batch)) for i, batch in enumerate(held)]
    if branch.image is None:
        scores = [image_scores(jnp.asarray(v)) for v in values]
    else:
        scores = [branch.image(batch) for batch in held]
    found = unprobed(branch, image_scores)
    probed = np.stack([np.asarray(s) for s in scores])
    return found._replace(probe_patch=np.stack(values), probe_image=probed)


def mix(found: dict[str, Evidence], inside: np.ndarray, kinds: int) -> Mix:
    """Weights from the evidence. `inside` [k, v, p]: the patches that a probe covers."""
    weights = []
    for e in found.values():
        image = [e.probe_image[:, v::kinds] for v in range(kinds)]
        patch = [e.probe_patch[:, v::kinds][inside[:, v::kinds]] for v in range(kinds)]
        weights.append((weight(e.patch.ravel(), patch), image_weight(e.image, image)))
    return weighed(found, np.array(weights))


def weighed(found: dict[str, Evidence], weights: Float[np.ndarray, "b 2"]) -> Mix:
    """Values standardised on the held-out healthy images, times weights (map, image)."""
    able = np.array([(0.0 if name.endswith(IMAGE_ONLY) else 1.0, 1.0) for name in found]).T
    centre = np.array([(e.patch.mean(), e.image.mean()) for e in found.values()]).T
    scale = calibration.spread
    spread = np.array([(scale(e.patch.ravel()), scale(e.image)) for e in found.values()]).T
    w = weights.T * able
    # all blind: nothing speaks for one branch more than for another
    w = np.where(w.sum(1, keepdims=True) > 0, w, able)
    share = w / w.sum(1, keepdims=True)
    gains = w[0] / spread[0], 1 / spread[1]
    return Mix(tuple(found), centre[0], gains[0], centre[1], gains[1], share[0], share[1])


def weight(healthy: np.ndarray, altered: Sequence[np.ndarray]) -> float:
    """How far a branch tells healthy values from those of its WORST kind of probe; 0 is blind.

    The distance in standard deviations of two normal distributions with the same AUROC:
    sqrt(2) Phi^-1(AUROC), from 0 (chance or worse) to FINEST. For branches that err independently
    these are the best linear weights of standardised values.
    """
    worst = min((auroc(healthy, x) for x in altered if len(x)), default=0.5)
    return float(np.clip(np.sqrt(2) * stats.norm.ppf(worst), 0, FINEST))


def image_weight(healthy: np.ndarray, altered: Sequence[np.ndarray]) -> float:
    """The same for image scores: how far a probe of the WORST kind moves its own image.

    healthy [k], altered [k, v] on the same images. The mean of the pairs' differences in standard
    deviations of the healthy: with few supports it is steadier than an AUROC over all pairs.
    """
    worst = min(((x - healthy[:, None]).mean() for x in altered if x.size), default=0.0)
    return float(np.clip(worst / calibration.spread(healthy), 0, FINEST))


def auroc(low: np.ndarray, high: np.ndarray) -> float:
    """P(high > low) + P(equal) / 2."""
    ordered = np.sort(low)
    less, up_to = (np.searchsorted(ordered, high, side=s) for s in ("left", "right"))
    return float((less + up_to).mean() / (2 * len(low)))


def combine(
    branches: dict[str, Detector], found: dict[str, Evidence], made: Mix, image_scores: Callable
) -> Detector:
    """One detector whose values are the weighted, standardised sum of its branches'."""

    def patches(batch):
        return sum(of_patches(i, parts[i].patches(batch)) for i in shown)

    def image(batch):
        return sum(of_image(i, one_image(parts[i], batch)) for i in heard)

    def one_image(branch, batch):
        return image_scores(branch.patches(batch)) if branch.image is None else branch.image(batch)

    def read(i, values):
        return of_image(i, image_scores(values))

    def passes(batch, keys):
        return shifted("passes", (batch, keys), patches(batch), of_patches)

    def image_passes(batch, keys):
        return shifted("passes", (batch, keys), image(batch), read)

    def copies(batch):
        return shifted("copies", (batch,), patches(batch), of_patches)

    def image_copies(batch):
        return shifted("copies", (batch,), image(batch), read)

    of_patches, of_image = partial(patch_part, made), partial(image_part, made)
    shown, heard = (np.flatnonzero(w).tolist() for w in (made.patch_gain, made.image_weight))
    parts = tuple(b._replace(patches=memory_bank.once(b.patches)) for b in branches.values())
    shifted = partial(replaced, parts)
    random, several = (any(getattr(b, n) is not None for b in parts) for n in ("passes", "copies"))
    mixed = jnp.asarray([made.patch_centre, made.patch_gain], jnp.float32)
    said = list(found.values())
    patch = sum(of_patches(i, said[i].patch) for i in shown)
    scores = sum(of_image(i, said[i].image) for i in heard)
    return Detector(
        patches,
        np.asarray(patch, np.float32),
        passes if random else None,
        image,
        np.asarray(scores, np.float32),
        image_passes=image_passes if random else None,
        k=parts[0].k,
        load=parts[0].load,
        copies=copies if several else None,
        image_copies=image_copies if several else None,
        choose=lambda batch: (tuple(b.choose and b.choose(batch) for b in parts), mixed),
        chosen=partial(chosen, parts, tuple((made.patch_gain != 0).tolist())),
    )


def patch_part(made: Mix, i: int, values):
    """What branch i adds to the fused map."""
    return made.patch_gain[i] * (values - made.patch_centre[i])


def image_part(made: Mix, i: int, values):
    """What branch i adds to the fused image score."""
    standard = made.image_gain[i] * (values - made.image_centre[i])
    return made.image_weight[i] * jnp.arcsinh(standard)


def replaced(parts: Sequence[Detector], name: str, given: tuple, fused, part: Callable):
    """Fused values [t, ...] with each branch that has `name` (passes, copies) replaced by them.

    part: what a branch adds, of its number and patch values.
    """
    out = fused[None]
    for i, branch in enumerate(parts):
        if getattr(branch, name) is not None:
            each = jax.vmap(partial(part, i))(getattr(branch, name)(*given))
            out = out + each - part(i, branch.patches(given[0]))[None]
    return out


def chosen(parts: Sequence[Detector], used: Sequence[bool], batch: Features, choice: tuple):
    """Detector.chosen of fused branches: the fused values with each branch's choice held.

    used: which branches have a share in the map. choice: theirs, and centres and gains [2, b].
    """
    choices, (centre, gain) = choice
    values = 0.0
    for i, (branch, own) in enumerate(zip(parts, choices, strict=True)):
        if used[i]:
            one = branch.patches(batch) if branch.chosen is None else branch.chosen(batch, own)
            values = values + gain[i] * (one - centre[i])
    return values
