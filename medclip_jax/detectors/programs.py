"""Compiled programs of scoring functions, which go when the scoring function goes."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax


def jit_for_detector(fixed: int) -> Callable[[Callable], Callable]:
    """As jax.jit whose first `fixed` arguments, a detector or its `apply` first, are static.

    A scoring function holds a whole CLIP and is another one in every run. jax.jit keeps every
    static argument, with what was compiled for it, until a process that makes many runs has no
    memory, or no mappings of it, left. Here the scoring function itself holds its programs.
    """

    def wrap(function: Callable) -> Callable:
        @wraps(function)
        def call(*args: Any) -> Any:
            static = args[:fixed]
            apply = getattr(static[0], "apply", static[0])
            programs = vars(apply).setdefault("programs", {})
            key = function, *static
            if key not in programs:
                programs[key] = jax.jit(partial(function, *static))
            return programs[key](*args[fixed:])

        return call

    return wrap
