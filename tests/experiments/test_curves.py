"""Curves over draws: each against what a few images give by hand."""

import curves
import numpy as np


def draw(score, p_value=None, uncertainty=None):
    score = np.array(score, float)
    label = np.arange(len(score)) % 2  # every other image is abnormal
    given = {"p_value": p_value, "uncertainty": uncertainty}
    rest = {n: np.array([0.5] * len(score) if v is None else v) for n, v in given.items()}
    return {"label": label, "score": score} | rest


def test_recall_is_the_roc_at_every_false_positive_rate():
    found = curves.recall(draw([0.1, 0.9, 0.2, 0.8]))
    np.testing.assert_array_equal(found, 1)  # in order
    found = curves.recall(draw([0.5, 0.5, 0.5, 0.5]))
    np.testing.assert_allclose(found, curves.GRID)  # ties are chance


def test_errors_are_counted_from_the_most_certain_on():
    # wrong: the second image (abnormal, below 0.5), the least certain but one
    one = draw([0.1, 0.4, 0.2, 0.9], uncertainty=[0.0, 0.3, 0.1, 0.4])
    found = curves.errors(one, curves.spread(one))
    at = dict(zip(np.round(curves.COVERAGE, 2).tolist(), found.tolist(), strict=True))
    assert (at[0.25], at[0.5], at[0.75], at[1.0]) == (0, 0, 1 / 3, 1 / 4)
    assert curves.errors(one, curves.nearness(one))[0] == 0


def test_every_chart_is_made_and_differs_by_data():
    rng = np.random.default_rng(0)
    draws = [draw(rng.random(40), rng.integers(1, 6, 40) / 5, rng.random(40)) for _ in range(3)]
    made = curves.drawn("busi", {"ours": draws, "memory": draws[:1]}, 4)
    kinds = ("roc", "scores", "calibration", "risk")
    assert list(made) == [f"busi-k4-{kind}.png" for kind in kinds]
    assert all(chart.startswith(b"\x89PNG") for chart in made.values())
    assert set(curves.drawn("busi", {"memory": draws}, 4)) == {"busi-k4-roc.png"}
    assert (
        curves.drawn("busi", {"ours": draws[:2]}, 4)["busi-k4-risk.png"] != made["busi-k4-risk.png"]
    )
