"""How often things are done, never how long they take: encoding, compiling, talking to the host."""

import gc
import logging
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from safetensors import safe_open

from medclip_jax import config, train
from medclip_jax.data import phantom
from medclip_jax.features import encoder
from medclip_jax.training import checkpoints, loop, step
from tests.support.checkpoints import tiny_checkpoint

VARIANTS = 2
# single operations, compiled at once for each shape that comes by
SMALL = {"slice", "dynamic_slice", "gather", "concatenate", "reshape", "squeeze"}
# K, method, seed: `ours` and `memory` share images and variants, `mediclip` has its own
JOBS = [(4, "ours", 0), (4, "ours", 1), (4, "memory", 0), (4, "mediclip", 0)]


class World(NamedTuple):
    """A tiny CLIP and two data sets of other images and as many."""

    clip: Path
    sets: dict[str, Path]

    def fields(self, arguments: str, data: str, cache: Path, **more) -> ConfigDict:
        c = config.base(arguments, name="folder", root=str(self.sets[data]))
        few = {"steps": 2, "synthesis.variants": VARIANTS, "score.passes": 2, "validations": 0}
        few |= {"clip.checkpoint": str(self.clip), "explained": 0, "cache": str(cache)}
        c.update_from_flattened_dict(few | more)
        return c

    def run(self, workdir: Path, *given, **more) -> None:
        train.run(self.fields(*given, **more), workdir, report=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    base = tmp_path_factory.mktemp("counts")
    clip, *_ = tiny_checkpoint(base / "clip")
    kinds = {"ultrasound": (6, 3, 4), "mri": (6, 4, 3)}
    sets = {m: phantom.write_folder(base / m, m, 0, 64, *n) for m, n in kinds.items()}
    return World(clip, sets)


@pytest.fixture
def fresh(tmp_path):
    """A cache of compiled programs of this test's own."""
    names = "compilation_cache_dir", "persistent_cache_min_compile_time_secs"
    names += ("persistent_cache_min_entry_size_bytes",)
    before = {f"jax_{n}": getattr(jax.config, f"jax_{n}") for n in names}
    for name, value in zip(before, (str(tmp_path / "xla"), 0, -1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def programs(fresh):
    """Names of all programs that the cache lacked, in order."""
    lacked, log = Lacked(), logging.getLogger("jax._src.compiler")
    before = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(lacked)
    jax.clear_caches()  # they live as long as the process; other tests filled them
    yield lacked.names
    log.removeHandler(lacked)
    log.setLevel(before[0])
    log.propagate = before[1]


class Lacked(logging.Handler):
    """Names of programs that JAX's persistent cache did not hold: each had to be compiled."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"CACHE MISS for 'jit_(\w+)'", record.getMessage())
        self.names += [found[1]] if found else []


# --- images through the encoder -----------------------------------------------------------------


@pytest.fixture
def passed(monkeypatch) -> list[int]:
    """Images of each call of the encoder, without those that fill a batch up."""
    real, seen = encoder._encode_shares, []

    def counted(feature_cache, shares):
        return real(feature_cache, ((images, seen.append(n) or n) for images, n in shares))

    monkeypatch.setattr(encoder, "_encode_shares", counted)
    return seen


def test_a_whole_table_encodes_every_image_and_variant_once(world, passed, tmp_path):
    """All of it before anything is learned: what comes after a job's encoding encodes nothing."""

    def encoded(job) -> train.Prepared:
        k, method, seed = job
        arguments = f"k={k},method={method},seed={seed}"
        prepared = train.prepare(world.fields(arguments, "ultrasound", tmp_path / "cache"))
        train.encode(prepared)
        return prepared

    images, variants = set(), set()
    for job in JOBS:
        split = encoded(job).split
        support = tuple(r.sha256 for r in split.support)
        images |= {*support, *(r.sha256 for r in split.test)}
        shared = support if job[1] == "mediclip" else ()  # its CutPaste takes from all supports
        variants |= {(s, shared) for s in support if job[1] != "memory"}
    assert len(variants) > 7
    wanted = len(images) + VARIANTS * len(variants)
    assert sum(passed) == wanted == rows_of(tmp_path / "cache" / "feature_cache")
    passed.clear()
    encoded(JOBS[-1])
    world.run(tmp_path / "run", "k=4,method=ours,seed=0", "ultrasound", tmp_path / "cache")
    assert passed == []


def rows_of(feature_cache: Path) -> int:
    """Images and variants that the feature cache holds."""
    total = 0
    for path in feature_cache.rglob("*.safetensors"):
        with safe_open(path, framework="np") as arrays:
            total += arrays.get_slice("pooled").get_shape()[0]
    return total


# --- compilations -------------------------------------------------------------------------------


def held() -> int:
    """Bytes of all arrays on the devices."""
    return sum(x.nbytes for x in jax.live_arrays())


def test_another_draw_or_data_set_finds_the_programs_compiled(world, programs, tmp_path):
    """And no run leaves arrays behind, of which a process that makes many would die."""

    def compiled(name: str, seed: int, data: str) -> Counter:
        programs.clear()
        world.run(tmp_path / name, f"k=4,seed={seed}", data, tmp_path / "cache")
        gc.collect()
        assert held() <= before
        return Counter(name for name in programs if name not in SMALL)

    gc.collect()
    before = held()

    first = compiled("first", 0, "ultrasound")
    assert first["step"] == 1 and len(first) > 5, first
    # other supports, images and another number of each kind
    assert compiled("draw and data", 1, "mri") == {}


# --- host and device ----------------------------------------------------------------------------


def test_the_training_loop_reads_from_the_device_at_log_lines_alone(world, monkeypatch, tmp_path):
    """Steps move nothing, and a logged step is read after the next one was given to the device."""
    events, make, save = [], step.make_step, checkpoints.save
    flush = loop._DelayedLog.flush

    def made(*args, **kwargs):
        lower = make(*args, **kwargs).lower

        def compiled(*shapes):
            take_step = lower(*shapes).compile()

            def guarded(*given):
                events.append("step")
                with jax.transfer_guard("disallow_explicit"):
                    return take_step(*given)

            return guarded

        return SimpleNamespace(lower=lambda *x: SimpleNamespace(compile=lambda: compiled(*x)))

    def flushed(log):
        if log._waiting is not None:
            events.append(log._waiting[0])
        flush(log)

    def saved(*given):
        events.append("save")
        save(*given)

    monkeypatch.setattr(step, "make_step", made)
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    monkeypatch.setattr(loop._DelayedLog, "flush", flushed)
    monkeypatch.setattr(checkpoints, "save", saved)
    fetched, get = [], jax.device_get

    def fetch(tree):
        on_device = any(isinstance(x, jax.Array) for x in jax.tree.leaves(tree))
        fetched.append(len(events)) if on_device and events and events[-1] != "save" else None
        return get(tree)

    monkeypatch.setattr(jax, "device_get", fetch)
    waits, wait = [], jax.block_until_ready

    def waiting(tree):
        waits.append((events.count("step"), tree is None)) if "step" in events else None
        return wait(tree)

    monkeypatch.setattr(jax, "block_until_ready", waiting)
    world.run(tmp_path / "run", "k=4", "ultrasound", tmp_path / "cache", steps=6)
    # when a step was given to the device the one before it is waited for: two are in memory
    assert waits[:6] == [(1, True), *((step, False) for step in range(2, 7))]
    assert events == ["step", "step", "step", 2, "step", "step", 4, "step", 6, "save"]
    # each log line fetches once, and the last step is looked at before it is saved
    assert fetched == [4, 7, 9, 9]
