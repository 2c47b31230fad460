"""Two-level intervals of a table: what they surround, and that they are those of stats."""

import numpy as np
import pytest

from medclip_jax.errors import DataError
from medclip_jax.evaluation import bootstrap, draw_bootstrap, metrics, pixel_metrics, significance


@pytest.fixture
def runs():
    """Scores of 5 draws on the same 50 + 70 images, in (0, 1), with ties."""
    rng, label = np.random.default_rng(0), np.repeat([0, 1], [50, 70])
    shared = rng.normal(size=120)
    raw = [shared + rng.normal(size=120) + label * rng.normal(1.5, 0.3) for _ in range(5)]
    return [np.round(1 / (1 + np.exp(1 - x)), 2) for x in raw], label


def test_values_are_means_of_the_draws_metrics(runs):
    scores, label = runs
    found = draw_bootstrap.image(scores, label)
    each = [metrics.image_level(s, label) for s in scores]
    for name in ("auroc", "auprc", "recall", "specificity", "f1", "mcc"):
        assert found[name].value == pytest.approx(np.mean([m[name] for m in each])), name
        assert found[name].low < found[name].value < found[name].high
    alarms = np.mean([m["fpr"] for m in each])
    assert found["false_alarm_rate"].value == pytest.approx(alarms)
    wanted = np.mean([metrics.sensitivity_at(s, label, 0.9) for s in scores])
    assert found["sensitivity_at_90"].value == pytest.approx(wanted)
    assert draw_bootstrap.image(scores, np.ones(120)) == {}


def test_auroc_interval_has_the_error_of_crossed_effects(runs):
    """Variance between draws, and DeLong's covariance of two draws on the same images."""
    scores, label = runs
    got = draw_bootstrap.image(scores, label)["auroc"]
    values, covariance = significance._delong_covariance(np.stack(scores), label)
    shared = (covariance.sum() - np.trace(covariance)) / 20
    wanted = (values.var(ddof=1) / 5 + shared) ** 0.5
    assert got.value == pytest.approx(values.mean())
    assert got.se == pytest.approx(wanted, rel=0.06)  # of 1000 rounds
    general = significance.bootstrap_interval(np.stack(scores), label, np.random.default_rng(1))
    assert got.se < 1.05 * general.se  # which counts a draw's own images twice
    assert got.low < got.value - 1.7 * wanted and got.high > got.value + 1.7 * wanted


def test_standard_error_of_known_effects():
    """Draws with sd 1, resampled images with sd 2 in all draws together and 3 in each alone."""
    rng = np.random.default_rng(0)
    together, alone = 2 * rng.normal(size=(1, 20000)), 3 * rng.normal(size=(4, 20000))
    own = np.array([[-1.0], [1.0], [1.0], [-1.0]])
    values = np.concatenate([own, together + alone], axis=1)
    assert draw_bootstrap.standard_error(values) == pytest.approx((4 / 3 / 4 + 4) ** 0.5, rel=0.03)
    assert draw_bootstrap.standard_error(np.concatenate([own, alone], axis=1)) == pytest.approx(
        (1 / 3) ** 0.5, rel=0.1
    )
    assert draw_bootstrap.standard_error(values[:1]) == pytest.approx(13**0.5, rel=0.03)


def test_draws_tested_on_other_images(runs):
    """Values are those of each draw's own images; all images on all draws is the plain case."""
    scores, label = runs
    rng = np.random.default_rng(5)
    places = [np.sort(rng.permutation(120)[:90]) for _ in scores]
    own = [s[at] for s, at in zip(scores, places, strict=True)]
    found = draw_bootstrap.image(own, label, places=places)
    each = [metrics.image_level(s, label[at]) for s, at in zip(own, places, strict=True)]
    for name in ("auroc", "recall", "specificity"):
        assert found[name].value == pytest.approx(np.mean([m[name] for m in each])), name
        assert found[name].low < found[name].value < found[name].high
    assert found["auroc"].se > draw_bootstrap.image(scores, label)["auroc"].se  # fewer images each
    whole = [np.arange(120)] * 5
    assert draw_bootstrap.image(scores, label, places=whole) == draw_bootstrap.image(scores, label)
    masks = np.zeros((120, 8, 8), bool)
    masks[label == 1, 2:5, 2:5] = True
    noise = rng.normal(0.4, 0.1, masks.shape)
    counts = bootstrap.pixel_counts(np.clip(noise + 0.1 * masks, 0, 0.99), masks)
    same = draw_bootstrap.pixel([counts] * 5, label, places=whole)
    assert same == draw_bootstrap.pixel([counts] * 5, label)
    part = draw_bootstrap.pixel([counts[at] for at in places], label, places=places)["dice"]
    assert part.low < part.value < part.high and part.value != same["dice"].value


def test_images_of_all_draws_together():
    ids = [np.array(["b", "a"]), np.array(["a", "c"])]
    places, (label, patient) = draw_bootstrap.together(
        ids, [np.array([0, 1]), np.array([1, 0])], [np.array(["x", "y"]), np.array(["y", "z"])]
    )
    assert [p.tolist() for p in places] == [[0, 1], [1, 2]]
    assert label.tolist() == [0, 1, 0] and patient.tolist() == ["x", "y", "z"]
    with pytest.raises(DataError, match="a differs between draws"):
        draw_bootstrap.together(ids, [np.array([0, 1]), np.array([0, 0])])


def test_patients_are_drawn_whole(runs):
    """Ten equal images of a patient are worth one: the interval widens by about sqrt(10)."""
    scores, label = runs
    many, patient = [np.repeat(s, 10) for s in scores[:1]], np.repeat(np.arange(120), 10)
    labels = np.repeat(label, 10)
    whole = draw_bootstrap.image(many, labels, patient)["auroc"]
    single = draw_bootstrap.image(scores[:1], label)["auroc"]
    naive = draw_bootstrap.image(many, labels)["auroc"]
    assert whole.se == pytest.approx(single.se, rel=0.1)
    assert naive.se == pytest.approx(single.se / 10**0.5, rel=0.2)
    weights = bootstrap.resample(labels == 1, 20, 0, patient)
    assert (weights.reshape(20, 120, 10) == weights[:, ::10, None]).all()
    run = bootstrap.image(many[0], labels, groups=patient)
    alone = bootstrap.image(many[0], labels)
    assert np.ptp(run["auroc"]) > 2 * np.ptp(alone["auroc"])
    assert run["recall"] == run["tpr"] and run["fpr"][0] == pytest.approx(1 - run["specificity"][1])


def test_pixel_metrics_from_histograms():
    rng, label = np.random.default_rng(2), np.repeat([0, 1], [4, 8])
    masks = np.zeros((12, 20, 20), bool)
    masks[4:, 3:9, 3:9] = masks[4:, 14:18, 12:19] = True
    maps = [
        (np.clip(rng.normal(0.4 + 0.2 * masks, 0.1), 0, 0.99) * 512 // 1 / 512).astype(np.float32)
        for _ in range(3)
    ]
    found = draw_bootstrap.pixel([bootstrap.pixel_counts(m, masks) for m in maps], label)
    each = [pixel_metrics.pixel_level(m, masks) for m in maps]
    for name in ("auroc", "auprc", "aupro", "dice"):
        wanted = np.mean([m[name] for m in each])
        assert found[name].value == pytest.approx(wanted, abs=1e-6), name
        assert found[name].low < wanted < found[name].high
