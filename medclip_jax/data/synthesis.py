"""Synthetic anomalies on healthy images: CutPaste, GaussIntensityChange, Source, Identity.

Source: section 4.3 of the paper, whose tasks are those of MediCLIP (medsyn), re-implemented from
their formulas in JAX. Two presets:

`medclip` (default). Anomalies lie on the body (see `shapes.body_mask`), change nothing outside it,
and the label is binary and true: pixels that differ by more than 2 grey levels, closed with a 5 x 5
square so that zero crossings inside the anomaly do not pierce it. A draw that leaves fewer than
`MIN_PIXELS` is redrawn, up to `REDRAWS` times. Gaussian intensity changes fade out at their edge.
CutPaste takes its patch from the body of the partner.

`mediclip`. The peer as released: anywhere in the frame, result floored to 8 bits, the whole shape
as label of Gauss and Source, and for CutPaste the shape without unchanged pixels that can be
reached from its outside. Its known faults are kept on purpose, for like-for-like comparison.

Images are float32 in [0, 1]. All randomness comes from the key.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from medclip_jax.data import shapes
from medclip_jax.data.shapes import Pair

KINDS = ("cutpaste", "gauss", "source", "identity")
SIDES = {"cutpaste": (0.1, 0.6), "gauss": (0.3, 0.8), "source": (0.2, 0.6)}
VISIBLE = 2 / 255  # a smaller change is no anomaly
MIN_PIXELS = 16
REDRAWS = 4
CHUNK = 16  # images per compiled call of `batch`

Preset = Literal["medclip", "mediclip"]
Image = Float[Array, "h w"]
Mask = Bool[Array, "h w"]


def key_for(seed: int, image_digest: int, variant: int) -> PRNGKeyArray:
    """The key of one synthetic variant of one image, the same on any number of devices.

    `image_digest` is any whole number that names the image (its low 64 bits count).
    """
    key = jax.random.key(seed)
    for word in (image_digest & 0xFFFFFFFF, (image_digest >> 32) & 0xFFFFFFFF, variant):
        key = jax.random.fold_in(key, np.uint32(word))
    return key


def sample(
    key: PRNGKeyArray, image: Image, partner: Image, preset: Preset = "medclip"
) -> tuple[Image, Image, Int[Array, ""]]:
    """`synthesise` with a kind drawn with probability 1/4 each."""
    k_kind, k_draw = jax.random.split(key)
    kind = jax.random.randint(k_kind, (), 0, len(KINDS))
    return synthesise(k_draw, image, partner, kind, preset=preset)


def synthesise(
    key: PRNGKeyArray,
    image: Image,
    partner: Image,
    kind: Int[Array, ""] | int,
    *,
    preset: Preset = "medclip",
) -> tuple[Image, Image, Int[Array, ""]]:
    """One variant of `image` [0, 1], its mask (0 or 1) and its kind (index into KINDS).

    `partner` is the image that CutPaste copies from; it may be the image itself. Under vmap all
    kinds are computed for all images: for many images use `batch`.
    """
    kind = jnp.asarray(kind)
    makers = [lambda k, a, b, name=name: make(name, k, a, b, preset) for name in KINDS]
    changed, mask = jax.lax.switch(kind, makers, key, image, partner)
    return changed, mask, kind


def batch(
    keys: PRNGKeyArray,
    images: Float[Array | np.ndarray, "n h w"],
    partners: Float[Array | np.ndarray, "n h w"],
    kinds: Int[Array | np.ndarray, " n"],
    preset: Preset = "medclip",
) -> tuple[Float[np.ndarray, "n h w"], Float[np.ndarray, "n h w"]]:
    """Many variants, as `synthesise` makes them: images and masks on the host.

    One image after the other inside each compiled call (`lax.map`), so that branches and loops cost
    only what each image needs: on CPU this is faster than vmap, and any n compiles once.
    """
    rows = [
        np.arange(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)
    ]
    images, partners, kinds = np.asarray(images), np.asarray(partners), np.asarray(kinds)
    changed, masks = images.copy(), np.zeros_like(images)

    def run(part):
        full = np.resize(part, CHUNK)  # repeats rows to fill the shape
        new, mask = _many(preset, keys[full], images[full], partners[full], kinds[full])
        changed[part], masks[part] = new[: len(part)], mask[: len(part)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, rows))
    return changed, masks


@partial(jax.jit, static_argnums=0)
def _many(preset, keys, images, partners, kinds):
    def one(row):
        return synthesise(*row, preset=preset)[:2]

    return jax.lax.map(one, (keys, images, partners, kinds))


def make(
    name: str, key: PRNGKeyArray, image: Image, partner: Image, preset: Preset
) -> tuple[Image, Image]:
    """One variant of a named kind: (image, mask)."""
    if name == "identity":
        return image, jnp.zeros_like(image)
    if preset == "mediclip":
        new, mask = anomalies(name, key, image, partner, None)
        return new, mask.astype(jnp.float32)
    bodies = shapes.body_mask(image), shapes.body_mask(partner)

    def redraw(state):
        tries, _, _ = state
        return tries + 1, *anomalies(name, jax.random.fold_in(key, tries), image, partner, bodies)

    def unfinished(state):
        return (state[0] < REDRAWS) & (state[2].sum() < MIN_PIXELS)

    empty = jnp.zeros(image.shape, bool)
    _, new, mask = jax.lax.while_loop(unfinished, redraw, (jnp.array(0), image, empty))
    return new, mask.astype(jnp.float32)


def anomalies(
    name: str, key: PRNGKeyArray, image: Image, partner: Image, bodies: tuple[Mask, Mask] | None
) -> tuple[Image, Mask]:
    """One or two anomalies of a kind (1/2 each), and their label. No bodies: the peer's way."""
    k_count, *k_draws = jax.random.split(key, 3)
    alter = {"cutpaste": cutpaste, "gauss": gauss, "source": source}[name]
    new, parts = image, []
    for wanted, k_draw in zip((True, jax.random.bernoulli(k_count)), k_draws, strict=True):

        def one_more(old, k_draw=k_draw):
            value, inside = alter(k_draw, old, partner, bodies)
            value = jnp.clip(value, 0.0, 1.0)
            if bodies is None:
                value = eight_bit(name, value)
            return jnp.where(inside, value, old), inside

        new, part = jax.lax.cond(wanted, one_more, lambda old: (old, old < 0), new)
        parts.append(part)
    difference, touched = jnp.abs(new - image), parts[0] | parts[1]
    if bodies is not None:
        return new, shapes.close(difference > VISIBLE, 2) & touched
    if name != "cutpaste":
        return new, touched
    changed = difference > 0.5 / 255
    return new, peer_label(changed, parts[0]) | peer_label(changed, parts[1])


def eight_bit(name: str, value: Image) -> Image:
    """Whole grey levels as the peer gets them: Source rounds, the others cut off."""
    if name == "source":
        return jnp.round(value * 255) / 255
    return jnp.floor(value * 255 + 1e-3) / 255  # 1e-3: round-off must not cost a grey level


def peer_label(changed: Mask, part: Mask) -> Mask:
    """The peer's CutPaste label: changed pixels of the shape, closed with a 3 x 3 square inside the
    shape's bounding box, and the unchanged pixels that they enclose.

    The box's edge erodes nothing, so the closing also takes in the thin slivers beside the points
    where the shape touches its box. The peer does this for each connected component, here it is
    done for each anomaly.
    """
    box = shapes.bounds(part)
    closed = shapes.close(changed & part, 1, box)
    return box & ~shapes.flood(~closed & ~part, ~closed)


def limits(name: str, image: Image) -> tuple[Pair, Pair, Pair]:
    """Frame size and the smallest and largest box sides of a kind, in pixels."""
    frame = jnp.array(image.shape, jnp.float32)
    lo, hi = SIDES[name]
    return frame, jnp.round(lo * frame), jnp.round(hi * frame)


def relative(image: Image, corner: Pair) -> tuple[Image, Image]:
    """Row and column of every pixel, from the corner."""
    y = jax.lax.broadcasted_iota(jnp.float32, image.shape, 0) - corner[0]
    return y, jax.lax.broadcasted_iota(jnp.float32, image.shape, 1) - corner[1]


def in_box(y: Image, x: Image, box: Pair, margin: int = 0) -> Mask:
    """Pixels (relative to the corner) of the box, less a margin."""
    inside_y = (y >= margin) & (y <= box[0] - 1 - margin)
    return inside_y & (x >= margin) & (x <= box[1] - 1 - margin)


def perlin_at(
    key: PRNGKeyArray, name: str, image: Image, bodies: tuple[Mask, Mask] | None
) -> tuple[Pair, Image, Image, Mask]:
    """A Perlin shape in its place: box, pixels relative to its corner, pixels inside it."""
    k_shape, k_place = jax.random.split(key)
    frame, lo, hi = limits(name, image)
    shape = shapes.draw_perlin(k_shape, lo, hi)
    points = shapes.grid_points(shape.box)
    hit = shapes.in_perlin(shape, points[..., 0], points[..., 1])
    body = None if bodies is None else bodies[0]
    corner = shapes.place(k_place, shape.box, frame, body, points, hit)
    y, x = relative(image, corner)
    inside = in_box(y, x, shape.box) & shapes.in_perlin(shape, y, x)
    return shape.box, y, x, inside if body is None else inside & body


def cutpaste(
    key: PRNGKeyArray, image: Image, partner: Image, bodies: tuple[Mask, Mask] | None
) -> tuple[Image, Mask]:
    """A turned (45 degrees at most) and scaled piece of the partner, pasted hard."""
    k_shape, k_turn, k_scale, k_flip, k_crop = jax.random.split(key, 5)
    box, y, x, inside = perlin_at(k_shape, "cutpaste", image, bodies)
    frame = limits("cutpaste", image)[0]
    turn = jax.random.uniform(k_turn, minval=-jnp.pi / 4, maxval=jnp.pi / 4)
    scale = 1 + 0.1 * jax.random.exponential(k_scale)
    scale = jnp.where(jax.random.bernoulli(k_flip), scale, 1 / scale)
    matrix = shapes.rotation(turn)
    low, size = extent(matrix, box)
    matrix = matrix * jnp.minimum(scale, jnp.min(0.8 * frame / size))
    low, size = extent(matrix, box)
    body = None if bodies is None else bodies[1]
    points = shapes.grid_points(size)
    crop = shapes.place(k_crop, size, frame, body, points, jnp.ones(points.shape[:2], bool))
    start = crop - low
    rows = matrix[0, 0] * y + matrix[0, 1] * x + start[0]
    columns = matrix[1, 0] * y + matrix[1, 1] * x + start[1]
    return resample(partner, rows, columns), inside


def extent(matrix: Float[Array, "2 2"], box: Pair) -> tuple[Pair, Pair]:
    """Lowest corner and size, in whole pixels, of the box [0, h] x [0, w] after the matrix."""
    corners = matrix @ (jnp.array([[0, 0, 1, 1], [0, 1, 0, 1]]) * box[:, None])
    low = jnp.floor(corners.min(1))
    return low, jnp.ceil(corners.max(1)) - low


def gauss(
    key: PRNGKeyArray, image: Image, partner: Image, bodies: tuple[Mask, Mask] | None
) -> tuple[Image, Mask]:
    """A blotchy brightening or darkening by up to 0.4..0.6 under a blurred Perlin shape."""
    k_shape, k_noise, k_coarse, k_gain, k_sign, k_blur = jax.random.split(key, 6)
    box, y, x, inside = perlin_at(k_shape, "gauss", image, bodies)
    sigma = jnp.where(jax.random.bernoulli(k_coarse), 4.0, 7.0)
    texture = blur(
        random_bits(k_noise, image.shape), sigma, jnp.zeros(2), limits("gauss", image)[0]
    )
    texture = (texture - texture.min()) / (texture.max() - texture.min())
    gain = jax.random.uniform(k_gain, minval=0.4, maxval=0.6) * jax.random.rademacher(k_sign)
    softness = jax.random.uniform(k_blur, minval=1.0, maxval=4.0)
    if bodies is None:
        soft = blur(inside.astype(jnp.float32), softness, jnp.array([-y[0, 0], -x[0, 0]]), box)
        return image + gain * texture * soft, inside
    soft = blur(inside.astype(jnp.float32), softness, jnp.zeros(2), limits("gauss", image)[0])
    return image + gain * texture * soft, bodies[0]


def random_bits(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "h w"]:
    """Fair coin tosses, 0.0 or 1.0, 32 to a random word."""
    count = shape[0] * shape[1]
    words = jax.random.bits(key, (-(-count // 32), 1))
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return bits.reshape(-1)[:count].reshape(shape).astype(jnp.float32)


def blur(image: Image, sigma: Float[Array, ""], corner: Pair, box: Pair) -> Image:
    """Gaussian blur inside a box, renormalised at the box's edges; 0 outside the box.

    Two matrix products, so that sigma and the box need not be static.
    """

    def weights(length, start, size):
        i = jnp.arange(length, dtype=jnp.float32) - start
        valid = (i >= 0) & (i <= size - 1)
        kernel = jnp.exp(-0.5 * ((i[:, None] - i[None]) / sigma) ** 2)
        kernel = kernel * (valid[:, None] & valid[None])
        return kernel / jnp.maximum(kernel.sum(1, keepdims=True), 1e-12)

    rows = weights(image.shape[0], corner[0], box[0])
    return rows @ image @ weights(image.shape[1], corner[1], box[1]).T


def source(
    key: PRNGKeyArray, image: Image, partner: Image, bodies: tuple[Mask, Mask] | None
) -> tuple[Image, Mask]:
    """Radial magnification about a point of a sheared rectangle or ellipse: pixel at distance d of
    D to the edge takes the value at d^k / D^(k-1), k = 2^U(0.5, 2)."""
    k_shape, k_place, k_centre, k_power = jax.random.split(key, 4)
    frame, lo, hi = limits("source", image)
    shape = shapes.draw_sheared(k_shape, frame, lo, hi)
    points = shapes.grid_points(shape.box)
    hit = shapes.in_sheared(shape, points[..., 0], points[..., 1])
    body = None if bodies is None else bodies[0]
    corner = shapes.place(k_place, shape.box, frame, body, points, hit)
    y, x = relative(image, corner)
    inside = in_box(y, x, shape.box) & shapes.in_sheared(shape, y, x)
    pick = jax.random.categorical(k_centre, jnp.where(hit, 0.0, -jnp.inf).reshape(-1))
    cy, cx = jnp.round(points.reshape(-1, 2)[pick])
    power = 2 ** jax.random.uniform(k_power, minval=0.5, maxval=2.0)
    dy, dx = y - cy, x - cx
    d = jnp.maximum(jnp.sqrt(dy**2 + dx**2), 1e-6)
    my, mx = (shape.box - 1) / 2
    edge = shapes.distance_to_edge(shape, cy - my, cx - mx, dy / d, dx / d)
    shrink = jnp.clip(d / jnp.maximum(edge, 1e-6), 0.0, 1.0) ** (power - 1)
    value = resample(image, corner[0] + cy + dy * shrink, corner[1] + cx + dx * shrink)
    moved = jnp.where(in_box(y, x, shape.box, margin=1), value, image)
    return moved, inside if body is None else inside & body


def resample(image: Image, rows: Image, columns: Image) -> Image:
    """Values at fractional pixels, bilinear, edge values outside."""
    return jax.scipy.ndimage.map_coordinates(image, [rows, columns], order=1, mode="nearest")
