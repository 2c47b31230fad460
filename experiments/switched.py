"""Runs of the whole model that differ in a part, many in one process: what ablations.py needs.

What a single run makes anew is kept here: the list of images and the tokens and masks of the test
set, the compiled training step of each variant, and within a draw the trained params and the values
of every branch. A part that only scores (tiles, suppression, the memory) so costs no training, and
a part that only trains no second memory. Training, branches, fusion and scores are the package's
own; MC-dropout, explanations, intervals and files are left out. Maps are measured in the tower
frame, AUROC and AUPRO, as in trials.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import trials
from ml_collections import ConfigDict

from medclip_jax import build
from medclip_jax import config as config_module
from medclip_jax.clip import vit
from medclip_jax.clip.outputs import Features
from medclip_jax.data import augmentation, datasets, preprocessing, splits
from medclip_jax.data.records import Record
from medclip_jax.data.synthetic_variants import Synthesis
from medclip_jax.detectors import detector, ensemble, map_filter, tiling
from medclip_jax.distributed import runtime, sharding
from medclip_jax.evaluation import evaluate, ground_truth, metrics
from medclip_jax.evaluation.ranking import PixelRanks
from medclip_jax.features import cache, encoder, training_pool
from medclip_jax.models.anomaly_map import to_pixels
from medclip_jax.training import loop

BATCH = 32  # images per scoring call
# fields that training does not read
SCORING = ("score.", "fusion.", "memory.", "calibration.alpha", "calibration.pixel_rate")
UNSEEN = ("log_every", "checkpoint_every", "validations", "explained", "cache", "cluster.")
FOR_MEMORY = ("memory.", "score.tiles")
FOR_PLAIN = ("prompts.", "model.language", "score.tiles", "data.modality", "data.anatomy")


class Place(NamedTuple):
    """Where a run takes place."""

    tower: vit.Clip
    feature_cache: cache.FeatureCache
    supports: Sequence[Record]
    test: Sequence[Record]


class Ground:
    """One data set, with what its runs have in common."""

    def __init__(self):
        self.towers: dict[Any, vit.Clip] = {}
        self.records: tuple[Record, ...] = ()
        self.tokens: dict[Any, list[Features]] = {}  # batches of the test set
        self.masks: dict[str, np.ndarray] = {}
        self.areas: dict[str, float | None] = {}
        self.programs: dict[Any, trials.Program] = {}
        self.draw: Any = None  # of which the two below are
        self.thetas: dict[Any, Any] = {}
        self.branches: dict[Any, detector.Detector] = {}

    def place(self, c: ConfigDict) -> Place:
        """Tower, feature_cache and split of a run; another draw forgets what the last one trained."""
        runtime.keep_compiled(Path(c.cache))
        named = c.clip.checkpoint, tuple(c.clip.levels), c.clip.dtype, c.model.refine
        if named not in self.towers:
            self.towers[named] = vit.load(*named)
        root = Path(c.data.root) if c.data.root else None
        if not self.records:
            policy = c.data.uncertain, c.data.blank
            self.records = datasets.load(c.data.name, root, Path(c.cache), c.k, policy)
        if self.draw != (c.k, c.seed):
            self.draw, self.thetas, self.branches = (c.k, c.seed), {}, {}
        where = c.data.pool, c.data.split, Path(c.cache)
        drawn = splits.split(self.records, c.k, c.seed, *where)
        like = c.data.fit, c.cache_dtype, sharding.mesh(), preprocessing.steps(c.data.recipe)
        feature_cache = cache.open_cache(Path(c.cache), self.towers[named], *like)
        return Place(self.towers[named], feature_cache, drawn.support, drawn.test)

    def batches(self, at: Place, tiles: int) -> list[Features]:
        """Tokens of the test images on the device, BATCH at a time, read once."""
        key = at.feature_cache.folder, tiles, tuple(r.id for r in at.test)
        if key not in self.tokens:
            encoder.encode_images(at.feature_cache, at.test)
            if tiles > 1:
                tiling.encode_images(at.feature_cache, [*at.supports, *at.test], tiles)
            load = cache.load_images if tiles == 1 else tiling.loader(tiles)
            read = load(at.feature_cache, at.test, BATCH)
            self.tokens[key] = [
                jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), b) for b in read
            ]
        elif tiles > 1:  # another draw has other supports
            tiling.encode_images(at.feature_cache, at.supports, tiles)
        return self.tokens[key]


def run(ground: Ground, config: ConfigDict) -> dict[str, Any]:
    """One run of method ours: {"image": {...}, "pixel": {...} or None} of the test set.

    Raises ValueError for a config with a teacher or with other data sets to learn from.
    """
    c = config_module.resolve(config)
    if c.distill.teacher or c.meta.data or c.method != "ours":
        raise ValueError("method ours alone, without config.distill.teacher and config.meta.data")
    at = ground.place(c)
    test = ground.batches(at, c.score.tiles)
    groups = loop.folds(c.k, c.calibration.folds)
    trained = key(c, leave=(*SCORING, *UNSEEN))
    if trained not in ground.thetas:
        ground.thetas[trained] = theta_of(ground, c, at, groups)
    params, design, frozen = ground.thetas[trained]

    def branch(name: str) -> detector.Detector:
        named = name.removesuffix(ensemble.IMAGE_ONLY), branch_key(c, name, at, trained)
        if named not in ground.branches:
            given = c, params, frozen, design, at.feature_cache, at.supports, groups
            ground.branches[named] = remembering(build.branch_of(name, *given), test)
        return ground.branches[named]

    given = params, frozen, design, at.feature_cache, at.supports, groups
    built, _ = build.assemble(c, *given, branch=branch)
    quiet = build.quieter(c, built, at.feature_cache, at.supports)
    return measured(ground, c, at, built, quiet, test)


def key(c: ConfigDict, leave: Sequence[str] = (), only: Sequence[str] = ("",)) -> tuple:
    """Fields whose names begin with one of `only`, but none of `leave`, with their values."""
    return tuple(
        (name, repr(value))
        for name, value in config_module.flat(c)
        if name.startswith(tuple(only)) and not (leave and name.startswith(tuple(leave)))
    )


def branch_key(c: ConfigDict, name: str, at: Place, trained: tuple) -> tuple:
    """What the values of a branch depend on, within a draw."""
    if name == "learned":
        return trained, c.score.tiles
    return str(at.feature_cache.folder), key(c, only=FOR_MEMORY if name == "memory" else FOR_PLAIN)


def theta_of(ground: Ground, c: ConfigDict, at: Place, groups) -> tuple[Any, Any, Any]:
    """Theta of all copies, the design and the frozen parameters."""
    strengths = augmentation.chosen(c.augment, c.data.modality)
    partners = c.seed if c.synthesis.partner == "support" else 0
    preset = c.synthesis.preset, c.synthesis.variants, partners, c.synthesis.partner
    pools = [training_pool.open_pool(at.feature_cache, at.supports, Synthesis(*preset, *strengths))]
    # the compiled step serves every draw; paths and seeds are not compiled in
    shape = key(c, leave=(*SCORING, *UNSEEN, "seed", "synthesis.", "augment.", "data.recipe"))
    if shape not in ground.programs:
        ground.programs[shape] = trials.program(c, at.tower, ())
    built = ground.programs[shape]
    params = trials.trained(c, at.tower, built, pools, sharding.mesh(), groups)
    return jax.device_get(params), built.design, built.frozen


def remembering(made: detector.Detector, test: Sequence[Features]) -> detector.Detector:
    """The detector, whose values of the batches of `test` are computed once."""
    known = {id(batch): i for i, batch in enumerate(test)}  # `Ground.tokens` keeps them alive

    def once(function: Callable | None) -> Callable | None:
        held: dict[int, np.ndarray] = {}

        def values(batch):
            if id(batch) not in known:
                return function(batch)
            if id(batch) not in held:
                held[id(batch)] = np.asarray(function(batch))
            return held[id(batch)]

        return None if function is None else values

    return made._replace(patches=once(made.patches), image=once(made.image))


def measured(ground: Ground, c: ConfigDict, at: Place, built, quiet, test) -> dict[str, Any]:
    """Image AUROC and AUPRC; pixel AUROC and AUPRO of images that are healthy or have a mask."""
    read = evaluate.scorer(at.tower.size, c.score.top)
    values = [np.asarray(built.patches(batch)) for batch in test]
    if built.image is None:
        raw = [read(v) for v in values]
    else:
        raw = [built.image(batch) for batch in test]
    scores = np.concatenate([np.asarray(r, np.float64) for r in raw])
    found = metrics.image_level(scores, np.array([r.label for r in at.test]))
    image = {name: found[name] for name in ("auroc", "auprc")}
    return {"image": image, "pixel": of_pixels(ground, at, np.concatenate(values), quiet)}


def of_pixels(ground: Ground, at: Place, values: np.ndarray, quiet) -> dict[str, float] | None:
    """Pooled over all images that are healthy or have a mask; None where none has."""
    size, known = at.tower.size, [i for i, r in enumerate(at.test) if r.masks or r.label == 0]
    marked = [r for r in at.test if r.masks]
    if not marked:
        return None
    if not set(ground.masks) >= {r.id for r in marked}:
        truth = ground_truth.Truths(marked, size, at.feature_cache.fit)
        ground.masks |= {r.id: mask for r, mask in zip(marked, truth, strict=True)}
    maps = jax.jit(lambda v: to_pixels(v, size))
    margin = 1e-3 + float(np.ptp(values)) * 1e-3  # up-sampled values stay within the patches'
    ranks = PixelRanks(float(values.min()) - margin, float(values.max()) + margin)
    empty = np.zeros((size, size), bool)
    for start in range(0, len(known), BATCH):
        group = known[start : start + BATCH]
        rows = np.resize(group, BATCH)  # one shape, one compilation
        heat = np.asarray(maps(values[rows]))[: len(group)]
        shown = [at.test[i] for i in group]
        if quiet is not None:
            heat = map_filter.treat(heat, quiet.steps, areas(ground, at, shown))
        for record, one in zip(shown, heat, strict=True):
            ranks.add(one, ground.masks.get(record.id, empty))
    return {"auroc": ranks.auroc(), "aupro": ranks.aupro()}


def areas(ground: Ground, at: Place, shown: Sequence[Record]) -> list[float | None]:
    """Area of a pixel of each image, mm², read once from its file; None if it is not known."""
    new = [r for r in shown if r.id not in ground.areas]
    found = map_filter.areas(new, at.tower.size, at.feature_cache.fit)
    ground.areas |= {r.id: area for r, area in zip(new, found, strict=True)}
    return [ground.areas[r.id] for r in shown]
