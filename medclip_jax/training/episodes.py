"""Episodes of meta-learning: which images, as they are or altered, ask and which answer.

A task (METHOD 4.6) is a synthesis kind, a data set, K healthy support images and a query. Support
and query are rows of features.Pool, (image, variant) with variant -1 for the image as it is. Half
of the rows are clean and half show the task's kind; all are clean in an Identity task.

Where the data set holds more than K images, the query is on other images than the support. Where
it does not (the target, of which K is all there is), clean images and altered ones are dealt out
to both sides, so that support and query never share a row; a single image can be clean on the
support side only, its query is then altered, and it takes no part in Identity tasks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from medclip_jax.errors import ConfigError
from medclip_jax.synthesis import generate

IDENTITY = generate.KINDS.index("identity")
LEAST = 2  # variants of each kind per image: one for the support, one for the query
STREAM = 46  # keeps these draws apart from others of the same seed


class Rows(NamedTuple):
    """Rows of the pool, per task."""

    image: Int[np.ndarray, "e n"]
    variant: Int[np.ndarray, "e n"]  # -1: the image as it is; -2 - c: its augmented copy c


class Tasks(NamedTuple):
    """The tasks of one step."""

    support: Rows
    query: Rows
    kind: Int[np.ndarray, " e"]  # index into synthesis.KINDS
    source: Int[np.ndarray, " e"]  # which of the data sets


def sample(
    step: int,
    seed: int,
    members: Sequence[Int[np.ndarray, " _"]],
    kinds: Int[np.ndarray, "i v"],
    *,
    tasks: int,
    k: int,
    shots: int,
    query: int,
    copies: int = 0,
) -> Tasks:
    """Draw the tasks of a step: a function of the arguments alone, whatever the devices.

    Args:
      members: of each data set, the images (indices into the pool) that may be used.
      kinds: of each image of the pool, the kind of each variant (`check` them once before).
      tasks: how many; kind (probability 1/4 each) and data set are drawn for each.
      k: largest number of support images of a task.
      shots: rows of the support. query: rows of the query.
      copies: augmented copies per image; a clean row is one of them or the image, at random.
    """
    drawn = []
    for task in range(tasks):
        rng = np.random.default_rng([seed, step, task, STREAM])
        kind_at, source = rng.random(), int(rng.integers(len(members)))
        own = rng.permutation(members[source])
        known = [i for i in range(len(generate.KINDS)) if i != IDENTITY or len(own) > 1]
        kind = known[int(kind_at * len(known))]
        sides = deal(rng, own, kinds, kind, k)
        counts = zip(sides, (shots, query), strict=True)
        rows = [choose(bare, changed, n) for (bare, changed), n in counts]
        if copies:
            rows = [augmented(rng, side, copies) for side in rows]
        drawn.append((*rows, kind, source))
    *sides_drawn, kinds_drawn, sources = (np.array(column) for column in zip(*drawn, strict=True))
    support, asked = (Rows(*np.moveaxis(side, 2, 0)) for side in sides_drawn)
    return Tasks(support, asked, kinds_drawn, sources)


def deal(rng, own: np.ndarray, kinds: np.ndarray, kind: int, k: int):
    """(clean rows, altered rows) of the support and of the query; the four share no row."""
    if len(own) > k:
        return [(clean(part), altered(rng, part, kinds, kind)) for part in (own[:k], own[k:])]
    rows, bare = altered(rng, own, kinds, kind), clean(own)
    half, middle = -(-len(bare) // 2), -(-len(rows) // 2)
    return (bare[:half], rows[:middle]), (bare[half:], rows[middle:])


def clean(images: np.ndarray) -> list[tuple[int, int]]:
    return [(int(i), -1) for i in images]


def altered(rng, images: np.ndarray, kinds: np.ndarray, kind: int) -> list[tuple[int, int]]:
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


def choose(bare: list, rows: list, n: int) -> list[tuple[int, int]]:
    """n rows, half of them clean where there are both; repeated where there are too few."""
    first = n if not rows else 0 if not bare else -(-n // 2)
    picked = [bare[i % len(bare)] for i in range(first)]
    return picked + [rows[i % len(rows)] for i in range(n - first)]


def augmented(rng, rows: list[tuple[int, int]], copies: int) -> list[tuple[int, int]]:
    """Clean rows replaced by the image or one of its augmented copies, variants -1 to -1 - copies.

    Which images are on which side stays as it was dealt.
    """
    return [(i, v if v >= 0 else -1 - int(rng.integers(1 + copies))) for i, v in rows]


def adaptation(own: Int[np.ndarray, " m"], kinds: Int[np.ndarray, "i v"]) -> Rows:
    """What a trained params adapts to: every image as it is and once with each kind; [1, 4 m]."""
    rows = [(i, -1) for i in own]
    rows += [(i, np.flatnonzero(kinds[i] == k)[0]) for k in range(IDENTITY) for i in own]
    image, variant = np.array(rows).T
    return Rows(image[None], variant[None])


def check(kinds: Int[np.ndarray, "i v"]) -> None:
    """Raise ConfigError unless every image has two variants of each kind."""
    counts = np.stack([(kinds == kind).sum(1) for kind in range(IDENTITY)])
    if counts.min() < LEAST:
        raise ConfigError(
            f"config.synthesis.variants is {kinds.shape[1]}, which left an image with "
            f"{counts.min()} of a kind where episodes need {LEAST}: give more, 50 is usual"
        )
