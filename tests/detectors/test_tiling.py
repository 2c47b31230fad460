"""Tiles: their geometry, their place in the feature cache, and the detector that fuses them."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.clip.layers import Features
from medclip_jax.data import preprocessing
from medclip_jax.detectors import (
    detector,
    ensemble,
    memory_bank,
    prompt_detector,
    tiling,
)
from medclip_jax.distributed import sharding
from medclip_jax.evaluation import evaluate
from medclip_jax.features import cache, encoder
from medclip_jax.models import similarity
from tests.support.models import design_of
from tests.support.pictures import one_device, write_pictures
from tests.support.scenes import POOL, SIZE, score, stacked

GRID = 4


@pytest.mark.parametrize("count", [2, 3])
def test_tiles_cover_the_frame_and_overlap(count):
    frame = tiling.side(224, count)
    seen = np.zeros((frame, frame), int)
    for row, column in tiling.starts(224, count):
        seen[row : row + 224, column : column + 224] += 1
    assert seen.min() == 1 and seen.max() == 4
    assert seen[0, 0] == seen[-1, -1] == 1 and seen[frame // 2, 0] == (2 if count == 2 else 1)
    assert frame == 224 * (count - 0.25 * (count - 1)) and tiling.side(224, 1) == 224


def test_cut_tiles_are_squares_of_the_image():
    frame = tiling.side(SIZE, 2)
    image = np.random.default_rng(0).random((2, frame, frame)).astype(np.float32)
    got = tiling.cut(image, SIZE, 2)
    assert got.shape == (8, SIZE, SIZE)
    np.testing.assert_array_equal(got[0], image[0, :SIZE, :SIZE])
    np.testing.assert_array_equal(got[5], image[1, :SIZE, -SIZE:])
    np.testing.assert_array_equal(got[7], image[1, -SIZE:, -SIZE:])


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("grid, size", [(4, 32), (14, 224)])
def test_spreading_averages_where_tiles_overlap(count, grid, size):
    made = tiling.spreading(grid, size, count)
    fine = tiling.FINE * grid
    assert made.shape == (1 + count**2, fine**2, grid**2) and made.min() >= 0
    np.testing.assert_allclose(made[0].sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(made[1:].sum((0, 2)), 1, atol=1e-5)
    # the whole goes the way of similarity.to_pixels
    heat = np.random.default_rng(1).random((1, grid**2)).astype(np.float32)
    wanted = similarity.to_pixels(jnp.asarray(heat), fine)[0]
    np.testing.assert_allclose((heat @ made[0].T).reshape(fine, fine), wanted, atol=1e-5)


def test_a_map_cut_into_tiles_comes_back_whole():
    """Values that are linear in the place are the same from every tile, off their borders."""
    frame, inside = tiling.side(SIZE, 2), (np.arange(GRID) + 0.5) * SIZE / GRID
    parts = [
        ((r + inside)[:, None] + 3 * (c + inside)[None]).ravel() for r, c in tiling.starts(SIZE, 2)
    ]
    made = tiling.spreading(GRID, SIZE, 2)[1:]
    got = sum(m @ x for m, x in zip(made, parts, strict=True))
    at = (np.arange(2 * GRID) + 0.5) * frame / (2 * GRID)
    wanted = at[:, None] + 3 * at[None]
    edges = np.array([0, frame - SIZE, SIZE, frame])
    half = SIZE / GRID / 2  # within half a patch of a tile's border its last value is repeated
    clear = np.abs(at[:, None] - edges).min(1) >= half
    both = clear[:, None] & clear[None]
    assert both.sum() > 4
    np.testing.assert_allclose(got.reshape(wanted.shape)[both], wanted[both], atol=1e-3)


# --- the feature cache and the detectors ----------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tiny):
    """A cache with tiles, supports, test images, and a builder of (whole, small, both)."""
    folder = tmp_path_factory.mktemp("wide")
    pictures = write_pictures(folder, 6, start=300)
    feature_cache = cache.open(folder, tiny, "stretch", "float32", one_device())
    encoder.encode_images(feature_cache, pictures)
    assert tiling.encode_images(feature_cache, pictures, 2) == 6
    design, frozen = design_of(tiny, dropout=0.2)
    plain, _ = design_of(tiny, context=0)
    params = stacked(tiny, design)

    @functools.cache
    def build(name, k=4):
        found = tiling.load_supports(feature_cache, pictures[:k], 2)
        folds = [np.array([0, 2]), np.array([1, 3])] if k > 1 else []
        own = jax.tree.map(lambda x: x[: 1 + len(folds)], params)

        def scale(tokens, calibrating):
            if name == "memory":
                return memory_bank.build(tokens, POOL, SIZE, k=k, calibrating=calibrating)
            if name == "zero_shot":
                return prompt_detector.zero_shot(tiny, frozen, plain, calibrating, k)
            return prompt_detector.build(own, frozen, design, POOL, calibrating, folds, k)

        whole = scale(found.tokens, found.calibrating)
        small = scale(found.tile_tokens, found.tile_calibrating)
        pool = None if name == "zero_shot" else POOL
        return whole, small, tiling.build(whole, small, 2, GRID, pool)

    return feature_cache, pictures[:4], pictures[4:], build


def packed(feature_cache, records):
    (got,) = tiling.loader(2)(feature_cache, records, len(records))
    return jax.tree.map(jnp.asarray, got)


def test_packed_tokens_are_those_of_the_pixels(wide):
    feature_cache, supports, *_ = wide
    images = tiling.healthy_images(feature_cache, supports, tiling.side(SIZE, 2))
    fresh, stored = tiling.encode(feature_cache, images, 2), packed(feature_cache, supports)
    tokens = encoder.encode(feature_cache, tiling.cut(images, SIZE, 2))
    for level, (a, b) in enumerate(zip(fresh.levels, stored.levels, strict=True)):
        assert a.shape == (4, 5 * GRID**2, a.shape[-1])
        np.testing.assert_allclose(b[:, GRID**2 :], a[:, GRID**2 :], atol=1e-5)
        third = tiling.part(stored, 3, 5).levels[level]
        np.testing.assert_allclose(third, tokens.levels[level][2::4], atol=1e-5)
    (whole,) = cache.load_images(feature_cache, supports, 4)
    np.testing.assert_array_equal(tiling.part(stored, 0, 5).levels[0], whole.levels[0])
    np.testing.assert_array_equal(tiling.unpack(stored, 2).levels[0][5], stored.levels[0][1, 32:48])
    assert tiling.encode_images(feature_cache, supports, 2) == 0
    names = {tiling.tiles_path(feature_cache, supports[0], t).name for t in (2, 3)}
    assert len(names) == 2 and cache.image_path(feature_cache, supports[0]).name not in names


@pytest.mark.parametrize(("tiles", "together"), [(2, [16, 8]), (3, [9] * 6)])
def test_the_recipe_of_the_next_tiles_is_computed_while_tiles_are_encoded(
    tmp_path, tiny, monkeypatch, tiles, together
):
    """By 2 x 2 tiles 4 images at once, then 2; by 3 x 3 each alone, with no row to fill it up."""
    pictures, prepared, seen = write_pictures(tmp_path, 6, start=300), threading.Semaphore(0), []
    feature_cache = cache.open(tmp_path, tiny, "stretch", "float32", one_device(), "zscore")
    recipe, fetch, shapes = preprocessing.batch, sharding.fetch, set()

    def counted(images, steps):
        prepared.release()
        shapes.add(len(images))
        return recipe(images, steps)

    def waiting(arrays, count):
        seen.append(count)
        for _ in range(2 if len(seen) == 1 else len(seen) < len(together)):
            assert prepared.acquire(timeout=30)
        return fetch(arrays, count)

    monkeypatch.setattr(preprocessing, "batch", counted)
    monkeypatch.setattr(sharding, "fetch", waiting)
    assert tiling.encode_images(feature_cache, pictures, tiles) == 6
    assert seen == together and shapes == {together[0]}
    monkeypatch.undo()
    frames = tiling.healthy_images(feature_cache, pictures, tiling.side(SIZE, tiles))
    for record, frame in zip(pictures, frames, strict=True):
        alone = encoder.encode(feature_cache, tiling.cut(frame[None], SIZE, tiles))
        stored = cache.load(tiling.tiles_path(feature_cache, record, tiles))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), stored, alone)


@pytest.mark.parametrize("name", ["learned", "memory", "zero_shot"])
def test_the_fused_map_is_the_mean_of_standardised_scales(wide, name):
    feature_cache, supports, test, build = wide
    whole, small, both = build(name)
    new = packed(feature_cache, test)
    got = detector.score(both, new)
    wanted = 0
    for i, spread in enumerate(tiling.spreading(GRID, SIZE, 2)):
        scale = small if i else whole
        healthy = scale.calibration.patch
        values = detector.score(scale, tiling.part(new, i, 5)).patch
        wanted += (values - healthy.mean()) / healthy.std(ddof=1) @ spread.T / 2
    np.testing.assert_allclose(got.patch, wanted, atol=1e-4)
    assert got.patch.shape == (2, (2 * GRID) ** 2)
    # a support is standardised by the others, at both scales
    assert both.calibration.patch.shape == (4, 64)
    for row, patch in enumerate(both.calibration.patch):
        wanted = 0
        for i, spread in enumerate(tiling.spreading(GRID, SIZE, 2)):
            values = (small if i else whole).calibration.patch.reshape(4, -1, 16)
            others = np.delete(values, row, 0)
            own = values[row, max(i - 1, 0)]
            wanted += (own - others.mean()) / others.std(ddof=1) @ spread.T / 2
        np.testing.assert_allclose(patch, wanted, atol=1e-4)
    if name == "zero_shot":
        image = detector.score(whole, tiling.part(new, 0, 5)).image
        np.testing.assert_allclose(got.image, image, atol=1e-6)
    else:
        np.testing.assert_allclose(got.image, POOL(got.patch), atol=1e-6)


def test_a_memory_holds_all_tiles_of_a_support_out(wide):
    feature_cache, supports, _, build = wide
    _, small, _ = build("memory")
    tokens = jax.tree.map(jnp.asarray, tiling.unpack(packed(feature_cache, supports), 2))
    np.testing.assert_allclose(detector.score(small, tokens).patch, 0, atol=1e-6)
    own, others = (jax.tree.map(lambda x, r=r: x[r], tokens) for r in (slice(4), slice(4, None)))
    alone = memory_bank.build(others, POOL, SIZE, k=3)
    wanted = detector.score(alone, own).patch
    np.testing.assert_allclose(small.calibration.patch[:4], wanted, atol=1e-6)
    assert small.calibration.patch.shape == (16, GRID**2)


@pytest.mark.parametrize("name", ["learned", "memory"])
def test_one_support_is_viewed_in_tiles_too(wide, name):
    feature_cache, _, test, build = wide
    whole, _, both = build(name, 1)
    assert both.calibration.patch.shape == (len(whole.calibration.patch), 64) and both.k == 1
    assert np.isfinite(detector.score(both, packed(feature_cache, test)).patch).all()


def test_fused_branches_of_tiles_score_a_test_set(wide, monkeypatch):
    feature_cache, _, test, build = wide
    both = ensemble.build({"learned": build("learned")[2], "memory": build("memory")[2]})
    got = score(both, feature_cache, test)
    assert got.predictions.maps.shape == (2, SIZE, SIZE)
    assert got.cams.shape == (2, 16) and got.cams.max() == 1  # of the whole image's patches
    assert got.predictions.uncertainty.min() > 0 and got.uncertainties["ensemble"].min() > 0
    assert got.predictions.patch_variance.shape == (2, 8, 8)
    monkeypatch.setattr(evaluate, "BATCH", 1)
    again = score(both, feature_cache, test[::-1])
    np.testing.assert_allclose(again.predictions.score[::-1], got.predictions.score, atol=1e-5)


@pytest.mark.parametrize("before", [1, 0])
def test_tiles_carry_what_refinement_reads(wide, before):
    """Whole and tiles keep their own inputs, class tokens included, packed, unpacked and viewed."""
    rng = np.random.default_rng(0)

    def tokens(n):
        levels, inputs = (
            tuple(rng.normal(size=(n, p, 8)).astype(np.float32) for _ in range(2))
            for p in (16, 16 + before)
        )
        return Features(rng.normal(size=(n, 4)).astype(np.float32), levels, inputs)

    whole, small = tokens(3), tokens(12)
    both = tiling.pack(whole, small)
    assert both.inputs[0].shape == (3, 5 * (16 + before), 8)
    for i in range(5):
        one = tiling.part(both, i, 5)
        own = (whole, slice(None)) if i == 0 else (small, slice(i - 1, None, 4))
        for name in ("levels", "inputs"):
            for got, wanted in zip(getattr(one, name), getattr(own[0], name), strict=True):
                np.testing.assert_array_equal(got, wanted[own[1]])
    back = tiling.unpack(both, 2)
    jax.tree.map(np.testing.assert_array_equal, back[1:], small[1:])
    views = jax.tree.map(
        lambda w, t: np.concatenate([w[:, None], t.reshape(3, 4, *t.shape[1:])], 1), whole, small
    )
    views = jax.tree.map(lambda x: x.reshape(15, *x.shape[2:]), views)
    jax.tree.map(np.testing.assert_array_equal, tiling.join_views(views, 5), both)
