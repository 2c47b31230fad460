"""The pages: every file is in the navigation, every message quoted is one that the code can say."""

import re

from tests.support.paths import ROOT

DOCS = ROOT / "docs"


def source() -> str:
    return "\n".join(p.read_text() for p in (ROOT / "medclip_jax").rglob("*.py"))


def test_every_page_is_in_the_navigation_and_there():
    named = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert named == {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}


def test_troubleshooting_quotes_ten_messages_of_the_code():
    page, code = (DOCS / "troubleshooting.md").read_text(), source()
    quoted = re.findall(r"^\*\*`error: (.*)`\*\*$", page, re.M)
    assert len(quoted) == 10
    ends = [  # what follows the last value in each, as it stands in the code
        *("cannot be read: give one that exists", "(see --help)", "healthy images where K = "),
        *("replace or remove it", "give a mask drawn on "),
        *("or the settings it began with", "wait until it ends or give another --workdir"),
        *("or use 'compact'", "run --mode train with this workdir"),
        "give files, folders or glob patterns",
    ]
    for said, end in zip(quoted, ends, strict=True):
        assert end in said and end in code, said


def test_api_pages_name_modules_that_are_there():
    named = [
        m for p in (DOCS / "api").glob("*.md") for m in re.findall(r"::: (\S+)", p.read_text())
    ]
    assert len(named) > 10
    for module in named:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
