"""Near-duplicates: images whose normalised 24 x 24 thumbnails correlate by more than .97.

A group is closed under being a twin: the twin of a twin is in it. Files of equal bytes are always
in one group, images without any contrast only then. Source: PROTOCOL, "clean" split.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medclip_jax import files
from medclip_jax.data import records as data_records
from medclip_jax.data.records import Record

SIDE = 24  # pixels
THRESHOLD = 0.97
CELLS = 2**24  # correlations held at a time: 64 MB


def of(records: Sequence[Record], cache: Path | None = None) -> Int[np.ndarray, " n"]:
    """Group of each image, numbered from 0 in order of first appearance.

    Each different file is decoded once; with a `cache` folder the groups are kept there under the
    hash of all file hashes.

    Raises:
      DataError: an image cannot be read.
      WorkdirError: `cache` cannot be written.
    """
    hashes = [record.sha256 for record in records]
    digest = hashlib.sha256("\n".join([f"{SIDE} {THRESHOLD}", *hashes]).encode()).hexdigest()[:24]
    kept = cache / f"twins-{digest}.bin" if cache else None
    if kept and kept.is_file() and kept.stat().st_size == 8 * len(records):
        return np.fromfile(kept, np.int64)
    _, first, same = np.unique(hashes, return_index=True, return_inverse=True)
    different = [records[i] for i in first]
    images = (pixels for _, pixels in data_records.read_all(different, SIDE))
    found = first_seen(group(thumbnails(images, len(different)))[same])
    if kept:
        files.write_bytes(kept, found.astype(np.int64).tobytes())
    return found


def thumbnails(images, count: int) -> Float[np.ndarray, "n p"]:
    """Images [24, 24] as rows of mean 0 and norm 1; a constant image is a row of zeros."""
    rows = np.zeros((count, SIDE * SIDE), np.float32)
    for row, pixels in zip(rows, images, strict=True):
        row[:] = normalised(pixels)
    return rows


def normalised(pixels: Float[np.ndarray, "s s"]) -> Float[np.ndarray, " p"]:
    """Mean 0 and norm 1, so that a product of two is their correlation; zeros if constant."""
    flat = pixels.astype(np.float64).ravel()
    flat = flat - flat.mean()
    norm = np.linalg.norm(flat)
    return (flat / norm if norm > 1e-6 else np.zeros_like(flat)).astype(np.float32)


def group(
    rows: Float[np.ndarray, "n p"], threshold: float = THRESHOLD, cells: int = CELLS
) -> Int[np.ndarray, " n"]:
    """Groups of rows that correlate by more than `threshold`; memory is bounded by `cells`."""
    found = np.arange(len(rows))
    block = max(1, cells // max(1, len(rows)))
    for start in range(0, len(rows), block):
        near = rows[start : start + block] @ rows[start:].T > threshold
        one, other = np.nonzero(near)
        found = joined(found, one + start, other + start)
    return first_seen(found)


def merge(*partitions: Sequence | np.ndarray) -> Int[np.ndarray, " n"]:
    """The finest partition that keeps together what any of the given ones keeps together."""
    found = np.arange(len(partitions[0]))
    for labels in partitions:
        _, first, same = np.unique(np.asarray(labels), return_index=True, return_inverse=True)
        found = joined(found, np.arange(len(found)), first[same])
    return first_seen(found)


def joined(
    found: Int[np.ndarray, " n"], one: Int[np.ndarray, " m"], other: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " n"]:
    """Groups after `one[i]` and `other[i]` are put together, for every i."""
    edges = coo_array((np.ones(len(one), bool), (found[one], found[other])), (len(found),) * 2)
    return connected_components(edges, directed=False)[1].astype(np.int64)[found]


def first_seen(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The same partition, numbered from 0 in order of first appearance."""
    _, first, same = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[same].astype(np.int64)
