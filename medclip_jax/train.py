"""One run, top to bottom: images -> tokens -> training -> scores -> report."""

import time
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.console import Console

from medclip_jax import (
    __version__,
    baselines,
    clip,
    detector,
    evaluate,
    features,
    files,
    fit,
    model,
    prompts,
    sharding,
)
from medclip_jax import config as configuration
from medclip_jax.data import datasets
from medclip_jax.structs import Record, Split
from medclip_jax.workdir import claim, keep_split

VERSIONS = ("jax", "flax", "optax", "transformers", "numpy", "scikit-learn")


def run(config: ConfigDict, workdir: Path, train: bool = True) -> dict[str, Any]:
    """Train (or resume), score the test set, write everything but the report; returns metrics.json.

    With `train` False a finished training is required. Raises a UserError for what a user can mend.
    """
    timing: dict[str, float] = {}
    c = configuration.resolve(config)
    claim(workdir, c)
    mesh = sharding.mesh()

    with stage(timing, "load", shown=True):
        tower = clip.load(c.clip.checkpoint, tuple(c.clip.levels), c.clip.dtype)
        records = datasets.load(c.data.name, _root(c), Path(c.cache), c.k)
        drawn = datasets.split(records, c.k, c.seed, c.data.pool, c.data.split)
        keep_split(workdir, drawn, c)

    with stage(timing, "encode"):
        bank = features.open_bank(Path(c.cache), tower, c.data.fit, c.bank_dtype, mesh)
        synthesis = features.Synthesis(
            c.synthesis.preset,
            c.synthesis.variants if c.steps else 0,
            c.seed if c.synthesis.partner == "support" else 0,
            c.synthesis.partner,
        )
        others = [source(name, c, drawn) for name in c.meta.data if name != c.data.name]
        pools = [features.open_pool(bank, x, synthesis) for x in (drawn.support, *others)]
        features.encode_images(bank, drawn.test)

    design, frozen = build(c, tower)
    groups = fit.folds(c.k, c.calibration.folds)
    with stage(timing, "train"):
        theta = fit.run(c, workdir, tower, design, frozen, pools, groups, mesh, train)

    with stage(timing, "score"):
        if c.method in baselines.METHODS:
            scorer = baselines.build(c.method, bank, drawn.support)
        else:
            scorer = detector.build(c.method, theta, frozen, design, bank, drawn.support, groups)
        scored = evaluate.score_images(
            scorer,
            bank,
            drawn.test,
            top=c.score.top,
            alpha=c.calibration.alpha,
            pixel_rate=c.calibration.pixel_rate,
            passes=c.score.passes,
            seed=c.seed,
        )
    with stage(timing, "metrics", shown=True):
        result = evaluate.measure(scored, drawn.test, c.data.fit)
        evaluate.write_predictions(workdir, scored, drawn.test, c.data.fit, c.seed)

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
        "timing": {name: round(seconds, 3) for name, seconds in timing.items()},
        "versions": {"medclip-jax": __version__} | {name: version(name) for name in VERSIONS},
    }
    files.write_json(workdir / "metrics.json", result)
    return result


def source(name: str, c: ConfigDict, drawn: Split) -> tuple[Record, ...]:
    """Healthy images of a data set beside the target, "name" or "name=folder"."""
    name, _, root = name.partition("=")
    records = datasets.load(name, Path(root) if root else None, Path(c.cache))
    return datasets.healthy(records, drawn, c.meta.images, c.seed)


def build(c: ConfigDict, tower: clip.Clip) -> tuple[model.Design, dict]:
    """The static design of the model and its frozen parameters."""
    built = prompts.build(
        tower.tokenizer,
        tower.eos_id,
        phrases=c.prompts.phrases,
        anatomy=c.data.anatomy,
        conditions=c.data.conditions,
        modality=c.data.modality,
        context=c.prompts.context if c.steps else 0,
        position=c.prompts.position,
    )
    design = model.Design(
        built,
        tower.text_tower,
        tower.size,
        tower.grid,
        c.model.form,
        c.prompts.causal,
        c.model.learn_scale,
        c.model.dropout,
    )
    return design, {"text": tower.text, "logit_scale": jnp.asarray(tower.logit_scale)}


@contextmanager
def stage(timing: dict[str, float], name: str, shown: bool = False):
    """Add the seconds of a stage; `shown` on the terminal where it has no steps to count."""
    begin = time.perf_counter()
    with Console(stderr=True).status(name) if shown else nullcontext():
        yield
    timing[name] = timing.get(name, 0.0) + time.perf_counter() - begin


def _root(c: ConfigDict) -> Path | None:
    return Path(c.data.root) if c.data.root else None
