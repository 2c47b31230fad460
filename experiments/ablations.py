"""What does each part contribute? One switch at a time, from the full model and from the bare one.

python experiments/ablations.py --config configs/busi.py configs/brain_mri.py --k 4 16 \
  --draws 10 --out runs/ablations [--switches dropout,tiles] [--sides full,bare] [--set epochs=50]

`full` has every part on, and each switch takes one away; `bare` has every part off, and each switch
adds one; `default` is the config as it ships, and each of CHANGES alters one part of it. Draw i is
seed i for all, so that all see the same supports; whole draws come first, so that what is stopped
early can be compared. Runs share what they have in common (switched.py). Each has its own file
below --out and is skipped if that is there, so a killed analysis goes on.

Writes table.csv (a line per run) and table.md: per data set, K, side and switch the mean image and
pixel AUROC, the 95% t interval of the first over draws, and its paired difference to the side's
own base with interval, p of the paired t test and of Wilcoxon's, and p by Holm over all switches of
the data set and K. An interval over draws says nothing about other test images.
"""

import argparse
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import compare
import numpy as np
import switched

from medclip_jax import files
from medclip_jax.evaluation import significance


class Switch(NamedTuple):
    """Assignments, as config.FIELD=VALUE, of a part that is on and of one that is off."""

    on: tuple[str, ...]
    off: tuple[str, ...]


SWITCHES = {
    "fusion": Switch(
        ("fusion.branches=('learned','memory','zero_shot_image')",),
        ("fusion.branches=('learned',)",),
    ),
    "prompt templates": Switch(("prompts.phrases=templates",), ("prompts.phrases=words",)),
    "synthesis of the paper": Switch(("synthesis.preset=medclip",), ("synthesis.preset=mediclip",)),
    "dice loss": Switch(("loss.dice=1.0",), ("loss.dice=0.0",)),
    "alignment loss": Switch(("loss.align=0.1",), ("loss.align=0.0",)),
    "prompt loss": Switch(("loss.prompt=0.1",), ("loss.prompt=0.0",)),
    "learned scale": Switch(("model.learn_scale=True",), ("model.learn_scale=False",)),
    "dropout": Switch(("model.dropout=0.1",), ("model.dropout=0.0",)),
    "augmentation": Switch(
        ("augment.flip=0.5", "augment.rotate=10.0", "augment.intensity=0.2"),
        ("augment.flip=0.0", "augment.rotate=0.0", "augment.intensity=0.0"),
    ),
    "preprocessing": Switch(("data.recipe=clahe",), ("data.recipe=",)),
    "MAML": Switch(("learner=maml",), ("learner=joint",)),
    "tiles": Switch(("score.tiles=2",), ("score.tiles=1",)),
    "outlier suppression": Switch(
        ("score.suppress.median=5", "score.suppress.smallest_pixels=64")
        + ("score.suppress.smallest_mm2=10.0", "score.suppress.sigma=4.0"),
        ("score.suppress.median=0", "score.suppress.smallest_pixels=0")
        + ("score.suppress.smallest_mm2=0.0", "score.suppress.sigma=0.0"),
    ),
    "mean of the top patches": Switch(("score.top=0.05",), ("score.top=0.0",)),
}
# Changes of a part that only the full side has.
WITHIN = {
    "no plain prompts": ("fusion.branches=('learned','memory')",),
    "no memory": ("fusion.branches=('learned','zero_shot_image')",),
    "coreset of a tenth": ("memory.coreset=0.1",),
    "weights from probes": ("fusion.weights=probes",),
}
# Changes of the config as it ships.
VIEWS = ("augment.flip=0.5", "augment.rotate=10.0", "augment.intensity=0.2")
CHANGES = {
    "prompts alone": ("fusion.branches=('learned',)",),
    "prompts and memory": ("fusion.branches=('learned','memory')",),
    "prompts and plain prompts": ("fusion.branches=('learned','zero_shot_image')",),
    "mirrored memory": ("memory.mirror=True",),
    "language adapter": ("model.language=embedded",),
    "language adapter, tuned": ("model.language=embedded", "model.language_tuned=True"),
    "token refinement": ("model.refine=True",),
    "augmentation alone": VIEWS,
    "SimCLR and augmentation": (*VIEWS, "loss.simclr=0.1"),
    "two tiles per side": ("score.tiles=2",),
    "suppression": SWITCHES["outlier suppression"].on,
    "maximum in place of the top patches": ("score.top=0.0",),
    "no alignment loss": ("loss.align=0.0",),
    "no dice loss": ("loss.dice=0.0",),
    "no dropout": ("model.dropout=0.0",),
    "distance form": ("model.form=distance",),
    "tenth of the memory": ("memory.coreset=0.1",),
    "probes weigh": ("fusion.weights=probes",),
}
SIDES = ("full", "bare", "default")
COLUMNS = ("data", "k", "side", "switch", "seed")
MEASURES = (("image", "auroc"), ("image", "auprc"), ("pixel", "auroc"), ("pixel", "aupro"))


def main() -> None:
    args = arguments()
    rows = []
    for config in args.config:
        ground = switched.Ground()
        for k, seed, side, name, assignments in asked(args):
            one = argparse.Namespace(config=config, set=[*args.set, *assignments])
            path = args.out / config.stem / side / name.replace(" ", "_").replace(",", "")
            result = finished(ground, one, k, seed, path / f"k{k}-{seed}.json")
            cells = [(result[group] or {}).get(n) for group, n in MEASURES]
            rows.append([config.stem, k, side, name, seed, *cells])
            print(*rows[-1], f"{result['seconds']:.1f} s", flush=True)
            table(args.out, rows)


def asked(args: argparse.Namespace) -> Iterator[tuple[int, int, str, str, list[str]]]:
    """(k, seed, side, switch, assignments) of every run, whole draws first."""
    for k in args.k:
        for seed in range(args.draws):
            for side in args.sides.split(","):
                for name, assignments in variants(side, chosen(args.switches)):
                    yield k, seed, side, name, assignments


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="config files")
    parser.add_argument("--k", type=int, nargs="+", default=[16], help="each at least 2")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--switches", default="all", help="names by comma, or all")
    parser.add_argument("--sides", default="full,bare", help="any of full,bare,default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="field=value, as --config.field")
    args = parser.parse_args()
    known = [*SWITCHES, *WITHIN, *CHANGES]
    for given, names in ((args.switches, ["all", *known]), (args.sides, SIDES)):
        unknown = set(given.split(",")) - set(names)
        if unknown:
            parser.error(f"no {', '.join(sorted(unknown))}: choose among {', '.join(names)}")
    if min(args.k) < 2:
        parser.error("--k: give 2 or more, the branches are weighed on supports held out")
    return args


def chosen(named: str) -> list[str]:
    """The switches asked for, in the order of SWITCHES."""
    names = [*SWITCHES, *WITHIN, *CHANGES]
    return names if named == "all" else [n for n in names if n in named.split(",")]


def variants(side: str, names: list[str]) -> list[tuple[str, list[str]]]:
    """(switch, assignments) of a side: itself first, then with each of the switches turned.

    Assignments are in full, the turned ones last, so that what they override is overridden.
    """
    if side == "default":
        return [(side, []), *((n, list(CHANGES[n])) for n in names if n in CHANGES)]
    full = side == "full"
    base = [a for s in SWITCHES.values() for a in (s.on if full else s.off)]
    made = [(side, base)]
    for name in names:
        if name in WITHIN:
            if full:
                made.append((f"with {name}", [*base, *WITHIN[name]]))
            continue
        if name not in SWITCHES:
            continue
        turned = SWITCHES[name].off if full else SWITCHES[name].on
        made.append((f"{'without' if full else 'with'} {name}", [*base, *turned]))
    return made


def finished(
    ground: switched.Ground, args: argparse.Namespace, k: int, seed: int, path: Path
) -> dict:
    """The result of one run, which is made if its file is not there.

    What --set says holds for all variants; the variant's own assignments come last.
    """
    if not path.is_file():
        begin = time.perf_counter()
        result = switched.run(ground, compare.settings(args, k, "ours", seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, result | {"seconds": time.perf_counter() - begin})
    return json.loads(path.read_text())


def table(out: Path, rows: list[list]) -> None:
    """table.csv and table.md of the runs so far; tests pair the draws that a variant has."""
    out.mkdir(parents=True, exist_ok=True)
    names = [f"{group} {name}" for group, name in MEASURES]
    with (out / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[*COLUMNS, *names], *rows])
    header = ("data", "K", "side", "switch", "draws", "image AUROC", "95%", "pixel AUROC")
    header += ("minus base", "95%", "p t", "p Wilcoxon", "p Holm")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for data, k in dict.fromkeys((r[0], r[1]) for r in rows):
        here = [r for r in rows if (r[0], r[1]) == (data, k)]
        lines += [f"| {' | '.join([data, str(k), *line])} |" for line in block(here)]
    files.write_bytes(out / "table.md", ("\n".join(lines) + "\n").encode())


def block(rows: list[list]) -> list[list[str]]:
    """Lines of one data set and K, from `side` on; Holm is over all its differences."""
    made, tests = [], {}
    groups = dict.fromkeys((r[2], r[3]) for r in rows)
    scores = {g: np.array([r[5] for r in rows if (r[2], r[3]) == g], float) for g in groups}
    for side, name in groups:
        own = scores[side, name]
        base = scores[side, side][: len(own)]
        if name != side and len(own) > 1:
            tests[side, name] = significance.paired_t(own, base), significance.wilcoxon(own, base)
    # equal differences in all draws have no t test
    p = {g: t.p for g, (t, _) in tests.items() if not np.isnan(t.p)}
    corrected = dict(zip(p, significance.holm(np.array(list(p.values()))), strict=True))
    for side, name in groups:
        own = scores[side, name]
        low, high = compare.interval(own)
        pixel = np.array([r[7] for r in rows if (r[2], r[3]) == (side, name)], float)
        cells = [f"{own.mean():.3f}", f"{low:.3f} to {high:.3f}", f"{pixel.mean():.3f}"]
        if (side, name) in tests:
            t, w = tests[side, name]
            cells += [f"{t.mean:+.3f}", f"{t.low:+.3f} to {t.high:+.3f}", f"{t.p:.3f}"]
            cells += [f"{w.p:.3f}", f"{corrected.get((side, name), np.nan):.3f}"]
        else:
            cells += [""] * 5
        made.append([side, name, str(len(own)), *cells])
    return made


if __name__ == "__main__":
    main()
