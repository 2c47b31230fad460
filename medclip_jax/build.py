"""TODO."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medclip_jax import score_fields
from medclip_jax.clip import text_adapter, vit
from medclip_jax.detectors import by_name, detector, ensemble, map_filter, pixel_baselines, tiling
from medclip_jax.evaluation import evaluate
from medclip_jax.models import model, token_refinement
from medclip_jax.models.anomaly_map import to_pixels
from medclip_jax.prompts import tokenize
from medclip_jax.prompts.prompts import Prompts


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
    if c.method not in ensemble.METHODS:
        return branch(c.method), None
    branches = {name: branch(name) for name in c.fusion.branches}
    if len(branches) == 1:
        return next(iter(branches.values())), None
    return ensemble.fuse(
        branches,
        feature_cache,
        supports,
        modality=c.data.modality,
        weights=c.fusion.weights,
        variants=c.fusion.probes,
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
    like = c.memory.coreset, c.memory.mirror
    made = by_name.build(name, params, frozen, shape, feature_cache, supports, groups, *like)
    if c.score.tiles == 1:
        return made
    return tiling.build(name, made, feature_cache, supports, c.score.tiles, c.memory.coreset)


def quieter(c: ConfigDict, built, feature_cache, supports) -> map_filter.Learned | None:
    """Outlier suppression as the supports' maps teach it; None if it is off."""
    if not score_fields.suppresses(c):
        return None
    size = feature_cache.clip.size
    maps = np.asarray(to_pixels(jnp.asarray(built.held_out), size))
    areas = list(map_filter.areas(supports, size, feature_cache.fit))
    areas = areas * len(maps) if c.k == 1 else areas  # views of the one support
    return map_filter.learn(c.score.suppress.to_dict(), maps, areas)


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
    if named := c.model.get("language", ""):  # absent in older workdirs
        text["language"] = text_adapter.load(named, tower.digest, tower.joint)
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
        synonyms=c.prompts.synonyms,
        ontology_file=c.prompts.ontology_file,
        positions=len(tower.text["position"]),
    )
