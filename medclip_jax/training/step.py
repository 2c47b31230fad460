"""How params learn: jointly from rows, or from episodes (equation 11). One step serves both.

joint    Adam on the loss of a batch of rows
maml     Adam on the query loss after inner steps on the support, exact second order
fomaml   the same with the inner gradient as a constant
anil     exact, but only the head adapts, not the BODY (Raghu et al. 2020)
meta_sgd exact, with a learned inner rate per tensor (Li et al. 2017): a maml.MetaSGD
maml_pp  exact after a first-order start, a learned rate per step: a maml.StepRates; training.meta
reptile  towards the adapted params (Nichol et al. 2018); training.meta
imaml    the gradient of the inner minimum (Rajeswaran et al. 2019); training.meta
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from medclip_jax.features.training_pool import Batch, Episodes
from medclip_jax.training import maml

# not adapted by ANIL: no text encoder in its inner loop, and no directions of tokens
BODY = ("context", "language", "direction")
PROXIMAL = 0.1  # of implicit MAML


class TrainState(NamedTuple):
    """All that a resumed run needs: everything random is a function of (key, step).

    params and opt are stacked, [1 + folds, ...]: the main params, then the fold params.
    """

    step: Int[Array, ""]
    params: Any
    opt: Any
    key: jax.Array  # jax.random.key_data


def start(
    params: Any, optimizer: optax.GradientTransformation, count: int, seed: int
) -> TrainState:
    """Step 0: `count` equal copies of `params`, each with its own optimiser state."""
    stacked = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * count), params)
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.asarray(0), stacked, jax.vmap(optimizer.init)(stacked), key)


class Learner(NamedTuple):
    """How params learn; all fields but the name are for the learners of episodes."""

    name: str  # of config_validation.LEARNERS
    inner_steps: int = 1
    inner_rate: float = 0.05  # > 0; where Meta-SGD starts from
    adapt_steps: int = 1  # inner steps on the supports after training; 0: none

    def inner(self, steps: int) -> maml.Inner:
        """How `steps` inner steps are taken."""
        head_only = (lambda path: path.split("/")[0] not in BODY) if self.name == "anil" else None
        proximal = PROXIMAL if self.name == "imaml" else 0.0
        first_order = self.name in ("fomaml", "reptile")
        return maml.Inner(self.inner_rate, steps, first_order, head_only, proximal)


class Contrast(NamedTuple):
    """SimCLR in training."""

    loss: Callable  # (params, views, valid) -> scalar
    weight: float


def meta_objective(loss: Callable, inner: maml.Inner, contrast: Contrast | None = None) -> Callable:
    """The meta-objective of `loss(params, frozen, batch, key)`, of the same form over Episodes.

    `contrast` is of params as they are, once for the images of all tasks: it asks for nothing that
    a task could adapt to. The dropout of task i comes from (key, i), for support and query apart,
    so that a task is the same however many stand beside it to fill the devices.
    """

    def objective(params, frozen, batch: Episodes, key):
        def keyed(params, part):
            return loss(params, frozen, *part)

        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(batch.valid)))
        keys = jax.vmap(jax.random.split)(keys)
        sides = (batch.support, keys[:, 0]), (batch.query, keys[:, 1])
        total, parts = maml.meta_loss(params, sides, loss=keyed, inner=inner, valid=batch.valid)
        if contrast is None or batch.views is None:
            return total, parts
        views = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.views)
        valid = jnp.repeat(batch.valid, len(views.image) // len(batch.valid))
        start = params.params if isinstance(params, maml.MetaSGD) else params
        simclr = contrast.loss(start, views, valid)
        total = total + contrast.weight * simclr
        return total, parts | {"simclr": simclr, "loss": total}

    return objective


def make_step(
    loss: Callable, optimizer: optax.GradientTransformation, sharding: Any = None
) -> Callable:
    """The training step, compiled: every params of the stack takes its own.

    Args:
      loss: (params, frozen, batch, key) -> (scalar, parts).
      optimizer: of each params.
      sharding: of what comes out; None leaves it to the compiler.

    Returns:
      (state, frozen, batch) -> (state, parts of the main params). Leaves of batch are [row or task,
      1 + folds, ...], spread over the devices on axis 0; the state is donated.
    """

    def step(state: TrainState, frozen, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        count = jax.tree.leaves(state.params)[0].shape[0]

        def gradient(one):
            params, index, key = one
            own = jax.tree.map(
                partial(jax.lax.dynamic_index_in_dim, index=index, axis=1, keepdims=False), batch
            )
            return jax.grad(loss, has_aux=True)(params, frozen, own, key)

        # one after the other: batching them by vmap, or their text features alone, is slower on a
        # CPU, whose caches then hold no layer's activations
        each = (state.params, jnp.arange(count), jax.random.split(key, count))
        grads, parts = jax.lax.map(gradient, each)

        def move(params, opt, grads):
            update, opt = optimizer.update(grads, opt, params)
            return optax.apply_updates(params, update), opt

        params, opt = jax.vmap(move)(state.params, state.opt, grads)
        main = jax.tree.map(lambda x: x[0], parts)
        return TrainState(state.step + 1, params, opt, state.key), main

    return jax.jit(step, donate_argnums=0, out_shardings=sharding)


def adapt(
    stack: Any, index: Any, frozen: Any, batch: Batch, *, loss: Callable, inner: maml.Inner
) -> Any:
    """The params at an index of the stack, adapted to its own rows without dropout.

    Leaves of batch are [row, ...]; the result is without learned rates. Pure; jit it.
    """

    def plain(params, batch):
        return loss(params, frozen, batch, None)

    params = jax.tree.map(lambda x: x[index], stack)
    return maml.adapt(params, batch, loss=plain, inner=inner)[0]
