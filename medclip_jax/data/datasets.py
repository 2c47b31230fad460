"""Data sets by name, healthy-only support pools, and splits kept with ids and hashes."""

import json
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medclip_jax import files
from medclip_jax.data import chexpert, layouts, phantom, pools, readers, twins
from medclip_jax.data.citations import ABOUT
from medclip_jax.errors import ConfigError, DataError
from medclip_jax.structs import Record, Split

LAYOUTS: dict[str, Callable[[Path], layouts.Layout]] = {
    "busi": layouts.busi,
    "folder": layouts.folder,
    "brain_mri": layouts.brain_mri,
    "chest_xray": layouts.chest_xray,
    "chexpert": chexpert.layout,
}
DOWNLOADABLE = ("busi",)
# Simulated sets of this package: modality and counts of train/good, test/good and test/lesion.
PHANTOMS = {f"phantom-{m}": (m, 32, 40, 40) for m in ("ultrasound", "mri", "xray")}
PHANTOM_SIZE = (224, 256)
KINDS = ("peer", "clean")
LISTED = 10  # problems named in one message
WAITING = 1024  # files handed to the threads at a time


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


def load(
    name: str,
    root: Path | None,
    cache: Path,
    k: int = 1,
    policy: tuple[str, str] = chexpert.DEFAULT,
) -> tuple[Record, ...]:
    """Records of a data set, in natural order of their ids.

    The first call for a state of the data decodes every image and mask once, hashes the images
    and keeps the list in `cache`; a changed, added or removed file makes a new list.

    Args:
      name: one of LAYOUTS ("folder" is the MVTec-AD layout) or PHANTOMS (simulated on first use).
      root: where the data lie; None takes $MEDCLIP_DATA, and failing that BUSI is downloaded.
      cache: folder for prepared lists and downloads.
      k: healthy images that will be needed; fewer is listed with the other problems.
      policy: CheXpert's labels that say neither yes nor no, see chexpert.Policy.

    Raises:
      ConfigError: unknown name or policy.
      DataError: no data there, the download failed, or all problems of the data together.
      WorkdirError: `cache` cannot be written.
    """
    from medclip_jax.data import builders  # imports tensorflow_datasets, too slow for --help

    name, layout = listed(name, root, cache, policy)
    found = problems(layout, k)
    if not builders.prepared(name, layout, cache):
        found += broken(layout)
    _refuse(layout.root, found)
    return builders.records(name, layout, cache)


def listed(
    name: str, root: Path | None, cache: Path, policy: tuple[str, str] = chexpert.DEFAULT
) -> tuple[str, layouts.Layout]:
    """Name (a phantom becomes a "folder") and layout of a data set, no image opened; see `load`."""
    if name not in (*LAYOUTS, *PHANTOMS):
        known = ", ".join((*LAYOUTS, *PHANTOMS))
        raise ConfigError(f"config.data.name is '{name}': give one of {known}.")
    if name in PHANTOMS:
        modality, *counts = PHANTOMS[name]
        root = phantom.write_folder(cache / name, modality, 0, PHANTOM_SIZE, *counts)
        name = "folder"
    root = root or _environment_root()
    if root is None and name in DOWNLOADABLE:
        from medclip_jax.data import builders

        root = builders.fetch_busi(cache)
    if root is None:
        by_hand = f" ({ABOUT[name].by_hand.rstrip('.')})" if ABOUT[name].by_hand else ""
        raise DataError(f"no folder was named for '{name}': {layouts.GIVE_ROOT}{by_hand}.")
    root = root.expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: {layouts.GIVE_ROOT}.")
    if name == "chexpert":
        return name, chexpert.layout(root, chexpert.Policy(*policy))
    return name, LAYOUTS[name](root)


def problems(layout: layouts.Layout, k: int = 1) -> tuple[str, ...]:
    """What is wrong with the names: masks without image, images without mask, too few healthy."""
    own_parts = any(e.part for e in layout.examples)
    healthy = sum(e.label == 0 and (e.part == "train" or not own_parts) for e in layout.examples)
    if healthy >= k:
        return layout.problems
    return (*layout.problems, f"only {healthy} healthy images where K = {k} are needed")


def broken(layout: layouts.Layout) -> tuple[str, ...]:
    """What is wrong with the files: images and masks that cannot be read or differ in size.

    Decodes everything once, on threads.
    """

    def check(example: layouts.Example) -> str | None:
        try:
            shape = readers.read(layout.root / example.id).pixels.shape[1:]
            readers.read_mask([layout.root / mask for mask in example.masks], shape)
        except DataError as error:
            return str(error).rstrip(".")
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        every = range(0, len(layout.examples), WAITING)  # or all the files would wait at once
        parts = (layout.examples[i : i + WAITING] for i in every)
        return tuple(found for part in parts for found in pool.map(check, part) if found)


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
        pool, test = pools.clean(records, seed, twins.of(records, cache))
    else:
        pool, test = pools.peer(records, seed, pool_size)
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


def _environment_root() -> Path | None:
    named = os.environ.get("MEDCLIP_DATA")
    return Path(named) if named else None


def _refuse(root: Path, found: tuple[str, ...]) -> None:
    """One DataError for all problems, at most ten of them spelled out."""
    if found:
        more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise DataError(
            f"{root} has {len(found)} problem(s) to mend first: {'; '.join(found[:LISTED])}{more}."
        )
