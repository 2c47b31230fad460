"""Augmentation of healthy supports: flips, rotation, elastic deformation, intensity jitter.

Section 4.1.3 of the paper; training only. Geometry moves the mask with the image: both lie in one
array of two channels, so they cannot part. Images are float32 in [0, 1], all randomness comes from
the key, everything runs on the device under jit and vmap.

Every kind of change draws from its own stream, so switching one on or off leaves the others as they
were; a strength of 0 removes the change from the computation, not only from the result.
"""

import re
from functools import partial
from typing import Any, NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray
from scipy import ndimage

from medclip_jax.errors import ConfigError

VERSION = 1  # raise when the result of a key changes: feature_caches are named by it
# Soft tissue under a probe or a coil deforms; bone, and what is compressed, does not (METHOD.md).
ELASTIC = re.compile(r"ultraso|sonogra|\bmri?\b|magnetic resonance", re.IGNORECASE)
SMOOTH = 1 / 16  # of the side: standard deviation of the Gaussian that smooths displacements
CHUNK = 16  # images per compiled call of `batch`
COPIES = 8  # augmented copies per support
STREAM = 47  # keeps these draws apart from others of the same seed


class Strengths(NamedTuple):
    """How much is changed; 0 = not at all."""

    flip: float = 0.0  # probability of mirroring left and right
    flip_vertical: float = 0.0  # probability of turning upside down
    rotate: float = 0.0  # largest angle, degrees, to either side
    elastic: float = 0.0  # sd of the displacement, share of the side; ultrasound and MRI only
    intensity: float = 0.0  # largest change of contrast, gamma (both as log) and brightness


def deforms(modality: str) -> bool:
    """May images of a modality (free text, such as "breast ultrasound") be deformed?"""
    return bool(ELASTIC.search(modality))


def permitted(strengths: Strengths, modality: str) -> None:
    """Raise ConfigError for elastic deformation of anything but ultrasound and MRI."""
    if strengths.elastic and not deforms(modality):
        raise ConfigError(
            f"config.augment.elastic is {strengths.elastic} but config.data.modality is "
            f"{modality!r}: only ultrasound and MRI may be deformed, give 0"
        )


def chosen(fields: Any, modality: str) -> tuple[int, Strengths]:
    """(copies, strengths) from the named strengths; without a strength no copies."""
    strengths = Strengths(**{name: float(value) for name, value in dict(fields).items()})
    permitted(strengths, modality)
    return (COPIES if any(strengths) else 0), strengths


def sample(
    key: PRNGKeyArray,
    image: Float[Array, "h w"],
    mask: Float[Array, "h w"],
    strengths: Strengths,
) -> tuple[Float[Array, "h w"], Float[Array, "h w"]]:
    """One random change of an image [0, 1] and its mask (0 or 1).

    `strengths` are constants of the compiled function. What comes in from beyond the edge is the
    image's mirror image, and the mask's.
    """
    k_flip, k_vertical, k_angle, k_elastic, k_intensity = jax.random.split(key, 5)
    both = jnp.stack([image, mask], axis=-1)
    if strengths.flip:
        flipped = dm_pix.flip_left_right(both)
        both = jnp.where(jax.random.bernoulli(k_flip, strengths.flip), flipped, both)
    if strengths.flip_vertical:
        flipped = dm_pix.flip_up_down(both)
        both = jnp.where(jax.random.bernoulli(k_vertical, strengths.flip_vertical), flipped, both)
    if strengths.rotate:
        angle = jnp.deg2rad(_symmetric(k_angle, strengths.rotate))
        both = rotate(both, angle)
    if strengths.elastic:
        both = elastic(k_elastic, both, strengths.elastic)
    image, mask = both[..., 0], (both[..., 1] > 0.5).astype(mask.dtype)
    if strengths.intensity:
        image = jitter(k_intensity, image, strengths.intensity)
    return jnp.clip(image, 0, 1), mask


def rotate(both: Float[Array, "h w c"], angle: Float[Array, ""]) -> Float[Array, "h w c"]:
    """Turn by an angle (radians, counter-clockwise) about the centre, bilinear."""
    with jax.default_matmul_precision("highest"):  # a TPU would round coordinates to 8 bits
        turned: Any = angle  # dm_pix says float and takes arrays
        return dm_pix.rotate(both, turned, mode="mirror")


def elastic(
    key: PRNGKeyArray, both: Float[Array, "h w c"], strength: float
) -> Float[Array, "h w c"]:
    """Smooth random displacements of standard deviation `strength` times the longer side.

    Simard et al. 2003: uniform noise, smoothed by a Gaussian of SMOOTH times the side, then scaled.
    """
    side = max(both.shape[:2])
    sigma = max(1.0, SMOOTH * side)
    # uniform noise in [-1, 1] has sd 1 / sqrt(3), and a 2-D Gaussian divides it by 2 sqrt(pi) sigma
    alpha = strength * side * 3**0.5 * 2 * np.pi**0.5 * sigma
    return dm_pix.elastic_deformation(key, both, alpha, sigma, mode="mirror")


def jitter(key: PRNGKeyArray, image: Float[Array, "h w"], strength: float) -> Float[Array, "h w"]:
    """Gamma and contrast times exp(u strength), brightness plus u strength / 2; u in [-1, 1]."""
    k_gamma, k_contrast, k_brightness = jax.random.split(key, 3)
    pixels = image[..., None]
    pixels = dm_pix.adjust_gamma(pixels, jnp.exp(_symmetric(k_gamma, strength)))
    pixels = dm_pix.adjust_contrast(pixels, jnp.exp(_symmetric(k_contrast, strength)))
    pixels = dm_pix.adjust_brightness(pixels, _symmetric(k_brightness, strength / 2))
    return pixels[..., 0]


def batch(
    keys: Key[Array, " n"],
    images: Float[Array | np.ndarray, "n h w"],
    masks: Float[Array | np.ndarray, "n h w"],
    strengths: Strengths,
) -> tuple[Float[np.ndarray, "n h w"], Float[np.ndarray, "n h w"]]:
    """Many images, each as `sample`: images and masks on the host."""
    images, masks = np.asarray(images), np.asarray(masks)
    words = jax.device_get(jax.random.key_data(keys))
    changed, moved = images.copy(), masks.copy()
    for start in range(0, len(images), CHUNK):
        part = np.arange(start, min(start + CHUNK, len(images)))
        full = np.resize(part, CHUNK)  # repeats rows to fill the shape: one compilation
        rows = jax.device_put((words[full], images[full], masks[full]))
        new, mask = jax.device_get(_many(strengths, *rows))
        changed[part], moved[part] = new[: len(part)], mask[: len(part)]
    return changed, moved


def copies(
    seed: int,
    image_digest: int,
    image: Float[np.ndarray, "h w"],
    count: int,
    strengths: Strengths,
) -> Float[np.ndarray, "n h w"]:
    """The image, then `count` changed copies; copy c is a function of (seed, image_digest, c).

    `image_digest` is any whole number that names the image (its low 64 bits count).
    """
    whole = np.repeat(image[None], 1 + count, axis=0)
    if not count:
        return whole
    key = jax.random.fold_in(jax.random.key(seed), STREAM)
    for word in (image_digest & 0xFFFFFFFF, (image_digest >> 32) & 0xFFFFFFFF):
        key = jax.random.fold_in(key, np.uint32(word))
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count))
    changed, _ = batch(keys, whole[1:], np.zeros_like(whole[1:]), strengths)
    return np.concatenate([whole[:1], changed])


@partial(jax.jit, static_argnums=0)
def _many(strengths, words, images, masks):
    one = partial(sample, strengths=strengths)
    return jax.vmap(one)(jax.random.wrap_key_data(words), images, masks)


def _symmetric(key: PRNGKeyArray, largest: float) -> Float[Array, ""]:
    return jax.random.uniform(key, minval=-largest, maxval=largest)


SHARE = 0.9  # of the side that a crop keeps
COUNT = 10


def of(image: Float[np.ndarray, "s s"]) -> Float[np.ndarray, "v s s"]:
    """Five crops (corners and middle), each as it is and mirrored; bilinear, [0, 1] kept."""
    size = image.shape[0]
    room = (1 - SHARE) * (size - 1)
    starts = ((0, 0), (0, room), (room, 0), (room, room), (room / 2, room / 2))
    crops = [
        ndimage.affine_transform(image, (SHARE, SHARE), start, order=1, mode="nearest")
        for start in starts
    ]
    return np.stack([*crops, *(crop[:, ::-1] for crop in crops)]).astype(np.float32)
