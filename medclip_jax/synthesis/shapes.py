"""Outlines of synthetic anomalies and where they may lie: pure JAX, static shapes.

A shape lies inside a box of whole-number size and is a function of pixel coordinates relative
to the box's first corner, so it can be evaluated on any set of pixels. A coarse grid of points over
the box (`GRID` x `GRID`) decides whether a shape is large enough and whether it lies on the body.
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

GRID = 24  # points per side of the coarse grid over a box
COARSE = 56  # side of the image on which the body is found
SHAPE_TRIES = 24  # 1/3.9 of the Perlin shapes are accepted, so all fail in 1 of 1300
PLACE_TRIES = 16
MIN_FILL = 0.2  # share of its box that a Perlin shape must fill
MIN_ON_BODY = 0.5  # share of a shape that must lie on the body

Pair = Float[Array, " 2"]  # (row, column)


class Perlin(NamedTuple):
    """One cell of Perlin noise, cut at 0.3 and turned about its centre."""

    box: Pair  # height, width
    corners: Float[Array, "2 2"]  # angles of the four lattice gradients
    tilt: Float[Array, ""]  # radians


class Sheared(NamedTuple):
    """A sheared and turned rectangle or ellipse in the middle of its box."""

    box: Pair
    half: Pair  # half sides before shearing
    inverse: Float[Array, "2 2"]  # from pixels relative to the centre to the unsheared frame
    ellipse: Bool[Array, ""]


def rotation(angle: Float[Array, ""]) -> Float[Array, "2 2"]:
    """The matrix that turns (row, column) by `angle` radians."""
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[c, -s], [s, c]])


def grid_points(box: Pair) -> Float[Array, "g g 2"]:
    """Centres of GRID x GRID equal cells of the box, in pixels from its first corner."""
    unit = (jnp.arange(GRID) + 0.5) / GRID
    y, x = jnp.meshgrid(unit * box[0] - 0.5, unit * box[1] - 0.5, indexing="ij")
    return jnp.stack([y, x], -1)


def in_perlin(shape: Perlin, y: Float[Array, "*s"], x: Float[Array, "*s"]) -> Bool[Array, "*s"]:
    """Which pixels (relative to the box) lie in the shape: noise > 0.3 (MediCLIP's cut)."""
    cy, cx = (shape.box[0] - 1) / 2, (shape.box[1] - 1) / 2
    c, s = jnp.cos(shape.tilt), jnp.sin(shape.tilt)
    v = c * (y - cy) - s * (x - cx) + cy
    u = s * (y - cy) + c * (x - cx) + cx
    canvas = (v >= 0) & (v <= 2 * cy) & (u >= 0) & (u <= 2 * cx)
    v, u = v / shape.box[0], u / shape.box[1]

    def dot(a, b):
        angle = shape.corners[a, b]
        return jnp.cos(angle) * (v - a) + jnp.sin(angle) * (u - b)

    fy, fx = (t * t * t * (t * (6 * t - 15) + 10) for t in (v, u))  # Perlin's quintic
    left = dot(0, 0) + fy * (dot(1, 0) - dot(0, 0))
    right = dot(0, 1) + fy * (dot(1, 1) - dot(0, 1))
    noise = jnp.sqrt(2.0) * (left + fx * (right - left))
    return canvas & (noise > 0.3)


def sample_perlin(key: PRNGKeyArray, lo: Pair, hi: Pair) -> Perlin:
    """A Perlin shape with sides uniform in [lo, hi) that fills at least MIN_FILL of its box.

    The first acceptable of SHAPE_TRIES candidates, or the fullest if there is none. Source: the
    published one-cell Perlin patches of MediCLIP, measured there at 3.9 tries a shape.
    """
    k_box, k_corners, k_tilt = jax.random.split(key, 3)
    box = jnp.floor(lo + (hi - lo) * jax.random.uniform(k_box, (2,)))
    corners = jax.random.uniform(k_corners, (SHAPE_TRIES, 2, 2), maxval=2 * jnp.pi)
    tilt = jax.random.uniform(k_tilt, (SHAPE_TRIES,), minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    points = grid_points(box)

    def fill(corners, tilt):
        return in_perlin(Perlin(box, corners, tilt), points[..., 0], points[..., 1]).mean()

    best = first_or_best(jax.vmap(fill)(corners, tilt), MIN_FILL)
    return Perlin(box, corners[best], tilt[best])


def first_or_best(score: Float[Array, " n"], enough: float) -> Array:
    """Index of the first score that is enough, or of the highest if none is."""
    ok = score >= enough
    return jnp.where(ok.any(), jnp.argmax(ok), jnp.argmax(score))


def sample_sheared(key: PRNGKeyArray, frame: Pair, lo: Pair, hi: Pair) -> Sheared:
    """A rectangle or ellipse (1/2 each) with Gamma-distributed sides, sheared by N(0, 0.2^2) and
    turned by U(-90, 90) degrees, shrunk until its box is not above `hi`."""
    k_side, k_shear, k_turn, k_kind = jax.random.split(key, 4)
    gamma = jax.random.exponential(k_side, (2, 2)).sum(0)  # Gamma of shape 2, exactly
    side = jnp.floor(jnp.clip((0.03 + 0.1 * gamma) * frame, lo, hi))
    off = 0.2 * jax.random.normal(k_shear, (2,))
    turn = jax.random.uniform(k_turn, minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    matrix = rotation(turn) @ jnp.array([[1.0, off[0]], [off[1], 1.0]])
    half = side / 2

    def reach(matrix):  # the box is symmetric about the centre: 2 ceil(reach) + 1 pixels
        return jnp.ceil(jnp.abs(matrix) @ (half - 0.5))

    matrix = matrix / jnp.maximum(1.0, jnp.max((2 * reach(matrix) + 1) / hi))
    box = jnp.minimum(2 * reach(matrix) + 1, frame)
    return Sheared(box, half, jnp.linalg.inv(matrix), jax.random.bernoulli(k_kind))


def in_sheared(shape: Sheared, y: Float[Array, "*s"], x: Float[Array, "*s"]) -> Bool[Array, "*s"]:
    """Which pixels (relative to the box) lie in the shape."""
    qy, qx = unshear(shape, y - (shape.box[0] - 1) / 2, x - (shape.box[1] - 1) / 2)
    qy, qx = qy / shape.half[0], qx / shape.half[1]
    rectangle = (jnp.abs(qy) <= 1) & (jnp.abs(qx) <= 1)
    return jnp.where(shape.ellipse, qy**2 + qx**2 <= 1, rectangle)


def unshear(shape: Sheared, y: Array, x: Array) -> tuple[Array, Array]:
    """Coordinates relative to the centre, in the frame where the shape is upright."""
    a = shape.inverse
    return a[0, 0] * y + a[0, 1] * x, a[1, 0] * y + a[1, 1] * x


def distance_to_edge(
    shape: Sheared, y: Array, x: Array, dy: Float[Array, "*s"], dx: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """How far the unit ray (dy, dx) runs from (y, x), relative to the centre, to the outline."""
    (qy, qx), (ry, rx) = unshear(shape, y, x), unshear(shape, dy, dx)
    qy, qx, ry, rx = (v / h for v, h in zip((qy, qx, ry, rx), jnp.tile(shape.half, 2), strict=True))
    ty = (1 - jnp.sign(ry) * qy) / jnp.maximum(jnp.abs(ry), 1e-9)
    tx = (1 - jnp.sign(rx) * qx) / jnp.maximum(jnp.abs(rx), 1e-9)
    a, b, c = ry**2 + rx**2, qy * ry + qx * rx, qy**2 + qx**2 - 1
    round_ = (-b + jnp.sqrt(jnp.maximum(b * b - a * c, 0.0))) / jnp.maximum(a, 1e-12)
    return jnp.where(shape.ellipse, round_, jnp.minimum(ty, tx))


def place(
    key: PRNGKeyArray,
    box: Pair,
    frame: Pair,
    body: Bool[Array, "h w"] | None,
    points: Float[Array, "g g 2"],
    filled: Bool[Array, "g g"],
) -> Pair:
    """First corner of the box, uniform over all places inside the frame.

    With a body mask: the first of PLACE_TRIES places with MIN_ON_BODY of the filled points on the
    body, or the best of them.
    """
    room = frame - box + 1
    if body is None:
        return jnp.floor(room * jax.random.uniform(key, (2,)))
    corners = jnp.floor(room[None] * jax.random.uniform(key, (PLACE_TRIES, 2)))

    def on_body(corner):
        index = jnp.round(points + corner[None, None]).astype(jnp.int32)
        hit = body[index[..., 0], index[..., 1]]  # out-of-range indices are clamped
        return (hit & filled).sum() / jnp.maximum(filled.sum(), 1)

    return corners[first_or_best(jax.vmap(on_body)(corners), MIN_ON_BODY)]


def dilate(mask: Bool[Array, "h w"], radius: int) -> Bool[Array, "h w"]:
    """Grow by a (2 radius + 1) square, nothing beyond the frame."""
    height, width = mask.shape
    shifts, wide = range(2 * radius + 1), jnp.pad(mask, radius)
    wide = reduce(jnp.logical_or, [wide[i : i + height] for i in shifts])
    return reduce(jnp.logical_or, [wide[:, i : i + width] for i in shifts])


def close(
    mask: Bool[Array, "h w"], radius: int, box: Bool[Array, "h w"] | bool = True
) -> Bool[Array, "h w"]:
    """Morphological closing with a (2 radius + 1) square inside a box whose edge erodes nothing."""
    return box & ~dilate(~dilate(mask, radius) & box, radius)


def bounds(mask: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
    """The upright bounding box of a mask, as a mask; empty for an empty mask."""

    def span(hit):
        i = jnp.arange(len(hit))
        return (i >= jnp.argmax(hit)) & (i < len(hit) - jnp.argmax(hit[::-1])) & hit.any()

    return span(mask.any(1))[:, None] & span(mask.any(0))[None]


def flood(seed: Bool[Array, "h w"], way: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
    """The seed and all of `way` that is 8-connected to it."""

    def step(state):
        reached, _ = state
        grown = reached | (dilate(reached, 1) & way)
        return grown, (grown != reached).any()

    return jax.lax.while_loop(lambda state: state[1], step, (seed, jnp.array(True)))[0]


def body_mask(image: Float[Array, "h w"]) -> Bool[Array, "h w"]:
    """The part of the frame that shows the patient: everything but the dark rim.

    Dark is below 0.35 of Otsu's threshold of a coarse copy; dark parts enclosed by the body (lungs,
    ventricles) belong to it. If under 5% would remain, it is the whole frame.
    """
    small = jax.image.resize(image, (COARSE, COARSE), "linear")
    dark = small < 0.35 * otsu(small)
    rim = jnp.ones_like(dark).at[1:-1, 1:-1].set(False)
    body = ~flood(rim & dark, dark)
    body = body | (body.mean() < 0.05)
    return jax.image.resize(body.astype(jnp.float32), image.shape, "linear") > 0.5


def otsu(image: Float[Array, "a b"]) -> Float[Array, ""]:
    """Otsu's threshold over 64 bins of [0, 1]."""
    levels = (jnp.arange(64) + 0.5) / 64
    bins = jnp.clip((image.reshape(-1) * 64).astype(jnp.int32), 0, 63)
    share = (bins[:, None] == jnp.arange(64)[None]).mean(0)
    below, mass = jnp.cumsum(share), jnp.cumsum(share * levels)
    between = (mass[-1] * below - mass) ** 2 / jnp.maximum(below * (1 - below), 1e-6)
    return levels[jnp.argmax(between)]
