"""The anatomy of the phantoms: one function per modality, from a generator to a `Rendered`.

All lengths are shares of the image's sides, so any size works. See `phantom` for how to use them.
Speckle is the standard model of fully developed speckle (complex Gaussian scatterers, Rayleigh
envelope; Goodman, J. Opt. Soc. Am. 66, 1976); MRI noise is Rician (Gudbjartsson and Patz, 1995).
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

DYNAMIC_RANGE = 60.0  # dB shown in ultrasound

Field = Float[np.ndarray, "h w"]
Region = Bool[np.ndarray, "h w"]


class Rendered(NamedTuple):
    """One simulated image, the same without the lesion, and the lesion's outline."""

    healthy: Field
    diseased: Field
    mask: Region


def frame(shape: tuple[int, int]) -> tuple[Field, Field]:
    """Row and column of pixel centres in units of the height and width, in (0, 1)."""
    y, x = (np.arange(shape[0]) + 0.5) / shape[0], (np.arange(shape[1]) + 0.5) / shape[1]
    return np.broadcast_to(y[:, None], shape), np.broadcast_to(x[None], shape)


def waves(rng: np.random.Generator, shape: tuple[int, ...], order: int) -> np.ndarray:
    """A smooth random curve or surface: cosines up to `order` half waves a side, sd about 1."""
    grids = np.meshgrid(*[np.arange(order + 1.0)] * len(shape), indexing="ij")
    weight = 1 / (1 + sum(g**2 for g in grids))
    weight.flat[0] = 0.0
    weight *= 2 ** (len(shape) / 2) / np.sqrt((weight**2).sum())
    field = rng.standard_normal(weight.shape) * weight
    for axis, side in enumerate(shape):
        basis = np.cos(np.pi * np.outer(np.arange(order + 1), (np.arange(side) + 0.5) / side))
        field = np.moveaxis(np.tensordot(basis, field, (0, axis)), 0, axis)
    return field


def ripple(rng: np.random.Generator, angle: Field, orders, size) -> Field:
    """A random function of the angle: a sum of cosines of these orders, sd about `size`."""
    orders = np.asarray(orders)
    around = np.linspace(-np.pi, np.pi, 2048)  # a table: one look-up a pixel, not many cosines
    phase = rng.uniform(0, 2 * np.pi, len(orders))
    height = size * rng.standard_normal(len(orders)) * np.sqrt(2 / len(orders))
    table = height @ np.cos(orders[:, None] * around + phase[:, None])
    return table[np.int32((angle + np.pi) * (2047 / (2 * np.pi)))]


def blob(rng: np.random.Generator, shape: tuple[int, int], room: Region, radius, ragged: float):
    """Pixels from the outline of a ragged ellipse, positive inside; its centre lies in `room`."""
    rows, columns = np.nonzero(room)
    pick = rng.integers(len(rows))
    r = rng.uniform(*radius) * min(shape)
    stretch, turn = rng.uniform(0.65, 1.0), rng.uniform(0, np.pi)
    v, u = np.ogrid[: shape[0], : shape[1]]
    v, u = v - rows[pick], u - columns[pick]
    a = np.cos(turn) * v + np.sin(turn) * u
    b = (np.cos(turn) * u - np.sin(turn) * v) / stretch
    orders = np.arange(2, 9)
    outline = 1 + ripple(rng, np.arctan2(b, a), orders, ragged * 2.5 / orders)
    return r * np.clip(outline, 0.6, 1.5) - np.hypot(a, b)


def ramp(level: np.ndarray, width: float) -> np.ndarray:
    """0 below 0, 1 above `width`, a smooth step between."""
    t = np.clip(level / width, 0.0, 1.0)
    return t * t * (3 - 2 * t)


def speckle(rng: np.random.Generator, shape: tuple[int, int]) -> Field:
    """Envelope of fully developed speckle, unit mean square; wider across than along the beam."""
    grain = max(min(shape) / 224, 0.5)
    smooth = partial(ndimage.gaussian_filter, sigma=(0.8 * grain, 1.5 * grain), mode="wrap")
    power = smooth(rng.standard_normal(shape)) ** 2 + smooth(rng.standard_normal(shape)) ** 2
    return np.sqrt(power / power.mean())


def ultrasound(rng: np.random.Generator, shape: tuple[int, int]) -> Rendered:
    """Breast B-mode, linear probe: skin, fat with septa, gland, fascia, pectoral muscle.

    Lesions are darker than what they replace, with a shadow (or, behind cysts, enhancement) that is
    not part of the mask.
    """
    y, x = frame(shape)
    tissue, room, decibel = breast(rng, shape, y)
    decibel += 2.0 * waves(rng, shape, 6) + 1.0 * waves(rng, shape, 24)
    decibel += rng.uniform(-9, -3) * y + 2.5 * waves(rng, shape[1:], 10)[None] * y
    noise = speckle(rng, shape)
    level = np.where(tissue, blob(rng, shape, room, (0.06, 0.14), 0.09), -1.0)
    mask = level > 0
    cyst = rng.random() < 0.25
    drop = rng.uniform(24, 30) if cyst else rng.uniform(12, 18)
    behind = rng.uniform(15, 40) * (0.6 if cyst else -1.0)
    passed = ndimage.gaussian_filter1d(np.cumsum(mask, 0) / shape[0], 2.0 * shape[1] / 224, axis=1)
    texture = 1.5 * waves(rng, shape, 16)
    inner = -np.maximum(drop + texture, 3.0) * ramp(level, 3.0 * min(shape) / 224 + 1e-6)
    change = np.where(mask, inner, behind * passed)
    electronic = 10 ** (-58 / 20) * np.abs(rng.standard_normal(shape))

    def compress(decibel):
        envelope = noise * 10 ** (decibel / 20) + electronic
        return np.clip(1 + 20 * np.log10(envelope) / DYNAMIC_RANGE, 0, 1).astype(np.float32)

    return Rendered(compress(decibel), compress(decibel + change), mask)


def breast(rng: np.random.Generator, shape: tuple[int, int], y: Field):
    """Where lesions may reach, where their centres may lie, and the echo level in dB."""

    def depth(at, swing, order=5):
        return (at + swing * waves(rng, shape[1:], order))[None]

    skin = depth(rng.uniform(0.035, 0.06), 0.004)
    fat = depth(rng.uniform(0.2, 0.34), 0.03)
    gland = np.maximum(depth(rng.uniform(0.55, 0.75), 0.03), fat + 0.15)
    fascia = gland + depth(rng.uniform(0.02, 0.05), 0.004)
    muscle = fascia + depth(rng.uniform(0.13, 0.2), 0.01)
    levels = np.array([-10.0, -28.0, -17.0, -9.0, -26.0, -33.0]) + rng.normal(0, 1.5, 6)
    inside = [y > edge for edge in (skin, fat, gland, fascia, muscle)]
    decibel = levels[np.sum(inside, 0)]
    x = np.linspace(0, 1, shape[1])
    for _ in range(rng.integers(4, 9)):  # septa of the fat, thin and bright
        line = rng.uniform(0.05, 0.35) + rng.uniform(-0.5, 0.5) * (x - rng.random())
        line = (line + 0.02 * waves(rng, shape[1:], 8))[None]
        near = np.exp(-0.5 * ((y - line) / 0.006) ** 2) * inside[0] * ~inside[1]
        decibel = decibel + rng.uniform(7, 13) * near
    fibres = np.sin(2 * np.pi * (y - fascia) * rng.uniform(28, 40)) * (inside[3] & ~inside[4])
    decibel = ndimage.gaussian_filter(decibel + 4.0 * fibres, 0.7)
    tissue = inside[0] & ~inside[2]
    return tissue, tissue & (y > skin + 0.1) & (y < gland - 0.05), decibel


def mri(rng: np.random.Generator, shape: tuple[int, int]) -> Rendered:
    """Axial brain, FLAIR-like: scalp, skull, folded cortex, white matter, ventricles, nuclei.

    Lesions are bright (three in four) or dark, ragged, at times with a halo of oedema that is not
    part of the mask.
    """
    y, x = frame(shape)
    centre = 0.5 + rng.normal(0, 0.012, 2)
    turn = rng.normal(0, 0.05)
    v, u = y - centre[0], x - centre[1]
    v, u = np.cos(turn) * v - np.sin(turn) * u, np.sin(turn) * v + np.cos(turn) * u
    brain, white, image = head(rng, v, u)
    image = ndimage.gaussian_filter(image, 0.6 * min(shape) / 224)
    level = blob(rng, shape, white, (0.05, 0.12), 0.1)
    mask = (level > 0) & brain
    target = rng.uniform(0.66, 0.88) if rng.random() < 0.75 else rng.uniform(0.12, 0.22)
    core = 1 - rng.uniform(0, 0.35) * ramp(level - 0.03 * min(shape), 4.0)  # duller middle
    inner = target * (core if target > 0.5 else 1.0) * (1 + 0.06 * waves(rng, shape, 20))
    halo = rng.uniform(0.08, 0.2) * (rng.random() < 0.6) * brain * (image > 0.25)
    halo = halo * np.exp(np.minimum(level, 0) / (0.035 * min(shape)))
    blend = 0.4 + 0.6 * ramp(level, 0.015 * min(shape))
    sick = np.where(mask, image + blend * (inner - image), image + halo)
    bias = 1 + 0.1 * waves(rng, shape, 2)
    sigma = rng.uniform(0.012, 0.03)
    real, imaginary = sigma * rng.standard_normal((2, *shape))

    def acquire(signal):
        return np.clip(np.hypot(signal * bias + real, imaginary), 0, 1).astype(np.float32)

    return Rendered(acquire(image), acquire(sick), mask)


def head(rng: np.random.Generator, v: Field, u: Field) -> tuple[Region, Region, Field]:
    """Brain, where lesion centres may lie, and the noise-free image of an axial slice."""
    long, wide = rng.uniform(0.42, 0.46), rng.uniform(0.34, 0.38)
    angle = np.arctan2(u / wide, v / long)
    rho = np.hypot(v / long, u / wide) / (1 + ripple(rng, angle, (2, 3, 4), 0.02))
    grey, matter, fluid, fat = np.array([0.58, 0.44, 0.1, 0.7]) + rng.normal(0, 0.025, 4)
    image = np.where(rho < 1, fat, 0.0)
    image = np.where(rho < 0.94, 0.06, image)  # skull
    image = np.where(rho < 0.88, fluid, image)
    fold = ripple(rng, angle, range(13, 27), 1.0) + 0.6 * ripple(rng, angle, range(27, 41), 1.0)
    brain = rho < 0.855 - 0.01 * fold
    sulcus = (np.abs(ripple(rng, angle, range(9, 20), 1.0)) < 0.16) & (rho > 0.66 + 0.03 * fold)
    fissure = np.abs(u + 0.004 * np.sin(14 * v)) < 0.004 + 0.004 * (np.abs(v) > 0.22 * long / 0.44)
    fissure &= np.abs(v) > 0.13
    image = np.where(brain, grey, image)
    white = brain & (rho < 0.73 + 0.045 * fold) & (np.abs(u) > 0.018)
    image = np.where(white | (brain & (rho < 0.5)), matter, image)
    side, open_ = np.abs(u), rng.uniform(0.75, 1.3)
    nuclei = np.hypot((v - 0.01) / 0.085, (side - 0.1) / 0.035) < 1
    image = np.where(nuclei, grey - 0.02, image)
    front = np.hypot((v + 0.09) / 0.075, (side - 0.03 - 0.35 * np.abs(v + 0.05)) / (0.018 * open_))
    back = np.hypot((v - 0.12) / 0.085, (side - 0.035 - 0.45 * np.abs(v - 0.06)) / (0.02 * open_))
    third = np.hypot((v - 0.02) / 0.05, u / (0.007 * open_))
    image = np.where((front < 1) | (back < 1) | (third < 1), fluid, image)
    image = np.where(brain & (sulcus | fissure), 0.5 * (image + fluid), image)
    return brain, white & (rho < 0.66), image


def xray(rng: np.random.Generator, shape: tuple[int, int]) -> Rendered:
    """Frontal chest: lungs, ribs, clavicles, heart, diaphragm, spine, vessels, quantum noise.

    Lesions are soft-edged opacities inside a lung, from small nodules to large patches.
    """
    y, x = frame(shape)
    lungs, room, air, density = thorax(rng, shape, y, x)
    nodule = rng.random() < 0.5
    radius, soft = ((0.03, 0.06), 0.02) if nodule else ((0.07, 0.14), 0.07)
    level = blob(rng, shape, room, radius, 0.04 if nodule else 0.1)
    mask = (level > 0) & lungs
    opacity = rng.uniform(0.16, 0.28) * (0.15 + 0.85 * ramp(level, soft * min(shape)))
    opacity = opacity * (1 + (0.0 if nodule else 0.12) * waves(rng, shape, 24))
    exposure = rng.uniform(0.008, 0.018)
    grain = ndimage.gaussian_filter(rng.standard_normal(shape), 0.5) * 1.6
    gain, lift = rng.uniform(0.9, 1.05), rng.uniform(-0.03, 0.03)

    def expose(density):  # fewer quanta, so more noise, behind dense tissue
        noisy = density + exposure * grain * np.exp(0.9 * density)
        return np.clip(gain * noisy + lift, 0, 1).astype(np.float32)

    sick = density + np.where(mask, np.maximum(opacity * ramp(air - 0.5, 0.5), 0.01), 0.0)
    return Rendered(expose(density), expose(sick), mask)


def thorax(rng: np.random.Generator, shape: tuple[int, int], y: Field, x: Field):
    """Lungs, where lesion centres may lie, and the noise-free density in [0, 1]."""
    middle, top = 0.5 + rng.normal(0, 0.012), rng.uniform(0.08, 0.13)
    base, spread = rng.uniform(0.76, 0.86), rng.uniform(0.9, 1.05)
    side = (x - middle) / spread
    outer = np.abs(side)
    shoulder = ramp(0.05 - y + 0.45 * np.maximum(outer - 0.16, 0) ** 1.5 * 2, 0.06)
    density = 0.6 * (1 - shoulder * (outer > 0.13)) + 0.04 * waves(rng, shape, 4)
    t = np.clip((y - top) / (base - top), 0, 1)
    wide = 0.33 * np.sqrt(np.clip(1 - (1 - t) ** 2.2, 0, 1)) + 0.055
    dome = base + np.where(side < 0, -0.03, 0.01) + 1.6 * (outer - 0.22) ** 2
    lungs = (outer > 0.065) & (outer < wide + 0.008 * waves(rng, shape, 5)) & (y > top) & (y < dome)
    heart = np.hypot((y - base + 0.13) / 0.19, (side - 0.055) / rng.uniform(0.14, 0.19)) < 1
    lungs &= ~heart
    air = ndimage.gaussian_filter(lungs.astype(np.float32), 2.0 * min(shape) / 224)
    density = density - rng.uniform(0.32, 0.4) * air
    hilum = np.hypot((y - 0.45) / 0.2, (outer - 0.11) / 0.14)
    vessels = np.abs(waves(rng, shape, 30)) + np.abs(waves(rng, shape, 44))
    density = density + air * np.exp(-hilum) * (0.22 - 0.05 * vessels) + 0.02 * air * vessels
    pitch, tilt = rng.uniform(0.078, 0.09), rng.uniform(0.5, 0.8)
    lane = (y - top + 0.02 - tilt * (0.35 - outer) ** 2 * 1.6 + 0.25 * outer) / pitch
    near = np.abs(lane - np.floor(lane) - 0.5)
    cage = (outer < 0.43) & (y > top - 0.03) & (y < base + 0.1) & (outer > 0.04)
    rib = 0.05 * ramp(0.27 - near, 0.05) + 0.03 * (np.abs(near - 0.24) < 0.03)
    density = density + cage * rib
    collar = np.abs(y - top - 0.035 + 0.22 * outer - 0.01 * np.sin(14 * outer)) < 0.014
    density = density + 0.09 * (collar & (outer > 0.05) & (outer < 0.36))
    spine = ramp(0.05 - outer, 0.02) * (1 + 0.25 * np.cos(2 * np.pi * y / rng.uniform(0.06, 0.07)))
    density = density + 0.09 * spine + 0.08 * ramp(y - base, 0.2)
    trachea = (np.abs(side + 0.005) < 0.018) & (y < 0.36)
    density = ndimage.gaussian_filter(density - 0.1 * trachea, 0.9 * min(shape) / 224)
    return lungs, lungs & (outer > 0.1) & (outer < wide - 0.03) & (y < dome - 0.03), air, density


MODALITIES = {"ultrasound": ultrasound, "mri": mri, "xray": xray}
