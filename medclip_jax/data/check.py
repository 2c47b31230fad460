"""One table of what is in a data set and what is wrong with it, before anything is trained.

Every image and mask is decoded once. Nothing is written.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medclip_jax import files
from medclip_jax.data import datasets, layouts, near_duplicates, splits
from medclip_jax.data.layouts import Record
from medclip_jax.errors import DataError, printable
from medclip_jax.io import read
from medclip_jax.io.nifti_header import files_of

LOW_CONTRAST = 0.1  # of the full scale, between the 1st and the 99th percentile
STYLES = {"error": "bold red", "warning": "yellow", "ok": "green"}


class Row(NamedTuple):
    """One line of the table."""

    state: str  # error: cannot be used | warning: usable, but know it | ok
    subject: str
    images: int
    detail: str


class Examined(NamedTuple):
    """What one image looks like."""

    shape: tuple[int, int]  # height, width
    contrast: float  # 99th less 1st percentile, of the full scale
    thumbnail: Float[np.ndarray, " p"]
    sha256: str
    covered: float | None  # share of the image that its masks cover


Readable = Sequence[tuple[layouts.Example, Examined]]


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
    uncertain: str = "exclude",
    window: str = "",
    extra: str = "",
    alpha: float = 0.1,
    console: Console | None = None,
) -> tuple[Row, ...]:
    """Examine a data set and print the table; arguments as those of datasets.load and split.

    extra: folder of datasets.extra, "" for none; alpha: the false-alarm rate it is for.

    Returns the rows, errors first; raises DataError where one is an error, after printing.
    """
    _, layout = datasets.find(name, root, cache, uncertain)
    results = datasets.examine(layout, window, examined)
    pairs = zip(layout.examples, results, strict=True)
    readable = [(example, image) for example, image in pairs if isinstance(image, Examined)]
    thumbnails, hashes = [i.thumbnail for _, i in readable], [i.sha256 for _, i in readable]
    groups = np.zeros(0, np.int64)
    if readable:
        groups = near_duplicates.merge(near_duplicates.correlated(np.stack(thumbnails)), hashes)
    rows = [Row("error", "name", 1, text) for text in datasets.problems(layout, k)]
    rows += [Row("error", "file", 1, text) for text in results if isinstance(text, str)]
    rows += contents(layout.examples) + appearance(readable)
    covered = [image.covered for _, image in readable]
    strange, useless = datasets.masks_of([example for example, _ in readable], covered)
    rows += [Row("error", "mask", 1, text) for text in useless]
    rows += [
        Row("warning", subject, 1, file) for subject, names in strange.items() for file in names
    ]
    records = [
        Record(
            e.id, e.label, e.part, layout.root / e.id, (), image.sha256, e.patient, window=window
        )
        for e, image in readable
    ]
    more = None
    if extra:
        more = partial(datasets.extra, files.expanded(extra), alpha=alpha, window=window)
    rows += split_rows(records, groups, seed, pool_size, kind, k, more)
    rows.sort(key=lambda row: list(STYLES).index(row.state))
    show(rows, f"{name}: {layout.root}", console or Screen())
    if errors := sum(row.state == "error" for row in rows):
        raise DataError(
            f"{layout.root} cannot be used: {errors} problem(s) in the table, fix these first."
        )
    return tuple(rows)


def examined(path: Path, image: Float[np.ndarray, "h w"], covered: float | None) -> Examined:
    """What a decoded image looks like."""
    low, high = np.percentile(image, (1, 99))
    thumbnail = near_duplicates.normalised(read.fit(image, near_duplicates.SIDE))
    digest = files.sha256_of(*files_of(path))
    return Examined(image.shape, float(high - low), thumbnail, digest, covered)


def contents(examples: Sequence[layouts.Example]) -> list[Row]:
    """How many images of each part and class, and whether both classes can be measured."""
    counts = Counter((e.part, ("healthy", "abnormal")[e.label], e.kind) for e in examples)
    rows = [
        Row("ok", " ".join(filter(None, (part, label))), count, kind)
        for (part, label, kind), count in sorted(counts.items())
    ]
    masks = sum(bool(e.masks) for e in examples)
    rows.append(Row("ok", "with mask", masks, "" if masks else "no pixel results"))
    has_parts = any(e.part for e in examples)
    tested = [e for e in examples if e.part == "test" or not has_parts]
    if not tested:
        rows.append(
            Row("warning", "test set", 0, "no folder test: a run trains but measures nothing")
        )
        return rows
    for label, word in enumerate(("healthy", "abnormal")):
        if all(e.label != label for e in tested):
            detail = f"no {word} image: what needs both classes is not measured"
            rows.append(Row("warning", "test set", 0, detail))
    return rows


def appearance(readable: Readable) -> list[Row]:
    """Sizes and intensities."""
    if not readable:
        return []
    sizes = Counter(image.shape for _, image in readable)
    areas = sorted(sizes, key=lambda shape: shape[0] * shape[1])
    span = " to ".join(dict.fromkeys(f"{w} x {h}" for h, w in (areas[0], areas[-1])))
    contrasts = [image.contrast for _, image in readable]
    low, middle = np.min(contrasts), np.median(contrasts)
    detail = f"median {middle:.2f}, least {low:.2f} of full scale"
    rows = [Row("ok", "sizes", len(sizes), f"{span} pixels (width x height)")]
    rows += [Row("ok", "contrast", len(readable), detail)]
    flat = [e.id for e, image in readable if not image.thumbnail.any()]
    dull = [e.id for e, i in readable if i.thumbnail.any() and i.contrast < LOW_CONTRAST]
    for subject, ids in (("constant image", flat), (f"contrast below {LOW_CONTRAST}", dull)):
        if ids:
            rows.append(Row("warning", subject, len(ids), f"first {ids[0]}"))
    return rows


def split_rows(
    records: Sequence[Record],
    groups: Int[np.ndarray, " n"],
    seed: int,
    pool_size: int,
    kind: str,
    k: int,
    extra: Callable[[layouts.Split], Sequence[Record]] | None = None,
) -> list[Row]:
    """What stands on both sides of the split: the whole pool that supports come from, and test."""
    sides = splits.clean(records, seed, groups) if kind == "clean" else None
    pool, test = sides or splits.peer(records, seed, pool_size)
    rows = [Row("ok", f"{kind} split", len(records), f"pool {len(pool)}, test {len(test)}")]
    if len(pool) < k:
        rows.append(Row("error", "pool", len(pool), f"fewer than K = {k} healthy images"))
    if extra:
        try:
            found = extra(layouts.Split(tuple(pool[:k]), tuple(test)))
            rows.append(Row("ok", "calibration.extra", len(found), "healthy, for thresholds alone"))
        except DataError as error:
            rows.append(Row("error", "calibration.extra", 1, str(error).rstrip(".")))
    if why := splits.emptied(records, test):
        rows.append(Row("error", "test set", 0, why))
    if not any(r.part for r in records):  # a test part may lack a class, what is left over may not
        rows += [
            Row("error", "test set", 0, f"no {word} image is left: add some or take a smaller pool")
            for label, word in enumerate(("healthy", "abnormal"))
            if all(r.label != label for r in test)
        ]
    group = {r.id: int(g) for r, g in zip(records, groups, strict=True)}
    labels = splits.labels_of(records, groups)
    contradicting = [r.id for r in records if len(labels[group[r.id]]) > 1]
    if contradicting:
        detail = f"healthy in one, abnormal in another, first {contradicting[0]}"
        rows.append(Row("warning", "near-duplicates that contradict", len(contradicting), detail))
    hashes, pool_groups = {r.sha256 for r in pool}, {group[r.id] for r in pool}
    shared = {
        "exact duplicate across the split": [r.id for r in test if r.sha256 in hashes],
        "near-duplicate across the split": [
            r.id for r in test if group[r.id] in pool_groups and r.sha256 not in hashes
        ],
        "patient across the split": list(splits.shared_patients(pool, test)),
    }
    hint = "; --config.data.split=clean keeps them apart"
    return rows + [
        Row("warning", subject, len(ids), f"first {ids[0]}{hint}")
        for subject, ids in shared.items()
        if ids
    ]


def show(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print the table; of one kind of problem at most ten lines."""
    table = Table(title=Text(printable(title)), title_justify="left")
    for column in ("", "subject", "images", "detail"):
        table.add_column(column, justify="right" if column == "images" else "left", overflow="fold")
    printed: Counter[tuple[str, str]] = Counter()
    for row in rows:
        printed[row.state, row.subject] += 1
        if printed[row.state, row.subject] <= datasets.LISTED or row.state == "ok":
            cells = (row.state, row.subject, str(row.images), printable(row.detail))
            table.add_row(*map(Text, cells), style=STYLES[row.state])
    for (state, subject), count in printed.items():
        if state != "ok" and count > datasets.LISTED:
            table.add_row(state, subject, str(count - datasets.LISTED), "more", style=STYLES[state])
    console.print(table)
