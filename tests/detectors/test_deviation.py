"""Deviation from the supports: values by hand, whitening, odd grids, what calibrates."""

import jax
import jax.numpy as jnp
import numpy as np

from medclip_jax.detectors import deviation
from medclip_jax.features.encoder import coarse
from tests.support.models import rows, tokens


def whitening_of(features):
    return deviation.whiten([np.asarray(x).reshape(-1, x.shape[-1]) for x in features.levels])


def test_whitened_tokens_have_no_covariance():
    x = np.random.default_rng(0).normal(size=(4000, 3)) @ np.diag([5.0, 1.0, 0.2]) + 7
    white = deviation.whiten([x.astype(np.float32)])
    z = (x - np.asarray(white.mean[0])) @ np.asarray(white.kernel[0], np.float64)
    values = np.sort(np.cov(x.T).diagonal())[::-1]
    ridge = deviation.RIDGE * values.mean()
    np.testing.assert_allclose(np.cov(z.T), np.diag(values / (values + ridge)), atol=0.02)


def test_coarse_tokens_are_means_of_two_by_two():
    grid = 5  # the last row and column are narrower
    features = tokens(2, grid=grid)
    half = -(-grid // 2)
    small = coarse(features)
    image = np.asarray(features.levels[0]).reshape(2, grid, grid, -1)
    wanted = [
        [image[:, r : r + 2, c : c + 2].mean((1, 2)) for c in range(0, grid, 2)]
        for r in range(0, grid, 2)
    ]
    np.testing.assert_allclose(
        small.levels[0].reshape(2, half, half, -1), np.moveaxis(np.array(wanted), 2, 0), rtol=1e-5
    )
    values = jnp.arange(half**2, dtype=jnp.float32)[None]
    fine = deviation.fine(values, grid).reshape(grid, grid)
    np.testing.assert_array_equal(fine[::2, ::2].ravel(), values[0])
    assert fine.shape == (grid, grid) and fine[1, 1] == 0


def test_a_fresh_head_is_a_memory_bank_on_whitened_tokens():
    """The sum over directions is the distance to the nearest support patch, standardised."""
    supports, new = coarse(tokens(4)), coarse(tokens(3, seed=1))
    white = whitening_of(supports)
    memory = deviation.remember(white, supports)
    seen = deviation.deviation(white, memory, new, jnp.full(3, -1))
    levels = len(supports.levels)

    def unit(x, i):
        z = (np.asarray(x) - np.asarray(white.mean[i])) @ np.asarray(white.kernel[i])
        return z / np.linalg.norm(z, axis=-1, keepdims=True)

    wanted = []
    for i in range(levels):
        bank, z = unit(supports.levels[i], i), unit(new.levels[i], i)
        own = [
            1 - np.max(bank[j] @ np.delete(bank, j, 0).reshape(-1, z.shape[-1]).T, -1)
            for j in range(4)
        ]
        distance = 1 - (z @ bank.reshape(-1, z.shape[-1]).T).max(-1)
        wanted.append((distance - np.mean(own)) / np.std(own))
    patch, image = deviation.logits(deviation.init(white), seen, levels)
    np.testing.assert_allclose(patch, np.exp(-1) * np.mean(wanted, 0) - 1, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(image, patch.max(-1), rtol=1e-5)  # 5% of 4 patches is one
    pooled = np.asarray(supports.pooled) / np.linalg.norm(supports.pooled, axis=-1)[:, None]
    near = np.where(np.eye(4), -2, pooled @ pooled.T).max(-1)
    other = np.asarray(new.pooled) / np.linalg.norm(new.pooled, axis=-1)[:, None]
    spread = max(near.std(), deviation.LEAST_SPREAD * (1 - near).mean())
    away = (1 - (other @ pooled.T).max(-1) - (1 - near).mean()) / spread
    np.testing.assert_allclose(seen.image, away, rtol=1e-3)


def test_a_support_is_never_compared_with_itself():
    supports = coarse(tokens(4))
    white = whitening_of(supports)
    memory = deviation.remember(white, supports)
    same = deviation.deviation(white, memory, supports, jnp.full(4, -1))
    apart = deviation.deviation(white, memory, supports, jnp.arange(4))
    total = [x.patch.reshape(4, -1, 2, x.patch.shape[-1] // 2).sum(-1) for x in (same, apart)]
    assert (total[0] < total[1]).all()
    np.testing.assert_allclose(total[1].mean((0, 1)), 0, atol=1e-3)
    np.testing.assert_allclose(total[1].std((0, 1)), 1, rtol=1e-3)


def test_what_calibrates_has_not_seen_the_support():
    whole = tokens(4)
    white = whitening_of(coarse(whole))
    head = deviation.init(white)
    heads = jax.tree.map(lambda x: jnp.stack([x, x, x + 1]), head)  # of all, of each of two folds
    folds = [np.array([0, 2]), np.array([1, 3])]
    built = deviation.build(white, heads, whole, folds, 4, 32)
    for i in (0, 3):
        others = np.delete(np.arange(4), i)
        memory = deviation.remember(white, rows(coarse(whole), others))
        params = {"head": rows(heads, 1 + i % 2), "whitening": white._asdict()}
        scores = built.apply(params | {"memory": memory._asdict()}, rows(whole, [i]), None)
        np.testing.assert_allclose(built.calibration.image[i], scores.image[0], rtol=1e-3)
        np.testing.assert_allclose(built.calibration.patch[i], scores.patch[0], rtol=2e-3)
    assert built.k == 4 and not built.stochastic


def test_two_supports_have_one_distance_and_yet_a_spread():
    """Their distances from each other are equal; new images' ones are no thousands of spreads."""
    supports = coarse(tokens(2))
    memory = deviation.remember(whitening_of(supports), supports)
    mean, spread = np.asarray(memory.image)
    assert mean > 0.01 and spread == np.float32(deviation.LEAST_SPREAD) * mean
