"""Baselines on pixels, against their definitions in plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax import config_validation
from medclip_jax.detectors import detector, memory_bank, tiling
from medclip_jax.evaluation import evaluate
from medclip_jax.features import cache
from medclip_jax.io import read
from tests.support.pictures import one_device, write_pictures
from tests.support.scenes import score


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("scene")
    pictures = write_pictures(folder, 9, start=300)
    feature_cache = cache.open(folder, tiny, "stretch", "float32", one_device())
    return feature_cache, pictures[:4], pictures[4:]


def build(method, feature_cache, supports):
    images = tiling.healthy_images(feature_cache, supports)
    features = memory_bank.to_thumbnails(images)
    return memory_bank.PIXEL_BASELINES[method](features, len(supports), feature_cache.clip.size)


def pixels(feature_cache, records):
    images = read.read_all(records, feature_cache.clip.size, feature_cache.fit)
    return np.stack([x for _, x in images])


def test_the_config_knows_them():
    assert set(memory_bank.PIXEL_BASELINES) == set(config_validation.PIXEL_METHODS)


def test_shrinking_takes_means_of_equal_areas():
    rng = np.random.default_rng(0)
    x = rng.random((224, 224)).astype(np.float32)
    blocks = x.reshape(32, 7, 32, 7).mean((1, 3))
    np.testing.assert_allclose(memory_bank.shrink(x), blocks, atol=1e-6)
    odd = memory_bank.shrink(rng.random((50, 50)).astype(np.float32))
    assert odd.shape == (32, 32)
    np.testing.assert_allclose(memory_bank.areas(50).sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(memory_bank.areas(50).sum(0), 32 / 50, atol=1e-12)


def test_grey_level_is_the_mean_of_the_image(scene):
    feature_cache, supports, test = scene
    made = build("grey_level", feature_cache, supports)
    (batch,) = made.read(feature_cache, test, 10)
    scores = detector.score(made, batch)
    np.testing.assert_allclose(scores.image, pixels(feature_cache, test).mean((1, 2)), atol=1e-6)
    wanted = pixels(feature_cache, supports).mean((1, 2))
    np.testing.assert_allclose(made.calibration.image, wanted, atol=1e-6)
    np.testing.assert_allclose(np.asarray(scores.patch).mean(1), scores.image, atol=1e-6)


def test_thumbnails_score_is_one_minus_the_best_correlation(scene):
    feature_cache, supports, test = scene
    made = build("thumbnails", feature_cache, supports)
    (batch,) = made.read(feature_cache, test, 10)
    own, new = (
        np.stack([memory_bank.shrink(x).ravel() for x in pixels(feature_cache, r)])
        for r in (supports, test)
    )
    both = np.corrcoef(np.concatenate([own, new]))
    image = detector.score(made, batch).image
    np.testing.assert_allclose(image, 1 - both[4:, :4].max(1), atol=1e-4)
    alone = both[:4, :4] - 2 * np.eye(4)  # a support never explains itself
    np.testing.assert_allclose(made.calibration.image, 1 - alone.max(1), atol=1e-4)
    assert made.calibration.image.min() > 0.01


def test_a_constant_image_correlates_with_nothing():
    z = memory_bank.standardise(jnp.asarray([[0.5] * 4, [0.0, 1.0, 0.0, 1.0]]))
    np.testing.assert_allclose(z, [[0] * 4, [-1, 1, -1, 1]], atol=1e-6)
    assert float(memory_bank.difference(z[:1], z[1:]).mean()) == pytest.approx(0.5)


@pytest.mark.parametrize("method", list(memory_bank.PIXEL_BASELINES))
def test_scores_depend_neither_on_order_nor_on_batches(scene, monkeypatch, method):
    feature_cache, supports, test = scene
    made = build(method, feature_cache, supports)
    whole = score(made, feature_cache, test)
    monkeypatch.setattr(evaluate, "BATCH", 2)
    turned = score(made, feature_cache, test[::-1]).predictions
    p = whole.predictions
    np.testing.assert_allclose(turned.score[::-1], p.score, rtol=1e-5)  # sums of float32
    np.testing.assert_allclose(np.array(turned.maps)[::-1], p.maps, atol=1e-3)
    assert (p.uncertainty == 0).all() and p.maps.shape == (5, 32, 32) and whole.cams is None
