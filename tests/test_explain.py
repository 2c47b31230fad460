"""Boxes on maps whose components are known."""

import numpy as np
import pytest

from medclip_jax.explain import Box, boxes


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
