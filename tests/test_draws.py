"""Two-level intervals of a table: what they surround, and that they are those of stats."""

import numpy as np
import pytest

from medclip_jax import draws, intervals, metrics, stats


@pytest.fixture
def runs():
    """Scores of 5 draws on the same 50 + 70 images, in (0, 1), with ties."""
    rng, label = np.random.default_rng(0), np.repeat([0, 1], [50, 70])
    shared = rng.normal(size=120)
    raw = [shared + rng.normal(size=120) + label * rng.normal(1.5, 0.3) for _ in range(5)]
    return [np.round(1 / (1 + np.exp(1 - x)), 2) for x in raw], label


def test_values_are_means_of_the_draws_metrics(runs):
    scores, label = runs
    found = draws.image(scores, label)
    each = [metrics.image_level(s, label) for s in scores]
    for name in ("auroc", "auprc", "recall", "specificity", "f1", "mcc"):
        assert found[name].value == pytest.approx(np.mean([m[name] for m in each])), name
        assert found[name].low < found[name].value < found[name].high
    alarms = np.mean([m["fpr"] for m in each])
    assert found["false_alarm_rate"].value == pytest.approx(alarms)
    wanted = np.mean([metrics.sensitivity_at(s, label, 0.9) for s in scores])
    assert found["sensitivity_at_90"].value == pytest.approx(wanted)
    assert draws.image(scores, np.ones(120)) == {}


def test_auroc_interval_is_that_of_the_general_bootstrap(runs):
    scores, label = runs
    got = draws.image(scores, label)["auroc"]
    rng = np.random.default_rng(1)
    wanted = stats.bootstrap_interval(np.stack(scores), label, rng, rounds=4000)
    assert got.value == pytest.approx(wanted.value)
    # standard errors of 1000 rounds: 2.2% of se, limits about 0.1 se
    assert got.se == pytest.approx(wanted.se, rel=0.1)
    assert got.low == pytest.approx(wanted.low, abs=0.4 * wanted.se)
    assert got.high == pytest.approx(wanted.high, abs=0.4 * wanted.se)


def test_patients_are_drawn_whole(runs):
    """Ten equal images of a patient are worth one: the interval widens by about sqrt(10)."""
    scores, label = runs
    many, patient = [np.repeat(s, 10) for s in scores[:1]], np.repeat(np.arange(120), 10)
    labels = np.repeat(label, 10)
    whole = draws.image(many, labels, patient)["auroc"]
    single = draws.image(scores[:1], label)["auroc"]
    naive = draws.image(many, labels)["auroc"]
    assert whole.se == pytest.approx(single.se, rel=0.1)
    assert naive.se == pytest.approx(single.se / 10**0.5, rel=0.2)
    weights = intervals.resample(labels == 1, 20, 0, patient)
    assert (weights.reshape(20, 120, 10) == weights[:, ::10, None]).all()
    run = intervals.image(many[0], labels, groups=patient)
    alone = intervals.image(many[0], labels)
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
    found = draws.pixel([intervals.pixel_counts(m, masks) for m in maps], label)
    each = [metrics.pixel_level(m, masks) for m in maps]
    for name in ("auroc", "auprc", "aupro", "dice"):
        wanted = np.mean([m[name] for m in each])
        assert found[name].value == pytest.approx(wanted, abs=1e-6), name
        assert found[name].low < wanted < found[name].high
