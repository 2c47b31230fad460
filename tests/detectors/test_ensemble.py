"""Fusion: the arithmetic of standardised branches, and what may change its values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.detectors import detector, ensemble
from medclip_jax.detectors.detector import Scores
from tests.support.models import tokens


def standard(values, healthy):
    return (np.asarray(values) - healthy.mean()) / healthy.std(ddof=1)


def by_hand(branches, each) -> Scores:
    """Scores of the branches -> fused ones."""
    result = {name: branches[name].calibration for name in branches}
    patch = sum(
        standard(s.patch, result[name].patch) for name, s in each.items() if name[-6:] != "_image"
    )
    image = [np.arcsinh(standard(s.image, result[name].image)) for name, s in each.items()]
    return Scores(patch, np.mean(image, axis=0))


def assert_close(a, b, atol=2e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


def test_fused_scores_are_the_standardised_sum_of_the_branches(fused):
    branches, whole = fused
    new = tokens(3)
    each = {name: detector.score(b, new) for name, b in branches.items()}
    assert_close(detector.score(whole, new), by_hand(branches, each))
    assert whole.calibration.patch.shape == (4, 16) and whole.k == 4 and whole.stochastic
    assert whole.proven == ()


def test_a_support_calibrates_without_its_own_share_in_the_units(fused):
    """Maps: standardised by the other supports. Images: see `healthy_scores`."""
    branches, whole = fused
    for i in range(4):
        others = {
            n: b._replace(calibration=Scores(*(np.delete(x, i, 0) for x in b.calibration)))
            for n, b in branches.items()
        }
        own = {n: Scores(*(x[[i]] for x in b.calibration)) for n, b in branches.items()}
        wanted = by_hand(others, own).patch[0]
        np.testing.assert_allclose(whole.calibration.patch[i], wanted, rtol=1e-4, atol=2e-4)
    images = np.stack([b.calibration.image for b in branches.values()], -1)
    np.testing.assert_allclose(whole.calibration.image, ensemble.healthy_scores(images))


def test_no_new_image_passes_the_healthy_scores_but_not_its_own_comparison():
    """Whatever image passes the r-th healthy score beats r supports that are scored as it is."""
    rng = np.random.default_rng(0)
    for k, branches in ((4, 2), (5, 3), (8, 2)):
        supports = np.exp(rng.normal(size=(k, branches)))
        limits = np.sort(ensemble.healthy_scores(supports))
        scale = np.exp(rng.uniform(-1, 3, (4000, 1)))
        centre, spread = supports.mean(0), supports.std(0, ddof=1)
        new = centre + spread * scale * rng.normal(size=(4000, branches))
        score = np.arcsinh((new - centre) / spread).mean(1)
        beaten = np.zeros(4000, int)
        for i in range(k):
            every = np.concatenate(
                [np.tile(np.delete(supports, i, 0), (4000, 1, 1)), new[:, None]], 1
            )
            z = (supports[i] - every.mean(1)) / every.std(1, ddof=1)
            beaten += score > np.arcsinh(z).mean(1)
        passed = (score[:, None] > limits).sum(1)
        assert (passed > beaten).mean() < 0.01  # the search is along rays
        assert passed.max() == k


def test_one_branch_needs_no_correction():
    """Ranks decide: the scores themselves, standardised, in the supports' order."""
    values = np.array([3.0, 1.0, 2.0, 10.0])
    wanted = np.arcsinh((values - values.mean()) / values.std(ddof=1))
    np.testing.assert_allclose(ensemble.healthy_scores(values[:, None]), wanted, atol=1e-4)
    assert np.isfinite(ensemble.healthy_scores(np.ones((4, 2)))).all()  # no spread at all


def test_plain_prompts_for_images_leave_the_map_as_it_is(fused):
    branches, whole = fused
    two = ensemble.build({name: branches[name] for name in ("learned", "memory")})
    new = tokens(3)
    patch = detector.score(two, new).patch
    np.testing.assert_allclose(detector.score(whole, new).patch, patch, atol=1e-5)
    names = ("learned", "memory", "zero_shot_image")
    assert ensemble.shares(names)["map"] == {"learned": 0.5, "memory": 0.5, "zero_shot_image": 0}
    assert ensemble.shares(names)["image"] == dict.fromkeys(names, 0.3333)


def test_passes_and_folds_differ_by_the_learned_branch_alone(fused):
    branches, whole = fused
    keys, new = jax.random.split(jax.random.key(3), 5), tokens(2)
    raw, own = (detector.read_batch(d, new, keys) for d in (whole, branches["learned"]))
    each = {name: detector.score(b, new) for name, b in branches.items()}
    for i in range(5):
        one = Scores(own.passes.patch[:, i], own.passes.image[:, i])
        wanted = by_hand(branches, each | {"learned": one})
        assert_close(Scores(raw.passes.patch[:, i], raw.passes.image[:, i]), wanted)
    assert raw.folds.shape == (2, 2)
    for i in range(2):
        one = Scores(each["learned"].patch, own.folds[:, i])
        np.testing.assert_allclose(
            raw.folds[:, i], by_hand(branches, each | {"learned": one}).image, atol=2e-4
        )


def test_a_branch_far_from_its_healthy_values_does_not_drown_the_rest():
    """Two branches that agree beat a third that is forty of its narrow deviations away."""

    def score(*deviations):
        each = [Scores(jnp.zeros((1, 1)), jnp.array([3 + 2 * d])) for d in deviations]
        units = np.array([[[0] * 3, [1] * 3], [[3] * 3, [2] * 3]], np.float32)
        return float(ensemble.fused(("a", "b", "narrow"), each, units).image[0])

    assert score(0, 0, 0) == 0
    assert score(5, 5, 0) > score(0, 0, 40)  # a plain sum says 10 against 40
    assert score(0.1, 0, 0) == pytest.approx(0.1 / 3, rel=0.01)  # near the healthy: the sum itself
