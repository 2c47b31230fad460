"""One run, top to bottom: images -> tokens -> training -> scores -> report."""

import logging
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from medclip_jax import (
    __version__,
    agreement,
    baselines,
    clip,
    compiled,
    detector,
    distil,
    evaluate,
    features,
    files,
    fit,
    fusion,
    language,
    model,
    others,
    processes,
    prompts,
    refine,
    scales,
    score_fields,
    scorer,
    several,
    sharding,
    suppress,
)
from medclip_jax import config as configuration
from medclip_jax.data import augment, datasets, preprocess
from medclip_jax.score import to_pixels
from medclip_jax.structs import Prompts
from medclip_jax.workdir import claim, finished, keep_split, known_of, seal

VERSIONS = ("jax", "flax", "optax", "transformers", "numpy", "scikit-learn")


def run(
    config: ConfigDict, workdir: Path, train: bool = True, pictures: bool = True
) -> dict[str, Any] | None:
    """Train (or resume), score the test set, write everything but the report; returns metrics.json.

    Of several processes only the main one writes; the others return None, and so do all where
    there is no test set.
    A finished run is not made again. With `train` False a finished training is required, and the
    test set is scored anew; with `pictures` False the small copies of
    test images that only the report shows are left out.
    Raises a UserError for what a user can mend.
    """
    timing: dict[str, float] = {}
    c = configuration.resolve(config)
    recipe = preprocess.steps(c.data.recipe)
    augmented = augment.chosen(c.augment, c.data.modality)
    beside = others.read(c)
    main = sharding.is_main()
    compiled.keep(Path(c.cache))
    mesh = sharding.mesh()

    with stage(timing, "load", shown=True):
        tower = clip.load(c.clip.checkpoint, tuple(c.clip.levels), c.clip.dtype, c.model.refine)
        policy = (c.data.uncertain, c.data.blank)
        records = datasets.load(c.data.name, _root(c), Path(c.cache), c.k, policy)
        drawn = datasets.split(records, c.k, c.seed, c.data.pool, c.data.split, Path(c.cache))

    # before the long part: a word that the ontology lacks stops the run here
    design, frozen = build(c, tower)
    if beside and c.steps:
        own = [phrases(c, tower, c.prompts.context, **other.words) for other in beside]
        design = design._replace(sets=several.stack([design.prompts, *own]))
    claim(workdir, c, main)  # only now: settings that cannot be used leave no claim
    keep_split(workdir, drawn, c, main)
    versions = {"medclip-jax": __version__} | {name: version(name) for name in VERSIONS}
    words = language.digest(c.model.get("language", "")), design.prompts.text
    made_from = tower.digest, words, known_of(drawn.test), c.explained, pictures, versions
    key = features.digest(*made_from)
    made = finished(workdir, key) if train else None
    if not processes.agreed(made is None).any():
        return made if main else None

    with stage(timing, "encode"):
        bank = features.open_bank(Path(c.cache), tower, c.data.fit, c.bank_dtype, mesh, recipe)
        synthesis = features.Synthesis(
            c.synthesis.preset,
            c.synthesis.variants if c.steps else 0,
            c.seed if c.synthesis.partner == "support" else 0,
            c.synthesis.partner,
            *augmented,
        )
        pools = [features.open_pool(bank, drawn.support, synthesis)]
        pools += others.open_pools(beside, c, drawn, bank, synthesis)
        features.encode_images(bank, drawn.test)
        if c.score.tiles > 1:
            scales.encode_images(bank, [*drawn.support, *drawn.test], c.score.tiles)
        if c.distill.teacher and c.steps:
            teacher = distil.load(c, tower, drawn.test, build)
            pools = [distil.pool(teacher, pools[0], bank, drawn.support, synthesis)]

    groups = fit.folds(c.k, c.calibration.folds)
    with stage(timing, "train"):
        theta = fit.run(c, workdir, tower, design, frozen, pools, groups, mesh, train)

    with stage(timing, "score"):
        built, mix = assemble(c, theta, frozen, design, bank, drawn.support, groups)
        quiet = quieter(c, built, bank, drawn.support)
        asked = (c.score.top, c.calibration.alpha, c.calibration.pixel_rate)
        if not drawn.test:
            found = evaluate.calibrated(built, tower.size, *asked, quiet)
            unmeasured(workdir, c, bank, theta, drawn.support, found, mix, quiet)
            return None
        scored = evaluate.score_images(
            built,
            bank,
            drawn.test,
            top=c.score.top,
            alpha=c.calibration.alpha,
            pixel_rate=c.calibration.pixel_rate,
            passes=c.score.passes,
            seed=c.seed,
            quiet=quiet,
            folder=workdir,
        )
        # labels are read from here on
        support = drawn.support[0] if drawn.support else None
        held = built, bank, support, drawn.test, scored.limits
        checks = agreement.of_model(*held, top=c.score.top, count=c.explained, seed=c.seed)
    if not main:
        return None  # all scores are with the main process, which measures and writes
    with stage(timing, "metrics", shown=True):
        result = evaluate.measure(scored, drawn.test, c.data.fit, workdir)
        counts = result.pop("pixel_counts")
        evaluate.write_predictions(
            workdir, scored, drawn.test, c.data.fit, c.seed, counts, pictures
        )
        scorer.write(workdir, c, bank, theta, drawn.support, scored.limits, mix, quiet)

    result = {
        "dataset": c.data.name,
        "k": c.k,
        "seed": c.seed,
        "split": c.data.split,
        "method": c.method,
        "learner": c.learner,
        "gradients": c.steps * configuration.gradients(c),
        "backbone": f"{c.clip.checkpoint} ({tower.digest})",
        **result,
        "explanations": {**(result["explanations"] or {}), **(checks or {})} or None,
        "fusion": mix and mix.shares(),
        "timing": {name: round(seconds, 3) for name, seconds in timing.items()},
        "versions": versions,
        "finished": seal(workdir, key),
    }
    files.write_json(workdir / "metrics.json", result)
    return result


def unmeasured(workdir: Path, c: ConfigDict, *trained) -> None:
    """Keep the trained scorer of a folder without test images, and say that nothing was measured.

    trained: what scorer.write takes after the config.
    """
    if sharding.is_main():
        scorer.write(workdir, c, *trained)
    logging.warning(
        "trained, but not measured: %s has no folder test; --mode predict scores new images with "
        "this workdir; to measure, add test/good and test/<kind> and give a new --workdir",
        c.data.root,
    )


def assemble(
    c: ConfigDict, theta, frozen, design, bank, supports, groups, branch=None
) -> tuple[detector.Detector, fusion.Mix | None]:
    """The detector that the config asks for, and how it mixes if it fuses branches.

    branch: makes the detector of a branch from its name; `branch_of` by default.
    """
    if branch is None:
        given = dict(frozen=frozen, design=design, bank=bank, supports=supports, groups=groups)
        branch = partial(branch_of, c=c, theta=theta, **given)
    if c.method in baselines.METHODS:
        return baselines.build(c.method, bank, supports), None
    if c.method not in fusion.METHODS:
        return branch(c.method), None
    branches = {name: branch(name) for name in c.fusion.branches}
    if len(branches) == 1:
        return next(iter(branches.values())), None
    return fusion.fuse(
        branches,
        bank,
        supports,
        modality=c.data.modality,
        weights=c.fusion.weights,
        variants=c.fusion.probes,
        seed=c.seed,
        image_scores=evaluate.scorer(bank.clip.size, c.score.top),
        tiles=c.score.tiles,
    )


def branch_of(
    name: str, c: ConfigDict, theta, frozen, design, bank, supports, groups
) -> detector.Detector:
    """The detector of one branch, or of a method that has but one."""
    name = name.removesuffix(fusion.IMAGE_ONLY)
    shape = design if name != "zero_shot" else build(c, bank.clip, context=0)[0]
    like = c.memory.coreset, c.memory.mirror
    made = detector.build(name, theta, frozen, shape, bank, supports, groups, *like)
    if c.score.tiles == 1:
        return made
    return scales.build(name, made, bank, supports, c.score.tiles, c.memory.coreset)


def quieter(c: ConfigDict, built, bank, supports) -> suppress.Learned | None:
    """Outlier suppression as the supports' maps teach it; None if it is off."""
    if not score_fields.suppresses(c):
        return None
    size = bank.clip.size
    maps = np.asarray(to_pixels(jnp.asarray(built.held_out), size))
    areas = list(suppress.areas(supports, size, bank.fit))
    areas = areas * len(maps) if c.k == 1 else areas  # views of the one support
    return suppress.learn(c.score.suppress.to_dict(), maps, areas)


def build(c: ConfigDict, tower: clip.Clip, context: int | None = None) -> tuple[model.Design, dict]:
    """The static design of the model and its frozen parameters; `context` if not the config's."""
    if context is None:
        context = c.prompts.context if c.steps else 0
    shown = {name: c.data[name] for name in ("modality", "anatomy", "conditions")}
    built = phrases(c, tower, context, **shown)
    vision, kept = tower.vision_tower, None
    if isinstance(vision, clip.Tower) and vision.inputs:
        kept = refine.frozen(tower.vision, vision.levels, vision.heads, vision.eps)
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
        text["language"] = language.load(named, tower.digest, tower.joint)
    return design, {"text": text, "logit_scale": jnp.asarray(tower.logit_scale)}


def phrases(
    c: ConfigDict, tower: clip.Clip, context: int, modality: str, anatomy: str, conditions
) -> Prompts:
    """The prompts of a data set that shows this, made as the config says."""
    return prompts.build(
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


@contextmanager
def stage(timing: dict[str, float], name: str, shown: bool = False):
    """Add the seconds of a stage; `shown` on the terminal where it has no steps to count."""
    begin = time.perf_counter()
    with Console(stderr=True).status(name) if shown else nullcontext():
        yield
    timing[name] = timing.get(name, 0.0) + time.perf_counter() - begin


def _root(c: ConfigDict) -> Path | None:
    return Path(c.data.root) if c.data.root else None
