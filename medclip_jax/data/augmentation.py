"""Training images from healthy supports: augmented copies, and variants with synthetic anomalies.

Section 4.1.3 of the paper: flips, rotation, elastic deformation, intensity jitter. Images are in
[0, 1] and show no lesion, so there is no mask to move. Every kind of change has a random stream of
its own; a strength of 0 removes it from the computation.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray
from scipy import ndimage

from medclip_jax.config_validation import deforms
from medclip_jax.data.layouts import Record
from medclip_jax.errors import ConfigError
from medclip_jax.synthesis import generate

VERSION = 2  # raise when the result of a key changes: the feature cache is named by it
SMOOTH = 1 / 16  # of the side: standard deviation of the Gaussian that smooths displacements
CHUNK = 8  # images per compiled call of `batch`
COPIES = 8  # augmented copies per support
STREAM = 47  # separates these random numbers from others of the same seed
CROP_SHARE = 0.9  # of the side that a crop covers


class Strengths(NamedTuple):
    """How much is changed; 0 = not at all."""

    flip: float = 0.0  # probability of mirroring left and right
    rotate: float = 0.0  # largest angle, degrees, to either side
    elastic: float = 0.0  # sd of the displacement, share of the side; ultrasound and MRI only
    intensity: float = 0.0  # largest change of contrast, gamma (both as log) and brightness


class Synthesis(NamedTuple):
    """How anomalies are made."""

    preset: generate.Preset
    variants: int  # anomalous variants per image
    seed: int
    partner: str  # CutPaste copies from "self" or from any "support"
    copies: int = 0  # augmented copies per image; they and the image are what variants are made of
    strengths: Strengths = Strengths()


def chosen(strengths: Mapping[str, float], modality: str) -> tuple[int, Strengths]:
    """(copies, Strengths) from strengths by name; without a strength no copies.

    Raises ConfigError for elastic deformation of anything but ultrasound and MRI.
    """
    result = Strengths(**{name: float(value) for name, value in strengths.items()})
    if result.elastic and not deforms(modality):
        raise ConfigError(
            f"config.augment.elastic is {result.elastic} but config.data.modality is "
            f"{modality!r}: only ultrasound and MRI may be deformed, give 0"
        )
    return (COPIES if any(result) else 0), result


def sample(
    key: PRNGKeyArray, image: Float[Array, "h w"], strengths: Strengths
) -> Float[Array, "h w"]:
    """One random change of an image [0, 1].

    `strengths` are constants of the compiled function. What comes in from beyond the edge is the
    image's mirror image.
    """
    k_flip, _, k_angle, k_elastic, k_intensity = jax.random.split(key, 5)
    pixels = image[..., None]
    if strengths.flip:
        flipped = dm_pix.flip_left_right(pixels)
        pixels = jnp.where(jax.random.bernoulli(k_flip, strengths.flip), flipped, pixels)
    if strengths.rotate:
        pixels = rotate(pixels, jnp.deg2rad(_symmetric(k_angle, strengths.rotate)))
    if strengths.elastic:
        pixels = elastic(k_elastic, pixels, strengths.elastic)
    if strengths.intensity:
        pixels = jitter(k_intensity, pixels, strengths.intensity)
    return jnp.clip(pixels[..., 0], 0, 1)


def rotate(pixels: Float[Array, "h w 1"], angle: Any) -> Float[Array, "h w 1"]:
    """Turn by an angle (radians, counter-clockwise) about the centre, bilinear."""
    with jax.default_matmul_precision("highest"):  # a TPU would round coordinates to 8 bits
        return dm_pix.rotate(pixels, angle, mode="mirror")


def elastic(
    key: PRNGKeyArray, pixels: Float[Array, "h w 1"], strength: float
) -> Float[Array, "h w 1"]:
    """Smooth random displacements of standard deviation `strength` times the longer side.

    Simard et al. 2003: uniform noise, smoothed by a Gaussian of SMOOTH times the side, then scaled.
    As dm_pix.elastic_deformation, but smoothed by two products of matrices: a convolution of one
    channel takes forty times as long on a CPU.
    """
    shape = pixels.shape[:2]
    sigma = max(1.0, SMOOTH * max(shape))
    # uniform noise in [-1, 1] has sd 1 / sqrt(3), and a 2-D Gaussian divides it by 2 sqrt(pi) sigma
    alpha = strength * max(shape) * 3**0.5 * 2 * np.pi**0.5 * sigma
    down, across = (_smoothing(side, sigma) for side in shape)
    noise = jnp.stack([2 * jax.random.uniform(k, shape) - 1 for k in jax.random.split(key)])
    moved = alpha * jnp.einsum("ab,nbc,dc->nad", down, noise, across, precision="highest")
    places = list(moved + jnp.indices(shape))
    scipy = jax.scipy.ndimage
    return scipy.map_coordinates(pixels[..., 0], places, order=1, mode="mirror")[..., None]


def _smoothing(side: int, sigma: float) -> Float[np.ndarray, "s s"]:
    """The matrix of a Gaussian, cut off a little beyond three sigma and at the edges."""
    apart = np.subtract.outer(np.arange(side), np.arange(side))
    cut = int((sigma - 0.8) / 0.3 + 1.5)
    whole = np.exp(-(np.arange(-cut, cut + 1) ** 2) / (2 * sigma**2)).sum()
    weights = np.where(abs(apart) <= cut, np.exp(-(apart**2) / (2 * sigma**2)), 0)
    return (weights / whole).astype(np.float32)


def jitter(
    key: PRNGKeyArray, pixels: Float[Array, "h w 1"], strength: float
) -> Float[Array, "h w 1"]:
    """Gamma and contrast times exp(u strength), brightness plus u strength / 2; u in [-1, 1]."""
    k_gamma, k_contrast, k_brightness = jax.random.split(key, 3)
    pixels = dm_pix.adjust_gamma(pixels, jnp.exp(_symmetric(k_gamma, strength)))
    pixels = dm_pix.adjust_contrast(pixels, jnp.exp(_symmetric(k_contrast, strength)))
    return dm_pix.adjust_brightness(pixels, _symmetric(k_brightness, strength / 2))


def batch(
    keys: Key[Array, " n"], images: Float[np.ndarray, "n h w"], strengths: Strengths
) -> Float[np.ndarray, "n h w"]:
    """Many images, each as `sample`, on the host."""
    words = jax.device_get(jax.random.key_data(keys))
    changed = images.copy()
    for start in range(0, len(images), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(images)))
        full = np.resize(rows, CHUNK)  # repeats rows to fill the shape: one compilation
        new = jax.device_get(_many(strengths, *jax.device_put((words[full], images[full]))))
        changed[rows] = new[: len(rows)]
    return changed


def copies(
    seed: int, image_digest: int, image: Float[np.ndarray, "h w"], count: int, strengths: Strengths
) -> Float[np.ndarray, "n h w"]:
    """The image, then `count` changed copies; copy c is a function of (seed, image_digest, c).

    Args:
      image_digest: any whole number that names the image (its low 64 bits count).
    """
    result = np.repeat(image[None], 1 + count, axis=0)
    if count:
        key = jax.random.key(seed)
        for word in (STREAM, image_digest & 0xFFFFFFFF, (image_digest >> 32) & 0xFFFFFFFF):
            key = jax.random.fold_in(key, np.uint32(word))
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count))
        result[1:] = batch(keys, result[1:], strengths)
    return result


def crops(image: Float[np.ndarray, "s s"]) -> Float[np.ndarray, "v s s"]:
    """Five crops (corners and middle), each as it is and mirrored; bilinear, range preserved."""
    size = image.shape[0]
    room = (1 - CROP_SHARE) * (size - 1)
    starts = ((0, 0), (0, room), (room, 0), (room, room), (room / 2, room / 2))
    crop = partial(ndimage.affine_transform, image, (CROP_SHARE,) * 2, order=1, mode="nearest")
    views = [crop(offset=start) for start in starts]
    return np.stack([*views, *(view[:, ::-1] for view in views)]).astype(np.float32)


def variants(
    record: Record,
    image: Float[np.ndarray, "s s"],
    partners: Float[np.ndarray, "k s s"],
    recipe: Synthesis,
) -> tuple[Float[np.ndarray, "v s s"], Float[np.ndarray, "v s s"], Int[np.ndarray, " v"]]:
    """Anomalous variants of one image: (images, masks, kinds), then its augmented copies.

    Variant i is a function of (seed, image content, i) and, if partners are shared, of them. It is
    made of the image or of a copy, in turn, so that augmentation is not learned as an anomaly.
    """
    name = int(record.sha256[:16], 16)
    keys = jnp.stack([generate.key_for(recipe.seed, name, v) for v in range(recipe.variants)])
    kinds, rng = drawn_kinds(record, recipe)
    picks = rng.integers(len(partners), size=recipe.variants)
    bases = copies(recipe.seed, name, image, recipe.copies, recipe.strengths)
    images = bases[np.arange(recipe.variants) % len(bases)]
    sources = images if recipe.partner == "self" else partners[picks]
    changed, masks = generate.batch(keys, images, sources, kinds, recipe.preset)
    if not recipe.copies:
        return changed, masks, kinds
    clean = np.full(recipe.copies, generate.IDENTITY)
    pairs = (changed, bases[1:]), (masks, np.zeros_like(bases[1:])), (kinds, clean)
    images, masks, kinds = map(np.concatenate, pairs)
    return images, masks, kinds


def drawn_kinds(
    record: Record, recipe: Synthesis
) -> tuple[Int[np.ndarray, " v"], np.random.Generator]:
    """The kinds of an image's anomalous variants, which need no pixel, and what draws on."""
    rng = np.random.default_rng([recipe.seed, int(record.sha256[:16], 16)])
    places = generate.places_of(recipe.preset)
    return places[rng.integers(len(places), size=recipe.variants)], rng


@partial(jax.jit, static_argnums=0)
def _many(strengths, words, images):
    one = partial(sample, strengths=strengths)
    return jax.vmap(one)(jax.random.wrap_key_data(words), images)


def _symmetric(key: PRNGKeyArray, largest: float) -> Float[Array, ""]:
    return jax.random.uniform(key, minval=-largest, maxval=largest)
