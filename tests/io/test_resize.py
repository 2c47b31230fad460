"""The way of images and masks into the tower frame and back."""

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip_jax.io import image, read

MODES = ("stretch", "pad")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(101, 67), (33, 90), (224, 224), (471, 562), (5, 300)])
def test_rectangle_comes_back_where_it_was(shape, mode):
    height, width = shape
    rows = slice(height // 5, height // 5 + max(3, height // 3))
    columns = slice(width // 2, width // 2 + max(3, width // 3))
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    size = 224
    back = read.to_frame(read.fit(mask.astype(np.float32), size, mode), *shape, mode) > 0.5
    nearest = read.fit_mask(mask, size, mode).astype(np.float32)
    for result in (back, read.to_frame(nearest, *shape, mode) > 0.5):
        # one tower pixel, seen in the image's frame, and half a pixel of rounding
        scale = (height / size, width / size) if mode == "stretch" else (max(shape) / size,) * 2
        for axis, edges in enumerate((rows, columns)):
            where = np.flatnonzero(result.any(axis=1 - axis))
            assert abs(where[0] - edges.start) <= scale[axis] + 0.5
            assert abs(where[-1] + 1 - edges.stop) <= scale[axis] + 0.5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(8, 64), st.sampled_from(MODES))
def test_constant_survives_both_ways(height, width, size, mode):
    fitted = read.fit(np.full((height, width), 0.7, np.float32), size, mode)
    assert fitted.shape == (size, size) and fitted.dtype == np.float32
    if mode == "stretch":
        np.testing.assert_allclose(fitted, 0.7, atol=1e-6)
    else:
        assert np.all((fitted == 0) | (np.abs(fitted - 0.7) < 1e-6))
    np.testing.assert_allclose(read.to_frame(fitted, height, width, mode), 0.7, atol=1e-6)
    mask = read.fit_mask(np.ones((height, width), bool), size, mode)
    np.testing.assert_array_equal(mask, fitted > 0)


def test_pad_keeps_the_aspect_and_stretch_does_not():
    tall = np.ones((40, 20), np.float32)
    padded = read.fit(tall, 32, "pad")
    assert padded[:, 8:24].min() > 0.999 and padded[:, :8].max() == padded[:, 24:].max() == 0
    assert read.fit(tall, 32, "stretch").min() > 0.999


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2990), st.integers(0, 1990), st.integers(1, 10), st.sampled_from(MODES))
def test_a_lesion_between_the_sampled_points_keeps_a_pixel(row, column, side, mode):
    """13 pixels of the image are one of the frame: nearest neighbour alone would lose most."""
    mask = np.zeros((3000, 2000), bool)
    mask[row : row + side, column : column + side] = True
    mask[1500:1600, 900:1000] = True  # a large one stays as it was
    alone = mask.copy()
    alone[row : row + side, column : column + side] = False
    found, large = read.fit_mask(mask, 224, mode), read.fit_mask(alone, 224, mode)
    added = np.argwhere(found & ~large)
    assert (found | large == found).all() and len(added) <= 2
    if len(added):
        top, left, rows, columns = read.box(3000, 2000, 224, mode)
        at = (added.mean(0) - (top, left) + 0.5) * (3000 / rows, 2000 / columns)
        assert abs(at - (row + side / 2, column + side / 2)).max() <= 14
    else:  # it lies on the large one
        assert alone[max(row - 14, 0) : row + 24, max(column - 14, 0) : column + 24].any()


def test_shrinking_is_antialiased():
    """Stripes of one pixel shrink to their mean, not to what the sampling grid hits."""
    stripes = np.tile(np.array([0, 1], np.float32), (64, 32))
    inner = read.fit(stripes, 8)[1:-1, 1:-1]
    np.testing.assert_allclose(inner, 0.5, atol=0.02)


def test_smooth_map_survives_the_round_trip():
    y, x = np.mgrid[0:101, 0:67]
    smooth = (np.sin(y / 20) * np.cos(x / 20)).astype(np.float32)
    for mode in MODES:
        back = read.to_frame(read.fit(smooth, 224, mode), 101, 67, mode)
        assert np.abs(back - smooth)[2:-2, 2:-2].max() < 0.01


@pytest.mark.parametrize("shape", [(64, 64), (20, 90), (90, 20), (70, 1), (1, 70)])
def test_strips_are_what_pillow_makes_at_once(shape, monkeypatch):
    """Bit for bit, whichever way Pillow turns first."""
    monkeypatch.setattr(image, "BAND", 500)
    monkeypatch.setattr(read, "BAND", 500)
    rng = np.random.default_rng(0)
    for rows, columns in ((64, 64), (100, 131), (301, 57), (90, 700), (700, 90), (9, 64)):
        for values in (rng.random(shape, np.float32), rng.integers(0, 256, shape).astype(np.uint8)):
            for how in (PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.NEAREST):
                whole = PIL.Image.fromarray(values).resize((columns, rows), how)
                np.testing.assert_array_equal(read._resize(values, rows, columns, how), whole)
