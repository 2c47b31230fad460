"""Meta-learning over any loss: exact MAML (Finn et al. 2017), first order, ANIL and Meta-SGD.

Equation (11): params'_i = params - rate * grad L(params, support_i), repeated `steps` times, and
the outer loss is the mean over tasks i of L(params'_i, query_i). A loss is `loss(params, batch) ->
(scalar, parts)`; what is random in it (dropout) takes its keys from the batch.
"""

from collections.abc import Callable
from functools import partial
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

    def whole(moving, fixed):
        moving, fixed = iter(moving), iter(fixed)
        return jax.tree.unflatten(structure, [next(moving if a else fixed) for a in adapting])

    def value(moving, fixed, support):
        return loss(whole(moving, fixed), support)[0]

    first_moved = [p for p, a in zip(leaves, adapting, strict=True) if a]
    fixed = [p for p, a in zip(leaves, adapting, strict=True) if not a]
    take = _first_order_step if inner.first_order else _exact_step

    def step(moving, _):
        return take(value, moving, fixed, rates, support)

    # The first step stands before the loop: where tasks share params (vmap over tasks), all that
    # depends on params alone is then computed once for all of them, and stored once.
    moved, losses = first_moved, []
    if inner.steps:
        moved, first = step(moved, None)
        losses.append(first[None])
    if inner.steps > 1:  # of which only params are stored
        body = jax.checkpoint(step, prevent_cse=False)
        moved, later = jax.lax.scan(body, moved, length=inner.steps - 1)
        losses.append(later)
    return whole(moved, fixed), jnp.concatenate(losses) if losses else jnp.zeros(0)


def _gradient_step(value: Callable, moving: list, fixed: list, rates: list, support: PyTree):
    """(moving - rates * gradient, the loss before); value: (moving, fixed, support) -> loss."""
    before, grads = jax.value_and_grad(value)(moving, fixed, support)
    return _moved(moving, rates, grads), before


def _first_order_step(value: Callable, moving: list, fixed: list, rates: list, support: PyTree):
    """The same, whose gradient is a constant; it is never traced to second order."""
    constants = jax.lax.stop_gradient((moving, fixed))
    before, grads = jax.value_and_grad(value)(*constants, support)
    return _moved(moving, rates, jax.lax.stop_gradient(grads)), before


def _moved(moving: list, rates: list, grads: list) -> list:
    """moving - rates * grads, each tensor in its own dtype."""
    return [p - (r * g).astype(p.dtype) for p, r, g in zip(moving, rates, grads, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exact_step(value: Callable, moving: list, fixed: list, rates: list, support: PyTree):
    """`_gradient_step` with the exact gradient of its own, which holds little.

    The vector that comes back, g, is pulled through p - r grad L by one Hessian-vector product, a
    derivative of the gradient in the direction r g: the Hessian is symmetric. Nothing of the step
    is stored but its arguments, where reverse mode over reverse mode would store all it computes.
    """
    return _gradient_step(value, moving, fixed, rates, support)


def _exact_step_forward(value, moving, fixed, rates, support):
    return _gradient_step(value, moving, fixed, rates, support), (moving, fixed, rates, support)


def _exact_step_backward(value, stored, back):
    moving, fixed, rates, support = stored
    back, of_loss = back

    def gradient(moving, fixed):
        return jax.grad(value, argnums=(0, 1))(moving, fixed, support)

    direction = [(r * g).astype(p.dtype) for p, r, g in zip(moving, rates, back, strict=True)]
    still = jax.tree.map(jnp.zeros_like, fixed)
    slopes, curvature = jax.jvp(gradient, (moving, fixed), (direction, still))
    of_moving = [g - h + of_loss * s for g, h, s in zip(back, curvature[0], slopes[0], strict=True)]
    of_fixed = [of_loss * s - h for h, s in zip(curvature[1], slopes[1], strict=True)]
    of_rates = [-_reduced(g * s, r) for g, s, r in zip(back, slopes[0], rates, strict=True)]
    return of_moving, of_fixed, of_rates, None


def _reduced(x: Array, like: Any) -> Array:
    """Summed over all axes if the rate is one number of the tensor."""
    return (x.sum() if jnp.ndim(like) == 0 else x).astype(jnp.result_type(like))


_exact_step.defvjp(_exact_step_forward, _exact_step_backward)


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

    episodes = jax.tree.map(jnp.asarray, episodes)  # custom gradients take no NumPy constants
    per_task = jax.vmap(one)(*episodes)
    if valid is None:
        return jax.tree.map(jnp.mean, per_task)
    return jax.tree.map(lambda x: jnp.where(valid, x, 0).sum() / valid.sum(), per_task)
