"""Runs of the learned branch alone that differ in their learner, many in one process.

What a single run makes anew is made once here: the data set's list, the tokens and masks of its
images, and the compiled programs of every variant and K. One params is trained, on all supports;
the held-out copies, which only calibrate, are left out, and so is the memory, which would dilute
what the learners differ in. Training, adaptation and scores are the package's own.
"""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from medclip_jax import build
from medclip_jax import config as config_module
from medclip_jax.clip import vit
from medclip_jax.clip.outputs import Features
from medclip_jax.data import augmentation, datasets, splits
from medclip_jax.data.records import Record
from medclip_jax.data.synthetic_variants import Synthesis
from medclip_jax.distributed import sharding
from medclip_jax.distributed.runtime import prefetch
from medclip_jax.evaluation import evaluate, ground_truth, metrics
from medclip_jax.evaluation.ranking import PixelRanks
from medclip_jax.features import auxiliary, cache, encoder, training_pool
from medclip_jax.models import model, prompt_sets
from medclip_jax.models.anomaly_map import to_pixels
from medclip_jax.training import loop, step

BATCH = 64  # images per scoring call


class Program(NamedTuple):
    """What is compiled of a variant at one K; it serves every draw."""

    design: model.Design
    frozen: dict
    optimizer: optax.GradientTransformation
    step: Any
    adapt: Any
    patches: Any  # (params, text, features) -> [n, p]
    text: Any  # params -> [c, j]
    pixels: Any  # [n, p] -> [n, s, s]
    image_scores: Any  # [n, p] -> [n]


class Ground:
    """A data set with what has been read and compiled of it."""

    def __init__(self):
        self.tower: vit.Clip | None = None
        self.records: tuple[Record, ...] = ()
        self.tokens: dict[str, Features] = {}
        self.masks: dict[str, np.ndarray] = {}
        self.programs: dict[Any, Program] = {}

    def load(self, c: ConfigDict) -> None:
        """List the data and load the tower, unless that has been done."""
        if self.tower is None:
            self.tower = vit.load(c.clip.checkpoint, tuple(c.clip.levels), c.clip.dtype)
            root = Path(c.data.root) if c.data.root else None
            self.records = datasets.load(c.data.name, root, Path(c.cache), c.k)

    def read(self, feature_cache: cache.FeatureCache, test: tuple[Record, ...]) -> None:
        """Tokens and masks of test images that are not held yet."""
        new = [r for r in test if r.id not in self.tokens]
        encoder.encode_images(feature_cache, new)
        for r, row in zip(new, cache.load_images(feature_cache, new, 1), strict=True):
            self.tokens[r.id] = row
        marked = [r for r in new if r.masks]
        if marked:
            truth = ground_truth.Truths(marked, self.tower.size, feature_cache.fit)
            self.masks |= {r.id: mask for r, mask in zip(marked, truth, strict=True)}


def run(ground: Ground, config: ConfigDict, name: str) -> dict[str, Any]:
    """Train and adapt one params as `config` says and score the test set with it.

    `name`: of the variant; configs of one name and K may differ in their seed alone.
    Returns {"gradients", "image": {...}, "pixel": {...} or None} with AUROC and AUPRO.
    """
    c = config_module.resolve(config)
    ground.load(c)
    drawn = splits.split(ground.records, c.k, c.seed, c.data.pool, c.data.split, Path(c.cache))
    beside, mesh = auxiliary.read(c), sharding.mesh()
    feature_cache = cache.open_cache(Path(c.cache), ground.tower, c.data.fit, c.cache_dtype, mesh)
    made = Synthesis(
        *(c.synthesis.preset, c.synthesis.variants, 0, "self"),
        *augmentation.chosen(c.augment, c.data.modality),
    )
    pools = [training_pool.open_pool(feature_cache, drawn.support, made)]
    pools += auxiliary.open_pools(beside, c, drawn, feature_cache, made)
    ground.read(feature_cache, drawn.test)
    if (name, c.k) not in ground.programs:
        ground.programs[name, c.k] = program(c, ground.tower, beside)
    built = ground.programs[name, c.k]
    params = jax.tree.map(lambda x: x[0], trained(c, ground.tower, built, pools, mesh))
    return {"gradients": c.steps * config_module.gradients(c)} | measured(
        ground, built, params, drawn.test
    )


def program(c: ConfigDict, tower: vit.Clip, beside: tuple) -> Program:
    """The parts of fit.run and detector.learned, to be compiled at their first call."""
    design, frozen = build.build(c, tower)
    if beside:
        own = [build.phrases(c, tower, c.prompts.context, **other.words) for other in beside]
        design = design._replace(sets=prompt_sets.stack([design.prompts, *own]))
    loss = partial(model.loss, design=design, weights=c.loss.to_dict())
    inner = step.inner(c.learner, c.meta.inner_steps, c.meta.inner_rate, c.meta.learn_rate)
    optimizer = optax.adam(c.optimizer.learning_rate, b1=c.optimizer.b1, b2=c.optimizer.b2)
    last = inner._replace(steps=c.meta.adapt_steps)
    objective = loss if c.learner == "joint" else step.episodic(loss, inner)
    return Program(
        *(design, frozen, optimizer),
        step.make_step(objective, optimizer),
        jax.jit(
            lambda params, frozen, rows: step.adapt(params, frozen, rows, loss=loss, inner=last)
        ),
        jax.jit(lambda params, text, batch: model.forward(params, text, batch, design).logit),
        jax.jit(lambda params: model.text_features(params, frozen, design)),
        jax.jit(partial(to_pixels, size=tower.size)),
        evaluate.scorer(tower.size, c.score.top),
    )


def trained(c: ConfigDict, tower: vit.Clip, built: Program, pools: list, mesh, groups=()) -> Any:
    """Theta after training and, of learners other than joint, adaptation; [1 + folds, ...].

    groups: the folds that are held out, a copy each; none by default.
    """
    state = loop.start(c, tower, built.design, built.optimizer, 1 + len(groups))
    read = loop.reader(c, pools, groups, mesh)
    with contextlib.closing(prefetch(read, range(c.steps))) as batches:
        for batch in batches:
            state, parts = built.step(state, built.frozen, batch)
    loop.finite(c.steps, jax.device_get(parts))
    params = state.params
    if c.learner != "joint":
        rows = step.adaptation_rows(training_pool.join(pools), step.supports(c.k, groups))
        params, _ = built.adapt(params, built.frozen, rows)
    return params


def measured(ground: Ground, built: Program, params: Any, test: tuple[Record, ...]) -> dict:
    """Image AUROC, and pixel AUROC and AUPRO (2^20 bins) where there are masks."""
    text = built.text(params)
    values = []
    for start in range(0, len(test), BATCH):
        group = test[start : start + BATCH]
        rows = [ground.tokens[group[i % len(group)].id] for i in range(BATCH)]
        batch = jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x), jnp.float32), *rows)
        values.append(built.patches(params, text, batch)[: len(group)])
    values = np.concatenate(values)
    label = np.array([r.label for r in test])
    found = metrics.image_level(np.asarray(built.image_scores(values), np.float64), label)
    return {
        "image": {"auroc": found["auroc"]},
        "pixel": pixel_level(ground, built, values, test) if ground.masks else None,
    }


def pixel_level(ground: Ground, built: Program, values: np.ndarray, test) -> dict[str, float]:
    """Pooled over all images that are healthy or have a mask; in the tower frame."""
    ranks = PixelRanks(float(values.min()) - 1e-3, float(values.max()) + 1e-3)
    empty = np.zeros((ground.tower.size,) * 2, bool)
    for start in range(0, len(test), BATCH):
        group = test[start : start + BATCH]
        heat = np.asarray(built.pixels(values[start : start + BATCH]))
        for record, one in zip(group, heat, strict=True):
            if record.id in ground.masks or record.label == 0:
                ranks.add(one, ground.masks.get(record.id, empty))
    return {"auroc": ranks.auroc(), "aupro": ranks.aupro()}
