"""Augmentation: keys decide, strength 0 changes nothing."""

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax import config, config_validation, stored
from medclip_jax.data import augmentation
from medclip_jax.data.augmentation import Strengths
from medclip_jax.errors import ConfigError
from medclip_jax.features import encoder, training_pool
from medclip_jax.io import read
from medclip_jax.synthesis import generate
from tests.support.pictures import SYNTHESIS

ALL = Strengths(flip=0.5, rotate=30, elastic=0.01, intensity=0.2)


def texture(n: int = 1, size: int = 48) -> np.ndarray:
    rough = np.random.default_rng(n).random((n, 8, 8)).astype(np.float32)
    return np.asarray(jax.image.resize(rough, (n, size, size), "linear"))


def keys(n: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize("name", Strengths._fields)
def test_strength_zero_is_the_identity(name):
    image = jnp.asarray(texture()[0])
    for strengths in (Strengths(), Strengths(**{name: 0.0})):
        new = augmentation.sample(jax.random.key(1), image, strengths)
        np.testing.assert_array_equal(new, image)
    weak = Strengths(**{name: 1e-6})  # and no jump on the way there
    near = augmentation.sample(jax.random.key(1), image, weak)
    np.testing.assert_allclose(near, image, atol=1e-4)


def test_the_key_decides_and_the_batch_does_not():
    images = texture(19)
    new = augmentation.batch(keys(19), images, ALL)
    np.testing.assert_array_equal(new[5:7], augmentation.batch(keys(19)[5:7], images[5:7], ALL))
    other = augmentation.batch(keys(19, 1), images, ALL)
    assert all(np.abs(a - b).max() > 0.01 for a, b in zip(new, other, strict=True))
    assert all(np.abs(a - b).max() > 0.05 for a, b in zip(new, images, strict=True))
    assert new.dtype == np.float32 and new.min() >= 0 and new.max() <= 1
    alone = augmentation.sample(keys(19)[3], jnp.asarray(images[3]), ALL)
    np.testing.assert_allclose(alone, new[3], atol=2e-5)


def test_each_change_has_its_own_random_stream():
    """Intensity on top leaves the geometry as it was: the order of pixels along a ramp."""
    ramp = np.tile(np.linspace(0.2, 0.8, 48, dtype=np.float32), (4, 48, 1))
    plain = augmentation.batch(keys(4), ramp, ALL._replace(intensity=0.0, elastic=0.0))
    both = augmentation.batch(keys(4), ramp, ALL._replace(intensity=0.01, elastic=0.0))
    np.testing.assert_allclose(plain, both, atol=0.03)


def test_flips_and_turns_do_as_named():
    image = jnp.asarray(texture()[0])
    new = augmentation.sample(jax.random.key(0), image, Strengths(flip=1.0))
    np.testing.assert_array_equal(new, image[:, ::-1])
    turned = augmentation.rotate(image[..., None], jnp.asarray(jnp.pi / 2))[..., 0]
    np.testing.assert_allclose(turned, np.rot90(image), atol=1e-4)


def test_jitter_is_bounded():
    images = np.full((64, 16, 16), 0.5, np.float32)
    samples = augmentation.batch(keys(64), images, Strengths(intensity=0.2))
    low, high = 0.5 ** np.exp(0.2) - 0.1, 0.5 ** np.exp(-0.2) + 0.1
    assert samples.min() >= low - 1e-6 and samples.max() <= high + 1e-6
    assert samples[:, 0, 0].std() > 0.03


def test_displacements_have_the_stated_size():
    """A ramp shows how far each pixel came."""
    size, strength = 96, 0.02
    ramp = jnp.broadcast_to(jnp.arange(size, dtype=jnp.float32)[:, None], (size, size))[..., None]
    moved = jax.vmap(lambda k: augmentation.elastic(k, ramp, strength))(keys(24))
    inner = (moved - ramp[None])[:, 24:-24, 24:-24]  # the smoothing fades out at the edge
    assert 0.8 < float(inner.std()) / (strength * size) < 1.2


@pytest.mark.parametrize("shape", [(64, 48), (20, 30)])
def test_displacements_are_those_of_the_library(shape):
    key, pixels = jax.random.key(5), jax.random.uniform(jax.random.key(1), (*shape, 1))
    sigma = max(1.0, max(shape) / 16)
    alpha = 0.01 * max(shape) * 3**0.5 * 2 * np.pi**0.5 * sigma
    expected = dm_pix.elastic_deformation(key, pixels, alpha, sigma, mode="mirror")
    np.testing.assert_allclose(augmentation.elastic(key, pixels, 0.01), expected, atol=1e-4)


@pytest.mark.parametrize(
    "modality, allowed",
    [("breast ultrasound", True), ("Sonography", True), ("brain MRI", True), ("T2 MR image", True)]
    + [("chest X-ray", False), ("mammography", False), ("CT", False), ("mri-like tumri", True)]
    + [("tumritis film", False), ("medical image", False)],
)
def test_only_ultrasound_and_mri_are_deformed(modality, allowed):
    fields = {"elastic": 0.01, "flip": 0.5}
    assert augmentation.chosen({"flip": 0.5}, modality) == (8, Strengths(flip=0.5))
    if allowed:
        assert augmentation.chosen(fields, modality) == (8, Strengths(flip=0.5, elastic=0.01))
    else:
        with pytest.raises(ConfigError, match="config.augment.elastic is 0.01 but .*modality"):
            augmentation.chosen(fields, modality)


def test_off_by_default_and_bad_strengths_are_refused():
    assert augmentation.chosen({}, "chest X-ray") == (0, Strengths())
    assert set(config_validation.AUGMENT) == set(Strengths._fields)
    c = config.base()
    for bad in ("flip=1.5", "rotate=-1", "elastic=0.5", "intensity=2"):
        c.augment = bad
        with pytest.raises(ConfigError, match="config.augment"):
            config.resolve(c)


# --- in the feature cache -------------------------------------------------------------------------


def test_copies_are_clean_rows_behind_the_variants(feature_cache, pictures):  # noqa: F811
    recipe = SYNTHESIS._replace(variants=5, copies=2, strengths=ALL)
    pool = encoder.open_pool(feature_cache, pictures[:2], recipe)
    assert pool.copies == 2 and pool.kinds.shape == (2, 5)
    support, variant = np.array([0, 0, 1, 1]), np.array([-1, -2, -3, 4])
    batch = training_pool.take(pool, support, variant)
    assert batch.label.tolist() == [0, 0, 0, 1] and not batch.mask[:3].any()
    name = int(pictures[1].sha256[:16], 16)
    pixels = dict(read.read_all(pictures[:2], feature_cache.clip.size))
    bases = augmentation.copies(0, name, pixels[pictures[1]], 2, ALL)
    wanted = encoder.encode(feature_cache, bases)
    np.testing.assert_allclose(batch.features.pooled[2], wanted.pooled[2], atol=1e-5)
    images, masks, _ = augmentation.variants(
        pictures[1], pixels[pictures[1]], np.stack(list(pixels.values())), recipe
    )
    # variant v is made of base v mod 3, so it differs from it only where the mask says
    unmasked = np.where(masks[:5] > 0, 0, np.abs(images[:5] - bases[np.arange(5) % 3]))
    assert unmasked.max() <= 2 / 255 + 1e-6
    # and nothing is encoded twice
    assert encoder.encode_variants(feature_cache, pictures[:2], recipe) == 0


@pytest.mark.parametrize("preset", generate.PRESETS)
def test_variants_are_of_the_kinds_of_the_preset_equally_often(preset, pictures):  # noqa: F811
    recipe = augmentation.Synthesis(preset, 3000, 0, "self")
    kinds, _ = augmentation.drawn_kinds(pictures[0], recipe)
    named = [generate.KINDS[kind] for kind in kinds]
    shares = [named.count(kind) / 3000 for kind in generate.PRESETS[preset]]
    assert sum(shares) == pytest.approx(1) and np.ptp(shares) < 0.08


def test_augmentation_is_in_the_name_and_off_is_not(feature_cache, pictures):  # noqa: F811
    on = SYNTHESIS._replace(copies=2, strengths=ALL)
    recipes = [SYNTHESIS, on, on._replace(copies=3), on._replace(strengths=ALL._replace(flip=0.1))]
    names = [
        encoder.variant_path(feature_cache, pictures[0], pictures[:2], r).name for r in recipes
    ]
    assert len(set(names)) == 4
    sha = pictures[0].sha256
    plain = stored.digest([generate.VERSION["medclip"], ("medclip", 2, 0, "self"), []])
    assert names[0] == f"{sha}-{plain}.safetensors"  # as before there was augmentation
