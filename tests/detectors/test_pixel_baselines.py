"""Baselines on pixels, against their definitions in plain numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax import config
from medclip_jax.data import records as data_records
from medclip_jax.detectors import pixel_baselines
from medclip_jax.evaluation import evaluate
from medclip_jax.features import cache
from tests.support.pictures import one_device, write_pictures


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("scene")
    pictures = write_pictures(folder, 9, start=300)
    feature_cache = cache.open(folder, tiny, "stretch", "float32", one_device())
    return feature_cache, pictures[:4], pictures[4:]


def pixels(feature_cache, records):
    held = data_records.read_all(records, feature_cache.clip.size, feature_cache.fit)
    return np.stack([x for _, x in held])


def test_the_config_knows_them():
    assert set(pixel_baselines.METHODS) == set(config.FIXED) - {"memory", "zero_shot"}


def test_shrinking_takes_means_of_equal_areas():
    rng = np.random.default_rng(0)
    x = rng.random((224, 224)).astype(np.float32)
    blocks = x.reshape(32, 7, 32, 7).mean((1, 3))
    np.testing.assert_allclose(pixel_baselines.shrink(x), blocks, atol=1e-6)
    odd = pixel_baselines.shrink(rng.random((50, 50)).astype(np.float32))
    assert odd.shape == (32, 32)
    np.testing.assert_allclose(pixel_baselines.areas(50).sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(pixel_baselines.areas(50).sum(0), 32 / 50, atol=1e-12)


def test_grey_level_is_the_mean_of_the_image(scene):
    feature_cache, supports, test = scene
    made = pixel_baselines.build("grey_level", feature_cache, supports)
    (batch,) = made.load(feature_cache, test, 10)
    np.testing.assert_allclose(
        made.image(batch), pixels(feature_cache, test).mean((1, 2)), atol=1e-6
    )
    wanted = pixels(feature_cache, supports).mean((1, 2))
    np.testing.assert_allclose(made.held_out_image, wanted, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(made.patches(batch)).mean(1), made.image(batch), atol=1e-6
    )


def test_thumbnails_score_is_one_minus_the_best_correlation(scene):
    feature_cache, supports, test = scene
    made = pixel_baselines.build("thumbnails", feature_cache, supports)
    (batch,) = made.load(feature_cache, test, 10)
    held, new = (
        np.stack([pixel_baselines.shrink(x).ravel() for x in pixels(feature_cache, r)])
        for r in (supports, test)
    )
    both = np.corrcoef(np.concatenate([held, new]))
    np.testing.assert_allclose(made.image(batch), 1 - both[4:, :4].max(1), atol=1e-4)
    alone = both[:4, :4] - 2 * np.eye(4)  # a support never explains itself
    np.testing.assert_allclose(made.held_out_image, 1 - alone.max(1), atol=1e-4)
    assert made.held_out_image.min() > 0.01


def test_a_constant_image_correlates_with_nothing():
    z = pixel_baselines.standardise(jnp.asarray([[0.5] * 4, [0.0, 1.0, 0.0, 1.0]]))
    np.testing.assert_allclose(z, [[0] * 4, [-1, 1, -1, 1]], atol=1e-6)
    assert float(pixel_baselines.difference(z[:1], z[1:]).mean()) == pytest.approx(0.5)


@pytest.mark.parametrize("method", list(pixel_baselines.METHODS))
def test_scores_depend_neither_on_order_nor_on_batches(scene, monkeypatch, method):
    feature_cache, supports, test = scene
    made = pixel_baselines.build(method, feature_cache, supports)
    settings = dict(top=0.05, alpha=0.2, pixel_rate=0.02, passes=3, seed=0)
    whole = evaluate.score_images(made, feature_cache, test, **settings).predictions
    monkeypatch.setattr(evaluate, "BATCH", 2)
    turned = evaluate.score_images(made, feature_cache, test[::-1], **settings).predictions
    np.testing.assert_allclose(turned.score[::-1], whole.score, rtol=1e-5)  # sums of float32
    np.testing.assert_allclose(np.array(turned.maps)[::-1], whole.maps, atol=1e-3)
    assert (whole.uncertainty == 0).all() and whole.maps.shape == (5, 32, 32)
