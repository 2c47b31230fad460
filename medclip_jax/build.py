"""From the configuration to objects: CLIP, data, prompts, model, training data, detector.

Nothing further in knows the configuration: functions take the values they need.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medclip_jax import config_validation
from medclip_jax.clip import checkpoint
from medclip_jax.config_validation import FUSED_METHODS
from medclip_jax.data import augmentation, datasets, preprocessing, splits, synthetic_variants
from medclip_jax.data.records import Record, Split
from medclip_jax.detectors import (
    calibration,
    detector,
    ensemble,
    map_filter,
    memory_bank,
    pixel_baselines,
    prompt_detector,
    saved,
    tiling,
    zero_shot,
)
from medclip_jax.distributed import sharding
from medclip_jax.errors import CheckpointError, ConfigError, WorkdirError
from medclip_jax.explain import grad_cam
from medclip_jax.features import (
    auxiliary,
    cache,
    encoder,
    support_images,
    thumbnails,
    tiles,
    training_pool,
)
from medclip_jax.inference import adapt, predictor
from medclip_jax.models import losses, model, prompt_sets, text_adapter, token_refinement
from medclip_jax.prompts import tokenize
from medclip_jax.prompts.prompts import Prompts
from medclip_jax.training import (
    batches,
    checkpoints,
    distillation,
    loop,
    maml,
    state,
    validation,
)
from medclip_jax.training.step import Learner

FOLDS = 4  # parts of the supports, each held out from the training of one fold model
SYNONYMS = 3  # words per anatomy, condition and modality that the ontology adds


def load_clip(c: ConfigDict) -> checkpoint.Clip:
    """The frozen CLIP with the layers tapped that the configuration names."""
    taps = tuple(c.clip.layers), c.clip.dtype, c.model.refine
    return checkpoint.load(c.clip.checkpoint, *taps, c.clip.implementation)


def load_split(c: ConfigDict) -> Split:
    """Supports and test images of the data set."""
    root = Path(c.data.root) if c.data.root else None
    meaning = {"uncertain": c.data.uncertain, "window": c.data.window}
    records = datasets.load(c.data.name, root, Path(c.cache), c.k, **meaning)
    return splits.split(records, c.k, c.seed, c.data.pool, c.data.split, Path(c.cache))


def open_cache(c: ConfigDict, clip: checkpoint.Clip, mesh) -> cache.FeatureCache:
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


def explanation(c: ConfigDict, clip: checkpoint.Clip) -> grad_cam.Explanation:
    """How scores are explained. Raises ConfigError for a layer that is not tapped."""
    layers = len(clip.widths)
    if not -layers <= c.explanation.layer < layers:
        raise ConfigError(
            f"config.explanation.layer is {c.explanation.layer}: give 0 to {layers - 1}, one of "
            f"the {layers} tapped layers (config.clip.layers), or -1 for the last"
        )
    return grad_cam.Explanation(c.explanation.method, c.explanation.layer, c.score.top)


def encode(c: ConfigDict, clip: checkpoint.Clip, split: Split, others, mesh):
    """Encode what the feature cache lacks; returns it and the training pools."""
    feature_cache, variants = open_cache(c, clip, mesh), synthesis(c)
    pools = [training_pool.open(feature_cache, split.support, variants)]
    where = {"folder": Path(c.cache), "uncertain": c.data.uncertain}
    target = (others, split, feature_cache, variants)
    pools += auxiliary.open_pools(*target, **where, seed=c.seed)
    encoder.encode_images(feature_cache, split.test)
    if c.score.tiles > 1:
        tiles.encode_images(feature_cache, [*split.support, *split.test], c.score.tiles)
    if c.teacher and c.steps:
        teacher = load_teacher(c, clip, split.test)
        pools = [distillation.add_logits(pools[0], teacher, feature_cache, split.support, variants)]
    return feature_cache, pools


def load_teacher(
    c: ConfigDict, clip: checkpoint.Clip, test: Sequence[Record]
) -> distillation.Teacher:
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
    parts = ("layers", "dtype", "implementation")
    same = trained.checkpoint == clip.digest and own.model.refine == c.model.refine
    if not same or any(own.clip[part] != c.clip[part] for part in parts):
        clip = load_clip(own)
    if clip.digest != trained.checkpoint:
        raise ConfigError(
            f"config.teacher {workdir} was trained with another CLIP than {own.clip.checkpoint} "
            f"is now ({trained.checkpoint}, not {clip.digest}): restore that one"
        )
    design, _ = build(own, clip)
    params, text = prompt_detector.learned(jax.tree.map(jnp.asarray, trained.params))

    @jax.jit
    def logits(images):
        how = dict(encoder=clip.image_encoder, mean=clip.mean, std=clip.std)
        tokens = checkpoint.encode_images(clip.vision, images, **how)
        return model.forward(params, text, tokens, design).logit

    return distillation.Teacher(clip.size, preprocessing.steps(own.data.recipe), logits)


def fresh_params(c: ConfigDict, clip: checkpoint.Clip, design: model.Design) -> dict:
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


def design_of(c: ConfigDict, clip: checkpoint.Clip, others) -> tuple[model.Design, dict]:
    """The model of a run, with the prompts of auxiliary data sets, and its frozen parameters."""
    design, frozen = build(c, clip)
    if others and c.steps:
        own = [phrases(c, clip, c.prompts.context, **other.words) for other in others]
        design = design._replace(sets=prompt_sets.stack([design.prompts, *own]))
    return design, frozen


def scorer(
    c: ConfigDict, clip: checkpoint.Clip, design: model.Design
) -> Callable[..., detector.Scores]:
    """The pure scoring function of the config's method; `detector` builds its parameters."""
    names, pool = branch_names(c), image_pool(c, clip)
    made = {name: branch_scorer(name, clip, design, pool) for name in names}
    return ensemble.scorer(made) if len(names) > 1 else made[names[0]]


def branch_scorer(
    name: str, clip: checkpoint.Clip, design: model.Design, pool: Callable
) -> Callable:
    """The pure scoring function of one branch."""
    if name == "memory":
        return memory_bank.scorer(pool)
    if name.startswith("zero_shot"):
        return zero_shot.scorer(clip, design.prompts.label)
    return prompt_detector.scorer(design, pool)


def image_pool(c: ConfigDict, clip: checkpoint.Clip) -> Callable:
    """Patch values [n, p] -> image scores [n]."""
    return partial(detector.image_score, size=clip.size, top=c.score.top)


def branch_names(c: ConfigDict) -> tuple[str, ...]:
    """The branches of the config's method; a method that does not fuse is its own branch."""
    return tuple(c.branches) if c.method in FUSED_METHODS else (c.method,)


def supports(
    c: ConfigDict, feature_cache: cache.FeatureCache, records: Sequence[Record]
) -> support_images.Supports | None:
    """Tokens of the supports; thumbnails for a baseline on pixels, None where there are none."""
    if not records:
        return None
    if c.method in pixel_baselines.METHODS:
        images = support_images.healthy_images(feature_cache, records)
        features = thumbnails.of_images(images)
        return support_images.Supports(len(records), features, features, None, None)
    return support_images.load(feature_cache, records, c.score.tiles)


def assemble(
    c: ConfigDict,
    clip: checkpoint.Clip,
    design: model.Design,
    frozen: dict,
    params: Any,
    found: support_images.Supports | None,
    folds: Sequence[np.ndarray],
) -> detector.Detector:
    """The detector that the config asks for.

    Args:
        params: [1 + folds, ...] as training leaves them.
        found: tokens of the supports; None: zero-shot without any.
        folds: the supports of each fold.
    """
    if c.method in pixel_baselines.METHODS:
        return pixel_baselines.METHODS[c.method](found.calibrating, found.k, clip.size)
    branches = {
        n: branch(n, c, clip, design, frozen, params, found, folds) for n in branch_names(c)
    }
    return ensemble.build(branches) if len(branches) > 1 else next(iter(branches.values()))


def branch(
    name: str, c: ConfigDict, clip, design, frozen, params, found, folds
) -> detector.Detector:
    """The detector of one branch, of whole images or with their tiles."""
    pool = image_pool(c, clip)
    plain = name.startswith("zero_shot")
    if plain:
        design, _ = build(c, clip, context=0)
    if found is None:
        return zero_shot.build(clip, frozen, design, None, 0)

    def scale(tokens, calibrating):
        if name == "memory":
            like = {"k": found.k, "coreset": c.memory_coreset, "calibrating": calibrating}
            return memory_bank.build(tokens, pool, clip.size, **like)
        if plain:
            return zero_shot.build(clip, frozen, design, calibrating, found.k)
        return prompt_detector.build(params, frozen, design, pool, calibrating, folds, found.k)

    whole = scale(found.tokens, found.calibrating)
    if c.score.tiles == 1:
        return whole
    small = scale(found.tile_tokens, found.tile_calibrating)
    return tiling.build(whole, small, c.score.tiles, clip.grid, None if plain else pool)


def calibrate(
    c: ConfigDict,
    scorer: detector.Detector,
    feature_cache: cache.FeatureCache,
    records: Sequence[Record],
) -> calibration.Calibration:
    """Thresholds of a detector, from its scores of the supports."""
    steps, mm2 = config_validation.map_filter(c), None
    if steps:
        mm2 = list(map_filter.areas(records, feature_cache.clip.size, feature_cache.fit))
        mm2 = mm2 * len(scorer.calibration.image) if c.k == 1 else mm2  # views of the one support
    return detector.calibrate(
        scorer,
        alpha=c.calibration.alpha,
        pixel_rate=c.calibration.pixel_rate,
        filter_steps=steps,
        mm2=mm2,
    )


def load_predictor(workdir: Path) -> predictor.Predictor:
    """The predictor of a trained workdir; the supports' files are not needed.

    Raises:
      WorkdirError: there is no whole trained detector.
      CheckpointError: its CLIP or adapter is not the one that it was trained with.
      ConfigError: it is of a method for tables alone: baselines on pixels and tiles.
    """
    trained = saved.read(workdir)
    c = ConfigDict(trained.config)
    if c.method in pixel_baselines.METHODS:
        raise ConfigError(
            f"{workdir} holds the baseline {c.method}, which is for comparison in tables: "
            "train with method=ours"
        )
    if c.score.tiles > 1:
        raise ConfigError(
            f"{workdir} scores tiles (config.score.tiles), which --mode predict cannot: "
            "train with tiles=1"
        )
    clip = load_clip(c)
    if clip.digest != trained.checkpoint:
        raise CheckpointError(
            f"{workdir} was trained with another checkpoint than {c.clip.checkpoint} is now "
            f"({trained.checkpoint}, not {clip.digest}): restore that one"
        )
    if text_adapter.digest(c.model.language) != trained.language:
        raise CheckpointError(
            f"{workdir} was trained with another language adapter than {c.model.language} is now: "
            "restore that one"
        )
    design, _ = build(c, clip)
    empty = detector.Scores(np.zeros((0, clip.grid**2)), np.zeros(0))
    k, random = trained.calibration.k, design.dropout > 0 and "learned" in trained.params
    params = jax.tree.map(jnp.asarray, trained.params)
    scores = detector.Detector(scorer(c, clip, design), params, None, empty, k, random, clip.size)
    names = {"dataset": c.data.name, "modality": c.data.modality, "k": c.k, "seed": c.seed}
    backbone = f"{c.clip.checkpoint.rsplit('/', 1)[-1]} ({clip.digest})"
    return predictor.Predictor(
        scores,
        trained.calibration,
        open_cache(c, clip, sharding.mesh()),
        jax.random.split(jax.random.key(c.seed), c.score.passes),
        trained.digest,
        c.data.window,
        {"method": c.method, **names, "checkpoint": clip.digest, "backbone": backbone},
        explanation(c, clip),
    )


def load_start(workdir: Path) -> adapt.Start:
    """What adaptation to a new site starts from: the newest checkpoint of a meta-learned run.

    Raises:
      WorkdirError: there is no run.
      ConfigError: it did not meta-learn, or scores what a site cannot.
      CheckpointError: it has no checkpoint.
    """
    try:
        c = ConfigDict(json.loads((workdir / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{workdir} holds no run ({error}): give one that was trained") from None
    if c.learner == "joint":
        raise ConfigError(f"{workdir} learned jointly: train one with --config.learner=maml")
    if c.score.map_filter or c.score.tiles > 1:
        raise ConfigError("a site has no config.score.map_filter and tiles: train without them")
    clip = load_clip(c)
    design, frozen = build(c, clip)
    count = 1 + len(batches.folds(c.k, FOLDS))
    params = fresh_params(c, clip, design)
    if c.learner == "meta_sgd":
        params = maml.meta_sgd(params, c.meta.inner_rate)
    template = state.start(params, loop.adam(c.learning_rate), count, c.seed)
    manager = checkpoints.open(workdir)
    with checkpoints.closing(manager):
        newest = checkpoints.restore(manager, template)
    if newest is None:
        raise CheckpointError(f"{workdir} has no checkpoint: run --mode train first")
    return site_start(c, clip, design, frozen, jax.tree.map(lambda x: x[0], newest.params))


def site_start(
    c: ConfigDict, clip: checkpoint.Clip, design, frozen: dict, params: Any
) -> adapt.Start:
    """What adaptation starts from; params: one set, a maml.MetaSGD if its rates were learned."""
    return adapt.start(
        *(clip, design, frozen, params),
        loss=partial(model.loss, design=design, weights=c.loss.to_dict()),
        inner=learner(c).inner(c.meta.adapt_steps),
        apply=prompt_detector.scorer(design, image_pool(c, clip)),
        site=adapt.Site(
            c.data.fit,
            c.data.window,
            preprocessing.steps(c.data.recipe),
            c.synthesis.preset,
            c.seed,
            FOLDS,
            c.calibration.alpha,
            c.calibration.pixel_rate,
        ),
    )


def build(
    c: ConfigDict, clip: checkpoint.Clip, context: int | None = None
) -> tuple[model.Design, dict]:
    """The static design of the model and its frozen parameters; `context` if not the config's."""
    if context is None:
        context = c.prompts.context if c.steps else 0
    shown = {name: c.data[name] for name in ("modality", "anatomy", "conditions")}
    built = phrases(c, clip, context, **shown)
    image = clip.image_encoder
    refinement = token_refinement.frozen(clip.params, image) if image.inputs else None
    design = model.Design(
        built,
        clip.text_encoder,
        clip.size,
        clip.grid,
        c.model.form,
        c.prompts.causal,
        c.model.learn_scale,
        c.model.dropout,
        refinement,
    )
    frozen = {"text": clip.text, "logit_scale": jnp.asarray(clip.logit_scale)}
    if c.model.language:
        frozen["language"] = text_adapter.load(c.model.language, clip.digest, clip.joint)
    return design, frozen


def phrases(
    c: ConfigDict, clip: checkpoint.Clip, context: int, modality: str, anatomy: str, conditions
) -> Prompts:
    """The prompts of a data set that shows this, made as the config says."""
    return tokenize.build(
        clip.tokenizer,
        clip.eos_id,
        phrases=c.prompts.phrases,
        anatomy=anatomy,
        conditions=conditions,
        modality=modality,
        context=context,
        position=c.prompts.position,
        init=c.prompts.init,
        synonyms=SYNONYMS,
        ontology_file=c.prompts.ontology_file,
        positions=clip.positions,
    )
