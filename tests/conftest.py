"""Four fake devices, strict ranks, one cache of compiled programs; fixtures are in `support`."""

import gc
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
pytest_plugins = [  # a plugin that imports another comes after it
    "tests.support.pictures",
    "tests.support.pools",
    "tests.support.dicom_objects",
    "tests.support.runs",
    "tests.support.scenes",
    "tests.support.ensembles",
]

# Tests compile more than they compute. Programs are kept between runs, and shared by the workers
# and by the processes that tests start: those read the environment, this one its settings.
USER_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
COMPILED = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(USER_CACHE / "medclip_jax" / "test_programs")
)
SETTINGS = {
    "jax_compilation_cache_dir": COMPILED,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_disable_most_optimizations": True,
    "jax_num_cpu_devices": 4,  # also in processes: what they compile serves these workers
}
# XLA's older emitters compile these small programs in two thirds of the time
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
for name, value in SETTINGS.items():
    os.environ[name.upper()] = str(int(value) if isinstance(value, bool) else value)
    jax.config.update(name, value)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Files that take longest start first, so that the workers of `--dist loadfile` end together.
FIRST = (
    *("integration/test_end_to_end", "integration/test_processes", "integration/test_methods"),
    *("synthesis/test_generate", "integration/test_counts", "models/test_text_adapter"),
    *("training/test_maml_exact", "inference/test_predict_stop", "experiments/test_pretrain"),
)


def pytest_collection_modifyitems(items):
    place = {f"{name}.py": i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(str(item.path.relative_to(ROOT / "tests")), len(FIRST)))


def pytest_collection_finish():
    """What is imported stays: the collector, which JAX's tracing keeps busy, passes over it."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def read_only(tmp_path):
    """Another place of a folder, where root cannot write either."""
    place = tmp_path / "read-only"

    def mount(folder: Path) -> Path:
        place.mkdir()
        for options in (["--bind", str(folder)], ["-o", "remount,ro,bind"]):
            done = subprocess.run(["mount", *options, str(place)], capture_output=True)
            if done.returncode:
                pytest.skip("folders cannot be mounted here")
        return place

    yield mount
    if place.exists():
        subprocess.run(["umount", str(place)], capture_output=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random CLIP of 32 x 32 pixels, 4 x 4 patches and four blocks; levels 1 and 4 are tapped."""
    from medclip_jax.clip import checkpoint
    from tests.support.checkpoints import tiny_checkpoint

    folder, *_ = tiny_checkpoint(tmp_path_factory.mktemp("clip") / "tiny")
    return checkpoint.load(str(folder), layers=(1, 4))


@pytest.fixture(scope="session")
def compact():
    """The embedded CLIP."""
    from medclip_jax.clip import checkpoint

    return checkpoint.load("compact")


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    """Path of a parity fixture -> (its arrays, its CLIP), each read once."""
    from medclip_jax.clip import checkpoint
    from tests.support.checkpoints import with_tokenizer

    @cache
    def read(path: Path):
        ref = dict(np.load(path))
        folder = path.parent / f"clip{path.stem.removeprefix('parity')}"
        whole = with_tokenizer(folder, tmp_path_factory.mktemp("peer") / "clip")
        return ref, checkpoint.load(str(whole), layers=tuple(ref["out_layers"].tolist()))

    return read
