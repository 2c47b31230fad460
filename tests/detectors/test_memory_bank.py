"""The memory: coresets against brute force, bounded comparison, one support."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.data import augmentation
from medclip_jax.detectors import by_name, memory_bank
from medclip_jax.features import cache, encoder, support_images
from medclip_jax.models import similarity
from tests.support.models import rows, tokens
from tests.support.pictures import one_device, write_pictures


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
    whole, row = memory_bank.most_alike(v, m)
    np.testing.assert_array_equal(row, similarity.cosine(v, m).argmax(-1))
    monkeypatch.setattr(memory_bank, "CHUNK", 8)
    again, same = memory_bank.most_alike(v, m)
    np.testing.assert_allclose(again, whole, atol=1e-6)
    np.testing.assert_array_equal(same, row)
    far, _ = memory_bank.most_alike(-m[None, :1], m[:1].repeat(9, 0))  # no padding may look nearer
    np.testing.assert_allclose(far, -1, atol=1e-6)


def test_a_coreset_is_chosen_without_the_left_out_support():
    held = tokens(4)
    whole = memory_bank.remember(held, 0.25)
    for i in range(4):
        others = memory_bank.remember(rows(held, [j for j in range(4) if j != i]), 0.25)
        np.testing.assert_allclose(
            whole.held_out[i : i + 1], others.patches(rows(held, [i])), atol=1e-6
        )


def test_one_support_is_compared_with_its_views():
    held, seen = tokens(1), tokens(3, seed=4)
    made = memory_bank.remember(held, 1.0, seen)
    np.testing.assert_allclose(made.held_out, made.patches(seen), atol=1e-6)
    assert made.k == 1 and made.held_out.shape == (3, 16) and made.held_out.min() > 0


def test_views_are_gentle():
    y, x = np.mgrid[:64, :64] / 63
    image = (0.5 + 0.4 * np.sin(4 * x) * np.cos(3 * y)).astype(np.float32)
    made = augmentation.crops(image)
    assert made.shape == (10, 64, 64) and made.dtype == np.float32
    assert made.min() >= image.min() - 1e-6 and made.max() <= image.max() + 1e-6
    np.testing.assert_array_equal(made[:5, :, ::-1], made[5:])
    assert 0 < np.abs(made[:5] - image).mean() < 0.1
    np.testing.assert_allclose(made[4][32, 32], image[32, 32], atol=0.02)


def test_a_mirrored_memory_knows_its_supports_either_way(tmp_path, tiny):
    supports = write_pictures(tmp_path, 3, start=7)
    feature_cache = cache.open(tmp_path, tiny, "stretch", "float32", one_device())
    encoder.encode_images(feature_cache, supports)
    images = support_images.pixels(feature_cache, supports, tiny.size)
    own, turned = (
        encoder.encode(feature_cache, np.ascontiguousarray(x)) for x in (images, images[..., ::-1])
    )
    made, plain = (
        by_name.build("memory", None, {}, None, feature_cache, supports, [], mirror=m)
        for m in (True, False)
    )
    for seen in (own, turned):
        np.testing.assert_allclose(made.patches(seen), 0, atol=1e-5)
    assert np.asarray(plain.patches(turned)).max() > 1e-3
    assert made.k == 3 and made.held_out.shape == (3, 16)
    # support 1 is compared with the others and their mirror images, not with its own
    others = jax.tree.map(lambda a, b: jnp.concatenate([a[::2], b[::2]]), own, turned)
    wanted = memory_bank.remember(others).patches(rows(jax.tree.map(jnp.asarray, own), [1]))
    np.testing.assert_allclose(made.held_out[1:2], wanted, atol=1e-5)
