"""Who may be support and who is test: two kinds of split, both of which keep patients apart."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from jaxtyping import Int

from medclip_jax import files, stored
from medclip_jax.data import near_duplicates
from medclip_jax.data.layouts import Record, Split
from medclip_jax.errors import ConfigError, DataError

KINDS = ("peer", "clean")

Sides = tuple[list[Record], list[Record]]  # pool of possible supports, test


def split(
    records: Iterable[Record],
    k: int,
    seed: int,
    pool_size: int = 32,
    kind: str = "peer",
    cache: Path | None = None,
) -> Split:
    """Sample K healthy supports; nested, so that the first 4 of 8 are the 4 of K = 4.

    Args:
      k: supports, 0 to the size of the pool.
      seed: of the permutation whose first K are the supports.
      pool_size: of `peer`.
      kind: "peer", the split of published tables, or "clean", see the functions of these names.
        A folder may have no test part: test is empty.
      cache: where the groups of near-duplicates are stored between runs.

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
    if why := emptied(records, test):
        raise DataError(why)
    if not 0 <= k <= len(pool):
        raise ConfigError(
            f"config.k is {k} but the pool holds {len(pool)} healthy images: "
            f"give K from 0 to {len(pool)}."
        )
    if test or {r.part for r in records} != {"train"}:
        for label, word in enumerate(("healthy", "abnormal")):
            if all(r.label != label for r in test):
                if not any(r.part for r in records):
                    raise DataError(
                        f"the test set has no {word} image: add some or take a smaller pool."
                    )
                logging.warning(
                    "the test set has no %s image: what needs both classes (AUROC and others) is "
                    "not measured",
                    word,
                )
    result = Split(tuple(pool[:k]), tuple(test))
    if copies := duplicates(result):
        logging.warning(
            "%d of the %d support images stand byte for byte in the test set too, first %s = %s.",
            *(len({support for support, _ in copies}), k, *copies[0]),
        )
    return result


def peer(records: Sequence[Record], seed: int, pool_size: int) -> Sides:
    """Pool in random order, and test: the split of published tables.

    Without parts of its own (BUSI), the data set gives a pool of `pool_size` healthy images sampled
    anew for each seed; test is every other healthy image and every abnormal one: whatever K, for
    BUSI 101 + 647 and for brain_mri 66 + 155. With parts (folder, chest_xray, chexpert), the pool
    is all healthy images of the train part and test is the test part. Images of a patient on both
    sides are left out of test without parts, else of the pool.
    """
    has_parts = any(r.part for r in records)
    candidates = [r for r in records if r.label == 0 and (r.part == "train" or not has_parts)]
    if has_parts:
        test = [r for r in records if r.part == "test"]
        known = patients(test)
        candidates = [r for r in candidates if r.patient not in known]
    order = np.random.default_rng(seed).permutation(len(candidates))
    pool = [candidates[i] for i in (order if has_parts else order[:pool_size])]
    if not has_parts:
        taken, known = {r.id for r in pool}, patients(pool)
        test = [r for r in records if r.id not in taken and r.patient not in known]
    return pool, test


def clean(records: Sequence[Record], seed: int, groups: Int[np.ndarray, " n"]) -> Sides:
    """Pool in random order, and test, with no near-duplicate or patient in both.

    Near-duplicates that contradict one another in label are left out, and all but the first of
    files of equal bytes. Near-duplicates and images of one patient then form units. Without parts,
    half of the wholly healthy units, sampled anew for each seed, give one image each to the pool
    (their others are left out); everything else is test. With parts, test is the test part, and
    every healthy unit of the train part without a test image gives one image to the pool.

    Args:
      groups: near-duplicates, see near_duplicates.groups.
    """
    labels = labels_of(records, groups)
    consistent = [i for i, group in enumerate(groups) if len(labels[group]) == 1]
    first = {records[i].sha256: i for i in reversed(consistent)}
    distinct = [i for i in consistent if first[records[i].sha256] == i]
    names = [records[i].patient or f"\0{i}" for i in distinct]  # unnamed: a patient of their own
    units: dict[int, list[Record]] = defaultdict(list)
    merged = near_duplicates.merge(groups[distinct], names).tolist()
    for i, unit in zip(distinct, merged, strict=True):
        units[unit].append(records[i])
    pool, test = _with_parts(units) if any(r.part for r in records) else _halves(units, seed)
    order = np.random.default_rng(seed).permutation(len(pool))
    logging.info(
        "clean split: of %d images, %d contradict a near-duplicate and %d are byte for byte "
        "another's; pool %d, test %d",
        *(len(records), len(records) - len(consistent), len(consistent) - len(distinct)),
        *(len(pool), len(test)),
    )
    place = {r.id: i for i, r in enumerate(records)}
    return [pool[i] for i in order], sorted(test, key=lambda r: place[r.id])


def emptied(records: Sequence[Record], test: Sequence[Record]) -> str:
    """Why nothing is left of a test part; "" where something is, or there was none."""
    if test or all(r.part != "test" for r in records):
        return ""
    return (
        "nothing is left to test on: every image of the test part contradicts a near-duplicate in "
        "its label or copies another: put labels right or give config.data.split=peer"
    )


def with_units(test: Sequence[Record], records: Sequence[Record], cache: Path) -> list[Record]:
    """The test images, numbered by unit: copies of one another and images of one patient are one.

    Args:
      test: of a split of `records`.
      records: the data set; where it has a test part, that alone is compared, else all of it, so
        that a unit has the same number in every draw.
      cache: where the groups of near-duplicates are stored between runs.
    """
    compared = [r for r in records if r.part == "test"] or list(records)
    names = [r.patient or f"\0{r.id}" for r in compared]
    units = near_duplicates.merge(near_duplicates.groups(compared, cache), names).tolist()
    number = {r.id: unit for r, unit in zip(compared, units, strict=True)}
    return [r._replace(unit=number[r.id]) for r in test]


def patient_numbers(records: Sequence[Record]) -> np.ndarray | None:
    """Patient of each image as a number (no name or id); None if no patient has two images.

    An image without patient is its own.
    """
    names = [r.patient or f"image {r.id}" for r in records]
    number = np.unique(names, return_inverse=True)[1]
    return None if len(set(names)) == len(names) else number


def unit_numbers(records: Sequence[Record]) -> np.ndarray | None:
    """Unit of each image: what is resampled as one. None if every image is its own.

    Near-duplicates and images of one patient (`with_units`) where known, else patients.
    """
    number = np.array([r.unit for r in records], int)
    if (number < 0).any():
        return patient_numbers(records)
    return None if len(set(number.tolist())) == len(number) else number


def labels_of(records: Sequence[Record], groups: Int[np.ndarray, " n"]) -> dict[int, set[int]]:
    """The labels in each group."""
    labels = defaultdict(set)
    for record, group in zip(records, groups, strict=True):
        labels[int(group)].add(record.label)
    return labels


def patients(records: Sequence[Record]) -> set[str]:
    """Patients of those records that name one."""
    return {r.patient for r in records} - {""}


def shared_patients(pool: Sequence[Record], test: Sequence[Record]) -> Counter:
    """Patients on both sides, with how many images of each stand in test."""
    known = patients(pool)
    return Counter(r.patient for r in test if r.patient in known)


def healthy(records: Iterable[Record], target: Split, count: int, seed: int) -> tuple[Record, ...]:
    """Healthy images of an auxiliary data set: up to `count` in random order, 0 = all.

    None of its own test part or with the bytes of one in the target's split, else DataError.
    """
    taken = {r.sha256 for part in target for r in part}
    pool = [r for r in records if r.label == 0 and r.part != "test" and r.sha256 not in taken]
    if not pool:
        raise DataError("config.meta names a data set without healthy images: leave it out.")
    order = np.random.default_rng(seed).permutation(len(pool))
    return tuple(pool[i] for i in order[: count or None])


def source(
    records: Sequence[Record], target: Split, count: int, most_abnormal: int
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Healthy and abnormal images of a data set to meta-learn from, the same for every target.

    DataError if one of them is, byte for byte, in the target's split.
    """
    abnormal = [r for r in records if r.label == 1]
    order = np.random.default_rng(0).permutation(len(abnormal))[:most_abnormal]
    sides = healthy(records, Split((), ()), count, 0), tuple(abnormal[i] for i in order)
    taken = {r.sha256: r for part in target for r in part}
    if shared := [r for side in sides for r in side if r.sha256 in taken]:
        raise DataError(
            f"{shared[0].path} of config.meta.sources is the target's {taken[shared[0].sha256].id} "
            "byte for byte: leave that source out"
        )
    return sides


def duplicates(split: Split) -> tuple[tuple[str, str], ...]:
    """Pairs (support id, test id) of files with equal bytes."""
    return tuple((s.id, t.id) for s in split.support for t in split.test if s.sha256 == t.sha256)


def write_split(split: Split, path: Path, *, name: str, seed: int, kind: str = "peer") -> None:
    """Write ids, hashes and labels as JSON; WorkdirError if the folder cannot be written."""
    head = {"dataset": name, "kind": kind, "k": len(split.support), "seed": seed}
    rows = {
        part: [{"id": r.id, "sha256": r.sha256, "label": r.label} for r in getattr(split, part)]
        for part in Split._fields
    }
    files.write_json(path, head | rows)


def check_split(path: Path, split: Split) -> None:
    """Raise DataError for a stored split that cannot be read or differs from the data on disk."""
    try:
        before = stored.read_json(path)
        rows = {
            part: [(r["id"], r["sha256"], r["label"]) for r in before[part]]
            for part in Split._fields
        }
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): give the split.json of a finished run."
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not a stored split ({error}): remove it.") from error
    for part in Split._fields:
        for old, new in zip_longest(rows[part], getattr(split, part)):
            if difference := _difference(old, new):
                raise DataError(
                    f"{path} does not match the data on disk: in {part}, {difference}; "
                    "restore the data or start in a new workdir."
                )


def _halves(units: dict[int, list[Record]], seed: int) -> Sides:
    healthy = [unit for unit, members in units.items() if all(r.label == 0 for r in members)]
    order = np.random.default_rng(seed).permutation(len(healthy))
    sampled = {healthy[i] for i in order[: len(healthy) // 2]}
    pool = [units[unit][0] for unit in healthy if unit in sampled]
    return pool, [r for unit, members in units.items() if unit not in sampled for r in members]


def _with_parts(units: dict[int, list[Record]]) -> Sides:
    test = [r for members in units.values() for r in members if r.part == "test"]
    apart = [members for members in units.values() if all(r.part != "test" for r in members)]
    healthy = ([r for r in unit if r.label == 0 and r.part == "train"] for unit in apart)
    return [unit[0] for unit in healthy if unit], test


def _difference(old: tuple[str, str, int] | None, new: Record | None) -> str:
    if new is None:
        assert old is not None
        return f"{old[0]} is in the file only"
    if old is None:
        return f"{new.id} is in the data only"
    name, sha256, label = old
    if name != new.id:
        return f"{name} stands in the file where the data have {new.id}"
    if sha256 != new.sha256:
        return f"{name} has other bytes than before"
    return "" if label == new.label else f"{name} has another label than before"
