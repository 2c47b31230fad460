"""What the rooms of the house hand to one another.

Shape letters, used in every annotation:
  e episodes/tasks   n images   h w pixels (tower frame unless said otherwise)   f frames
  p patches (g x g grid, row-major)   l levels (tapped blocks)   d width
  c prompts   t text positions

Pytrees are NamedTuples: jaxtyping's import hook would break `flax.struct.dataclass` at unflatten.
"""

from typing import NamedTuple

from jaxtyping import Array, Float


class Features(NamedTuple):
    """What every frozen image tower returns (ViT or ResNet)."""

    pooled: Float[Array, "n d"]  # joint space, not normalised
    levels: tuple[
        Float[Array, "n p _"], ...
    ]  # patch tokens of each tapped level, class token dropped
    # what each tapped block reads, class token first; only where refinement is on
    inputs: tuple[Float[Array, "n s d"], ...] = ()
