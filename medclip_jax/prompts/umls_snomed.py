"""Licensed releases of UMLS and SNOMED CT, read line by line for some codes only.

Formats: UMLS Reference Manual, chapter 3 (MRCONSO.RRF, 18 columns each ended by a bar); SNOMED CT
Release File Specification (RF2 Snapshot, tab separated with a header line).
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from absl import logging

from medclip_jax.errors import ConfigError

MRCONSO = tuple(
    "CUI LAT TS LUI STT SUI ISPREF AUI SAUI SCUI SDUI SAB TTY CODE STR SRL SUPPRESS CVF".split()
)
FULL_NAME, SYNONYM = "900000000000003001", "900000000000013009"  # typeId of RF2 descriptions
TAG = re.compile(r" \([^()]*\)$")  # "Pneumonia (disorder)"
LONGEST = 1 << 20  # characters of a line; a release has none over 10,000


class Entry(NamedTuple):
    """Words of one code in order of appearance, and its SNOMED CT ids."""

    words: tuple[str, ...]
    sctids: frozenset[str]


def umls(path: Path, cuis: Collection[str], language: str = "ENG") -> dict[str, Entry]:
    """Words of the wanted CUIs in one language, and the SNOMED CT concepts they stand for.

    Suppressed and obsolete atoms are left out. Raises ConfigError if a line has too few columns.
    """
    words: dict[str, dict[str, None]] = {}
    sctids: dict[str, set[str]] = {}
    for number, line in enumerate(lines(path), 1):
        if number > 1 and line[:8] not in cuis:
            continue
        fields = line.split("|")
        if len(fields) < len(MRCONSO):
            raise ConfigError(
                f"{path} line {number} has {len(fields)} columns, MRCONSO.RRF has {len(MRCONSO)}: "
                "give the file of a UMLS release"
            )
        atom = dict(zip(MRCONSO, fields, strict=False))
        if atom["CUI"] not in cuis or atom["LAT"] != language or atom["SUPPRESS"] != "N":
            continue
        term = TAG.sub("", atom["STR"]) if atom["TTY"] == "FN" else atom["STR"]
        words.setdefault(atom["CUI"], {})[term] = None
        if atom["SAB"] == "SNOMEDCT_US" and atom["TTY"] == "PT":
            sctids.setdefault(atom["CUI"], set()).add(atom["CODE"])
    return {c: Entry(tuple(w), frozenset(sctids.get(c, ()))) for c, w in words.items()}


def snomed(folder: Path, sctids: Collection[str], language: str = "en") -> dict[str, Entry]:
    """Active names and synonyms of the wanted concepts that are active, from an RF2 Snapshot.

    A fully specified name loses its tag. Raises ConfigError if the folder has no Snapshot or a
    file lacks a column.
    """
    descriptions = sorted(folder.rglob("sct2_Description_Snapshot*.txt"))
    if not descriptions:
        raise ConfigError(
            f"{folder} has no sct2_Description_Snapshot*.txt: give the folder of an unpacked "
            "SNOMED CT RF2 release"
        )
    inactive = {
        row["id"]
        for path in sorted(folder.rglob("sct2_Concept_Snapshot*.txt"))
        for row in tabbed(path, ("id", "active"), "id", sctids)
        if row["active"] != "1"
    }
    for sctid in sorted(inactive):
        logging.warning("SNOMED CT %s is no longer active in %s", sctid, folder)
    words: dict[str, dict[str, None]] = {}
    columns = ("active", "conceptId", "languageCode", "typeId", "term")
    for path in descriptions:
        for row in tabbed(path, columns, "conceptId", sctids):
            used = row["active"] == "1" and row["conceptId"] not in inactive
            if used and row["languageCode"] == language and row["typeId"] in (FULL_NAME, SYNONYM):
                term = TAG.sub("", row["term"]) if row["typeId"] == FULL_NAME else row["term"]
                words.setdefault(row["conceptId"], {})[term] = None
    return {c: Entry(tuple(w), frozenset({c})) for c, w in words.items()}


def tabbed(
    path: Path, columns: tuple[str, ...], by: str, wanted: Collection[str]
) -> Iterator[dict[str, str]]:
    """Rows of an RF2 file whose column `by` is wanted."""
    file = lines(path)
    header = next(file, "").split("\t")
    if missing := [c for c in columns if c not in header]:
        raise ConfigError(
            f"{path} has no column {', '.join(missing)}: give a file of an RF2 release, unchanged"
        )
    for number, line in enumerate(file, 2):
        fields = line.split("\t")
        if len(fields) != len(header):
            raise ConfigError(
                f"{path} line {number} has {len(fields)} columns, its header {len(header)}: "
                "unpack the release again"
            )
        if fields[header.index(by)] in wanted:
            yield dict(zip(header, fields, strict=True))


def lines(path: Path) -> Iterator[str]:
    """Lines without their end. Raises ConfigError for what is not a text file of UTF-8 lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            while line := file.readline(LONGEST):
                if len(line) == LONGEST and not line.endswith("\n"):
                    raise ConfigError(
                        f"{path} has a line of over {LONGEST} characters: not RRF/RF2"
                    )
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); unpack the release again") from None
