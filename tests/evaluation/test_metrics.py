"""Image metrics against the reference fixtures, scikit-learn and cases worked out by hand."""

import json
import warnings

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from medclip_jax.errors import DataError, UserError
from medclip_jax.evaluation import metrics
from tests.support.reference import reference_files

IMAGE_KEYS = (
    "auroc auprc accuracy precision recall f1 specificity balanced_accuracy mcc fpr tpr threshold"
)


@pytest.fixture(params=reference_files("metrics_*.npz"), ids=lambda p: p.stem)
def fixture(request):
    with np.load(request.param) as arrays:
        return dict(arrays), json.loads(request.param.with_suffix(".json").read_text())


def test_image_level_meets_reference(fixture):
    arrays, expected = fixture
    scores, labels = arrays["image_scores"], arrays["image_labels"]
    for name, threshold in (("at_0.5_ge", 0.5), ("at_0.5_gt", np.nextafter(0.5, 1))):
        got = metrics.image_level(scores, labels, threshold)
        assert sorted(got) == sorted(IMAGE_KEYS.split())
        assert got["auroc"] == pytest.approx(expected["image"]["auroc"], abs=1e-12)
        ap = expected["image"]["auprc_average_precision"]
        assert got["auprc"] == pytest.approx(ap, abs=1e-12)
        for key in set(expected["image"][name]) - {"tp", "tn", "fp", "fn"}:
            assert got[key] == pytest.approx(expected["image"][name][key], abs=1e-12), key


def test_image_curves_meet_reference(fixture):
    arrays, expected = fixture
    scores, labels = arrays["image_scores"], arrays["image_labels"]
    curve = metrics.roc(scores, labels)
    for got, name in zip(curve, ("fpr", "tpr", "thresholds"), strict=True):
        np.testing.assert_allclose(got, arrays[f"roc_{name}"], atol=1e-12)
    names = ("precision", "recall", "thresholds")
    for got, name in zip(metrics.precision_recall(scores, labels), names, strict=True):
        np.testing.assert_allclose(got, arrays[f"pr_{name}"], atol=1e-12)
    image = expected["image"]
    fpr, tpr, _ = curve
    assert fpr[tpr >= 0.95].min() == pytest.approx(image["fpr_at_tpr_ge_0.95"])
    f1, threshold = metrics.oracle_f1(scores, labels)
    assert f1 == pytest.approx(image["max_f1"], abs=1e-12)
    assert threshold == pytest.approx(image["max_f1_threshold"], abs=1e-12)


def test_image_edge_cases(fixture):
    for name, case in fixture[1]["image_edge_cases"].items():
        scores = np.array(case["scores"], float)  # null becomes NaN
        labels = np.array(case["labels"], int)
        if "ValueError" in case["expected"] and "AUROC" not in case["expected"]:
            with pytest.raises(ValueError):
                metrics.image_level(scores, labels)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = metrics.image_level(scores, labels)
        for key in ("precision", "recall", "f1"):
            assert got[key] == pytest.approx(case["at_0.5_ge"][f"sklearn_{key}_zero_division_0"])
        assert got["mcc"] == case["at_0.5_ge"]["sklearn_mcc"]
        if name == "constant_scores":
            assert (got["auroc"], got["auprc"]) == (0.5, 0.25)
        else:
            assert np.isnan(got["auroc"])
            np.testing.assert_equal(got["auprc"], 1.0 if name == "all_positive" else np.nan)


def test_weighted_counts_are_repeated_images():
    """A weight of 2 is an image twice: ranking metrics are those of the repeated sample."""
    rng = np.random.default_rng(0)
    scores, truth = np.round(rng.normal(size=60), 1), rng.random(60) < 0.4
    weights = rng.integers(0, 3, (5, 60))
    counts, levels = metrics.by_score(scores, truth, weights)
    assert counts.shape == (5, 2, len(levels)) and (np.diff(levels) > 0).all()
    got = metrics.ranking(counts) | metrics.rates(
        *metrics.confusion_from(counts, int(np.searchsorted(levels, 0.5)))
    )
    for row, weight in enumerate(weights):
        many, labels = np.repeat(scores, weight), np.repeat(truth, weight)
        wanted = metrics.image_level(many, labels)
        for name in got:
            assert got[name][row] == pytest.approx(wanted[name], abs=1e-12), name
        assert got["auroc"][row] == pytest.approx(roc_auc_score(labels, many), abs=1e-12)
        assert got["auprc"][row] == pytest.approx(average_precision_score(labels, many), abs=1e-12)


def test_one_class_rates_are_nan():
    healthy = metrics.image_level(np.array([0.1, 0.9]), np.array([0, 0]))
    assert healthy["fpr"] == healthy["specificity"] == 0.5
    assert np.isnan([healthy["tpr"], healthy["balanced_accuracy"]]).all()
    abnormal = metrics.image_level(np.array([0.1, 0.9]), np.array([1, 1]))
    assert np.isnan([abnormal["fpr"], abnormal["specificity"]]).all()
    assert np.isnan(abnormal["balanced_accuracy"])
    for labels in ([1, 1], [0, 0]):
        assert np.isnan(metrics.sensitivity_at(np.array([0.1, 0.9]), np.array(labels)))


def test_sensitivity_at_specificity_by_hand():
    labels = np.array([0] * 10 + [1] * 4)
    scores = np.concatenate([np.arange(10) / 10, [0.95, 0.85, 0.75, 0.05]])
    # One false alarm in ten (0.9) leaves thresholds above 0.8.
    assert metrics.sensitivity_at(scores, labels, 0.9) == 0.5
    assert metrics.sensitivity_at(scores, labels, 1.0) == 0.25


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2, np.nan], [0, 1, 1], "image 2 is nan"),
        ([0.1, np.inf], [0, 1], "image 1 is inf"),
        ([0.1, 0.2], [0, 2], "label of image 1 is 2; use 0 and 1"),
        ([0.1, 0.2], [0], "2 scores and 1 labels"),
        ([], [], "0 scores"),
    ],
)
def test_what_cannot_be_measured_is_named(scores, labels, message):
    with pytest.raises(metrics.MetricError, match=message):
        metrics.image_level(np.array(scores), np.array(labels))
    assert issubclass(metrics.MetricError, UserError) and issubclass(metrics.MetricError, DataError)


def test_a_curve_needs_both_classes():
    with pytest.raises(metrics.MetricError, match="needs healthy and abnormal"):
        metrics.roc(np.array([0.1, 0.2]), np.array([1, 1]))


def test_the_threshold_itself_is_positive_in_double_precision():
    """float32(0.1) is above 0.1 and float32(0.7) below 0.7."""
    assert metrics.image_level(np.array([0.5, 0.4]), np.array([1, 0]))["accuracy"] == 1.0
    for threshold, positive in ((0.1, True), (0.7, False)):
        got = metrics.image_level(np.array([threshold], np.float32), np.array([0]), threshold)
        assert got["fpr"] == positive


def test_the_headline_says_why_it_is_empty():
    run = {"dataset": "busi", "k": 4, "method": "ours", "pixel": None}
    assert metrics.headline(run | {"image": {"auroc": 0.9}}) == "busi K=4 ours: image AUROC 0.900"
    said = metrics.headline(run | {"image": {"auroc": None}})
    assert said == "busi K=4 ours: no AUROC, as the test images are of one class"
