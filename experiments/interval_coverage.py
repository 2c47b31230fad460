"""Do the 95% intervals hold the truth 95 times in 100? Simulations with a known truth.

python experiments/interval_coverage.py [--runs 2000] [--only image,pixel,table,varying]
  [--seed 0]

    image   bootstrap.image: AUROC, sensitivity, specificity, accuracy of 80 + 80 images
    pixel   bootstrap.pixel: AUROC, recall, Dice of the pixels of 60 + 60 images; the pixels of an
            image share a shift, so that they are not independent
    table   draw_bootstrap.image: AUROC, recall and false alarms of 5 support draws on the same
            60 + 60 images
    varying the same where each draw is tested on 40 of 60 healthy images, as where pools are drawn
            anew

Scores are normal, so every truth is a closed form. Prints a Markdown table: the share of intervals
that hold the truth, and the standard error of that share.
"""

import argparse
from functools import partial

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.stats import binom, norm

from medclip_jax.evaluation import bootstrap, draw_bootstrap, pixel_metrics

WANTED = (0.93, 0.97)  # of a nominal 95%


def image(rng: np.random.Generator, run: int) -> dict[str, bool]:
    """One test set: does each interval hold its truth?"""
    truth = {name: norm.cdf(0.5) for name in ("recall", "specificity", "accuracy")}
    truth["auroc"] = norm.cdf(2**-0.5)
    label = np.repeat([0, 1], 80)
    limits = bootstrap.image(rng.normal(label, 1.0), label, seed=run)
    return holds(limits, truth)


def pixel(rng: np.random.Generator, run: int, n: int = 60, side: int = 12) -> dict[str, bool]:
    """The same for maps: a pixel is Phi(shift of its image + lesion + noise - 1/2)."""
    label = np.repeat([0, 1], n)
    masks = np.zeros((2 * n, side, side), bool)
    masks[n:, : side // 2, : side // 2] = True  # a quarter of each abnormal image
    shift = rng.normal(0, 0.3, (2 * n, 1, 1))
    maps = norm.cdf(shift + masks + rng.normal(size=masks.shape) - 0.5).astype(np.float32)
    sd = 1.09**0.5
    hit = norm.cdf(0.5 / sd)  # of a lesion's pixel, and of a healthy one to stay below
    tp, fn, fp = hit / 8, (1 - hit) / 8, (1 - hit) * 7 / 8
    truth = {
        "auroc": norm.cdf(1 / (sd * 2**0.5)),
        "recall": hit,
        "dice": 2 * tp / (2 * tp + fp + fn),
    }
    measured = pixel_metrics.PixelMetrics()
    histograms = [measured.add(*pair) for pair in zip(maps, masks, strict=True)]
    return holds(bootstrap.pixel(histograms, label, seed=run), truth)


def table(rng: np.random.Generator, run: int, tested: int = 60) -> dict[str, bool]:
    """Five draws whose separation varies with sd 0.2 around 1.

    A score is (image + noise of the draw) / sqrt(2) + separation * label, all normal: the mean
    AUROC over separations is Phi(1 / sqrt(2 + 0.04)), and at the threshold 0.5 a recall is the mean
    of Phi(separation - 1/2). tested: healthy images that each draw is tested on, of 60.
    """
    scores, label = five_draws(rng)
    ill = np.flatnonzero(label)
    places = [np.concatenate([rng.permutation(60)[:tested], ill]) for _ in scores]
    own = [one[at] for one, at in zip(scores, places, strict=True)]
    found = draw_bootstrap.image(own, label, seed=run, indices=places)
    truth = {
        "auroc": norm.cdf(2.04**-0.5),
        "recall": norm.cdf(0.5 / 1.04**0.5),
        "false_alarm_rate": norm.cdf(-0.5),
    }
    return holds({name: [found[name].low, found[name].high] for name in truth}, truth)


def five_draws(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = np.repeat([0, 1], 60)
    parts = rng.normal(size=(1, 120)) + rng.normal(size=(5, 120))
    return parts / 2**0.5 + rng.normal(1, 0.2, (5, 1)) * label[None], label


CASES = {
    "image": image,
    "pixel": pixel,
    "table": table,
    "varying": partial(table, tested=40),
}


def holds(limits: dict[str, list[float]], truth: dict[str, float]) -> dict[str, bool]:
    return {name: limits[name][0] <= value <= limits[name][1] for name, value in truth.items()}


def coverage(case: str, runs: int, seed: int = 0, shown: bool = False) -> dict[str, float]:
    """Share of `runs` simulations whose interval holds the truth, by metric."""
    rng = np.random.default_rng([seed, sorted(CASES).index(case)])
    count: dict[str, int] = {}
    console = Console(stderr=True, quiet=not shown)
    for run in track(range(runs), case, console=console):
        for name, held in CASES[case](rng, run).items():
            count[name] = count.get(name, 0) + held
    return {name: held / runs for name, held in count.items()}


def band(runs: int, error: float = 1e-3) -> tuple[float, float]:
    """What a coverage inside WANTED shows in `runs` simulations, but with probability `error`."""
    low, high = WANTED
    return binom.ppf(error / 2, runs, low) / runs, binom.ppf(1 - error / 2, runs, high) / runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000, help="simulations per case")
    parser.add_argument("--only", default=",".join(CASES), help="any of " + ",".join(CASES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| case | metric | coverage | standard error |\n|---|---|---|---|")
    for case in args.only.split(","):
        for name, share in coverage(case, args.runs, args.seed, shown=True).items():
            error = (share * (1 - share) / args.runs) ** 0.5
            print(f"| {case} | {name} | {100 * share:.1f}% | {100 * error:.1f}% |", flush=True)


if __name__ == "__main__":
    main()
