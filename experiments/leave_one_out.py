"""Leave one modality out: what was meta-learned on all others adapts to K healthy images.

python experiments/leave_one_out.py --root DIR --out results/meta \
  --targets busi brain_mri chest_xray oct_mx fundus_mx knee_xr wce_bleed lung_ct

One line per target, K, draw and learner goes to OUT/scores.jsonl: image AUROC on the test part
after 0, 1, 5, 20 and 100 steps of adaptation. A target in that file is not repeated. All learners
see the same tasks. `memory` and `scratch` learn from no source; joint adapts as the others do.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

from medclip_jax import build, config
from medclip_jax.clip.layers import Features
from medclip_jax.data import catalog, datasets, splits
from medclip_jax.data.layouts import Split
from medclip_jax.detectors import deviation, memory_bank
from medclip_jax.distributed import sharding
from medclip_jax.features import cache, encoder
from medclip_jax.models import similarity
from medclip_jax.training import maml, meta
from medclip_jax.training.step import Learner

STEPS = (0, 1, 5, 20, 100)
LEARNERS = ("joint", "fomaml", "maml", "anil", "meta_sgd", "maml_pp", "reptile", "imaml")
WORDS = catalog.PRESETS | catalog.SETS


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--learners", nargs="+", default=list(LEARNERS))
    parser.add_argument("--k", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000, help="outer steps")
    parser.add_argument("--inner-steps", type=int, default=3)
    parser.add_argument("--inner-rate", type=float, default=0.05)
    parser.add_argument("--adapt-rates", type=float, nargs="+", default=[0.05])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scores.jsonl"
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    data = Data(args.root)
    for target in args.targets:
        if any(line["target"] == target for line in lines):
            continue
        begin = time.process_time()
        rows = measure(data, target, args)
        with file.open("a") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))
        print(target, f"{time.process_time() - begin:.0f} CPU seconds", flush=True)


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
    bank = meta.bank(sources, whitening, meta.TASKS, 0)
    held_out = np.repeat(np.arange(len(names)) % meta.VALIDATION == meta.VALIDATION - 1, meta.TASKS)
    params = {"scratch": deviation.init(whitening)}
    for name in args.learners:
        learner = Learner(name, args.inner_steps, args.inner_rate)
        state = meta.fit(bank, held_out, whitening, learner, args.steps, 4, 0, data.mesh)
        params[name] = state.params
        print(target, name, *np.round(state.log[-1], 3), flush=True)
    text, records = data.zero_shot(target), data.records(target)
    tokens = {}
    rows = []
    for draw in range(args.draws):
        split = splits.split(records, max(args.k), draw)
        for r in split.test:
            if r.sha256 not in tokens:
                tokens[r.sha256] = data.tokens([r])
        test = jax.tree.map(lambda *x: np.concatenate(x), *[tokens[r.sha256] for r in split.test])
        label = np.array([r.label for r in split.test])
        support = encoder.open_source(data.cache, split.support, (), data.variants)
        for k in args.k:
            scored = scores(whitening, params, support, test, text, k, args)
            for (learner, rate), values in scored.items():
                about = {"target": target, "k": k, "draw": draw, "learner": learner, "rate": rate}
                rows.append(about | {str(s): roc_auc_score(label, v) for s, v in values.items()})
    return rows


def scores(whitening, params, support, test, text, k: int, args) -> dict:
    """(learner, rate) -> steps of adaptation -> image scores of the test set."""
    rows, memory = meta.target_rows(whitening, support, np.arange(k))
    seen = in_parts(partial(deviation.deviation, whitening, memory, own=np.full(32, -1)), test)
    own = tuple(x[:k].astype(np.float32).reshape(-1, x.shape[-1]) for x in support.healthy.levels)

    def nearest(part):
        levels = tuple(x.astype(jnp.float32) for x in part.levels)
        return similarity.image_score(memory_bank.memory_distance(levels, own), deviation.TOP)

    cosine = similarity.unit(jnp.asarray(test.pooled)) @ similarity.unit(text).T
    read = jax.jit(partial(seen_by, levels=len(whitening.kernel)))
    result = {
        ("memory", 0): {0: in_parts(nearest, test)},
        ("zero-shot", 0): {0: np.asarray(cosine[:, 1] - cosine[:, 0])},
    }
    for name, start in params.items():
        learned = isinstance(start, maml.MetaSGD | maml.StepRates)
        for rate in args.adapt_rates[:1] if learned else args.adapt_rates:
            every = heads(start, rows, Learner(name, inner_rate=rate), len(whitening.kernel))
            result[name, rate] = {s: np.asarray(read(every[s], seen)) for s in STEPS}
    return result


def heads(start, rows, learner, levels) -> dict:
    """The head after each of STEPS."""
    inner = learner.inner(max(STEPS))._replace(proximal=0.0)
    loss = partial(meta.loss, levels=levels)
    run = partial(maml.adapt, loss=loss, inner=inner, every=True)
    every, _ = jax.jit(run)(start, rows)
    first = maml.plain(start)
    return {s: jax.tree.map(lambda x, s=s: x[s - 1], every) if s else first for s in STEPS}


def seen_by(head, seen, levels: int):
    return deviation.logits(head, seen, levels)[1]


def in_parts(run, test: Features):
    """`run` on 32 images at a time, filled up with the first ones."""
    run, n = jax.jit(run), len(test.pooled)
    place = np.resize(np.arange(n), -(-n // 32) * 32).reshape(-1, 32)
    parts = [run(jax.tree.map(lambda x, p=p: x[p], test)) for p in place]
    return jax.tree.map(lambda *x: np.concatenate(x)[:n], *parts)


if __name__ == "__main__":
    main()
