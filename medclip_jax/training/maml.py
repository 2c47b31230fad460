"""Meta-learning over any loss: exact MAML (Finn et al. 2017), first order, ANIL and their kin.

Equation (11): params'_i = params - rate * grad L(params, support_i), repeated `steps` times, and
the outer loss is the mean over tasks i of L(params'_i, query_i). A loss is `loss(params, batch) ->
(scalar, parts)`; what is random in it (dropout) takes its keys from the batch.

Meta-SGD (Li et al. 2017) learns the rates (`MetaSGD`), MAML++ (Antoniou et al. 2019) one for each
step (`StepRates`) and weighs the query loss after every step (`step_weights`). Implicit MAML
(Rajeswaran et al. 2019) is `Inner.proximal`; Reptile (Nichol et al. 2018) is `reptile_loss`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    # > 0: implicit MAML. The support loss has proximal / 2 |params' - params|^2 beside it, and the
    # outer gradient is that of its minimum, by conjugate gradients, whatever way led there.
    proximal: float = 0.0
    solver_steps: int = 10  # of conjugate gradients


class MetaSGD(NamedTuple):
    """Params together with their learned inner rates, one per tensor."""

    params: Any
    rate: Any


def meta_sgd(params: PyTree, rate: float) -> MetaSGD:
    """Start Meta-SGD with the same `rate` (> 0) for every tensor of params."""
    return MetaSGD(params, jax.tree.map(lambda p: jnp.asarray(rate, p.dtype), params))


class StepRates(NamedTuple):
    """Params together with their learned inner rates, [steps] of each tensor."""

    params: Any
    rate: Any


def step_rates(params: PyTree, rate: float, steps: int) -> StepRates:
    """Start MAML++ with the same `rate` (> 0) for every step and tensor of params."""
    return StepRates(params, jax.tree.map(lambda p: jnp.full(steps, rate, p.dtype), params))


def plain(params: PyTree) -> PyTree:
    """Params without their learned rates, if they have any."""
    return params.params if isinstance(params, MetaSGD | StepRates) else params


def step_weights(steps: int, progress: Any) -> Float[Array, " steps"]:
    """Weights of the query loss after each inner step, which add up to 1 (MAML++).

    Equal at progress 0; those of all but the last step fall to 3% of that until progress 1.
    """
    early = jnp.maximum(1 / steps - progress / steps, 0.03 / steps)
    return jnp.full(steps, early).at[-1].set(1 - early * (steps - 1))


def adapt(
    params: PyTree, support: PyTree, *, loss: Loss, inner: Inner, every: bool = False
) -> tuple[PyTree, Float[Array, " steps"]]:
    """Take `inner.steps` gradient steps on the support loss (inner loop of equation 11).

    Returns the adapted params (same structure; without learned rates), or with `every` those after
    each step, stacked; and the support loss before each step. Differentiable in params and rates,
    not in what `loss` closes over.
    """
    rate = params.rate if isinstance(params, MetaSGD | StepRates) else inner.rate
    by_step, params = isinstance(params, StepRates), plain(params)
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
    # a custom gradient in a loop may not close over what is traced (frozen parameters): that goes
    # with the support, which has no gradient
    explicit, closed = jax.closure_convert(value, first_moved, fixed, support)

    def closed_value(moving, fixed, given):
        return explicit(moving, fixed, given[0], *given[1])

    given = support, closed
    if inner.proximal:
        moved, losses = _minimum(closed_value, inner, first_moved, fixed, rates, given)
        return whole(moved, fixed), losses
    take = _first_order_step if inner.first_order else _exact_step

    def step(moving, own):
        moving, before = take(closed_value, moving, fixed, rates if own is None else own, given)
        return moving, (before, moving if every else ())

    # The first step stands before the loop: where tasks share params (vmap over tasks), all that
    # depends on params alone is then computed once for all of them, and stored once.
    moved, losses, stops = first_moved, [jnp.zeros(0)], [[p[None][:0] for p in first_moved]]
    if inner.steps:
        moved, first = step(moved, [r[0] for r in rates] if by_step else None)
        losses, stops = [first[0][None]], [[p[None] for p in first[1]]]
    if inner.steps > 1:  # of which only params are stored
        body = jax.checkpoint(step, prevent_cse=False)
        # beyond the learned steps the last one's rate stays
        place = np.arange(1, inner.steps)
        later = [r[np.minimum(place, len(r) - 1)] for r in rates] if by_step else None
        moved, (rest, stop) = jax.lax.scan(body, moved, later, length=inner.steps - 1)
        losses, stops = [*losses, rest], [*stops, stop]
    if every:
        moved = [jnp.concatenate(each) for each in zip(*stops, strict=True)]
        fixed = [jnp.broadcast_to(p, (inner.steps, *p.shape)) for p in fixed]
    return whole(moved, fixed), jnp.concatenate(losses)


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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _minimum(value: Callable, inner: Inner, moving, fixed, rates, support):
    """(steps towards the minimum of the support loss beside `inner.proximal`, losses before)."""

    def near(moved, fixed, support):
        away = sum(jnp.vdot(p - q, p - q) for p, q in zip(moved, moving, strict=True))
        return value(moved, fixed, support) + inner.proximal / 2 * away

    def step(moved, _):
        return _gradient_step(near, moved, fixed, rates, support)

    return jax.lax.scan(step, moving, length=inner.steps)


def _minimum_forward(value, inner, moving, fixed, rates, support):
    moved, losses = _minimum(value, inner, moving, fixed, rates, support)
    return (moved, losses), (moved, fixed, rates, support)


def _minimum_backward(value, inner, stored, back):
    """At the minimum d params' / d params = (1 + H / proximal)^-1; H: Hessian of the loss."""
    moved, fixed, rates, support = stored

    def gradient(moved, fixed):
        return jax.grad(value)(moved, fixed, support)

    def product(v):
        curvature = jax.jvp(lambda m: gradient(m, fixed), (moved,), (v,))[1]
        return [h + inner.proximal * x for h, x in zip(curvature, v, strict=True)]

    solution, _ = jax.scipy.sparse.linalg.cg(product, back[0], maxiter=inner.solver_steps)
    of_fixed = jax.vjp(lambda f: gradient(moved, f), fixed)[1](solution)[0]
    still = jax.tree.map(jnp.zeros_like, rates)
    return [inner.proximal * x for x in solution], [-x for x in of_fixed], still, None


_minimum.defvjp(_minimum_forward, _minimum_backward)


def reptile_loss(
    params: PyTree,
    episodes: tuple[PyTree, PyTree],
    *,
    loss: Loss,
    inner: Inner,
    valid: Bool[Array, " e"] | None = None,
) -> tuple[Float[Array, ""], Parts]:
    """`meta_loss` in value, whose gradient is Reptile's: params - mean of the adapted params."""
    start = jax.lax.stop_gradient(params)

    def one(support, query):
        adapted, _ = adapt(start, support, loss=loss, inner=inner)
        return adapted, loss(adapted, query)

    per_task = jax.vmap(one)(*jax.tree.map(jnp.asarray, episodes))
    mean, (value, parts) = jax.tree.map(lambda x: _task_mean(x, valid), per_task)
    away = jax.tree.map(lambda p, m: jnp.vdot(jax.lax.stop_gradient(p - m), p), params, mean)
    pull = sum(jax.tree.leaves(away))
    return value + pull - jax.lax.stop_gradient(pull), parts


def _task_mean(x: Array, valid: Bool[Array, " e"] | None) -> Array:
    """Mean over the valid tasks (axis 0); NaN if there is none."""
    if valid is None:
        return x.mean(0)
    return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0).sum(0) / valid.sum()


def meta_loss(
    params: PyTree,
    episodes: tuple[PyTree, PyTree],
    *,
    loss: Loss,
    inner: Inner,
    valid: Bool[Array, " e"] | None = None,
    weights: Float[Array, " steps"] | None = None,
) -> tuple[Float[Array, ""], Parts]:
    """Mean over tasks of the query loss after adaptation to the support: equation (11).

    Args:
      episodes: (support, query); every leaf has the tasks on axis 0.
      valid: False for tasks that only fill the shape: finite, and of no weight.
      weights: of the query loss after each of the inner steps (`step_weights`); None: after the
        last alone.

    Returns:
      The loss and the mean of each of its parts; NaN if no task is valid.
    """

    def one(support, query):
        adapted, _ = adapt(params, support, loss=loss, inner=inner, every=weights is not None)
        if weights is None:
            return loss(adapted, query)
        value, parts = jax.vmap(lambda stop: loss(stop, query))(adapted)
        return weights @ value, jax.tree.map(lambda x: x[-1], parts)

    episodes = jax.tree.map(jnp.asarray, episodes)  # custom gradients take no NumPy constants
    return jax.tree.map(lambda x: _task_mean(x, valid), jax.vmap(one)(*episodes))
