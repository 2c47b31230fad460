"""From the configuration, or a trained workdir, to a detector: of a run, a predictor, a teacher."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medclip_jax import build, config, config_validation, files, stored
from medclip_jax.clip import checkpoint
from medclip_jax.clip.checkpoint import Clip
from medclip_jax.data import preprocessing
from medclip_jax.data.layouts import Record
from medclip_jax.detectors import (
    calibration,
    detector,
    deviation,
    ensemble,
    memory_bank,
    prompt_detector,
    saved,
    tiling,
)
from medclip_jax.distributed import sharding
from medclip_jax.errors import CheckpointError, ConfigError, WorkdirError
from medclip_jax.features import cache
from medclip_jax.inference import adapt, predictor
from medclip_jax.io import read
from medclip_jax.models import model, text_adapter
from medclip_jax.training import checkpoints, distillation, loop, maml, step


def score_function(
    c: ConfigDict, clip: Clip, design: model.Design
) -> Callable[..., detector.Scores]:
    """The pure scoring function of the config's method; `assemble` builds its parameters."""
    names, image_score = build.branch_names(c), image_score_of(c, clip)
    own = clip, design, image_score, c.score.affinity
    branches = {name: branch_function(name, *own) for name in names}
    if c.score.tiles > 1:
        for name, apply in branches.items():
            pool = None if name.startswith("zero_shot") else image_score
            branches[name] = tiling.scorer(apply, c.score.tiles, clip.grid, clip.size, pool)
    return ensemble.scorer(branches) if len(names) > 1 else branches[names[0]]


def branch_function(name: str, clip: Clip, design: model.Design, image_score, width) -> Callable:
    """The pure scoring function of one branch; width: of config.score.affinity."""
    if name == "memory":
        apply = memory_bank.scorer(image_score, clip.first_memory_level)
    elif name == "meta":
        apply = deviation.scorer(clip.grid)
    elif name.startswith("zero_shot"):
        apply = prompt_detector.zero_shot_scorer(clip, design.prompts.label)
    else:
        apply = prompt_detector.scorer(design, image_score)
    return detector.with_shared_maps(apply, width, len(clip.widths))


def image_score_of(c: ConfigDict, clip: Clip) -> Callable:
    """Patch values [n, p] -> image scores [n]."""
    return partial(detector.image_score, size=clip.size, top=c.score.top, corners=c.score.corners)


def words(c: ConfigDict, design: model.Design) -> str:
    """Names the language adapter, with the prompts where a file of the user's makes them."""
    own = text_adapter.digest(c.model.language)
    return stored.digest([own, design.prompts.text]) if c.prompts.ontology_file else own


def branch_shares(c: ConfigDict) -> dict | None:
    """Each branch's share of the map and of the image score; None where nothing is fused."""
    names = build.branch_names(c)
    return ensemble.shares(names) if len(names) > 1 else None


def supports(
    c: ConfigDict, feature_cache: cache.FeatureCache, records: Sequence[Record]
) -> tiling.Supports | None:
    """Tokens of the supports; thumbnails for a baseline on pixels, None where there are none."""
    if not records:
        return None
    if c.method in memory_bank.PIXEL_BASELINES:
        features = memory_bank.to_thumbnails(tiling.healthy_images(feature_cache, records))
        return tiling.Supports(len(records), features, features, None, None)
    return tiling.load_supports(feature_cache, records, c.score.tiles)


def assemble(
    c: ConfigDict,
    clip: Clip,
    design: model.Design,
    plain_design: model.Design,
    frozen: dict,
    params: Any,
    images: tiling.Supports | None,
    folds: Sequence[np.ndarray],
) -> detector.Detector:
    """The detector that the config asks for.

    Args:
        plain_design: of prompts without learnable context, for zero-shot.
        params: [1 + folds, ...] as training leaves them.
        images: tokens of the supports; None: zero-shot without any.
        folds: the supports of each fold.
    """
    if c.method in memory_bank.PIXEL_BASELINES and images is not None:
        built = memory_bank.PIXEL_BASELINES[c.method](images.calibrating, images.k, clip.size)
        return built._replace(corners=c.score.corners)
    branches = {
        n: branch(n, c, clip, design, plain_design, frozen, params, images, folds)
        for n in build.branch_names(c)
    }
    built = ensemble.build(branches) if len(branches) > 1 else next(iter(branches.values()))
    if c.model.refine and c.score.tiles > 1:  # too slow for every fold at every scale
        built = built._replace(fold_params=None)  # they have calibrated; dropout tells uncertainty
    return built._replace(corners=c.score.corners)


def branch(
    name: str, c: ConfigDict, clip, design, plain_design, frozen, params, images, folds
) -> detector.Detector:
    """The detector of one branch, of whole images or with their tiles."""
    image_score = image_score_of(c, clip)
    plain, k = name.startswith("zero_shot"), images.k if images else 0

    def scale(tokens, rows):
        if plain or images is None:
            built = prompt_detector.zero_shot(clip, frozen, plain_design, rows, k)
        elif name == "memory":
            like = {"k": k, "coreset": c.memory_coreset, "first_level": clip.first_memory_level}
            like["calibrating"] = rows
            built = memory_bank.build(tokens, image_score, clip.size, **like)
        elif name == "meta":
            built = deviation.build(params[0], params[1], tokens, folds, clip.grid, clip.size)
        else:
            built = prompt_detector.build(params, frozen, design, image_score, rows, folds, k)
        return detector.sharing_detector(built, rows, c.score.affinity, len(clip.widths))

    if images is None:
        return scale(None, None)
    whole = scale(images.tokens, images.calibrating)
    if c.score.tiles == 1:
        return whole
    small = scale(images.tile_tokens, images.tile_calibrating)
    return tiling.build(whole, small, c.score.tiles, clip.grid, None if plain else image_score)


def calibrate(
    c: ConfigDict,
    scores: detector.Detector,
    feature_cache: cache.FeatureCache,
    records: Sequence[Record],
    extra: Sequence[Record] = (),
) -> calibration.Calibration:
    """Thresholds of a detector, from its scores of the supports; of `extra` images if any."""
    if extra:
        records, scores = extra, detector.recalibrated(scores, feature_cache, extra)
    steps, mm2 = config_validation.map_filter(c), None
    if steps:
        mm2 = read.pixel_areas(records, feature_cache.clip.size, feature_cache.fit)
        mm2 = mm2 * len(scores.calibration.image) if scores.k == 1 else mm2  # views of the one
    inside = None
    if scores.k > 1:  # views of a single one have the padding elsewhere
        named = ((r.path, r.window) for r in records)
        inside = detector.places(named, feature_cache.clip.size, feature_cache.fit)
    own = c.calibration
    rates = {"alpha": own.alpha, "pixel_rate": own.pixel_rate, "peak": c.score.peak}
    return detector.calibrate(scores, **rates, filter_steps=steps, mm2=mm2, inside=inside)


# --- a trained workdir, loaded: as a teacher, as a predictor, or to start adaptation from ---


def load_teacher(c: ConfigDict, clip: Clip, unseen: Sequence[Record]) -> distillation.Teacher:
    """The trained model of the workdir config.teacher; unseen: what it may not have learned from.

    Raises WorkdirError or CheckpointError where there is none, ConfigError if it cannot teach.
    """
    workdir = files.expanded(c.teacher)
    trained = saved.read(workdir)
    own = trained.config
    distillation.check(workdir, own, c, trained.supports, [r.sha256 for r in unseen])
    parts = ("layers", "dtype", "implementation")
    same = trained.checkpoint == clip.digest and own.model.refine == c.model.refine
    if not same or any(own.clip[part] != c.clip[part] for part in parts):
        clip = build.load_clip(own)
    design, _ = build.model_parts(own, clip)
    if (clip.digest, words(own, design)) != (trained.checkpoint, trained.language):
        raise ConfigError(
            f"config.teacher {workdir} was trained with another CLIP, language adapter or ontology "
            "than its settings name now: restore that one"
        )
    params, text = prompt_detector.learned(jax.tree.map(jnp.asarray, trained.params))

    @jax.jit
    def logits(images):
        how = dict(encoder=clip.image_encoder, mean=clip.mean, std=clip.std)
        tokens = checkpoint.encode_images(clip.vision, images, **how)
        return model.forward(params, text, tokens, design).logit

    return distillation.Teacher(clip.size, preprocessing.steps(own.data.recipe), logits)


def load_predictor(workdir: Path) -> predictor.Predictor:
    """The predictor of a trained workdir; the supports' files are not needed.

    Raises WorkdirError for no whole detector, CheckpointError for another CLIP or adapter than it
    was trained with, ConfigError for a method for tables alone, a baseline on pixels.
    """
    trained = saved.read(workdir)
    c = trained.config
    if c.method in memory_bank.PIXEL_BASELINES:
        raise ConfigError(
            f"{workdir} holds the baseline {c.method}, which is for comparison in tables: "
            "train with method=ours"
        )
    clip = build.load_clip(c)
    if clip.digest != trained.checkpoint:
        raise CheckpointError(
            f"{workdir} was trained with another checkpoint than {c.clip.checkpoint} is now "
            f"({trained.checkpoint}, not {clip.digest}): restore that one"
        )
    design, _ = build.model_parts(c, clip)
    if words(c, design) != trained.language:
        raise CheckpointError(
            f"{workdir} was trained with another language adapter or ontology than "
            f"{c.model.language or c.prompts.ontology_file} is now: restore that one"
        )
    empty = detector.Scores(jnp.zeros((0, clip.grid**2)), jnp.zeros(0))
    k, random = trained.calibration.k, design.dropout > 0 and "learned" in build.branch_names(c)
    params = jax.tree.map(jnp.asarray, trained.params)
    scales = 1 + c.score.tiles**2 if c.score.tiles > 1 else 1
    scores = detector.Detector(
        *(score_function(c, clip, design), params, None, empty, k, random, clip.size),
        **{"scales": scales, "corners": c.score.corners},
    )
    names = {"dataset": c.data.name, "modality": c.data.modality, "k": c.k, "seed": c.seed}
    names["backbone"] = f"{c.clip.checkpoint.rsplit('/', 1)[-1]} ({clip.digest})"
    return predictor.Predictor(
        scores,
        trained.calibration,
        build.open_cache(c, clip, sharding.mesh()),
        jax.random.split(jax.random.key(c.seed), c.score.passes),
        trained.digest,
        c.data.window,
        {"method": c.method, **names, "checkpoint": clip.digest},
        build.explanation(c, clip),
        c.score.tiles,
    )


def load_start(workdir: Path) -> adapt.Start:
    """What adaptation to a new site starts from: the newest checkpoint of a meta-learned run.

    Raises WorkdirError, CheckpointError or ConfigError where there is none or it serves no site.
    """
    try:
        c = config.restored(stored.read_json(workdir / "config.json"))
    except (OSError, ValueError, ConfigError) as error:
        raise WorkdirError(f"{workdir} holds no run ({error}): give one that was trained") from None
    if c.meta.sources:
        raise ConfigError(f"{workdir} is for one data set alone: give configs/meta.py another")
    if c.learner == "joint":
        raise ConfigError(f"{workdir} learned jointly: train one with --config.learner=maml")
    if c.score.map_filter or c.score.tiles > 1:
        raise ConfigError("a site has no config.score.map_filter and tiles: train without them")
    clip = build.load_clip(c)
    design, frozen = build.model_parts(c, clip)
    count = 1 + len(build.folds(c))
    params: Any = build.fresh_params(c, clip, design)
    if c.learner == "meta_sgd":
        params = maml.meta_sgd(params, c.meta.inner_rate)
    template = step.start(params, loop.adam(c.learning_rate), count, c.seed)
    manager = checkpoints.open(workdir)
    with checkpoints.closing(manager):
        newest = checkpoints.restore(manager, template, build.origin(c, clip, design))
    if newest is None:
        raise CheckpointError(f"{workdir} has no checkpoint: run --mode train first")
    return site_start(c, clip, design, frozen, jax.tree.map(lambda x: x[0], newest.params))


def site_start(c: ConfigDict, clip: Clip, design, frozen: dict, params: Any) -> adapt.Start:
    """What adaptation starts from; params: one set, a maml.MetaSGD if its rates were learned."""
    apply = branch_function("learned", clip, design, image_score_of(c, clip), c.score.affinity)
    loss = partial(model.loss, design=design, weights=c.loss.to_dict())
    inner = build.learner(c).inner(c.meta.adapt_steps)
    learn = partial(adapt.learned, loss=loss, inner=inner, design=design, apply=apply)
    return adapt.Start(
        *(clip, frozen, params, jax.jit(learn), apply),
        adapt.Site(
            *(c.data.fit, c.data.window, preprocessing.steps(c.data.recipe)),
            *(c.synthesis.preset, c.seed, build.FOLDS),
            *(c.calibration.alpha, c.calibration.pixel_rate, c.score.peak, c.score.corners),
        ),
    )
