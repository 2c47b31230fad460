"""The training pool: variants are encoded once, and rows come back as they were stored."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from medclip_jax.data import augmentation
from medclip_jax.features import cache, encoder, training_pool
from medclip_jax.io import read
from tests.support.pictures import SYNTHESIS, opened


def test_whatever_changes_variants_changes_their_name(feature_cache, pictures):
    changes = [
        SYNTHESIS,
        SYNTHESIS._replace(preset="mediclip"),
        SYNTHESIS._replace(variants=3),
        SYNTHESIS._replace(seed=1),
        SYNTHESIS._replace(partner="support"),
    ]
    names = {encoder.variant_path(feature_cache, pictures[0], pictures[:4], s) for s in changes}
    assert len(names) == len(changes)
    own, shared = SYNTHESIS, SYNTHESIS._replace(partner="support")

    def name(supports, recipe):
        return encoder.variant_path(feature_cache, pictures[0], supports, recipe)

    assert name(pictures[:4], own) == name(pictures[:8], own)
    assert name(pictures[:4], shared) != name(pictures[:8], shared)
    assert name(pictures[:4], shared) != name(pictures[3::-1], shared)


def test_more_supports_encode_only_the_new_ones(feature_cache, pictures):
    encoder.open_pool(feature_cache, pictures[:4], SYNTHESIS)
    stamps = {p: p.stat().st_mtime_ns for p in feature_cache.folder.iterdir()}
    assert len(stamps) == 8
    assert encoder.encode_images(feature_cache, pictures[:8]) == 4
    assert encoder.encode_variants(feature_cache, pictures[:8], SYNTHESIS) == 4 * 2
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    # another draw of the same images, in another order, has all it needs
    assert encoder.encode_variants(feature_cache, pictures[5:1:-1], SYNTHESIS) == 0


def test_variants_do_not_depend_on_the_other_supports(tmp_path, tiny, pictures):
    few, many = opened(tmp_path / "a", tiny), opened(tmp_path / "b", tiny)
    encoder.encode_variants(few, pictures[:1], SYNTHESIS)
    encoder.encode_variants(many, pictures[3::-1], SYNTHESIS)
    a, b = (
        load_file(encoder.variant_path(x, pictures[0], pictures[:1], SYNTHESIS))
        for x in (few, many)
    )
    assert a.keys() == b.keys() >= {"pooled", "mask", "kind"}
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_variants_differ_from_the_image_where_the_mask_says(feature_cache, pictures):
    pixels = read.fit(read.read(pictures[0].path).pixels[0], 32)
    recipe = SYNTHESIS._replace(variants=6)
    images, masks, kinds = augmentation.variants(pictures[0], pixels, pixels[None], recipe)
    assert set(kinds) <= {0, 1, 2}
    assert masks.any((1, 2)).mean() > 0.5
    unmasked = np.where(masks > 0, 0, np.abs(images - pixels[None]))
    assert unmasked.max() <= 2 / 255 + 1e-6


def test_damaged_files_are_encoded_again(feature_cache, pictures):
    encoder.open_pool(feature_cache, pictures[:2], SYNTHESIS)
    path = encoder.variant_path(feature_cache, pictures[0], pictures[:2], SYNTHESIS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    cache.image_path(feature_cache, pictures[1]).write_bytes(b"")
    encoder.open_pool(feature_cache, pictures[:2], SYNTHESIS)
    assert path.read_bytes() == whole
    path.write_bytes(cache.image_path(feature_cache, pictures[1]).read_bytes())  # another's
    encoder.open_pool(feature_cache, pictures[:2], SYNTHESIS)
    assert path.read_bytes() == whole
    assert encoder.encode_images(feature_cache, pictures[:2]) == 0


def test_take_gives_the_rows_of_the_files(feature_cache, pictures):
    supports = pictures[:3]
    pool = encoder.open_pool(feature_cache, supports, SYNTHESIS)
    support, variant = np.array([2, 0, 2, 1]), np.array([1, -1, 0, -1])
    batch = training_pool.take(pool, support, variant)
    assert batch.label.tolist() == [1, 0, 1, 0] and batch.valid.all()
    for row, (s, v) in enumerate(zip(support, variant, strict=True)):
        clean = v < 0
        tokens = cache.load(
            cache.image_path(feature_cache, supports[s])
            if clean
            else encoder.variant_path(feature_cache, supports[s], supports, SYNTHESIS)
        )
        number = 0 if clean else v
        np.testing.assert_array_equal(batch.features.pooled[row], tokens.pooled[number])
        for own, level in zip(batch.features.levels, tokens.levels, strict=True):
            np.testing.assert_array_equal(own[row], level[number])
    pixels = dict((r.id, x) for r, x in read.read_all(supports, 32, "stretch"))
    for row in (0, 2):
        image = pixels[supports[support[row]].id]
        _, masks, _ = augmentation.variants(supports[support[row]], image, image[None], SYNTHESIS)
        np.testing.assert_array_equal(batch.mask[row], masks[variant[row]])
    assert not batch.mask[[1, 3]].any() and batch.mask[[0, 2]].any()


def test_no_variants_is_a_pool_of_clean_images(feature_cache, pictures):
    none = SYNTHESIS._replace(variants=0)
    assert encoder.encode_variants(feature_cache, pictures[:2], none) == 0
    pool = encoder.open_pool(feature_cache, pictures[:2], none)
    assert pool.anomalous == () and len(list(feature_cache.folder.iterdir())) == 2
    batch = training_pool.take(pool, np.array([0, 1]), np.array([-1, -1]))
    assert batch.label.tolist() == [0, 0] and not batch.mask.any()


@pytest.mark.parametrize("size", [20, 31])
def test_masks_come_back_from_their_bits(size):
    """Also where the number of pixels is no multiple of 8."""
    masks = np.random.default_rng(size).random((3, size, size)) > 0.7
    tensors = {
        "pooled": np.zeros((3, 4), np.float32),
        "level0": np.zeros((3, 4, 4), np.float32),
        "mask": np.packbits(masks.reshape(3, -1), axis=1),
    }
    pool = training_pool.TrainingPool(
        (tensors.__getitem__,), (tensors.__getitem__,), 1, size, 3, np.zeros((1, 3), int)
    )
    batch = training_pool.take(pool, np.zeros(4, int), np.array([2, -1, 0, 1]))
    np.testing.assert_array_equal(batch.mask[[2, 3, 0]], masks)
    assert not batch.mask[1].any()
