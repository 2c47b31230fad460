"""Findings, anatomy and modalities with their codes and synonyms: UMLS, SNOMED CT, RadLex, DO.

The shipped table (assets/ontology/*.csv) covers the shipped data sets; a code that is not known for
certain is left empty. No licensed terminology is shipped: `load` reads a user's own.
"""

import csv
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging

from medclip_jax import files, stored
from medclip_jax.errors import ConfigError
from medclip_jax.prompts import umls_snomed
from medclip_jax.prompts.tokenize import Words

KINDS = ("anatomy", "modality", "finding")
CODES = ("cui", "sctid", "rid", "doid")
COLUMNS = ("kind", "name", "synonyms", *CODES, "parent", "site", "source")
SHAPES = {
    "cui": (r"C\d{7}", "a UMLS CUI is C and seven digits"),
    "sctid": (r"[1-9]\d{5,17}", "a SNOMED CT id is 6 to 18 digits, the last a check digit"),
    "rid": (r"RID\d+", "a RadLex id is RID and digits"),
    "doid": (r"DOID:\d+", "a Disease Ontology id is DOID: and digits"),
}


class Concept(NamedTuple):
    """One row of the table. An empty code is not known, which is not the same as not existing."""

    kind: str  # KINDS
    name: str  # preferred
    synonyms: tuple[str, ...]
    cui: str  # UMLS
    sctid: str  # SNOMED CT
    rid: str  # RadLex
    doid: str  # Disease Ontology
    parent: str  # name of the broader concept; of an anatomy, what contains it
    site: str  # name of the anatomy where a finding is, or that a modality shows
    source: str  # "words: …; cui: …; sctid: …"


class Ontology(NamedTuple):
    """All concepts, and every normalised name, synonym and code of theirs."""

    concepts: tuple[Concept, ...]
    by_name: dict[str, Concept]


def load(extra: str = "") -> Ontology:
    """The shipped table, with `extra` merged in: a CSV, a MRCONSO.RRF or an RF2 folder.

    A CSV has the columns kind and name, and any of COLUMNS; synonyms are separated by "|". A row
    whose name is known adds its synonyms and replaces the codes that it has. Raises ConfigError for
    a file that does not exist, lacks a column, or has a malformed code.
    """
    folder = Path(__file__).parents[1] / "assets" / "ontology"
    concepts = []
    for file in sorted(folder.glob("*.csv")):
        concepts += rows(file.name, file.read_text("utf-8").splitlines())
    if not extra:
        return indexed(concepts)
    path = files.expanded(extra)
    if not path.exists():
        raise ConfigError(f"prompts.ontology_file {extra}: no such file; correct the path")
    if (path / "MRCONSO.RRF").is_file():
        path = path / "MRCONSO.RRF"
    if path.is_dir() or path.suffix.lower() == ".rrf":
        field, read = ("sctid", umls_snomed.snomed) if path.is_dir() else ("cui", umls_snomed.umls)
        return licensed(concepts, field, read(path, {getattr(c, field) for c in concepts} - {""}))
    try:
        lines = stored.read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); save it as UTF-8 CSV") from None
    return indexed(merge(concepts, rows(str(path), lines)))


def find(ontology: Ontology, term: str, kind: str | None = None) -> Concept:
    """The concept of a name, synonym or code; case, spaces and hyphens do not matter.

    Raises ConfigError with the nearest terms if there is none of this `kind`.
    """
    concept = ontology.by_name.get(key(term))
    if concept is not None and kind in (None, concept.kind):
        return concept
    terms = [t for t, c in ontology.by_name.items() if kind in (None, c.kind)]
    near = difflib.get_close_matches(key(term), terms, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ConfigError(
        f"the ontology has no {kind or 'concept'} {term!r}{hint}; "
        "correct the word or add it in a file named by prompts.ontology_file"
    )


def expand(
    ontology: Ontology, conditions: Sequence[str], anatomy: str, modality: str, most: int = 0
) -> Words:
    """Words for what a data set shows, at most `most` for each concept (0 = all), its own first.

    A condition is first looked up within its anatomy: "tumor" of the breast is "breast tumor".
    Raises ConfigError for an unknown word.
    """

    def words(term: str, concept: Concept) -> list[str]:
        synonyms = {key(w): w for w in (concept.name, *concept.synonyms) if key(w) != key(term)}
        return [term, *synonyms.values()][: most or None]

    of_conditions = []
    for term in conditions:
        specific = ontology.by_name.get(key(f"{anatomy} {term}"))
        if specific is None or specific.kind != "finding":
            specific = find(ontology, term, "finding")
        of_conditions += words(term, specific)
    return Words(
        tuple(words(anatomy, find(ontology, anatomy, "anatomy"))),
        tuple({key(w): w for w in of_conditions}.values()),
        tuple(words(modality, find(ontology, modality, "modality"))),
    )


def sources(concept: Concept) -> dict[str, str]:
    """Where the words and each code of a concept come from."""
    return dict(piece.split(": ", 1) for piece in concept.source.split("; ") if ": " in piece)


def key(term: str) -> str:
    """Normal form in which terms are compared."""
    return re.sub(r"[\s_-]+", " ", term).strip().casefold()


def rows(name: str, lines: Iterable[str]) -> list[Concept]:
    """Concepts of a CSV table; `name` is what error messages call it."""
    table = csv.DictReader(lines)
    try:
        header, cells = table.fieldnames or [], [(table.line_num, row) for row in table]
    except csv.Error as error:  # quotes that are not closed, and a cell without end
        raise ConfigError(
            f"{name} cannot be read as a table ({error}): close its quotes, or save it as CSV again"
        ) from None
    if missing := [c for c in ("kind", "name") if c not in header]:
        raise ConfigError(f"{name} has no column {' and '.join(missing)}: add it to the first line")
    if unknown := [c for c in header if c not in COLUMNS]:
        raise ConfigError(
            f"{name} has the unknown column {', '.join(map(str, unknown))}: "
            f"columns are {', '.join(COLUMNS)}"
        )
    return [concept(f"{name} line {line}", row) for line, row in cells]


def concept(where: str, row: dict) -> Concept:
    """One row, checked."""
    if None in row or None in row.values():
        raise ConfigError(f"{where} has more or fewer cells than the first line: quote its commas")
    cell = {c: (row.get(c) or "").strip() for c in COLUMNS}
    if cell["kind"] not in KINDS:
        raise ConfigError(f"{where}: kind is {cell['kind']!r}, give one of {', '.join(KINDS)}")
    if not cell["name"]:
        raise ConfigError(f"{where} has no name: give one")
    for field, (shape, rule) in SHAPES.items():
        code = cell[field]
        valid = re.fullmatch(shape, code, re.ASCII) and (field != "sctid" or check_digit(code))
        if code and not valid:
            raise ConfigError(f"{where}: {field} {code!r} is not a code, {rule}; correct it")
    words = tuple(w.strip() for w in cell.pop("synonyms").split("|") if w.strip())
    fields = ["words", *(f for f in CODES if cell[f])]
    source = cell.pop("source") or "; ".join(f"{f}: {where}" for f in fields)
    return Concept(**cell, synonyms=words, source=source)


def check_digit(sctid: str) -> bool:
    """Whether the Verhoeff check digit of a SNOMED CT id is right (dihedral group D5)."""
    place, total = list(range(10)), 0
    for digit in reversed(sctid):
        a, b = total, place[int(digit)]
        turned = a % 5 + b % 5 if a < 5 else a % 5 - b % 5
        total = turned % 5 + 5 * ((a < 5) != (b < 5))
        place = [place[i] for i in (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)]
    return total == 0


def merge(concepts: list[Concept], new: list[Concept]) -> list[Concept]:
    """Rows of `new` joined to those of the same kind and name, or appended."""
    merged = {(c.kind, key(c.name)): c for c in concepts}
    for c in new:
        old = merged.get((c.kind, key(c.name)))
        if old is not None:
            fields = {f: v for f in (*CODES, "parent", "site") if (v := getattr(c, f))}
            own = sources(c)
            joined = sources(old) | {f: own.get(f, c.source) for f in fields if f in CODES}
            source = "; ".join(f"{f}: {text}" for f, text in joined.items())
            c = old._replace(**fields, synonyms=(*old.synonyms, *c.synonyms), source=source)
        merged[c.kind, key(c.name)] = c
    return list(merged.values())


def indexed(concepts: list[Concept]) -> Ontology:
    """Raises ConfigError if a term names two concepts, or a parent or site is not in the table."""
    index: dict[str, Concept] = {}
    for c in concepts:
        for term in (c.name, *c.synonyms, *filter(None, (getattr(c, f) for f in CODES))):
            other = index.setdefault(key(term), c)
            if other is not c:
                raise ConfigError(
                    f"the ontology calls both {other.name!r} and {c.name!r} {term!r}: "
                    "take it from one of them in prompts.ontology_file"
                )
    for c in concepts:
        for term in filter(None, (c.parent, c.site)):
            if key(term) not in index:
                raise ConfigError(f"the ontology has no {term!r}, of which {c.name!r} is part")
    return Ontology(tuple(concepts), index)


def licensed(
    concepts: list[Concept], field: str, release: dict[str, umls_snomed.Entry]
) -> Ontology:
    """Words (and SNOMED CT ids) of a licensed release added to the concepts that carry its codes.

    A word that already names another concept is left out. Codes that the release lacks, or maps to
    another SNOMED CT id than the table, are logged as warnings.
    """
    taken = set(indexed(concepts).by_name)
    merged = []
    for c in concepts:
        entry = release.get(code := getattr(c, field))
        if entry is None:
            if code:
                logging.warning("the release does not know %s (%s)", code, c.name)
            merged.append(c)
            continue
        new = {key(w): w for w in entry.words if key(w) not in taken}
        taken |= set(new)
        c = c._replace(synonyms=(*c.synonyms, *new.values()))
        if c.sctid and entry.sctids and c.sctid not in entry.sctids:
            logging.warning(
                "the release maps %s (%s) to SNOMED CT %s, the table to %s",
                *(c.name, c.cui, ", ".join(sorted(entry.sctids)), c.sctid),
            )
        elif not c.sctid and len(entry.sctids) == 1 and not entry.sctids & taken:
            taken |= entry.sctids
            (sctid,) = entry.sctids
            c = c._replace(sctid=sctid, source=f"{c.source}; sctid: UMLS MRCONSO")
        merged.append(c)
    return indexed(merged)
