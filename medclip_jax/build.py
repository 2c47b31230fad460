"""From the configuration to objects: CLIP, data, prompts, model, training, detector.

Nothing further in knows the configuration: functions take the values they need.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medclip_jax import config_validation, files, stored
from medclip_jax.clip import lite0
from medclip_jax.clip.checkpoint import Clip, describe, load
from medclip_jax.config_validation import FIXED_METHODS, PIXEL_METHODS
from medclip_jax.data import augmentation, datasets, preprocessing, splits
from medclip_jax.data.catalog import with_role
from medclip_jax.data.layouts import Record, Split
from medclip_jax.detectors import saved, tiling
from medclip_jax.distributed import runtime, sharding
from medclip_jax.errors import ConfigError
from medclip_jax.explain import grad_cam
from medclip_jax.features import cache, encoder, training_pool
from medclip_jax.io.image import parse_window
from medclip_jax.models import losses, model, modules, similarity, text_adapter
from medclip_jax.prompts import ontology, tokenize
from medclip_jax.prompts.tokenize import Prompts
from medclip_jax.training import distillation, episodes, loop, meta, validation
from medclip_jax.training.step import Contrast, Learner

FOLDS = 4  # parts of the supports, each held out from the training of one fold model
AUXILIARY_IMAGES = 32  # healthy images of each auxiliary dataset
ABNORMAL_IMAGES = 60  # real abnormal images of each source of meta-learning
SYNONYMS = 3  # words per anatomy, condition and modality that the ontology adds


def load_clip(c: ConfigDict) -> Clip:
    """The frozen CLIP with the layers tapped that the configuration names.

    Raises ConfigError for an encoder of images alone where prompts would be used, and as
    sharding.devices.
    """
    sharding.devices()
    dtype = "float32" if c.clip.dtype == "float16" else c.clip.dtype  # which tokens alone have
    taps = tuple(c.clip.layers), dtype, c.model.refine, c.clip.implementation
    clip = load(c.clip.checkpoint, *taps, c.clip.size)
    branches = branch_names(c)
    texts = [name for name in branches if name not in ("memory", *PIXEL_METHODS)]
    if clip.text_encoder is None and texts:
        raise ConfigError(
            f"{c.clip.checkpoint} is an encoder of images alone, and {', '.join(texts)} needs "
            "prompts: give --config.method=memory"
        )
    return lite0.with_memory_encoder(clip) if c.memory_encoder and "memory" in branches else clip


def branch_names(c: ConfigDict) -> tuple[str, ...]:
    """The branches of the config's method; one that learns nothing is its own branch."""
    return (c.method,) if c.method in FIXED_METHODS else tuple(c.branches)


def describe_clip(c: ConfigDict) -> list[str]:
    """A named checkpoint and what images cost, by line; ConfigError for what a run refuses."""
    preprocessing.steps(c.data.recipe)
    clip = load_clip(c)
    explanation(c, clip), model_parts(c, clip, auxiliary_datasets(c)), saved.digest_of_teacher(c)
    named = c.clip.checkpoint != "compact"
    lines = describe(clip, c.k * (1 + c.synthesis.variants)) if named else {}
    return [f"{name:10} {line}" for name, line in lines.items()]


def load_split(c: ConfigDict) -> Split:
    """Supports and test images of the data set."""
    parse_window(c.data.window), preprocessing.steps(c.data.recipe)  # before anything is read
    root = files.expanded(c.data.root) if c.data.root else None
    meaning = {"uncertain": c.data.uncertain, "window": c.data.window}
    records = datasets.load(c.data.name, root, Path(c.cache), c.k, **meaning)
    split = splits.split(records, c.k, c.seed, c.data.pool, c.data.split, Path(c.cache))
    return split._replace(test=tuple(splits.with_units(split.test, records, Path(c.cache))))


def load_extra(c: ConfigDict, split: Split) -> tuple[Record, ...]:
    """Healthy images of config.calibration.extra; () where there is no such folder named."""
    how = split, c.calibration.alpha, c.data.window, Path(c.cache)
    return datasets.extra(files.expanded(c.calibration.extra), *how) if c.calibration.extra else ()


def open_cache(c: ConfigDict, clip: Clip, mesh) -> cache.FeatureCache:
    """Where tokens of this CLIP and preprocessing are kept."""
    reading = preprocessing.steps(c.data.recipe), c.data.window
    return cache.open(Path(c.cache), clip, c.data.fit, c.clip.dtype, mesh, *reading)


def synthesis(c: ConfigDict, supports: Sequence[Record] = ()) -> augmentation.Synthesis:
    """How anomalous variants are made; ConfigError for fewer of a support than training needs."""
    copies = augmentation.chosen(config_validation.augment(c), c.data.modality)
    partner = "support" if c.synthesis.preset == "mediclip" else "self"
    variants = c.synthesis.variants if c.steps else 0
    seed = c.seed if partner == "support" else 0
    recipe = augmentation.Synthesis(c.synthesis.preset, variants, seed, partner, *copies)
    if variants and supports and (c.meta.sources or c.learner != "joint"):
        kinds = np.stack([augmentation.drawn_kinds(r, recipe)[0] for r in supports])
        if c.meta.sources:
            episodes.check_altered(kinds)
        else:
            episodes.check(kinds, training_pool.supports(len(kinds), folds(c)), recipe.preset)
    return recipe


def auxiliary_datasets(c: ConfigDict) -> tuple[datasets.Auxiliary, ...]:
    """What config.meta.data or config.meta.sources names beside the target, see `auxiliary`."""
    _, strengths = augmentation.chosen(config_validation.augment(c), c.data.modality)
    words = {name: c.data[name] for name in ("modality", "anatomy", "conditions")}
    how = {"recipe": c.data.recipe, "strengths": strengths, "window": c.data.window}
    if c.meta.sources:
        how |= {"default_root": files.expanded(c.data.root) if c.data.root else None}
        sources = datasets.auxiliary("sources", c.meta.sources, words, other_modality=True, **how)
        if kept := {other.name for other in sources} & set(with_role("report")):
            raise ConfigError(
                f"config.meta.sources has {min(kept)}, whose labels are for final scores alone: "
                "leave it out"
            )
        return sources
    others = [name for name in c.meta.data if name != c.data.name]
    return datasets.auxiliary("data", others, words, **how)


def explanation(c: ConfigDict, clip: Clip) -> grad_cam.Explanation:
    """How scores are explained. Raises ConfigError for a layer that is not tapped."""
    first, layers, whose = 0, len(clip.widths), "tapped layers (config.clip.layers)"
    if clip.memory_levels and branch_names(c) == ("memory",):  # it reads no layer of the CLIP
        first, layers, whose = layers, clip.memory_levels, "layers of the memory's encoder"
    if not -layers <= c.explanation.layer < layers:
        raise ConfigError(
            f"config.explanation.layer is {c.explanation.layer}: give 0 to {layers - 1}, one of "
            f"the {layers} {whose}, or -1 for the last"
        )
    layer = first + c.explanation.layer % layers
    return grad_cam.Explanation(c.explanation.method, layer, c.score.top)


def encode(c: ConfigDict, clip: Clip, split: Split, others, mesh, teacher=None, extra=()):
    """Encode what the feature cache lacks; returns it and the training pools.

    teacher: the pool of the supports carries its patch logits.
    """
    feature_cache, variants = open_cache(c, clip, mesh), synthesis(c)
    pools: list[Any]
    if c.meta.sources:
        pools = [encoder.open_source(feature_cache, split.support, (), variants)]
    else:
        pools = [encoder.open_pool(feature_cache, split.support, variants)]
    for other in others:
        where = other.name, other.root, Path(c.cache)
        records = datasets.load(*where, uncertain=c.data.uncertain, window=other.window)
        own = cache.with_recipe(feature_cache, other.recipe, other.window)
        if c.meta.sources:  # the same whatever the target, K and draw
            sides = splits.source(records, split, AUXILIARY_IMAGES, ABNORMAL_IMAGES)
            runtime.agree({f"the images of {other.name}": [r.sha256 for r in sum(sides, ())]})
            pools.append(encoder.open_source(own, *sides, variants))
            continue
        images = splits.healthy(records, split, AUXILIARY_IMAGES, c.seed)
        runtime.agree({f"the images of {other.name}": [r.sha256 for r in images]})
        pools.append(encoder.open_pool(own, images, variants._replace(strengths=other.strengths)))
    encoder.encode_images(feature_cache, [*split.test, *extra])
    if c.score.tiles > 1:
        tiling.encode_images(feature_cache, [*split.support, *split.test, *extra], c.score.tiles)
    if teacher is not None:
        pools = [distillation.add_logits(pools[0], teacher, feature_cache, split.support, variants)]
    return feature_cache, pools


def fresh_params(c: ConfigDict, clip: Clip, design: model.Design) -> dict:
    """Params as training starts from them."""
    tuned = c.model.language_tuned
    own = text_adapter.load(c.model.language, clip.own_digest, clip.joint) if tuned else None
    return model.init(
        jax.random.key(c.seed),
        clip,
        design,
        context=c.prompts.context,
        shared=c.prompts.shared,
        contrast=bool(c.loss.simclr),
        language=own,
    )


def training(c: ConfigDict, clip: Clip, design: model.Design, others: Sequence) -> dict[str, Any]:
    """What `training.loop.fit` takes by name, but for workdir and mesh; others: auxiliary pools."""
    distill = losses.Distill(weight=c.loss.distill) if c.teacher else None
    own = {n: c[n] for n in ("steps", "seed", "batch", "checkpoint_every", "validations")}
    simclr = partial(model.simclr, design=design)
    names = [origin(c, clip, design), saved.digest_of_teacher(c), *(p.digest for p in others)]
    return {
        "loss": partial(model.loss, design=design, weights=c.loss.to_dict(), distill=distill),
        "optimizer": loop.adam(c.learning_rate),
        "learner": learner(c),
        "schedule": loop.Schedule(**own, tasks=c.meta.tasks, shots=c.meta.shots),
        "score": validation.scorer(design, c.score.top),
        "contrast": Contrast(simclr, c.loss.simclr) if c.loss.simclr else None,
        "on_target": not c.meta.data or c.data.name in c.meta.data,
        "tensorboard": c.tensorboard,
        "origin": "".join(names),
    }


def origin(c: ConfigDict, clip: Clip, design: model.Design) -> str:
    """Names what a run learns with besides images: the CLIP, the language adapter, the prompts."""
    return stored.digest([clip.digest, text_adapter.digest(c.model.language), design.prompts.text])


def folds(c: ConfigDict) -> list[np.ndarray]:
    """Indices of the supports that each fold model does not see."""
    return training_pool.folds(c.k, FOLDS)


def learner(c: ConfigDict) -> Learner:
    """How params learn."""
    return Learner(c.learner, c.meta.inner_steps, c.meta.inner_rate, c.meta.adapt_steps)


def meta_heads(c: ConfigDict, clip: Clip, pools: Sequence, mesh, workdir: Path, train) -> tuple:
    """(whitening, heads [1 + folds] adapted to the supports) of what the sources teach.

    pools: Source of the target, then of config.meta.sources. workdir: for metrics.jsonl. train:
    False requires that they taught it before.
    """
    target, *sources = pools
    for pool in pools:
        episodes.check_altered(pool.kinds)
    made_from = [clip.digest, c.clip.dtype, [s.digest for s in sources]]
    how = {"steps": c.steps, "tasks": c.meta.tasks, "mesh": mesh, "resume_only": not train}
    state = meta.learned(Path(c.cache), made_from, sources, learner(c), **how)
    if sharding.is_main():
        with loop.MetricsLog(workdir, 0, c.tensorboard) as log:
            for step, *values in state.log.tolist():
                log.write(int(step), dict(zip(("loss", "before", "after"), values, strict=True)))
    members = training_pool.supports(c.k, folds(c))
    return state.whitening, meta.adapted(state, learner(c), target, members)


def model_parts(
    c: ConfigDict, clip: Clip, others: Sequence = (), context: int | None = None
) -> tuple[model.Design, dict]:
    """The static design of the model and its frozen parameters.

    Args:
      others: auxiliary data sets, whose prompts are trained on too.
      context: learnable vectors per prompt, if not the configuration's.
    """
    if context is None:
        context = c.prompts.context if c.steps else 0
    words = {name: c.data[name] for name in ("modality", "anatomy", "conditions")}
    own, sets = prompts_of(c, clip, context, **words), None
    if others and c.steps and not c.meta.sources:
        more = [prompts_of(c, clip, context, **other.words) for other in others]
        sets = similarity.stack_prompts([own, *more])
    design = model.Design(
        own,
        clip.text_encoder,
        clip.size,
        clip.grid,
        c.model.form,
        c.prompts.causal,
        c.model.learn_scale,
        c.model.dropout,
        modules.frozen_blocks(clip.params, clip.image_encoder) if c.model.refine else None,
        sets,
        c.score.corners,
    )
    frozen = {"text": clip.text, "logit_scale": jnp.asarray(clip.logit_scale)}
    if c.model.language:
        frozen["language"] = text_adapter.load(c.model.language, clip.own_digest, clip.joint)
    return design, frozen


def prompts_of(
    c: ConfigDict, clip: Clip, context: int, modality: str, anatomy: str, conditions
) -> Prompts:
    """The prompts of a data set that shows this, made as the config says."""
    if clip.text_encoder is None:
        return tokenize.NONE
    words = tokenize.Words((anatomy,), tuple(conditions), (modality,))
    if c.prompts.phrases == "ontology":
        table = ontology.load(c.prompts.ontology_file)
        words = ontology.expand(table, conditions, anatomy, modality, SYNONYMS)
    return tokenize.build(
        clip.tokenizer,
        clip.eos_id,
        phrases=c.prompts.phrases,
        words=words,
        context=context,
        position=c.prompts.position,
        init=c.prompts.init,
        positions=clip.positions,
    )
