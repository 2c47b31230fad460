"""Training: params and its held-out copies, step by step, resumable at every checkpoint."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

from medclip_jax.clip import text_adapter
from medclip_jax.distributed import multihost, runtime, sharding
from medclip_jax.distributed.runtime import prefetch
from medclip_jax.errors import CheckpointError
from medclip_jax.features import training_pool
from medclip_jax.models import losses, model
from medclip_jax.training import checkpoints, episodes, maml, metrics_log, validation
from medclip_jax.training import step as training_step
from medclip_jax.training.state import TrainState

LOG_EVERY = 10  # steps


def adam(learning_rate: float) -> optax.GradientTransformation:
    """The optimiser of every run; its betas are those of the closest published code."""
    return optax.adam(learning_rate, b1=0.5, b2=0.999)


def run(c, workdir, tower, design, frozen, pools, groups, mesh, train) -> Any:
    """Train params, one copy on all supports and one per held-out fold, side by side on axis 0.

    The copies see the same schedule; copy 0 scores the test set, copy 1 + f scores fold f. The
    first pool holds the supports; learners other than joint end by adapting to them.
    """
    inner = training_step.inner(
        c.learner, c.meta.inner_steps, c.meta.inner_rate, c.learner == "meta_sgd"
    )
    optimizer = adam(c.learning_rate)
    state = sharding.replicate(start(c, tower, design, optimizer, 1 + len(groups)), mesh)
    if not c.steps:
        if sharding.is_main():
            (workdir / "metrics.jsonl").touch()
        return jax.device_get(state.params)

    manager = checkpoints.open(workdir)
    state = checkpoints.restore(manager, state) or state
    first = int(state.step)
    if not train and first < c.steps:
        raise CheckpointError(
            f"{workdir}: training stands at step {first} of {c.steps}; run --mode train first"
        )
    loss = partial(model.loss, design=design, weights=c.loss.to_dict())
    if c.teacher:
        loss = partial(loss, distill=losses.Distill(weight=c.loss.distill))
    joint = c.learner == "joint"
    copied = sharding.replicated(mesh)
    learnt = loss if joint else training_step.episodic(loss, inner)
    step = training_step.make_step(learnt, optimizer, copied)
    frozen = sharding.replicate(frozen, mesh)
    read = reader(c, pools, groups, mesh)
    adapted = _as_it_is if joint else adaptation(c, pools, groups, mesh, loss, inner)
    judged = c.validations and validation.judge(pools[0], groups, design, c.score.top, mesh)
    closing = checkpoints.finishing(manager)
    todo = range(first, c.steps)
    with (
        logbook(workdir, first) as log,
        closing,
        runtime.sigterm() as asked,
        contextlib.closing(prefetch(read, todo)) as batches,
    ):
        waiting = None
        for i, batch in zip(
            track(todo, "train", console=Console(stderr=True)), batches, strict=True
        ):
            state, parts = step(state, frozen, batch)
            if waiting is not None:  # one step late, so that the device never waits for the host
                report(log, *waiting)
            due = (i + 1) % LOG_EVERY == 0 or i + 1 == c.steps
            if judged and validation.due(i + 1, c.steps, c.validations, LOG_EVERY):
                parts |= judged(adapted(state.params, frozen), frozen)
            waiting = (i + 1, parts) if due else None
            save = (i + 1) % c.checkpoint_every == 0 or i + 1 == c.steps
            # several processes agree where they wait for the device anyway
            stop = told(asked) if due or save or not multihost.several() else False
            if stop or save:
                if waiting is not None:  # logged before it is saved: a resume does not repeat it
                    report(log, *waiting)
                    waiting = None
                finite(i + 1, jax.device_get(parts))
                checkpoints.save(manager, state)
            if stop:
                break
        if waiting is not None:
            report(log, *waiting)
    if told(asked):  # the manager has closed, so the checkpoint is whole
        raise runtime.Preempted(f"stopped by SIGTERM at step {int(state.step)} of {c.steps}")
    if joint:
        return jax.device_get(state.params)
    return sharding.fetch(adapted(state.params, frozen), 1 + len(groups))


def _as_it_is(params, _):
    return params


def adaptation(c, pools, groups, mesh, loss, inner) -> Callable[[Any, Any], Any]:
    """(params, frozen) -> params after every copy has adapted to its supports, compiled once."""
    rows = training_step.adaptation_rows(
        training_pool.join(pools), training_step.supports(c.k, groups)
    )
    rows, valid = sharding.spread(rows, mesh)
    rows = rows._replace(valid=rows.valid & valid[:, None])
    inner = inner._replace(steps=c.meta.adapt_steps)

    @jax.jit
    def adapted(params, frozen, rows):
        return training_step.adapt(params, frozen, rows, loss=loss, inner=inner)[0]

    return lambda params, frozen: adapted(params, frozen, rows)


def logbook(workdir, step: int) -> metrics_log.Writer | metrics_log.Silent:
    """metrics.jsonl, resumed at `step`; of several processes only the main one writes it."""
    return (
        metrics_log.Writer(workdir, resume_step=step)
        if sharding.is_main()
        else metrics_log.Silent()
    )


def told(asked) -> bool:
    """Was this process, or any other of the run, asked to stop?"""
    return bool(multihost.any_process(asked.is_set())[0])


def start(c, tower, design, optimizer, copies: int) -> TrainState:
    """Step 0; all copies of params are equal."""
    key = jax.random.key(c.seed)
    tuned = c.model.language_tuned

    def init(_):
        like = dict(context=c.prompts.context, shared=c.prompts.shared)
        like["contrast"] = bool(c.loss.simclr)
        if tuned:
            like["language"] = text_adapter.load(c.model.language, tower.digest, tower.joint)
        params = model.init(key, model=tower, design=design, **like)
        learned = c.learner == "meta_sgd"
        return maml.meta_sgd(params, c.meta.inner_rate) if learned else params

    params = jax.vmap(init)(jnp.arange(copies))
    opt = jax.vmap(optimizer.init)(params)
    return TrainState(jnp.asarray(0), params, opt, jax.random.key_data(key))


def reader(c, pools, groups, mesh) -> Callable[[int], Any]:
    """What a step reads, as a function of the step: rows (joint) or episodes, on the devices.

    Every process reads its share of them.
    """
    pool = training_pool.join(pools)

    def spread(draw, n):
        rows, valid = sharding.local_rows(n, mesh), sharding.valid_rows(n, mesh)

        def read(step):
            batch = sharding.place(draw(step, rows), mesh)
            return batch._replace(valid=batch.valid & valid[:, None])

        return read

    target = not c.meta.data or c.data.name in c.meta.data
    members = training_step.members(c.k, groups, [len(p.clean) for p in pools[1:]], target)
    views = bool(c.loss.simclr)
    if c.learner == "joint":
        own = [np.concatenate(sets) for sets in members]
        return spread(
            lambda i, rows: training_step.batch_at(i, pool, own, c.batch, c.seed, rows, views),
            c.batch,
        )
    episodes.check(pool.kinds)
    sizes = dict(tasks=c.meta.tasks, k=c.k, shots=c.meta.shots, query=c.meta.shots)
    return spread(
        lambda i, rows: training_step.episodes_at(i, pool, members, c.seed, rows, views, **sizes),
        c.meta.tasks,
    )


def folds(k: int, parts: int) -> list[np.ndarray]:
    """Supports in up to `parts` disjoint groups of nearly equal size; none if k is 1."""
    parts = min(parts, k)
    return [] if parts < 2 else [np.arange(k)[i::parts] for i in range(parts)]


def report(log: metrics_log.Writer | metrics_log.Silent, step: int, parts: dict) -> None:
    """Log the parts of a step; a value that is not finite ends the run."""
    values = jax.device_get(parts)
    log.scalars(step, values)
    finite(step, values)


def finite(step: int, values: dict) -> None:
    """Raise FloatingPointError naming the step and the parts that are not finite."""
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: {', '.join(bad)} is not finite")
