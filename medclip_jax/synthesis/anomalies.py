"""What each kind of synthetic anomaly does to an image: pure JAX, in the full frame.

Each kind samples where it lies and returns the altered values and the pixels they are for. `bodies`
are the body masks of the image and its partner; None is the peer's way (anywhere, and resampled by
cubic splines). Formulas: section 4.3 of the paper and MediCLIP's medsyn; `mass` and `opacity` are
ours.
"""

from itertools import product
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from medclip_jax.synthesis import shapes
from medclip_jax.synthesis.shapes import Pair

SIDES = {  # shares of the frame
    **{"cutpaste": (0.1, 0.6), "gauss": (0.3, 0.8), "source": (0.2, 0.6), "mass": (0.05, 0.35)}
}
WAVES = (0.12, 0.12, 0.10, 0.08, 0.06, 0.05)  # of a mass's outline, sd
CLOUDS = 7  # per side, of an opacity
PAD = 12  # pixels beyond an edge after which a cubic spline has forgotten it

Image = Float[Array, "h w"]
Mask = Bool[Array, "h w"]


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
    shape = shapes.sample_perlin(k_shape, lo, hi)
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
    if bodies is not None:
        return resample(partner, rows, columns), inside
    value = spline(partner, rows, columns, crop, size, "mirror")
    within = in_box(rows - crop[0], columns - crop[1], size)
    return jnp.clip(jnp.where(within, value, 0.0), partner.min(), partner.max()), inside


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
    corner, frame = jnp.zeros(2), limits("gauss", image)[0]
    texture = blur(random_bits(k_noise, image.shape), sigma, corner, frame)
    texture = (texture - texture.min()) / (texture.max() - texture.min())
    gain = jax.random.uniform(k_gain, minval=0.4, maxval=0.6) * jax.random.rademacher(k_sign)
    softness = jax.random.uniform(k_blur, minval=1.0, maxval=4.0)
    if bodies is None:
        corner, frame = jnp.array([-y[0, 0], -x[0, 0]]), box
    soft = blur(inside.astype(jnp.float32), softness, corner, frame)
    return image + gain * texture * soft, inside if bodies is None else bodies[0]


def random_bits(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "h w"]:
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
    shape = shapes.sample_sheared(k_shape, frame, lo, hi)
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
    rows, columns = corner[0] + cy + dy * shrink, corner[1] + cx + dx * shrink
    if bodies is None:
        value = spline(image, rows, columns, corner, shape.box, "nearest")
    else:
        value = resample(image, rows, columns)
    moved = jnp.where(in_box(y, x, shape.box, margin=1), value, image)
    return moved, inside if body is None else inside & body


def mass(
    key: PRNGKeyArray, image: Image, partner: Image, bodies: tuple[Mask, Mask] | None
) -> tuple[Image, Mask]:
    """A dark mass: an ellipse of irregular, soft outline, darker by 30 to 90% and smoother.

    The outline is .85 of the ellipse's, changed by waves of 2 to 7 periods around it.
    """
    k_box, k_place, k_turn, k_waves, k_phases, k_blur, k_dark, k_smooth = jax.random.split(key, 8)
    frame, lo, hi = limits("mass", image)
    box = jnp.round(jax.random.uniform(k_box, (2,), minval=lo, maxval=hi))
    points, filled = shapes.grid_points(box), jnp.ones((shapes.GRID, shapes.GRID), bool)
    body = None if bodies is None else bodies[0]
    y, x = relative(image, shapes.place(k_place, box, frame, body, points, filled))
    turned = shapes.rotation(jax.random.uniform(k_turn, minval=-jnp.pi, maxval=jnp.pi))
    y, x = y - (box[0] - 1) / 2, x - (box[1] - 1) / 2
    v = (turned[0, 0] * y + turned[0, 1] * x) / (box[0] / 2)
    u = (turned[1, 0] * y + turned[1, 1] * x) / (box[1] / 2)
    waves = jax.random.normal(k_waves, (len(WAVES),)) * jnp.array(WAVES)
    phases = jax.random.uniform(k_phases, (len(WAVES),), maxval=2 * jnp.pi)
    angle, outline = jnp.arctan2(v, u), jnp.full(image.shape, 0.85)
    for i in range(len(WAVES)):
        outline += waves[i] * jnp.cos((2 + i) * angle + phases[i])
    softness = jax.random.uniform(k_blur, minval=0.7, maxval=3.5)
    inside = (jnp.hypot(v, u) < outline).astype(jnp.float32)
    soft = blur(inside, softness, jnp.zeros(2), frame)
    smooth = blur(image, jnp.float32(3.0), jnp.zeros(2), frame)
    value = image + jax.random.uniform(k_smooth, maxval=0.7) * (smooth - image)
    value = value * jax.random.uniform(k_dark, minval=0.1, maxval=0.7)
    touched = soft > 0.02
    return image + soft * (value - image), touched if body is None else touched & body


def opacity(
    key: PRNGKeyArray, image: Image, partner: Image, bodies: tuple[Mask, Mask] | None
) -> tuple[Image, Mask]:
    """A diffuse opacity, or lucency: up to half brighter or darker in large clouds of the body.

    Brighter is towards 1 and darker towards 0, by a share, so that neither is cut off.
    """
    k_cloud, k_level, k_gain, k_bright = jax.random.split(key, 4)
    cloud = jax.image.resize(jax.random.normal(k_cloud, (CLOUDS, CLOUDS)), image.shape, "cubic")
    level = 0.5 * jax.random.normal(k_level)
    cloud = jax.nn.sigmoid(3 * (cloud - level) / jnp.maximum(cloud.std(), 1e-6))
    share = jax.random.uniform(k_gain, minval=0.1, maxval=0.5) * cloud
    aim = jax.random.bernoulli(k_bright).astype(jnp.float32)
    body = jnp.ones(image.shape, bool) if bodies is None else bodies[0]
    return image + share * (aim - image), body


def resample(image: Image, rows: Image, columns: Image) -> Image:
    """Values at fractional pixels, bilinear, edge values outside."""
    return jax.scipy.ndimage.map_coordinates(image, [rows, columns], order=1, mode="nearest")


def spline(
    image: Image,
    rows: Image,
    columns: Image,
    corner: Pair,
    box: Pair,
    edge: Literal["mirror", "nearest"],
) -> Image:
    """Values at fractional pixels of a box of the image, which alone is interpolated: cubic.

    As scipy.ndimage.map_coordinates of the box (Unser, 1999), to 1e-6; rows and columns count from
    the image's corner and are not outside the box by more than PAD. `edge` says how the box goes on
    beyond its edge: scipy takes "mirror" for its mode constant.
    """

    def extended(length: int, low, size):
        i = jnp.arange(-PAD, length + PAD) - low
        if edge == "nearest":
            return (low + jnp.clip(i, 0, size - 1)).astype(jnp.int32)
        i = jnp.abs(i) % jnp.maximum(2 * (size - 1), 1)
        return (low + jnp.minimum(i, 2 * (size - 1) - i)).astype(jnp.int32)

    def inverse(length: int):  # of the filter (1, 4, 1) / 6
        i = np.arange(length + 2 * PAD)
        weights = 3**0.5 * (3**0.5 - 2) ** np.abs(i[:, None] - i).astype(float)
        return jnp.asarray(weights, jnp.float32)

    height, width = image.shape
    values = image[extended(height, corner[0], box[0])][:, extended(width, corner[1], box[1])]
    with jax.default_matmul_precision("highest"):
        values = inverse(height) @ values @ inverse(width)

    def weights(at):
        t = at - jnp.floor(at)
        outer = (1 - t) ** 3, t**3
        inner = 4 - 6 * t**2 + 3 * t**3, 4 - 6 * (1 - t) ** 2 + 3 * (1 - t) ** 3
        return [w / 6 for w in (outer[0], *inner, outer[1])]

    first_row, first_column = (jnp.floor(at).astype(jnp.int32) - 1 + PAD for at in (rows, columns))
    by_row, by_column = weights(rows), weights(columns)
    total = jnp.zeros_like(rows)
    for i, j in product(range(4), range(4)):
        total += by_row[i] * by_column[j] * values[first_row + i, first_column + j]
    return total
