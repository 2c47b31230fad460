"""Pixel thresholds: conformal risk control on whole images, by hand."""

import numpy as np
import pytest

from medclip_jax.detectors import anomaly_maps, calibration
from medclip_jax.errors import ConfigError, DataError


def test_risk_control_takes_the_smallest_value_that_keeps_the_bound():
    """Four images of ten pixels, 0 to 9 tenths and a shift: (sum of shares + 1) / 5 <= 0.4."""
    maps = np.arange(10.0) + np.arange(4.0)[:, None]
    got = anomaly_maps.pixel_threshold(maps, 0.4, proven=True)
    # above 9: 0, 1, 2 and 3 pixels are .6 in sum, (0.6 + 1) / 5 = .32; above 8 it is 1.0, just .4
    assert (got.value, got.bound, got.pixels) == (8.0, 0.4, 40)
    # threshold of the others for each left-out map, by the rule of a mean share of (2 - 1) / 4
    assert got.rate_attained == pytest.approx(np.mean([0.0, 0.1, 0.3, 0.5]), abs=0.1)
    assert "at most 40% is proven, asked for 40%" in got.message
    assert anomaly_maps.pixel_threshold(maps, 0.4).bound is None


def test_a_rate_that_cannot_be_proven_is_kept_by_left_out_images():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(4, 50, 50)) + np.array([0, 0, 0, 2.0])[:, None, None]
    got = anomaly_maps.pixel_threshold(maps, 0.02, proven=True)
    assert got.bound == pytest.approx((4 * 0.02 + 1) / 5)
    # no threshold of the three others keeps the fourth image under 2% on average over four: so
    # the largest of all pixels, and what leaving out shows
    rest = np.max(maps[:3])
    assert got.value == maps.max()
    assert got.rate_attained == pytest.approx(np.mean(maps[3] > rest) / 4, abs=2e-3)
    assert "(below 20% nothing can be proven)" in got.message
    alike = rng.normal(size=(32, 40, 40))
    got = anomaly_maps.pixel_threshold(alike, 0.02)
    assert got.rate_attained <= 0.02 and 0.015 < np.mean(alike > got.value) <= 0.02


def test_ties_and_sizes():
    ties = anomaly_maps.pixel_threshold([np.zeros((3, 4)), np.ones((2, 2))], 0.4)
    assert (ties.value, ties.pixels) == (1.0, 16)
    assert ties.rate_attained == 0.5  # of the image of ones, if zeros set the threshold
    assert anomaly_maps.pixel_threshold(np.zeros((3, 2, 2)), 0.02).value == 0


def test_views_of_one_image_promise_nothing():
    maps = np.random.default_rng(0).permutation(1000).reshape(10, 10, 10) / 1000
    got = anomaly_maps.pixel_quantile(maps, 0.05)
    assert (got.value, got.bound, got.pixels) == (0.949, None, 1000) and np.isnan(got.rate_attained)
    assert got.message.startswith("5% of the pixels of 10 views of the healthy image lie above")
    # Predicted pixels of the calibrated map are those above the threshold.
    assert np.mean(calibration.to_unit(maps, got.value, 0.1) >= 0.5) == 0.05


def test_wrong_input_is_named():
    with pytest.raises(DataError, match="two or more healthy images"):
        anomaly_maps.pixel_threshold([], 0.1)
    with pytest.raises(DataError, match="support pixel 1 is nan"):
        anomaly_maps.pixel_threshold(np.array([[0.0, np.nan], [1, 2]]), 0.1)
    with pytest.raises(ConfigError, match="pixel rate is 1"):
        anomaly_maps.pixel_threshold(np.zeros((2, 4)), 1)
