"""What the rooms of the house hand to one another.

Shape letters, used in every annotation:
  e episodes/tasks   n images   h w pixels (tower frame unless said otherwise)   f frames
  p patches (g x g grid, row-major)   l levels (tapped blocks)   d width
  c prompts   t text positions

Pytrees are NamedTuples: jaxtyping's import hook would break `flax.struct.dataclass` at unflatten.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray


class Image(NamedTuple):
    """One image file as it was read, without anything that names a patient."""

    pixels: Float[np.ndarray, "f h w"]  # [0, 1], luminance
    spacing: tuple[float, float] | None  # mm per pixel (row, column), None if unknown
    meta: dict[str, str]  # format and modality only, never identity


class Record(NamedTuple):
    """One image of a data set, named but not yet read."""

    id: str  # path below the data root, '/' separated; unique
    label: int  # 0 healthy, 1 abnormal
    part: str  # the data set's own part: "train", "test", or "" where it has none
    path: Path  # absolute
    masks: tuple[Path, ...]  # their union is the lesion mask; empty if there is none
    sha256: str  # of the image file's bytes
    patient: str = ""  # whose image, where the data set says so; a code, never a name


class Split(NamedTuple):
    """Who is support and who is test. Supports are ordered: the first 4 of 8 are the 4 of K = 4."""

    support: tuple[Record, ...]
    test: tuple[Record, ...]


class Features(NamedTuple):
    """What every frozen image tower returns (ViT or ResNet)."""

    pooled: Float[Array, "n d"]  # joint space, not normalised
    levels: tuple[
        Float[Array, "n p _"], ...
    ]  # patch tokens of each tapped level, class token dropped
    # what each tapped block reads, class token first; only where refinement is on
    inputs: tuple[Float[Array, "n s d"], ...] = ()


class Views(NamedTuple):
    """Two augmentations of the healthy image of each row."""

    one: Features
    two: Features
    image: Int[Array, " n"]  # number of the image in its pool


class Batch(NamedTuple):
    """Tokens of a batch of images with their (synthetic) truth, in the tower frame."""

    features: Features
    mask: Num[Array, "n h w"]  # [0, 1], 1 = anomalous; bytes as the bank hands them over
    label: Int[Array, " n"]  # 0 healthy, 1 anomalous
    valid: Bool[Array, " n"]  # False for rows that only fill the shape
    views: Views | None = None  # for SimCLR
    teacher: Float[Array, "n p"] | None = None  # a teacher's patch logits, for distillation
    # data set of each row, or [] of all rows; None where there is one, 0 is the target
    source: Int[Array, "*n"] | None = None


class Prompts(NamedTuple):
    """Tokenised prompts with slots for learnable context."""

    ids: Int[np.ndarray, "c t"]  # token ids; what stands under a slot is ignored
    slots: Int[np.ndarray, "c t"]  # context vector that stands here, -1 for a token
    eos: Int[np.ndarray, " c"]  # position of the end-of-text token
    label: Int[np.ndarray, " c"]  # 0 healthy, 1 abnormal
    text: tuple[str, ...]  # the phrases
    start: Int[np.ndarray, " k"] | None = None  # token each context vector starts from, -1 random


class TrainState(NamedTuple):
    """All that a resumed run needs: everything random is a function of (key, step)."""

    step: Int[Array, ""]
    theta: Any
    opt: Any
    key: PRNGKeyArray | jax.Array


class Predictions(NamedTuple):
    """A scored test set, on the host."""

    id: tuple[str, ...]
    label: Int[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]  # [0, 1], 0.5 is the calibrated threshold
    p_value: Float[np.ndarray, " n"]
    uncertainty: Float[np.ndarray, " n"]  # sd of the score over MC-dropout passes
    # tower frame, [0, 1], 0.5 is the calibrated pixel threshold; on disk: a spool.Rows, or an array
    maps: Float[np.ndarray, "n h w"] | Any
