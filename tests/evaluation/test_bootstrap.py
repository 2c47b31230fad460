"""Intervals of one run: the point they surround, their coverage, their edges."""

import interval_coverage as coverage
import numpy as np
import pytest

from medclip_jax.evaluation import bootstrap, metrics, pixel_metrics


def scene(rng, healthy, abnormal, shift=1.0):
    label = np.repeat([0, 1], [healthy, abnormal])
    return rng.normal(shift * label, 1.0), label


def test_measures_of_the_sample_itself_are_those_of_metrics():
    rng = np.random.default_rng(0)
    score, label = scene(rng, 40, 60)
    score = np.round(score, 1)  # ties
    levels, place = np.unique(score, return_inverse=True)
    counts = np.zeros((1, 2, len(levels)))
    np.add.at(counts, (0, label, place), 1)
    got = bootstrap.measures(counts, int(np.searchsorted(levels, 0.5)))
    wanted = metrics.image_level(score, label)
    for name in set(got) & set(wanted):
        assert got[name][0] == pytest.approx(wanted[name], abs=1e-12), name


def test_pixel_measures_are_those_of_metrics():
    rng = np.random.default_rng(1)
    maps = (rng.integers(0, 512, (6, 20, 30)) / 512).astype(np.float32)
    masks = rng.random((6, 20, 30)) < 0.2 + 0.4 * maps
    counts = np.stack([bootstrap.histograms(*pair) for pair in zip(maps, masks, strict=True)])
    got = bootstrap.measures(counts.sum(0)[None], bootstrap.BINS // 2)
    wanted = pixel_metrics.pixel_level(maps, masks)
    for name in set(got) & set(wanted):
        assert got[name][0] == pytest.approx(wanted[name], abs=1e-9), name
    limits = bootstrap.pixel(maps, masks, np.array([0, 0, 1, 1, 1, 1]))
    assert all(limits[n][0] <= wanted[n] <= limits[n][1] for n in ("auroc", "dice", "recall"))


def test_means_over_images_are_of_the_images_that_count():
    """Neither mask nor prediction, one of them, and both."""
    maps, masks = np.zeros((5, 12, 12), np.float32), np.zeros((5, 12, 12), bool)
    maps[1:4, 2:5, 2:5], masks[2:, 2:6, 3:8] = 0.9, True
    pooled, each = pixel_metrics.pixel_level_each(maps, masks)
    assert pooled == pixel_metrics.pixel_level(maps, masks)
    single = pixel_metrics.per_image(maps, masks)
    for name, used in (
        ("hausdorff", [2, 3]),
        ("hausdorff95", [2, 3]),
        ("boundary_f1", [1, 2, 3, 4]),
    ):
        assert np.flatnonzero(np.isfinite(each[name])).tolist() == used
        np.testing.assert_array_equal(each[name][used], single[name][used])
        assert pooled[name] == pytest.approx(np.nanmean(each[name]))


def test_means_over_images_leave_out_what_does_not_count():
    """Every second image has no distance; the standard error is that of the others' mean."""
    rng, label = np.random.default_rng(4), np.repeat([0, 1], 100)
    values = np.where(np.arange(200) % 2, rng.normal(10, 3, 200), np.nan)
    limits = bootstrap.of_means({"hausdorff": values, "none": np.full(200, np.nan)}, label)
    assert set(limits) == {"hausdorff"}
    low, high = limits["hausdorff"]
    known = values[np.isfinite(values)]
    wide = 2 * 1.96 * known.std() / 10
    assert low < known.mean() < high and high - low == pytest.approx(wide, rel=0.15)


@pytest.mark.parametrize(
    ("case", "runs"), [("image", 300), ("pixel", 60), ("draws", 60), ("table", 60), ("varying", 60)]
)
def test_coverage_by_simulation(case, runs):
    """Within what 93 to 97% would show in so few runs; interval_coverage.py makes more."""
    low, high = coverage.band(runs)
    for name, share in coverage.coverage(case, runs).items():
        assert low <= share <= high, (name, share)


def test_the_band_is_that_of_the_binomial():
    low, high = coverage.band(1500)
    assert low < 0.93 and high > 0.97  # 3.3 standard errors beyond
    assert (low, high) == pytest.approx((0.93 - 3.3 * 0.0066, 0.97 + 3.3 * 0.0044), abs=3e-3)


def test_perfect_rates_are_not_certain():
    limits = bootstrap.image(np.array([0.1] * 10 + [0.9] * 10), np.repeat([0, 1], 10))
    assert limits["recall"][0] == pytest.approx(0.722, abs=1e-3) and limits["recall"][1] == 1
    assert limits["fpr"] == pytest.approx([0, 0.278], abs=1e-3)
    assert limits["auroc"] == [1, 1]
    assert bootstrap.image(np.array([0.1, 0.2]), np.array([0, 0])) == {}


def test_the_same_seed_gives_the_same_limits():
    score, label = scene(np.random.default_rng(3), 20, 30)
    assert bootstrap.image(score, label) == bootstrap.image(score, label)
    assert bootstrap.image(score, label, seed=1) != bootstrap.image(score, label)


def test_the_roc_band_holds_the_curve_and_its_own_share():
    """At FPR 0.2 the TPR of N(1, 1) against N(0, 1) is Phi(1 - z(0.8)); test sets of 80 + 80."""
    from scipy.stats import norm
    from sklearn.metrics import roc_curve

    rng, label = np.random.default_rng(3), np.repeat([0, 1], 80)
    truth, held = norm.cdf(1 - norm.ppf(0.8)), 0
    for run in range(60):
        scores = rng.normal(label, 1.0)
        low, high = bootstrap.roc_band(scores, label, np.array([0.2]), seed=run)
        held += bool(low[0] <= truth <= high[0])
    assert 50 <= held <= 60  # of 57 expected, sd 1.7
    grid = np.linspace(0, 1, 21)
    low, high = bootstrap.roc_band(np.round(scores), label, grid)
    fpr, tpr, _ = roc_curve(label, np.round(scores), drop_intermediate=False)
    curve = np.interp(grid, fpr, tpr)
    assert (low <= curve + 1e-9).all() and (curve <= high + 1e-9).all()
    assert high[-1] == 1.0 and (np.diff(low) >= 0).all() and (high - low)[5] > 0.02
