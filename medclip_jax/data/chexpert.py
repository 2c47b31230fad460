"""CheXpert-v1.0-small (Irvin et al. 2019): films and labels named by train.csv and valid.csv.

Frontal views only. The labels come from reports: 1 present, 0 absent, -1 uncertain, blank not
mentioned. What counts:

  abnormal   any of FINDINGS is present (Support Devices is no finding)
  healthy    "No Finding" is 1, and of FINDINGS none is present or undecided
  left out   everything else

Uncertain counts as present ("positive"), absent ("negative") or undecided ("exclude"); blank as
absent. Supports come from train.csv, the test set is valid.csv (labelled by radiologists).
"""

import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from medclip_jax import stored
from medclip_jax.data.layouts import Example, Layout, find, natural
from medclip_jax.errors import ConfigError, DataError

FINDINGS = (
    *("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture"),
)
COLUMNS = ("Path", "Frontal/Lateral", "No Finding", *FINDINGS)
PARTS = {"train": "train", "valid": "test"}  # file and folder of the archive -> part
UNDECIDED = None
MOST_TABLE = 1 << 28  # bytes; the set's own has 22 million
UNCERTAIN = {"exclude": UNDECIDED, "positive": 1, "negative": 0}


def layout(root: Path, uncertain: str = "exclude") -> Layout:
    """List the frontal films that have a label; `uncertain` is a key of UNCERTAIN."""
    if uncertain not in UNCERTAIN:
        raise ConfigError(
            f"config.data.uncertain is '{uncertain}': give one of {', '.join(UNCERTAIN)}"
        )
    tables = tuple(f"{name}.csv" for name in PARTS)
    root = find(root, "CheXpert", "chexpert", "CheXpert-v1.0-small", tables)
    examples, problems = [], []
    for name, part in PARTS.items():
        missing = []
        for line, example in _rows(root, name, part, uncertain):
            if (root / example.id).is_file():
                examples.append(example)
            else:
                missing.append((line, example.id))
        if missing:
            line, first = missing[0]
            problems.append(
                f"{name}.csv names {len(missing)} image(s) that are not there, first {first} "
                f"in line {line}"
            )
    twice = len(examples) - len({example.id for example in examples})
    if twice:
        problems.append(f"train.csv and valid.csv name {twice} image(s) more than once")
    return Layout(root, tuple(sorted(examples, key=lambda e: natural(e.id))), tuple(problems))


def label_of(row: dict[str, str], uncertain: str) -> tuple[int | None, str]:
    """(0 healthy, 1 abnormal or None for undecided, the finding) of a row of the tables.

    Raises KeyError for a value that is neither a label nor blank.
    """
    meaning: dict[str, int | None] = {"": 0, "1.0": 1, "1": 1, "0.0": 0, "0": 0}
    meaning |= dict.fromkeys(("-1.0", "-1"), UNCERTAIN[uncertain])
    findings = {name: meaning[(row[name] or "").strip()] for name in FINDINGS}
    present = [name for name in FINDINGS if findings[name] == 1]
    if present:
        return 1, present[0]
    healthy = meaning[(row["No Finding"] or "").strip()] == 1
    if healthy and UNDECIDED not in findings.values():
        return 0, "No Finding"
    return None, ""


def _rows(root: Path, name: str, part: str, uncertain: str) -> Iterator[tuple[int, Example]]:
    """(line, example) of every frontal film that has a label."""
    table = root / f"{name}.csv"
    try:
        stored.check_file(table, MOST_TABLE)
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            absent = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
            if absent:
                raise DataError(
                    f"{table} has no column '{absent[0]}': give the table as CheXpert ships it."
                )
            for row in rows:
                if (row["Frontal/Lateral"] or "").strip() != "Frontal":
                    continue
                below = _below(table, rows.line_num, row["Path"] or "", name)
                try:
                    label, kind = label_of(row, uncertain)
                except KeyError as error:
                    raise DataError(
                        f"{table} holds {error} in line {rows.line_num} where a label is 1, 0, -1 "
                        "or blank: give the table as CheXpert ships it."
                    ) from error
                if label is not None:
                    patient = next((p for p in below.parts if p.startswith("patient")), "")
                    example = Example(below.as_posix(), label, kind, part, (), patient)
                    yield rows.line_num, example
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{table} cannot be read as a table ({error}): give it as CheXpert ships it."
        ) from error


def _below(table: Path, line: int, named: str, name: str) -> PurePosixPath:
    """Path below the root: the archive's own folder, whatever its version, is cut off."""
    pieces = PurePosixPath(named.strip()).parts
    if name not in pieces or ".." in pieces:
        raise DataError(
            f"{table} names '{named}' in line {line}, which is no path of CheXpert "
            f"(<archive>/{name}/patient<n>/study<n>/<view>): give the table as CheXpert ships it."
        )
    return PurePosixPath(*pieces[pieces.index(name) :])
