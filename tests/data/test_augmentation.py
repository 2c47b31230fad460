"""Augmentation: mask and image move together, keys decide, strength 0 is nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax import config
from medclip_jax.data import augmentation, records, synthetic_variants
from medclip_jax.data.augmentation import Strengths
from medclip_jax.errors import ConfigError
from medclip_jax.features import cache, encoder, training_pool
from medclip_jax.synthesis import generate
from medclip_jax.training import episodes
from tests.support.pictures import SYNTHESIS

ALL = Strengths(flip=0.5, flip_vertical=0.5, rotate=30, elastic=0.01, intensity=0.2)
MOVES = {
    "flip": Strengths(flip=1.0),
    "flip_vertical": Strengths(flip_vertical=1.0),
    "rotate": Strengths(rotate=40.0),
    "elastic": Strengths(elastic=0.02),
    "all moves": ALL._replace(intensity=0.0),
}


def blob(size: int = 48) -> np.ndarray:
    """A bright ellipse away from centre and edge, as image and as mask."""
    y, x = np.mgrid[:size, :size] / size
    return (((y - 0.4) / 0.15) ** 2 + ((x - 0.6) / 0.22) ** 2 < 1).astype(np.float32)


def texture(n: int = 1, size: int = 48) -> np.ndarray:
    rough = np.random.default_rng(n).random((n, 8, 8)).astype(np.float32)
    return np.asarray(jax.image.resize(rough, (n, size, size), "linear"))


def keys(n: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize("move", MOVES)
def test_the_mask_moves_with_the_image(move):
    """Where the image is the mask, it stays so: bright where marked, dark where not."""
    n, shape = 6, blob()
    images, masks = augmentation.batch(
        keys(n), np.stack([shape] * n), np.stack([shape] * n), MOVES[move]
    )
    assert set(np.unique(masks)) == {0, 1}
    np.testing.assert_array_equal(images > 0.5, masks > 0.5)
    assert all((mask != shape).any() for mask in masks) or move == "all moves"
    assert 0.5 < masks.sum() / (n * shape.sum()) < 1.5  # nothing left the frame


@pytest.mark.parametrize("name", Strengths._fields)
def test_strength_zero_is_the_identity(name):
    image, mask = jnp.asarray(texture()[0]), jnp.asarray(blob())
    for strengths in (Strengths(), Strengths(**{name: 0.0})):
        new, moved = augmentation.sample(jax.random.key(1), image, mask, strengths)
        np.testing.assert_array_equal(new, image)
        np.testing.assert_array_equal(moved, mask)
    little = Strengths(**{name: 1e-6})  # and no jump on the way there
    near, _ = augmentation.sample(jax.random.key(1), image, mask, little)
    np.testing.assert_allclose(near, image, atol=1e-4)
    changed, _ = augmentation.batch(
        keys(8), texture(8), np.zeros((8, 48, 48)), ALL._replace(intensity=0)
    )
    assert all(np.abs(a - b).max() > 0.05 for a, b in zip(changed, texture(8), strict=True))


def test_the_key_decides_and_the_batch_does_not():
    images, masks = texture(19), np.stack([blob()] * 19)
    new, moved = augmentation.batch(keys(19), images, masks, ALL)
    again = augmentation.batch(keys(19)[5:7], images[5:7], masks[5:7], ALL)
    np.testing.assert_array_equal(new[5:7], again[0])
    np.testing.assert_array_equal(moved[5:7], again[1])
    other, _ = augmentation.batch(keys(19, 1), images, masks, ALL)
    assert all(np.abs(a - b).max() > 0.01 for a, b in zip(new, other, strict=True))
    assert new.dtype == np.float32 and new.min() >= 0 and new.max() <= 1


def test_under_jit_and_vmap_as_alone():
    images, mask = texture(3), jnp.asarray(blob())
    one = partial(augmentation.sample, mask=mask, strengths=ALL)
    together, _ = jax.jit(jax.vmap(one))(keys(3), jnp.asarray(images))
    for key, image, row in zip(keys(3), images, together, strict=True):
        np.testing.assert_allclose(one(key, jnp.asarray(image))[0], row, atol=2e-5)


def test_each_change_draws_from_its_own_stream():
    """Intensity on top leaves the geometry as it was."""
    plain = ALL._replace(intensity=0.0)
    _, without = augmentation.batch(keys(4), texture(4), np.stack([blob()] * 4), plain)
    _, with_it = augmentation.batch(keys(4), texture(4), np.stack([blob()] * 4), ALL)
    np.testing.assert_array_equal(without, with_it)


def test_flips_and_turns_are_what_they_say():
    image, mask = jnp.asarray(texture()[0]), jnp.asarray(blob())
    new, moved = augmentation.sample(jax.random.key(0), image, mask, MOVES["flip"])
    np.testing.assert_array_equal(new, image[:, ::-1])
    np.testing.assert_array_equal(moved, mask[:, ::-1])
    new, _ = augmentation.sample(jax.random.key(0), image, mask, MOVES["flip_vertical"])
    np.testing.assert_array_equal(new, image[::-1])
    turned = augmentation.rotate(jnp.asarray(image)[..., None], jnp.asarray(jnp.pi / 2))[..., 0]
    np.testing.assert_allclose(turned, np.rot90(image), atol=1e-4)


def test_jitter_is_bounded_and_leaves_the_mask():
    image = np.full((16, 16), 0.5, np.float32)
    draws, moved = augmentation.batch(
        keys(64), np.stack([image] * 64), np.ones((64, 16, 16)), MOVES_OFF
    )
    assert moved.all()
    low, high = 0.5 ** np.exp(0.2) - 0.1, 0.5 ** np.exp(-0.2) + 0.1
    assert draws.min() >= low - 1e-6 and draws.max() <= high + 1e-6
    assert draws[:, 0, 0].std() > 0.03


MOVES_OFF = Strengths(intensity=0.2)


def test_displacements_are_as_large_as_asked_for():
    """A ramp shows how far each pixel came."""
    size, strength = 96, 0.02
    ramp = jnp.broadcast_to(jnp.arange(size, dtype=jnp.float32)[:, None], (size, size))[..., None]
    moved = jax.vmap(lambda k: augmentation.elastic(k, ramp, strength))(keys(24))
    inner = (moved - ramp[None])[:, 24:-24, 24:-24]  # the smoothing fades out at the edge
    assert 0.8 < float(inner.std()) / (strength * size) < 1.2


@pytest.mark.parametrize(
    "modality, allowed",
    [("breast ultrasound", True), ("Sonography", True), ("brain MRI", True), ("T2 MR image", True)]
    + [("chest X-ray", False), ("mammography", False), ("CT", False), ("mri-like tumri", True)]
    + [("tumritis film", False), ("medical image", False)],
)
def test_only_ultrasound_and_mri_are_deformed(modality, allowed):
    fields = {"copies": 2, "elastic": 0.01, "flip": 0.5}
    augmentation.permitted(Strengths(flip=0.5, rotate=10, intensity=0.1), modality)
    if allowed:
        assert augmentation.chosen(fields, modality) == (2, Strengths(flip=0.5, elastic=0.01))
    else:
        with pytest.raises(ConfigError, match="config.augment.elastic is 0.01 but .*modality"):
            augmentation.chosen(fields, modality)


def test_off_by_default_and_bad_strengths_are_refused():
    c = config.base()
    assert augmentation.chosen(c.augment, "chest X-ray") == (0, Strengths())
    assert set(c.augment) == {"copies", *Strengths._fields}
    for name, bad in (("flip", 1.5), ("rotate", -1.0), ("elastic", 0.5), ("intensity", 2.0)):
        with c.unlocked():
            wrong = config.base()
            wrong.augment[name] = bad
        with pytest.raises(ConfigError, match=f"config.augment.{name} is {bad}"):
            config.resolve(wrong)


# --- in the feature cache -------------------------------------------------------------------------


def test_copies_are_clean_rows_behind_the_variants(feature_cache, pictures):  # noqa: F811
    recipe = SYNTHESIS._replace(variants=5, copies=2, strengths=ALL)
    pool = training_pool.open(feature_cache, pictures[:2], recipe)
    assert pool.copies == 2 and pool.kinds.shape == (2, 5)
    support, variant = np.array([0, 0, 1, 1]), np.array([-1, -2, -3, 4])
    batch = training_pool.take(pool, support, variant)
    assert batch.label.tolist() == [0, 0, 0, 1] and not batch.mask[:3].any()
    name = int(pictures[1].sha256[:16], 16)
    pixels = dict(records.read_all(pictures[:2], feature_cache.clip.size))
    bases = augmentation.copies(0, name, pixels[pictures[1]], 2, ALL)
    wanted = encoder.encode(feature_cache, bases)
    np.testing.assert_allclose(batch.features.pooled[2], wanted.pooled[2], atol=1e-5)
    images, masks, _ = synthetic_variants.variants(
        pictures[1], pixels[pictures[1]], np.stack(list(pixels.values())), recipe
    )
    # variant v is made of base v mod 3, so it differs from it only where the mask says
    unmasked = np.where(masks[:5] > 0, 0, np.abs(images[:5] - bases[np.arange(5) % 3]))
    assert unmasked.max() <= 2 / 255 + 1e-6
    # and nothing is encoded twice
    assert training_pool.encode_variants(feature_cache, pictures[:2], recipe) == 0


def test_augmentation_is_in_the_name_and_off_is_not(feature_cache, pictures):  # noqa: F811
    on = SYNTHESIS._replace(copies=2, strengths=ALL)
    recipes = [SYNTHESIS, on, on._replace(copies=3), on._replace(strengths=ALL._replace(flip=0.1))]
    names = [
        training_pool.variant_path(feature_cache, pictures[0], pictures[:2], r).name
        for r in recipes
    ]
    assert len(set(names)) == 4
    sha = pictures[0].sha256
    plain = cache.digest(generate.VERSION, ("medclip", 2, 0, "self"), [])
    assert names[0] == f"{sha}-{plain}.safetensors"  # as before there was augmentation


def test_clean_rows_take_turns_and_episodes_draw():
    from medclip_jax.training import step as training_step

    own = np.arange(4)
    rows = [training_batches.joint_rows(step, own, 4, 0, 10, 2) for step in range(60)]
    plain = [training_batches.joint_rows(step, own, 4, 0, 10) for step in range(60)]
    clean = np.concatenate([v for _, v in rows])
    assert set(clean[clean < 0]) == {-1, -2, -3}
    for (s, v), (s0, v0) in zip(rows, plain, strict=True):
        np.testing.assert_array_equal(s, s0)
        np.testing.assert_array_equal(np.maximum(v, -1), v0)
    kinds = np.tile(np.arange(12) % 3, (4, 1))
    sizes = dict(tasks=8, k=4, shots=4, query=4)
    off = episodes.sample(3, 0, [own], kinds, **sizes)
    on = episodes.sample(3, 0, [own], kinds, **sizes, copies=2)
    for a, b in zip((off.support, off.query), (on.support, on.query), strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.variant, np.maximum(b.variant, -1))
    assert set(on.query.variant[on.query.variant < 0]) == {-1, -2, -3}
