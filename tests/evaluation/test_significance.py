"""Tests and intervals against scipy, the reference fixtures, brute force and simulation."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats as st
from sklearn.metrics import average_precision_score, roc_auc_score

from medclip_jax.errors import DataError
from medclip_jax.evaluation import significance
from tests.support.reference import reference_files

FIXTURES = reference_files("metrics_*.npz")


@pytest.fixture(params=FIXTURES, ids=lambda p: p.stem)
def paired(request):
    with np.load(request.param) as arrays:
        a, b = arrays["paired_a"], arrays["paired_b"]
    return a, b, json.loads(request.param.with_suffix(".json").read_text())["paired"]


def scored(rng: np.random.Generator, m: int, n: int, ties: bool = False) -> tuple:
    labels = np.array([1] * m + [0] * n)
    shared = rng.normal(size=m + n)
    a = labels + shared + rng.normal(size=m + n)
    b = 0.5 * labels + shared + rng.normal(size=m + n)
    return (np.round(a), np.round(b), labels) if ties else (a, b, labels)


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
    assert got.method == "exact" and got.least_p == 2.0 ** (1 - got.n)


@pytest.mark.parametrize("n", [1, 3, 5, 9])
def test_wilcoxon_equals_all_sign_flips(n):
    rng = np.random.default_rng(n)
    difference = rng.integers(-4, 5, n).astype(float)
    got = significance.wilcoxon(difference, np.zeros(n))
    kept = difference[difference != 0]
    if len(kept) == 0:
        assert got.p == 1.0
        return
    ranks = st.rankdata(np.abs(kept))
    sums = [np.dot(flip, ranks) for flip in itertools.product((0, 1), repeat=len(kept))]
    centre = ranks.sum() / 2
    seen = abs(ranks[kept > 0].sum() - centre)
    assert got.p == pytest.approx(np.mean(np.abs(np.array(sums) - centre) >= seen - 1e-9))


@pytest.mark.parametrize("n", [5, 20, 60, 200])
def test_wilcoxon_equals_scipy(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.2, 1, n), rng.normal(size=n)
    method = "exact" if n <= significance.EXACT_UP_TO else "asymptotic"
    want = st.wilcoxon(a, b, method=method, correction=False)
    got = significance.wilcoxon(a, b)
    assert got.method == method
    assert (got.statistic, got.p) == pytest.approx((want.statistic, want.pvalue), abs=1e-10)


def test_five_draws_cannot_be_significant():
    got = significance.wilcoxon(np.arange(1.0, 6), np.zeros(5))
    assert got.p == got.least_p == 0.0625
    assert significance.wilcoxon(np.arange(1.0, 4), np.zeros(3)).least_p == 0.25
    same = significance.wilcoxon(np.ones(4), np.ones(4))
    assert (same.p, same.n, same.least_p) == (1.0, 0, 1.0)


def test_paired_t_of_constant_differences_is_undefined():
    got = significance.paired_t(np.ones(4), np.zeros(4))
    assert (got.mean, got.sd, got.low, got.high) == (1.0, 0.0, 1.0, 1.0)
    assert np.isnan([got.t, got.p, got.dz]).all()


def components(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong's structural components by their definition."""
    x, y = scores[labels == 1], scores[labels == 0]
    wins = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
    return wins.mean(1), wins.mean(0)


@pytest.mark.parametrize("ties", [False, True])
def test_delong_equals_structural_components(ties):
    a, b, labels = scored(np.random.default_rng(1), 23, 31, ties)
    got = significance.delong(a, b, labels)
    (a10, a01), (b10, b01) = components(a, labels), components(b, labels)
    variance = np.var(a10 - b10, ddof=1) / 23 + np.var(a01 - b01, ddof=1) / 31
    assert got.auroc_a == pytest.approx(roc_auc_score(labels, a), abs=1e-12)
    assert got.auroc_b == pytest.approx(roc_auc_score(labels, b), abs=1e-12)
    assert got.se == pytest.approx(variance**0.5, abs=1e-12)
    assert got.z == pytest.approx(got.difference / variance**0.5, abs=1e-10)
    assert got.p == pytest.approx(2 * st.norm.sf(abs(got.z)), abs=1e-12)
    one = significance.auroc_interval(a, labels)
    assert one.se**2 == pytest.approx(np.var(a10, ddof=1) / 23 + np.var(a01, ddof=1) / 31)
    assert 0 < one.low < one.value < one.high < 1


def test_delong_meets_bootstrap():
    a, b, labels = scored(np.random.default_rng(2), 80, 100)
    rng = np.random.default_rng(3)
    got = significance.delong(a, b, labels)
    boot = significance.bootstrap_interval(a[None], labels, rng, baseline=b[None], rounds=1500)
    assert boot.value == pytest.approx(got.difference, abs=1e-12)
    assert boot.se == pytest.approx(got.se, rel=0.1)
    assert (boot.low, boot.high) == pytest.approx((got.low, got.high), abs=0.25 * got.se)


def test_delong_edges():
    a, _, labels = scored(np.random.default_rng(4), 10, 12)
    same = significance.delong(a, 3 * a + 1, labels)
    assert (same.difference, same.z, same.p) == (0.0, 0.0, 1.0)
    opposed = significance.delong(labels.astype(float), -labels.astype(float), labels)
    assert opposed.difference == 1.0 and np.isnan(opposed.p)
    perfect = significance.auroc_interval(labels.astype(float), labels)
    assert perfect.value == 1.0 and np.isnan([perfect.low, perfect.high]).all()
    with pytest.raises(DataError, match="at least 2 images"):
        significance.delong(a, a, np.array([1] + [0] * 21))
    with pytest.raises(DataError):
        significance.auroc(a, np.zeros(22, int))


def test_auroc_of_many_rows_equals_scikit_learn():
    a, b, labels = scored(np.random.default_rng(5), 15, 25, ties=True)
    want = [roc_auc_score(labels, a), roc_auc_score(labels, b)]
    np.testing.assert_allclose(significance.auroc(np.stack([a, b]), labels), want, atol=1e-12)


def test_bootstrap_repeats_and_takes_any_statistic():
    a, b, labels = scored(np.random.default_rng(6), 20, 20)

    def precision(scores, truth):
        return np.array([average_precision_score(truth, row) for row in scores])

    runs = [
        significance.bootstrap_interval(
            np.stack([a, b]), labels, np.random.default_rng(0), precision, rounds=50
        )
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    want = (average_precision_score(labels, a) + average_precision_score(labels, b)) / 2
    assert runs[0].value == pytest.approx(want) and runs[0].low < want < runs[0].high


def row_means(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return scores.mean(1)


def test_bootstrap_standard_error_in_closed_form():
    """Mean of an additive table: Var = s^2(draws)/d + image variance within the classes."""
    rng = np.random.default_rng(7)
    draws, images = rng.normal(size=6), rng.normal(size=50)
    labels = np.array([0, 1] * 25)
    table = draws[:, None] + images[None]
    got = significance.bootstrap_interval(table, labels, rng, row_means, rounds=3000)
    within = sum(images[labels == k].var() * 25 for k in (0, 1)) / 50**2
    assert got.se == pytest.approx((draws.var(ddof=1) / 6 + within) ** 0.5, rel=0.05)


def test_patients_are_drawn_whole():
    """Ten copies of each image are one patient: the interval must not shrink."""
    rng = np.random.default_rng(8)
    images, labels = rng.normal(size=(1, 30)), np.array([0, 1] * 15)
    copies, patients = np.repeat(images, 10, 1), np.repeat(np.arange(30), 10)
    single = significance.bootstrap_interval(images, labels, rng, row_means, rounds=1500)
    kept = significance.bootstrap_interval(
        copies, np.repeat(labels, 10), rng, row_means, groups=patients, rounds=1500
    )
    naive = significance.bootstrap_interval(
        copies, np.repeat(labels, 10), rng, row_means, rounds=1500
    )
    assert kept.se == pytest.approx(single.se, rel=0.1)
    assert naive.se < 0.5 * kept.se


@pytest.mark.parametrize("of_draws", [0.2, 1.5])
def test_coverage_of_two_level_bootstrap(of_draws):
    """Five draws, both levels random, truth 0; at 1.5 a plain percentile interval covers 88%."""
    rng = np.random.default_rng(9)
    labels = np.array([0] * 20 + [1] * 20)
    hits = []
    for _ in range(500):
        table = of_draws * rng.normal(size=(5, 1)) + rng.normal(size=(5, 40))
        table += rng.normal(size=(1, 40))
        got = significance.bootstrap_interval(table, labels, rng, row_means, rounds=150)
        hits.append(got.low <= 0 <= got.high)
    assert 0.93 <= np.mean(hits) <= 0.97


def test_coverage_of_auroc_interval_and_paired_t():
    rng = np.random.default_rng(10)
    truth = st.norm.cdf(1.5 / 2**0.5)
    labels = np.array([1] * 60 + [0] * 40)
    hits, means = [], []
    for _ in range(1500):
        got = significance.auroc_interval(1.5 * labels + rng.normal(size=100), labels)
        hits.append(got.low <= truth <= got.high)
        test = significance.paired_t(rng.normal(0.3, 1, 5), rng.normal(size=5))
        means.append(test.low <= 0.3 <= test.high)
    assert 0.93 <= np.mean(hits) <= 0.97
    assert 0.93 <= np.mean(means) <= 0.97


def test_delong_size_under_the_null():
    rng = np.random.default_rng(11)
    labels = np.array([1] * 50 + [0] * 50)
    p = []
    for _ in range(1500):
        shared = rng.normal(size=100)
        a, b = (labels + shared + rng.normal(size=100) for _ in range(2))
        p.append(significance.delong(a, b, labels).p)
    assert 0.03 <= np.mean(np.array(p) < 0.05) <= 0.07


def test_holm_by_hand():
    got = significance.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(got, [0.03, 0.06, 0.06, 0.02], atol=1e-15)
    np.testing.assert_allclose(significance.holm(np.array([0.6, 0.7])), [1.0, 1.0])
    assert significance.holm(np.array([])).shape == (0,)
    with pytest.raises(DataError):
        significance.holm(np.array([0.1, np.nan]))


def test_holm_rejects_as_the_step_down_rule():
    rng = np.random.default_rng(12)
    for _ in range(50):
        p, level = rng.random(7) ** 3, rng.uniform(0.01, 0.3)
        rejected = np.zeros(7, bool)
        for step, index in enumerate(np.argsort(p)):
            if p[index] > level / (7 - step):
                break
            rejected[index] = True
        np.testing.assert_array_equal(significance.holm(p) <= level, rejected)


def test_wrong_pairs_are_refused():
    with pytest.raises(DataError):
        significance.paired_t(np.array([1.0]), np.array([2.0]))
    with pytest.raises(DataError):
        significance.wilcoxon(np.array([1.0, np.nan]), np.zeros(2))
