"""The memory: coresets against brute force, bounded comparison, one support."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.data import augmentation
from medclip_jax.detectors import detector, memory_bank
from medclip_jax.models import similarity
from tests.support.models import rows, tokens
from tests.support.scenes import POOL, SIZE


def cloud(n, d=6, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), jnp.float32)


def radius(x, chosen) -> float:
    """Largest Euclidean distance of a unit row to its nearest chosen row."""
    x = np.asarray(similarity.unit(x), np.float64)
    away = np.linalg.norm(x[:, None] - x[None, list(chosen)], axis=-1)
    return away.min(1).max()


def test_the_coreset_covers_at_most_twice_as_badly_as_the_best():
    for seed in range(5):
        x = cloud(12, 3, seed)
        chosen = np.asarray(memory_bank.coreset(x, 4))
        assert len(set(chosen.tolist())) == 4
        best = min(radius(x, c) for c in itertools.combinations(range(12), 4))
        assert radius(x, chosen) <= 2 * best + 1e-6


def test_each_step_takes_the_farthest_row():
    x = cloud(40)
    chosen = np.asarray(memory_bank.coreset(x, 10))
    sim = np.asarray(similarity.cosine(x[None], x)[0])
    for n in range(1, 10):
        nearest = sim[:, chosen[:n]].max(1)
        assert nearest[chosen[n]] == pytest.approx(np.delete(nearest, chosen[:n]).min(), abs=1e-6)


def test_duplicates_are_taken_last_and_all_rows_fit():
    x = jnp.concatenate([cloud(3), cloud(3), cloud(3)])
    chosen = np.asarray(memory_bank.coreset(x, 9))
    assert sorted(chosen.tolist()) == list(range(9))
    assert len({int(c) % 3 for c in chosen[:3]}) == 3


def test_a_share_of_one_is_the_memory_itself():
    x = cloud(7)
    assert memory_bank.keep(x, 1.0) is x
    assert len(memory_bank.keep(x, 0.5)) == 4 and len(memory_bank.keep(x, 0.001)) == 1


@pytest.mark.parametrize("count", [1, 7, 8, 9, 29])
def test_chunks_change_nothing(monkeypatch, count):
    v, m = cloud(20, seed=1).reshape(4, 5, 6), cloud(count, seed=2)
    row = memory_bank.most_similar(v, m)
    np.testing.assert_array_equal(row, similarity.cosine(v, m).argmax(-1))
    monkeypatch.setattr(memory_bank, "CHUNK", 8)
    np.testing.assert_array_equal(memory_bank.most_similar(v, m), row)
    far = memory_bank.memory_distance((-m[None, :1],), (m[:1].repeat(9, 0),))
    np.testing.assert_allclose(far, 2, atol=1e-6)  # no padding may look nearer


def build(features, **more):
    more = {"k": len(features.pooled)} | more
    return memory_bank.build(features, POOL, SIZE, **more)


@pytest.mark.parametrize("coreset", [1.0, 0.25])
def test_each_support_is_compared_with_the_others(coreset):
    own = tokens(4)
    whole = build(own, coreset=coreset)
    for i in range(4):
        others = build(rows(own, [j for j in range(4) if j != i]), coreset=coreset)
        alone = detector.score(others, rows(own, [i]))
        np.testing.assert_allclose(whole.calibration.patch[i : i + 1], alone.patch, atol=1e-6)
        np.testing.assert_allclose(whole.calibration.image[i : i + 1], alone.image, atol=1e-6)
    assert whole.calibration.patch.min() > 0.1
    assert not whole.stochastic and whole.fold_params is None


def test_scores_by_the_definition():
    own, new = tokens(2), tokens(3, seed=1)
    wanted = 0
    for v, m in zip(new.levels, own.levels, strict=True):
        v, m = memory_bank.neighbourhood(v), memory_bank.neighbourhood(m).reshape(-1, 32)
        v = v / np.linalg.norm(v, axis=-1, keepdims=True)
        m = m / np.linalg.norm(m, axis=-1, keepdims=True)
        wanted += (1 - np.einsum("npd,md->npm", v, m)).min(-1) / 2
    scores = detector.score(build(own), new)
    np.testing.assert_allclose(scores.patch, wanted, atol=1e-6)
    np.testing.assert_allclose(scores.image, wanted.max(1), atol=1e-6)  # 5% of 16 patches
    np.testing.assert_allclose(detector.score(build(own), own).patch, 0, atol=1e-6)


def test_the_gradient_is_that_of_the_distance_to_the_nearest_row():
    own, new = tokens(2), tokens(1, seed=1)
    memory = build(own).params["memory"]

    def search(v):
        return sum((1 - similarity.cosine(v, m).max(-1)).sum() for m in memory) / 2

    def ours(v):
        return memory_bank.memory_distance((v, v), memory).sum()

    got, wanted = (jax.grad(f)(new.levels[0]) for f in (ours, search))
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert np.abs(got).max() > 1e-3


def test_one_support_is_compared_with_its_views():
    own, seen = tokens(1), tokens(3, seed=4)
    built = build(own, calibrating=seen)
    np.testing.assert_allclose(
        built.calibration.patch, detector.score(built, seen).patch, atol=1e-6
    )
    assert built.k == 1 and built.calibration.patch.shape == (3, 16)
    assert built.calibration.patch.min() > 0


def test_views_are_gentle():
    y, x = np.mgrid[:64, :64] / 63
    image = (0.5 + 0.4 * np.sin(4 * x) * np.cos(3 * y)).astype(np.float32)
    built = augmentation.crops(image)
    assert built.shape == (10, 64, 64) and built.dtype == np.float32
    assert built.min() >= image.min() - 1e-6 and built.max() <= image.max() + 1e-6
    np.testing.assert_array_equal(built[:5, :, ::-1], built[5:])
    assert 0 < np.abs(built[:5] - image).mean() < 0.1
    np.testing.assert_allclose(built[4][32, 32], image[32, 32], atol=0.02)
