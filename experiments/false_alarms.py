"""What thresholds promise and what simulated healthy images show; no data set is needed.

python experiments/false_alarms.py --draws 4000

Supports and new images are alike: vectors of correlated branch scores (or maps of neighbouring
pixels that share a shift per image), normal, skewed (lognormal) or heavy-tailed (t with 3 degrees
of freedom). One new image per draw of supports, through the package's own functions. Beside its
threshold for fused scores: supports standardised by all supports (version 0.1) or by the others,
CV+ (Barber et al. 2021: compares s_-i(x) with s_-i(x_i), bound 2 x promise) and full conformal
prediction; the last two have no threshold on the score.
"""

import argparse
import itertools
from typing import Any

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
    rng, names = np.random.default_rng(seed), [str(i) for i in range(branches)]
    found: list[np.ndarray] = []
    size = max(1, 8000 // k)
    for n in [min(size, draws - i) for i in range(0, draws, size)]:
        images = drawn(rng, kind, (n, k + 1, branches), correlation)
        supports, new = images[:, :k], images[:, k]
        score = score_of(names, new, supports)
        healthy = {
            "package": ensemble.healthy_scores(supports),
            "by all": score_of(names, supports, supports[:, None]),
            "by others": score_of(names, supports, left_out(supports)),
        }
        limits = {x: [calibration.threshold(row, alpha) for row in h] for x, h in healthy.items()}
        alarms = [score > [t.value for t in limits[name]] for name in healthy]
        rate = limits["package"][0].alpha_attained
        most = round(rate * (k + 1)) - 1  # supports that may lie at or above an alarm
        others = left_out(supports)
        beaten = score_of(names, new[:, None], others) <= healthy["by others"]
        alarms.append(beaten.sum(1) <= most)
        every = score_of(names, images, left_out(images))
        alarms.append((every[:, :k] >= every[:, k:]).sum(1) <= most)
        found.append(np.array(alarms))
    seen = np.concatenate(found, 1).mean(1)
    error = (rate * (1 - rate) / draws) ** 0.5
    others = dict(zip(("by all", "by others", "cv+", "full"), seen[1:].tolist(), strict=True))
    return rate, float(seen[0]), error, others


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
            new = np.asarray(ensemble.fused(names, last, ensemble.units_of(each)).patch[0])
        limit = calibration.pixel_threshold(healthy, rate, proven=proven)
        shares.append(np.mean(new > limit.value))
        promises.append(limit.rate_attained if limit.bound is None else limit.bound)
    error = float(np.std(shares) / draws**0.5)
    return float(np.mean(promises)), float(np.mean(shares)), error


def score_of(names: list[str], images: np.ndarray, supports: np.ndarray) -> np.ndarray:
    """Fused scores [n, ...] of images [n, ..., b], standardised by supports [n, ..., k, b]."""
    image = np.stack([supports.mean(-2), supports.std(-2, ddof=1)])
    image = np.moveaxis(image, -1, 1)  # [2, b, n, ...], as units of one map and one image
    each = [Scores(np.zeros(1), images[..., i]) for i in range(images.shape[-1])]
    unused = np.ones((2, len(names)))
    return np.asarray(ensemble.fused(names, each, (unused, image)).image)


def left_out(images: np.ndarray) -> np.ndarray:
    """[n, k, k - 1, b] of [n, k, b]: the others of each."""
    k = images.shape[1]
    return images[:, [[j for j in range(k) if j != i] for i in range(k)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=4000, help="of images; a tenth of maps")
    args = parser.parse_args()
    print("| scores | branches | correlation | K | promised | observed | by all | by others "
          "| cv+ | full |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
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
            draws, one = args.draws // 10, branches == 1
            promise, seen, error = pixel_rate(kind, k, branches, shift, draws, rate, proven=one)
            print(f"| {kind} | {branches} | {shift} | {k} | {rate} | {promise:.3f} | "
                  f"{seen:.4f} ± {error:.4f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
