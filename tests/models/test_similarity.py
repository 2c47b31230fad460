"""Scoring against hand values, numpy and the definitions."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from medclip_jax.detectors import memory_bank
from medclip_jax.models import similarity
from medclip_jax.models.similarity import Text


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_cosine_is_numpy():
    v, t = draw(2, 5, 7), draw(3, 7, seed=1)
    norms = np.linalg.norm(v, axis=-1)[..., None] * np.linalg.norm(t, axis=-1)
    np.testing.assert_allclose(similarity.cosine(v, t), v @ t.T / norms, atol=1e-6)


def test_unit_keeps_zero_and_survives_its_gradient():
    import jax

    np.testing.assert_array_equal(similarity.unit(jnp.zeros((2, 3))), 0)
    np.testing.assert_allclose(similarity.unit(jnp.array([3e-6, 4e-6])), [0.6, 0.8], rtol=1e-5)
    grad = jax.grad(lambda x: similarity.unit(x).sum())(jnp.zeros(3))
    assert np.isfinite(grad).all()


def test_class_features_are_plain_means():
    text = jnp.array([[2.0, 0], [0, 4], [1, 1]])
    np.testing.assert_array_equal(
        similarity.class_features(Text(text, np.array([0, 1, 0]))), [[1.5, 0.5], [0, 4]]
    )


def test_patch_logit_by_hand():
    levels = (jnp.array([[[1.0, 0], [0, 2]]]), jnp.array([[[0.0, 1], [0, 1]]]))
    text, label = jnp.array([[1.0, 0], [0, 3], [-1, 0]]), np.array([0, 1, 0])
    params = {"scale": jnp.log(0.5), "offset": jnp.asarray(0.25)}

    def logit(form, text, **more):
        return similarity.AnomalyLogit(form).apply({"params": params}, levels, text, **more)

    got = logit("softmax", Text(text[:2], label[:2]))
    # similarities to (healthy, abnormal): level 1 (1, 0), (0, 1); level 2 (0, 1), (0, 1)
    np.testing.assert_allclose(got, [[0.0, 0.5]], atol=1e-7)
    whole = Text(text, label)
    got = logit("distance", whole)
    # nearest healthy prompt: level 1 at 1, 0; level 2 at 0, 0
    np.testing.assert_allclose(got, [[0.5 * (0.5 - 0.25), 0.5 * (1 - 0.25)]], atol=1e-7)
    for form in similarity.FORMS:  # from cosines that are there already
        cosines = similarity.mean_cosine(levels, whole)
        same = logit(form, whole, cosines=cosines, method="from_cosines")
        np.testing.assert_allclose(same, logit(form, whole), atol=1e-6)


def test_text_of_each_image_and_fillers_equal_the_plain_form():
    """Each image's own text, one row of which only fills the shape, is as one text for all."""
    levels = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    text, label = draw(4, 5, seed=2), np.array([0, 0, 1, 1])
    real = np.array([True, True, True, False])
    plain = Text(text[:3], label[:3])
    own = Text(jnp.broadcast_to(text, (3, 4, 5)), label, jnp.broadcast_to(real, (3, 4)))
    for filled in (Text(text, label, jnp.asarray(real)), own):
        cosines = similarity.mean_cosine(levels, filled)
        np.testing.assert_allclose(
            cosines[..., :3], similarity.mean_cosine(levels, plain), atol=1e-6
        )
        assert (cosines[..., 3] == similarity.NEVER).all()
        for form in similarity.FORMS:
            params = {"scale": jnp.zeros(()), "offset": jnp.asarray(0.5)}
            run = partial(similarity.AnomalyLogit(form).apply, {"params": params}, levels)
            np.testing.assert_allclose(run(filled), run(plain), atol=1e-6)
            again = run(filled, cosines, method="from_cosines")
            np.testing.assert_allclose(again, run(plain), atol=1e-6)


# --- similar patches ---------------------------------------------------------------------------


def test_affinity_by_hand():
    tokens, width = np.asarray(draw(2, 9, 5, seed=3)), 0.7
    got = similarity.affinity(jnp.asarray(tokens), width)
    for image, weights in zip(tokens.astype(np.float64), got, strict=True):
        rows = image - image.mean(0)
        rows /= np.linalg.norm(rows, axis=1)[:, None]
        cosine = np.array([[a @ b for b in rows] for a in rows])
        wanted = np.exp(cosine / (width * cosine.std()))
        np.testing.assert_allclose(weights, wanted / wanted.sum(1)[:, None], rtol=1e-4)
    scaled = similarity.affinity(jnp.asarray(3 * tokens + 1), width)  # of another backbone
    np.testing.assert_allclose(scaled, got, atol=1e-5)


def test_affinity_of_equal_patches_is_their_mean_and_of_two_kinds_keeps_them_apart():
    np.testing.assert_allclose(similarity.affinity(jnp.ones((1, 4, 3)), 0.4), 0.25)
    two = jnp.asarray([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]])
    across = np.exp(-2 / 0.4)  # cosines 1 and -1, of deviation 1
    near, far = 0.5 / (1 + across), 0.5 * across / (1 + across)
    wanted = np.kron([[near, far], [far, near]], np.ones((2, 2)))
    np.testing.assert_allclose(similarity.affinity(two, 0.4)[0], wanted, rtol=1e-5)


# --- patches to pixels ----------------------------------------------------------------------------


def test_interpolation_by_hand():
    corners = partial(similarity.interpolation, corners=True)
    quarters = [[1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(corners(2, 5), quarters)
    np.testing.assert_array_equal(corners(3, 1), [[1, 0, 0]])
    centres = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]  # pixels at 1/4, ... of a patch
    np.testing.assert_allclose(similarity.interpolation(2, 4), centres)
    for weights in (corners, similarity.interpolation):
        np.testing.assert_array_equal(weights(3, 3), np.eye(3))
        np.testing.assert_array_equal(weights(1, 4), np.ones((4, 1)))


@pytest.mark.parametrize("patches, pixels", [(7, 112), (14, 224), (3, 10), (16, 30)])
def test_interpolation_has_aligned_corners(patches, pixels):
    """Output i reads source coordinate i (p - 1) / (s - 1): any piecewise linear line is kept."""
    line = draw(patches, seed=patches)
    at = np.arange(pixels) * (patches - 1) / (pixels - 1)
    np.testing.assert_allclose(
        similarity.interpolation(patches, pixels, corners=True) @ line,
        np.interp(at, np.arange(patches), line),
        atol=2e-6,
    )


@pytest.mark.parametrize("patches, side", [(7, 16), (14, 16), (3, 5)])
def test_what_a_patch_shows_stays_where_it_is(patches, side):
    """As scipy zooms pixels that have an area; odd patches have their value in their middle."""
    line = draw(patches, seed=patches)
    pixels = similarity.interpolation(patches, patches * side) @ line
    zoomed = ndimage.zoom(line, side, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(pixels, zoomed, atol=2e-6)
    if side % 2:
        np.testing.assert_allclose(pixels.reshape(patches, side)[:, side // 2], line, atol=2e-6)


def test_constants_and_ramps_come_out_exactly():
    np.testing.assert_allclose(similarity.to_pixels(jnp.full((2, 16), 3.5), 30), 3.5, rtol=1e-6)
    row, column = np.mgrid[:4, :4] / 3
    ramp = jnp.asarray((2 * row - column).reshape(1, 16), jnp.float32)
    row, column = np.mgrid[:31, :31] / 30
    pixels = similarity.to_pixels(ramp, 31, corners=True)[0]
    np.testing.assert_allclose(pixels, 2 * row - column, atol=1e-6)


def test_patches_are_row_major():
    patch = jnp.zeros((1, 9)).at[0, 2].set(1.0)  # first row, last column
    largest = np.argmax(similarity.to_pixels(patch, 12)[0])
    assert [x // 4 for x in np.unravel_index(largest, (12, 12))] == [0, 2]


@pytest.mark.parametrize(
    "top, wanted", [(0.0, 9), (0.05, 9), (0.2, 8.5), (0.3, 8), (1.0, 4.5), (0.24, 8.5)]
)
def test_image_score_is_the_mean_of_the_largest_share(top, wanted):
    values = jnp.asarray(np.random.default_rng(0).permutation(10)[None], jnp.float32)
    np.testing.assert_allclose(similarity.image_score(values, top), [wanted])


# --- memory ---------------------------------------------------------------------------------------


def test_memory_distance_is_brute_force():
    levels, memory = (
        (draw(2, 4, 5), draw(2, 4, 3, seed=1)),
        (draw(6, 5, seed=2), draw(7, 3, seed=3)),
    )

    def unit(x):
        return x / np.linalg.norm(x)

    wanted = [
        [
            np.mean(
                [
                    min(1 - unit(level[i, j]) @ unit(m) for m in stored)
                    for level, stored in zip(levels, memory, strict=True)
                ]
            )
            for j in range(4)
        ]
        for i in range(2)
    ]
    np.testing.assert_allclose(memory_bank.memory_distance(levels, memory), wanted, atol=1e-6)


def test_a_patch_of_the_memory_is_at_distance_zero():
    memory = draw(6, 5)
    got = memory_bank.memory_distance((3 * memory[None, :2],), (memory,))
    np.testing.assert_allclose(got, 0, atol=1e-6)
    opposite = memory_bank.memory_distance((-memory[None, :1],), (memory[:1],))
    np.testing.assert_allclose(opposite, 2, atol=1e-6)


def test_neighbourhood_by_hand():
    grid = jnp.arange(9.0).reshape(1, 9, 1)
    got = np.asarray(memory_bank.neighbourhood(grid)).reshape(3, 3)
    assert got[0, 0] == np.mean([0, 1, 3, 4])
    assert got[0, 1] == np.mean([0, 1, 2, 3, 4, 5])
    assert got[1, 1] == 4
    assert got[2, 2] == np.mean([4, 5, 7, 8])
    np.testing.assert_array_equal(memory_bank.neighbourhood(jnp.full((2, 1, 3), 7.0)), 7)


def test_neighbourhood_mixes_neither_images_nor_channels():
    tokens = draw(2, 9, 3)
    both = memory_bank.neighbourhood(tokens)
    for i in range(2):
        for c in range(3):
            alone = memory_bank.neighbourhood(tokens[i : i + 1, :, c : c + 1])
            np.testing.assert_allclose(both[i, :, c], alone[0, :, 0], atol=1e-6)
