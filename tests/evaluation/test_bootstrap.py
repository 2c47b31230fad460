"""Intervals of one run: the values they surround, their width, their coverage, their edges."""

import numpy as np
import pytest
from scipy.stats import norm

from medclip_jax.evaluation import bootstrap, metrics
from medclip_jax.evaluation.pixel_metrics import PixelMetrics


def scene(rng, healthy: int, abnormal: int) -> tuple[np.ndarray, np.ndarray]:
    label = np.repeat([0, 1], [healthy, abnormal])
    return rng.normal(label, 1.0), label


def test_intervals_surround_the_metrics_of_the_sample():
    score, label = scene(np.random.default_rng(0), 40, 60)
    result, wanted = bootstrap.image(np.round(score, 1), label), metrics.image_level(score, label)
    assert set(result) == set(wanted) - {"threshold"}
    for name, (low, high) in result.items():
        assert low < wanted[name] < high, name
    assert bootstrap.image(score, label) == bootstrap.image(score, label)
    assert bootstrap.image(score, label, seed=1) != bootstrap.image(score, label)


def test_the_width_of_an_accuracy_is_the_binomial_one():
    """Accuracy of resampled images within classes: variance sum of n_c p_c (1 - p_c) / n^2."""
    score, label = scene(np.random.default_rng(0), 200, 300)
    low, high = bootstrap.image(score, label)["accuracy"]
    hits = (score >= 0.5) == label
    variance = sum(len(x) * x.var() for x in (hits[:200], hits[200:])) / 500**2
    assert high - low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.1)


def test_perfect_rates_are_not_certain():
    limits = bootstrap.image(np.array([0.1] * 10 + [0.9] * 10), np.repeat([0, 1], 10))
    assert limits["recall"] == pytest.approx((0.722, 1), abs=1e-3)
    assert limits["fpr"] == pytest.approx((0, 0.278), abs=1e-3)
    assert limits["auroc"] == (1, 1)
    assert bootstrap.image(np.array([0.1, 0.2]), np.array([0, 0])) == {}


def test_pixels_are_resampled_by_image():
    rng = np.random.default_rng(1)
    maps = rng.random((6, 20, 30)).astype(np.float32)
    masks = rng.random((6, 20, 30)) < 0.2 + 0.4 * maps
    measured = PixelMetrics()
    histograms = [measured.add(*pair) for pair in zip(maps, masks, strict=True)]
    limits = bootstrap.pixel(histograms, np.array([0, 0, 1, 1, 1, 1]))
    wanted = measured.pooled()
    assert {"auroc", "auprc", "aupro", "dice", "iou"} < set(limits)
    assert all(limits[n][0] <= wanted[n] <= limits[n][1] for n in ("auroc", "dice", "recall"))


def test_means_leave_out_images_that_do_not_count():
    """Every second image has no distance; the standard error is that of the others' mean."""
    rng, label = np.random.default_rng(4), np.repeat([0, 1], 100)
    values = np.where(np.arange(200) % 2, rng.normal(10, 3, 200), np.nan)
    limits = bootstrap.means({"hausdorff": values, "none": np.full(200, np.nan)}, label)
    assert set(limits) == {"hausdorff"}
    low, high = limits["hausdorff"]
    known = values[np.isfinite(values)]
    wide = 2 * 1.96 * known.std() / 10
    assert low < known.mean() < high and high - low == pytest.approx(wide, rel=0.15)


def test_patients_are_resampled_whole():
    label, patient = np.repeat([0, 1], [100, 200]), np.repeat(np.arange(30), 10)
    weights = bootstrap.resample(label == 1, 20, 0, patient)
    assert (weights.reshape(20, 30, 10) == weights[:, ::10, None]).all()
    assert (weights[:, :100].sum(1) == 100).all() and (weights[:, 100:].sum(1) == 200).all()
    score = np.repeat(scene(np.random.default_rng(3), 10, 20)[0], 10)
    whole = bootstrap.image(score, label, groups=patient)
    assert np.ptp(whole["auroc"]) > 2 * np.ptp(bootstrap.image(score, label)["auroc"])
    assert whole["recall"] == whole["tpr"]
    assert whole["fpr"].low == pytest.approx(1 - whole["specificity"].high)


def test_units_of_healthy_and_abnormal_images_leave_out_what_a_resample_lacks():
    """Three volumes with slices of both kinds, three of lesions alone: some resamples have none
    that is healthy, so that specificity has no interval, and the band leaves them out."""
    label = np.array([0, 1] * 3 + [1] * 6)
    unit = np.repeat(np.arange(6), 2)
    score = np.random.default_rng(0).random(12)
    limits = bootstrap.image(score, label, groups=unit)
    assert {"recall", "tpr"} < set(limits) and not {"specificity", "fpr", "auroc"} & set(limits)
    low, high = bootstrap.roc_band(score, label, np.linspace(0, 1, 5), groups=unit)
    assert np.isfinite([low, high]).all() and (low <= high).all()


@pytest.mark.parametrize("units", [[0] * 10 + [1] * 10, [*range(10)] + [10] * 10])
def test_a_class_of_one_unit_has_no_interval(units):
    (score, label), units = scene(np.random.default_rng(1), 10, 10), np.array(units)
    assert not bootstrap.varies(label == 1, units)
    assert bootstrap.image(score, label, groups=units) == {}
    assert bootstrap.means({"distance": score}, label, groups=units) == {}
    histograms = [PixelMetrics().add(np.full((4, 4), x), np.eye(4) * y) for x, y in zip(
        np.clip(score, 0, 1), label, strict=True)]  # fmt: skip
    assert bootstrap.pixel(histograms, label, groups=units) == {}
    alone = bootstrap.image(np.array([0.2, 0.6, 0.7]), np.array([0, 1, 1]))  # by Wilson alone
    assert set(alone) == {"recall", "tpr", "specificity", "fpr"}
    assert alone["fpr"] == pytest.approx((0, 0.793), abs=1e-3)


def test_one_unit_of_healthy_images_alone_is_not_a_class_of_one_unit():
    """Twenty patients have slices of both kinds, and one has healthy ones alone."""
    label = np.array([0, 1] * 20 + [0, 0])
    patient = np.array([f"p{i // 2}" for i in range(42)])
    assert bootstrap.varies(label == 1, patient)
    score = np.random.default_rng(0).normal(label, 1.0)
    assert np.ptp(bootstrap.image(score, label, groups=patient)["auroc"]) > 0.05
    assert not bootstrap.varies(label[:3] == 1, patient[[0, 0, 2]])  # lesions of one patient


def test_the_roc_band_surrounds_the_curve():
    from sklearn.metrics import roc_curve

    score, label = scene(np.random.default_rng(3), 80, 80)
    grid = np.linspace(0, 1, 21)
    low, high = bootstrap.roc_band(np.round(score), label, grid)
    fpr, tpr, _ = roc_curve(label, np.round(score), drop_intermediate=False)
    curve = np.interp(grid, fpr, tpr)
    assert (low <= curve + 1e-9).all() and (curve <= high + 1e-9).all()
    assert high[-1] == 1.0 and (np.diff(low) >= 0).all() and (high - low)[5] > 0.02


def test_intervals_hold_the_truth_95_times_in_100():
    """Test sets of 80 + 80; the truth of N(1, 1) against N(0, 1) is a closed form."""
    rng, label = np.random.default_rng(3), np.repeat([0, 1], 80)
    truth = {name: norm.cdf(0.5) for name in ("recall", "specificity", "accuracy")}
    truth["auroc"] = norm.cdf(2**-0.5)
    tpr, counts = norm.cdf(1 - norm.ppf(0.8)), dict.fromkeys([*truth, "band"], 0)  # at FPR 0.2
    for run in range(100):
        score = rng.normal(label, 1.0)
        limits = bootstrap.image(score, label, seed=run)
        for name, value in truth.items():
            counts[name] += limits[name].low <= value <= limits[name].high
        low, high = bootstrap.roc_band(score, label, np.array([0.2]), seed=run)
        counts["band"] += bool(low[0] <= tpr <= high[0])
    for name, count in counts.items():
        assert 87 <= count <= 100, (name, count)  # 95 expected, sd 2.2
