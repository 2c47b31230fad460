"""Meta-learning over any loss: exact MAML, first order, ANIL, Meta-SGD and joint training.

Equation (11): params'_i = params - rate * grad L(params, support_i), repeated `steps` times, and the
outer loss is the mean over tasks i of L(params'_i, query_i). Finn et al. 2017 (MAML), Raghu et al.
2020 (ANIL), Li et al. 2017 (Meta-SGD).

A loss is `loss(params, batch) -> (scalar, parts)`, parts a dict of named scalars. What is random in
a loss (dropout) takes its keys from the batch, so that a step is a function of its inputs alone.

    MAML          Inner(rate, steps)
    first order   Inner(rate, steps, order="first")
    ANIL          Inner(rate, steps, adapts=predicate)
    Meta-SGD      Inner(None, steps), with params = meta_sgd(params, rate)
    joint         Inner(steps=0): the query loss at params itself
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from medclip_jax.training.state import TrainState

Parts = dict[str, Any]
Loss = Callable[[PyTree, PyTree], tuple[Any, Parts]]

ORDERS = ("exact", "first")


class Inner(NamedTuple):
    """How params adapts to a support set."""

    # Step size: a number for all tensors, or a pytree (or a prefix of one) of numbers per tensor.
    # None: learned (Meta-SGD), it comes with params as `MetaSGD`.
    rate: Any = 0.01
    steps: int = 1  # full-batch gradient steps; 0 is joint training
    order: str = "exact"  # "exact": second order; "first": the inner gradient is a constant
    # What adapts: None for all, a pytree (or prefix) of bool, or a predicate of a tensor's path
    # ("heads/visual/kernel"). What does not adapt still gets the outer gradient (ANIL).
    adapts: PyTree | Callable[[str], bool] | None = None
    remat: bool = True  # of several steps keep only params, and recompute the rest going back


class MetaSGD(NamedTuple):
    """Theta together with its learned inner rates, one per tensor."""

    params: Any
    rate: Any


def meta_sgd(params: PyTree, rate: float) -> MetaSGD:
    """Start Meta-SGD with the same `rate` (> 0) for every tensor of params."""
    return MetaSGD(params, jax.tree.map(lambda p: jnp.asarray(rate, p.dtype), params))


def adapt(
    params: PyTree, support: PyTree, *, loss: Loss, inner: Inner
) -> tuple[PyTree, Float[Array, " steps"]]:
    """Take `inner.steps` gradient steps on the support loss.

    Returns the adapted params (same structure; without the rates if params is a `MetaSGD`) and the
    support loss before each step. Differentiable in params and in the rates.
    Raises ValueError for an unknown order, negative steps, or a learned rate without `MetaSGD`.
    """
    params, rate = _params_and_rate(params, inner)
    leaves, structure = jax.tree.flatten(params)
    moves = _moves(params, inner.adapts)
    rates = [r for r, move in zip(_leaves_like(rate, params), moves, strict=True) if move]

    def whole(moving):
        pool = iter(moving)
        merged = [next(pool) if m else p for m, p in zip(moves, leaves, strict=True)]
        return jax.tree.unflatten(structure, merged)

    def step(moving, _):
        # The gradient of a constant is never traced to second order, so first order is cheap.
        at = jax.lax.stop_gradient(moving) if inner.order == "first" else moving
        value, grads = jax.value_and_grad(lambda m: loss(whole(m), support)[0])(at)
        if inner.order == "first":
            grads = jax.lax.stop_gradient(grads)
        moved = [p - (r * g).astype(p.dtype) for p, r, g in zip(moving, rates, grads, strict=True)]
        return moved, value

    # The first step stands before the loop: where tasks share params (vmap over tasks), all that
    # depends on params alone is then computed once for all of them, and kept once.
    moved, losses = [p for p, move in zip(leaves, moves, strict=True) if move], []
    if inner.steps:
        moved, value = step(moved, None)
        losses.append(value[None])
    if inner.steps > 1:
        # Inside scan nothing can merge with the recomputation, so the barrier against common
        # subexpressions is not needed.
        body = jax.checkpoint(step, prevent_cse=False) if inner.remat else step
        moved, later = jax.lax.scan(body, moved, length=inner.steps - 1)
        losses.append(later)
    return whole(moved), jnp.concatenate(losses) if losses else jnp.zeros(0)


def meta_loss(
    params: PyTree,
    episodes: tuple[PyTree, PyTree],
    *,
    loss: Loss,
    inner: Inner,
    valid: Bool[Array, " e"] | None = None,
) -> tuple[Float[Array, ""], Parts]:
    """Mean over tasks of the query loss after adaptation to the support: equation (11).

    `episodes` is (support, query); every leaf has the tasks on axis 0. `valid` is False for tasks
    that only fill the shape; these must be finite (copies of real ones) and weigh nothing. No valid
    task at all gives NaN. Returns the loss and the mean of each of its parts.
    """
    support, query = episodes

    def one(support, query):
        adapted, _ = adapt(params, support, loss=loss, inner=inner)
        return loss(adapted, query)

    per_task = jax.vmap(one)(support, query)
    return jax.tree.map(lambda x: _mean(x, valid), per_task)


def meta_step(
    state: TrainState,
    episodes: tuple[PyTree, PyTree],
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    inner: Inner,
    valid: Bool[Array, " e"] | None = None,
) -> tuple[TrainState, Parts]:
    """One outer step: gradient of `meta_loss`, then `optimizer`.

    Pure; jit it and donate `state`. Returns the next state and the parts of the loss with
    "meta_loss" and "grad_norm" (global L2 norm before the optimizer) beside them.
    Raises ValueError if the loss names a part "meta_loss" or "grad_norm".
    """

    def outer(params):
        return meta_loss(params, episodes, loss=loss, inner=inner, valid=valid)

    (value, parts), grads = jax.value_and_grad(outer, has_aux=True)(state.params)
    own = {"meta_loss": value, "grad_norm": optax.tree.norm(grads)}
    if taken := own.keys() & parts.keys():
        raise ValueError(f"the loss names a part {sorted(taken)}, which meta_step reports itself")
    updates, opt = optimizer.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(step=state.step + 1, params=params, opt=opt), parts | own


def _params_and_rate(params: PyTree, inner: Inner) -> tuple[PyTree, PyTree]:
    """Check `inner`, and separate what is adapted from the rate it adapts with."""
    if inner.order not in ORDERS:
        raise ValueError(f"order {inner.order!r} is not one of {ORDERS}")
    if inner.steps < 0:
        raise ValueError(f"steps is {inner.steps}; it must be 0 or more")
    learned = isinstance(params, MetaSGD)
    if learned != (inner.rate is None):
        raise ValueError("rate=None and a params of type MetaSGD belong together: use both or none")
    return (params.params, params.rate) if learned else (params, inner.rate)


def _moves(params: PyTree, adapts) -> list[bool]:
    """For each tensor of params, in order: does it adapt?"""
    if adapts is None:
        adapts = True
    if callable(adapts):
        paths, _ = jax.tree_util.tree_flatten_with_path(params)
        return [bool(adapts(jax.tree_util.keystr(p, simple=True, separator="/"))) for p, _ in paths]
    return [bool(flag) for flag in _leaves_like(adapts, params)]


def _leaves_like(prefix: PyTree, params: PyTree) -> list:
    """One leaf of `prefix` for each tensor of params."""
    return jax.tree.leaves(jax.tree.broadcast(prefix, params))


def _mean(x: Float[Array, " e"], valid: Bool[Array, " e"] | None) -> Float[Array, ""]:
    """Mean over the valid tasks."""
    if valid is None:
        return x.mean()
    return jnp.where(valid, x, 0).sum() / valid.sum()
