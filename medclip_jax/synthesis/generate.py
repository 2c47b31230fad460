"""Synthetic anomalies on healthy images: CutPaste, GaussIntensityChange, Source, Identity, ours.

These four are MediCLIP's tasks (medsyn), re-implemented from the formulas of section 4.3; a dark
mass and a diffuse opacity are ours. A preset is a set of kinds (`PRESETS`) and one of two ways:

`mediclip`. The peer as released, its known faults included, for like-for-like comparison: anywhere
in the frame, cubic splines rounded to 8 bits, intensities cut off to 8 bits, the whole shape as
label of Gauss and Source, and for CutPaste the shape without unchanged pixels that can be reached
from its outside.

All others. Anomalies lie on the body (see `shapes.body_mask`), change nothing outside it, and the
label is true: pixels that differ by more than VISIBLE, closed with a 5 x 5 square. A sample of
fewer than MIN_PIXELS is repeated, up to TRIES times.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from medclip_jax.synthesis import anomalies, shapes
from medclip_jax.synthesis.anomalies import Image, Mask

# raise when the anomalies of a key change: the feature cache is named by it
VERSION = {"medclip": 2, "mediclip": 3, "masses": 1, "opacities": 1}
ALTER = {
    **{"cutpaste": anomalies.cutpaste, "gauss": anomalies.gauss, "source": anomalies.source},
    **{"mass": anomalies.mass, "opacity": anomalies.opacity},
}
# the feature cache holds their places: new ones go last
KINDS = ("cutpaste", "gauss", "source", "identity", "mass", "opacity")
IDENTITY = KINDS.index("identity")
PRESETS = {  # the kinds of each, equally often; identity is the image as it is
    **dict.fromkeys(("medclip", "mediclip"), ("cutpaste", "gauss", "source")),
    **{"masses": ("cutpaste", "gauss", "source", "mass"), "opacities": ("opacity",)},
}
VISIBLE = 2 / 255  # a smaller change is no anomaly
MIN_PIXELS = 16
TRIES = 4
CHUNK = 16  # images per compiled call of `batch`

Preset = Literal["medclip", "mediclip", "masses", "opacities"]


def places_of(preset: Preset) -> Int[np.ndarray, " k"]:
    """The kinds of a preset, as indices into KINDS."""
    return np.array([KINDS.index(kind) for kind in PRESETS[preset]])


def key_for(seed: int, image_digest: int, variant: int) -> PRNGKeyArray:
    """The key of one synthetic variant of one image, the same on any number of devices.

    Args:
      image_digest: any whole number that names the image (its low 64 bits count).
    """
    key = jax.random.key(seed)
    for word in (image_digest & 0xFFFFFFFF, (image_digest >> 32) & 0xFFFFFFFF, variant):
        key = jax.random.fold_in(key, np.uint32(word))
    return key


def batch(
    keys: Key[Array, " n"],
    images: Float[Array | np.ndarray, "n h w"],
    partners: Float[Array | np.ndarray, "n h w"],
    kinds: Int[Array | np.ndarray, " n"],
    preset: Preset = "medclip",
) -> tuple[Float[np.ndarray, "n h w"], Float[np.ndarray, "n h w"]]:
    """One variant of each image.

    One image after the other inside each compiled call (`lax.map`), so that branches and loops cost
    only what each image needs: on CPU this is faster than vmap.

    Args:
      keys: of `key_for`; partners: what CutPaste copies from.
      kinds: indices into KINDS, of the preset or identity; others raise ValueError.

    Returns:
      Altered images [0, 1] and masks (0 or 1), on the host.
    """
    images, partners, kinds = np.asarray(images), np.asarray(partners), np.asarray(kinds)
    if not np.isin(kinds, [*places_of(preset), IDENTITY]).all():
        raise ValueError(f"kinds {np.unique(kinds)} are not all of the preset {preset}")
    words = jax.device_get(jax.random.key_data(keys))
    changed, masks = images.copy(), np.zeros_like(images)

    def run(start: int) -> None:
        rows = np.arange(start, min(start + CHUNK, len(images)))
        full = np.resize(rows, CHUNK)  # repeats rows to fill the shape
        placed = jax.device_put((words[full], images[full], partners[full], kinds[full]))
        new, mask = jax.device_get(_many(preset, *placed))
        changed[rows], masks[rows] = new[: len(rows)], mask[: len(rows)]

    if len(images):
        run(0)  # alone: it compiles
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, range(CHUNK, len(images), CHUNK)))
    return changed, masks


@partial(jax.jit, static_argnums=0)
def _many(preset, words, *rows):
    own = PRESETS[preset]  # others would only take time to compile
    makers = [partial(make, n if n in own else "identity", preset=preset) for n in KINDS]

    def one(row):
        key, image, partner, kind = row
        return jax.lax.switch(kind, makers, key, image, partner)

    return jax.lax.map(one, (jax.random.wrap_key_data(words), *rows))


def make(
    name: str, key: PRNGKeyArray, image: Image, partner: Image, preset: Preset = "medclip"
) -> tuple[Image, Image]:
    """One variant of a named kind: image [0, 1] and mask (0 or 1)."""
    if name == "identity":
        return image, jnp.zeros_like(image)
    if preset == "mediclip":
        new, mask = _alter(name, key, image, partner, None)
        return new, mask.astype(jnp.float32)
    bodies = shapes.body_mask(image), shapes.body_mask(partner)

    def retry(state):
        tries, _, _ = state
        return tries + 1, *_alter(name, jax.random.fold_in(key, tries), image, partner, bodies)

    def unfinished(state):
        return (state[0] < TRIES) & (state[2].sum() < MIN_PIXELS)

    empty = jnp.zeros(image.shape, bool)
    _, new, mask = jax.lax.while_loop(unfinished, retry, (jnp.array(0), image, empty))
    return new, mask.astype(jnp.float32)


def _alter(
    name: str, key: PRNGKeyArray, image: Image, partner: Image, bodies: tuple[Mask, Mask] | None
) -> tuple[Image, Mask]:
    """One or two anomalies of a kind (1/2 each), and their label. No bodies: the peer's way."""
    k_count, k_anomalies = jax.random.split(key)

    def add(old, key):
        value, inside = ALTER[name](key, old, partner, bodies)
        value = jnp.clip(value, 0.0, 1.0)
        if bodies is None and name != "gauss":
            value = jnp.round(value * 255) / 255
        return jnp.where(inside, value, old), inside

    def add_if(old, row):
        present, key = row
        return jax.lax.cond(present, add, lambda x, _: (x, jnp.zeros_like(x, bool)), old, key)

    present = jnp.stack([jnp.array(True), jax.random.bernoulli(k_count)])
    new, parts = jax.lax.scan(add_if, image, (present, jax.random.split(k_anomalies)))
    touched = parts[0] | parts[1]
    if bodies is None and name == "gauss":  # 1e-3: round-off must not cost a grey level
        new = jnp.where(touched, jnp.floor(new * 255 + 1e-3) / 255, image)
    difference = jnp.abs(new - image)
    if bodies is not None:
        return new, shapes.close(difference > VISIBLE, 2) & touched
    if name != "cutpaste":
        return new, touched
    changed = difference > 0.5 / 255
    return new, _peer_label(changed, parts[0]) | _peer_label(changed, parts[1])


def _peer_label(changed: Mask, part: Mask) -> Mask:
    """The peer's CutPaste label: changed pixels of the shape, closed with a 3 x 3 square inside the
    shape's bounding box, and the unchanged pixels that they enclose.

    The box's edge erodes nothing, so the closing also includes the thin slivers beside the points
    where the shape touches its box. The peer does this per connected component, here per anomaly.
    """
    box = shapes.bounds(part)
    closed = shapes.close(changed & part, 1, box)
    return box & ~shapes.flood(~closed & ~part, ~closed)
