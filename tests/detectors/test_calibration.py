"""Conformal thresholds: closed forms, agreement of the decisions, simulated false-alarm rates."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax import stored
from medclip_jax.detectors import calibration
from medclip_jax.errors import ConfigError, DataError
from medclip_jax.evaluation import metrics


def test_p_values_by_hand():
    healthy = np.array([0.3, 0.1, 0.2, 0.2])
    got = calibration.p_values(np.array([0.05, 0.1, 0.2, 0.25, 0.3, 0.31]), healthy)
    np.testing.assert_allclose(got, [1, 1, 0.8, 0.4, 0.4, 0.2])
    assert calibration.p_values(np.array([]), healthy).shape == (0,)


@pytest.mark.parametrize(
    "k, alpha, rank, attained",
    [
        (4, 0.2, 4, 1 / 5),
        (4, 0.4, 3, 2 / 5),
        (9, 0.3, 7, 3 / 10),
        (16, 0.05, 16, 1 / 17),
        (19, 0.05, 19, 1 / 20),
        (32, 0.05, 32, 1 / 33),
        (99, 0.05, 95, 5 / 100),
        (99, 0.29, 71, 29 / 100),  # 100 * 0.29 is below 29 in floating point
    ],
)
def test_threshold_is_the_conformal_quantile(k, alpha, rank, attained):
    healthy = np.random.default_rng(k).permutation(np.arange(1.0, k + 1))
    got = calibration.threshold(healthy, alpha, proven=True)
    assert got.value == rank
    assert got.alpha_attained == pytest.approx(attained)
    assert got.attainable == (alpha >= 1 / (k + 1) - 1e-12)
    assert got.alpha_attained <= alpha + 1e-12 or not got.attainable


@pytest.mark.parametrize(
    "k, alpha, value, attained",
    [(16, 0.1, 15.3, 0.1), (9, 0.3, 7, 0.3), (32, 0.05, 31.35, 0.05), (4, 0.1, 4, 0.2)],
)
def test_threshold_without_a_bound_is_interpolated(k, alpha, value, attained):
    """17 images of which 1.7 may lie above it: between the second largest support and the next."""
    healthy = np.random.default_rng(k).permutation(np.arange(1.0, k + 1))
    got = calibration.threshold(healthy, alpha)
    assert (got.value, got.alpha_attained) == (pytest.approx(value), pytest.approx(attained))
    assert got.bound is None and got.attainable == (k != 4)


def test_p_values_without_steps_by_hand():
    healthy = np.array([0.3, 0.1, 0.2, 0.2])
    got = calibration.p_values(np.array([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.31]), healthy, False)
    np.testing.assert_allclose(got, [1, 1, 0.7, 0.6, 0.3, 0.2, 0.2], atol=1e-8)


def test_message_says_what_cannot_be_promised():
    got = calibration.threshold(np.arange(4.0), 0.05)
    sentence = (
        "with 4 healthy images the least attainable false-alarm rate is about 20%, "
        "with no proven bound, asked for 5%"
    )
    assert (got.value, got.attainable, got.message) == (3.0, False, sentence)
    assert got.alpha_attained == pytest.approx(0.2)
    remaining = calibration.threshold(np.arange(32.0), 0.05).message
    assert remaining == (
        "with 32 healthy images a false-alarm rate of about 5%, with no proven bound, is to be "
        "expected, asked for 5%"
    )
    proven = calibration.threshold(np.arange(32.0), 0.05, proven=True)
    assert proven.bound == proven.alpha_attained == pytest.approx(1 / 33) and got.bound is None
    assert proven.message == (
        "with 32 healthy images a false-alarm rate of at most 3.03% is proven, asked for 5%"
    )


@pytest.mark.parametrize("k", [1, 4, 8, 32])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("proven", [True, False])
def test_threshold_p_value_and_unit_score_decide_alike(k, alpha, proven):
    rng = np.random.default_rng(k)
    healthy = np.round(rng.normal(size=k), 1)
    scores = np.concatenate([healthy, np.round(rng.normal(size=200), 1)])
    limit = calibration.threshold(healthy, alpha, proven=proven)
    positive = scores > limit.value
    p = calibration.p_values(scores, healthy, proven)
    np.testing.assert_array_equal(p <= limit.alpha_attained + 1e-12, positive)
    unit = calibration.to_unit(scores, limit.value, calibration.spread(healthy))
    np.testing.assert_array_equal(unit >= 0.5, positive)
    np.testing.assert_array_equal(unit.astype(np.float32) >= 0.5, positive)
    assert metrics.image_level(unit, np.zeros(len(unit), int))["fpr"] == positive.mean()


@pytest.mark.parametrize("k", [4, 8, 16, 32])
def test_false_alarm_rate_of_exchangeable_scores(k):
    """Heavy tails; a common shift per trial: exchangeable, but not independent."""
    rng = np.random.default_rng(100 + k)
    trials = 6000
    scores = rng.standard_t(2, (trials, k + 1)) + 3 * rng.normal(size=(trials, 1))
    for alpha in (0.05, 0.1, 0.25):
        limits = [calibration.threshold(row[:k], alpha, proven=True) for row in scores]
        attained = limits[0].alpha_attained
        rate = np.mean([s > t.value for s, t in zip(scores[:, k], limits, strict=True)])
        error = math.sqrt(attained * (1 - attained) / trials)
        # Without ties the rate equals what is promised; the promise keeps the target if it can.
        assert abs(rate - attained) < 3.5 * error
        assert attained <= alpha or attained == 1 / (k + 1)
        between = [calibration.threshold(row[:k], alpha).value for row in scores]
        found = np.mean(scores[:, k] > between)
        assert rate <= found <= max(alpha, attained) + 3.5 * error


def test_false_alarm_rate_with_ties_stays_under():
    rng = np.random.default_rng(7)
    scores = rng.integers(0, 4, (6000, 9)).astype(float)
    limits = np.array([calibration.threshold(row[:8], 0.25).value for row in scores])
    assert np.mean(scores[:, 8] > limits) < 2 / 9


def test_unit_scores_keep_every_rank():
    rng = np.random.default_rng(0)
    far = np.concatenate([10.0 ** np.arange(-6, 7), -(10.0 ** np.arange(-6, 7))])
    scores = np.unique(np.concatenate([rng.normal(size=5000), far]).astype(np.float32))
    scores = np.unique(np.concatenate([scores, np.nextafter(scores, np.float32(np.inf))]))
    unit = calibration.to_unit(scores, 0.25, 0.1)
    assert (np.diff(unit) > 0).all()
    assert unit.min() > 0 and unit.max() < 1


def test_unit_score_by_hand():
    got = calibration.to_unit(np.array([[1.0, 2.0], [3.0, 0.0]]), 1.0, 1.0)
    np.testing.assert_allclose(got, [[0.5, 0.75], [5 / 6, 0.25]], atol=1e-7)
    assert got[0, 0] < 0.5


def test_unit_scores_agree_at_the_smallest_steps():
    limit = 0.3
    scores = np.array([np.nextafter(limit, 0), limit, np.nextafter(limit, 1)])
    unit = calibration.to_unit(scores, limit, 1e6)
    np.testing.assert_array_equal(unit >= 0.5, [False, False, True])


def test_spread_is_never_zero():
    assert calibration.spread(np.array([1.0, 3.0])) == pytest.approx(math.sqrt(2))
    assert calibration.spread(np.full(4, 0.5)) == pytest.approx(5e-7)
    assert calibration.spread(np.array([0.5])) == pytest.approx(5e-7)
    assert calibration.spread(np.zeros(4)) == 1.0
    tiny = calibration.spread(np.full(4, 1e-8))  # a stored detector may have it
    assert tiny == 1e-12 and stored.WIDTH.low <= tiny


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_maps_are_lowered_by_a_share_of_their_peak(array):
    """Peaks of 5 and 1 over medians of 1 and 0: less 1 and 1/4."""
    maps = np.array([[[0.0, 1.0, 1.0], [2.0, 5.0, -1.0]], [[0, 1, 0], [0.5, 0, -3]]], np.float32)
    got = calibration.lowered(array(maps), 0.25)
    np.testing.assert_allclose(got, [maps[0] - 1, maps[1] - 0.25])
    np.testing.assert_array_equal(calibration.lowered(array(maps), 0.0), maps)


def test_summary_by_hand():
    got = calibration.calibration_summary(np.array([0.2, 0.4, 0.6, 1.0]), 4, 0.05)
    assert got["false_alarm_rate"] == 0.25
    assert got["alpha_attained"] == got["least_attainable"] == pytest.approx(0.2)
    assert (got["k"], got["n_healthy_test"], got["attainable"]) == (4, 4, False)
    assert 0 <= got["expected_low"] <= 0.25 <= got["expected_high"] <= 1
    assert got["typical"] == got["alpha_attained"] and got["bound"] is None
    assert calibration.calibration_summary(np.array([0.2]), 4, 0.05, True)["bound"] == 0.2
    empty = calibration.calibration_summary(np.array([]), 4, 0.3)
    assert math.isnan(empty["false_alarm_rate"]) and math.isnan(empty["expected_low"])


def test_summary_range_holds_its_share():
    """Rates over support draws fall into the stated range about as often as stated."""
    rng = np.random.default_rng(3)
    k, n, hits = 8, 101, []
    for _ in range(600):
        p = calibration.p_values(rng.normal(size=n), rng.normal(size=k))
        got = calibration.calibration_summary(p, k, 0.25, True)
        hits.append(got["expected_low"] <= got["false_alarm_rate"] <= got["expected_high"])
    assert 0.93 < np.mean(hits) < 0.98


def test_wrong_input_is_named():
    with pytest.raises(DataError, match="support image 1 is nan"):
        calibration.threshold(np.array([0.1, np.nan]), 0.1)
    with pytest.raises(DataError, match="no healthy support"):
        calibration.threshold(np.array([]), 0.1)
    with pytest.raises(DataError, match="image 0 is inf"):
        calibration.p_values(np.array([np.inf]), np.array([1.0]))
    for alpha in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ConfigError):
            calibration.threshold(np.arange(4.0), alpha)
    with pytest.raises(DataError):
        calibration.to_unit(np.array([1.0]), 0.5, 0.0)
