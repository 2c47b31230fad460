"""Boxes on maps whose components are known; Grad-CAM and agreement by hand."""

import numpy as np
import pytest
from scipy import stats

from medclip_jax.explain import boxes as explain_boxes
from medclip_jax.explain.boxes import Box, boxes


def test_two_squares_give_their_frames_scores_and_areas():
    map = np.zeros((20, 30), np.float32)
    map[2:5, 3:8] = 0.7
    map[10:16, 20:24] = 0.9
    found = boxes(map, 0.5)
    assert found[0] == Box(10, 20, 16, 24, pytest.approx(0.9), 24)
    assert found[1] == Box(2, 3, 5, 8, pytest.approx(0.7), 15)
    assert len(found) == 2


def test_score_is_of_the_component_only_as_max_or_mean():
    map = np.full((8, 8), 0.1, np.float32)
    map[1, 1:5] = (0.6, 0.8, 1.0, 0.6)  # an L: the box also holds pixels outside the component
    map[2:4, 1] = 0.6
    assert boxes(map, 0.5)[0] == Box(1, 1, 4, 5, 1.0, 6)
    assert boxes(map, 0.5, scores="mean")[0].score == pytest.approx((0.6 * 4 + 0.8 + 1.0) / 6)


def test_mean_and_max_order_differently():
    map = np.zeros((9, 9), np.float32)
    map[0, 0:2] = (0.95, 0.55)
    map[5, 5:7] = 0.8
    assert [b.row0 for b in boxes(map, 0.5, scores="max")] == [0, 5]
    assert [b.row0 for b in boxes(map, 0.5, scores="mean")] == [5, 0]


def test_diagonal_neighbours_are_one_component():
    assert boxes(np.eye(4, dtype=np.float32), 0.5) == [Box(0, 0, 4, 4, 1.0, 4)]


def test_threshold_is_strict_and_small_components_drop():
    map = np.zeros((6, 6), np.float32)
    map[0, 0] = 0.5
    map[3, 3] = 0.6
    map[5, 0:2] = 0.55
    assert [b.area for b in boxes(map, 0.5)] == [1, 2]
    assert [b.area for b in boxes(map, 0.5, min_area=2)] == [2]


def test_at_most_n_and_ties_in_a_fixed_order():
    map = np.zeros((9, 9), np.float32)
    map[::2, ::2] = 0.75  # 25 separate pixels
    found = boxes(map, 0.5, n=7)
    assert len(found) == 7
    assert [(b.row0, b.col0) for b in found[:6]] == [(0, 0), (0, 2), (0, 4), (0, 6), (0, 8), (2, 0)]


def test_nothing_marked_and_half_precision_and_nan():
    assert boxes(np.zeros((4, 4), np.float32), 0.5) == []
    map = np.full((40, 60), 0.75, np.float16)
    assert boxes(map, 0.5, scores="mean") == [Box(0, 0, 40, 60, 0.75, 2400)]
    assert boxes(np.full((4, 4), np.nan, np.float32), 0.5) == []


def test_unknown_score_is_refused():
    with pytest.raises(Exception, match="median"):
        boxes(np.ones((4, 4), np.float32), 0.5, scores="median")


# --- Grad-CAM: the check values of PEERS 6.2 ------------------------------------------------------

A = np.array([[[1.0, 0], [0, 2], [0, 2], [1, 0]]])  # two channels on 2 x 2: A1, A2
G = np.tile(np.array([0.25, -0.25]), (1, 4, 1))  # of mean A1 - mean A2


def test_grad_cam_check_value():
    weights, raw = explain_boxes.grad_cam(A, G)
    np.testing.assert_allclose(weights, [[0.25, -0.25]])
    np.testing.assert_allclose(np.maximum(raw, 0), [[0.25, 0, 0, 0.25]])


def test_grad_cam_pp_check_value():
    weights, raw = explain_boxes.grad_cam_pp(A, G)
    np.testing.assert_allclose(weights, [[0.3999974, 0]], atol=5e-8)
    np.testing.assert_allclose(raw, [[0.3999974, 0, 0, 0.3999974]], atol=5e-8)


def test_maps_without_anything_positive_are_zero():
    flat = explain_boxes.unit(np.array([[-1.0, -2.0], [0.5, 0.5], [1.0, 3.0]]))
    np.testing.assert_allclose(flat, [[0, 0], [0, 0], [0, 1]], atol=1e-7)


def test_resizing_has_pixel_centres_at_halves():
    row = explain_boxes.to_square(np.array([[0.0, 1, 0, 1]]), 4)[0, 0]
    np.testing.assert_allclose(row, [0, 0.25, 0.75, 1])
    np.testing.assert_allclose(
        explain_boxes.to_square(np.array([[0.7]]), 3), np.full((1, 3, 3), 0.7)
    )


def test_a_gradient_of_zero_is_explained():
    explain_boxes.check_gradient(G, "block 6")
    with pytest.raises(explain_boxes.NoGradientError, match="block 6 is exactly 0.*first norm"):
        explain_boxes.check_gradient(0 * G, "block 6")


# --- agreement ------------------------------------------------------------------------------------


def test_pointing_game_by_hand():
    maps, masks = np.zeros((4, 4, 4)), np.zeros((4, 4, 4), bool)
    masks[:3, 1:3, 1:3] = True  # the fourth has no mask and is left out
    maps[0, 1, 1] = 1  # a hit
    maps[1, 0, 0] = 1  # a miss, but next to the mask
    maps[2, 1, 1] = maps[2, 3, 3] = 1  # half of the largest values
    assert explain_boxes.pointing_game(maps, masks) == pytest.approx((0.5, 0.25))
    hit, chance = explain_boxes.pointing_game(maps, masks, tolerance=1)
    assert (hit, chance) == pytest.approx((1.0, 1.0))
    assert np.isnan(explain_boxes.pointing_game(maps[3:], masks[3:])).all()


def test_deletion_falls_fastest_along_the_true_importance():
    rng = np.random.default_rng(0)
    tokens, healthy, weight = rng.random((16, 3)) + 1, np.zeros((16, 3)), rng.random(16)

    def score(x):
        return weight @ x.sum(1)

    part = weight * tokens.sum(1)
    best = explain_boxes.deletion(score, tokens, healthy, part, steps=4)
    wanted = [part.sum() - np.sort(part)[::-1][:n].sum() for n in (0, 4, 8, 12, 16)]
    np.testing.assert_allclose(best, wanted, atol=1e-12)
    worst = explain_boxes.deletion(score, tokens, healthy, -part, steps=4)
    assert best.mean() < worst.mean() and best[-1] == worst[-1]


def test_agreement_is_spearman():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, (3, 20)), rng.random((3, 20))
    wanted = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(explain_boxes.agreement(a, b), wanted)
    assert np.isnan(explain_boxes.agreement(np.zeros((1, 4)), b[:1, :4])).all()
