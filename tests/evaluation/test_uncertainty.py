"""What the uncertainty is, by closed forms, and what it is worth, on cases worked out by hand."""

import itertools

import jax
import numpy as np
import pytest

from medclip_jax.detectors import detector, prompt_detector
from medclip_jax.evaluation import evaluate, metrics, predictions
from medclip_jax.features.training_pool import Batch
from medclip_jax.models import model
from tests.support.models import design_of, tokens
from tests.support.scenes import POOL, score


def test_entropy_is_that_of_a_coin():
    p = np.array([0.5, 0.0, 1.0, 0.2])
    wanted = [np.log(2), 0, 0, -0.2 * np.log(0.2) - 0.8 * np.log(0.8)]
    np.testing.assert_allclose(metrics.entropy(p), wanted, atol=1e-15)


def test_mutual_information_is_what_the_passes_disagree_about():
    """Passes that agree have none; passes that say 0 and 1 by turns have nothing else."""
    p = np.array([[0.0, 0.5, 0.3], [1.0, 0.5, 0.3]])
    whole, mutual = metrics.of_passes(p)
    np.testing.assert_allclose(whole[:2], np.log(2))
    np.testing.assert_allclose(mutual, [np.log(2), 0, 0], atol=1e-12)
    assert mutual[2] == 0
    whole, mutual = metrics.of_passes(np.random.default_rng(0).random((20, 50)))
    assert (mutual > 0).all() and (mutual < whole).all() and (whole <= np.log(2) + 1e-12).all()


def test_risk_falls_where_the_uncertain_are_wrong():
    wrong, values = np.array([1, 0, 0, 1]), np.array([0.9, 0.1, 0.2, 0.5])
    np.testing.assert_allclose(metrics.risk_coverage(wrong, values), [0, 0, 1 / 3, 1 / 2])


def test_images_of_equal_uncertainty_count_as_the_mean_over_all_orders():
    wrong, label = np.array([1, 0, 0, 1, 1, 0]), np.array([1, 0, 1, 0, 0, 1])
    values = np.array([0.5, 0.2, 0.5, 0.5, 0.1, 0.9])
    score = np.where(wrong == label, 0.2, 0.8) + 0.01 * np.arange(6)
    curves = []
    for order in itertools.permutations(range(6)):
        first = np.argsort(values[list(order)], kind="stable")
        curves.append(np.cumsum(wrong[list(order)][first]) / np.arange(1, 7))
    np.testing.assert_allclose(metrics.risk_coverage(wrong, values), np.mean(curves, 0))
    whole = metrics.risk_and_coverage(score, label, {"sd": values})["measures"]["sd"]
    assert whole["aurc"] == pytest.approx(np.mean(curves))
    # of 6 remain 3: two healthy (0.84, 0.21) and a third of each of 0.2, 0.82 (abnormal) and 0.83
    assert whole["auroc"][-1] == pytest.approx((1 / 3) / (2 / 3 * (2 + 1 / 3)))
    for at in ([5, 4, 3, 2, 1, 0], [3, 2, 0, 1, 4, 5], [2, 0, 3, 5, 1, 4]):  # all, the ties alone
        found = metrics.risk_and_coverage(score[at], label[at], {"sd": values[at]})
        assert found["measures"]["sd"]["auroc"] == pytest.approx(whole["auroc"])
        assert found["measures"]["sd"]["aurc"] == pytest.approx(whole["aurc"])


def test_what_remains_is_measured():
    score = np.array([0.1, 0.2, 0.3, 0.6, 0.7, 0.4, 0.8, 0.9, 0.95, 0.45])
    label = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0])
    sd = np.array([1, 2, 3, 10, 4, 9, 5, 6, 7, 8.0])  # the two that are wrong last
    found = metrics.risk_and_coverage(score, label, {"sd": sd, "entropy": np.ones(10)})
    assert found["coverage"] == [1.0, 0.9, 0.8, 0.7, 0.5]
    assert set(found["measures"]) == {"sd", "distance"}  # a constant orders nothing
    by_sd = found["measures"]["sd"]
    assert by_sd["risk"] == [0.2, pytest.approx(1 / 9), 0, 0, 0]
    # of 5 x 5 pairs two are wrong: 0.6 above 0.4, 0.45 above 0.4
    assert by_sd["auroc"] == [pytest.approx(23 / 25), pytest.approx(19 / 20), 1.0, 1.0, 1.0]
    assert by_sd["aurc"] == pytest.approx((1 / 9 + 0.2) / 10)
    by_distance = found["measures"]["distance"]  # 0.45 goes first, then 0.6 or 0.4
    assert by_distance["risk"][1] == pytest.approx(2 / 9)


def test_one_class_alone_has_no_auroc():
    found = metrics.risk_and_coverage(
        np.array([0.9, 0.8, 0.1]), np.array([1, 1, 0]), {"sd": np.arange(3.0)}
    )
    assert found["measures"]["sd"]["auroc"][-1] is None  # two abnormal images remain


@pytest.mark.parametrize("measures", [{}, {"sd": np.zeros(4)}])
def test_without_passes_nothing_is_measured(measures):
    score, label = np.linspace(0, 1, 4), np.array([0, 0, 1, 1])
    assert metrics.risk_and_coverage(score, label, measures) is None


# --- in the whole -------------------------------------------------------------------------------


def test_predictions_and_metrics_hold_the_measures(scene, scored, tmp_path):  # noqa: F811
    _, _, test, _ = scene
    assert set(scored.uncertainties) == set(metrics.UNCERTAINTIES)
    p, columns = scored.predictions, scored.uncertainties
    assert all(x.shape == p.score.shape for x in columns.values())
    assert (columns["mutual_information"] >= 0).all() and columns["ensemble"].min() > 0
    assert (columns["mutual_information"] <= columns["entropy"]).all()
    found = evaluate.measure(scored, test, "stretch")["uncertainty"]
    assert set(found["measures"]) == {"sd", *metrics.UNCERTAINTIES, "distance"}
    plain = found["measures"]["sd"]
    assert plain["auroc"][0] == evaluate.metrics.image_level(p.score, p.label)["auroc"]
    predictions.write_predictions(tmp_path, scored, test, "stretch", seed=0)
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as held:
        for name in metrics.UNCERTAINTIES:
            np.testing.assert_array_equal(held[name], columns[name])


def test_without_dropout_there_are_no_measures(scene):
    feature_cache, _, test, made = scene
    got = score(made._replace(stochastic=False), feature_cache, test)
    assert got.uncertainties is None and not got.predictions.patch_variance.any()
    assert evaluate.measure(got, test, "stretch")["uncertainty"] is None


# --- MC-dropout itself (10) ---------------------------------------------------------------------


def dropping(tiny, rate):
    design, frozen = design_of(tiny, dropout=rate)
    start = model.init(jax.random.key(1), tiny, design, 2, False)
    params = jax.tree.map(lambda x: x[None], start)
    made = prompt_detector.build(params, frozen, design, POOL, tokens(1), [], 1)
    return made, design, frozen, start


def test_the_mean_of_passes_settles_as_one_over_root_t(tiny):
    """The sd of means of T passes, over many such means, times sqrt(T) is one constant."""
    made, *_ = dropping(tiny, 0.3)
    keys = jax.random.split(jax.random.key(2), 1024)
    passes = detector.read_batch(made, tokens(2, seed=4), keys).passes.patch
    means = np.asarray(passes).mean(2).T  # [t, n]
    spread = {t: means.reshape(-1, t, 2).mean(1).std(0, ddof=1) for t in (1, 4, 16)}
    for t in (4, 16):  # 256 and 64 means: the relative error of their sd is under 9%
        np.testing.assert_allclose(spread[t] * np.sqrt(t), spread[1], rtol=0.3)


def test_training_and_scoring_drop_at_the_same_rate(tiny, monkeypatch):
    """Both read design.dropout: every mask is sampled with it."""
    made, design, frozen, params = dropping(tiny, 0.25)
    rates, real = [], jax.random.bernoulli

    def bernoulli(key, p=0.5, shape=None, **more):
        rates.append(float(p))
        return real(key, p, shape, **more)

    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
    made.apply(made.params, tokens(2), jax.random.key(3))
    scoring = list(rates)
    rates.clear()
    mask, label = np.zeros((2, 32, 32), np.float32), np.array([0, 1], np.int32)
    rest = jax.tree.map(jax.numpy.asarray, (mask, label, np.ones(2, bool)))
    batch = Batch(tokens(2), *rest)
    weights = {"focal": 1.0, "dice": 1.0, "align": 0.0, "prompt": 0.0}
    model.loss(params, frozen, batch, jax.random.key(0), design=design, weights=weights)
    assert scoring and rates and set(scoring) == set(rates) and len(set(rates)) == 1
    assert rates[0] in (0.25, 0.75)
