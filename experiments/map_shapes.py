"""What post-processing of maps does to localisation, from finished runs; nothing is encoded.

python experiments/map_shapes.py runs/busi runs/phantom

Takes the maps of each run's predictions.npz back to raw values, changes them, and prints pixel
metrics. For development sets only: Dice is at the threshold that 2% of the pixels of healthy test
images exceed, and masks are read. Runs with --config.score.peak=0 show every share of it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy import ndimage

from medclip_jax import build, config
from medclip_jax.detectors import calibration
from medclip_jax.evaluation import evaluate, metrics
from medclip_jax.models import similarity

BINS = 8192
RATE = 0.02  # share of the healthy pixels above the threshold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="workdirs, with score.peak=0")
    parser.add_argument("--most", type=int, default=10_000, help="abnormal images of each run")
    args = parser.parse_args()
    print("| run | maps | AUROC | AUPRC | AUPRO | Dice | oracle Dice |")
    print("|---|---|---|---|---|---|---|")
    for run in args.runs:
        raw, masks, healthy, how = loaded(run, args.most)
        for name, maps in changed(raw, *how).items():
            row = measured(maps, masks, healthy)
            print(
                f"| {run.name} | {name} | " + " | ".join(f"{x:.3f}" for x in row) + " |", flush=True
            )


def loaded(run: Path, most: int):
    """Raw maps and masks of images whose masks are known, which are healthy, `changed`'s rest."""
    c = config.restored(json.loads((run / "config.json").read_text()))
    limits = json.loads((run / "scorer.json").read_text())["calibration"]
    test = build.load_split(c).test
    rows = [i for i, r in enumerate(test) if r.masks][:most] + [
        i for i, r in enumerate(test) if not r.label
    ]
    with np.load(run / "predictions.npz") as stored:
        unit, grid = stored["maps"][rows].astype(np.float32), stored["patch_mean"].shape[-1]
    masks = np.stack([*evaluate.Masks([test[i] for i in rows], unit.shape[-1], c.data.fit)])
    raw = limits["pixel"]["value"] + limits["pixel_scale"] * of_unit(unit)
    healthy = np.array([not test[i].label for i in rows])
    return raw.astype(np.float32), masks, healthy, (grid, c.score.corners)


def of_unit(unit: np.ndarray) -> np.ndarray:
    """The inverse of calibration.to_unit, in scales from the threshold."""
    above = 0.5 / np.maximum(1 - unit, 1e-6) - 1
    return np.where(unit >= 0.5, above, 1 - 0.5 / np.maximum(unit, 1e-6))


def changed(raw: np.ndarray, grid: int, corners: bool) -> dict[str, np.ndarray]:
    """Maps by what was done to them; grid: patches a side; corners: of the run's interpolation."""
    frame = grid, raw.shape[-1]
    other = similarity.interpolation(*frame, not corners)
    other = other @ np.linalg.pinv(similarity.interpolation(*frame, corners))
    moved = np.einsum("gh,nhw,kw->ngk", other, raw, other, optimize=True)
    name = "patches at their centres" if corners else "from corner to corner"
    results = {"as they are": raw, name: moved}
    results |= {f"smoothed, {s} px": ndimage.gaussian_filter(raw, (0, s, s)) for s in (4, 8)}
    results |= {f"peak {share}": calibration.lowered(raw, share) for share in (0.15, 0.25, 0.4)}
    return results


def measured(maps: np.ndarray, masks: np.ndarray, healthy: np.ndarray) -> list[float]:
    """AUROC, AUPRC, AUPRO, Dice and the best Dice of all thresholds, over all pixels."""
    low, high = float(maps.min()), float(maps.max())
    codes = ((maps - low) / (high - low) * (BINS - 1)).astype(int)
    counts = np.zeros((1, 3, BINS))
    for code, mask in zip(codes, masks, strict=True):
        owner, _ = ndimage.label(mask, np.ones((3, 3)))
        weight = 1 / np.maximum(np.bincount(owner.ravel()), 1)
        counts[0, 0] += np.bincount(code[~mask], minlength=BINS)
        counts[0, 1] += np.bincount(code[mask], minlength=BINS)
        counts[0, 2] += np.bincount(code[mask], weight[owner[mask]], BINS)
    result = [float(x[0]) for x in metrics.ranking(counts).values()]
    fp, tp = counts[0, :2, ::-1].cumsum(1)
    dice = metrics.overlap(tp, fp, tp[-1] - tp)["dice"]
    marked = maps > np.quantile(maps[healthy], 1 - RATE)
    of = metrics.confusion(marked, masks)
    return [*result, float(metrics.overlap(of[0], of[2], of[3])["dice"]), float(np.nanmax(dice))]


if __name__ == "__main__":
    main()
