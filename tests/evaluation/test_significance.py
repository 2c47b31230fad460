"""Tests of methods against the reference fixtures, brute force and simulation."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats as st
from sklearn.metrics import roc_auc_score

from medclip_jax.errors import DataError
from medclip_jax.evaluation import significance
from tests.support.reference import reference_files


@pytest.fixture(params=reference_files("metrics_*.npz"), ids=lambda p: p.stem)
def paired(request):
    with np.load(request.param) as arrays:
        a, b = arrays["paired_a"], arrays["paired_b"]
    return a, b, json.loads(request.param.with_suffix(".json").read_text())["paired"]


def test_paired_t_meets_reference(paired):
    a, b, want = paired
    got = significance.paired_t(a, b)
    assert got.mean == pytest.approx(want["mean_difference"], abs=1e-10)
    assert got.sd == pytest.approx(want["sd_difference"], abs=1e-10)
    assert got.t == pytest.approx(want["t"], abs=1e-10)
    assert got.p == pytest.approx(want["p_t_two_sided"], abs=1e-10)
    assert (got.low, got.high) == pytest.approx(tuple(want["ci95"]), abs=1e-10)
    assert got.dz == pytest.approx(want["cohen_dz"], abs=1e-10)
    assert got.df == want["df"]


def test_wilcoxon_meets_reference(paired):
    a, b, want = paired
    got = significance.wilcoxon(a, b)
    for name in ("signflip_exact_bruteforce", "wilcox_correctionFalse_auto"):
        assert got.statistic == want["wilcoxon"][name]["statistic"]
        assert got.p == pytest.approx(want["wilcoxon"][name]["p"], abs=1e-10)
    assert got.least_p == 2.0 ** (1 - got.n)


@pytest.mark.parametrize("n", [1, 3, 5, 12])
def test_wilcoxon_equals_all_sign_flips(n):
    """Ties among the differences get mid-ranks; 12 draws of 9 values have some."""
    difference = np.random.default_rng(n).integers(-4, 5, n).astype(float)
    got = significance.wilcoxon(difference, np.zeros(n))
    used = difference[difference != 0]
    ranks = st.rankdata(np.abs(used))
    sums = [np.dot(flip, ranks) for flip in itertools.product((0, 1), repeat=len(used))]
    centre = ranks.sum() / 2
    seen = abs(ranks[used > 0].sum() - centre)
    assert got.p == pytest.approx(np.mean(np.abs(np.array(sums) - centre) >= seen - 1e-9))
    assert got.n == len(used)


def test_five_draws_cannot_be_significant():
    got = significance.wilcoxon(np.arange(1.0, 6), np.zeros(5))
    assert got.p == got.least_p == 0.0625
    same = significance.wilcoxon(np.ones(4), np.ones(4))
    assert (same.p, same.n, same.least_p) == (1.0, 0, 1.0)


def test_wilcoxon_takes_what_rounding_tells_apart_for_equal():
    """.8 - .7 is not .9 - .8 in binary; by all 32 sign flips of five tied ranks p is 12 / 32."""
    a, b = np.array([[0.8, 0.9, 0.7, 0.6, 0.5], [0.7, 0.8, 0.6, 0.5, 0.6]])
    got = significance.wilcoxon(a, b)
    assert (got.statistic, got.p, got.n) == (3.0, pytest.approx(12 / 32), 5)
    same = significance.wilcoxon(np.full(5, 0.1 + 0.2), np.full(5, 0.3))
    assert (same.p, same.n, same.least_p) == (1.0, 0, 1.0)


def test_paired_t_of_constant_differences_is_undefined():
    got = significance.paired_t(np.ones(4), np.zeros(4))
    assert (got.mean, got.sd, got.low, got.high) == (1.0, 0.0, 1.0, 1.0)
    assert np.isnan([got.t, got.p, got.dz]).all()


@pytest.mark.parametrize("ties", [False, True])
def test_delong_equals_structural_components(ties):
    """The variance by its definition: of each image's share of wins against the other class."""
    rng = np.random.default_rng(1)
    labels, shared = np.repeat([1, 0], [23, 31]), rng.normal(size=54)
    scores = [s * labels + shared + rng.normal(size=54) for s in (1.0, 0.5)]
    a, b = (np.round(x) if ties else x for x in scores)
    got = significance.delong(a, b, labels)

    def components(x):
        above, below = x[labels == 1, None], x[None, labels == 0]
        wins = (above > below) + 0.5 * (above == below)
        return wins.mean(1), wins.mean(0)

    (a10, a01), (b10, b01) = components(a), components(b)
    variance = np.var(a10 - b10, ddof=1) / 23 + np.var(a01 - b01, ddof=1) / 31
    assert got.auroc_a == pytest.approx(roc_auc_score(labels, a), abs=1e-12)
    assert got.auroc_b == pytest.approx(roc_auc_score(labels, b), abs=1e-12)
    assert got.se == pytest.approx(variance**0.5, abs=1e-12)
    assert got.z == pytest.approx(got.difference / variance**0.5, abs=1e-10)
    assert got.p == pytest.approx(2 * st.norm.sf(abs(got.z)), abs=1e-12)
    assert (got.low + got.high) / 2 == pytest.approx(got.difference)


def test_delong_edges():
    labels = np.array([1] * 10 + [0] * 12)
    a = labels + np.random.default_rng(4).normal(size=22)
    same = significance.delong(a, 3 * a + 1, labels)
    assert (same.difference, same.z, same.p) == (0.0, 0.0, 1.0)
    opposed = significance.delong(labels.astype(float), -labels.astype(float), labels)
    assert opposed.difference == 1.0 and np.isnan(opposed.p)
    with pytest.raises(DataError, match="21 healthy and 1 abnormal"):
        significance.delong(a, a, np.array([1] + [0] * 21))


def test_delong_rejects_a_true_null_five_times_in_a_hundred():
    rng = np.random.default_rng(11)
    labels, rejected = np.array([1] * 50 + [0] * 50), 0
    for _ in range(600):
        shared = rng.normal(size=100)
        a, b = (labels + shared + rng.normal(size=100) for _ in range(2))
        rejected += significance.delong(a, b, labels).p < 0.05
    assert 15 <= rejected <= 46  # 30 expected, sd 5.3


def test_holm_by_hand():
    got = significance.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(got, [0.03, 0.06, 0.06, 0.02], atol=1e-15)
    np.testing.assert_allclose(significance.holm(np.array([0.6, 0.7])), [1.0, 1.0])
    assert significance.holm(np.array([])).shape == (0,)
    with pytest.raises(DataError, match="leave undefined tests out"):
        significance.holm(np.array([0.1, np.nan]))


def test_holm_rejects_as_the_step_down_rule():
    rng = np.random.default_rng(12)
    for _ in range(50):
        p, alpha = rng.random(7) ** 3, rng.uniform(0.01, 0.3)
        rejected = np.zeros(7, bool)
        for step, index in enumerate(np.argsort(p)):
            if p[index] > alpha / (7 - step):
                break
            rejected[index] = True
        np.testing.assert_array_equal(significance.holm(p) <= alpha, rejected)


def test_wrong_pairs_are_refused():
    with pytest.raises(DataError, match="at least 2 pairs, not 1; add draws"):
        significance.paired_t(np.array([1.0]), np.array([2.0]))
    with pytest.raises(DataError, match="must be finite"):
        significance.wilcoxon(np.array([1.0, np.nan]), np.zeros(2))
