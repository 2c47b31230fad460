"""A trained workdir, loaded: as a predictor, as a teacher, or to start adaptation from."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from medclip_jax import build, build_detector, config, stored
from medclip_jax.clip import checkpoint
from medclip_jax.data import preprocessing
from medclip_jax.data.layouts import Record
from medclip_jax.detectors import detector, memory_bank, prompt_detector, saved
from medclip_jax.distributed import sharding
from medclip_jax.errors import CheckpointError, ConfigError, WorkdirError
from medclip_jax.inference import adapt, predictor
from medclip_jax.models import model, text_adapter
from medclip_jax.training import checkpoints, distillation, loop, maml, step


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
    own = trained.config
    distillation.check(workdir, own, c, trained.supports, [r.sha256 for r in test])
    parts = ("layers", "dtype", "implementation")
    same = trained.checkpoint == clip.digest and own.model.refine == c.model.refine
    if not same or any(own.clip[part] != c.clip[part] for part in parts):
        clip = build.load_clip(own)
    if clip.digest != trained.checkpoint:
        raise ConfigError(
            f"config.teacher {workdir} was trained with another CLIP than {own.clip.checkpoint} "
            f"is now ({trained.checkpoint}, not {clip.digest}): restore that one"
        )
    design, _ = build.model_parts(own, clip)
    params, text = prompt_detector.learned(jax.tree.map(jnp.asarray, trained.params))

    @jax.jit
    def logits(images):
        how = dict(encoder=clip.image_encoder, mean=clip.mean, std=clip.std)
        tokens = checkpoint.encode_images(clip.vision, images, **how)
        return model.forward(params, text, tokens, design).logit

    return distillation.Teacher(clip.size, preprocessing.steps(own.data.recipe), logits)


def load_predictor(workdir: Path) -> predictor.Predictor:
    """The predictor of a trained workdir; the supports' files are not needed.

    Raises:
      WorkdirError: there is no whole trained detector.
      CheckpointError: its CLIP or adapter is not the one that it was trained with.
      ConfigError: it is of a method for tables alone: baselines on pixels and tiles.
    """
    trained = saved.read(workdir)
    c = trained.config
    if c.method in memory_bank.PIXEL_BASELINES:
        raise ConfigError(
            f"{workdir} holds the baseline {c.method}, which is for comparison in tables: "
            "train with method=ours"
        )
    if c.score.tiles > 1:
        raise ConfigError(
            f"{workdir} scores tiles (config.score.tiles), which --mode predict cannot: "
            "train with tiles=1"
        )
    clip = build.load_clip(c)
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
    design, _ = build.model_parts(c, clip)
    empty = detector.Scores(jnp.zeros((0, clip.grid**2)), jnp.zeros(0))
    trains = {"learned", "model"} & trained.params.keys()  # as a branch, or as the whole detector
    k, random = trained.calibration.k, design.dropout > 0 and bool(trains)
    params = jax.tree.map(jnp.asarray, trained.params)
    scores = detector.Detector(
        build_detector.score_function(c, clip, design), params, None, empty, k, random, clip.size
    )
    names = {"dataset": c.data.name, "modality": c.data.modality, "k": c.k, "seed": c.seed}
    backbone = f"{c.clip.checkpoint.rsplit('/', 1)[-1]} ({clip.digest})"
    return predictor.Predictor(
        scores,
        trained.calibration,
        build.open_cache(c, clip, sharding.mesh()),
        jax.random.split(jax.random.key(c.seed), c.score.passes),
        trained.digest,
        c.data.window,
        {"method": c.method, **names, "checkpoint": clip.digest, "backbone": backbone},
        build.explanation(c, clip),
    )


def load_start(workdir: Path) -> adapt.Start:
    """What adaptation to a new site starts from: the newest checkpoint of a meta-learned run.

    Raises:
      WorkdirError: there is no run.
      ConfigError: it did not meta-learn, or scores what a site cannot.
      CheckpointError: it has no checkpoint.
    """
    try:
        c = config.restored(stored.read_json(workdir / "config.json"))
    except (OSError, ValueError, ConfigError) as error:
        raise WorkdirError(f"{workdir} holds no run ({error}): give one that was trained") from None
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
        inner=build.learner(c).inner(c.meta.adapt_steps),
        apply=prompt_detector.scorer(design, build_detector.image_score_of(c, clip)),
        site=adapt.Site(
            c.data.fit,
            c.data.window,
            preprocessing.steps(c.data.recipe),
            c.synthesis.preset,
            c.seed,
            build.FOLDS,
            c.calibration.alpha,
            c.calibration.pixel_rate,
        ),
    )
