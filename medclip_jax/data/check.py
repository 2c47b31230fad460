"""One table of what is in a data set and what is wrong with it, before anything is trained.

Every image and mask is decoded once. Nothing is written.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from medclip_jax.data import datasets, layouts, near_duplicates, splits
from medclip_jax.data.records import Record
from medclip_jax.errors import DataError
from medclip_jax.io import read

CONTRAST = 0.1  # of the full scale, between the 1st and the 99th percentile
STYLES = {"stop": "bold red", "look": "yellow", "ok": "green"}


class Row(NamedTuple):
    """One line of the table."""

    state: str  # stop: cannot be used | look: usable, but know it | ok
    what: str
    images: int
    detail: str


class Seen(NamedTuple):
    """What one image is like."""

    shape: tuple[int, int]  # height, width
    contrast: float  # 99th less 1st percentile, of the full scale
    thumbnail: Float[np.ndarray, " p"]
    sha256: str


class Screen(Console):
    """The terminal, or a pipe whose reader may leave: rich would end the process with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def run(
    name: str,
    root: Path | None,
    cache: Path,
    k: int,
    *,
    seed: int = 0,
    pool_size: int = 32,
    kind: str = "peer",
    policy: tuple[str, str] = ("exclude", "negative"),
    console: Console | None = None,
) -> tuple[Row, ...]:
    """Examine a data set and print the table; arguments as those of datasets.load and split.

    Raises:
      DataError: the data set cannot be used, after the table is printed; or there is none.
    """
    _, layout = datasets.listed(name, root, cache, policy)
    seen = examine(layout)
    good = [(e, s) for e, s in zip(layout.examples, seen, strict=True) if isinstance(s, Seen)]
    rows = [Row("stop", "name", 1, text) for text in datasets.problems(layout, k)]
    rows += [Row("stop", "file", 1, text) for text in seen if isinstance(text, str)]
    rows += contents(layout.examples) + appearance(good)
    records = [
        Record(e.id, e.label, e.part, layout.root / e.id, (), s.sha256, e.patient) for e, s in good
    ]
    groups = same(good)
    rows += sides(records, groups, seed, pool_size, kind, k)
    rows.sort(key=lambda row: list(STYLES).index(row.state))
    show(rows, f"{name}: {layout.root}", console or Screen())
    if stops := sum(row.state == "stop" for row in rows):
        raise DataError(f"{layout.root} cannot be used: mend the {stops} problem(s) of the table.")
    return tuple(rows)


def examine(layout: layouts.Layout) -> list[Seen | str]:
    """Decode every image with its masks, on threads; what is wrong with a file as a sentence."""

    def look(example: layouts.Example) -> Seen | str:
        path = layout.root / example.id
        try:
            frames = read.read(path).pixels
            read.read_mask([layout.root / mask for mask in example.masks], frames.shape[1:])
        except DataError as error:
            return str(error).rstrip(".")
        if len(frames) != 1:
            return f"{path} holds {len(frames)} frames where one image is needed"
        low, high = np.percentile(frames, (1, 99))
        thumbnail = near_duplicates.normalised(read.fit(frames[0], near_duplicates.SIDE))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Seen(frames.shape[1:], float(high - low), thumbnail, digest)

    found: list[Seen | str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(layout.examples), datasets.WAITING):
            found += pool.map(look, layout.examples[start : start + datasets.WAITING])
    return found


def contents(examples: Sequence[layouts.Example]) -> list[Row]:
    """How many images of each part and class, and whether both answers can be measured."""
    counts = Counter((e.part, ("healthy", "abnormal")[e.label], e.kind) for e in examples)
    rows = [
        Row("ok", " ".join(filter(None, (part, label))), count, kind)
        for (part, label, kind), count in sorted(counts.items())
    ]
    masks = sum(bool(e.masks) for e in examples)
    rows.append(Row("ok", "with mask", masks, "" if masks else "no pixel results"))
    own_parts = any(e.part for e in examples)
    tested = [e for e in examples if e.part == "test" or not own_parts]
    if not tested:
        lacks = "no folder test: a run trains but measures nothing"
        return [*rows, Row("look", "test set", 0, lacks)]
    for label, word in enumerate(("healthy", "abnormal")):
        if all(e.label != label for e in tested):
            rows.append(Row("stop", "test set", 0, f"no {word} image to test on"))
    return rows


def appearance(good: Sequence[tuple[layouts.Example, Seen]]) -> list[Row]:
    """Sizes and intensities."""
    if not good:
        return []
    sizes = Counter(s.shape for _, s in good)
    areas = sorted(sizes, key=lambda shape: shape[0] * shape[1])
    span = " to ".join(dict.fromkeys(f"{w} x {h}" for h, w in (areas[0], areas[-1])))
    contrasts = [s.contrast for _, s in good]
    low, middle = np.min(contrasts), np.median(contrasts)
    rows = [
        Row("ok", "sizes", len(sizes), f"{span} pixels (width x height)"),
        Row("ok", "contrast", len(good), f"median {middle:.2f}, least {low:.2f} of full scale"),
    ]
    flat = [e.id for e, s in good if not s.thumbnail.any()]
    dull = [e.id for e, s in good if s.thumbnail.any() and s.contrast < CONTRAST]
    if flat:
        rows.append(Row("look", "constant image", len(flat), f"first {flat[0]}"))
    if dull:
        rows.append(Row("look", f"contrast below {CONTRAST}", len(dull), f"first {dull[0]}"))
    return rows


def same(good: Sequence[tuple[layouts.Example, Seen]]) -> np.ndarray:
    """Groups of near-duplicates, as twins.of has them."""
    if not good:
        return np.zeros(0, np.int64)
    hashes = [s.sha256 for _, s in good]
    _, first, back = np.unique(hashes, return_index=True, return_inverse=True)
    return near_duplicates.first_seen(
        near_duplicates.group(np.stack([good[i][1].thumbnail for i in first]))[back]
    )


def sides(
    records: Sequence[Record], groups: np.ndarray, seed: int, pool_size: int, kind: str, k: int
) -> list[Row]:
    """What stands on both sides of the split: the whole pool that supports come from, and test."""
    clean = kind == "clean"
    drawn = splits.clean(records, seed, groups) if clean else splits.peer(records, seed, pool_size)
    pool, test = drawn
    rows = [Row("ok", f"{kind} split", len(records), f"pool {len(pool)}, test {len(test)}")]
    if len(pool) < k:
        rows.append(Row("stop", "pool", len(pool), f"fewer than K = {k} healthy images"))
    group = {r.id: int(g) for r, g in zip(records, groups, strict=True)}
    labels: dict[int, set[int]] = {}
    for record in records:
        labels.setdefault(group[record.id], set()).add(record.label)
    torn = [r.id for r in records if len(labels[group[r.id]]) > 1]
    if torn:
        detail = f"healthy in one, abnormal in another, first {torn[0]}"
        rows.append(Row("look", "near-duplicates that contradict", len(torn), detail))
    hashes, near = {r.sha256 for r in pool}, {group[r.id] for r in pool}
    both = {
        "exact duplicate across the split": [r.id for r in test if r.sha256 in hashes],
        "near-duplicate across the split": [
            r.id for r in test if group[r.id] in near and r.sha256 not in hashes
        ],
        "patient across the split": list(splits.shared_patients(pool, test)),
    }
    hint = "; --config.data.split=clean keeps them apart"
    return rows + [
        Row("look", what, len(found), f"first {found[0]}{hint}")
        for what, found in both.items()
        if found
    ]


def show(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print the table; of one kind of problem at most ten lines."""
    table = Table(title=title, title_justify="left")
    for column in ("", "what", "images", "detail"):
        table.add_column(column, justify="right" if column == "images" else "left", overflow="fold")
    told: Counter[tuple[str, str]] = Counter()
    for row in rows:
        told[row.state, row.what] += 1
        if told[row.state, row.what] <= datasets.LISTED or row.state == "ok":
            cells = (row.state, row.what, str(row.images), row.detail)
            table.add_row(*(_plain(cell) for cell in cells), style=STYLES[row.state])
    for (state, what), count in told.items():
        if state != "ok" and count > datasets.LISTED:
            table.add_row(state, what, str(count - datasets.LISTED), "more", style=STYLES[state])
    console.print(table)


def _plain(text: str) -> str:
    """Brackets in file names are no markup."""
    return text.replace("[", "\\[")
