"""Training, step by step: the main params and the fold params, resumable at every checkpoint."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from medclip_jax.distributed import runtime, sharding
from medclip_jax.errors import CheckpointError, ConfigError, Preempted
from medclip_jax.features import training_pool
from medclip_jax.features.training_pool import TrainingPool
from medclip_jax.training import checkpoints, episodes, maml, validation
from medclip_jax.training import step as training_step
from medclip_jax.training.checkpoints import MetricsLog
from medclip_jax.training.step import start

LOG_EVERY = 10  # steps
LARGE = 2**26  # bytes of a batch, above which two are in memory at a time, not three
GATE_RATE = 30  # times the learning rate: of the gates of token refinement, which start at 0


def adam(learning_rate: float) -> optax.GradientTransformation:
    """The optimiser of every run; its betas are those of the closest published code."""
    own_rate = optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(_faster, updates)
    )
    return optax.chain(optax.adam(learning_rate, b1=0.5, b2=0.999), own_rate)


def _faster(path: tuple, update: jax.Array) -> jax.Array:
    return GATE_RATE * update if getattr(path[-1], "key", "") == "gate" else update


def gates(params: Any) -> dict[str, jax.Array]:
    """How far the gates of token refinement are open in the main params: for the log."""
    params = params.params if isinstance(params, maml.MetaSGD) else params
    opened = [part["gate"][0] for part in params.get("refine", ())]
    return {"gate": jax.numpy.abs(jax.numpy.stack(opened)).mean()} if opened else {}


class Schedule(NamedTuple):
    """How long training runs, what a step reads, and how often something is written."""

    steps: int  # 0: nothing is trained
    seed: int
    batch: int  # rows per step of the joint learner
    tasks: int  # per step of the other learners
    shots: int  # support rows of a task, and query rows
    checkpoint_every: int  # steps
    validations: int  # times in training; 0: never


def fit(
    params: Any,
    frozen: Any,
    pools: Sequence[TrainingPool],
    folds: Sequence[np.ndarray],
    *,
    loss: Callable,
    optimizer: optax.GradientTransformation,
    learner: training_step.Learner,
    schedule: Schedule,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    score: validation.Score | None = None,
    contrast: training_step.Contrast | None = None,
    on_target: bool = True,
    resume_only: bool = False,
    tensorboard: bool = False,
    origin: str = "",
) -> Any:
    """Train the main params on all supports and fold params on those outside each fold.

    All see the same schedule. Learners other than joint end by adapting to the supports.

    Args:
      params: fresh ones; all of the stack start from them.
      pools: of the supports, then of each auxiliary dataset.
      folds: of the supports (training_pool.folds).
      loss: (params, frozen, batch, key) -> (scalar, parts).
      workdir: for checkpoints, metrics.jsonl and, with `tensorboard`, event files.
      mesh: over whose devices rows are spread.
      score: image scores for validation (validation.scorer); None: no validation.
      contrast: of SimCLR; batches then carry two augmented views of images. `loss` has it where
        rows are learned from jointly, episodes have it beside their tasks.
      on_target: learn from the supports, too, where there are auxiliary datasets.
      resume_only: a finished training is required.
      origin: names what is learned with besides the target's images; a checkpoint of another is
        refused.

    Returns:
      Params [1 + folds, ...] on the host: the main params, then the fold params.

    Raises:
      CheckpointError: if checkpoints cannot be read, or training is not finished in `resume_only`.
      ConfigError: for a part of the loss that is not finite, naming step and part.
      Preempted: after SIGTERM, when the state is saved.
    """
    steps, count = schedule.steps, 1 + len(folds)
    if learner.name == "meta_sgd":
        params = maml.meta_sgd(params, learner.inner_rate)
    state = sharding.replicate(start(params, optimizer, count, schedule.seed), mesh)
    if not steps:
        if sharding.is_main():
            (workdir / "metrics.jsonl").touch()
        return jax.device_get(state.params)

    main = sharding.is_main()  # it alone reads and writes
    manager = checkpoints.open(workdir) if main else None
    state = checkpoints.resume(manager, state, mesh, origin)
    first = int(state.step)
    if resume_only and first < steps:
        raise CheckpointError(
            f"{workdir}: training stands at step {first} of {steps}; run --mode train first"
        )
    joint = learner.name == "joint"
    inner = learner.inner(learner.inner_steps)
    objective = loss if joint else training_step.meta_objective(loss, inner, contrast)
    take_step: Any = training_step.make_step(objective, optimizer, sharding.replicated(mesh))
    frozen = sharding.share(frozen, mesh)
    read = _reader(pools, folds, joint, schedule, mesh, contrast is not None, on_target)
    adapted = _adaptation(pools[0], folds, loss, learner, mesh)
    validate = None
    if schedule.validations and score and len(folds) and pools[0].variants:
        validate = validation.validator(pools[0], folds, score, mesh)

    remaining = range(first, steps)
    with (
        MetricsLog(workdir, first, tensorboard) if main else contextlib.nullcontext() as lines,
        checkpoints.closing(manager) if manager else contextlib.nullcontext(),
        runtime.sigterm() as sigterm,
        contextlib.closing(runtime.prefetch(read, remaining)) as inputs,
    ):
        log, before, fitted = _DelayedLog(lines), None, None
        for done, batch in enumerate(runtime.progress(inputs, "train", len(remaining)), first + 1):
            if done == first + 1:
                take_step = take_step.lower(state, frozen, batch).compile()
                runtime.trim()  # what compiling took, before the step takes its own
            state, parts = take_step(state, frozen, batch)
            # one step computes and one waits, or none if large: all their batches are in memory
            jax.block_until_ready(parts if _bytes_of(batch) > LARGE else before)
            before = parts
            log.flush()
            last = done == steps
            if validate and validation.due(done, steps, schedule.validations, LOG_EVERY):
                fitted = adapted(state.params, frozen)
                parts |= validate(fitted, frozen)
            if logged := last or done % LOG_EVERY == 0:
                log.write_later(done, parts | gates(state.params))
            save = last or done % schedule.checkpoint_every == 0
            # several processes agree where they wait for the device anyway
            stop = (logged or save or not runtime.several()) and _stopping(sigterm)
            if stop or save:
                log.flush()  # before it is saved: a resume does not repeat it
                _check_finite(done, jax.device_get(parts))
                if manager:
                    checkpoints.save(manager, state, origin)
            if stop:
                break
        log.flush()
    if _stopping(sigterm):  # the manager has closed, so the checkpoint is whole
        raise Preempted(f"stopped by SIGTERM at step {int(state.step)} of {steps}")
    fitted = fitted or adapted(state.params, frozen)  # the last step was validated with them
    return sharding.fetch(fitted, count)


class _DelayedLog:
    """Logs the parts of a step one step late, so that the device never waits for the host."""

    def __init__(self, log: MetricsLog | None) -> None:
        self._log = log
        self._waiting: tuple[int, dict] | None = None

    def write_later(self, step: int, parts: dict) -> None:
        self._waiting = step, parts

    def flush(self) -> None:
        """Log what waits; a value that is not finite ends the run."""
        if self._waiting is None:
            return
        step, values = self._waiting[0], jax.device_get(self._waiting[1])
        self._waiting = None
        if self._log:
            self._log.write(step, values)
        _check_finite(step, values)


def _bytes_of(batch) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(batch))


def _stopping(sigterm) -> bool:
    """Has any process of the run received SIGTERM?"""
    return bool(runtime.any_process(sigterm.is_set())[0])


def _check_finite(step: int, values: dict) -> None:
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise ConfigError(
            f"step {step}: {', '.join(bad)} is not finite: lower config.learning_rate or the "
            "weights of config.loss"
        )


def _adaptation(pool: TrainingPool, folds, loss, learner, mesh) -> Callable[[Any, Any], Any]:
    """(params, frozen) -> params adapted to their supports, but for the joint learner's."""
    if learner.name == "joint":
        return lambda params, _: params
    own = training_pool.supports(len(pool.clean), folds)
    inner = learner.inner(learner.adapt_steps)
    stacked = jax.jit(lambda each: jax.tree.map(lambda *x: jax.numpy.stack(x), *each))

    @jax.jit
    def adapted(params, index, frozen, rows):
        return training_step.adapt(params, index, frozen, rows, loss=loss, inner=inner)

    def read_and_adapt(params, frozen):  # the rows of one params after another are in memory
        each = []
        for index, batch in enumerate(episodes.adaptation_batches(pool, own)):
            rows, valid = sharding.spread(batch, mesh)
            rows = rows._replace(valid=rows.valid & valid)
            each.append(jax.block_until_ready(adapted(params, index, frozen, rows)))
        return stacked(each)

    return read_and_adapt


def _reader(pools, folds, joint, schedule, mesh, views, on_target) -> Callable[[int], Any]:
    """What a step reads: step -> this process's share of rows (joint) or episodes, placed."""
    pool, k = training_pool.join(pools), len(pools[0].clean)
    members = training_pool.members(k, folds, [len(p.clean) for p in pools[1:]], on_target)
    n = schedule.batch if joint else schedule.tasks
    rows, valid = sharding.local_rows(n, mesh), sharding.valid_rows(n, mesh)
    make: Callable
    own: list[Any] = members
    size: Any = n
    if joint:
        make, own = training_pool.joint_batch, [np.concatenate(sets) for sets in members]
    else:
        make, size = episodes.episodes_batch, episodes.Sizes(n, k, schedule.shots)
        episodes.check(pool.kinds, sum(members, []))

    def read(step: int):
        batch = make(step, pool, own, size, schedule.seed, rows, views)
        batch = sharding.place(batch, mesh)
        return batch._replace(valid=batch.valid & valid[:, None])

    return read
