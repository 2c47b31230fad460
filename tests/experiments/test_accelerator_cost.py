"""Operations counted by XLA against what the shapes say by hand."""

import accelerator_cost as cost
import pytest


def test_the_encoder_is_what_its_matrices_are():
    """Products alone, by hand: 2 x tokens x weights, and two of attention per block."""
    s, d = cost.PATCHES + 1, cost.WIDTH
    block = 2 * s * 12 * d * d + 2 * 2 * s * s * d
    wanted = cost.DEPTH * block + 2 * cost.PATCHES * 588 * d + 2 * d * cost.JOINT
    assert cost.encoder() == pytest.approx(wanted, rel=0.02)  # norms and softmax are the rest
    assert 160e9 < wanted < 165e9


def test_the_memory_is_one_product_per_level():
    p, d = cost.PATCHES, cost.WIDTH
    assert cost.memory_map(4) == pytest.approx(3 * 2 * p * 4 * p * d, rel=0.02)


def test_parts_follow_the_methods():
    named = {part.name: part for part in cost.parts(["memory", "grey_level"], [4], 2)}
    assert set(named) == {"image tower", "map by memory, K = 4"}
    assert named["image tower"].times == 1592 + 32 + 32 + 2 * 4
    assert named["map by memory, K = 4"].times == 1592 * 2 * 3
    assert cost.feature_cache(1000, 4) == pytest.approx(3.149, abs=1e-3)
