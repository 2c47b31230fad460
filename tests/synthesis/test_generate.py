"""Synthetic anomalies: distributions against the peer's, and what our preset promises."""

import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage as ndi

from medclip_jax.config_validation import CHOICES
from medclip_jax.data import phantom
from medclip_jax.synthesis import anomalies, generate, shapes
from tests.support.reference import reference_files

COUNTS = (40, pytest.param(200, marks=pytest.mark.slow))  # samples per kind and reference image
NAMES = ("CutPaste", "GaussIntensityChange", "SourceDeformation")
FILES = reference_files("medsyn_stats_*.json")
MEASURED = (
    *("area_frac_gt0", "n_comp", "cy", "cx", "bbox_h", "bbox_w", "mean_abs_in", "mean_signed_in"),
    *("frac_changed_in", "frac_pos_of_changed_in", "max_abs"),
)


@pytest.fixture(autouse=True, scope="module")
def optimised():
    """With XLA's optimisations: hundreds of images at full size earn back what they cost."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


def measure(old, new, mask):
    """The statistics of the fixtures for one sample; grey levels 0..255."""
    change, inside = new.astype(int) - old.astype(int), mask > 0
    rows, columns = np.nonzero(inside)
    moved = change[inside][change[inside] != 0]
    return {
        "area_frac_gt0": inside.mean(),
        "n_comp": ndi.label(inside, np.ones((3, 3)))[1],
        "cy": rows.mean() / 224,
        "cx": columns.mean() / 224,
        "bbox_h": (np.ptp(rows) + 1) / 224,
        "bbox_w": (np.ptp(columns) + 1) / 224,
        "mean_abs_in": np.abs(change[inside]).mean(),
        "mean_signed_in": change[inside].mean(),
        "frac_changed_in": (change[inside] != 0).mean(),
        "frac_pos_of_changed_in": (moved > 0).mean() if len(moved) else np.nan,
        "max_abs": np.abs(change).max(),
        "outside": np.abs(change[~inside]).sum(),
    }


@pytest.mark.skipif(not FILES, reason="no medsyn_stats_*.json among the reference fixtures")
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("kind", range(3), ids=NAMES)
@pytest.mark.parametrize("n", COUNTS)
def test_mediclip_preset_has_the_peers_distributions(path, kind, n):
    """|mean1 - mean2| <= 4 sem and Kolmogorov distance below the 0.1% bound of the two samples."""
    expected = json.loads(path.read_text())[NAMES[kind]]
    grey = np.load(path.parent / path.name.replace("stats", "images").replace("json", "npz"))
    grey = grey["images"]
    images = grey.astype(np.float32) / 255
    which = np.repeat(np.arange(3), n)
    rng = np.random.default_rng(11 + kind)
    keys = jax.random.split(jax.random.key(20 + kind), 3 * n)
    partners = images[rng.integers(0, 3, 3 * n)]
    new, masks = generate.batch(
        keys, images[which], partners, np.full(3 * n, kind, np.int32), "mediclip"
    )
    levels = np.round(new * 255)
    np.testing.assert_allclose(levels, new * 255, atol=1e-3, err_msg="8-bit grey levels")
    wrong = []
    for i in range(3):
        rows = [measure(grey[i], levels[j], masks[j]) for j in np.flatnonzero(which == i)]
        assert sum(r["outside"] for r in rows) <= (2000 if kind == 0 else 0)
        for name in MEASURED:
            mine = np.array([r[name] for r in rows], float)
            wrong += compare(f"{NAMES[kind]} image{i} {name}", mine, expected[f"image{i}"][name])
    assert not wrong, "\n".join(wrong)


def compare(title, mine, expected):
    """What is wrong with a sample beside the fixture's mean, sem and quantiles."""
    mine = mine[np.isfinite(mine)]
    z = (mine.mean() - expected["mean"]) / np.hypot(mine.std() / len(mine) ** 0.5, expected["sem"])
    distance = max(
        max(float(q) - (mine <= v + 1e-6).mean(), (mine < v - 1e-6).mean() - float(q))
        for q, v in expected["quantiles"].items()
        if 0 < float(q) < 1
    )
    bound = 1.95 * np.sqrt(1 / len(mine) + 1 / expected["n"])
    return (
        [f"{title}: z {z:.1f}, distance {distance:.3f}"] if abs(z) > 4 or distance > bound else []
    )


@pytest.mark.parametrize(
    "corner, size", [((3, 5), (30, 40)), ((0, 10), (22, 9)), ((0, 0), (64, 64))]
)
def test_cubic_resampling_of_a_box_is_scipys(corner, size):
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(64, 64)).astype(np.float32)
    (top, left), (height, width) = corner, size
    box = image[top : top + height, left : left + width].astype(float)
    rows, columns = (rng.uniform(0, n - 1, (64, 64)) for n in size)
    for edge, mode in (("mirror", "constant"), ("nearest", "nearest")):
        places = (jnp.asarray(x, jnp.float32) for x in (rows + top, columns + left, corner, size))
        found = anomalies.spline(jnp.asarray(image), *places, edge)
        expected = ndi.map_coordinates(box, [rows, columns], mode=mode)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_peer_rounds_what_it_resamples_and_cuts_off_changes_of_intensity():
    """Whole grey levels; an image of one grey level shows which way 8 bits are reached."""
    flat = np.full((6, 224, 224), 100 / 255, np.float32)  # the size compiled above
    keys = jax.random.split(jax.random.key(1), 6)
    for kind in (0, 2):  # splines of a constant overshoot by rounding errors alone
        new, _ = generate.batch(keys, flat, flat, np.full(6, kind, np.int32), "mediclip")
        assert set(np.unique(np.round(new * 255))) <= {0, 100}
    new, masks = generate.batch(keys, flat, flat, np.full(6, 1, np.int32), "mediclip")
    np.testing.assert_allclose(new * 255, np.round(new * 255), atol=1e-3)
    assert (new[masks == 0] == flat[masks == 0]).all()


@pytest.fixture(scope="module")
def healthy():
    parts = [phantom.generate(m, 4, 112, 1, 0.0)[0] for m in phantom.MODALITIES]
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def samples(healthy):
    """24 samples of each kind on phantoms of all modalities: originals, kinds, results."""
    n = 24 * len(generate.KINDS)
    images, partners = healthy[np.arange(n) % 12], healthy[(np.arange(n) * 5) % 12]
    kinds = np.arange(n, dtype=np.int32) // 24
    keys = jax.random.split(jax.random.key(3), n)
    new, masks = np.empty_like(images), np.empty_like(images)
    for preset in ("masses", "opacities"):
        own = np.isin(kinds, generate.places_of(preset))
        own |= (kinds == generate.IDENTITY) & (preset == "masses")
        rows = keys[own], images[own], partners[own], kinds[own]
        new[own], masks[own] = generate.batch(*rows, preset)
    return images, kinds, new, masks


def test_medclip_masks_are_binary_and_hardly_ever_empty(samples):
    _, kinds, _, masks = samples
    assert set(np.unique(masks)) == {0.0, 1.0}
    area = masks.sum((1, 2))
    altered = kinds != generate.IDENTITY
    assert (area[altered] >= generate.MIN_PIXELS).mean() >= 0.99
    assert not area[~altered].any()


def test_medclip_label_marks_every_visible_change_and_little_else(samples):
    images, kinds, new, masks = samples
    visible = np.abs(new - images) > generate.VISIBLE
    assert np.all(masks[visible] == 1.0), "every visible change is labelled"
    for kind in generate.PRESETS["masses"] + generate.PRESETS["opacities"]:
        own = np.flatnonzero(kinds == generate.KINDS.index(kind))
        assert np.mean([visible[i][masks[i] > 0].mean() for i in own]) > 0.75, kind


def test_medclip_anomalies_lie_on_the_body(samples):
    images, kinds, new, masks = samples
    bodies = np.asarray(jax.jit(jax.vmap(shapes.body_mask))(images))
    for i in np.flatnonzero(kinds != generate.IDENTITY):
        body = bodies[i]
        np.testing.assert_array_equal(new[i][~body], images[i][~body])
        assert not masks[i][~body].any()


def test_values_stay_in_range_and_identity_changes_nothing(samples):
    images, kinds, new, _ = samples
    assert new.min() >= 0 and new.max() <= 1 and new.dtype == np.float32
    same = kinds == generate.IDENTITY
    np.testing.assert_array_equal(new[same], images[same])


def of_kind(name: str, image: np.ndarray, count: int):
    """So many anomalies of a kind on one image, one on each, anywhere in the frame."""

    @jax.jit
    @jax.vmap
    def one(key):
        return getattr(anomalies, name)(key, jnp.asarray(image), jnp.asarray(image), None)

    return map(np.asarray, one(jax.random.split(jax.random.key(6), count)))


def test_a_mass_is_as_large_and_as_dark_as_is_said():
    """On one grey level: the area within an ellipse's wavy outline in closed form, and the depth.

    Half the mean square of the outline, 0.85 and waves of random height, times the half sides.
    """
    new, inside = of_kind("mass", np.full((224, 224), 0.5, np.float32), 300)
    change = 0.5 - new
    assert change.min() >= -1e-6 and not change[~inside].max() > 0.02 * 0.5
    depth = change.max((1, 2))
    large = change.sum((1, 2)) / np.maximum(depth, 1e-6) > 400  # a blurred small one is less dark
    share = 1 - 2 * (0.5 - depth[large])
    assert 0.29 < share.min() < 0.4 and 0.8 < share.max() < 0.91
    mean_square = 0.85**2 + 0.5 * np.square(anomalies.WAVES).sum()
    sides = [(lo + hi) / 2 for lo, hi in [anomalies.SIDES["mass"]] * 2]
    expected = np.pi / 4 * mean_square * sides[0] * sides[1]
    area = (change > depth[:, None, None] / 2).mean((1, 2))
    assert area.mean() == pytest.approx(expected, rel=0.1)


def test_a_mass_is_smoother_than_what_it_lies_on():
    """0 to .7 of it is blurred, .35 in the median: inside, .65 of the noise remains."""
    noise = np.random.default_rng(0).uniform(0.4, 0.6, (224, 224)).astype(np.float32)
    new, inside = of_kind("mass", noise, 200)
    core = np.stack([ndi.binary_erosion(x, iterations=18) for x in inside])  # not the soft border

    def texture(x):  # change from pixel to pixel, as a share of the grey level
        return np.abs(np.diff(x, axis=-1, prepend=x[..., :1])) / x

    shares = [t[c].mean() for t, c in zip(texture(new), core, strict=True) if c.sum() > 40]
    assert len(shares) > 20
    assert np.median(shares) / texture(noise).mean() == pytest.approx(0.65, abs=0.12)


def test_an_opacity_is_a_cloud_towards_white_or_black(healthy):
    """Every pixel goes the same share of a smooth cloud, at most half, of its way to 0 or 1."""
    image = np.clip(healthy[0], 0.05, 0.95)
    new, inside = of_kind("opacity", image, 60)
    assert inside.all()
    up = (new - image).sum((1, 2)) > 0
    assert 15 < up.sum() < 45
    aim = up.astype(np.float32)[:, None, None]
    cloud = (new - image) / (aim - image)
    assert cloud.min() >= -1e-4 and 0.4 < cloud.max() <= 0.5 + 1e-4
    assert np.abs(np.diff(cloud, axis=1)).max() < 0.2, "no edge"


def test_a_kind_of_another_preset_is_refused():
    one = np.zeros((1, 32, 32), np.float32)
    with pytest.raises(ValueError, match=r"kinds \[4\] are not all of the preset medclip"):
        generate.batch(jax.random.split(jax.random.key(0), 1), one, one, np.array([4]))


def test_a_preset_is_a_set_of_kinds():
    named = generate.VERSION, get_args(generate.Preset), CHOICES["synthesis.preset"]
    assert all(set(names) == set(generate.PRESETS) for names in named)
    assert {k for kinds in generate.PRESETS.values() for k in kinds} == set(generate.ALTER)
    assert set(generate.KINDS) == {*generate.ALTER, "identity"}
    assert generate.places_of("masses").tolist() == [0, 1, 2, 4]


def test_body_of_an_mri_is_the_head_with_its_dark_inside(healthy):
    mri = healthy[4]
    body = np.asarray(shapes.body_mask(jnp.asarray(mri)))
    assert not body[:6].any() and not body[:, :6].any()
    assert body[50:62, 50:62].all(), "ventricles belong to the body"
    assert np.asarray(shapes.body_mask(jnp.zeros((64, 64)))).all()


@pytest.mark.parametrize("kind, through", [(0, "vmap"), (2, "jit")])
def test_single_vmapped_and_batched_samples_agree(healthy, kind, through):
    images, partners = healthy[:4], healthy[4:8]
    keys = jax.random.split(jax.random.key(5), 4)
    new, masks = generate.batch(keys, images, partners, np.full(4, kind, np.int32))

    def one(key, image, partner):
        return generate.make(generate.KINDS[kind], key, image, partner)  # one branch compiled

    if through == "vmap":
        other, other_masks = jax.jit(jax.vmap(one))(keys, images, partners)
    else:
        alone = jax.jit(one)
        rows = [alone(*row) for row in zip(keys, images, partners, strict=True)]
        other, other_masks = (np.stack(part) for part in zip(*rows, strict=True))
    # a value at the edge of the threshold may fall on either side
    assert (np.abs(new - other) > 1e-5).mean() < 1e-3
    assert (masks != other_masks).mean() < 1e-3


def test_batch_does_not_depend_on_who_else_is_in_it(healthy):
    n = generate.CHUNK + 3
    images, kinds = healthy[np.arange(n) % 12], np.arange(n, dtype=np.int32) % 4
    keys = jax.random.split(jax.random.key(9), n)
    new, masks = generate.batch(keys, images, images[::-1], kinds)
    part, part_masks = generate.batch(keys[-4:], images[-4:], images[::-1][-4:], kinds[-4:])
    np.testing.assert_array_equal(new[-4:], part)
    np.testing.assert_array_equal(masks[-4:], part_masks)


def test_key_is_a_function_of_seed_image_and_variant():
    def raw(*args):
        return tuple(np.asarray(jax.random.key_data(generate.key_for(*args))))

    digest = int("f3" * 32, 16)
    assert raw(0, digest, 1) == raw(0, digest, 1)
    keys = {raw(s, d, v) for s in (0, 1) for d in (digest, digest + 1, 1 << 40, 0) for v in (0, 1)}
    assert len(keys) == 16


def test_variants_differ(healthy):
    keys = jnp.stack([generate.key_for(0, 77, v) for v in range(6)])
    images = np.repeat(healthy[:1], 6, 0)
    for kind in range(3):
        _, masks = generate.batch(keys, images, images, np.full(6, kind, np.int32))
        assert len({m.tobytes() for m in masks}) == 6


def test_one_or_two_anomalies_equally_often():
    """Source shapes far apart are separate components: two are seen in about a third of samples."""
    image = np.random.default_rng(0).uniform(size=(224, 224)).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), 200)
    images = np.repeat(image[None], 200, 0)
    _, masks = generate.batch(keys, images, images, np.full(200, 2, np.int32), "mediclip")
    two = np.mean([ndi.label(m)[1] == 2 for m in masks])
    assert 0.2 < two < 0.5


def test_perlin_shapes_fill_a_fifth_of_their_box():
    lo, hi = jnp.array([40.0, 40.0]), jnp.array([120.0, 120.0])

    @jax.jit
    @jax.vmap
    def fill(key):
        shape = shapes.sample_perlin(key, lo, hi)
        points = shapes.grid_points(shape.box)
        return shapes.in_perlin(shape, points[..., 0], points[..., 1]).mean()

    share = np.asarray(fill(jax.random.split(jax.random.key(0), 1000)))
    assert (share < shapes.MIN_FILL).mean() < 0.005
    assert share.mean() == pytest.approx(0.375, abs=0.02), "the peer's accepted masks fill 37.5%"


def test_distance_to_edge_ends_on_the_outline():
    lo, hi, frame = jnp.array([20.0, 20.0]), jnp.array([80.0, 80.0]), jnp.array([128.0, 128.0])
    angle = jnp.linspace(0, 2 * jnp.pi, 33)
    dy, dx = jnp.sin(angle), jnp.cos(angle)

    @jax.jit
    @jax.vmap
    def ends(key):
        shape = shapes.sample_sheared(key, frame, lo, hi)
        far = shapes.distance_to_edge(shape, jnp.array(1.0), jnp.array(-2.0), dy, dx)
        qy, qx = shapes.unshear(shape, 1.0 + far * dy, -2.0 + far * dx)
        qy, qx = qy / shape.half[0], qx / shape.half[1]
        edge = jnp.maximum(jnp.abs(qy), jnp.abs(qx))
        return jnp.where(shape.ellipse, jnp.hypot(qy, qx), edge), shape.ellipse

    edge, ellipse = ends(jax.random.split(jax.random.key(0), 16))
    assert 0 < ellipse.sum() < 16, "both outlines occur"
    np.testing.assert_allclose(edge, 1.0, atol=1e-4)


def test_closing_and_flood_agree_with_scipy():
    mask = np.random.default_rng(3).uniform(size=(40, 50)) > 0.6
    ring = np.ones((3, 3), bool)
    wide = np.pad(mask, 3)
    closed = ndi.binary_closing(wide, ring, border_value=0)[3:-3, 3:-3]
    mine = np.asarray(shapes.close(jnp.asarray(mask), 1))
    np.testing.assert_array_equal(mine[2:-2, 2:-2], closed[2:-2, 2:-2])
    seed = np.zeros_like(mask)
    seed[:, 0] = True
    expected = ndi.binary_propagation(seed, ring, mask | seed)
    np.testing.assert_array_equal(shapes.flood(jnp.asarray(seed), jnp.asarray(mask)), expected)
