"""Tiles: their geometry, their place in the feature cache, and the detector that fuses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax import config
from medclip_jax.detectors import by_name, ensemble, memory_bank, tiling
from medclip_jax.errors import ConfigError
from medclip_jax.evaluation import evaluate
from medclip_jax.features import cache, encoder, support_images
from medclip_jax.models import anomaly_map, model
from tests.support.models import design_of
from tests.support.pictures import one_device, write_pictures

SIZE, GRID = 32, 4


@pytest.mark.parametrize("tiles", [2, 3])
def test_tiles_cover_the_frame_and_overlap(tiles):
    frame = tiling.side(224, tiles)
    seen = np.zeros((frame, frame), int)
    for row, column in tiling.starts(224, tiles):
        seen[row : row + 224, column : column + 224] += 1
    assert seen.min() == 1 and seen.max() == 4
    assert seen[0, 0] == seen[-1, -1] == 1 and seen[frame // 2, 0] == (2 if tiles == 2 else 1)
    assert frame == 224 * (tiles - 0.25 * (tiles - 1)) and tiling.side(224, 1) == 224


def test_cut_tiles_are_squares_of_the_image():
    frame = tiling.side(SIZE, 2)
    image = np.random.default_rng(0).random((2, frame, frame)).astype(np.float32)
    got = tiling.cut(image, SIZE, 2)
    assert got.shape == (8, SIZE, SIZE)
    np.testing.assert_array_equal(got[0], image[0, :SIZE, :SIZE])
    np.testing.assert_array_equal(got[5], image[1, :SIZE, -SIZE:])
    np.testing.assert_array_equal(got[7], image[1, -SIZE:, -SIZE:])


@pytest.mark.parametrize("tiles", [2, 3])
@pytest.mark.parametrize("grid, size", [(4, 32), (14, 224)])
def test_spreading_averages_where_tiles_overlap(tiles, grid, size):
    made = tiling.spreading(grid, size, tiles)
    fine = tiling.FINE * grid
    assert made.shape == (1 + tiles**2, fine**2, grid**2) and made.min() >= 0
    np.testing.assert_allclose(made[0].sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(made[1:].sum((0, 2)), 1, atol=1e-5)
    # the whole goes the way of score.to_pixels
    heat = np.random.default_rng(1).random((1, grid**2)).astype(np.float32)
    np.testing.assert_allclose(
        (heat @ made[0].T).reshape(fine, fine),
        anomaly_map.to_pixels(jnp.asarray(heat), fine)[0],
        atol=1e-5,
    )


def test_a_map_cut_into_tiles_comes_back_whole():
    """Values that are linear in the place are the same from every tile."""
    tiles, frame = 2, tiling.side(SIZE, 2)
    inside = np.arange(GRID) * (SIZE - 1) / (GRID - 1)
    parts = [
        ((r + inside)[:, None] + 3 * (c + inside)[None]).ravel()
        for r, c in tiling.starts(SIZE, tiles)
    ]
    made = tiling.spreading(GRID, SIZE, tiles)[1:]
    got = sum(m @ x for m, x in zip(made, parts, strict=True))
    at = np.arange(2 * GRID) * (frame - 1) / (2 * GRID - 1)
    np.testing.assert_allclose(got, (at[:, None] + 3 * at[None]).ravel(), atol=1e-3)


# --- the feature cache and the detectors ----------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("wide")
    pictures = write_pictures(folder, 6, start=300)
    supports, test = pictures[:4], pictures[4:]
    feature_cache = cache.open(folder, tiny, "stretch", "float32", one_device())
    encoder.encode_images(feature_cache, pictures)
    assert tiling.encode_images(feature_cache, pictures, 2) == 6
    design, frozen = design_of(tiny, dropout=0.2)
    plain, _ = design_of(tiny, context=0)
    start = model.init(jax.random.key(0), tiny, design, 2, False)
    params = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 1.1 * x]), start)
    groups = [np.array([0, 2]), np.array([1, 3])]

    def build(name, supports=supports, groups=groups):
        shape = plain if name == "zero_shot" else design
        whole = by_name.build(name, params, frozen, shape, feature_cache, supports, groups)
        return whole, tiling.build(name, whole, feature_cache, supports, 2, 1.0)

    return feature_cache, supports, test, build


def packed(feature_cache, records):
    (got,) = tiling.loader(2)(feature_cache, records, len(records))
    return jax.tree.map(jnp.asarray, got)


def test_tiles_are_encoded_once_under_their_own_name(wide, calls):  # noqa: F811
    feature_cache, supports, *_ = wide
    assert tiling.encode_images(feature_cache, supports, 2) == 0 and not calls
    names = {tiling.tiles_path(feature_cache, supports[0], t).name for t in (2, 3)}
    assert len(names) == 2 and cache.image_path(feature_cache, supports[0]).name not in names


def test_packed_tokens_are_those_of_the_pixels(wide):
    feature_cache, supports, *_ = wide
    images = support_images.healthy_images(feature_cache, supports, tiling.side(SIZE, 2))
    fresh, held = tiling.encode(feature_cache, images, 2), packed(feature_cache, supports)
    tokens = encoder.encode(feature_cache, tiling.cut(images, SIZE, 2))
    for level, (a, b) in enumerate(zip(fresh.levels, held.levels, strict=True)):
        assert a.shape == (4, 5 * GRID**2, a.shape[-1])
        np.testing.assert_allclose(b[:, GRID**2 :], a[:, GRID**2 :], atol=1e-5)
        third = tiling.part(held, 3, GRID**2).levels[level]
        np.testing.assert_allclose(third, tokens.levels[level][2::4], atol=1e-5)
    (whole,) = cache.load_images(feature_cache, supports, 4)
    np.testing.assert_array_equal(tiling.part(held, 0, GRID**2).levels[0], whole.levels[0])


@pytest.mark.parametrize("name", ["ours", "memory", "zero_shot"])
def test_the_fused_map_is_the_mean_of_standardised_scales(wide, name):
    feature_cache, supports, test, build = wide
    whole, made = build(name)
    new = packed(feature_cache, test)
    got = np.asarray(made.patches(new))
    assert got.shape == (2, (2 * GRID) ** 2) and made.held_out.shape == (4, (2 * GRID) ** 2)
    # standardised on the supports: the whole by itself, by hand
    z = (whole.patches(tiling.part(new, 0, 16)) - whole.held_out.mean()) / whole.held_out.std(
        ddof=1
    )
    first = z @ tiling.spreading(GRID, SIZE, 2)[0].T
    rest = 2 * got - first  # of the tiles alone
    assert np.abs(rest - first).max() > 0.1
    # the held-out supports of both scales have mean 0, so their fusion has nearly
    assert abs(made.held_out.mean()) < 0.3 and 0.2 < made.held_out.std() < 1.2
    each = [made.without(i, packed(feature_cache, supports[i : i + 1]))[0] for i in range(4)]
    np.testing.assert_allclose(made.held_out, each, atol=1e-4)
    if whole.image is not None:
        plain = whole.image(tiling.part(new, 0, 16))
        np.testing.assert_array_equal(made.image(new), plain)


def test_a_memory_of_tiles_knows_its_supports_and_holds_all_their_tiles_out(wide):
    feature_cache, supports, _, build = wide
    tokens = tiling.side_by_side(packed(feature_cache, supports), 2, GRID**2)
    small = memory_bank.remember(tokens, rows=4)
    np.testing.assert_allclose(small.patches(tokens), 0, atol=1e-6)
    others = jax.tree.map(lambda x: x[4:], tokens)
    own = jax.tree.map(lambda x: x[:4], tokens)
    np.testing.assert_allclose(
        small.held_out[:4], memory_bank.remember(others).patches(own), atol=1e-6
    )
    assert small.k == 4 and small.held_out.shape == (16, GRID**2)


def test_one_support_is_viewed_in_tiles_too(wide):
    feature_cache, supports, test, build = wide
    for name in ("ours", "memory"):
        whole, made = build(name, supports[:1], [])
        assert made.held_out.shape == (len(whole.held_out), 64) and made.k == 1
        assert np.isfinite(made.patches(packed(feature_cache, test))).all()


def test_scoring_with_tiles_end_to_end(wide, monkeypatch):
    feature_cache, _, test, build = wide
    settings = dict(top=0.05, alpha=0.2, pixel_rate=0.02, passes=3, seed=0)
    _, made = build("ours")
    got = evaluate.score_images(made, feature_cache, test, **settings)
    assert got.predictions.maps.shape == (2, SIZE, SIZE)
    assert got.predictions.uncertainty.min() > 0 and got.doubts["ensemble"].min() > 0
    monkeypatch.setattr(evaluate, "BATCH", 1)
    again = evaluate.score_images(made, feature_cache, test[::-1], **settings)
    np.testing.assert_allclose(again.predictions.score[::-1], got.predictions.score, atol=1e-5)


def test_branches_of_tiles_can_be_fused_and_probes_are_kept(wide, calls):  # noqa: F811
    feature_cache, supports, test, build = wide
    branches = {"learned": build("ours")[1], "memory": build("memory")[1]}
    settings = dict(modality="brain MRI", variants=2, seed=0, image_scores=lambda v: v.max(1))
    settings["weights"] = "probes"
    made, mix = ensemble.fuse(branches, feature_cache, supports, **settings, tiles=2)
    assert np.isfinite(made.patches(packed(feature_cache, test))).all() and made.load is not None
    encoded = len(calls)
    assert encoded
    _, again = ensemble.fuse(branches, feature_cache, supports, **settings, tiles=2)
    assert len(calls) == encoded
    for a, b in zip(mix, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "argument, tiles, said",
    [
        ("k=4", 4, "tiles is 4: give one of 1, 2, 3"),
        ("k=0", 2, "needs supports"),
        ("k=4,method=thumbnails", 2, "not for method thumbnails"),
    ],
)
def test_tiles_that_cannot_be_are_refused(argument, tiles, said):
    c = config.base(argument)
    c.score.tiles = tiles
    with pytest.raises(ConfigError, match=said):
        config.resolve(c)
