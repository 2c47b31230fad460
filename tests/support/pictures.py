"""Small images on disk and a feature cache for them."""

import functools
import hashlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from medclip_jax.clip import checkpoint
from medclip_jax.data import augmentation
from medclip_jax.data.layouts import Record
from medclip_jax.distributed import sharding
from medclip_jax.features import cache, encoder

SYNTHESIS = augmentation.Synthesis("medclip", 2, 0, "self")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Nine different images of 40 x 30 pixels."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 9)


def write_pictures(folder: Path, n: int, start: int = 0) -> list[Record]:
    rng = np.random.default_rng(start)
    records = []
    for i in range(n):
        rough = rng.integers(60, 200, (6, 8)).astype(np.uint8)
        Image.fromarray(rough).resize((40, 30)).save(folder / f"{start + i}.png")
        records.append(record_of(folder / f"{start + i}.png"))
    return records


def record_of(path: Path, label: int = 0, masks: tuple[Path, ...] = ()) -> Record:
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    return Record(path.name, label, "", path, masks, sha)


@functools.cache
def one_device():
    return sharding.mesh(jax.devices()[:1])


def opened(folder: Path, tiny, fit="stretch", dtype="float32", mesh=None) -> cache.FeatureCache:
    return cache.open(folder, tiny, fit, dtype, mesh or one_device())


@pytest.fixture
def feature_cache(tmp_path, tiny):
    return opened(tmp_path, tiny)


@pytest.fixture
def calls(monkeypatch):
    """How many batches the image encoder has seen."""
    seen = []
    real = checkpoint.encode_images
    monkeypatch.setattr(
        checkpoint, "encode_images", lambda *a, **k: seen.append(1) or real(*a, **k)
    )
    return seen


def everything(feature_cache, records) -> encoder.Features:
    (got,) = cache.load_images(feature_cache, records, len(records))
    return got
