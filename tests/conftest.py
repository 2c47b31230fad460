"""Eight fake devices, strict ranks, the CLIPs that tests share; `support` holds the rest."""

import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
pytest_plugins = [  # a plugin that imports another comes after it
    "tests.support.pictures",
    "tests.support.pools",
    "tests.support.runs",
    "tests.support.scenes",
    "tests.support.ensembles",
]

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # tests compile more than they compute


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random CLIP of 32 x 32 pixels, 4 x 4 patches and four blocks; levels 1 and 4 are tapped."""
    from medclip_jax.clip import vit
    from tests.support.checkpoints import tiny_checkpoint

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
    from tests.support.checkpoints import with_tokenizer

    @cache
    def read(path: Path):
        ref = dict(np.load(path))
        folder = path.parent / f"clip{path.stem.removeprefix('parity')}"
        whole = with_tokenizer(folder, tmp_path_factory.mktemp("peer") / "clip")
        return ref, vit.load(str(whole), levels=tuple(ref["out_layers"].tolist()))

    return read
