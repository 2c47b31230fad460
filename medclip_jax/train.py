"""One run, top to bottom: images -> tokens -> training -> scores -> report."""

import logging
import time
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from medclip_jax import __version__, build, files
from medclip_jax import config as config_module
from medclip_jax.clip import text_adapter, vit
from medclip_jax.data import augmentation, datasets, preprocessing, splits, synthetic_variants
from medclip_jax.detectors import saved, tiling
from medclip_jax.distributed import multihost, runtime, sharding
from medclip_jax.evaluation import evaluate, predictions
from medclip_jax.explain import faithfulness
from medclip_jax.features import auxiliary, cache, encoder, training_pool
from medclip_jax.models import prompt_sets
from medclip_jax.training import distillation, loop
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
    c = config_module.resolve(config)
    recipe = preprocessing.steps(c.data.recipe)
    augmented = augmentation.chosen(c.augment, c.data.modality)
    beside = auxiliary.read(c)
    main = sharding.is_main()
    runtime.keep_compiled(Path(c.cache))
    mesh = sharding.mesh()

    with stage(timing, "load", shown=True):
        tower = vit.load(c.clip.checkpoint, tuple(c.clip.levels), c.clip.dtype, c.model.refine)
        policy = (c.data.uncertain, c.data.blank)
        records = datasets.load(c.data.name, _root(c), Path(c.cache), c.k, policy)
        drawn = splits.split(records, c.k, c.seed, c.data.pool, c.data.split, Path(c.cache))

    # before the long part: a word that the ontology lacks stops the run here
    design, frozen = build.build(c, tower)
    if beside and c.steps:
        own = [build.phrases(c, tower, c.prompts.context, **other.words) for other in beside]
        design = design._replace(sets=prompt_sets.stack([design.prompts, *own]))
    claim(workdir, c, main)  # only now: settings that cannot be used leave no claim
    keep_split(workdir, drawn, c, main)
    versions = {"medclip-jax": __version__} | {name: version(name) for name in VERSIONS}
    words = text_adapter.digest(c.model.get("language", "")), design.prompts.text
    made_from = tower.digest, words, known_of(drawn.test), c.explained, pictures, versions
    key = cache.digest(*made_from)
    made = finished(workdir, key) if train else None
    if not multihost.any_process(made is None).any():
        return made if main else None

    with stage(timing, "encode"):
        feature_cache = cache.open_cache(
            Path(c.cache), tower, c.data.fit, c.cache_dtype, mesh, recipe
        )
        synthesis = synthetic_variants.Synthesis(
            c.synthesis.preset,
            c.synthesis.variants if c.steps else 0,
            c.seed if c.synthesis.partner == "support" else 0,
            c.synthesis.partner,
            *augmented,
        )
        pools = [training_pool.open_pool(feature_cache, drawn.support, synthesis)]
        pools += auxiliary.open_pools(beside, c, drawn, feature_cache, synthesis)
        encoder.encode_images(feature_cache, drawn.test)
        if c.score.tiles > 1:
            tiling.encode_images(feature_cache, [*drawn.support, *drawn.test], c.score.tiles)
        if c.distill.teacher and c.steps:
            teacher = distillation.load(c, tower, drawn.test, build.build)
            pools = [distillation.pool(teacher, pools[0], feature_cache, drawn.support, synthesis)]

    groups = loop.folds(c.k, c.calibration.folds)
    with stage(timing, "train"):
        params = loop.run(c, workdir, tower, design, frozen, pools, groups, mesh, train)

    with stage(timing, "score"):
        built, mix = build.assemble(c, params, frozen, design, feature_cache, drawn.support, groups)
        quiet = build.quieter(c, built, feature_cache, drawn.support)
        asked = (c.score.top, c.calibration.alpha, c.calibration.pixel_rate)
        if not drawn.test:
            found = evaluate.calibrated(built, tower.size, *asked, quiet)
            unmeasured(workdir, c, feature_cache, params, drawn.support, found, mix, quiet)
            return None
        scored = evaluate.score_images(
            built,
            feature_cache,
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
        held = built, feature_cache, support, drawn.test, scored.limits
        checks = faithfulness.of_model(*held, top=c.score.top, count=c.explained, seed=c.seed)
    if not main:
        return None  # all scores are with the main process, which measures and writes
    with stage(timing, "metrics", shown=True):
        result = evaluate.measure(scored, drawn.test, c.data.fit, workdir)
        counts = result.pop("pixel_counts")
        predictions.write_predictions(
            workdir, scored, drawn.test, c.data.fit, c.seed, counts, pictures
        )
        saved.write(workdir, c, feature_cache, params, drawn.support, scored.limits, mix, quiet)

    result = {
        "dataset": c.data.name,
        "k": c.k,
        "seed": c.seed,
        "split": c.data.split,
        "method": c.method,
        "learner": c.learner,
        "gradients": c.steps * config_module.gradients(c),
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
        saved.write(workdir, c, *trained)
    logging.warning(
        "trained, but not measured: %s has no folder test; --mode predict scores new images with "
        "this workdir; to measure, add test/good and test/<kind> and give a new --workdir",
        c.data.root,
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
