"""One run, read from top to bottom: prepare, encode, fit, score, measure, report."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from medclip_jax import __version__, build, build_detector, stored
from medclip_jax import config as config_module
from medclip_jax import workdir as workdirs
from medclip_jax.data import catalog
from medclip_jax.detectors import saved
from medclip_jax.distributed import runtime, sharding
from medclip_jax.evaluation import evaluate, predictions
from medclip_jax.explain import faithfulness
from medclip_jax.models import text_adapter
from medclip_jax.training import loop

VERSIONS = ("jax", "flax", "optax", "transformers", "numpy", "scikit-learn")


class Prepared(NamedTuple):
    """What a run works on: settings, CLIP, supports and test images, model."""

    config: ConfigDict  # resolved
    clip: Any
    split: Any  # layouts.Split
    auxiliary: tuple  # data sets that are trained on with the target's
    design: Any  # static parts of the model
    frozen: dict  # parameters that no step changes
    mesh: Mesh
    extra: tuple = ()  # more healthy images, which calibrate in place of the supports


class Encoded(NamedTuple):
    """Tokens, on disk and opened for training."""

    feature_cache: Any  # cache.FeatureCache
    pools: list  # training pools: the supports', then those of the auxiliary data sets


class Fitted(NamedTuple):
    """What was learned."""

    params: Any  # leaves [1 + folds, ...]: of all supports, then without each fold
    folds: list  # indices of the supports of each fold


class Scored(NamedTuple):
    """The detector and the test set that it scored."""

    detector: Any  # detector.Detector
    calibration: Any  # calibration.Calibration: thresholds from the held-out supports
    test: Any  # predictions.Scored; None without test images
    explanations: dict | None  # whether they agree with the model


def run(
    config: ConfigDict, workdir: Path, *, train: bool = True, report: bool = True
) -> dict[str, Any] | None:
    """Train or resume, score the test set, write everything; returns metrics.json.

    A finished run is not repeated.

    Args:
      train: False requires a finished training and scores the test set again.
      report: False leaves out report.html, figures and the small copies of images that they show.

    Returns:
      None where there is no test set, and in all processes but the main one.

    Raises:
      UserError: what a user can correct, in one sentence.
    """
    timing: dict[str, float] = {}
    with stage(timing, "load", shown=True):
        prepared = prepare(config)
    c, main, key = prepared.config, sharding.is_main(), key_of(prepared, report)
    if runtime.several():
        runtime.agree(contents(prepared))
    if not (workdir / "config.json").exists():
        teacher_of(prepared)
    workdirs.claim(workdir, c, main)  # only now: settings that cannot be used leave no claim
    workdirs.keep_split(workdir, prepared.split, c, main)
    finished = workdirs.finished(workdir, key) if train and main else None
    if not runtime.any_process(main and finished is None).any():
        if main and report:
            write_report(workdir)
        return finished if main else None
    with stage(timing, "encode"):
        encoded = encode(prepared)
    with stage(timing, "train"):
        fitted = fit(prepared, encoded, workdir, train)
    with stage(timing, "score"):
        scored = score(prepared, encoded, fitted, workdir)
    if not main:
        return None  # all scores are with the main process, which measures and writes
    saved.write(
        *(workdir, scored.detector, scored.calibration),
        settings=json.loads(c.to_json_best_effort()),
        checkpoint=prepared.clip.digest,
        language=build_detector.words(c, prepared.design),
        supports=[r.sha256 for r in prepared.split.support],
    )
    if scored.test is None:
        log_unmeasured(workdir, c)
        return None
    metrics = measure(prepared, scored, workdir, timing, key, pictures=report)
    if report:
        write_report(workdir)
    return metrics


def prepare(config: ConfigDict) -> Prepared:
    """Load everything that may refuse: settings, CLIP, data set, prompts. Writes nothing."""
    c = config_module.resolve(config)
    for departure in config_module.departures(config):
        logging.info("method %s with %s", c.method, departure)
    for line in (*config_module.unused_fields(config, c), *catalog.cautions(c)):
        logging.warning("%s", line)
    others = build.auxiliary_datasets(c)
    runtime.keep_compiled(Path(c.cache))
    clip, split = build.load_clip(c), build.load_split(c)
    build.synthesis(c, split.support)
    build.explanation(c, clip)
    parts = build.model_parts(c, clip, others)
    return Prepared(c, clip, split, others, *parts, sharding.mesh(), build.load_extra(c, split))


def encode(prepared: Prepared) -> Encoded:
    """Images and synthetic variants through the image encoder, once ever; opens what was kept."""
    c, clip, split, others, *_, mesh, extra = prepared
    teacher = teacher_of(prepared)
    return Encoded(*build.encode(c, clip, split, others, mesh, teacher, extra))


def teacher_of(prepared: Prepared) -> Any:
    """The trained model that teaches this run, or None; an error where it cannot."""
    c, unseen = prepared.config, (*prepared.split.test, *prepared.extra)
    teach = c.teacher and c.steps
    return build_detector.load_teacher(c, prepared.clip, unseen) if teach else None


def fit(prepared: Prepared, encoded: Encoded, workdir: Path, train: bool = True) -> Fitted:
    """Learn from the training pools, or resume; with `train` False only read what was learned."""
    c, clip, _, _, design, frozen, mesh, _ = prepared
    folds = build.folds(c)
    if c.meta.sources:
        return Fitted(build.meta_heads(c, clip, encoded.pools, mesh, workdir, train), folds)
    params = loop.fit(
        *(build.fresh_params(c, clip, design), frozen, encoded.pools, folds),
        workdir=workdir,
        mesh=mesh,
        resume_only=not train,
        **build.training(c, clip, design, encoded.pools[1:]),
    )
    return Fitted(params, folds)


def score(prepared: Prepared, encoded: Encoded, fitted: Fitted, workdir: Path | None) -> Scored:
    """Calibrate on the held-out supports and score the test set; its labels are not read.

    Only the check of the explanations, which comes last, reads which test images are abnormal.
    """
    c, feature_cache, split = prepared.config, encoded.feature_cache, prepared.split
    supports = build_detector.supports(c, feature_cache, split.support)
    plain_design, _ = build.model_parts(c, prepared.clip, context=0)
    detector = build_detector.assemble(
        *(c, prepared.clip, prepared.design, plain_design, prepared.frozen),
        *(fitted.params, supports, fitted.folds),
    )
    calibrating = split.support, prepared.extra
    calibration = build_detector.calibrate(c, detector, feature_cache, *calibrating)
    if not split.test:
        return Scored(detector, calibration, None, None)
    how = build.explanation(c, prepared.clip)
    scored = evaluate.score_images(
        *(detector, calibration, feature_cache, split.test),
        how=how,
        passes=c.score.passes,
        seed=c.seed,
        folder=workdir if sharding.is_main() else None,  # others may have none
    )
    support = split.support[0] if split.support else None
    checks = faithfulness.of_model(
        *(detector, feature_cache, support, split.test, calibration, how),
        count=c.explained,
        randomised=c.explanation.randomised,
        seed=c.seed,
    )
    return Scored(detector, calibration, scored, checks)


def measure(
    prepared: Prepared,
    scored: Scored,
    workdir: Path,
    timing: dict[str, float],
    key: str,
    pictures: bool = True,
) -> dict[str, Any]:
    """Read labels and masks; write predictions.npz and metrics.json."""
    c, test = prepared.config, prepared.split.test
    with stage(timing, "metrics", shown=True):
        result = evaluate.measure(scored.test, test, c.data.fit, workdir)
        counts = result.pop("pixel_counts")
        predictions.write_predictions(
            workdir, scored.test, test, c.data.fit, c.seed, counts, pictures
        )
    result = {
        "dataset": c.data.name,
        "k": c.k,
        "seed": c.seed,
        "split": c.data.split,
        "method": c.method,
        "learner": c.learner,
        "gradients": c.steps * config_module.gradients(c),
        "backbone": f"{c.clip.checkpoint} ({prepared.clip.digest})",
        **result,
        "explanations": {**(result["explanations"] or {}), **(scored.explanations or {})} or None,
        "fusion": build_detector.branch_shares(c),
        "timing": {name: round(seconds, 3) for name, seconds in timing.items()},
        "versions": versions(),
    }
    return workdirs.finish(workdir, key, result)


def write_report(workdir: Path) -> Path:
    """report.html and figures from the files of a workdir; returns the page."""
    from medclip_jax.report import html  # matplotlib: only where it is needed

    with Console(stderr=True).status("report"):
        page = html.write(workdir)
    logging.info("report: %s", page)
    return page


def log_unmeasured(workdir: Path, c: ConfigDict) -> None:
    """Say that a folder without test images was trained on but not measured."""
    logging.warning(
        "trained, but not measured: %s has no folder test; --mode predict scores new images with "
        "%s; to measure, add test/good and test/<kind> and give a new --workdir",
        *(c.data.root, workdir),
    )


def key_of(prepared: Prepared, report: bool) -> str:
    """Names what a result is made from, so that a finished run is recognised."""
    c = prepared.config
    adapter = text_adapter.digest(c.model.language)
    truth = workdirs.truth_of(prepared.split.test), [r.sha256 for r in prepared.extra]
    made_from = prepared.clip.digest, adapter, prepared.design.prompts.text, truth
    how = c.explained, c.explanation.to_dict()
    taught = filter(None, [saved.digest_of_teacher(c)])
    return stored.digest([*made_from, how, report, versions(), *taught])


def must_agree(c: ConfigDict) -> dict[str, Any]:
    """Settings (resolved) and versions that all processes of a run must have alike."""
    own = {"cache", "data.root", "distributed", "join_timeout"}  # places may differ
    settings = {f"config.{n}": x for n, x in config_module.flat(c) if n not in own}
    return settings | versions() | {"jaxlib": version("jaxlib")}


def contents(prepared: Prepared) -> dict[str, str]:
    """Digests of what the settings name, which must be the same for all processes, too."""
    c, split = prepared.config, prepared.split
    named = {
        "the supports": [[r.id, r.sha256] for r in split.support],
        "the test images": workdirs.truth_of(split.test),
        "the healthy images of config.calibration.extra": [r.sha256 for r in prepared.extra],
        "the prompts": prepared.design.prompts.text,
        "the language adapter": text_adapter.digest(c.model.language),
        "the checkpoint": prepared.clip.digest,
    }
    named["the teacher"] = saved.digest_of_teacher(c)
    return {name: stored.digest(value) for name, value in named.items()}


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"medclip-jax": __version__} | {name: version(name) for name in VERSIONS}


@contextmanager
def stage(timing: dict[str, float], name: str, shown: bool = False) -> Iterator[None]:
    """Add the seconds of a stage and free its memory; `shown` where it has no steps to count."""
    begin = time.perf_counter()
    with Console(stderr=True).status(name) if shown else nullcontext():
        yield
    runtime.trim()
    timing[name] = timing.get(name, 0.0) + time.perf_counter() - begin
