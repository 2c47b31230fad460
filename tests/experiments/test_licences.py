"""What we bring along is permissive, and docs/licences.md says so of what is pinned."""

import licences
import pytest

from tests.support.packaging import pins, plain
from tests.support.paths import ROOT


def test_the_core_is_permissive():
    packages = licences.tree(licences.core())
    assert len(packages) > 60
    assert [p for p in packages if not licences.is_permissive(p.licence)] == []


def test_the_page_names_the_core():
    rows = (ROOT / "docs" / "licences.md").read_text().splitlines()
    listed = {plain(row.split("|")[1].strip()) for row in rows if row.startswith("| ")}
    asked = {plain(p.name) for p in licences.tree(licences.core())}
    assert asked <= listed and "pylibjpeg-libjpeg" not in listed
    stored = {plain(name): version for name, version in pins().items()}
    cells = [row.split("|")[1:3] for row in rows if row.startswith("| ") and "version" not in row]
    for name, version in cells:
        assert stored[plain(name.strip())] == version.strip()


@pytest.mark.parametrize(
    "said, good",
    [
        ("MIT", True),
        ("Apache-2.0 AND CNRI-Python", True),
        ("BSD License", True),
        ("GPL-3.0-or-later", False),
        ("GNU General Public License v3 (GPLv3)", False),
        ("MIT AND LGPL-2.1", False),
        ("permitted to all", False),
        ("not stated", False),
    ],
)
def test_a_licence_is_read(said, good):
    assert licences.is_permissive(said) == good


@pytest.mark.parametrize("flag, code", [("--help", 0), ("--foo", 2)])
def test_no_flag_writes_the_page(flag, code, monkeypatch):
    monkeypatch.setattr("sys.argv", ["licences.py", flag])
    monkeypatch.setattr(licences, "tree", None)  # is not asked
    with pytest.raises(SystemExit) as ended:
        licences.main()
    assert ended.value.code == code
