"""The training pool: healthy images and their synthetic variants as tokens, read as batches.

Shape letters: n rows, h w pixels of the encoder's frame, p patches, e tasks, m params of the stack.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from medclip_jax.clip.layers import Features

Tensors = Callable[[str], Any]  # name -> lazily sliced tensor of a cache file


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


class Episodes(NamedTuple):
    """Rows of several tasks, as a step takes them: leaves are [task, 1 + folds, row, ...]."""

    support: Batch
    query: Batch
    valid: Bool[Array, "e m"]


class TrainingPool(NamedTuple):
    """Images and their variants, opened but not read: training takes rows as it needs them."""

    clean: tuple[Tensors, ...]  # per image
    anomalous: tuple[Tensors, ...]
    levels: int
    size: int  # pixels per side of the masks
    variants: int  # anomalous ones per image
    kinds: Int[np.ndarray, "k v"]  # of each variant, index into generate.KINDS
    copies: int = 0  # augmented copies per image, clean
    # a teacher's patch logits per image, [1 + variants + copies, p]; () where there is none
    teacher: tuple[Float[np.ndarray, "_ p"], ...] = ()
    inputs: bool = False  # tokens hold the tapped layers' inputs
    source: Int[np.ndarray, " k"] | None = None  # dataset of each image; None: all of one


def join(pools: Sequence[TrainingPool]) -> TrainingPool:
    """One pool of several with the same encoder and number of variants; images in order."""
    sizes = [len(p.clean) for p in pools]
    return pools[0]._replace(
        clean=sum((p.clean for p in pools), ()),
        anomalous=sum((p.anomalous for p in pools), ()),
        kinds=np.concatenate([p.kinds for p in pools]),
        teacher=sum((p.teacher for p in pools), ()),
        source=np.repeat(np.arange(len(pools)), sizes) if len(pools) > 1 else None,
    )


def take(
    pool: TrainingPool,
    image: Int[np.ndarray, "*n"],
    variant: Int[np.ndarray, "*n"],
    views: Sequence[np.ndarray] = (),
) -> Batch:
    """Rows of the pool as a batch on the host, in the shape of `image`.

    Args:
      pool: to read.
      image: number of each row's image.
      variant: of the image; -1 is the image itself, -2 - c its augmented copy c, both clean.
      views: variants of two views of each row's image, for SimCLR; or none.
    """
    batch = _rows(pool, image.ravel(), variant.ravel())
    if len(views):
        one, two = (_rows(pool, image.ravel(), view.ravel()).features for view in views)
        number: Any = image.ravel()
        batch = batch._replace(views=Views(one, two, number))
    return jax.tree.map(lambda x: x.reshape(*image.shape, *x.shape[1:]), batch)


def _rows(pool: TrainingPool, image: np.ndarray, variant: np.ndarray) -> Batch:

    def row(i, v, name: str) -> np.ndarray:
        if v == -1:
            return pool.clean[i](name)[0]
        return pool.anomalous[i](name)[int(v) if v >= 0 else pool.variants - int(v) - 2]

    # main and fold params often meet the same row in one step: each is read once
    distinct, place = np.unique(np.stack([image, variant], 1), axis=0, return_inverse=True)
    place = place.ravel()

    def rows(name: str) -> Any:  # of the host, until a step takes it
        return np.stack([row(i, v, name) for i, v in distinct])[place]

    teacher: Any = None
    if pool.teacher:
        number = np.where(variant >= -1, variant + 1, pool.variants - variant - 1)
        teacher = np.stack([pool.teacher[i][j] for i, j in zip(image, number, strict=True)])
    bits = pool.size**2
    empty = np.zeros(-(-bits // 8), np.uint8)
    packed = np.stack([row(i, v, "mask") if v >= 0 else empty for i, v in distinct])
    mask: Any = np.unpackbits(packed, axis=1, count=bits)
    label: Any = (variant >= 0).astype(np.int32)
    valid: Any = np.ones(len(image), bool)
    return Batch(
        Features(
            rows("pooled"),
            tuple(rows(f"level{i}") for i in range(pool.levels)),
            tuple(rows(f"input{i}") for i in range(pool.levels if pool.inputs else 0)),
        ),
        mask.reshape(-1, pool.size, pool.size)[place],
        label,
        valid,
        teacher=teacher,
        source=None if pool.source is None else pool.source[image],
    )
