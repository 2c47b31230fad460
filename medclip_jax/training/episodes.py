"""Episodes of meta-learning: which images, healthy or altered, are a task's support and query.

A task is a kind of synthetic anomaly, a dataset, K healthy images and their variants, as rows of
the training pool. Half of the rows are clean and half show the task's kind, where a side has both;
all are clean in an identity task. With more than K images in the dataset the query is on others
than the support; with K (the target), rows are dealt out to both sides, so that they share none. A
single image is clean on the support side only, and takes no part in identity tasks.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from medclip_jax.clip.layers import Features
from medclip_jax.errors import ConfigError
from medclip_jax.features import training_pool
from medclip_jax.features.encoder import Source
from medclip_jax.features.training_pool import Batch, Episodes, TrainingPool
from medclip_jax.synthesis import generate
from medclip_jax.synthesis.generate import IDENTITY

LEAST = 2  # variants of each kind among a task's images: one for its support, one for its query
STREAM = 46  # keeps the tasks apart from other random numbers of the same seed

SUPPORTS = (2, 4, 8, 16)  # images of a support of several data sets: a task has one of these
SHOTS = 8  # healthy query images of such a task
SHARES = (0.5, 0.25, 0.25)  # of such a query's anomalies: real, synthetic, foreign

Row = tuple[int, int]  # (image, variant)


class Rows(NamedTuple):
    """Rows of the pool, per task."""

    image: Int[np.ndarray, "e n"]
    variant: Int[np.ndarray, "e n"]  # -1: the image as it is; -2 - c: its augmented copy c


class Tasks(NamedTuple):
    """The tasks of one step."""

    support: Rows
    query: Rows
    kind: Int[np.ndarray, " e"]  # index into generate.KINDS
    source: Int[np.ndarray, " e"]  # which of the datasets


class Sizes(NamedTuple):
    """How large the tasks of a step are."""

    tasks: int
    k: int  # largest number of support images of a task
    shots: int  # rows of the support, and of the query; 2 or more


# --- which rows -----------------------------------------------------------------------------


def sample(
    step: int,
    seed: int,
    members: Sequence[Int[np.ndarray, " _"]],
    kinds: Int[np.ndarray, "i v"],
    sizes: Sizes,
    copies: int = 0,
) -> Tasks:
    """Sample the tasks of a step: a function of the arguments alone, whatever the devices.

    Args:
      members: of each dataset, the images (indices into the pool) that may be used.
      kinds: of each image of the pool, the kind of each variant (`check` them once before).
      sizes: kind (each as likely, identity too) and dataset are sampled for each task.
      copies: augmented copies per image; a clean row is one of them or the image, at random.
    """
    tasks = []
    for task in range(sizes.tasks):
        rng = np.random.default_rng([seed, step, task, STREAM])
        kind_share, source = rng.random(), int(rng.integers(len(members)))
        own = rng.permutation(members[source])
        possible = [*altering(kinds).tolist(), IDENTITY][: None if len(own) > 1 else -1]
        kind = possible[int(kind_share * len(possible))]
        sides = _deal(rng, own, kinds, kind, sizes.k)
        rows = [_choose(clean, altered, sizes.shots) for clean, altered in sides]
        if copies:
            # which images are on which side stays as it was dealt
            rows = [
                [(i, v if v >= 0 else -1 - int(rng.integers(1 + copies))) for i, v in side]
                for side in rows
            ]
        tasks.append((*rows, kind, source))
    *sides, task_kinds, sources = (np.array(column) for column in zip(*tasks, strict=True))
    support, query = (Rows(*np.moveaxis(side, 2, 0)) for side in sides)
    return Tasks(support, query, task_kinds, sources)


def altering(kinds: Int[np.ndarray, "*s"]) -> Int[np.ndarray, " _"]:
    """The kinds that are there and alter an image."""
    return np.setdiff1d(kinds, IDENTITY)


def adaptation(own: Int[np.ndarray, " m"], kinds: Int[np.ndarray, "i v"]) -> Rows:
    """What trained params adapt to: every image as it is and once with each kind that it has."""
    rows = [(i, -1) for i in own]
    for kind in altering(kinds):
        rows += [(i, v[0]) for i in own if len(v := np.flatnonzero(kinds[i] == kind))]
    image, variant = np.array(rows).T
    return Rows(image[None], variant[None])


def check(
    kinds: Int[np.ndarray, "i v"],
    members: Iterable[Int[np.ndarray, " _"]],
    preset: generate.Preset | None = None,
) -> None:
    """Raise ConfigError unless all images of every member have two variants of each kind.

    preset: whose kinds; None: those that there are.
    """
    wanted = altering(kinds) if preset is None else generate.places_of(preset)
    for own in members:
        counts = np.array([(kinds[own] == kind).sum() for kind in wanted])
        if counts.min() < LEAST:
            raise ConfigError(
                f"config.synthesis.variants is {kinds.shape[1]}: {len(own)} image(s) that learn "
                f"together have {counts.min()} of a kind of anomaly, and episodes need {LEAST}: "
                "set more, 50 is usual"
            )


def check_altered(kinds: Int[np.ndarray, "i v"]) -> None:
    """Raise ConfigError unless every image has a variant that alters it."""
    if not (kinds != IDENTITY).any(1).all():
        raise ConfigError(
            f"config.synthesis.variants is {kinds.shape[1]}, which left an image without an "
            "anomaly: set more, 12 is usual"
        )


def _deal(rng, own: np.ndarray, kinds: np.ndarray, kind: int, k: int):
    """(clean rows, altered rows) of the support and of the query; the four share no row."""

    def clean(images) -> list[Row]:
        return [(int(i), -1) for i in images]

    if len(own) > k:
        return [(clean(part), _altered(rng, part, kinds, kind)) for part in (own[:k], own[k:])]
    altered, plain = _altered(rng, own, kinds, kind), clean(own)
    half, middle = -(-len(plain) // 2), -(-len(altered) // 2)
    return (plain[:half], altered[:middle]), (plain[half:], altered[middle:])


def _altered(rng, images: np.ndarray, kinds: np.ndarray, kind: int) -> list[Row]:
    """Rows of this kind in random order, image after image: each once before any comes again."""
    per_image = [rng.permutation(np.flatnonzero(kinds[i] == kind)) for i in images]
    rounds = max((len(v) for v in per_image), default=0)
    # last image first: clean rows begin at the other end, so a short support shows every image
    return [
        (int(i), int(v[turn]))
        for turn in range(rounds)
        for i, v in zip(images[::-1], per_image[::-1], strict=True)
        if turn < len(v)
    ]


def _choose(clean: list[Row], altered: list[Row], n: int) -> list[Row]:
    """n rows, half of them clean where there are both; repeated where there are too few."""
    first = n if not altered else 0 if not clean else -(-n // 2)
    chosen = [clean[i % len(clean)] for i in range(first)]
    return chosen + [altered[i % len(altered)] for i in range(n - first)]


# --- their tokens ---------------------------------------------------------------------------


def episodes_batch(
    step: int,
    pool: TrainingPool,
    members: Sequence[Sequence[Int[np.ndarray, " _"]]],
    sizes: Sizes,
    seed: int,
    rows: Int[np.ndarray, " _"] | None = None,
    views: bool = False,
) -> Episodes:
    """The tasks of one step for every params of the stack, on the host.

    members: images of each params and dataset (training_pool.members). The rest is as in `sample`
    and `training_pool.joint_batch`.
    """
    rows = np.arange(sizes.tasks) if rows is None else rows
    tasks = [sample(step, seed, own, pool.kinds, sizes, pool.copies) for own in members]
    sides = []
    for name in ("support", "query"):
        own = [jax.tree.map(lambda x: x[rows], getattr(t, name)) for t in tasks]
        sides.append(_take(pool, own))
    valid: Any = np.ones((len(rows), len(members)), bool)
    support, query = sides
    return Episodes(support, query, valid, _views(step, pool, members, sizes, seed, rows, views))


def _views(
    step, pool, members, sizes: Sizes, seed, rows, views: bool
) -> training_pool.Views | None:
    """Two views of about `shots` different images of the params' own, dealt out to the tasks."""
    if not views:
        return None
    each = -(-sizes.shots // sizes.tasks)
    shape = sizes.tasks, len(members), each
    image = np.empty(shape, int)
    for i, own in enumerate(members):
        rng = np.random.default_rng([seed, step, STREAM, training_pool.VIEWS_STREAM])
        image[:, i] = np.resize(rng.permutation(np.concatenate(own)), (sizes.tasks, each))
    pair = training_pool.sample_views(seed, step, shape, pool.copies)
    return training_pool.take_views(pool, image[rows], [view[rows] for view in pair])


def adaptation_batches(
    pool: TrainingPool, members: Sequence[Int[np.ndarray, " _"]]
) -> Iterator[Batch]:
    """What each params adapts to, [row, ...]; rows that fill a shorter one are invalid.

    pool: of the target's supports alone. members: of each params.
    """
    rows = [adaptation(own, pool.kinds) for own in members]
    most = max(r.image.size for r in rows)
    for own in rows:
        image, variant = (np.resize(x, most) for x in own)
        valid: Any = np.arange(most) < own.image.size
        yield training_pool.take(pool, image, variant)._replace(valid=valid)


def _take(pool: TrainingPool, rows: Sequence[Rows]) -> Batch:
    """Rows [task, row] of each params -> tokens [task, 1 + folds, row, ...]."""
    image, variant = (np.stack(x, axis=1) for x in zip(*rows, strict=True))
    batch = training_pool.take(pool, image, variant)
    # a task has one dataset
    return batch if batch.source is None else batch._replace(source=batch.source[..., 0])


# --- of several data sets, for training.meta --------------------------------------------------


def rows_of(features: Features, *place) -> Features:
    """The rows at a place of every array."""
    return jax.tree.map(lambda x: x[place], features)


def sides(rng, sources: Sequence[Source], number: int, shots: int, shares=SHARES):
    """What a task of source `number` is made of: (images, variants), (images, anomalies).

    shots: support images. shares: of the query's anomalies, as SHARES.
    """
    source = sources[number]
    order = rng.permutation(len(source.healthy.pooled))
    support, query = order[:shots], order[shots : shots + SHOTS]
    known = altering(source.kinds)
    kinds = rng.permutation(known)[: rng.integers(1, len(known) + 1)]  # of this task
    variants = [_variant(rng, source.kinds[i], kinds) for i in support]
    chances = np.array(shares) * [len(source.abnormal.pooled) > 0, 1, len(sources) > 1]
    anomalies = []
    for image, kind in zip(query, rng.choice(3, SHOTS, p=chances / chances.sum()), strict=True):
        if kind == 0:
            place = int(rng.integers(len(source.abnormal.pooled)))
            anomalies.append(rows_of(source.abnormal, place))
        elif kind == 1:
            own = int(image), _variant(rng, source.kinds[image], known)
            anomalies.append(rows_of(source.altered, *own))
        else:
            other = sources[(number + int(rng.integers(1, len(sources)))) % len(sources)]
            anomalies.append(rows_of(other.healthy, int(rng.integers(len(other.healthy.pooled)))))
    return (support, variants), (query, anomalies)


def _variant(rng, kinds: np.ndarray, wanted) -> int:
    """A variant of one of the wanted kinds, or of any that alters if the image has none."""
    fitting = np.flatnonzero(np.isin(kinds, np.array(list(wanted))))
    return int(rng.choice(fitting if len(fitting) else np.flatnonzero(kinds != IDENTITY)))


def support_rows(source: Source, images: np.ndarray, variants: list[int]):
    """(tokens, own support, label) of the support's images and their altered ones."""
    clean, changed = rows_of(source.healthy, images), rows_of(source.altered, images, variants)
    both = jax.tree.map(lambda *x: np.concatenate(x), clean, changed)
    place = np.arange(len(images))
    return both, np.tile(place, 2), np.repeat(np.arange(2, dtype=np.float32), len(images))


def query_rows(source: Source, images: np.ndarray, anomalies: list[Features]):
    """(tokens, own support, label) of the query's healthy images and its anomalies."""
    changed = jax.tree.map(lambda *x: np.stack(x), *anomalies)
    both = jax.tree.map(lambda *x: np.concatenate(x), rows_of(source.healthy, images), changed)
    return both, np.full(2 * SHOTS, -1), np.repeat(np.arange(2, dtype=np.float32), SHOTS)
