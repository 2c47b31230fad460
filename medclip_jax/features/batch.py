"""A batch of tokens with their synthetic truth, as losses take it.

Shape letters: n rows, h w pixels of the encoder's frame, p patches.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Num

from medclip_jax.clip.outputs import Features


class Views(NamedTuple):
    """Two augmentations of the healthy image of each row."""

    one: Features
    two: Features
    image: Int[Array, " n"]  # number of the image in its pool


class Batch(NamedTuple):
    """Tokens of a batch of images with their (synthetic) truth, in the encoder's frame."""

    features: Features
    mask: Num[Array, "n h w"]  # [0, 1], 1 = anomalous; bytes as the training pool hands them over
    label: Int[Array, " n"]  # 0 healthy, 1 anomalous
    valid: Bool[Array, " n"]  # False for rows that only fill the shape
    views: Views | None = None  # for SimCLR
    teacher: Float[Array, "n p"] | None = None  # a teacher's patch logits, for distillation
    # dataset of each row, or [] of all rows; None where there is one, 0 is the target
    source: Int[Array, "*n"] | None = None
