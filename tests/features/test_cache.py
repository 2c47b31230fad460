"""The feature cache: names follow content, nothing twice, nothing damaged is believed."""

import errno
import os

import jax
import numpy as np
import pytest

from medclip_jax import files
from medclip_jax.clip import vit
from medclip_jax.data import records, synthetic_variants
from medclip_jax.distributed import sharding
from medclip_jax.errors import ConfigError, WorkdirError
from medclip_jax.features import cache, encoder, training_pool
from medclip_jax.io import read
from tests.support.pictures import SYNTHESIS, everything, opened, record_of


def same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


# --- names --------------------------------------------------------------------------------------


def test_a_name_is_the_content_and_not_the_place(feature_cache, pictures, tmp_path):
    moved = tmp_path / "elsewhere.png"
    moved.write_bytes(pictures[0].path.read_bytes())
    other = record_of(moved)
    assert cache.image_path(feature_cache, pictures[0]) == cache.image_path(feature_cache, other)
    assert cache.image_path(feature_cache, pictures[0]) != cache.image_path(
        feature_cache, pictures[1]
    )
    encoder.encode_images(feature_cache, pictures[:1])
    assert encoder.encode_images(feature_cache, [other]) == 0


def test_whatever_changes_tokens_changes_the_name(tmp_path, tiny):
    vision = tiny.vision_tower
    towers = [
        tiny._replace(digest="another"),
        tiny._replace(vision_tower=vision._replace(levels=(2, 4))),
        tiny._replace(vision_tower=vision._replace(dtype="bfloat16")),
        tiny._replace(size=64),
        tiny._replace(mean=(0.5, 0.5, 0.5)),
        tiny._replace(std=(0.5, 0.5, 0.5)),
    ]
    folders = [opened(tmp_path, t).folder for t in [tiny, *towers]]
    folders += [opened(tmp_path, tiny, fit="pad").folder]
    folders += [opened(tmp_path, tiny, dtype=d).folder for d in ("bfloat16", "float16")]
    assert len(set(folders)) == len(folders) == 10
    assert opened(tmp_path, tiny._replace(name="a copy")).folder == folders[0]


def test_whatever_changes_variants_changes_their_name(feature_cache, pictures):
    changes = [
        SYNTHESIS,
        SYNTHESIS._replace(preset="mediclip"),
        SYNTHESIS._replace(variants=3),
        SYNTHESIS._replace(seed=1),
        SYNTHESIS._replace(partner="support"),
    ]
    names = {
        training_pool.variant_path(feature_cache, pictures[0], pictures[:4], s) for s in changes
    }
    assert len(names) == len(changes)
    own, shared = SYNTHESIS, SYNTHESIS._replace(partner="support")

    def name(supports, recipe):
        return training_pool.variant_path(feature_cache, pictures[0], supports, recipe)

    assert name(pictures[:4], own) == name(pictures[:8], own)
    assert name(pictures[:4], shared) != name(pictures[:8], shared)
    assert name(pictures[:4], shared) != name(pictures[3::-1], shared)


def test_unknown_choices_are_refused(tmp_path, tiny):
    with pytest.raises(ConfigError, match="data.fit 'crop': choose 'stretch' or 'pad'"):
        opened(tmp_path, tiny, fit="crop")
    with pytest.raises(ConfigError, match="cache_dtype 'int8'"):
        opened(tmp_path, tiny, dtype="int8")


# --- encoding -----------------------------------------------------------------------------------


def test_nothing_is_encoded_twice(feature_cache, pictures, calls):
    assert encoder.encode_images(feature_cache, pictures[:4]) == 4
    assert training_pool.encode_variants(feature_cache, pictures[:4], SYNTHESIS) == 8
    before = len(calls)
    assert encoder.encode_images(feature_cache, pictures[:4]) == 0
    assert training_pool.encode_variants(feature_cache, pictures[:4], SYNTHESIS) == 0
    assert len(calls) == before


def test_more_supports_encode_only_the_new_ones(feature_cache, pictures):
    training_pool.open(feature_cache, pictures[:4], SYNTHESIS)
    stamps = {p: p.stat().st_mtime_ns for p in feature_cache.folder.iterdir()}
    assert len(stamps) == 8
    assert encoder.encode_images(feature_cache, pictures[:8]) == 4
    assert training_pool.encode_variants(feature_cache, pictures[:8], SYNTHESIS) == 4 * 2
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    # another draw of the same images, in another order, has all it needs
    assert training_pool.encode_variants(feature_cache, pictures[5:1:-1], SYNTHESIS) == 0


def test_variants_do_not_depend_on_the_other_supports(tmp_path, tiny, pictures):
    few, many = opened(tmp_path / "a", tiny), opened(tmp_path / "b", tiny)
    training_pool.encode_variants(few, pictures[:1], SYNTHESIS)
    training_pool.encode_variants(many, pictures[3::-1], SYNTHESIS)
    a, b = (
        cache.load(training_pool.variant_path(x, pictures[0], pictures[:1], SYNTHESIS))
        for x in (few, many)
    )
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_variants_differ_from_the_image_where_the_mask_says(feature_cache, pictures):
    pixels = read.fit(read.read(pictures[0].path).pixels[0], 32)
    recipe = SYNTHESIS._replace(variants=6)
    images, masks, kinds = synthetic_variants.variants(pictures[0], pixels, pixels[None], recipe)
    assert set(kinds) <= {0, 1, 2}
    assert masks.any((1, 2)).mean() > 0.5
    unmasked = np.where(masks > 0, 0, np.abs(images - pixels[None]))
    assert unmasked.max() <= 2 / 255 + 1e-6


@pytest.mark.parametrize("n", [1, 16, 19])
def test_any_number_of_images_equals_one_by_one(feature_cache, n):
    images = np.random.default_rng(n).random((n, 32, 32)).astype(np.float32)
    together = encoder.encode(feature_cache, images)
    assert together.pooled.shape == (n, 16)
    assert [x.shape for x in together.levels] == [(n, 16, 32)] * 2
    for i in {0, n // 2, n - 1}:
        alone = encoder.encode(feature_cache, images[i : i + 1])
        same(jax.tree.map(lambda x, i=i: x[i : i + 1], together), alone, atol=1e-6)


def test_encoding_is_the_image_tower(feature_cache):
    model, images = (
        feature_cache.clip,
        np.random.default_rng(0).random((16, 32, 32)).astype(np.float32),
    )
    direct = vit.encode_images(
        model.vision, images, tower=model.vision_tower, mean=model.mean, std=model.std
    )
    same(encoder.encode(feature_cache, images), direct, atol=1e-5)


def test_eight_devices_give_the_tokens_of_one(tmp_path, tiny, pictures):
    one = opened(tmp_path / "one", tiny)
    eight = opened(tmp_path / "eight", tiny, mesh=sharding.mesh())
    assert eight.mesh.size == 8
    for feature_cache in (one, eight):
        encoder.encode_images(feature_cache, pictures)
    same(everything(one, pictures), everything(eight, pictures), atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2**-8), ("float16", 2**-11)])
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
    twin = tmp_path / "twin.png"
    twin.write_bytes(pictures[1].path.read_bytes())
    asked = [pictures[2], pictures[1], pictures[0], record_of(twin), pictures[2]]
    assert encoder.encode_images(feature_cache, asked) == 3
    groups = list(cache.load_images(feature_cache, asked, 2))
    assert [len(g.pooled) for g in groups] == [2, 2, 1]
    pooled = np.concatenate([g.pooled for g in groups])
    single = [everything(feature_cache, [r]).pooled[0] for r in asked]
    np.testing.assert_array_equal(pooled, single)
    np.testing.assert_array_equal(pooled[1], pooled[3])
    assert np.abs(pooled[0] - pooled[2]).max() > 1e-4


# --- what breaks --------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_file_is_made_again(feature_cache, pictures, keep, caplog):
    encoder.encode_images(feature_cache, pictures[:2])
    wanted = everything(feature_cache, pictures[:2])
    path = cache.image_path(feature_cache, pictures[1])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    assert encoder.encode_images(feature_cache, pictures[:2]) == 1
    assert "is damaged and will be made again" in caplog.text
    assert path.read_bytes() == whole
    same(everything(feature_cache, pictures[:2]), wanted)


def test_a_pool_mends_a_damaged_shard(feature_cache, pictures):
    training_pool.open(feature_cache, pictures[:2], SYNTHESIS)
    path = training_pool.variant_path(feature_cache, pictures[0], pictures[:2], SYNTHESIS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    cache.image_path(feature_cache, pictures[1]).write_bytes(b"")
    training_pool.open(feature_cache, pictures[:2], SYNTHESIS)
    assert path.read_bytes() == whole
    assert encoder.encode_images(feature_cache, pictures[:2]) == 0


def test_a_file_half_written_by_a_killed_run_does_not_count(feature_cache, pictures):
    path = cache.image_path(feature_cache, pictures[0])
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
    assert encoder.encode_images(feature_cache, pictures[:1]) == 1


def test_a_full_disk_is_one_sentence_and_leaves_nothing(feature_cache, pictures, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)  # the last chance of a disk to say so
    with pytest.raises(WorkdirError) as caught:
        encoder.encode_images(feature_cache, pictures[:1])
    said = str(caught.value)
    assert str(cache.image_path(feature_cache, pictures[0])) in said
    assert "No space left on device" in said and "free space there" in said
    assert list(feature_cache.folder.iterdir()) == []
    monkeypatch.undo()
    assert encoder.encode_images(feature_cache, pictures[:1]) == 1


# --- the pool -----------------------------------------------------------------------------------


def test_take_gives_the_rows_that_were_asked_for(feature_cache, pictures):
    supports = pictures[:3]
    pool = training_pool.open(feature_cache, supports, SYNTHESIS)
    support, variant = np.array([2, 0, 2, 1]), np.array([1, -1, 0, -1])
    batch = training_pool.take(pool, support, variant)
    assert batch.label.tolist() == [1, 0, 1, 0] and batch.valid.all()
    for row, (s, v) in enumerate(zip(support, variant, strict=True)):
        clean = v < 0
        held = cache.load(
            cache.image_path(feature_cache, supports[s])
            if clean
            else training_pool.variant_path(feature_cache, supports[s], supports, SYNTHESIS)
        )
        at = 0 if clean else v
        np.testing.assert_array_equal(batch.features.pooled[row], held["pooled"][at])
        for i, level in enumerate(batch.features.levels):
            np.testing.assert_array_equal(level[row], held[f"level{i}"][at])
    pixels = dict((r.id, x) for r, x in records.read_all(supports, 32, "stretch"))
    for row in (0, 2):
        image = pixels[supports[support[row]].id]
        _, masks, _ = synthetic_variants.variants(
            supports[support[row]], image, image[None], SYNTHESIS
        )
        np.testing.assert_array_equal(batch.mask[row], masks[variant[row]])
    assert not batch.mask[[1, 3]].any() and batch.mask[[0, 2]].any()


def test_no_variants_is_a_pool_of_clean_images(feature_cache, pictures):
    none = SYNTHESIS._replace(variants=0)
    assert training_pool.encode_variants(feature_cache, pictures[:2], none) == 0
    pool = training_pool.open(feature_cache, pictures[:2], none)
    assert pool.anomalous == () and len(list(feature_cache.folder.iterdir())) == 2
    batch = training_pool.take(pool, np.array([0, 1]), np.array([-1, -1]))
    assert batch.label.tolist() == [0, 0] and not batch.mask.any()


@pytest.mark.parametrize("size", [20, 30, 31])
def test_masks_come_back_from_their_bits(size):
    """Also where the number of pixels is no multiple of 8."""
    masks = np.random.default_rng(size).random((3, size, size)) > 0.7
    held = {
        "pooled": np.zeros((3, 4), np.float32),
        "level0": np.zeros((3, 4, 4), np.float32),
        "mask": np.packbits(masks.reshape(3, -1), axis=1),
    }
    pool = training_pool.TrainingPool(
        (held.__getitem__,), (held.__getitem__,), 1, size, 3, np.zeros((1, 3), int)
    )
    batch = training_pool.take(pool, np.zeros(4, int), np.array([2, -1, 0, 1]))
    np.testing.assert_array_equal(batch.mask[[2, 3, 0]], masks)
    assert not batch.mask[1].any()
