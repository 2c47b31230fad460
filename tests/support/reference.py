"""Where the reference fixtures and real data are."""

import os
from pathlib import Path

import pytest

from tests.support.paths import REFERENCE, ROOT


def reference_folders() -> list[Path]:
    """Where fixtures may be: $MEDCLIP_REFERENCE or beside the checkout, then the copies here."""
    named = os.environ.get("MEDCLIP_REFERENCE")
    full = Path(named) if named else ROOT.parent / "shared" / "reference"
    return [p for p in (full, REFERENCE) if p.is_dir()]


def reference_files(pattern: str) -> list[Path]:
    """Every fixture that matches, each name once, full folder first."""
    result: dict[str, Path] = {}
    for folder in reference_folders():
        for path in sorted(folder.glob(pattern)):
            result.setdefault(str(path.relative_to(folder)), path)
    return list(result.values())


def reference_params(*patterns: str) -> list:
    """The fixtures as test parameters; a pattern without files is one test, skipped by name."""
    params = []
    for pattern in patterns:
        result = reference_files(pattern)
        params += [pytest.param(p, id=f"{p.parent.name}/{p.stem}") for p in result]
        if not result:
            why = f"no {pattern} in tests/reference (files below 1 MB): set MEDCLIP_REFERENCE"
            params.append(pytest.param(None, id=pattern, marks=pytest.mark.skip(reason=why)))
    return params


def data_files(pattern: str) -> list:
    """Files of others, in $MEDCLIP_DATA or beside the checkout; one skipped test where absent."""
    named = os.environ.get("MEDCLIP_DATA")
    root = Path(named) if named else ROOT.parent / "shared" / "data"
    result = [pytest.param(p, id=p.name) for p in sorted(root.glob(pattern)) if p.is_file()]
    skip = pytest.mark.skip(reason=f"no {pattern}: set MEDCLIP_DATA")
    return result or [pytest.param(None, marks=skip)]
