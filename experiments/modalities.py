"""Data sets of many modalities as the benchmark of meta-learning (leave_one_out.py) reads them."""

import tempfile
from pathlib import Path

import jax
import numpy as np

from medclip_jax import build, config, train
from medclip_jax.clip import lite0
from medclip_jax.clip.layers import Features
from medclip_jax.data import catalog, datasets, splits
from medclip_jax.data.layouts import Split
from medclip_jax.detectors import detector, tiling
from medclip_jax.detectors.detector import Scores
from medclip_jax.distributed import sharding
from medclip_jax.features import cache, encoder
from medclip_jax.models import similarity
from medclip_jax.training import episodes, meta

LEVELS = {"clip": slice(0, 3), "memory": slice(3, None), "both": slice(None)}  # of tokens
WORDS = catalog.PRESETS | catalog.SETS


class Data:
    """Coarse tokens of the data sets, encoded once into the feature cache."""

    def __init__(self, root: Path, tokens: str = "clip"):
        self.root, self.mesh, self.levels = root, sharding.mesh(), LEVELS[tokens]
        self.sources: dict = {}
        self.learned: dict = {}
        c = config.base("k=16", name="busi", **WORDS["busi"])
        c.clip.dtype, c.synthesis.variants, c.memory_encoder = "float16", 12, ""  # CLIP's tokens
        c.synthesis.preset = "medclip"  # as in configs/meta.py
        self.c = config.resolve(c)
        self.clip = build.load_clip(self.c)
        if tokens != "clip":  # as levels of one encoder, which variants have, too
            self.clip = lite0.with_memory_encoder(self.clip)._replace(memory_levels=0)
        self.cache = build.open_cache(self.c, self.clip, self.mesh)
        self.variants = build.synthesis(self.c)
        sharing = self.c.score.affinity, LEVELS["clip"].stop
        self.share = jax.jit(detector.with_shared_maps(lambda scores, *_: scores, *sharing))

    def records(self, name: str):
        return datasets.load(name, self.root, Path(self.c.cache))

    def source(self, name: str) -> meta.Source:
        if name not in self.sources:
            records = self.records(name)
            counts = build.AUXILIARY_IMAGES, build.ABNORMAL_IMAGES
            sides = splits.source(records, Split((), ()), *counts)
            source = encoder.open_source(self.cache, *sides, self.variants)
            self.sources[name] = self.selected(source)
        return self.sources[name]

    def tokens(self, records) -> Features:
        encoder.encode_images(self.cache, records)
        small = jax.jit(encoder.coarse)
        each = [small(cache.load(cache.image_path(self.cache, r))) for r in records]
        return jax.tree.map(lambda *x: np.concatenate(x), *each)

    def selected(self, x):
        """A Source or Features with the levels that heads read."""
        if isinstance(x, Features):
            return x._replace(levels=x.levels[self.levels])
        parts = ("healthy", "altered", "abnormal")
        return x._replace(**{n: self.selected(getattr(x, n)) for n in parts})

    def support(self, records) -> meta.Source:
        """Their tokens; gentle views of a single image are supports too, without anomalies."""
        source = self.selected(encoder.open_source(self.cache, records, (), self.variants))
        if len(records) > 1:
            return source
        views = self.selected(encoder.coarse(tiling.load_supports(self.cache, records).calibrating))
        healthy = jax.tree.map(lambda *x: np.concatenate(x), source.healthy, views)
        none = np.full((len(views.pooled), source.kinds.shape[1]), episodes.IDENTITY)
        return source._replace(healthy=healthy, kinds=np.concatenate([source.kinds, none]))

    def ours(self, name: str, split: Split, seed: int) -> Scores:
        """Scores of the test set by the package's default method; a value per pixel of its maps."""
        arg = f"k={len(split.support)},seed={seed}"
        c = config.base(arg, name=name, root=str(self.root or ""), **WORDS[name])
        c.clip.dtype = self.c.clip.dtype  # the same tokens
        c.validations, c.explained, c.score.passes = 0, 0, 1  # which no score depends on
        prepared = train.prepare(c)._replace(split=split)
        encoded = train.encode(prepared)
        with tempfile.TemporaryDirectory() as folder:
            fitted = train.fit(prepared, encoded, Path(folder))
        found = train.score(prepared, encoded, fitted, None).test.predictions
        return Scores(found.maps.reshape(len(found.maps), -1), found.score)

    def zero_shot(self, name: str) -> np.ndarray:
        """Mean plain prompt of both classes."""
        c = config.resolve(config.base("k=16", name=name, **WORDS[name]))
        design, frozen = build.model_parts(c, self.clip, context=0)
        text = build.model.text_features({}, frozen, design)
        return similarity.class_features(similarity.Text(text, design.prompts.label))
