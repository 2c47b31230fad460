"""What the rooms of the house hand to one another.

Shape letters, used in every annotation:
  e episodes/tasks   n images   h w pixels (tower frame unless said otherwise)   f frames
  p patches (g x g grid, row-major)   l levels (tapped blocks)   d width
  c prompts   t text positions

Pytrees are NamedTuples: jaxtyping's import hook would break `flax.struct.dataclass` at unflatten.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Num

from medclip_jax.clip import outputs


class Views(NamedTuple):
    """Two augmentations of the healthy image of each row."""

    one: outputs.Features
    two: outputs.Features
    image: Int[Array, " n"]  # number of the image in its pool


class Batch(NamedTuple):
    """Tokens of a batch of images with their (synthetic) truth, in the tower frame."""

    features: outputs.Features
    mask: Num[Array, "n h w"]  # [0, 1], 1 = anomalous; bytes as the feature cache hands them over
    label: Int[Array, " n"]  # 0 healthy, 1 anomalous
    valid: Bool[Array, " n"]  # False for rows that only fill the shape
    views: Views | None = None  # for SimCLR
    teacher: Float[Array, "n p"] | None = None  # a teacher's patch logits, for distillation
    # data set of each row, or [] of all rows; None where there is one, 0 is the target
    source: Int[Array, "*n"] | None = None
