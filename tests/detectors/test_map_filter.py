"""Outlier suppression: known specks go, known lesions stay, supports go the same way."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax import config
from medclip_jax.detectors import anomaly_maps, calibration, detector, saved
from medclip_jax.detectors.anomaly_maps import least_pixels
from medclip_jax.features import cache
from medclip_jax.io import read
from medclip_jax.io.image import in_memory
from medclip_jax.models import similarity
from tests.support.pictures import write_pictures
from tests.support.scenes import RATES, score

OFF = anomaly_maps.MapFilter()


def speckled(size=40):
    """Ground 1, a lesion of 8 x 8 at 5, and specks of 1, 2 and 6 pixels at 9."""
    heat = np.ones((1, size, size), np.float32)
    heat[0, 4:12, 4:12] = 5
    heat[0, 30, 30] = heat[0, 20, 4] = heat[0, 21, 5] = 9
    heat[0, 30:33, 10:12] = 9
    return heat


def test_off_changes_nothing():
    heat = np.random.default_rng(0).normal(size=(3, 20, 20)).astype(np.float32)
    np.testing.assert_array_equal(anomaly_maps.apply_filter(heat, OFF, [None, 1.0, 0.5]), heat)
    steps, maps = anomaly_maps.learn_filter({}, heat)
    assert steps == OFF
    np.testing.assert_array_equal(maps, heat)


def test_the_median_removes_single_pixels_and_keeps_edges():
    got = anomaly_maps.apply_filter(speckled(), OFF._replace(median=3))[0]
    assert got[30, 30] == 1 and got[20, 4] == 1
    assert got[5:11, 5:11].min() == 5 and got[:, 20].max() == 1


@pytest.mark.parametrize("smallest, left", [(1, 3), (2, 2), (3, 1), (6, 1), (7, 0)])
def test_components_under_the_area_go(smallest, left):
    """Corners connect: (20, 4) and (21, 5) are one speck of two pixels."""
    heat = speckled()
    got = anomaly_maps.apply_filter(heat, OFF._replace(min_area_pixels=smallest))
    specks = [got[0, 30, 30] == 9, got[0, 20, 4] == 9, got[0, 31, 10] == 9]
    assert sum(specks) == left
    lesion = np.s_[0, 4:12, 4:12]
    np.testing.assert_array_equal(got[lesion], heat[lesion])
    assert set(np.unique(got)) <= {1, 5, 9}


def test_a_speck_on_a_lesion_is_lowered_to_the_lesion():
    heat = np.ones((1, 20, 20), np.float32)
    heat[0, 5:15, 5:15] = 4
    heat[0, 8, 8] = 9
    got = anomaly_maps.apply_filter(heat, OFF._replace(min_area_pixels=5))
    assert got[0, 8, 8] == 4 and got.max() == 4 and (got == 4).sum() == 100


def test_the_area_is_in_square_millimetres_where_the_spacing_is_known():
    steps = OFF._replace(min_area_mm2=2.0, min_area_pixels=7)
    assert least_pixels(steps, 0.1) == 20 and least_pixels(steps, 0.3) == 7
    assert least_pixels(steps, 2.0) == 1 and least_pixels(steps, None) == 7
    # 6 pixels of 0.5 mm² are 3 mm², of 0.25 mm² they are 1.5 mm²
    coarse, fine = anomaly_maps.apply_filter(np.repeat(speckled(), 2, 0), steps, [0.5, 0.25])
    assert coarse[31, 10] == 9 and coarse[30, 30] == 1  # 0.5 mm²
    assert fine[31, 10] == 1 and fine[5, 5] == 5  # 16 mm²


@pytest.mark.parametrize("fit, wanted", [("stretch", 0.5 * 30 / 60 * 0.2), ("pad", 0.5 * 0.2)])
def test_a_pixel_of_the_frame_covers_what_it_covered(fit, wanted):
    """An image of 30 x 60 pixels of 0.5 x 0.2 mm in a frame of 60."""
    assert read.pixel_area((0.5, 0.2), (30, 60), 60, fit) == pytest.approx(wanted)
    assert read.pixel_area(None, (30, 60), 60, fit) is None


def test_areas_read_the_images(tmp_path, monkeypatch):
    records = write_pictures(tmp_path, 2)
    assert read.pixel_areas(records, 32, "stretch") == [None, None]
    made = in_memory(np.zeros((1, 30, 40), np.float32), "", "")._replace(spacing=(0.4, 0.8))
    monkeypatch.setattr(read, "open_image", lambda path, window: made)
    assert read.pixel_areas(records[:1], 20, "stretch") == [pytest.approx(0.6 * 1.6)]


def test_smoothing_keeps_the_sum_and_lowers_the_peak():
    heat = np.zeros((1, 41, 41), np.float32)
    heat[0, 20, 20] = 1
    got = anomaly_maps.apply_filter(heat, OFF._replace(sigma=2.0))
    assert got.sum() == pytest.approx(1, abs=1e-4)
    assert got.max() == pytest.approx(1 / (2 * math.pi * 4), rel=0.02)


def test_the_ceiling_is_learned_from_the_filtered_supports():
    heat = np.random.default_rng(1).normal(size=(4, 30, 30)).astype(np.float32)
    steps, maps = anomaly_maps.learn_filter({"median": 3.0, "sigma": 1.0, "ceiling": 0.99}, heat)
    smooth = anomaly_maps.apply_filter(heat, OFF._replace(median=3, sigma=1.0))
    assert steps.ceiling == pytest.approx(np.quantile(smooth, 0.99))
    # supports and new images go the same way
    np.testing.assert_array_equal(maps, anomaly_maps.apply_filter(heat, steps))
    assert maps.max() == np.float32(steps.ceiling)


def test_the_ceiling_is_of_the_images_not_of_their_padding():
    made = np.random.default_rng(1).random((4, 30, 30)).astype(np.float32)
    padded, places = np.pad(made, ((0, 0), (0, 60), (0, 60))), [np.s_[:30, :30]] * 4
    steps, maps = anomaly_maps.learn_filter({"ceiling": 0.98}, padded, None, places)
    assert steps.ceiling == pytest.approx(np.quantile(made, 0.98))
    assert np.mean(maps[:, :30, :30] == np.float32(steps.ceiling)) == pytest.approx(0.02)


def test_thresholds_come_from_supports_filtered_the_same(scene):
    feature_cache, supports, test, made = scene
    plain = score(made, feature_cache, test)
    steps = {"sigma": 3.0, "min_area_pixels": 9.0}
    found = detector.calibrate(made, **RATES, filter_steps=steps)
    got = score(made, feature_cache, test, thresholds=found)
    maps = np.asarray(similarity.to_pixels(jnp.asarray(made.calibration.patch), 32))
    filtered = anomaly_maps.apply_filter(maps, found.filter)
    assert found.pixel == calibration.pixel_threshold(filtered, RATES["pixel_rate"])
    assert found.pixel.value < plain.calibration.pixel.value
    np.testing.assert_array_equal(got.predictions.score, plain.predictions.score)
    # the whole, by hand
    (tokens,) = cache.load_images(feature_cache, test, len(test))
    raw = np.asarray(similarity.to_pixels(detector.score(made, tokens).patch, 32))
    wanted = anomaly_maps.apply_filter(raw, found.filter)
    unit = calibration.to_unit(wanted, found.pixel.value, found.pixel_scale)
    np.testing.assert_allclose(got.predictions.maps, unit, atol=2e-3)


def test_pixels_count_only_where_the_spacing_is_unknown(scene, monkeypatch):
    """In a test set as in the supports and in prediction, though no area is asked for in mm²."""
    feature_cache, _, test, made = scene
    thresholds = detector.calibrate(made, **RATES, filter_steps={"min_area_pixels": 500.0})
    filtered = score(made, feature_cache, test, thresholds=thresholds).predictions.maps
    monkeypatch.setattr(read, "pixel_areas", lambda records, *_: [1.0] * len(records))
    known = score(made, feature_cache, test, thresholds=thresholds).predictions.maps
    off = thresholds._replace(filter=anomaly_maps.MapFilter())
    plain = score(made, feature_cache, test, thresholds=off).predictions.maps
    np.testing.assert_array_equal(known, plain)
    assert (filtered < plain).any()


def test_a_calibration_survives_its_file(scene, tmp_path):
    *_, made = scene
    found = detector.calibrate(made, **RATES, filter_steps={"sigma": 1.5})
    settings = json.loads(config.resolve(config.base(root="/secret")).to_json_best_effort())
    whose = {"checkpoint": "c" * 16, "language": "", "supports": ["5" * 64]}
    saved.write(tmp_path, made, found, settings=settings, **whose)
    stored = saved.read(tmp_path)
    assert stored.calibration._replace(healthy=0) == found._replace(healthy=0)
    np.testing.assert_array_equal(stored.calibration.healthy, found.healthy)
    jax.tree.map(np.testing.assert_array_equal, stored.params, jax.device_get(made.params))
    assert stored.config.data.root == ""
    kept = json.loads(stored.config.to_json_best_effort())
    assert kept == settings | {"cache": "", "data": settings["data"] | {"root": ""}}
