"""Write docs/licences.md: every package that the core needs, with version and licence.

python experiments/licences.py

Read from the metadata of what is installed, the way pip saw it; nothing is looked up elsewhere.
"""

import argparse
import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import command
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PERMISSIVE = re.compile(
    r"\b(apache|mit|bsd|isc|psf|python software|0bsd|hpnd|cnri|zlib|mpl|mozilla|cc0|mit-cmu)\b",
    re.I,
)  # MPL is weak copyleft: file by file, and we change none of theirs
COPYLEFT = re.compile(r"\b[al]?gpl|general public|eupl|cc.by.sa", re.I)


class Package(NamedTuple):
    """One installed package."""

    name: str
    version: str
    licence: str
    needed_by: str


def tree(roots: list[str]) -> list[Package]:
    """The packages that requirement lines need, directly or not, by name; absent extras are not
    followed. Raises PackageNotFoundError for one that is not installed."""
    found: dict[str, Package] = {}
    queue = [(line, "medclip-jax") for line in roots]
    while queue:
        line, parent = queue.pop(0)
        wanted = Requirement(line)
        key = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        if key in found:
            continue
        package = metadata.distribution(wanted.name)
        found[key] = Package(
            package.metadata["Name"], package.version, licence(package.metadata), parent
        )
        extras = [{"extra": extra} for extra in sorted(wanted.extras)]
        for below in package.requires or []:
            marker = Requirement(below).marker
            if any(marker is not None and marker.evaluate(extra) for extra in extras):
                below = below.partition(";")[0]  # the extra is wanted
            queue.append((below, package.metadata["Name"]))
    return [found[name] for name in sorted(found)]


def licence(about) -> str:
    """One line: the expression, else the classifiers, else the first line of the free text."""
    if about.get("License-Expression"):
        return about["License-Expression"]
    named = [
        c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if "License ::" in c
    ]
    if [n for n in named if n != "OSI Approved"]:
        return " AND ".join(sorted(set(named) - {"OSI Approved"}))
    return (about.get("License") or "").strip().partition("\n")[0] or "not stated"


def is_permissive(text: str) -> bool:
    return bool(PERMISSIVE.search(text)) and not COPYLEFT.search(text)


def core() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def page(packages: list[Package]) -> str:
    """The table in Markdown."""
    rows = [f"| {p.name} | {p.version} | {p.licence} | {p.needed_by} |" for p in packages]
    return "\n".join(
        [
            "# Licences of the dependencies",
            "",
            f"The {len(packages)} packages that medclip_jax brings along, as their own metadata",
            "state it. All are permissive (MPL-2.0: file by file). The extra `jpeg`",
            "(pylibjpeg-libjpeg, GPL-3) is not among them; who installs it takes on its terms.",
            "Written by `python experiments/licences.py`.",
            "",
            "| package | version | licence | needed by |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    packages, path = tree(core()), ROOT / "docs" / "licences.md"
    path.write_text(page(packages))
    others = [p for p in packages if not is_permissive(p.licence)]
    said = f"{path}: {len(packages)} packages, {len(others)} not permissive"
    print(said, *others, sep="\n  ")


if __name__ == "__main__":
    command.run(main)
