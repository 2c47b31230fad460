"""Two-level intervals of a table: the means they surround and the standard error they have."""

import numpy as np
import pytest
from scipy.stats import norm

from medclip_jax.errors import DataError
from medclip_jax.evaluation import bootstrap, metrics, significance
from medclip_jax.evaluation.pixel_metrics import PixelMetrics


@pytest.fixture(scope="module")
def runs():
    """Scores of 5 draws on the same 50 + 70 images, in (0, 1), with ties."""
    rng, label = np.random.default_rng(0), np.repeat([0, 1], [50, 70])
    shared = rng.normal(size=120)
    raw = [shared + rng.normal(size=120) + label * rng.normal(1.5, 0.3) for _ in range(5)]
    return [np.round(1 / (1 + np.exp(1 - x)), 2) for x in raw], label


def test_values_are_means_of_the_draws_metrics(runs):
    scores, label = runs
    found = significance.image_estimates(scores, label)
    each = [metrics.image_level(s, label) for s in scores]
    for name in ("auroc", "auprc", "recall", "specificity", "f1", "mcc"):
        assert found[name].value == pytest.approx(np.mean([m[name] for m in each])), name
        assert found[name].low < found[name].value < found[name].high
    alarms = np.mean([m["fpr"] for m in each])
    assert found["false_alarm_rate"].value == pytest.approx(alarms)
    wanted = np.mean([metrics.sensitivity_at(s, label, 0.9) for s in scores])
    assert found["sensitivity_at_90"].value == pytest.approx(wanted)
    assert significance.image_estimates(scores, np.ones(120)) == {}


def test_auroc_has_the_error_of_crossed_effects(runs):
    """Variance between draws, and DeLong's covariance of two draws on the same images."""
    scores, label = runs
    got = significance.image_estimates(scores, label)["auroc"]
    wins = []
    for x in scores:
        above, below = x[label == 1, None], x[None, label == 0]
        wins.append((above > below) + 0.5 * (above == below))
    wins = np.stack(wins)  # [draw, abnormal, healthy]
    covariance = np.cov(wins.mean(2)) / 70 + np.cov(wins.mean(1)) / 50
    values = wins.mean((1, 2))
    shared = (covariance.sum() - np.trace(covariance)) / 20
    wanted = (values.var(ddof=1) / 5 + shared) ** 0.5
    assert got.value == pytest.approx(values.mean())
    assert got.se == pytest.approx(wanted, rel=0.06)  # of 1000 rounds
    assert got.low < got.value - 1.7 * wanted and got.high > got.value + 1.7 * wanted


def test_standard_error_of_known_effects():
    """Draws with sd 1, resampled images with sd 2 in all draws together and 3 in each alone."""
    rng = np.random.default_rng(0)
    together, alone = 2 * rng.normal(size=(1, 20000)), 3 * rng.normal(size=(4, 20000))
    own = np.array([[-1.0], [1.0], [1.0], [-1.0]])
    values = np.concatenate([own, together + alone], axis=1)
    assert significance.standard_error(values) == pytest.approx((4 / 3 / 4 + 4) ** 0.5, rel=0.03)
    assert significance.standard_error(np.concatenate([own, alone], axis=1)) == pytest.approx(
        (1 / 3) ** 0.5, rel=0.1
    )
    assert significance.standard_error(values[:1]) == pytest.approx(13**0.5, rel=0.03)


def test_draws_tested_on_other_images(runs):
    """Values are those of each draw's own images; all images on all draws is the plain case."""
    scores, label = runs
    rng = np.random.default_rng(5)
    indices = [np.sort(rng.permutation(120)[:90]) for _ in scores]
    own = [s[at] for s, at in zip(scores, indices, strict=True)]
    found = significance.image_estimates(own, label, indices=indices)
    each = [metrics.image_level(s, label[at]) for s, at in zip(own, indices, strict=True)]
    plain = significance.image_estimates(scores, label)
    for name in ("auroc", "recall", "specificity"):
        assert found[name].value == pytest.approx(np.mean([m[name] for m in each])), name
    assert found["auroc"].se > plain["auroc"].se  # fewer images each
    whole = [np.arange(120)] * 5
    assert significance.image_estimates(scores, label, indices=whole) == plain


def test_all_images_of_the_draws():
    ids = [np.array(["b", "a"]), np.array(["a", "c"])]
    indices, (label, patient) = significance.union(
        ids, [np.array([0, 1]), np.array([1, 0])], [np.array(["x", "y"]), np.array(["y", "z"])]
    )
    assert [at.tolist() for at in indices] == [[0, 1], [1, 2]]
    assert label.tolist() == [0, 1, 0] and patient.tolist() == ["x", "y", "z"]
    with pytest.raises(DataError, match="a differs between draws"):
        significance.union(ids, [np.array([0, 1]), np.array([0, 0])])


def test_ten_equal_images_of_a_patient_are_worth_one(runs):
    scores, label = runs
    many, patient = [np.repeat(scores[0], 10)], np.repeat(np.arange(120), 10)
    labels = np.repeat(label, 10)
    whole = significance.image_estimates(many, labels, patient)["auroc"]
    single = significance.image_estimates(scores[:1], label)["auroc"]
    assert whole.se == pytest.approx(single.se, rel=0.1)
    naive = significance.image_estimates(many, labels)["auroc"]
    assert naive.se == pytest.approx(single.se / 10**0.5, rel=0.2)


def test_pixel_metrics_from_histograms():
    rng, label = np.random.default_rng(2), np.repeat([0, 1], [4, 8])
    masks = np.zeros((12, 20, 20), bool)
    masks[4:, 3:9, 3:9] = masks[4:, 14:18, 12:19] = True
    wanted, histograms = [], []
    for _ in range(3):
        measured = PixelMetrics()
        maps = np.clip(rng.normal(0.4 + 0.2 * masks, 0.1), 0, 0.99) * 512 // 1 / 512
        rows = [measured.add(*pair) for pair in zip(maps, masks, strict=True)]
        histograms.append(np.stack(rows))
        wanted.append(measured.pooled())
    found = significance.pixel_estimates(histograms, label)
    for name in ("auroc", "auprc", "aupro", "dice"):
        value = np.mean([m[name] for m in wanted])
        assert found[name].value == pytest.approx(value, abs=1e-6), name
        assert found[name].low < value < found[name].high
    part = [np.arange(9), np.arange(3, 12), np.arange(12)]
    own = [h[at] for h, at in zip(histograms, part, strict=True)]
    assert significance.pixel_estimates(own, label, indices=part)["dice"] != found["dice"]


@pytest.mark.parametrize("tested", [60, 40])
def test_intervals_hold_the_truth_95_times_in_100(tested, monkeypatch):
    """Five draws whose separation varies with sd 0.2 around 1, on 60 abnormal and `tested` of 60
    healthy images: the mean AUROC is Phi(1 / sqrt(2.04)), a recall Phi(0.5 / sqrt(1.04)).
    """
    monkeypatch.setattr(bootstrap, "ROUNDS", 300)
    rng, label = np.random.default_rng(7), np.repeat([0, 1], 60)
    truth = {"auroc": norm.cdf(2.04**-0.5), "recall": norm.cdf(0.5 / 1.04**0.5)}
    truth["false_alarm_rate"] = norm.cdf(-0.5)
    counts = dict.fromkeys(truth, 0)
    for run in range(80):
        parts = rng.normal(size=(1, 120)) + rng.normal(size=(5, 120))
        scores = parts / 2**0.5 + rng.normal(1, 0.2, (5, 1)) * label
        indices = [np.append(rng.permutation(60)[:tested], np.arange(60, 120)) for _ in scores]
        own = [s[at] for s, at in zip(scores, indices, strict=True)]
        found = significance.image_estimates(own, label, seed=run, indices=indices)
        for name, value in truth.items():
            counts[name] += found[name].low <= value <= found[name].high
    for name, count in counts.items():
        assert 69 <= count <= 80, (name, count)  # 76 expected, sd 1.9
