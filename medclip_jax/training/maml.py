"""Meta-learning over any loss: exact MAML (Finn et al. 2017), first order, ANIL and Meta-SGD.

Equation (11): params'_i = params - rate * grad L(params, support_i), repeated `steps` times, and
the outer loss is the mean over tasks i of L(params'_i, query_i). A loss is `loss(params, batch) ->
(scalar, parts)`; what is random in it (dropout) takes its keys from the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

Parts = dict[str, Any]
Loss = Callable[[PyTree, PyTree], tuple[Any, Parts]]


class Inner(NamedTuple):
    """How params adapt to a support set."""

    rate: Any = 0.01  # step size > 0, a number or a tree of them; MetaSGD carries its own
    steps: int = 1  # full-batch gradient steps; 0: the query loss at params themselves
    first_order: bool = False  # the inner gradient is a constant
    # Does the tensor of this path ("adapters/0/kernel") adapt? None: all do. What does not adapt
    # still gets the outer gradient (ANIL).
    adapts: Callable[[str], bool] | None = None


class MetaSGD(NamedTuple):
    """Params together with their learned inner rates, one per tensor."""

    params: Any
    rate: Any


def meta_sgd(params: PyTree, rate: float) -> MetaSGD:
    """Start Meta-SGD with the same `rate` (> 0) for every tensor of params."""
    return MetaSGD(params, jax.tree.map(lambda p: jnp.asarray(rate, p.dtype), params))


def adapt(
    params: PyTree, support: PyTree, *, loss: Loss, inner: Inner
) -> tuple[PyTree, Float[Array, " steps"]]:
    """Take `inner.steps` gradient steps on the support loss (inner loop of equation 11).

    Returns the adapted params (same structure; without the rates of a `MetaSGD`) and the support
    loss before each step. Differentiable in params and in the rates.
    """
    params, rate = params if isinstance(params, MetaSGD) else (params, inner.rate)
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    adapting = [inner.adapts is None or inner.adapts(name) for name in names]
    leaves, rates = [leaf for _, leaf in paths], jax.tree.leaves(jax.tree.broadcast(rate, params))
    rates = [r for r, a in zip(rates, adapting, strict=True) if a]

    def whole(moving):
        rest = iter(moving)
        merged = [next(rest) if a else p for a, p in zip(adapting, leaves, strict=True)]
        return jax.tree.unflatten(structure, merged)

    def step(moving, _):
        # The gradient of a constant is never traced to second order, so first order is cheap.
        start = jax.lax.stop_gradient(moving) if inner.first_order else moving
        value, grads = jax.value_and_grad(lambda m: loss(whole(m), support)[0])(start)
        if inner.first_order:
            grads = jax.lax.stop_gradient(grads)
        moved = [p - (r * g).astype(p.dtype) for p, r, g in zip(moving, rates, grads, strict=True)]
        return moved, value

    # The first step stands before the loop: where tasks share params (vmap over tasks), all that
    # depends on params alone is then computed once for all of them, and stored once.
    moved, losses = [p for p, a in zip(leaves, adapting, strict=True) if a], []
    if inner.steps:
        moved, value = step(moved, None)
        losses.append(value[None])
    if inner.steps > 1:
        # Of several steps only params are stored, the rest is recomputed going back. Inside scan
        # nothing can merge with that, so no barrier against common subexpressions is needed.
        body = jax.checkpoint(step, prevent_cse=False)
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

    Args:
      episodes: (support, query); every leaf has the tasks on axis 0.
      valid: False for tasks that only fill the shape: finite, and of no weight.

    Returns:
      The loss and the mean of each of its parts; NaN if no task is valid.
    """

    def one(support, query):
        adapted, _ = adapt(params, support, loss=loss, inner=inner)
        return loss(adapted, query)

    per_task = jax.vmap(one)(*episodes)
    if valid is None:
        return jax.tree.map(jnp.mean, per_task)
    return jax.tree.map(lambda x: jnp.where(valid, x, 0).sum() / valid.sum(), per_task)
