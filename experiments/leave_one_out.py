"""Leave one modality out: what was meta-learned on all others adapts to K healthy images.

python experiments/leave_one_out.py --root DIR --out results/meta \
  --targets busi brain_mri chest_xray oct_mx fundus_mx knee_xr wce_bleed lung_ct

One line per target, K, draw and learner goes to OUT/scores.jsonl: image AUROC on the test part
after 0, 1, 5, 20 and 100 steps of adaptation, the area under that curve, and pixel AUROC after 0
and 1 step where there are masks. A target in that file is not repeated. All learners see the same
tasks. `memory` and `scratch` learn from no source; joint adapts as the others do.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from medclip_jax import build, config
from medclip_jax.clip.layers import Features
from medclip_jax.data import catalog, datasets, splits
from medclip_jax.data.layouts import Split, unique
from medclip_jax.detectors import deviation, memory_bank
from medclip_jax.distributed import sharding
from medclip_jax.features import cache, encoder
from medclip_jax.io import read
from medclip_jax.models import similarity
from medclip_jax.training import maml, meta
from medclip_jax.training.step import Learner

STEPS = (0, 1, 5, 20, 100)
PIXELS = (0, 1)  # steps after which maps are compared with masks
SIDE = 28  # pixels per side of what pixel AUROC compares: a map has 7 x 7 values
LEARNERS = ("joint", "fomaml", "maml", "anil", "meta_sgd", "maml_pp", "reptile", "imaml")
WORDS = catalog.PRESETS | catalog.SETS


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=[])
    parser.add_argument("--table", action="store_true", help="print the means of OUT")
    parser.add_argument("--learners", nargs="+", default=list(LEARNERS))
    parser.add_argument("--k", type=int, nargs="+", default=[4, 16], help="2 or more")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000, help="outer steps")
    parser.add_argument("--inner-steps", type=int, default=3)
    parser.add_argument("--inner-rate", type=float, default=0.05)
    parser.add_argument("--adapt-rates", type=float, nargs="+", default=[0.05])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scores.jsonl"
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    if args.table:
        return table(lines)
    data = Data(args.root)
    for target in args.targets:
        if any(line["target"] == target for line in lines):
            continue
        begin = time.process_time()
        rows = measure(data, target, args)
        with file.open("a") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))
        print(target, f"{time.process_time() - begin:.0f} CPU seconds", flush=True)


def table(lines: list[dict]) -> None:
    """Means by steps; differences after one step, with two-level intervals and a sign test."""
    rates = {line["learner"]: line["rate"] for line in reversed(lines)}  # the first of each
    lines = [line for line in lines if line["rate"] == rates[line["learner"]]]
    for k in sorted({line["k"] for line in lines}):
        one = {name: by_target(lines, k, name, "1" if rates[name] else "0") for name in rates}
        for name, values in one.items():
            own = [x for x in lines if x["k"] == k and x["learner"] == name]
            columns = [c for c in (*map(str, STEPS), "area") if c in own[0]]
            means = [np.mean([x[c] for x in own]) for c in columns]
            pixels = [x.get("pixel 1", x["pixel 0"]) for x in own if "pixel 0" in x]
            print(k, name, *(f"{x:.3f}" for x in means), end="")
            print(f" | pixel {np.mean(pixels):.3f}" if pixels else "", end="")
            for other in ("joint", "memory"):
                off = values - one[other]
                low, high = interval(off)
                above = int((off.mean(1) > 0).sum())
                p = binomtest(above, len(off)).pvalue
                print(f" | {other} {off.mean():+.3f} ({low:+.3f} to {high:+.3f})", end="")
                print(f" {above} of {len(off)} p={p:.2f}", end="")
            print()


def by_target(lines, k: int, learner: str, step: str) -> np.ndarray:
    """Image AUROC [target, draw]."""
    own = [x for x in lines if x["k"] == k and x["learner"] == learner]
    names, draws = sorted({x["target"] for x in own}), sorted({x["draw"] for x in own})
    values = {(x["target"], x["draw"]): x[step] for x in own}
    return np.array([[values[t, d] for d in draws] for t in names])


def interval(off: np.ndarray, count: int = 4000):
    """95% bounds of the mean: targets are resampled, and draws."""
    rng = np.random.default_rng(0)
    n, m = off.shape
    means = [off[rng.integers(0, n, n)][:, rng.integers(0, m, m)].mean() for _ in range(count)]
    return np.percentile(means, [2.5, 97.5])


class Data:
    """Coarse tokens of the data sets, encoded once into the feature cache."""

    def __init__(self, root: Path):
        self.root, self.mesh, self.sources = root, sharding.mesh(), {}
        self.c = config.base("k=16", name="busi", **WORDS["busi"])
        self.c.clip.dtype, self.c.synthesis.variants = "float16", 12
        self.c = config.resolve(self.c)
        self.clip = build.load_clip(self.c)
        self.cache = build.open_cache(self.c, self.clip, self.mesh)
        self.variants = build.synthesis(self.c)

    def records(self, name: str):
        return datasets.load(name, self.root, Path(self.c.cache))

    def source(self, name: str) -> meta.Source:
        if name not in self.sources:
            records = self.records(name)
            counts = build.AUXILIARY_IMAGES, build.ABNORMAL_IMAGES
            sides = splits.source(records, Split((), ()), *counts)
            self.sources[name] = encoder.open_source(self.cache, *sides, self.variants)
        return self.sources[name]

    def tokens(self, records) -> Features:
        encoder.encode_images(self.cache, records)
        small = jax.jit(encoder.coarse)
        each = [small(cache.load(cache.image_path(self.cache, r))) for r in records]
        return jax.tree.map(lambda *x: np.concatenate(x), *each)

    def masks(self, records) -> np.ndarray | None:
        """Lesions [n, SIDE, SIDE] of images of which some have masks, else None."""
        if not any(r.masks for r in records):
            return None
        lesions = np.zeros((len(records), SIDE, SIDE), bool)
        for lesion, record in zip(lesions, records, strict=True):
            if record.masks:
                shape = read.read(record.path)[0].shape[1:]
                mask = read.read_mask(record.masks, shape, record.path)
                lesion[:] = read.fit_mask(mask, SIDE, self.c.data.fit)
        return lesions

    def zero_shot(self, name: str) -> np.ndarray:
        """Mean plain prompt of both classes."""
        c = config.resolve(config.base("k=16", name=name, **WORDS[name]))
        design, frozen = build.model_parts(c, self.clip, context=0)
        text = build.model.text_features({}, frozen, design)
        return similarity.class_features(similarity.Text(text, design.prompts.label))


def measure(data: Data, target: str, args) -> list[dict]:
    """Every learner on one target, which no learner has seen."""
    kind = catalog.modality_kind(WORDS[target]["modality"])
    names = [
        n
        for n in catalog.with_role("development")
        if n != target and catalog.modality_kind(WORDS[n]["modality"]) != kind
    ]
    sources = [data.source(n) for n in names]
    whitening = meta.whitening_of(sources)
    task_pool = meta.task_pool(sources, whitening, meta.TASKS, 0)
    held_out = np.repeat(np.arange(len(names)) % meta.VALIDATION == meta.VALIDATION - 1, meta.TASKS)
    params = {"scratch": deviation.init(whitening)}
    for name in args.learners:
        learner = Learner(name, args.inner_steps, args.inner_rate)
        state = meta.fit(task_pool, held_out, whitening, learner, args.steps, 4, 0, data.mesh)
        params[name] = state.params
        print(target, name, *np.round(state.log[-1], 3), flush=True)
    text, records = data.zero_shot(target), data.records(target)
    rows = []
    distinct = unique(records)
    place = {r.sha256: i for i, r in enumerate(distinct)}
    tokens = data.tokens(distinct)
    for draw in range(args.draws):
        split = splits.split(records, max(args.k), draw)
        own = np.array([place[r.sha256] for r in split.test])
        test = jax.tree.map(lambda x, own=own: x[own], tokens)
        label = np.array([r.label for r in split.test])
        known = np.array([bool(r.masks) or not r.label for r in split.test])
        masks = data.masks([r for r, has in zip(split.test, known, strict=True) if has])
        support = encoder.open_source(data.cache, split.support, (), data.variants)
        for k in args.k:
            scored = scores(whitening, params, support, test, text, k, args)
            for (learner, rate), values in scored.items():
                about = {"target": target, "k": k, "draw": draw, "learner": learner, "rate": rate}
                curve = {str(s): roc_auc_score(label, v) for s, (v, _) in values.items()}
                if len(values) == len(STEPS):
                    curve["area"] = area(list(curve.values()))
                maps = {s: values[s][1] for s in PIXELS if s in values}
                if masks is not None and maps[0] is not None:
                    curve |= {f"pixel {s}": pixel_auroc(masks, x[known]) for s, x in maps.items()}
                rows.append(about | curve)
    return rows


def area(curve: list[float]) -> float:
    """Under AUROC against log(1 + steps), over that axis' length: their mean along it."""
    place = np.log1p(STEPS)
    return float(np.trapezoid(curve, place) / place[-1])


def pixel_auroc(masks: np.ndarray, patches: np.ndarray) -> float:
    return roc_auc_score(masks.ravel(), read.to_square(patches, SIDE).ravel())


def scores(whitening, params, support, test, text, k: int, args) -> dict:
    """(learner, rate) -> steps of adaptation -> image scores and patch values of the test set."""
    rows, memory = meta.target_rows(whitening, support, np.arange(k))
    healthy = (x[:k].astype(np.float32) for x in support.healthy.levels)
    own = tuple(jnp.asarray(x.reshape(-1, x.shape[-1])) for x in healthy)
    patch, seen = in_parts(own, whitening, memory, test)
    near = np.asarray(similarity.image_score(patch, deviation.TOP))
    cosine = similarity.unit(jnp.asarray(test.pooled)) @ similarity.unit(text).T
    result = {
        ("memory", 0): {0: (near, patch)},
        ("zero-shot", 0): {0: (np.asarray(cosine[:, 1] - cosine[:, 0]), None)},
    }
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
    """Image scores [n] and patch logits [n, p] after each of STEPS; fixed: do not adapt."""
    inner = maml.Inner(rate, max(STEPS), True, lambda path: path not in fixed)
    loss = partial(meta.loss, levels=levels)
    every, _ = maml.adapt(start, rows, loss=loss, inner=inner, every=True)
    heads = [jax.tree.map(lambda x, s=s: x[s - 1], every) for s in STEPS[1:]]
    both = [deviation.logits(h, seen, levels) for h in (maml.plain(start), *heads)]
    return [(image, patch) for patch, image in both]


@jax.jit
def compared(own, whitening, memory, part: Features):
    """Distances to the nearest support patch, and deviations, of 32 images."""
    levels = tuple(x.astype(jnp.float32) for x in part.levels)
    near = memory_bank.memory_distance(levels, own)
    return near, deviation.deviation(whitening, memory, part, jnp.full(len(part.pooled), -1))


def in_parts(own, whitening, memory, test: Features):
    """`compared` on 32 images at a time, filled up with the first ones."""
    n = len(test.pooled)
    place = np.resize(np.arange(n), -(-n // 32) * 32).reshape(-1, 32)
    take = [jax.tree.map(lambda x, p=p: x[p], test) for p in place]
    parts = [compared(own, whitening, memory, part) for part in take]
    return jax.tree.map(lambda *x: np.concatenate(x)[:n], *parts)


if __name__ == "__main__":
    main()
