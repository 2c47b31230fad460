"""How often things are done, never how long they take: encoding, compiling, talking to the host."""

import json
import logging
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
import sweep
from jax.experimental.compilation_cache import compilation_cache
from safetensors import safe_open
from variants import methods

from medclip_jax import (
    config,
    train,
)
from medclip_jax.clip import vit
from medclip_jax.data import (
    augmentation,
    phantom,
)
from medclip_jax.features import encoder
from medclip_jax.training import checkpoints, step
from medclip_jax.training import loop as training_loop
from tests.support.checkpoints import tiny_checkpoint

VARIANTS, EXPLAINED, STEPS = 2, 2, 4
# K, method, draw: `ours` and `memory` share images and variants, `mediclip` has its own
JOBS = [(1, "ours", 0), (4, "ours", 0), (4, "ours", 1), (4, "memory", 0), (3, "mediclip", 0)]


class World(NamedTuple):
    """A tiny CLIP and two data sets of other images and as many."""

    clip: Path
    sets: dict[str, Path]

    def fields(self, cache: Path, **more) -> dict:
        few = {"steps": STEPS, "log_every": 2, "synthesis.variants": VARIANTS, "score.passes": 2}
        few |= {"calibration.folds": 2, "explained": EXPLAINED, "clip.checkpoint": str(self.clip)}
        return few | {"cache": str(cache)} | more

    def run(self, workdir: Path, k: int, seed: int, data: str, cache: Path, **more) -> None:
        c = config.base(f"k={k},seed={seed}", name="folder", root=str(self.sets[data]))
        c.update_from_flattened_dict(self.fields(cache, **more))
        train.run(c, workdir)


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
    vit.encode_images.clear_cache()  # it lives as long as the process; other tests used it
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
    real, seen = encoder.encode_share, []

    def counted(feature_cache, images, n):
        seen.append(n)
        return real(feature_cache, images, n)

    monkeypatch.setattr(encoder, "encode_share", counted)
    return seen


def test_a_whole_table_encodes_every_image_and_variant_once(world, fresh, passed, tmp_path):
    args = arguments(world, tmp_path / "cache", tmp_path / "runs")
    folder = Path(sweep.__file__).parents[1] / "configs/folder.py"
    jobs = [sweep.Job(folder, *job) for job in JOBS]
    for job in jobs:
        sweep.run(args, job)
    assert sum(passed) == wanted(args, jobs) == rows_of(tmp_path / "cache" / "feature_cache")
    passed.clear()
    again = SimpleNamespace(**{**vars(args), "runs": tmp_path / "again"})
    for job in (jobs[0], jobs[-1]):
        sweep.run(again, job)
        assert sweep.done(again, job)
    assert passed == []


def arguments(world: World, cache: Path, runs: Path) -> SimpleNamespace:
    """As sweep.py's own parser gives them, as far as a run needs them."""
    fields = world.fields(cache, **{"data.root": str(world.sets["ultrasound"])})
    assignments = [f"{name}={value}" for name, value in fields.items()]
    return SimpleNamespace(runs=runs, set=assignments, fields=methods.VARIANTS)


def wanted(args, jobs) -> int:
    """Distinct images and variants of all runs, from the splits that they wrote."""
    images, variants, viewed = set(), set(), set()
    for job in jobs:
        _, k, method, _ = job
        split = json.loads((args.runs / job.name / "split.json").read_text())
        support = tuple(row["sha256"] for row in split["support"])
        images |= {*support, *(row["sha256"] for row in split["test"])}
        shared = support if method == "mediclip" else ()  # its CutPaste takes from all supports
        variants |= {(s, method == "mediclip", shared) for s in support if method != "memory"}
        viewed |= {*support} if k == 1 else set()
    gentle = len(augmentation.crops(np.zeros((8, 8), np.float32)))
    drawn = 2 * EXPLAINED  # the towers that are drawn anew, for draw 0 of every K and method
    assert len(variants) > 7 and len(viewed) == 1
    return len(images) + VARIANTS * len(variants) + gentle * len(viewed) + drawn


def rows_of(feature_cache: Path) -> int:
    """Images and variants that the feature cache holds."""
    total = 0
    for path in feature_cache.rglob("*.safetensors"):
        with safe_open(path, framework="np") as held:
            total += held.get_slice("pooled").get_shape()[0]
    return total


# --- compilations -------------------------------------------------------------------------------


def test_another_draw_data_set_or_k_finds_the_programs_compiled(world, programs, tmp_path):
    def compiled(name: str, k: int, seed: int, data: str, **more) -> Counter:
        programs.clear()
        world.run(tmp_path / name, k, seed, data, tmp_path / "cache", batch=4, **more)
        return Counter(programs)

    first = compiled("first", 4, 0, "ultrasound")
    once = ("encode_images", "step", "measured", "text_features", "passes", "total")
    assert {name: first[name] for name in once} == dict.fromkeys(once, 1)
    assert compiled("draw", 4, 1, "ultrasound") == {}
    assert compiled("data", 4, 0, "mri") == {}  # other images and another number of each kind
    more = compiled("k", 6, 0, "ultrasound")
    # what reads all supports at once is as large as K is
    of_k = {"measured": 1, "choose": 2, "search": 2}
    assert {name: more[name] for name in of_k} == of_k
    assert not (set(once) - {"measured"}) & set(more), more
    words = compiled("words", 4, 0, "mri", **{"data.conditions": ("tumour", "cyst")})
    # the prompts are part of the programs that read them: no bucket holds them
    assert {"step", "measured", "text_features"} <= set(words)
    assert not {"encode_images", "search", "choose", "to_pixels"} & set(words), words


# --- host and device ----------------------------------------------------------------------------


def test_the_training_loop_waits_for_the_device_at_log_lines_alone(world, monkeypatch, tmp_path):
    """Steps move nothing, and a logged step is read after the next one was given to the device."""
    told, make, report, save = [], step.make_step, training_loop.report, checkpoints.save

    def made(*args, **kwargs):
        step = make(*args, **kwargs)

        def guarded(*given):
            told.append("step")
            with jax.transfer_guard("disallow_explicit"):
                return step(*given)

        return guarded

    def reported(log, number, parts):
        told.append(number)
        report(log, number, parts)

    def saved(*given):
        told.append("save")
        save(*given)

    monkeypatch.setattr(step, "make_step", made)
    monkeypatch.setattr(training_loop, "report", reported)
    monkeypatch.setattr(checkpoints, "save", saved)
    fetched, get = [], jax.device_get

    def fetch(tree):
        on_device = any(isinstance(x, jax.Array) for x in jax.tree.leaves(tree))
        fetched.append(len(told)) if on_device and told and told[-1] != "save" else None
        return get(tree)

    monkeypatch.setattr(jax, "device_get", fetch)
    world.run(tmp_path / "run", 4, 0, "ultrasound", tmp_path / "cache", steps=6, explained=0)
    loop = ["step", "step", "step", 2, "step", "step", 4, "step", 6, "save"]
    assert told == loop
    # each report fetches once, and the last step is looked at before it is saved
    assert fetched == [4, 7, 9, 9]
