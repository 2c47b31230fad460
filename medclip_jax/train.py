"""One run, top to bottom: images -> tokens -> training -> scores -> report."""

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from medclip_jax import (
    __version__,
    checkpoints,
    clip,
    detector,
    evaluate,
    features,
    files,
    model,
    prompts,
    sharding,
    writer,
)
from medclip_jax import config as configuration
from medclip_jax.data import datasets
from medclip_jax.errors import CheckpointError, WorkdirError
from medclip_jax.structs import Split, TrainState

VERSIONS = ("jax", "flax", "optax", "transformers", "numpy", "scikit-learn")


def run(config: ConfigDict, workdir: Path, train: bool = True) -> dict[str, Any]:
    """Train (or resume), score the test set, write everything but the report; returns metrics.json.

    With `train` False a finished training is required. Raises a UserError for what a user can mend.
    """
    timing: dict[str, float] = {}
    c = configuration.resolve(config)
    claim(workdir, c)
    mesh = sharding.mesh()

    with stage(timing, "load"):
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
        pool = features.open_pool(bank, drawn.support, synthesis)
        features.encode_images(bank, drawn.test)

    design, frozen = build(c, tower)
    groups = folds(c.k, c.calibration.folds)
    with stage(timing, "train"):
        theta = fit(c, workdir, tower, design, frozen, pool, groups, mesh, train)

    with stage(timing, "score"):
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
    with stage(timing, "metrics"):
        result = evaluate.measure(scored, drawn.test, c.data.fit)
        evaluate.write_predictions(workdir, scored, drawn.test, c.data.fit, c.seed)

    result = {
        "dataset": c.data.name,
        "k": c.k,
        "seed": c.seed,
        "split": c.data.split,
        "method": c.method,
        "backbone": f"{c.clip.checkpoint} ({tower.digest})",
        **result,
        "timing": {name: round(seconds, 3) for name, seconds in timing.items()},
        "versions": {"medclip-jax": __version__} | {name: version(name) for name in VERSIONS},
    }
    files.write_json(workdir / "metrics.json", result)
    return result


# --- training -------------------------------------------------------------------------------


def fit(c, workdir, tower, design, frozen, pool, groups, mesh, train) -> Any:
    """Train theta, one copy on all supports and one per held-out fold, side by side on axis 0.

    The copies see the same schedule; copy 0 scores the test set, copy 1 + f scores fold f.
    """
    key = jax.random.key(c.seed)
    init = partial(
        model.init, model=tower, design=design, context=c.prompts.context, shared=c.prompts.shared
    )
    optimizer = optax.adam(c.optimizer.learning_rate, b1=c.optimizer.b1, b2=c.optimizer.b2)
    theta = jax.vmap(lambda _: init(key))(jnp.arange(1 + len(groups)))  # equal starts
    state = TrainState(
        jnp.asarray(0), theta, jax.vmap(optimizer.init)(theta), jax.random.key_data(key)
    )
    state = sharding.replicate(state, mesh)
    if not c.steps:
        (workdir / "metrics.jsonl").touch()
        return jax.device_get(state.theta)

    manager = checkpoints.open(workdir)
    state = checkpoints.restore(manager, state) or state
    start = int(state.step)
    if not train and start < c.steps:
        raise CheckpointError(
            f"{workdir}: training stands at step {start} of {c.steps}; run --mode train first"
        )
    step = make_step(partial(model.loss, design=design, weights=c.loss.to_dict()), optimizer)
    frozen = sharding.replicate(frozen, mesh)
    members = [np.arange(c.k), *(np.setdiff1d(np.arange(c.k), g) for g in groups)]
    with writer.Writer(workdir, resume_step=start) as log, checkpoints.finishing(manager):
        waiting = None
        for i in track(range(start, c.steps), "train", console=Console(stderr=True)):
            batch, valid = sharding.put(batch_at(i, pool, members, c.batch, c.seed), mesh)
            batch = batch._replace(valid=batch.valid & valid[:, None])
            state, parts = step(state, frozen, batch)
            if waiting is not None:  # one step late, so that the device never waits for the host
                report(log, *waiting)
            due = (i + 1) % c.log_every == 0 or i + 1 == c.steps
            waiting = (i + 1, parts) if due else None
            if (i + 1) % c.checkpoint_every == 0 or i + 1 == c.steps:
                if waiting is not None:  # logged before it is saved: a resume does not repeat it
                    report(log, *waiting)
                    waiting = None
                finite(i + 1, jax.device_get(parts))
                checkpoints.save(manager, state)
        if waiting is not None:
            report(log, *waiting)
    return jax.device_get(state.theta)


def make_step(loss: Callable, optimizer: optax.GradientTransformation) -> Callable:
    """jit((state, frozen, batch) -> (state, parts)); every copy of theta takes its own step."""

    def step(state: TrainState, frozen, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        copies = jax.tree.leaves(state.theta)[0].shape[0]

        def one(copy):
            theta, opt, batch, key = copy
            (_, parts), grad = jax.value_and_grad(loss, has_aux=True)(theta, frozen, batch, key)
            update, opt = optimizer.update(grad, opt, theta)
            return optax.apply_updates(theta, update), opt, parts

        # one after the other: batching the copies by vmap is a third slower on a CPU
        batch = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), batch)
        each = (state.theta, state.opt, batch, jax.random.split(key, copies))
        theta, opt, parts = jax.lax.map(one, each)
        first = jax.tree.map(lambda x: x[0], parts)
        return TrainState(state.step + 1, theta, opt, state.key), first

    return jax.jit(step, donate_argnums=0)


def batch_at(step: int, pool: features.Pool, members: list[np.ndarray], size: int, seed: int):
    """The rows of one step for every copy of theta: a function of the step alone.

    Arrays are [row, copy, ...]. Each copy walks through its own supports in random order, epoch
    after epoch; in an epoch a support is itself with probability 1/4 (Identity), else its next
    anomalous variant.
    """
    picks = [rows_at(step, own, size, seed, pool.variants) for own in members]
    support, variant = (np.concatenate(x) for x in zip(*picks, strict=True))
    batch = features.take(pool, support, variant)
    copies = len(members)
    return jax.tree.map(lambda x: np.moveaxis(x.reshape(copies, size, *x.shape[1:]), 0, 1), batch)


def rows_at(step: int, own: np.ndarray, size: int, seed: int, variants: int):
    """(support, variant) of each row of a step; variant -1 is the image itself."""
    support, variant = [], []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(own))
        rng = np.random.default_rng([seed, epoch])
        support.append(own[rng.permutation(len(own))[place]])
        identity = rng.random(len(own))[place] < 0.25
        variant.append(-1 if identity or not variants else epoch % variants)
    return np.array(support), np.array(variant)


def folds(k: int, parts: int) -> list[np.ndarray]:
    """Supports in up to `parts` disjoint groups of nearly equal size; none if k is 1."""
    parts = min(parts, k)
    return [] if parts < 2 else [np.arange(k)[i::parts] for i in range(parts)]


def report(log: writer.Writer, step: int, parts: dict) -> None:
    """Log the parts of a step; a value that is not finite ends the run."""
    values = jax.device_get(parts)
    log.scalars(step, values)
    finite(step, values)


def finite(step: int, values: dict) -> None:
    """Raise FloatingPointError naming the step and the parts that are not finite."""
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: {', '.join(bad)} is not finite")


# --- set-up ---------------------------------------------------------------------------------


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


def claim(workdir: Path, c: ConfigDict) -> None:
    """Make the workdir this run's own, or refuse one that holds a run with other settings."""
    path = workdir / "config.json"
    settings = json.loads(c.to_json_best_effort())
    try:
        held = json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
        held = None  # never whole: written in one piece since
    except OSError as error:
        raise WorkdirError(
            f"{path} cannot be read ({error.strerror}): give another workdir"
        ) from None
    if held is not None:
        for place in ("cache", "log_every", "checkpoint_every"):
            held[place] = settings[place]  # where and how often is not what
        differs = [name for name in settings if settings[name] != held.get(name)]
        if differs:
            name = differs[0]
            raise WorkdirError(
                f"{workdir} holds a run with {name} = {held.get(name)}, not {settings[name]}: "
                "give another workdir, or the settings it was started with"
            )
    files.write_json(path, settings)


def keep_split(workdir: Path, drawn: Split, c: ConfigDict) -> None:
    """Write split.json, or check that the data still match the one that is there."""
    path = workdir / "split.json"
    if path.is_file():
        datasets.check_split(path, drawn)
    else:
        datasets.write_split(drawn, path, name=c.data.name, seed=c.seed, kind=c.data.split)


@contextmanager
def stage(timing: dict[str, float], name: str):
    """Add the seconds of a stage."""
    begin = time.perf_counter()
    yield
    timing[name] = timing.get(name, 0.0) + time.perf_counter() - begin


def _root(c: ConfigDict) -> Path | None:
    return Path(c.data.root) if c.data.root else None
