"""Eight fake devices, strict ranks, and the reference fixtures."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

HERE = Path(__file__).parent


def reference_folders() -> list[Path]:
    """Where fixtures may be: $MEDCLIP_REFERENCE or beside the checkout, then the copies here."""
    named = os.environ.get("MEDCLIP_REFERENCE")
    full = Path(named) if named else HERE.parents[1] / "shared" / "reference"
    return [p for p in (full, HERE / "reference") if p.is_dir()]


def reference_files(pattern: str) -> list[Path]:
    """Every fixture that matches, each name once, full folder first."""
    found: dict[str, Path] = {}
    for folder in reference_folders():
        for path in sorted(folder.glob(pattern)):
            found.setdefault(str(path.relative_to(folder)), path)
    return list(found.values())


def reference_params(*patterns: str) -> list:
    """The fixtures as test parameters; a pattern without files is one test, skipped by name."""
    params = []
    for pattern in patterns:
        found = reference_files(pattern)
        params += [pytest.param(p, id=f"{p.parent.name}/{p.stem}") for p in found]
        if not found:
            why = f"no {pattern} in tests/reference (files below 1 MB): set MEDCLIP_REFERENCE"
            params.append(pytest.param(None, id=pattern, marks=pytest.mark.skip(reason=why)))
    return params


@pytest.fixture
def key():
    return jax.random.key(0)
