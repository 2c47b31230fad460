"""Curves over support draws, for reproduce.py: ROC, calibration, score histograms, risk-coverage.

A draw gives a curve; lines are means over draws and bands their 95% t intervals, point by point.
They say how results vary with the supports, nothing of other test images.
"""

from collections.abc import Mapping, Sequence

import compare
import numpy as np
from sklearn.metrics import roc_curve

from medclip_jax.report import figures

GRID = np.linspace(0, 1, 101)
COVERAGE = np.linspace(0.1, 1, 91)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4d4d4d", "#000000")
LINES = ("-", "--", "-.", ":")
Draws = Mapping[str, Sequence[Mapping[str, np.ndarray]]]  # method -> arrays of each draw


def drawn(name: str, methods: Draws, k: int) -> dict[str, bytes]:
    """File name -> PNG, of one data set and K; figures of decisions are of `ours` alone."""
    made = {f"{name}-k{k}-roc.png": roc(methods)}
    if own := methods.get("ours"):
        together = (np.concatenate([draw[part] for draw in own]) for part in ("label", "score"))
        made |= {
            f"{name}-k{k}-scores.png": figures.scores(*together),
            f"{name}-k{k}-calibration.png": calibration(own, k),
            f"{name}-k{k}-risk.png": risk(own),
        }
    return made


def roc(methods: Draws) -> bytes:
    """Recall at every false-positive rate, a line for each method."""
    figure, axes = figures.chart("false-positive rate (1 − specificity)", "recall")
    axes.plot([0, 1], [0, 1], color=figures.NEUTRAL, lw=1, ls=":")
    for i, (method, draws) in enumerate(methods.items()):
        line(axes, GRID, [recall(draw) for draw in draws], method, i)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    return figures.png(figure)


def recall(draw: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of one draw, at every false-positive rate of GRID."""
    fpr, tpr, _ = roc_curve(draw["label"], draw["score"], drop_intermediate=False)
    return np.interp(GRID, fpr, tpr)


def calibration(draws: Sequence[Mapping[str, np.ndarray]], k: int) -> bytes:
    """Share of healthy test images at or below every p-value that K supports can give."""
    levels = np.arange(k + 2) / (k + 1)
    observed = [
        [(draw["p_value"][draw["label"] == 0] <= level + 1e-9).mean() for level in levels]
        for draw in draws
    ]
    figure, axes = figures.chart("level: expected false-alarm rate", "observed on healthy images")
    axes.plot([0, 1], [0, 1], color=figures.NEUTRAL, lw=1, ls=":", label="exact")
    line(axes, levels, observed, "ours", 0)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    return figures.png(figure)


def risk(draws: Sequence[Mapping[str, np.ndarray]]) -> bytes:
    """Error rate among the images that are decided, most certain first."""
    figure, axes = figures.chart("coverage: share of images decided", "error rate among them")
    for i, (name, doubt) in enumerate(
        (("MC-dropout", spread), ("nearness to threshold", nearness))
    ):
        line(axes, COVERAGE, [errors(draw, doubt(draw)) for draw in draws], name, i)
    axes.set(xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", fontsize=9, frameon=False)
    return figures.png(figure)


def spread(draw: Mapping[str, np.ndarray]) -> np.ndarray:
    return draw["uncertainty"]


def nearness(draw: Mapping[str, np.ndarray]) -> np.ndarray:
    return -np.abs(draw["score"] - 0.5)


def errors(draw: Mapping[str, np.ndarray], doubt: np.ndarray) -> np.ndarray:
    """Of one draw, at every share of COVERAGE; images of equal doubt in the order of their ids."""
    wrong = ((draw["score"] > 0.5) != (draw["label"] == 1))[np.argsort(doubt, kind="stable")]
    kept = np.maximum(1, np.round(COVERAGE * len(wrong)).astype(int))
    return np.cumsum(wrong)[kept - 1] / kept


def line(axes, at: np.ndarray, curves: Sequence, name: str, i: int) -> None:
    """Mean of the curves and, of two or more, the t interval at each point."""
    values = np.array(curves)
    colour = COLOURS[i % len(COLOURS)]
    if len(values) > 1:
        low, high = np.array([compare.interval(column) for column in values.T]).T
        axes.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
    label = f"{name} ({len(values)} draws)"
    axes.plot(at, values.mean(0), color=colour, ls=LINES[i % len(LINES)], lw=1.8, label=label)
