"""Preprocessing against the reference arrays (scikit-image, PyWavelets) and closed forms."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip_jax.data import preprocessing
from medclip_jax.errors import ConfigError
from tests.support.reference import reference_params

FILES = reference_params("preprocess_*.npz")
KINDS = ("natural", "lowcontrast", "constant")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


# --- the functions, against the peers -----------------------------------------------------------


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_zscore_is_the_reference(path, kind):
    ref = np.load(path)
    image, wanted = ref[f"{kind}_image"], ref[f"{kind}_zscore"]
    np.testing.assert_allclose(preprocessing.zscore(image), wanted, atol=1e-12)
    unit = (image / 255).astype(np.float32)  # the scale does not matter
    np.testing.assert_allclose(preprocessing.zscore(unit), wanted, atol=5e-5)


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_equalisation_is_the_reference(path, kind):
    ref = np.load(path)
    image = ref[f"{kind}_image"]
    got = preprocessing.equalize_hist(image)
    np.testing.assert_allclose(got, ref[f"{kind}_equalize_hist_skimage"], atol=1e-6)
    got = preprocessing.equalize_hist(image / 255)
    np.testing.assert_allclose(got, ref[f"{kind}_equalize_hist_skimage_float"], atol=1e-6)


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_clahe_is_the_reference(path, kind):
    ref = np.load(path)
    image = ref[f"{kind}_image"]
    wanted = ref[f"{kind}_equalize_adapthist_skimage"]
    np.testing.assert_allclose(preprocessing.clahe(image), wanted, atol=1e-6)
    small = preprocessing.clahe(image, (8, 10), 0.02)
    wanted = ref[f"{kind}_equalize_adapthist_skimage_k8x10_clip0.02"]
    np.testing.assert_allclose(small, wanted, atol=1e-6)
    if kind == "natural":  # OpenCV's is another algorithm with the same idea
        opencv = ref["natural_clahe_cv2"].ravel()
        assert np.corrcoef(preprocessing.clahe(image).ravel(), opencv)[0, 1] > 0.95


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["symmetric", "periodization"])
def test_denoising_is_the_reference(path, kind, mode):
    ref = np.load(path)
    wanted = ref[f"{kind}_wavelet_{mode}_denoised"]
    noisy = ref[f"{kind}_noisy"]
    np.testing.assert_allclose(preprocessing.wavelet_denoise(noisy, mode), wanted, atol=2e-5)
    if mode == "symmetric":
        peer = ref[f"{kind}_denoise_wavelet_skimage_visu"]
        np.testing.assert_allclose(preprocessing.wavelet_denoise(noisy), peer, atol=2e-5)


# --- closed forms and edges ---------------------------------------------------------------------


def test_unit_zscore_is_affine_within_three_deviations():
    image = noise(40, 30)
    got = preprocessing.apply(image, "zscore")
    np.testing.assert_allclose(got, 0.5 + (image - image.mean()) / image.std() / 6, atol=1e-6)
    spike = np.zeros((40, 40), np.float32)
    spike[0, 0] = 1
    assert preprocessing.apply(spike, "zscore")[0, 0] == 1


@pytest.mark.parametrize("value", [0.0, 0.3, 179 / 255, 1.0])
def test_constant_images(value):
    image = np.full((30, 41), value, np.float32)
    for step in ("equalize", "clahe"):
        np.testing.assert_array_equal(preprocessing.apply(image, step), image)
    np.testing.assert_allclose(preprocessing.apply(image, "wavelet"), image, atol=1e-6)
    np.testing.assert_array_equal(preprocessing.apply(image, "zscore"), np.full_like(image, 0.5))


@pytest.mark.parametrize("step", preprocessing.STEPS)
@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
    contrast=st.sampled_from([1.0, 0.004, 1e-6]),
)
def test_every_step_keeps_size_range_and_type(step, height, width, seed, contrast):
    image = 0.4 + contrast * (noise(height, width, seed=seed) - 0.4)
    got = preprocessing.apply(image, step)
    assert got.shape == image.shape and got.dtype == np.float32
    assert np.isfinite(got).all() and got.min() >= 0 and got.max() <= 1


def test_small_images_get_fewer_levels():
    tiny, small = noise(13, 40), noise(14, 14)
    np.testing.assert_array_equal(preprocessing.wavelet_denoise(tiny), tiny)
    np.testing.assert_array_equal(
        preprocessing.wavelet_denoise(small), preprocessing.wavelet_denoise(small, levels=1)
    )
    assert np.abs(preprocessing.wavelet_denoise(small) - small).max() > 0.01


def test_denoising_removes_noise_and_keeps_the_image():
    y, x = np.mgrid[:96, :96] / 96
    clean = (0.5 + 0.3 * np.sin(6 * x) * np.cos(4 * y)).astype(np.float32)
    noisy = clean + 0.05 * np.random.default_rng(0).standard_normal(clean.shape, np.float32)
    left = preprocessing.wavelet_denoise(noisy) - clean
    assert left.std() < 0.4 * 0.05
    stack = preprocessing.wavelet_denoise(np.stack([noisy, clean, noisy[::-1]]))
    np.testing.assert_allclose(stack[0], preprocessing.wavelet_denoise(noisy), atol=1e-6)


# --- recipes ------------------------------------------------------------------------------------


def test_recipes_are_those_of_the_method():
    assert preprocessing.steps("") == preprocessing.steps(()) == ()
    assert preprocessing.steps("ultrasound") == ("wavelet", "clahe", "zscore")
    assert preprocessing.steps("mri") == ("zscore", "wavelet")
    for name in ("xray", "mammography"):
        assert preprocessing.steps(name) == ("clahe", "zscore")
    assert all(set(r) <= set(preprocessing.STEPS) for r in preprocessing.RECIPES.values())
    assert preprocessing.steps("zscore, clahe") == preprocessing.steps(("zscore", "clahe"))


@pytest.mark.parametrize(
    "wrong", ["sharpen", "wavelet,sharpen", ("clahe", "sharpen"), "Ultrasound"]
)
def test_an_unknown_step_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"data\.recipe has .*(sharpen|Ultrasound).*wavelet"):
        preprocessing.steps(wrong)


def test_order_counts_and_is_left_to_right():
    image = noise(48, 48) ** 3
    results = {
        p: preprocessing.apply(image, p) for p in permutations(("wavelet", "clahe", "zscore"))
    }
    for one, other in permutations(results, 2):
        assert np.abs(results[one] - results[other]).max() > 1e-3
    by_hand = preprocessing.wavelet_denoise(image)
    by_hand = preprocessing.clahe(np.clip(by_hand, 0, 1)).astype(np.float32)
    by_hand = np.clip(preprocessing.zscore(by_hand), -3, 3) / 6 + 0.5
    np.testing.assert_allclose(results["wavelet", "clahe", "zscore"], by_hand, atol=1e-6)


def test_a_batch_is_one_by_one_and_an_empty_recipe_is_nothing():
    images = noise(7, 32, 32)
    got = preprocessing.batch(images, "ultrasound")
    assert got.dtype == np.float32
    for image, row in zip(images, got, strict=True):
        np.testing.assert_array_equal(row, preprocessing.apply(image, "ultrasound"))
    assert preprocessing.batch(images, "") is images
