"""Encoding: any number of images on any number of devices, nothing twice."""

import jax
import numpy as np
import pytest

from medclip_jax.clip import checkpoint
from medclip_jax.distributed import sharding
from medclip_jax.features import cache, encoder
from tests.support.pictures import SYNTHESIS, everything, opened, record_of


def same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_nothing_is_encoded_twice(feature_cache, pictures, calls):
    assert encoder.encode_images(feature_cache, pictures[:4]) == 4
    assert encoder.encode_variants(feature_cache, pictures[:4], SYNTHESIS) == 8
    before = len(calls)
    assert encoder.encode_images(feature_cache, pictures[:4]) == 0
    assert encoder.encode_variants(feature_cache, pictures[:4], SYNTHESIS) == 0
    assert len(calls) == before


@pytest.mark.parametrize("n", [1, 19])
def test_any_number_of_images_equals_one_by_one(feature_cache, n):
    images = np.random.default_rng(n).random((n, 32, 32)).astype(np.float32)
    together = encoder.encode(feature_cache, images)
    assert together.pooled.shape == (n, 16)
    assert [x.shape for x in together.levels] == [(n, 16, 32)] * 2
    for i in {0, n // 2, n - 1}:
        alone = encoder.encode(feature_cache, images[i : i + 1])
        same(jax.tree.map(lambda x, i=i: x[i : i + 1], together), alone, atol=1e-6)


def test_an_accelerator_has_the_next_batch_before_the_last_is_fetched(feature_cache, monkeypatch):
    images = np.random.default_rng(0).random((40, 32, 32)).astype(np.float32)
    plain, events = encoder.encode(feature_cache, images), []

    def noted(name, call):
        return lambda *args, **fields: events.append(name) or call(*args, **fields)

    monkeypatch.setattr(checkpoint, "encode_images", noted("start", checkpoint.encode_images))
    monkeypatch.setattr(sharding, "fetch", noted("fetch", sharding.fetch))
    encoder.encode(feature_cache, images)
    assert events == ["start", "fetch"] * 3  # on a CPU one after the other
    events.clear()
    monkeypatch.setattr(encoder, "batches_ahead", lambda mesh: 1)
    ahead = encoder.encode(feature_cache, images)
    assert events == ["start", "start", "fetch", "start", "fetch", "fetch"]
    jax.tree.map(np.testing.assert_array_equal, ahead, plain)


def test_encoding_is_the_image_encoder(feature_cache):
    model, images = (
        feature_cache.clip,
        np.random.default_rng(0).random((16, 32, 32)).astype(np.float32),
    )
    direct = checkpoint.encode_images(
        model.vision, images, encoder=model.image_encoder, mean=model.mean, std=model.std
    )
    same(encoder.encode(feature_cache, images), direct, atol=1e-5)


def test_four_devices_give_the_tokens_of_one(tmp_path, tiny, pictures):
    one = opened(tmp_path / "one", tiny)
    four = opened(tmp_path / "four", tiny, mesh=sharding.mesh())
    assert four.mesh.size == 4
    for feature_cache in (one, four):
        encoder.encode_images(feature_cache, pictures)
    same(everything(one, pictures), everything(four, pictures), atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2**-8)])
def test_half_precision_stays_close(tmp_path, tiny, pictures, dtype, tolerance):
    exact, half = opened(tmp_path, tiny), opened(tmp_path, tiny, dtype=dtype)
    for feature_cache in (exact, half):
        encoder.encode_images(feature_cache, pictures[:2])
    small = everything(half, pictures[:2])
    assert {x.dtype.name for x in jax.tree.leaves(small)} == {dtype}
    wanted = everything(exact, pictures[:2])
    same(jax.tree.map(lambda x: x.astype(np.float32), small), wanted, rtol=tolerance, atol=1e-6)
    sizes = [cache.image_path(b, pictures[0]).stat().st_size for b in (exact, half)]
    assert sizes[1] < 0.6 * sizes[0]


def test_images_come_in_order_and_equal_files_are_encoded_once(feature_cache, pictures, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(pictures[1].path.read_bytes())
    listed = [pictures[2], pictures[1], pictures[0], record_of(copy), pictures[2]]
    assert encoder.encode_images(feature_cache, listed) == 3
    groups = list(cache.load_images(feature_cache, listed, 2))
    assert [len(g.pooled) for g in groups] == [2, 2, 1]
    pooled = np.concatenate([g.pooled for g in groups])
    single = [everything(feature_cache, [r]).pooled[0] for r in listed]
    np.testing.assert_array_equal(pooled, single)
    np.testing.assert_array_equal(pooled[1], pooled[3])
    assert np.abs(pooled[0] - pooled[2]).max() > 1e-4


def test_stacks_are_named_by_pixels_and_way(feature_cache, calls):
    stacks = np.random.default_rng(0).random((2, 3, 32, 32)).astype(np.float32)
    first = encoder.encode_stacks(feature_cache, stacks, "a")
    before = len(calls)
    again = encoder.encode_stacks(feature_cache, stacks[::-1], "a")
    assert len(calls) == before == 2
    jax.tree.map(np.testing.assert_array_equal, first, again[::-1])
    other = stacks[0] + np.float32(1e-6)
    paths = {encoder.stack_path(feature_cache, x, n) for x in (stacks[0], other) for n in "ab"}
    assert len(paths) == 4
