"""Near-duplicates: images whose normalised 24 x 24 thumbnails correlate by more than .97.

A group is transitive: what resembles a member is a member. Files of equal bytes are always in one
group, images without any contrast only then.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medclip_jax import files, stored
from medclip_jax.data.layouts import Record
from medclip_jax.io.read import read_all

SIDE = 24  # pixels
THRESHOLD = 0.97
CELLS = 2**24  # correlations in memory at a time: 64 MB


def groups(records: Sequence[Record], cache: Path | None = None) -> Int[np.ndarray, " n"]:
    """Group of each image, numbered from 0 in order of first appearance.

    Each different file is decoded once; with a `cache` folder the groups are stored there under
    the hash of all file hashes.
    """
    hashes = [record.sha256 for record in records]
    windows = sorted({record.window for record in records} - {""})
    named = "\n".join([f"{SIDE} {THRESHOLD}", *windows, *hashes])
    digest = hashlib.sha256(named.encode()).hexdigest()[:24]
    path = cache / f"near-duplicates-{digest}.json" if cache else None
    if path and (groups := _stored(path, len(records))) is not None:
        return groups
    _, first, back = np.unique(hashes, return_index=True, return_inverse=True)
    different = [records[i] for i in first]
    rows = np.zeros((len(different), SIDE * SIDE), np.float32)
    for row, (_, pixels) in zip(rows, read_all(different, SIDE), strict=True):
        row[:] = normalised(pixels)
    labels = first_seen(correlated(rows)[back])
    if path:
        files.write_json(path, stored.sealed({"groups": labels.tolist()}))
    return labels


def distinct(
    records: Sequence[Record], known: Sequence[Record], cache: Path | None = None
) -> list[Record]:
    """The records that are near-duplicates of nothing known and of no record before them."""
    order = groups([*known, *records], cache).tolist()
    first = {group: i for i, group in reversed([*enumerate(order)])}
    return [r for i, r in enumerate(records, len(known)) if first[order[i]] == i]


def _stored(path: Path, n: int) -> Int[np.ndarray, " n"] | None:
    """The groups of n images in a file; None if there is none, or it is damaged."""
    try:
        values = stored.read_json(path)
        stored.check(values, {"groups": [stored.COUNT], "digest": stored.HEX})
        stored.check_seal(values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logging.warning("%s is damaged (%s): the images are compared again", path, error)
        return None
    groups = np.array(values["groups"], np.int64)
    return groups if len(groups) == n else None


def normalised(pixels: Float[np.ndarray, "s s"]) -> Float[np.ndarray, " p"]:
    """Mean 0 and norm 1, so that a product of two is their correlation; zeros if constant."""
    flat = pixels.astype(np.float64).ravel()
    flat = flat - flat.mean()
    norm = np.linalg.norm(flat)
    return (flat / norm if norm > 1e-6 else np.zeros_like(flat)).astype(np.float32)


def correlated(rows: Float[np.ndarray, "n p"], cells: int = CELLS) -> Int[np.ndarray, " n"]:
    """Groups of rows that correlate by more than THRESHOLD; memory is bounded by `cells`."""
    labels = np.arange(len(rows))
    block = max(1, cells // max(1, len(rows)))
    for start in range(0, len(rows), block):
        one, other = np.nonzero(rows[start : start + block] @ rows[start:].T > THRESHOLD)
        labels = join(labels, one + start, other + start)
    return first_seen(labels)


def merge(*partitions: Sequence | np.ndarray) -> Int[np.ndarray, " n"]:
    """The finest partition that joins whatever any of the partitions joins."""
    labels = np.arange(len(partitions[0]))
    for partition in partitions:
        _, first, back = np.unique(np.asarray(partition), return_index=True, return_inverse=True)
        labels = join(labels, np.arange(len(labels)), first[back])
    return first_seen(labels)


def join(
    labels: Int[np.ndarray, " n"], one: Int[np.ndarray, " m"], other: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " n"]:
    """Groups after those of `one[i]` and `other[i]` are joined, for every i."""
    edges = coo_array((np.ones(len(one), bool), (labels[one], labels[other])), (len(labels),) * 2)
    return connected_components(edges, directed=False)[1].astype(np.int64)[labels]


def first_seen(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The same partition, numbered from 0 in order of first appearance."""
    _, first, back = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[back].astype(np.int64)
