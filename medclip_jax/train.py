"""One run, top to bottom: images -> tokens -> training -> scores -> report."""

import json
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
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
    learn,
    maml,
    model,
    preemption,
    prompts,
    sharding,
    writer,
)
from medclip_jax import config as configuration
from medclip_jax.data import datasets, episodes
from medclip_jax.errors import CheckpointError, WorkdirError
from medclip_jax.structs import Record, Split, TrainState

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
    groups = folds(c.k, c.calibration.folds)
    with stage(timing, "train"):
        theta = fit(c, workdir, tower, design, frozen, pools, groups, mesh, train)

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


# --- training -------------------------------------------------------------------------------


def fit(c, workdir, tower, design, frozen, pools, groups, mesh, train) -> Any:
    """Train theta, one copy on all supports and one per held-out fold, side by side on axis 0.

    The copies see the same schedule; copy 0 scores the test set, copy 1 + f scores fold f. The
    first pool holds the supports; learners other than joint end by adapting to them.
    """
    inner = learn.inner(c.learner, c.meta.inner_steps, c.meta.inner_rate, c.meta.learn_rate)
    optimizer = optax.adam(c.optimizer.learning_rate, b1=c.optimizer.b1, b2=c.optimizer.b2)
    state = sharding.replicate(start(c, tower, design, optimizer, 1 + len(groups)), mesh)
    if not c.steps:
        (workdir / "metrics.jsonl").touch()
        return jax.device_get(state.theta)

    manager = checkpoints.open(workdir)
    state = checkpoints.restore(manager, state) or state
    first = int(state.step)
    if not train and first < c.steps:
        raise CheckpointError(
            f"{workdir}: training stands at step {first} of {c.steps}; run --mode train first"
        )
    loss = partial(model.loss, design=design, weights=c.loss.to_dict())
    joint = c.learner == "joint"
    step = learn.make_step(loss if joint else learn.episodic(loss, inner), optimizer)
    frozen = sharding.replicate(frozen, mesh)
    read = reader(c, pools, groups)
    closing = checkpoints.finishing(manager)
    with writer.Writer(workdir, resume_step=first) as log, closing, preemption.notice() as asked:
        waiting = None
        for i in track(range(first, c.steps), "train", console=Console(stderr=True)):
            batch, valid = sharding.put(read(i), mesh)
            batch = batch._replace(valid=batch.valid & valid[:, None])
            state, parts = step(state, frozen, batch)
            if waiting is not None:  # one step late, so that the device never waits for the host
                report(log, *waiting)
            due = (i + 1) % c.log_every == 0 or i + 1 == c.steps
            waiting = (i + 1, parts) if due else None
            stop = asked.is_set()
            if stop or (i + 1) % c.checkpoint_every == 0 or i + 1 == c.steps:
                if waiting is not None:  # logged before it is saved: a resume does not repeat it
                    report(log, *waiting)
                    waiting = None
                finite(i + 1, jax.device_get(parts))
                checkpoints.save(manager, state)
            if stop:
                break
        if waiting is not None:
            report(log, *waiting)
    if asked.is_set():  # the manager has closed, so the checkpoint is whole
        raise preemption.Preempted(f"stopped by SIGTERM at step {int(state.step)} of {c.steps}")
    if joint:
        return jax.device_get(state.theta)
    rows = learn.adaptation_rows(features.join(pools), learn.supports(c.k, groups))
    rows, valid = sharding.put(rows, mesh)
    rows = rows._replace(valid=rows.valid & valid[:, None])
    inner = inner._replace(steps=c.meta.adapt_steps)
    theta, _ = learn.adapt(state.theta, frozen, rows, loss=loss, inner=inner)
    return jax.device_get(theta)


def start(c, tower, design, optimizer, copies: int) -> TrainState:
    """Step 0; all copies of theta are equal."""
    key = jax.random.key(c.seed)

    def init(_):
        like = dict(context=c.prompts.context, shared=c.prompts.shared)
        theta = model.init(key, model=tower, design=design, **like)
        learned = c.learner != "joint" and c.meta.learn_rate
        return maml.meta_sgd(theta, c.meta.inner_rate) if learned else theta

    theta = jax.vmap(init)(jnp.arange(copies))
    opt = jax.vmap(optimizer.init)(theta)
    return TrainState(jnp.asarray(0), theta, opt, jax.random.key_data(key))


def reader(c, pools, groups) -> Callable[[int], Any]:
    """What a step reads, as a function of the step: rows (joint) or episodes."""
    pool = features.join(pools)
    target = not c.meta.data or c.data.name in c.meta.data
    members = learn.members(c.k, groups, [len(p.clean) for p in pools[1:]], target)
    if c.learner == "joint":
        own = [np.concatenate(sets) for sets in members]
        return lambda step: learn.batch_at(step, pool, own, c.batch, c.seed)
    episodes.check(pool.kinds)
    sizes = dict(tasks=c.meta.tasks, k=c.k, shots=c.meta.shots, query=c.meta.query)
    return lambda step: learn.episodes_at(step, pool, members, c.seed, **sizes)


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
def stage(timing: dict[str, float], name: str, shown: bool = False):
    """Add the seconds of a stage; `shown` on the terminal where it has no steps to count."""
    begin = time.perf_counter()
    with Console(stderr=True).status(name) if shown else nullcontext():
        yield
    timing[name] = timing.get(name, 0.0) + time.perf_counter() - begin


def _root(c: ConfigDict) -> Path | None:
    return Path(c.data.root) if c.data.root else None
