"""What thresholds promise and what simulated healthy images show; no data set is needed.

python experiments/false_alarms.py --draws 4000

Supports and new images are alike: vectors of correlated branch scores (or maps of neighbouring
pixels that share a shift per image), normal, skewed (lognormal) or heavy-tailed (t with 3 degrees
of freedom). One new image per draw of supports, through the package's own functions. Beside its
ranks of fused scores: supports standardised by all supports (version 0.1) or by the others, and
CV+ (Barber et al. 2021: compares s_-i(x) with s_-i(x_i), bound 2 x promise).
"""

import argparse
import itertools
from typing import Any

import command
import jax
import numpy as np
from scipy import ndimage

from medclip_jax.detectors import calibration, ensemble
from medclip_jax.detectors.detector import Scores

KINDS = ("normal", "lognormal", "t3")
SIDE = 8  # pixels of a simulated map


def drawn(rng: np.random.Generator, kind: str, shape: tuple[int, ...], correlation: float):
    """Scores whose last axis (branches) is correlated before it is skewed or scaled."""
    shared, own = rng.normal(size=(*shape[:-1], 1)), rng.normal(size=shape)
    normal = correlation**0.5 * shared + (1 - correlation) ** 0.5 * own
    if kind == "lognormal":
        return np.exp(normal)
    return normal / np.sqrt(rng.chisquare(3, shape) / 3) if kind == "t3" else normal


def image_rate(
    kind: str, k: int, branches: int, correlation: float, draws: int, alpha=0.1, seed=0
) -> tuple[Any, ...]:
    """Promise, false-alarm rate, its standard error, and the rates of the other ways."""
    rng = np.random.default_rng(seed)
    images = drawn(rng, kind, (draws, k + 1, branches), correlation)
    supports, new = images[:, :k], images[:, k]
    rank = jax.jit(jax.vmap(ensemble.ranks))(new[:, None], supports)[:, 0]
    limit = calibration.threshold(np.arange(1.0, k + 1), alpha, proven=True)  # a whole rank
    rate, score = limit.alpha_attained, score_of(new, supports)
    most = round(rate * (k + 1)) - 1  # supports that may lie at or above an alarm
    others = left_out(supports)
    ways = {
        "by all": score_of(supports, supports[:, None]),
        "by others": score_of(supports, others),
    }
    seen = {name: np.mean(score > np.sort(x, 1)[:, k - most - 1]) for name, x in ways.items()}
    beaten = score_of(new[:, None], others) <= ways["by others"]
    seen["cv+"] = np.mean(beaten.sum(1) <= most)
    error = (rate * (1 - rate) / draws) ** 0.5
    return rate, float(np.mean(rank > limit.value)), error, seen


def pixel_rate(
    kind: str, k: int, branches: int, shift: float, draws: int, rate=0.02, seed=0, proven=False
) -> tuple[float, float, float]:
    """Promise, mean share of a new image's pixels above the threshold of (fused) maps, its error.

    shift: of a whole image, in standard deviations of its pixels. The promise is the bound where
    it is proven, otherwise the mean of what the thresholds say is to be expected.
    """
    rng, names = np.random.default_rng(seed), [str(i) for i in range(branches)]
    shares, promises = [], []
    for _ in range(draws):
        noise = rng.normal(size=(k + 1, branches, SIDE, SIDE))
        smooth = ndimage.gaussian_filter(noise, (0, 0, 1.2, 1.2), mode="wrap") * 4.2
        maps = smooth + shift * drawn(rng, kind, (k + 1, branches), 0.5)[..., None, None]
        maps = maps.reshape(k + 1, branches, -1)
        each = [Scores(x[:k], x[:k].mean(1)) for x in maps.swapaxes(0, 1)]
        if branches == 1:
            healthy, new = maps[:k, 0], maps[k, 0]
        else:
            healthy = ensemble.calibrating(names, each, k).patch
            last = [Scores(x[k:], x[k:].mean(1)) for x in maps.swapaxes(0, 1)]
            new = ensemble.fused_map(names, last, ensemble.units_of(each))[0]
        limit = calibration.pixel_threshold(healthy, rate, proven=proven)
        shares.append(np.mean(new > limit.value))
        promises.append(limit.rate_attained if limit.bound is None else limit.bound)
    error = float(np.std(shares) / draws**0.5)
    return float(np.mean(promises)), float(np.mean(shares)), error


def score_of(images: np.ndarray, supports: np.ndarray) -> np.ndarray:
    """Fused scores [n, ...] of images [n, ..., b], standardised by supports [n, ..., k, b]."""
    z = (images - supports.mean(-2)) / supports.std(-2, ddof=1)
    return np.arcsinh(z).mean(-1)


def left_out(images: np.ndarray) -> np.ndarray:
    """[n, k, k - 1, b] of [n, k, b]: the others of each."""
    k = images.shape[1]
    return images[:, [[j for j in range(k) if j != i] for i in range(k)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=command.count, default=4000, help="images; maps: a tenth")
    args = parser.parse_args()
    print("| scores | branches | correlation | K | promised | observed | by all | by others "
          "| cv+ |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for branches, correlation, kind, k in itertools.product(
        (2, 3), (0.0, 0.5), KINDS, (4, 8, 16, 32)
    ):
        rate, seen, error, ways = image_rate(kind, k, branches, correlation, args.draws)
        others = " | ".join(f"{x:.3f}" for x in ways.values())
        print(f"| {kind} | {branches} | {correlation} | {k} | {rate:.3f} | {seen:.3f} "
              f"± {error:.3f} | {others} |", flush=True)  # fmt: skip
    print("\n| pixels | branches | shift | K | asked | expected (or bound) | observed |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    for branches, shift, kind, k in itertools.product((1, 2), (0.3, 1.0), KINDS, (4, 8, 16, 32)):
        for rate in (0.02, 0.25):
            draws, one = max(1, args.draws // 10), branches == 1
            promise, seen, error = pixel_rate(kind, k, branches, shift, draws, rate, proven=one)
            print(f"| {kind} | {branches} | {shift} | {k} | {rate} | {promise:.3f} | "
                  f"{seen:.4f} ± {error:.4f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    command.run(main)
