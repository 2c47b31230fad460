"""Leave one modality out: what was meta-learned on all others adapts to K healthy images.

python experiments/leave_one_out.py --root DIR --out results/meta \
  --targets busi brain_mri chest_xray oct_mx fundus_mx knee_xr wce_bleed lung_ct

One line per target, K, draw and learner goes to OUT/scores.jsonl: image AUROC on the test part
after 0, 1, 5, 20 and 100 steps of adaptation, the area under that curve, and pixel AUROC after 0
and 1 step where there are masks, of maps shared among similar patches as the package's are. A
target in that file is not repeated. All learners see the same tasks. `memory` and `scratch` learn
from no source; joint adapts as the others do. `--learners ours ...` adds the package's default
method, trained on the K images (half a CPU minute for each K and draw). Report sets need --report
and the settings that --freeze has written, see looks.py.

K = 1: heads compare supports with one another, so ten gentle views of the image (the package's own
for K = 1) are supports beside it; anomalies are made of the image, and `memory` is of it alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import command
import filelock
import jax
import jax.numpy as jnp
import looks
import numpy as np
from modalities import LEVELS, WORDS, Data
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from medclip_jax import build, files
from medclip_jax.clip.layers import Features
from medclip_jax.config_validation import LEARNERS
from medclip_jax.data import catalog, splits
from medclip_jax.detectors import deviation, memory_bank
from medclip_jax.detectors.detector import Scores
from medclip_jax.errors import UserError
from medclip_jax.evaluation import evaluate
from medclip_jax.io import read
from medclip_jax.models import similarity
from medclip_jax.training import episodes, maml, meta
from medclip_jax.training.step import Learner

STEPS = (0, 1, 5, 20, 100)
PIXELS = (0, 1)  # steps after which maps are compared with masks
SIDE = 28  # pixels per side of what pixel AUROC compares: a map has 7 x 7 values
FROZEN = Path(__file__).with_name("frozen_meta.json")
OF_A_RUN = ("root", "out", "targets", "table", "report", "freeze")  # flags that are no settings


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=[], choices=WORDS)
    parser.add_argument("--table", action="store_true", help="print the means of OUT")
    parser.add_argument("--learners", nargs="+", default=LEARNERS, choices=(*LEARNERS, "ours"))
    parser.add_argument("--k", type=command.count, nargs="+", default=[4, 16])
    parser.add_argument("--draws", type=command.count, default=5)
    parser.add_argument("--steps", type=command.count, default=1000, help="outer steps")
    parser.add_argument("--inner-steps", type=int, default=3)
    parser.add_argument("--inner-rate", type=float, default=0.05)
    parser.add_argument("--sources", nargs="+", default=[], choices=WORDS, help="not all others")
    parser.add_argument("--tokens", default="clip", choices=LEVELS, help="of which encoder")
    parser.add_argument("--tasks", type=command.count, default=4, help="per outer step")
    parser.add_argument("--supports", type=int, nargs="+", default=episodes.SUPPORTS)
    parser.add_argument("--shares", type=float, nargs=3, default=episodes.SHARES)
    parser.add_argument("--adapt-rates", type=float, nargs="+", default=[0.05])
    parser.add_argument("--report", action="store_true", help="score report sets, as frozen")
    parser.add_argument("--freeze", action="store_true", help="write frozen_meta.json alone")
    args = parser.parse_args()
    most = build.AUXILIARY_IMAGES - episodes.SHOTS
    if any(k < 1 or max(args.supports) % k for k in args.supports) or max(args.supports) > most:
        parser.error(f"--supports: each must divide the largest, which may be {most}")
    if not (args.targets or args.table):
        parser.error("--targets: give one or more, or --table")
    file = args.out / "scores.jsonl"
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    if args.table:
        if not lines:
            raise UserError(f"{file} holds no finished target: run --targets with this --out first")
        return table(lines)
    args.out.mkdir(parents=True, exist_ok=True)
    data = Data(args.root, args.tokens)
    check_report(data, args)
    if lone := [name for name in args.targets if not sources_of(name, args)]:
        raise UserError(f"--sources: all have {lone[0]}'s modality, of which nothing is learned")
    for target in (x for x in args.targets if x not in {line["target"] for line in lines}):
        begin = time.process_time()
        rows = "".join(json.dumps(row) + "\n" for row in measure(data, target, args)).encode()
        with filelock.FileLock(f"{file}.lock"):  # others may add targets
            files.write_bytes(file, (file.read_bytes() if file.exists() else b"") + rows)
        print(target, f"{time.process_time() - begin:.0f} CPU seconds", flush=True)


def check_report(data: Data, args) -> None:
    """Report sets are scored as frozen and logged, or not at all; --freeze ends here.

    Raises UserError: they are not all targets, are learned from, or settings are not as frozen.
    """
    kept, asked = catalog.with_role("report"), args.report or args.freeze
    report = [name for name in args.targets if name in kept]
    if report and not asked:
        raise UserError(f"{', '.join(report)}: report sets are scored as frozen only: add --report")
    if wrong := [n for n in args.sources if n in kept]:
        raise UserError(f"{wrong[0]} is a report set, of which nothing is learned: leave it out")
    if not asked:
        return
    if not report or len(report) < len(args.targets):
        raise UserError("--report and --freeze: give report sets as --targets, and no other set")
    now = {
        "checkpoint": data.clip.digest,
        "version": meta.VERSION,
        "settings": {name: x for name, x in vars(args).items() if name not in OF_A_RUN},
        "sets": {name: WORDS[name] for name in report},
    }
    now = json.loads(json.dumps(now))  # as it is read again
    if args.freeze:
        sys.exit(print(f"frozen as {looks.freeze(now, FROZEN)}: {FROZEN.name}"))
    looks.log(looks.check(now, FROZEN), report)


def table(lines: list[dict]) -> None:
    """Means by steps; differences after one step, with two-level intervals and a sign test."""
    rates = {line["learner"]: line["rate"] for line in reversed(lines)}  # the first of each
    lines = [line for line in lines if line["rate"] == rates[line["learner"]]]
    for k in sorted({line["k"] for line in lines}):
        every = {name: [x for x in lines if (x["k"], x["learner"]) == (k, name)] for name in rates}
        for name, own in every.items():
            if not own:
                continue
            columns = [c for c in (*map(str, STEPS), "area") if c in own[0]]
            means = [np.mean([x[c] for x in own]) for c in columns]
            pixels = [x.get("pixel 1", x["pixel 0"]) for x in own if "pixel 0" in x]
            print(k, name, *(f"{x:.3f}" for x in means), end="")
            print(f" | pixel {np.mean(pixels):.3f}" if pixels else "", end="")
            for other in ("joint", "memory"):
                off = differences(own, every.get(other, []))
                if other == name or not off.size:
                    continue
                low, high = interval(off)
                signs = np.sign(off.mean(1).round(12))
                above, unequal = int((signs > 0).sum()), int(np.abs(signs).sum())
                p = binomtest(above, unequal).pvalue if unequal else 1.0
                print(f" | {other} {off.mean():+.3f} ({low:+.3f} to {high:+.3f})", end="")
                print(f" {above} of {len(off)} p={p:.2f}", end="")
            print()


def differences(ours: list[dict], others: list[dict]) -> np.ndarray:
    """[target, draw] of image AUROC after one step, if any is taken; of what both have."""
    a, b = (
        {(x["target"], x["draw"]): x["1" if x["rate"] else "0"] for x in y} for y in (ours, others)
    )
    both = a.keys() & b.keys()
    names = sorted({target for target, _ in both})
    draws = sorted({draw for _, draw in both if {(n, draw) for n in names} <= both})
    return np.array([[a[n, d] - b[n, d] for d in draws] for n in names])


def interval(off: np.ndarray, count: int = 4000):
    """95% bounds of the mean: targets are resampled, and draws."""
    rng = np.random.default_rng(0)
    n, m = off.shape
    means = [off[rng.integers(0, n, n)][:, rng.integers(0, m, m)].mean() for _ in range(count)]
    return np.percentile(means, [2.5, 97.5])


def measure(data: Data, target: str, args) -> list[dict]:
    """Every learner on one target, which no learner has seen."""
    names = sources_of(target, args)
    if names not in data.learned:
        data.learned[names] = learn(data, names, args)
    whitening, params = data.learned[names]
    text, records = data.zero_shot(target), data.records(target)
    rows = []
    for draw in range(args.draws):
        split = splits.split(records, max(args.k), draw)
        test, label = data.tokens(split.test), [r.label for r in split.test]
        known = np.array([i for i, r in enumerate(split.test) if r.masks or not r.label])
        masks = np.stack([*evaluate.Masks([split.test[i] for i in known], SIDE, data.c.data.fit)])
        for k in args.k:
            first = split._replace(support=split.support[:k])
            support, seen = data.support(first.support), data.selected(test)
            scored = scores(whitening, params, support, seen, text, k, args)
            if "ours" in args.learners:
                scored["ours", 0] = {0: data.ours(target, first, draw)}
            for (learner, rate), values in scored.items():
                about = {"target": target, "k": k, "draw": draw, "learner": learner, "rate": rate}
                curve = {str(s): image_auroc(label, x.image) for s, x in values.items()}
                if len(values) == len(STEPS):
                    curve["area"] = area(list(curve.values()))
                for s in PIXELS:
                    if masks.any() and s in values and values[s].patch is not None:
                        x = values[s] if learner == "ours" else data.share(values[s], test, None)
                        curve[f"pixel {s}"] = pixel_auroc(masks, np.asarray(x.patch)[known])
                rows.append(about | curve)
    return rows


def sources_of(target: str, args) -> tuple[str, ...]:
    """The data sets that are learned from for a target: those of other modalities."""
    kind = {n: catalog.modality_kind(about["modality"]) for n, about in WORDS.items()}
    every = args.sources or catalog.with_role("development")
    return tuple(n for n in every if kind[n] != kind[target])


def learn(data: Data, names: Sequence[str], args) -> tuple:
    """(whitening, params of every learner) of these sources."""
    sources = [data.source(n) for n in names]
    whitening = meta.whitening_of(sources)
    pool = meta.task_pool(sources, whitening, meta.TASKS, 0, args.supports, shares=args.shares)
    held_out = np.repeat(np.arange(len(names)) % meta.VALIDATION == meta.VALIDATION - 1, meta.TASKS)
    params = {"scratch": deviation.init(whitening)}
    for name in (n for n in args.learners if n != "ours"):
        how = Learner(name, args.inner_steps, args.inner_rate), args.steps, args.tasks
        state = meta.fit(pool, held_out, whitening, *how, 0, data.mesh)
        params[name] = state.params
        print(name, *np.round(state.log[-1], 3), "least", *np.round(state.log[:, 2:].min(0), 3))
    return whitening, params


def area(curve: list[float]) -> float:
    """Under AUROC against log(1 + steps), over that axis' length: their mean along it."""
    place = np.log1p(STEPS)
    return float(np.trapezoid(curve, place) / place[-1])


def image_auroc(label: Sequence[int], score: np.ndarray) -> float:
    """Of a head that diverged, whose scores are not finite, 0.5: it tells nothing."""
    return float(roc_auc_score(label, score)) if np.isfinite(score).all() else 0.5


def pixel_auroc(masks: np.ndarray, patches: np.ndarray) -> float:
    return image_auroc(masks.ravel(), read.to_square(patches, SIDE).ravel())


def scores(whitening, params, support, test, text, k: int, args) -> dict:
    """(learner, rate) -> steps of adaptation -> scores of the test set."""
    rows, memory = meta.target_rows(whitening, support, np.arange(len(support.kinds)))
    own = tuple(x[:k].reshape(-1, x.shape[-1]).astype(np.float32) for x in support.healthy.levels)
    patch, seen = compared(own, whitening, memory, test)
    result = {("memory", 0): {0: Scores(patch, similarity.image_score(patch, deviation.TOP))}}
    cosine = similarity.unit(jnp.asarray(test.pooled)) @ similarity.unit(text).T
    result["zero-shot", 0] = {0: Scores(None, cosine[:, 1] - cosine[:, 0])}
    levels = len(whitening.kernel)
    for name, start in params.items():
        learned = isinstance(start, maml.MetaSGD | maml.StepRates)
        only = ("direction",) if name == "anil" else ()
        for rate in args.adapt_rates[:1] if learned else args.adapt_rates:
            every = jax.device_get(curve(start, rows, seen, rate, levels, only))
            result[name, rate] = dict(zip(STEPS, every, strict=True))
    return result


@partial(jax.jit, static_argnums=(4, 5))
def curve(start, rows, seen, rate, levels: int, fixed: tuple):
    """Logits of patches and images after each of STEPS; fixed: do not adapt."""
    inner = maml.Inner(rate, max(STEPS), True, lambda path: path not in fixed)
    loss = partial(meta.loss, levels=levels)
    every, _ = maml.adapt(start, rows, loss=loss, inner=inner, every=True)
    heads = [jax.tree.map(lambda x, s=s: x[s - 1], every) for s in STEPS[1:]]
    return [Scores(*deviation.logits(h, seen, levels)) for h in (maml.plain(start), *heads)]


@jax.jit
def compared(own, whitening, memory, test: Features):
    """Distances to the nearest support patch, and deviations, of images, 32 at a time."""

    def one(image):
        image = jax.tree.map(lambda x: x[None], image)
        near = memory_bank.memory_distance(tuple(x.astype(jnp.float32) for x in image.levels), own)
        seen = deviation.deviation(whitening, memory, image, jnp.array([-1]))
        return jax.tree.map(lambda x: x[0], (near, seen))

    return jax.lax.map(one, test, batch_size=32)


if __name__ == "__main__":
    command.run(main)
