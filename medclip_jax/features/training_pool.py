"""The training pool: healthy images and their synthetic variants as tokens, read as batches.

Folds split the supports; params are stacked, [1 + folds, ...]: the main params learn from all
supports, the fold params 1 + f from those outside fold f. A row is (image, variant), see `take`.

Shape letters: n rows, h w pixels of the encoder's frame, p patches, e tasks, m params of the stack.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from medclip_jax.clip.layers import Features

Tensors = Callable[[str], Any]  # name -> lazily sliced tensor of a cache file
CLEAN = 0.25  # probability that a row of the joint learner is a healthy image
VIEWS_STREAM = 53  # keeps the views apart from other random numbers of the same seed
Indices = Int[np.ndarray, " _"]


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
    views: Views | None = None  # of a few clean images beside each task, for SimCLR


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
    digest: str = ""  # of the images


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
      variant: of the image; -1 is the image itself, -2 - c its augmented copy c, both clean.
      views: variants of two views of each row's image, for SimCLR; or none.
    """
    batch = _rows(pool, image.ravel(), variant.ravel())
    batch = jax.tree.map(lambda x: x.reshape(*image.shape, *x.shape[1:]), batch)
    return batch._replace(views=take_views(pool, image, views)) if len(views) else batch


def take_views(
    pool: TrainingPool, image: Int[np.ndarray, "*n"], views: Sequence[np.ndarray]
) -> Views:
    """Two views of each image, on the host, in the shape of `image`."""
    plain = pool._replace(teacher=(), source=None)
    one, two = (take(plain, image, view).features for view in views)
    number: Any = image
    return Views(one, two, number)


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


def folds(k: int, parts: int) -> list[Indices]:
    """k supports in up to `parts` disjoint folds of nearly equal size; none if k is 1."""
    parts = min(parts, k)
    return [] if parts < 2 else [np.arange(k)[i::parts] for i in range(parts)]


def supports(k: int, folds: Sequence[Indices]) -> list[Indices]:
    """The supports that each params of the stack learns from."""
    return [np.arange(k), *(np.setdiff1d(np.arange(k), fold) for fold in folds)]


def members(
    k: int, folds: Sequence[Indices], auxiliary: Sequence[int], on_target: bool = True
) -> list[list[Indices]]:
    """The images of the pool that each params may learn from, per dataset: [1 + folds][dataset].

    Args:
      k: supports, which the pool holds first.
      folds: of them.
      auxiliary: number of images of each auxiliary dataset, which follow in the pool.
      on_target: False to leave out the supports.
    """
    ends = k + np.cumsum([0, *auxiliary])
    others = [np.arange(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return [[own, *others] if on_target else others for own in supports(k, folds)]


def joint_batch(
    step: int,
    pool: TrainingPool,
    members: Sequence[Indices],
    size: int,
    seed: int,
    rows: Indices | None = None,
    views: bool = False,
) -> Batch:
    """The rows of one step of the joint learner: a function of the arguments alone.

    Every params walks through its own images in random order, epoch after epoch; in an epoch an
    image is itself with probability 1/4, else its next anomalous variant.

    Args:
      pool: to read, as a batch on the host with leaves [row, 1 + folds, ...].
      members: images of each params.
      rows: which of them are read (this process's share), None for all.
      views: add two augmented views of every row's image, for SimCLR.
    """
    each = [joint_rows(step, own, size, seed, pool.variants, pool.copies) for own in members]
    image, variant = (np.stack(x, axis=1) for x in zip(*each, strict=True))
    pair = sample_views(seed, step, image.shape, pool.copies) if views else ()
    image, variant, *own = (x if rows is None else x[rows] for x in (image, variant, *pair))
    return take(pool, image, variant, own)


def joint_rows(step: int, own: Indices, size: int, seed: int, variants: int, copies: int = 0):
    """(image, variant) of each row; healthy rows take the image and its copies in turn."""
    image, variant = [], []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(own))
        rng = np.random.default_rng([seed, epoch])
        image.append(own[rng.permutation(len(own))[place]])
        clean = rng.random(len(own))[place] < CLEAN or not variants
        variant.append(-1 - epoch % (1 + copies) if clean else epoch % variants)
    return np.array(image), np.array(variant)


def sample_views(seed: int, step: int, shape: tuple[int, ...], copies: int) -> tuple:
    """Two different views of each row's image, as variants: -1 the image, -2 its copy 0, ..."""
    if copies < 1:
        raise ValueError("two views of an image need at least one augmented copy")
    rng = np.random.default_rng([seed, step, VIEWS_STREAM])
    first = rng.integers(1 + copies, size=shape)
    second = (first + 1 + rng.integers(copies, size=shape)) % (1 + copies)
    return -1 - first, -1 - second
