"""Eight fake devices, strict ranks, and the reference fixtures."""

import os
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # tests compile more than they compute

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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random CLIP of 32 x 32 pixels, 4 x 4 patches and four blocks; levels 1 and 4 are tapped."""
    from medclip_jax.clip import vit

    from .test_clip import tiny_checkpoint

    folder, *_ = tiny_checkpoint(tmp_path_factory.mktemp("clip") / "tiny")
    return vit.load(str(folder), levels=(1, 4))


@pytest.fixture(scope="session")
def compact():
    """The embedded CLIP."""
    from medclip_jax.clip import vit

    return vit.load("compact")


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    """Path of a parity fixture -> (its arrays, its CLIP), each read once."""
    from medclip_jax.clip import vit

    from .test_clip import with_tokenizer

    @cache
    def read(path: Path):
        ref = dict(np.load(path))
        folder = path.parent / f"clip{path.stem.removeprefix('parity')}"
        whole = with_tokenizer(folder, tmp_path_factory.mktemp("peer") / "clip")
        return ref, vit.load(str(whole), levels=tuple(ref["out_layers"].tolist()))

    return read
