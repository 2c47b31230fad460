"""Pools, splits, near-duplicates and stored splits: on folders the tests make, and real sets."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medclip_jax.data import datasets, layouts, near_duplicates, splits
from medclip_jax.data.layouts import Record, Split
from medclip_jax.errors import ConfigError, DataError, WorkdirError
from tests.support.folders import REAL, png, real

# ---------------------------------------------------------------- pools and splits


def test_supports_are_nested_healthy_and_apart_from_test(busi, cache):
    records = datasets.load("busi", busi, cache)
    big = splits.split(records, 8, seed=3, pool_size=8)
    for k in range(1, 9):
        small = splits.split(records, k, seed=3, pool_size=8)
        assert small.support == big.support[:k] and small.test == big.test
    assert all(r.label == 0 for r in big.support)
    assert not set(big.support) & set(big.test)
    assert [sum(r.label == label for r in big.test) for label in (0, 1)] == [4, 8]
    assert [r.id for r in big.test] == sorted((r.id for r in big.test), key=layouts.natural)


def test_draws_repeat_by_seed_and_differ_between_seeds(busi, cache):
    records = datasets.load("busi", busi, cache)
    draws = [splits.split(records, 4, seed, pool_size=8) for seed in range(6)]
    assert draws[2] == splits.split(records, 4, 2, pool_size=8)
    assert len({frozenset(r.id for r in d.support) for d in draws}) > 3
    assert len({frozenset(r.id for r in d.test) for d in draws}) > 3  # the pool itself is drawn


def test_folder_keeps_its_own_parts(folder, cache):
    records = datasets.load("folder", folder, cache)
    drawn = splits.split(records, 6, seed=0)
    assert {r.part for r in drawn.support} == {"train"} and {r.part for r in drawn.test} == {"test"}
    assert len(drawn.test) == 18
    assert splits.split(records, 2, seed=0).support == drawn.support[:2]


def test_k_beyond_the_pool_names_the_largest(busi, folder, cache):
    records = datasets.load("busi", busi, cache)
    for k in (-1, 9):
        with pytest.raises(ConfigError, match="give K from 0 to 8"):
            splits.split(records, k, 0, pool_size=8)
    with pytest.raises(ConfigError, match="give K from 0 to 6"):
        splits.split(datasets.load("folder", folder, cache), 7, 0)
    with pytest.raises(DataError, match="no healthy image"):
        splits.split(records, 4, 0, pool_size=32)
    with pytest.raises(ConfigError, match="give one of peer"):
        splits.split(records, 4, 0, kind="other")


def test_duplicates_between_support_and_test_are_counted_and_warned_of(folder, cache, caplog):
    copied = (folder / "train" / "good" / "2.png").read_bytes()
    (folder / "test" / "stain" / "4.png").write_bytes(copied)
    drawn = splits.split(datasets.load("folder", folder, cache), 6, 0)
    assert splits.duplicates(drawn) == (("train/good/2.png", "test/stain/4.png"),)
    assert "1 of the 6 support images" in caplog.text


def test_split_file_round_trip_and_refusal(busi, cache, tmp_path):
    records = datasets.load("busi", busi, cache)
    drawn = splits.split(records, 4, 1, pool_size=8)
    path = tmp_path / "split.json"
    splits.write_split(drawn, path, name="busi", seed=1)
    assert [p.name for p in tmp_path.glob("split.json*")] == ["split.json"]
    stored = json.loads(path.read_text())
    assert [stored[x] for x in ("dataset", "kind", "k", "seed")] == ["busi", "peer", 4, 1]
    assert stored["support"] == [
        {"id": r.id, "sha256": r.sha256, "label": r.label} for r in drawn.support
    ]
    splits.check_split(path, drawn)

    other = splits.split(records, 4, 2, pool_size=8)
    with pytest.raises(DataError, match="in support, .* stands in the file where the data have"):
        splits.check_split(path, other)
    changed = drawn._replace(test=(*drawn.test[:-1], drawn.test[-1]._replace(sha256="0" * 64)))
    with pytest.raises(DataError) as caught:
        splits.check_split(path, changed)
    assert f"in test, {drawn.test[-1].id} has other bytes" in str(caught.value)
    with pytest.raises(DataError, match=f"{drawn.test[-1].id[:6]}.* is in the file only"):
        splits.check_split(path, drawn._replace(test=drawn.test[:-1]))
    relabelled = drawn._replace(test=(drawn.test[0]._replace(label=0), *drawn.test[1:]))
    with pytest.raises(DataError, match="another label"):
        splits.check_split(path, relabelled)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"support": 3, "test": []}', "\x00"])
def test_split_file_that_is_none(tmp_path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(DataError, match="not a stored split"):
        splits.check_split(tmp_path / "split.json", Split((), ()))
    with pytest.raises(DataError, match="cannot be read"):
        splits.check_split(tmp_path / "gone.json", Split((), ()))


def test_split_write_that_fails_leaves_the_old_file(busi, cache, tmp_path, monkeypatch):
    drawn = splits.split(datasets.load("busi", busi, cache), 4, 1, pool_size=8)
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"old": 1}))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.os, "replace", full)
    with pytest.raises(WorkdirError, match="No space left"):
        splits.write_split(drawn, path, name="busi", seed=1)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.glob("split.json*")] == ["split.json"]


# ---------------------------------------------------------------- near-duplicates


def rows(*vectors) -> np.ndarray:
    return np.stack(
        [near_duplicates.normalised(np.reshape(v, (24, 24)).astype(float)) for v in vectors]
    )


def test_groups_are_closed_and_bounded_blocks_change_nothing():
    rng = np.random.default_rng(0)
    a, noise = rng.normal(size=576), rng.normal(size=(3, 576))
    chain = [a, a + 0.2 * noise[0], a + 0.2 * noise[0] + 0.2 * noise[1]]
    far = rng.normal(size=(4, 576))
    found = rows(far[0], *chain, far[1], far[1] * 3 + 7, *far[2:], np.ones(576), np.ones(576))
    assert (
        found[1] @ found[3]
        < near_duplicates.THRESHOLD
        < min(found[1] @ found[2], found[2] @ found[3])
    )
    expected = [0, 1, 1, 1, 2, 2, 3, 4, 5, 6]  # contrast-free images are no near-duplicates
    for cells in (1, 7, 30, 2**24):
        assert near_duplicates.correlated(found, cells=cells).tolist() == expected


def test_merged_partitions_are_transitive():
    assert near_duplicates.merge([0, 0, 1, 2, 3], list("abbcd")).tolist() == [0, 0, 0, 1, 2]


def record(n, label=0, part="", sha=None, patient="") -> Record:
    return Record(f"{n}", label, part, Path(f"/{n}"), (), sha or f"sha{n}", patient)


def test_clean_split_drops_contradictions_and_copies_and_keeps_groups_apart():
    records = [record(n) for n in range(20)]
    records[1] = record(1, sha="sha0")  # a copy
    records += [record(20, 1), record(21, 1, sha="sha2"), record(22, 1), record(23, 1, patient="p")]
    records[5] = record(5, patient="p")  # healthy film of a patient with another that is not
    groups = np.arange(24)
    groups[[1, 21, 22, 8]] = 0, 2, 3, 7  # 21 = 2 and 22 ~ 3 contradict; 8 ~ 7
    for seed in range(5):
        pool, test = splits.clean(records, seed, groups)
        pool_ids, test_ids = {r.id for r in pool}, {r.id for r in test}
        assert not (pool_ids | test_ids) & {"1", "2", "21", "3", "22"}
        assert {"5", "20", "23"} <= test_ids and not pool_ids & test_ids
        assert len(pool) == 7 and all(r.label == 0 for r in pool)  # of 15 healthy groups
        assert {"7", "8"} <= test_ids or not {"7", "8"} & test_ids
        assert "8" not in pool_ids  # one image per group
        assert [r.id for r in test] == sorted(test_ids, key=int)
    assert len({frozenset(r.id for r in splits.clean(records, s, groups)[0]) for s in range(5)}) > 3


def test_clean_split_of_parts_keeps_the_test_part_and_thins_the_pool():
    train = [record(n, part="train") for n in range(6)]
    test = [record(10 + n, n % 2, "test") for n in range(4)]
    train[2] = record(2, part="train", patient="p")
    test[3] = record(13, 1, "test", patient="p")
    groups = np.arange(10)
    groups[[6, 1]] = 0, 1
    groups[5] = groups[4]
    pool, kept = splits.clean([*train, *test], 0, groups)
    assert sorted(r.id for r in pool) == ["1", "3", "4"] and kept == test


def test_peer_split_keeps_patients_apart():
    train = [record(n, part="train", patient=f"p{n % 3}") for n in range(6)]
    test = [record(9, 0, "test", patient="p1"), record(10, 1, "test", patient="p9")]
    pool, kept = splits.peer([*train, *test], 0, 32)
    assert {r.patient for r in pool} == {"p0", "p2"} and kept == test
    loose = [record(n, patient=f"p{n % 5}") for n in range(20)]
    pool, kept = splits.peer([*loose, record(99, 1)], 0, 4)
    assert len(pool) == 4 and not splits.patients(pool) & splits.patients(kept) and kept


def test_units_join_copies_and_patients_alike_in_every_draw(busi, folder, cache):
    """A copy in other bytes has the unit of its original; with parts only the test part counts."""
    with Image.open(busi / "normal" / "normal (1).png") as original:
        original.convert("RGB").save(busi / "benign" / "benign (77).png")
        Image.new("L", original.size).save(busi / "benign" / "benign (77)_mask.png")
    records = datasets.load("busi", busi, cache)
    records = [r._replace(patient="p") if "malignant" in r.id else r for r in records]
    everything = {r.id: r.unit for r in splits.with_units(records, records, cache)}
    assert everything["normal/normal (1).png"] == everything["benign/benign (77).png"]
    malignant = {unit for name, unit in everything.items() if "malignant" in name}
    assert len(malignant) == 1 and len(set(everything.values())) < len(everything) - 1
    for seed in range(3):
        test = splits.split(records, 1, seed, pool_size=4).test
        assert test and all(r.unit == -1 for r in test)
        assert all(everything[r.id] == r.unit for r in splits.with_units(test, records, cache))
    records = datasets.load("folder", folder, cache)
    test = splits.with_units(splits.split(records, 2, 0).test, records, cache)
    assert {r.unit for r in test} <= set(range(len(test)))


def test_clean_split_of_files(busi, cache, caplog):
    twin = busi / "normal" / "normal (1).png"
    (busi / "malignant" / "malignant (1).png").write_bytes(twin.read_bytes())
    records = datasets.load("busi", busi, cache)
    drawn = splits.split(records, 4, 0, kind="clean", cache=cache)
    used = {r.id for part in drawn for r in part}
    assert not used & {"normal/normal (1).png", "malignant/malignant (1).png"}
    assert splits.split(records, 4, 0, kind="clean", cache=cache) == drawn
    kept = list(cache.glob("near-duplicates-*.json"))
    assert len(kept) == 1 and "byte for byte" not in caplog.text
    kept[0].write_bytes(b"half")  # not taken for whole
    assert splits.split(records, 4, 0, kind="clean", cache=cache) == drawn
    splits.write_split(drawn, cache / "split.json", name="busi", seed=0, kind="clean")
    assert json.loads((cache / "split.json").read_text())["kind"] == "clean"


def test_folder_without_a_test_part_has_supports_only(folder, cache, caplog):
    for name in ("test", "ground_truth"):
        (folder / name).rename(folder.parent / name)
    records = datasets.load("folder", folder, cache)
    for kind in splits.KINDS:
        drawn = splits.split(records, 4, 0, kind=kind)
        assert len(drawn.support) == 4 and drawn.test == ()
    png(folder / "test" / "good" / "1.png", 77)
    one_class = splits.split(datasets.load("folder", folder, cache), 4, 0)
    assert len(one_class.test) == 1 and "the test set has no abnormal image" in caplog.text


# ---------------------------------------------------------------- the real sets


def manifest(name: str, records) -> tuple[np.ndarray, dict]:
    """The data folder's own groups of near-duplicates, for these records."""
    with (REAL / name / "manifest.csv").open(newline="") as file:
        held = {
            r["image"].replace("data/", "").replace("/images", ""): r for r in csv.DictReader(file)
        }
    return np.array([int(held[r.id]["split_group"]) for r in records]), held


@pytest.mark.slow
@pytest.mark.parametrize("name, more", [("brain_mri", 5), ("busi", 80)])
def test_groups_agree_with_the_manifest(name, more, cache):
    """Ours (24 x 24, > .97) hold every pair of the manifest's (32 x 32, > .98) and few others."""
    records = datasets.load(name, real(name), cache)
    ours, theirs = near_duplicates.groups(records), manifest(name, records)[0]
    upper = np.triu_indices(len(records), 1)
    one, other = ((g[:, None] == g[None])[upper] for g in (ours, theirs))
    assert not (other & ~one).any() and 0 < (one & ~other).sum() < more
    if name == "brain_mri":
        healthy = np.array([r.label == 0 for r in records])
        assert len(set(ours[healthy])) == 76  # distinct healthy images


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, pool, test",
    [("brain_mri", 38, (38, 55)), ("busi", 46, (45, 75)), ("chest_xray", 60, (225, 234))],
)
def test_clean_split_of_real_sets(name, pool, test, cache):
    records = datasets.load(name, real(name), cache)
    groups = dict(zip((r.id for r in records), near_duplicates.groups(records, cache), strict=True))
    for seed in (0, 1):
        supports, rest = splits.clean(records, seed, near_duplicates.groups(records, cache))
        assert len(supports) >= pool and len(rest) + len(supports) < len(records)
        assert test[0] <= sum(r.label == 0 for r in rest) <= test[1]
        sides = [{groups[r.id] for r in part} for part in (supports, rest)]
        assert not sides[0] & sides[1] and len(sides[0]) == len(supports)
        assert not splits.patients(supports) & splits.patients(rest)
        assert len({r.sha256 for r in rest}) == len(rest)
