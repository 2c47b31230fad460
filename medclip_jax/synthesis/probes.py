"""Anomalies that training never shows: they weigh the branches of the fused detector.

Three kinds, painted on healthy images as the modality would show disease. None is a training kind
(CutPaste, GaussIntensityChange, Source): a branch that only knows those must show itself here.

    haze         a large, soft-edged opacity that takes contrast away (consolidation, oedema)
    dark_mass    a ragged ellipse, darker and smoother than its surroundings (hypoechoic mass, cyst)
    bright_mass  a ragged ellipse, brighter than its surroundings (enhancing or hyperintense tumour)
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

KINDS = ("haze", "dark_mass", "bright_mass")
BY_MODALITY = {  # word in the modality's name -> what disease looks like in it
    "ultrasound": ("dark_mass",),
    "mri": ("bright_mass", "dark_mass"),
    "mr": ("bright_mass", "dark_mass"),
    "x-ray": ("haze",),
    "xray": ("haze",),
    "radiograph": ("haze",),
}
BODY = 0.08  # grey level (after a blur) above which a pixel counts as body

Field = Float[np.ndarray, "s s"]


class Probes(NamedTuple):
    """Altered images of several kinds."""

    images: Float[np.ndarray, "k v s s"]
    masks: Bool[np.ndarray, "k v s s"]
    kinds: tuple[str, ...]  # of variant v: kinds[v % len(kinds)]


def kinds_of(modality: str) -> tuple[str, ...]:
    """The kinds that matter in a modality; all of them where it is unknown."""
    words = modality.lower().replace(",", " ").split()
    found = [BY_MODALITY[w] for w in words if w in BY_MODALITY]
    return tuple(dict.fromkeys(kind for kinds in found for kind in kinds)) or KINDS


def paint(
    images: Float[np.ndarray, "k s s"], kinds: tuple[str, ...], variants: int, seed: int
) -> Probes:
    """`variants` anomalies on each image [0, 1], their kinds in turn.

    Variant v of image i is a function of (seed, i, v) and the image.
    """
    makers = {"haze": haze, "dark_mass": dark_mass, "bright_mass": bright_mass}
    new = np.empty((len(images), variants, *images.shape[1:]), np.float32)
    masks = np.empty(new.shape, bool)
    for i, image in enumerate(images):
        room = np.argwhere(ndimage.gaussian_filter(image, image.shape[0] / 28) > BODY)
        if not len(room):  # a black image has no body: anywhere
            room = np.argwhere(np.ones_like(image, bool))
        for v in range(variants):
            rng = np.random.default_rng([seed, i, v, 0x9B0B])
            new[i, v], masks[i, v] = makers[kinds[v % len(kinds)]](rng, image, room)
    return Probes(new, masks, kinds)


def haze(rng, image: Field, room) -> tuple[Field, Bool[np.ndarray, "s s"]]:
    """Towards a light grey under one or two wide Gaussian clouds."""
    size = image.shape[0]
    cloud = np.zeros_like(image)
    for _ in range(rng.integers(1, 3)):
        level = ellipse(rng, size, room, (0.10, 0.20))
        cloud = np.maximum(cloud, np.exp(-0.5 * level**2))
    uneven = 1 + 0.3 * texture(rng, size, size / 16)
    share = np.clip(rng.uniform(0.25, 0.55) * cloud * uneven, 0, 1)
    grey = rng.uniform(0.65, 0.85)
    new = image + share * np.maximum(grey - image, 0)
    return new.astype(np.float32), cloud > 0.6


def dark_mass(rng, image: Field, room) -> tuple[Field, Bool[np.ndarray, "s s"]]:
    """Darkened by 40 to 80% and blurred inside a ragged ellipse."""
    inside = ramp(1 - ragged(rng, image.shape[0], room), rng.uniform(0.1, 0.4))
    dull = ndimage.gaussian_filter(image, image.shape[0] / 90)
    new = image + inside * (dull * (1 - rng.uniform(0.4, 0.8)) - image)
    return new.astype(np.float32), inside > 0.5


def bright_mass(rng, image: Field, room) -> tuple[Field, Bool[np.ndarray, "s s"]]:
    """30 to 70% of the way to white inside a ragged ellipse, slightly uneven."""
    size = image.shape[0]
    inside = ramp(1 - ragged(rng, size, room), rng.uniform(0.1, 0.5))
    share = np.clip(rng.uniform(0.3, 0.7) * inside * (1 + 0.15 * texture(rng, size, 4)), 0, 1)
    return (image + share * (0.95 - image)).astype(np.float32), inside > 0.5


def ellipse(rng, size: int, room, radius: tuple[float, float]) -> Field:
    """Distance from a point of the body in radii of a turned ellipse: 1 on its edge."""
    row, column = room[rng.integers(len(room))]
    r, stretch, turn = rng.uniform(*radius) * size, rng.uniform(0.6, 1.0), rng.uniform(0, np.pi)
    y, x = np.ogrid[:size, :size]
    y, x = y - row, x - column
    a, b = np.cos(turn) * y + np.sin(turn) * x, (np.cos(turn) * x - np.sin(turn) * y) / stretch
    return np.hypot(a, b) / r


def ragged(rng, size: int, room) -> Field:
    """An ellipse of 5 to 13% of the side whose edge is disturbed."""
    return ellipse(rng, size, room, (0.05, 0.13)) + 0.12 * texture(rng, size, size / 30)


def texture(rng, size: int, grain: float) -> Field:
    """Smooth noise with mean 0 and sd 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal((size, size)), grain, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def ramp(level: Field, width: float) -> Field:
    """0 below 0, 1 above `width`, linear between."""
    return np.clip(level / width, 0, 1)
