"""Meta-learning over data sets: tasks of many, a head that learns from them, adaptation to another.

A task is a normal class (a data set): its support is healthy images, each also with a synthetic
anomaly; its query other healthy images and anomalies: real ones of that data set, synthetic ones,
and healthy images of others, which are foreign here. Nothing but the support says what is normal.
What the frozen part makes of a task (detectors/deviation.py) is computed once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from safetensors import safe_open
from safetensors.numpy import save

from medclip_jax import files, stored
from medclip_jax.detectors import deviation
from medclip_jax.detectors.deviation import Deviation, Whitening
from medclip_jax.distributed import runtime, sharding
from medclip_jax.errors import CheckpointError, ConfigError
from medclip_jax.features.encoder import Source
from medclip_jax.training import episodes, maml
from medclip_jax.training.episodes import SHOTS, SUPPORTS
from medclip_jax.training.step import Learner

VERSION = 3  # raise when what is learned from the same sources and settings changes
TASKS = 40  # of each source in the task pool
PATCHES = 16  # of each image that tasks keep, those that deviate most
LEARNING_RATE = 1e-2  # of Adam
VALIDATION = 5  # each fifth source is held out: where its tasks' loss is least training stops
CHECK_EVERY = 50  # outer steps
FIRST_ORDER = 1 / 3  # share of MAML++'s steps that are first order

_remember, _deviation = jax.jit(deviation.remember), jax.jit(deviation.deviation)


class Rows(NamedTuple):
    """Images of a task as the head reads them."""

    seen: Deviation
    label: Float[Array, " n"]


class TaskPool(NamedTuple):
    """Tasks, on axis 0 of every array."""

    support: Rows
    query: Rows


class State(NamedTuple):
    """What was meta-learned; it serves every target whose modality is not among the sources."""

    whitening: Whitening
    params: Any  # of a head, with its inner rates where these are learned
    log: Float[np.ndarray, "s 4"]  # step, loss, and of held-out tasks before and after adaptation


def loss(params: Any, rows: Rows, *, levels: int) -> tuple[Float[Array, ""], maml.Parts]:
    """Cross-entropy of the image logits, both classes with half the weight."""
    _, logit = deviation.logits(params, rows.seen, levels)
    each = optax.sigmoid_binary_cross_entropy(logit, rows.label)
    share = jnp.where(rows.label > 0, rows.label.mean(), 1 - rows.label.mean())
    value = (each / jnp.maximum(share, 1e-6)).mean() / 2
    return value, {"loss": value}


def whitening_of(sources: Sequence[Source]) -> Whitening:
    """Whitening of the sources' healthy tokens, as many of each."""
    count = min(len(s.healthy.pooled) for s in sources)

    def level(i):
        parts = [s.healthy.levels[i][:count] for s in sources]
        return np.concatenate([x.reshape(-1, x.shape[-1]) for x in parts]).astype(np.float32)

    return deviation.whiten([level(i) for i in range(len(sources[0].healthy.levels))])


def task_pool(
    sources: Sequence[Source], whitening: Whitening, tasks: int, seed: int, sizes=SUPPORTS, **shares
) -> TaskPool:
    """`tasks` tasks of each source, in the sources' order, as `episodes.sides` makes them.

    sizes: of a support, one at random; each divides the largest, to which rows are repeated.
    Raises ConfigError for a source with too few healthy images.
    """

    @jax.jit
    def rows(memory, features, own):
        seen = deviation.deviation(whitening, memory, features, own)
        best = jax.lax.top_k(seen.patch.sum(-1), min(PATCHES, seen.patch.shape[1]))[1]
        seen = seen._replace(patch=jnp.take_along_axis(seen.patch, best[..., None], 1))
        return jax.tree.map(lambda x: x.astype(jnp.float16), seen)

    each, fill = [], np.arange(2 * max(sizes))
    for number, source in enumerate(sources):
        if (count := len(source.healthy.pooled)) < 2 * SHOTS:
            raise ConfigError(
                f"source {number + 1} of config.meta.sources has {count} healthy images where "
                f"tasks need {2 * SHOTS}: leave it out"
            )
        for task in range(tasks):
            rng = np.random.default_rng([seed, number, task])
            shots = int(rng.choice([k for k in sizes if k + SHOTS <= count]))
            support, query = episodes.sides(rng, sources, number, shots, **shares)
            memory = _remember(whitening, episodes.rows_of(source.healthy, support[0]))
            sides = episodes.support_rows(source, *support), episodes.query_rows(source, *query)
            seen = [Rows(rows(memory, x, own), label) for x, own, label in sides]
            whole = jax.tree.map(lambda x, i=fill % (2 * shots): np.asarray(x)[i], seen[0])
            each.append(TaskPool(whole, seen[1]))
    return jax.tree.map(lambda *x: np.stack(x), *each)


# --- learning -------------------------------------------------------------------------------


def begin(learner: Learner, whitening: Whitening) -> Any:
    """Params that learning starts from: a fresh head, with inner rates where they are learned."""
    head = deviation.init(whitening)
    if learner.name == "meta_sgd":
        return maml.meta_sgd(head, learner.inner_rate)
    if learner.name == "maml_pp":
        return maml.step_rates(head, learner.inner_rate, max(1, learner.inner_steps))
    return head


def objective(learner: Learner, levels: int, share: float) -> Callable:
    """(params, (support, query), valid, progress) -> loss and parts; share: of the steps done."""
    own, inner = partial(loss, levels=levels), learner.inner(learner.inner_steps)
    if learner.name == "joint":  # the same rows, and no task adapts
        inner = maml.Inner(0.0, 0)
    if learner.name == "reptile":
        return lambda p, tasks, valid, _: maml.reptile_loss(
            p, tasks, loss=own, inner=inner, valid=valid
        )
    if learner.name == "maml_pp":
        inner = inner._replace(first_order=share < FIRST_ORDER)

    def value(params, tasks, valid, progress):
        weights = None
        if learner.name == "maml_pp":
            weights = maml.step_weights(learner.inner_steps, progress)
        return maml.meta_loss(params, tasks, loss=own, inner=inner, valid=valid, weights=weights)

    return value


def train(
    sources: Sequence[Source],
    learner: Learner,
    *,
    steps: int,
    tasks: int,
    seed: int,
    mesh: Mesh,
) -> State:
    """Meta-learn from the sources; the params of the step whose held-out tasks fare best.

    steps: outer ones. tasks: per step, spread over the devices of the mesh.
    """
    whitening = whitening_of(sources)
    every = task_pool(sources, whitening, TASKS, seed)
    held_out = np.repeat(np.arange(len(sources)) % VALIDATION == VALIDATION - 1, TASKS)
    return fit(every, held_out, whitening, learner, steps, tasks, seed, mesh)


def fit(every: TaskPool, held_out, whitening, learner, steps, tasks, seed, mesh) -> State:
    """`train` on a pool; held_out: True for tasks that are validated on (none: the last step)."""
    levels, params = len(whitening.kernel), begin(learner, whitening)
    optimizer = optax.adam(LEARNING_RATE)
    rest = sharding.replicate(jax.tree.map(lambda x: x[~held_out], every), mesh)
    checked = jax.tree.map(lambda x: x[held_out], every) if held_out.any() else rest
    valid = jnp.arange(-(-tasks // mesh.size) * mesh.size) < tasks

    def chunk(value, count, state, rest, first):
        def one(state, step):
            params, opt = state
            key = jax.random.fold_in(jax.random.key(seed), step)
            row = jax.random.randint(key, (tasks,), 0, len(rest.support.label))
            row = jnp.concatenate([row, jnp.repeat(row[-1:], len(valid) - tasks)])
            drawn = jax.tree.map(lambda x: x[row], rest)
            drawn = jax.lax.with_sharding_constraint(drawn, sharding.by_rows(mesh))
            grads, parts = jax.grad(value, has_aux=True)(params, tuple(drawn), valid, step / steps)
            update, opt = optimizer.update(grads, opt, params)
            return (optax.apply_updates(params, update), opt), parts["loss"]

        return jax.lax.scan(one, state, first + jnp.arange(count))

    inner, own = learner.inner(max(1, learner.inner_steps)), partial(loss, levels=levels)

    @jax.jit
    def check(params, tasks):
        values = [
            maml.meta_loss(params, tuple(tasks), loss=own, inner=i)[0]
            for i in (inner._replace(steps=0, proximal=0.0), inner)
        ]
        return jnp.stack(values)

    state, lines, best, runs = (params, optimizer.init(params)), [], (np.inf, params), {}
    for first in range(0, steps, CHECK_EVERY):
        early = learner.name == "maml_pp" and first / steps < FIRST_ORDER
        kind = early, min(CHECK_EVERY, steps - first)
        if kind not in runs:
            aim = objective(learner, levels, 0.0 if early else 1.0)
            runs[kind] = jax.jit(partial(chunk, aim, kind[1]))
        state, values = runs[kind](state, rest, first)
        before, after = np.asarray(check(state[0], checked))
        lines.append([first + kind[1], float(values.mean()), float(before), float(after)])
        value = before if learner.name == "joint" else after
        if not held_out.any() or value < best[0]:
            best = float(value), state[0]
    return State(whitening, jax.device_get(best[1]), np.array(lines).reshape(-1, 4))


def adapted(
    state: State,
    learner: Learner,
    target: Source,
    members: Sequence[Int[np.ndarray, " _"]],
) -> Any:
    """Heads adapted to a target's supports, leaves [members, ...], each to its own of them."""
    inner = learner.inner(learner.adapt_steps)._replace(proximal=0.0)
    own = partial(loss, levels=len(state.whitening.kernel))

    @jax.jit
    def one(rows):
        return maml.adapt(state.params, rows, loss=own, inner=inner)[0]

    rows = [target_rows(state.whitening, target, images)[0] for images in members]
    return jax.tree.map(lambda *x: jnp.stack(x), *map(one, rows))


def target_rows(
    whitening: Whitening, target: Source, images: Int[np.ndarray, " _"]
) -> tuple[Rows, deviation.Memory]:
    """What a head adapts to: these supports and an anomaly of each kind of each; their memory."""
    kinds = target.kinds[images]
    known = episodes.altering(kinds)
    first = [(i, np.flatnonzero(own == kind)) for i, own in enumerate(kinds) for kind in known]
    image, variant = np.array([(i, places[0]) for i, places in first if len(places)]).T
    clean = episodes.rows_of(target.healthy, images)
    changed = episodes.rows_of(target.altered, images[image], variant)
    both = jax.tree.map(lambda *x: np.concatenate(x), clean, changed)
    memory = _remember(whitening, clean)
    whose = np.concatenate([np.arange(len(images)), image])
    seen = _deviation(whitening, memory, both, jnp.asarray(whose))
    return Rows(seen, jnp.asarray(np.arange(len(whose)) >= len(images), jnp.float32)), memory


# --- states on disk -------------------------------------------------------------------------


def learned(
    folder: Path,
    made_from: Any,
    sources: Sequence[Source],
    learner: Learner,
    *,
    steps: int,
    tasks: int,
    mesh: Mesh,
    resume_only: bool = False,
) -> State:
    """The state of these sources and settings: read if it was learned before, else learned.

    folder: where states are kept; made_from: names the sources' images and their encoding;
    resume_only: CheckpointError if it was not.
    """
    parts = VERSION, made_from, learner._replace(adapt_steps=0), steps, tasks
    path = folder / "meta_learned" / f"{stored.digest(parts)}.safetensors"
    whole = path.is_file() and stored.has_crc(path)
    if not runtime.any_process(not whole).any():  # else all learn, together
        with safe_open(path, framework="np") as tensors:
            leaves = {name: tensors.get_tensor(name) for name in tensors.keys()}
        count = sum(name.startswith("mean") for name in leaves)
        both = ([jnp.asarray(leaves[f"{n}{i}"]) for i in range(count)] for n in ("mean", "kernel"))
        whitening = Whitening(*map(tuple, both))
        shape: Any = jax.tree.structure(begin(learner, whitening))
        params = [leaves[f"param{i}"] for i in range(shape.num_leaves)]
        return State(whitening, jax.tree.unflatten(shape, params), leaves["log"])
    if resume_only:
        raise CheckpointError(
            f"{path.parent} has no state of these sources: run --mode train first"
        )
    state = train(sources, learner, steps=steps, tasks=tasks, seed=0, mesh=mesh)
    tensors = {"log": state.log}
    tensors |= {f"param{i}": x for i, x in enumerate(jax.tree.leaves(state.params))}
    for i, (mean, kernel) in enumerate(zip(*state.whitening, strict=True)):
        tensors |= {f"mean{i}": mean, f"kernel{i}": kernel}
    if sharding.is_main():
        rows = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
        files.write_bytes(path, stored.with_crc(save(rows, metadata={"crc32": "00000000"})))
    return state
