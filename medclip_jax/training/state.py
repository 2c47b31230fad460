"""What the rooms of the house hand to one another.

Shape letters, used in every annotation:
  e episodes/tasks   n images   h w pixels (tower frame unless said otherwise)   f frames
  p patches (g x g grid, row-major)   l levels (tapped blocks)   d width
  c prompts   t text positions

Pytrees are NamedTuples: jaxtyping's import hook would break `flax.struct.dataclass` at unflatten.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int, PRNGKeyArray


class TrainState(NamedTuple):
    """All that a resumed run needs: everything random is a function of (key, step)."""

    step: Int[Array, ""]
    params: Any
    opt: Any
    key: PRNGKeyArray | jax.Array
