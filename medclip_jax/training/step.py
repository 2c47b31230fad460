"""How params learns: jointly from rows, or from episodes (equation 11). One step serves both.

    joint    Adam on the loss of a batch of rows
    maml     Adam on the query loss after inner steps on the support, exact second order
    fomaml   the same with the inner gradient as a constant
    anil     exact, but only the head adapts: adapters, scale and offset; the body is the context
             (and a tuned language adapter), so the text tower is not in the inner loop (Raghu et
             al. 2020)

With a learned rate (Meta-SGD, Li et al. 2017) params is a maml.MetaSGD until it is adapted.
Every copy of params (all supports, and one per held-out fold) learns from its own images alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from medclip_jax.features import training_pool
from medclip_jax.features.batch import Batch, Views
from medclip_jax.models import contrastive
from medclip_jax.training import episodes, maml
from medclip_jax.training.state import TrainState

BODY = ("context", "language")  # parts of params that ANIL does not adapt


class Episodes(NamedTuple):
    """Rows of several tasks, as a step takes them: leaves are [task, copy, row, ...]."""

    support: Batch
    query: Batch
    valid: Bool[Array, "e copy"]


def inner(learner: str, steps: int, rate: float | None, learned: bool) -> maml.Inner:
    """How a learner adapts; `learned` rates start at `rate` (see maml.meta_sgd)."""
    return maml.Inner(
        rate=None if learned else rate,
        steps=steps,
        order="first" if learner == "fomaml" else "exact",
        adapts=is_head if learner == "anil" else None,
    )


def is_head(path: str) -> bool:
    """Does this tensor of params adapt in ANIL?"""
    return path.split("/")[0] not in BODY


def episodic(loss: Callable, inner: maml.Inner) -> Callable:
    """The meta-objective of `loss(params, frozen, batch, key)`, of the same form over Episodes.

    Task i draws its dropout from (key, i), for support and query apart, so that a task is the same
    however many stand beside it to fill the devices.
    """

    def objective(params, frozen, batch: Episodes, key):
        def keyed(params, part):
            return loss(params, frozen, *part)

        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(batch.valid)))
        keys = jax.vmap(jax.random.split)(keys)
        sides = (batch.support, keys[:, 0]), (batch.query, keys[:, 1])
        return maml.meta_loss(params, sides, loss=keyed, inner=inner, valid=batch.valid)

    return objective


def make_step(
    loss: Callable, optimizer: optax.GradientTransformation, placed: Any = None
) -> Callable:
    """jit((state, frozen, batch) -> (state, parts)); every copy of params takes its own step.

    `loss(params, frozen, batch, key) -> (scalar, parts)`. Leaves of batch are [row or task, copy,
    ...], spread over the devices on axis 0; the state is the same on all and donated. `placed`: the
    sharding of what comes out; None leaves it to the compiler.
    """

    def step(state: TrainState, frozen, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        copies = jax.tree.leaves(state.params)[0].shape[0]

        def one(copy):
            params, number, key = copy
            own = jax.tree.map(
                partial(jax.lax.dynamic_index_in_dim, index=number, axis=1, keepdims=False), batch
            )
            return jax.grad(loss, has_aux=True)(params, frozen, own, key)

        # one after the other: batching the copies by vmap, or their text features alone, is slower
        # on a CPU, whose caches then hold no layer's activations
        each = (state.params, jnp.arange(copies), jax.random.split(key, copies))
        grad, parts = jax.lax.map(one, each)

        def move(params, opt, grad):
            update, opt = optimizer.update(grad, opt, params)
            return optax.apply_updates(params, update), opt

        params, opt = jax.vmap(move)(state.params, state.opt, grad)
        first = jax.tree.map(lambda x: x[0], parts)
        return TrainState(state.step + 1, params, opt, state.key), first

    return jax.jit(step, donate_argnums=0, out_shardings=placed)


def adapt(
    params: Any, frozen: Any, batch: Batch, *, loss: Callable, inner: maml.Inner
) -> tuple[Any, Any]:
    """Every copy adapts to its own rows, without dropout; leaves of batch are [row, copy, ...].

    Returns params (without learned rates) and the loss before each step, [copy, steps].
    """

    @jax.jit
    def run(params, frozen, batch):
        def one(copy):
            params, batch = copy
            plain = partial(_without_dropout, loss, frozen)
            return maml.adapt(params, batch, loss=plain, inner=inner)

        return jax.lax.map(one, (params, by_copy(batch)))

    return run(params, frozen, batch)


def _without_dropout(loss: Callable, frozen, params, batch):
    return loss(params, frozen, batch, None)


def by_copy(batch):
    """[row, copy, ...] -> [copy, row, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), batch)


# --- what a step reads ----------------------------------------------------------------------


def members(
    k: int, groups: Sequence[np.ndarray], others: Sequence[int], target: bool
) -> list[list[np.ndarray]]:
    """The images of the pool that each copy may use, per data set: [copy][data set].

    The pool holds the k supports first, then the images of the other data sets (`others` of each).
    Copy 0 has every support, copy 1 + f those out of fold f; with `target` False none is used.
    """
    ends = k + np.cumsum([0, *others])
    far = [np.arange(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return [[own, *far] if target else far for own in supports(k, groups)]


def supports(k: int, groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The supports of each copy of params."""
    return [np.arange(k), *(np.setdiff1d(np.arange(k), g) for g in groups)]


def batch_at(
    step: int,
    pool: training_pool.Pool,
    members: list[np.ndarray],
    size: int,
    seed: int,
    rows: np.ndarray | None = None,
    views: bool = False,
):
    """The rows of one step for every copy of params: a function of the step alone.

    Arrays are [row, copy, ...]. Each copy walks through its own supports in random order, epoch
    after epoch; in an epoch a support is itself with probability 1/4 (Identity), else its next
    anomalous variant. `rows`: those that are read, None for all. `views`: for SimCLR.
    """
    picks = [rows_at(step, own, size, seed, pool.variants, pool.copies) for own in members]
    # [row, copy]
    support, variant = (np.stack(x, axis=1) for x in zip(*picks, strict=True))
    pair = contrastive.draw(seed, step, support.shape, pool.copies) if views else ()
    if rows is not None:
        support, variant = support[rows], variant[rows]
    return shaped(pool, support, variant, [p if rows is None else p[rows] for p in pair])


def rows_at(step: int, own: np.ndarray, size: int, seed: int, variants: int, copies: int = 0):
    """(support, variant) of each row of a step; variant -1 is the image itself.

    Clean rows take the image and its augmented copies (-2, -3, ...) in turn.
    """
    support, variant = [], []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(own))
        rng = np.random.default_rng([seed, epoch])
        support.append(own[rng.permutation(len(own))[place]])
        identity = rng.random(len(own))[place] < 0.25
        clean = -1 - epoch % (1 + copies)
        variant.append(clean if identity or not variants else epoch % variants)
    return np.array(support), np.array(variant)


def episodes_at(
    step: int,
    pool: training_pool.Pool,
    members: Sequence[Sequence[np.ndarray]],
    seed: int,
    rows: np.ndarray | None = None,
    views: bool = False,
    **sizes: int,
) -> Episodes:
    """The tasks of one step for every copy; `members` are, per copy and data set, its images.

    `sizes` are those of episodes.sample; `rows` are the tasks that are read, None for all. On the
    host: put it with sharding.put, or with sharding.place if `rows` is a process's share.
    """
    sizes = sizes | {"copies": pool.copies}
    rows = np.arange(sizes["tasks"]) if rows is None else rows
    drawn = [episodes.sample(step, seed, own, pool.kinds, **sizes) for own in members]
    valid: Any = np.ones((len(rows), len(members)), bool)
    sides = []
    for i, side in enumerate(("support", "query")):
        dealt = [getattr(d, side) for d in drawn]
        shape = 2, len(dealt[0].image), len(drawn), dealt[0].image.shape[1]
        pair = (
            [p[i][rows] for p in contrastive.draw(seed, step, shape, pool.copies)] if views else ()
        )
        sides.append(take(pool, [jax.tree.map(lambda x: x[rows], d) for d in dealt], pair))
    support, query = sides
    return Episodes(support, query, valid)


def adaptation_rows(pool: training_pool.Pool, members: Sequence[np.ndarray]) -> Batch:
    """What every copy adapts to, [row, copy, ...]; rows that fill a shorter copy are not valid.

    These are the target's: they carry no data set.
    """
    pool = pool._replace(source=None)
    drawn = [episodes.adaptation(own, pool.kinds) for own in members]
    count = [d.image.size for d in drawn]
    full = [episodes.Rows(*(np.resize(x, (1, max(count))) for x in rows)) for rows in drawn]
    batch = jax.tree.map(lambda x: x[0].swapaxes(0, 1), take(pool, full))
    return batch._replace(valid=np.arange(max(count))[:, None] < np.array(count)[None])


def take(
    pool: training_pool.Pool, rows: Sequence[episodes.Rows], pair: Sequence[np.ndarray] = ()
) -> Batch:
    """Rows [task, row] of each copy -> tokens [task, copy, row, ...]; a task has one data set.

    `pair` as in `shaped`.
    """
    image, variant = (np.stack(x, axis=1) for x in zip(*rows, strict=True))
    batch = shaped(pool, image, variant, pair)
    return batch if batch.source is None else batch._replace(source=batch.source[..., 0])


def shaped(
    pool: training_pool.Pool, image: np.ndarray, variant: np.ndarray, pair: Sequence[np.ndarray]
) -> Batch:
    """Rows of the pool in the shape of `image`; `pair`: two views of each for SimCLR, or none."""
    batch = training_pool.take(pool, image.ravel(), variant.ravel())
    if len(pair):
        one, two = (training_pool.take(pool, image.ravel(), p.ravel()).features for p in pair)
        number: Any = image.ravel()
        batch = batch._replace(views=Views(one, two, number))
    return jax.tree.map(lambda x: x.reshape(*image.shape, *x.shape[1:]), batch)
