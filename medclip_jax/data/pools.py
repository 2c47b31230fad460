"""Who may be support and who is test: the two splits of PROTOCOL. Both keep patients apart."""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from medclip_jax.data import twins
from medclip_jax.structs import Record


def peer(records: Sequence[Record], seed: int, pool_size: int) -> tuple[list[Record], list[Record]]:
    """Pool in the order of the draw, and test: the split of published tables.

    Without parts, `pool_size` healthy images are drawn anew for each seed and the rest is test.
    With parts, the pool is all of the healthy train part. Images of a patient who stands on both
    sides are left out of the side that was not fixed first: of test without parts, else of the
    pool.
    """
    own_parts = any(r.part for r in records)
    candidates = [r for r in records if r.label == 0 and (r.part == "train" or not own_parts)]
    if own_parts:
        test = [r for r in records if r.part == "test"]
        known = patients(test)
        candidates = [r for r in candidates if r.patient not in known]
    order = np.random.default_rng(seed).permutation(len(candidates))
    pool = [candidates[i] for i in (order if own_parts else order[:pool_size])]
    if not own_parts:
        taken, known = {r.id for r in pool}, patients(pool)
        test = [r for r in records if r.id not in taken and r.patient not in known]
    return pool, test


def clean(
    records: Sequence[Record], seed: int, groups: Int[np.ndarray, " n"]
) -> tuple[list[Record], list[Record]]:
    """Pool in the order of the draw, and test, with no near-duplicate or patient in both.

    Left out: near-duplicates that contradict one another in label, all but the first of files of
    equal bytes, and what is said below. Then near-duplicates and images of one patient are put
    together. Without parts, half of the wholly healthy such groups, drawn anew for each seed, give
    one image each to the pool (their others are left out); everything else is test. With parts,
    test is the test part, and every healthy group of the train part without a test image gives one
    image to the pool.

    Args:
      groups: near-duplicates, see twins.of.
    """
    labels = defaultdict(set)
    for record, group in zip(records, groups, strict=True):
        labels[group].add(record.label)
    agreed = [i for i, group in enumerate(groups) if len(labels[group]) == 1]
    first = {records[i].sha256: i for i in reversed(agreed)}
    kept = [i for i in agreed if first[records[i].sha256] == i]
    named = [records[i].patient or f"\0{i}" for i in kept]  # without a name, everyone is their own
    units: dict[int, list[Record]] = defaultdict(list)
    for i, unit in zip(kept, twins.merge(groups[kept], named).tolist(), strict=True):
        units[unit].append(records[i])
    pool, test = _with_parts(units) if any(r.part for r in records) else _halves(units, seed)
    order = np.random.default_rng(seed).permutation(len(pool))
    logging.info(
        "clean split: of %d images, %d contradict a near-duplicate and %d are byte for byte "
        "another's; pool %d, test %d",
        *(len(records), len(records) - len(agreed), len(agreed) - len(kept), len(pool), len(test)),
    )
    place = {r.id: i for i, r in enumerate(records)}
    return [pool[i] for i in order], sorted(test, key=lambda r: place[r.id])


def patients(records: Sequence[Record]) -> set[str]:
    """Names of patients, of those records that have one."""
    return {r.patient for r in records} - {""}


def shared_patients(pool: Sequence[Record], test: Sequence[Record]) -> Counter:
    """Patients on both sides, with how many images of each stand in test."""
    known = patients(pool)
    return Counter(r.patient for r in test if r.patient in known)


def _halves(units: dict[int, list[Record]], seed: int) -> tuple[list[Record], list[Record]]:
    healthy = [unit for unit, held in units.items() if all(r.label == 0 for r in held)]
    order = np.random.default_rng(seed).permutation(len(healthy))
    drawn = {healthy[i] for i in order[: len(healthy) // 2]}
    pool = [units[unit][0] for unit in healthy if unit in drawn]
    return pool, [r for unit, held in units.items() if unit not in drawn for r in held]


def _with_parts(units: dict[int, list[Record]]) -> tuple[list[Record], list[Record]]:
    test = [r for held in units.values() for r in held if r.part == "test"]
    apart = [held for held in units.values() if all(r.part != "test" for r in held)]
    healthy = ([r for r in held if r.label == 0 and r.part == "train"] for held in apart)
    return [held[0] for held in healthy if held], test
