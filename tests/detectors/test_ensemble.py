"""Fusion: the arithmetic of standardised branches, and what may change its values."""

import jax
import jax.numpy as jnp
import numpy as np

from medclip_jax.detectors import detector, ensemble
from medclip_jax.detectors.detector import Scores
from tests.support.models import tokens


def standard(values, healthy):
    return (np.asarray(values) - healthy.mean()) / healthy.std(ddof=1)


def mean_by_asinh(maps) -> np.ndarray:
    return np.sinh(np.mean([np.arcsinh(z.astype(np.float64)) for z in maps], axis=0))


def fused_image(images, supports):
    """Mean over branches of asinh of what is standardised by the supports [k, b]."""
    z = (images - supports.mean(0)) / supports.std(0, ddof=1)
    return np.arcsinh(z).mean(-1)


def beaten(images, supports) -> np.ndarray:
    """How many supports each image is less healthy than, one after another."""
    count = np.zeros(len(images), int)
    for n, image in enumerate(images):
        for i in range(len(supports)):
            every = np.concatenate([np.delete(supports, i, 0), image[None]])
            count[n] += fused_image(image, supports) > fused_image(supports[i], every)
    return count


def by_hand(branches, each) -> Scores:
    """Scores of the branches -> fused maps, and how many supports each image beats."""
    result = {name: branches[name].calibration for name in branches}
    patch = mean_by_asinh(
        standard(s.patch, result[name].patch) for name, s in each.items() if name[-6:] != "_image"
    )
    images, supports = (
        np.stack([np.asarray(scores[name].image, np.float64) for name in each], -1)
        for scores in (each, result)
    )
    return Scores(patch, beaten(images, supports))


def assert_close(a, b, k=4):
    """Equal maps; ranks r with r < rank <= r + 1, where r supports are beaten."""
    np.testing.assert_allclose(a.patch, b.patch, rtol=1e-4, atol=2e-4)
    rank = np.clip(np.ceil(np.asarray(a.image)), 1, k + 1) - 1
    np.testing.assert_array_equal(rank, b.image)


def test_fused_scores_are_the_mean_by_asinh_of_the_standardised_branches(fused):
    branches, whole = fused
    new = tokens(3)
    each = {name: detector.score(b, new) for name, b in branches.items()}
    assert_close(detector.score(whole, new), by_hand(branches, each))
    assert whole.calibration.patch.shape == (4, 16) and whole.k == 4 and whole.stochastic
    assert whole.proven == ()


def test_a_support_calibrates_without_its_own_share_in_the_units(fused):
    """Maps: standardised by the other supports. Images: ranks, see `ranks`."""
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
    order = fused_image(images, images).argsort()
    assert whole.calibration.image[order].tolist() == [1, 2, 3, 4]


def test_a_rank_counts_the_supports_that_an_image_is_less_healthy_than():
    rng = np.random.default_rng(0)
    for k, branches in ((4, 2), (5, 3), (8, 2)):
        supports = np.exp(rng.normal(size=(k, branches)))
        scale = np.exp(rng.uniform(-1, 3, (300, 1)))
        centre, spread = supports.mean(0), supports.std(0, ddof=1)
        new = centre + spread * scale * rng.normal(size=(300, branches))
        rank = np.asarray(ensemble.ranks(jnp.asarray(new), jnp.asarray(supports)))
        count = beaten(new, supports)
        np.testing.assert_array_equal(np.clip(np.ceil(rank), 1, k + 1) - 1, count)
        assert set(count) == set(range(k + 1))
        far = count == k  # beyond all supports it goes on with the score
        score = fused_image(new[far], supports)
        assert np.corrcoef(rank[far], score)[0, 1] > 0.95


def test_of_one_branch_the_ranks_are_those_of_its_scores():
    values = np.array([3.0, 1.0, 2.0, 10.0])
    new = np.array([0.5, 1.5, 2.5, 5.0, 11.0, 200.0])
    rank = ensemble.ranks(jnp.asarray(new[:, None]), jnp.asarray(values[:, None]))
    assert np.ceil(rank[:5]).tolist() == [1, 2, 3, 4, 5] and rank[5] > rank[4] > 4
    assert np.isfinite(ensemble.ranks(jnp.ones((2, 2)), jnp.ones((4, 2)))).all()  # no spread


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
        wanted = by_hand(branches, each | {"learned": one})
        assert_close(Scores(wanted.patch, raw.folds[:, i]), wanted)


def test_of_maps_the_mean_lies_between_the_branches_and_nearer_to_the_smaller():
    healthy = Scores(np.array([[-1.0, 1.0]]), np.zeros(1))
    units = ensemble.units_of([healthy, healthy])
    one, other = np.array([[0.0, 40.0, -3.0]]), np.array([[0.0, 0.5, -3.0]])
    both = [Scores(x * units[1][0], np.zeros(1)) for x in (one, other)]
    got = np.asarray(ensemble.fused_map(("a", "b"), both, units))[0]
    far = np.sinh((np.arcsinh(40) + np.arcsinh(0.5)) / 2)
    np.testing.assert_allclose(got, [0, far, -3], rtol=1e-5)  # equal ones are their own mean
    assert 0.5 < far < 40 / 4


def test_a_branch_far_from_its_healthy_values_does_not_drown_the_rest():
    """Two branches that agree beat a third that is forty of its narrow deviations away."""

    def score(*deviations):
        supports = 3 + 2 * np.array([-1.0, 0.0, 1.0])[:, None] * np.ones((1, 3))
        image = 3 + 2 * jnp.array([deviations], float)
        return float(ensemble.ranks(image, jnp.asarray(supports))[0])

    assert score(0, 0, 0) <= 2
    assert score(5, 5, 0) > score(0, 0, 40)  # a plain sum says 10 against 40
