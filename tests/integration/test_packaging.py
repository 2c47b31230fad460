"""What an installed copy needs: every package, every asset, the console script, every pin."""

import importlib
import tomllib
from importlib import metadata

from tests.support.packaging import pins, plain
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_wheel_lists_every_folder_of_code():
    folders = {p.parent for p in (ROOT / "medclip_jax").rglob("*.py")}
    code = {".".join(f.relative_to(ROOT).parts) for f in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == code | {"medclip_jax.configs"}


def test_the_wheel_takes_every_other_file_along():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["medclip_jax"]
    taken = {p for pattern in patterns for p in (ROOT / "medclip_jax").glob(pattern)}
    others = {p for p in (ROOT / "medclip_jax").rglob("*") if p.is_file() and p.suffix != ".py"}
    others = {p for p in others if "__pycache__" not in p.parts}
    assert len(others) > 10 and others <= taken


def test_console_scripts_name_what_is_there():
    for target in PROJECT["project"]["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_every_dependency_is_pinned_within_its_bounds():
    from packaging.requirements import Requirement

    extras = PROJECT["project"]["optional-dependencies"]
    asked = PROJECT["project"]["dependencies"] + extras["test"] + extras["docs"] + extras["jpeg"]
    stored = {plain(name): version for name, version in pins().items()}
    for line in asked:
        wanted = Requirement(line)
        version = stored.get(plain(wanted.name))
        assert version, f"constraints.txt lacks {wanted.name}"
        assert wanted.specifier.contains(version, prereleases=True), line


def test_what_they_need_in_turn_is_pinned_too():
    """Of what is installed here: the whole tree below the core has exact versions."""
    from packaging.requirements import Requirement

    stored, queue = {plain(name) for name in pins()}, list(PROJECT["project"]["dependencies"])
    seen: set[str] = set()
    while queue:
        wanted = Requirement(queue.pop())
        name = plain(wanted.name)
        if name in seen or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        queue += metadata.requires(wanted.name) or []
    assert len(seen) > 60 and seen <= stored, seen - stored
