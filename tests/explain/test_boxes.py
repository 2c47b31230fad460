"""Boxes on maps whose components are known; Grad-CAM and agreement by hand."""

import numpy as np
import pytest
from scipy import ndimage

from medclip_jax.explain import grad_cam
from medclip_jax.explain.boxes import MOST, SMALLEST, Box, boxes_of, decided
from medclip_jax.io import read


def test_components_give_their_frames_largest_scores_and_areas():
    map = np.full((20, 30), 0.1, np.float32)
    map[2:5, 3:8] = 0.7
    map[10:12, 20:24] = map[12:16, 20:21] = 0.9  # an L: its box also holds pixels outside of it
    map[15, 29] = map[14, 28] = 0.5  # diagonal neighbours, exactly on the threshold
    assert boxes_of(map) == [
        Box(10, 20, 16, 24, pytest.approx(0.9), 12),
        Box(2, 3, 5, 8, pytest.approx(0.7), 15),
        Box(14, 28, 16, 30, 0.5, 2),
    ]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scores_are_those_that_scipy_measures(dtype):
    noise = ndimage.gaussian_filter(np.random.default_rng(0).random((60, 70)), 3)
    map = (0.8 * (noise - noise.min()) / np.ptp(noise)).astype(dtype)
    labels, count = ndimage.label(map >= 0.5, np.ones((3, 3)))
    index = [i for i in range(1, count + 1) if (labels == i).sum() >= map.size // SMALLEST]
    wide = map.astype(np.float32)
    wanted = sorted(ndimage.maximum(wide, labels, index).tolist(), reverse=True)
    assert count > 3 and [box.score for box in boxes_of(map)] == wanted[:MOST]


def test_small_components_drop_as_the_image_grows():
    map = np.zeros((60, 100), np.float32)  # 6,000 pixels: three make a box
    map[3, 3:5] = 0.9
    map[9, 3:6] = 0.6
    assert [box.area for box in boxes_of(map)] == [3]


def test_more_components_than_16_bits_can_number():
    map = np.zeros((520, 520), np.float32)
    map[::2, ::2] = 0.7
    map[100:120, 200:230] = 0.9
    assert boxes_of(map) == [Box(100, 200, 121, 231, np.float32(0.9), 626)]


def test_ties_in_a_fixed_order_and_no_more_than_the_most():
    map = np.zeros((9, 9), np.float32)
    map[::2, ::2] = 0.75  # 25 separate pixels
    boxes = boxes_of(map)
    assert len(boxes) == MOST
    assert [(b.row0, b.col0) for b in boxes[:6]] == [(0, 0), (0, 2), (0, 4), (0, 6), (0, 8), (2, 0)]


def test_nothing_marked_and_half_precision_and_nan():
    assert boxes_of(np.full((4, 4), np.nextafter(np.float32(0.5), np.float32(0)))) == []
    assert boxes_of(np.full((40, 60), 0.75, np.float16)) == [Box(0, 0, 40, 60, 0.75, 2400)]
    assert boxes_of(np.full((4, 4), np.nan, np.float32)) == []


def test_an_alarm_has_a_box_and_what_passed_has_none_unless_asked():
    map = np.full((20, 50), 0.1, np.float32)  # 1,000 pixels: the ten largest are the peak's
    map[4:6, 10:15] = 0.4
    map[5, 12] = 0.45
    assert decided(map, alarm=True) == [Box(4, 10, 6, 15, pytest.approx(0.45), 10)]
    assert decided(map, alarm=False) == decided(map, alarm=False, of_passed=True) == []
    map[4:6, 10:15] = 0.7
    assert decided(map, alarm=True) == decided(map, alarm=False, of_passed=True) == boxes_of(map)
    assert len(boxes_of(map)) == 1 and decided(map, alarm=False) == []


def test_an_alarm_of_specks_or_nan_alone_still_has_a_box():
    map = np.zeros((100, 100), np.float32)  # 10,000 pixels: a component of fewer than 5 is none
    map[3, 3] = 0.9
    assert boxes_of(map) == [] and decided(map, alarm=True)[0].score == pytest.approx(0.9)
    flat = np.full((4, 4), np.nan, np.float32)
    assert decided(flat, alarm=True) == [Box(0, 0, 4, 4, -1.0, 16)]


# --- Grad-CAM: check values by hand ---------------------------------------------------------------

A = np.array([[[1.0, 0], [0, 2], [0, 2], [1, 0]]])  # two channels on 2 x 2: A1, A2
G = np.tile(np.array([0.25, -0.25]), (1, 4, 1))  # of mean A1 - mean A2


def test_grad_cam_check_value():
    weights, raw = grad_cam.grad_cam(A, G)
    np.testing.assert_allclose(weights, [[0.25, -0.25]])
    np.testing.assert_allclose(np.maximum(raw, 0), [[0.25, 0, 0, 0.25]])


def test_grad_cam_pp_check_value():
    weights, raw = grad_cam.grad_cam_pp(A, G)
    np.testing.assert_allclose(weights, [[0.3999974, 0]], atol=5e-8)
    np.testing.assert_allclose(raw, [[0.3999974, 0, 0, 0.3999974]], atol=5e-8)


def test_maps_without_anything_positive_are_zero():
    flat = grad_cam.unit(np.array([[-1.0, -2.0], [0.5, 0.5], [1.0, 3.0]]))
    np.testing.assert_allclose(flat, [[0, 0], [0, 0], [0, 1]], atol=1e-7)


def test_resizing_has_pixel_centres_at_halves():
    row = read.to_square(np.array([[0.0, 1, 0, 1]]), 4)[0, 0]
    np.testing.assert_allclose(row, [0, 0.25, 0.75, 1])
    np.testing.assert_allclose(read.to_square(np.array([[0.7]]), 3), np.full((1, 3, 3), 0.7))
