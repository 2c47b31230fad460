"""Who may be support and who is test: the two splits of PROTOCOL. Both keep patients apart."""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from medclip_jax import files
from medclip_jax.data import near_duplicates
from medclip_jax.data.records import Record, Split
from medclip_jax.errors import ConfigError, DataError


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
    for i, unit in zip(kept, near_duplicates.merge(groups[kept], named).tolist(), strict=True):
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


KINDS = ("peer", "clean")


class Entry(NamedTuple):
    """One image of a stored split."""

    id: str
    sha256: str
    label: int  # 0 healthy, 1 abnormal


class StoredSplit(NamedTuple):
    """What split.json holds."""

    dataset: str
    kind: str
    k: int
    seed: int
    support: tuple[Entry, ...]
    test: tuple[Entry, ...]


def split(
    records: Iterable[Record],
    k: int,
    seed: int,
    pool_size: int = 32,
    kind: str = "peer",
    cache: Path | None = None,
) -> Split:
    """Draw K healthy supports; nested, so that the first 4 of 8 are the 4 of K = 4.

    peer: without parts of its own (BUSI), the data set gives a pool of `pool_size` healthy images
    drawn anew for each seed (so that draws differ at K = 32 too); test is every other healthy
    image and every abnormal one: whatever K, for BUSI 101 + 647 and for brain_mri 66 + 155. With
    parts (folder, chest_xray, chexpert), the pool is all healthy images of the train part and
    `pool_size` is not used; test is the test part. A folder may have no test part: test is empty.

    clean: no near-duplicate and no patient is on both sides, see pools.clean; half of the
    different healthy images make the pool where the data set has no parts.

    Args:
      seed: of the permutation whose first K are the supports.
      kind: "peer", the split of published tables, or "clean".
      cache: where the groups of near-duplicates are kept between runs.

    Raises:
      ConfigError: K or the pool is larger than the data allow, or the kind is unknown.
      DataError: nothing is left to test on.
    """
    records = tuple(records)
    if kind not in KINDS:
        raise ConfigError(f"config.data.split is '{kind}': give one of {', '.join(KINDS)}.")
    if kind == "clean":
        pool, test = clean(records, seed, near_duplicates.groups(records, cache))
    else:
        pool, test = peer(records, seed, pool_size)
    if not 0 <= k <= len(pool):
        raise ConfigError(
            f"config.data.k is {k} but the pool holds {len(pool)} healthy images: "
            f"give K from 0 to {len(pool)}."
        )
    if test or {r.part for r in records} != {"train"}:
        _check_testable(test)
    drawn = Split(tuple(pool[:k]), tuple(test))
    if copies := duplicates(drawn):
        logging.warning(
            "%d of the %d support images stand byte for byte in the test set too, first %s = %s.",
            len({a for a, _ in copies}),
            k,
            *copies[0],
        )
    return drawn


def healthy(records: Iterable[Record], drawn: Split, count: int, seed: int) -> tuple[Record, ...]:
    """Healthy images of another data set to meta-train on: up to `count` in random order, 0 = all.

    None of its own test part, and none whose bytes are in the target's split.

    Raises:
      DataError: nothing is left.
    """
    taken = {r.sha256 for part in drawn for r in part}
    found = [r for r in records if r.label == 0 and r.part != "test" and r.sha256 not in taken]
    if not found:
        raise DataError("config.meta.data names a data set without healthy images: leave it out.")
    order = np.random.default_rng(seed).permutation(len(found))
    return tuple(found[i] for i in order[: count or None])


def duplicates(drawn: Split) -> tuple[tuple[str, str], ...]:
    """Pairs (support id, test id) of files with equal bytes."""
    return tuple((s.id, t.id) for s in drawn.support for t in drawn.test if s.sha256 == t.sha256)


def write_split(drawn: Split, path: Path, *, name: str, seed: int, kind: str = "peer") -> None:
    """Write ids, hashes and labels as JSON; the file appears whole or not at all.

    Raises:
      WorkdirError: the folder cannot be written.
    """
    rows = {
        part: [Entry(r.id, r.sha256, r.label)._asdict() for r in getattr(drawn, part)]
        for part in Split._fields
    }
    head = {"dataset": name, "kind": kind, "k": len(drawn.support), "seed": seed}
    files.write_json(path, head | rows)


def read_split(path: Path) -> StoredSplit:
    """Read a split.json.

    Raises:
      DataError: missing, or not a split.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        entries = {part: tuple(Entry(**row) for row in held.pop(part)) for part in Split._fields}
        return StoredSplit(**(held | entries))
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): give the split.json of a finished run."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not a stored split ({error}): remove it.") from error


def check_split(path: Path, drawn: Split) -> None:
    """Refuse a stored split that does not match the data on disk.

    Raises:
      DataError: names the first image that differs.
    """
    stored = read_split(path)
    for part in Split._fields:
        then, now = getattr(stored, part), getattr(drawn, part)
        for position in range(max(len(then), len(now))):
            old = then[position] if position < len(then) else None
            new = now[position] if position < len(now) else None
            if difference := _difference(old, new):
                raise DataError(
                    f"{path} does not match the data on disk: in {part}, {difference}; "
                    "restore the data or start in a new workdir."
                )


def _difference(old: Entry | None, new: Record | None) -> str:
    if old is None:
        return f"{new.id} is in the data only" if new else ""
    if new is None:
        return f"{old.id} is in the file only"
    if old.id != new.id:
        return f"{old.id} stands in the file where the data have {new.id}"
    if old.sha256 != new.sha256:
        return f"{old.id} has other bytes than before"
    return "" if old.label == new.label else f"{old.id} has another label than before"


def _check_testable(test: list[Record]) -> None:
    for label, word in enumerate(("healthy", "abnormal")):
        if all(r.label != label for r in test):
            raise DataError(f"the test set has no {word} image: add some or take a smaller pool.")
