"""From the configuration to objects: CLIP, data, prompts, model, training data, detector.

Nothing further in knows the configuration: functions take the values they need.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medclip_jax import config_validation
from medclip_jax.clip import text_adapter, vit
from medclip_jax.config_validation import FUSED_METHODS
from medclip_jax.data import augmentation, datasets, preprocessing, splits, synthetic_variants
from medclip_jax.data.records import Record, Split
from medclip_jax.detectors import (
    by_name,
    detector,
    ensemble,
    map_filter,
    pixel_baselines,
    saved,
    tiling,
)
from medclip_jax.errors import ConfigError
from medclip_jax.evaluation import evaluate
from medclip_jax.explain import grad_cam
from medclip_jax.features import auxiliary, cache, encoder, training_pool
from medclip_jax.models import losses, model, prompt_sets, token_refinement
from medclip_jax.models.anomaly_map import to_pixels
from medclip_jax.prompts import tokenize
from medclip_jax.prompts.prompts import Prompts
from medclip_jax.training import distillation, loop, validation
from medclip_jax.training.step import Learner

FOLDS = 4  # parts of the supports, each held out from the training of one fold model
SYNONYMS = 3  # words per anatomy, condition and modality that the ontology adds


def load_clip(c: ConfigDict) -> vit.Clip:
    """The frozen CLIP with the layers tapped that the configuration names."""
    return vit.load(c.clip.checkpoint, tuple(c.clip.layers), c.clip.dtype, c.model.refine)


def load_split(c: ConfigDict) -> Split:
    """Supports and test images of the data set."""
    root = Path(c.data.root) if c.data.root else None
    meaning = {"uncertain": c.data.uncertain, "window": c.data.window}
    records = datasets.load(c.data.name, root, Path(c.cache), c.k, **meaning)
    return splits.split(records, c.k, c.seed, c.data.pool, c.data.split, Path(c.cache))


def open_cache(c: ConfigDict, clip: vit.Clip, mesh) -> cache.FeatureCache:
    """Where tokens of this CLIP and preprocessing are kept."""
    recipe = preprocessing.steps(c.data.recipe)
    reading = recipe, c.data.window
    return cache.open(Path(c.cache), clip, c.data.fit, c.clip.dtype, mesh, *reading)


def synthesis(c: ConfigDict) -> synthetic_variants.Synthesis:
    """How the anomalous variants of the supports are made."""
    copies = augmentation.chosen(config_validation.augment(c), c.data.modality)
    partner = "support" if c.synthesis.preset == "mediclip" else "self"
    return synthetic_variants.Synthesis(
        c.synthesis.preset,
        c.synthesis.variants if c.steps else 0,
        c.seed if partner == "support" else 0,
        partner,
        *copies,
    )


def auxiliary_datasets(c: ConfigDict) -> tuple[auxiliary.Auxiliary, ...]:
    """What config.meta.data names beside the target."""
    words = {name: c.data[name] for name in ("modality", "anatomy", "conditions")}
    _, strengths = augmentation.chosen(config_validation.augment(c), c.data.modality)
    names = [name for name in c.meta.data if name != c.data.name]
    reading = {"recipe": c.data.recipe, "window": c.data.window}
    return auxiliary.choose(names, words=words, strengths=strengths, **reading)


def explanation(c: ConfigDict, clip: vit.Clip) -> grad_cam.Explanation:
    """How scores are explained. Raises ConfigError for a layer that is not tapped."""
    layers = len(clip.widths)
    if not -layers <= c.explanation.layer < layers:
        raise ConfigError(
            f"config.explanation.layer is {c.explanation.layer}: give 0 to {layers - 1}, one of "
            f"the {layers} tapped layers (config.clip.layers), or -1 for the last"
        )
    return grad_cam.Explanation(c.explanation.method, c.explanation.layer, c.score.top)


def encode(c: ConfigDict, clip: vit.Clip, split: Split, others, mesh):
    """Encode what the feature cache lacks; returns it and the training pools."""
    feature_cache, variants = open_cache(c, clip, mesh), synthesis(c)
    pools = [training_pool.open(feature_cache, split.support, variants)]
    where = {"folder": Path(c.cache), "uncertain": c.data.uncertain}
    target = (others, split, feature_cache, variants)
    pools += auxiliary.open_pools(*target, **where, seed=c.seed)
    encoder.encode_images(feature_cache, split.test)
    if c.score.tiles > 1:
        tiling.encode_images(feature_cache, [*split.support, *split.test], c.score.tiles)
    if c.teacher and c.steps:
        teacher = load_teacher(c, clip, split.test)
        pools = [distillation.add_logits(pools[0], teacher, feature_cache, split.support, variants)]
    return feature_cache, pools


def load_teacher(c: ConfigDict, clip: vit.Clip, test: Sequence[Record]) -> distillation.Teacher:
    """The trained model of the workdir config.teacher.

    Raises:
      WorkdirError: the workdir holds no trained model.
      CheckpointError: its CLIP cannot be loaded.
      ConfigError: it cannot teach this run.
    """
    workdir = Path(c.teacher).expanduser()
    trained = saved.read(workdir)
    own = ConfigDict(trained.config)
    supports = json.loads((workdir / saved.SETTINGS).read_text())["supports"]
    distillation.check(workdir, own, c, supports, [r.sha256 for r in test])
    parts = ("layers", "dtype")
    same = trained.checkpoint == clip.digest and own.model.refine == c.model.refine
    if not same or any(own.clip[part] != c.clip[part] for part in parts):
        clip = load_clip(own)
    if clip.digest != trained.checkpoint:
        raise ConfigError(
            f"config.teacher {workdir} was trained with another CLIP than {own.clip.checkpoint} "
            f"is now ({trained.checkpoint}, not {clip.digest}): restore that one"
        )
    design, frozen = build(own, clip)
    params = jax.tree.map(jnp.asarray, trained.params)
    text = jax.jit(partial(model.text_features, design=design))(params, frozen)

    @jax.jit
    def logits(images):
        how = dict(tower=clip.vision_tower, mean=clip.mean, std=clip.std)
        tokens = vit.encode_images(clip.vision, images, **how)
        return model.forward(params, text, tokens, design).logit

    return distillation.Teacher(clip.size, preprocessing.steps(own.data.recipe), logits)


def fresh_params(c: ConfigDict, clip: vit.Clip, design: model.Design) -> dict:
    """Params as training starts from them."""
    language = None
    if c.model.language_tuned:
        language = text_adapter.load(c.model.language, clip.digest, clip.joint)
    return model.init(
        jax.random.key(c.seed),
        clip,
        design,
        context=c.prompts.context,
        shared=c.prompts.shared,
        contrast=bool(c.loss.simclr),
        language=language,
    )


def training(c: ConfigDict, design: model.Design) -> dict[str, Any]:
    """What `training.loop.fit` takes by name, but for workdir and mesh."""
    distill = losses.Distill(weight=c.loss.distill) if c.teacher else None
    schedule = {name: c[name] for name in ("steps", "seed", "batch", "checkpoint_every")}
    schedule |= {"tasks": c.meta.tasks, "shots": c.meta.shots, "validations": c.validations}
    return {
        "loss": partial(model.loss, design=design, weights=c.loss.to_dict(), distill=distill),
        "optimizer": loop.adam(c.learning_rate),
        "learner": learner(c),
        "schedule": loop.Schedule(**schedule),
        "score": validation.scorer(design, c.score.top),
        "views": bool(c.loss.simclr),
        "on_target": not c.meta.data or c.data.name in c.meta.data,
        "tensorboard": c.tensorboard,
    }


def learner(c: ConfigDict) -> Learner:
    """How params learn."""
    return Learner(c.learner, c.meta.inner_steps, c.meta.inner_rate, c.meta.adapt_steps)


def design_of(c: ConfigDict, clip: vit.Clip, others) -> tuple[model.Design, dict]:
    """The model of a run, with the prompts of auxiliary data sets, and its frozen parameters."""
    design, frozen = build(c, clip)
    if others and c.steps:
        own = [phrases(c, clip, c.prompts.context, **other.words) for other in others]
        design = design._replace(sets=prompt_sets.stack([design.prompts, *own]))
    return design, frozen


def assemble(
    c: ConfigDict, params, frozen, design, feature_cache, supports, groups, branch=None
) -> tuple[detector.Detector, ensemble.Mix | None]:
    """The detector that the config asks for, and how it mixes if it fuses branches.

    branch: makes the detector of a branch from its name; `branch_of` by default.
    """
    if branch is None:
        given = dict(
            frozen=frozen,
            design=design,
            feature_cache=feature_cache,
            supports=supports,
            groups=groups,
        )
        branch = partial(branch_of, c=c, params=params, **given)
    if c.method in pixel_baselines.METHODS:
        return pixel_baselines.build(c.method, feature_cache, supports), None
    if c.method not in FUSED_METHODS:
        return branch(c.method), None
    branches = {name: branch(name) for name in c.branches}
    if len(branches) == 1:
        return next(iter(branches.values())), None
    return ensemble.fuse(
        branches,
        feature_cache,
        supports,
        modality=c.data.modality,
        weights="equal",
        variants=1,
        seed=c.seed,
        image_scores=evaluate.scorer(feature_cache.clip.size, c.score.top),
        tiles=c.score.tiles,
    )


def branch_of(
    name: str, c: ConfigDict, params, frozen, design, feature_cache, supports, groups
) -> detector.Detector:
    """The detector of one branch, or of a method that has but one."""
    name = name.removesuffix(ensemble.IMAGE_ONLY)
    shape = design if name != "zero_shot" else build(c, feature_cache.clip, context=0)[0]
    like = c.memory_coreset, False
    made = by_name.build(name, params, frozen, shape, feature_cache, supports, groups, *like)
    if c.score.tiles == 1:
        return made
    return tiling.build(name, made, feature_cache, supports, c.score.tiles, c.memory_coreset)


def quieter(c: ConfigDict, built, feature_cache, supports) -> map_filter.Learned | None:
    """Outlier suppression as the supports' maps teach it; None if it is off."""
    steps = config_validation.map_filter(c)
    if not steps:
        return None
    size = feature_cache.clip.size
    maps = np.asarray(to_pixels(jnp.asarray(built.held_out), size))
    areas = list(map_filter.areas(supports, size, feature_cache.fit))
    areas = areas * len(maps) if c.k == 1 else areas  # views of the one support
    return map_filter.learn(steps, maps, areas)


def build(c: ConfigDict, tower: vit.Clip, context: int | None = None) -> tuple[model.Design, dict]:
    """The static design of the model and its frozen parameters; `context` if not the config's."""
    if context is None:
        context = c.prompts.context if c.steps else 0
    shown = {name: c.data[name] for name in ("modality", "anatomy", "conditions")}
    built = phrases(c, tower, context, **shown)
    vision, kept = tower.vision_tower, None
    if isinstance(vision, vit.Tower) and vision.inputs:
        kept = token_refinement.frozen(tower.vision, vision.levels, vision.heads, vision.eps)
    design = model.Design(
        built,
        tower.text_tower,
        tower.size,
        tower.grid,
        c.model.form,
        c.prompts.causal,
        c.model.learn_scale,
        c.model.dropout,
        kept,
    )
    text = dict(tower.text)
    if c.model.language:
        text["language"] = text_adapter.load(c.model.language, tower.digest, tower.joint)
    return design, {"text": text, "logit_scale": jnp.asarray(tower.logit_scale)}


def phrases(
    c: ConfigDict, tower: vit.Clip, context: int, modality: str, anatomy: str, conditions
) -> Prompts:
    """The prompts of a data set that shows this, made as the config says."""
    return tokenize.build(
        tower.tokenizer,
        tower.eos_id,
        phrases=c.prompts.phrases,
        anatomy=anatomy,
        conditions=conditions,
        modality=modality,
        context=context,
        position=c.prompts.position,
        init=c.prompts.init,
        synonyms=SYNONYMS,
        ontology_file=c.prompts.ontology_file,
        positions=len(tower.text["position"]),
    )
