"""Does the design of the prompts matter? One factor at a time, on the same support draws.

python experiments/prompt_design.py --config configs/busi.py configs/brain_mri.py \
  --k 16 --draws 5 --out runs/prompts [--factors phrases,init] [--set epochs=50 ...]

The base is the default: templates, 8 context vectors per prompt, the phrase at the end, random
initialisation. Every other variant changes one of these. Draw i is seed i for all. Each run has its
own workdir below --out and is skipped if it is finished, so a killed analysis goes on; variants
share the cached image tokens. Writes table.csv (a line per run) and table.md: per data set, K and
variant the mean image AUROC with its 95% t interval over draws, and the paired difference to the
base with its interval. An interval over few draws says nothing about other test images.
"""

import argparse
import csv
from pathlib import Path

import compare
import numpy as np

from medclip_jax import files
from medclip_jax.evaluation import significance

BASE = "templates, 8 per prompt, end, random"
FACTORS = {
    "phrases": {
        "plain words": "prompts.phrases=words",
        "templates + ontology": "prompts.phrases=ontology",
    },
    "context": {"4 vectors": "prompts.context=4", "16 vectors": "prompts.context=16"},
    "sharing": {"one shared context": "prompts.shared=True"},
    "position": {
        "phrase at the front": "prompts.position=front",
        "phrase in the middle": "prompts.position=middle",
    },
    "init": {"from 'a photo of a'": "prompts.init=a photo of a"},
}


def main() -> None:
    args = arguments()
    rows = []
    for config in args.config:
        for k in args.k:
            for factor, variant, assignments in variants(args.factors.split(",")):
                for seed in range(args.draws):
                    result = run(args, config, k, factor, variant, assignments, seed)
                    cells = [(result[group] or {}).get(name) for group, name in compare.COLUMNS]
                    rows.append([config.stem, k, factor, variant, seed, *cells])
                    print(*rows[-1], flush=True)
                table(args.out, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="config files")
    parser.add_argument("--k", type=int, nargs="+", default=[16])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--factors", default=",".join(FACTORS), help="any of the default, by comma")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="field=value, as --config.field")
    args = parser.parse_args()
    unknown = set(args.factors.split(",")) - set(FACTORS)
    if unknown:
        parser.error(f"no factor {', '.join(sorted(unknown))}: choose among {', '.join(FACTORS)}")
    return args


def variants(factors: list[str]) -> list[tuple[str, str, list[str]]]:
    """(factor, name, assignments) of the base, which comes first, and of each change to it."""
    changes = [
        (factor, name, [change]) for factor in factors for name, change in FACTORS[factor].items()
    ]
    return [("base", BASE, []), *changes]


def run(
    args: argparse.Namespace,
    config: Path,
    k: int,
    factor: str,
    variant: str,
    assignments: list[str],
    seed: int,
) -> dict:
    """metrics.json of one run; what --set says holds for all variants, the variant's own last."""
    changed = [a.rpartition("=")[2].replace(" ", "_") for a in assignments]
    folder = args.out / config.stem / "-".join([factor, *changed])
    one = argparse.Namespace(config=config, out=folder, set=[*args.set, *assignments])
    return compare.finished(one, k, "ours", seed)


def table(out: Path, rows: list[list]) -> None:
    """table.csv and table.md of the runs so far."""
    names = [f"{group} {name}" for group, name in compare.COLUMNS]
    with (out / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["data", "k", "factor", "variant", "seed", *names], *rows])
    header = ("data", "K", "factor", "variant", "draws", "image AUROC", "95%", "minus base", "95%")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for data, k, factor, variant in dict.fromkeys(tuple(r[:4]) for r in rows):
        scores, base = (
            np.array([r[5] for r in rows if (r[0], r[1], r[3]) == (data, k, v)], float)
            for v in (variant, BASE)
        )
        low, high = compare.interval(scores)
        cells = [f"{scores.mean():.3f}", f"{low:.3f} to {high:.3f}"]
        if factor == "base" or len(scores) < 2:
            cells += ["", ""]
        else:
            test = significance.paired_t(scores, base)
            cells += [f"{test.mean:+.3f}", f"{test.low:+.3f} to {test.high:+.3f}"]
        head = [data, str(k), factor, variant, str(len(scores))]
        lines.append(f"| {' | '.join(head + cells)} |")
    files.write_bytes(out / "table.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
