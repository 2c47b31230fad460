"""Layouts, preparation, pools, splits: on folders the tests make, and on BUSI where it is."""

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from medclip_jax.data import datasets, layouts
from medclip_jax.errors import ConfigError, DataError, WorkdirError

REPO = Path(__file__).parents[1]
COUNTS = {"normal": 12, "benign": 5, "malignant": 3}


def png(path: Path, seed: int, size=(9, 7), mask=False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    PIL.Image.fromarray((array > 127).astype(np.uint8) * 255 if mask else array).save(path)
    return path


@pytest.fixture
def busi(tmp_path) -> Path:
    root = tmp_path / "data" / "Dataset_BUSI_with_GT"
    seed = 0
    for kind, count in COUNTS.items():
        for n in range(1, count + 1):
            seed += 1
            png(root / kind / f"{kind} ({n}).png", seed)
            png(root / kind / f"{kind} ({n})_mask.png", seed, mask=True)
    png(root / "benign" / "benign (2)_mask_1.png", 99, mask=True)
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "mine"
    for n in range(6):
        png(root / "train" / "good" / f"{n}.png", n)
        png(root / "test" / "good" / f"{n}.png", 10 + n)
        png(root / "test" / "crack" / f"{n}.png", 20 + n)
        png(root / "ground_truth" / "crack" / f"{n}_mask.png", 20 + n, mask=True)
        png(root / "test" / "stain" / f"{n}.png", 30 + n)  # a kind without masks
    (root / "train" / "good" / ".DS_Store").touch()
    return root


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_named_root(monkeypatch):
    monkeypatch.delenv("MEDCLIP_DATA", raising=False)


# ---------------------------------------------------------------- reading layouts


def test_busi_records(busi, cache):
    records = datasets.load("busi", busi, cache)
    assert [r.id for r in records[:6]] == [f"benign/benign ({n}).png" for n in range(1, 6)] + [
        "malignant/malignant (1).png"
    ]
    assert records[-1].id == "normal/normal (12).png"  # natural order: 12 after 2
    assert [sum(r.label == label for r in records) for label in (0, 1)] == [12, 8]
    assert all(r.part == "" and r.path.is_file() and r.path.is_absolute() for r in records)
    two = records[1]
    assert [m.name for m in two.masks] == ["benign (2)_mask.png", "benign (2)_mask_1.png"]
    assert all(r.sha256 == hashlib.sha256(r.path.read_bytes()).hexdigest() for r in records)


def test_busi_is_found_one_or_two_levels_below(busi, cache):
    (busi.parent / "busi").mkdir()
    expected = datasets.load("busi", busi, cache)
    assert datasets.load("busi", busi.parent, cache) == expected
    busi.rename(busi.parent / "busi" / busi.name)
    above = datasets.load("busi", busi.parent, cache)
    assert [r.id for r in above] == [r.id for r in expected]


def test_root_from_the_environment(busi, cache, monkeypatch):
    monkeypatch.setenv("MEDCLIP_DATA", str(busi))
    assert datasets.load("busi", None, cache) == datasets.load("busi", busi, cache)


def test_folder_records(folder, cache):
    records = datasets.load("folder", folder, cache)
    rows = {r.id: (r.label, r.part, len(r.masks)) for r in records}
    assert len(rows) == 24
    assert rows["train/good/3.png"] == (0, "train", 0)
    assert rows["test/good/3.png"] == (0, "test", 0)
    assert rows["test/crack/3.png"] == (1, "test", 1)
    assert rows["test/stain/3.png"] == (1, "test", 0)


def test_natural_order_is_total_and_numeric():
    names = ["b2", "a10", "a2", "a02", "10", "9", "a", ""]
    assert sorted(names, key=layouts.natural) == ["", "9", "10", "a", "a02", "a2", "a10", "b2"]


# ---------------------------------------------------------------- what is refused


def test_missing_root_says_where_and_what_to_do(tmp_path, cache):
    for name in ("busi", "folder"):
        with pytest.raises(DataError, match=r"nowhere.*--config\.data\.root or \$MEDCLIP_DATA"):
            datasets.load(name, tmp_path / "nowhere", cache)
        with pytest.raises(DataError, match=r"--config\.data\.root or \$MEDCLIP_DATA"):
            datasets.load(name, tmp_path, cache)
    with pytest.raises(DataError, match="no folder was named"):
        datasets.load("folder", None, cache)
    with pytest.raises(ConfigError, match="give one of busi, folder"):
        datasets.load("bussi", tmp_path, cache)


def test_busi_missing_and_orphan_masks_are_listed_together(busi, cache):
    (busi / "benign" / "benign (3)_mask.png").unlink()
    (busi / "malignant" / "malignant (2).png").unlink()
    (busi / "normal" / "normal (4)_mask.png").unlink()  # nothing to mask there
    (busi / "normal" / "notes.txt").touch()
    with pytest.raises(DataError) as caught:
        datasets.load("busi", busi, cache)
    message = str(caught.value)
    assert "has 3 problem(s)" in message
    assert "benign/benign (3).png has no mask benign (3)_mask.png" in message
    assert "mask malignant/malignant (2)_mask.png has no image" in message
    assert "normal/notes.txt has the suffix '.txt', which cannot be read" in message


def test_folder_problems_are_listed_together(folder, cache):
    (folder / "ground_truth" / "crack" / "1_mask.png").unlink()
    (folder / "test" / "crack" / "2.png").unlink()
    png(folder / "ground_truth" / "dent" / "0_mask.png", 0, mask=True)
    png(folder / "train" / "bad" / "0.png", 0)
    png(folder / "ground_truth" / "crack" / "3_mask.png", 0, size=(5, 4), mask=True)
    (folder / "test" / "good" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        datasets.load("folder", folder, cache, k=8)
    message = str(caught.value)
    for words in (
        "test/crack/1.png has no mask ground_truth/crack/1_mask.png",
        "mask ground_truth/crack/2_mask.png has no image",
        "mask ground_truth/dent/0_mask.png has no image",
        "only train/good is trained on",
        "only 6 healthy images where K = 8",
        "3_mask.png is 4 x 5 pixels but its image is 7 x 9",
        "test/good/0.png is empty or is not a PNG",
    ):
        assert words in message


def test_files_that_do_not_decode_are_listed_before_anything_runs(folder, cache):
    (folder / "test" / "good" / "0.png").write_bytes(b"no image")
    whole = (folder / "test" / "good" / "1.png").read_bytes()
    (folder / "test" / "good" / "1.png").write_bytes(whole[:50])
    png(folder / "ground_truth" / "crack" / "3_mask.png", 0, size=(5, 4), mask=True)
    with pytest.raises(DataError) as caught:
        datasets.load("folder", folder, cache)
    message = str(caught.value)
    assert "has 3 problem(s)" in message and "not a PNG" in message and "truncated" in message
    assert "3_mask.png is 4 x 5 pixels but its image is 7 x 9" in message


def test_at_most_ten_problems_are_spelled_out(busi, cache):
    for path in [*busi.glob("*ign*/*_mask.png")]:
        path.unlink()
    for n in range(10, 15):
        png(busi / "benign" / f"benign ({n}).png", n)
    (busi / "benign" / "benign (2)_mask_1.png").unlink()
    with pytest.raises(DataError, match=r"has 13 problem\(s\).*; and 3 more") as caught:
        datasets.load("busi", busi, cache)
    assert str(caught.value).count("has no mask") == 10


def test_file_name_that_is_no_text(folder, cache):
    odd = os.fsencode(folder / "train" / "good") + b"/\xff.png"
    os.rename(folder / "train" / "good" / "0.png", odd)
    with pytest.raises(DataError, match="not a UTF-8 file name"):
        datasets.load("folder", folder, cache)


def test_cache_that_cannot_be_written(busi, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match="give another cache folder"):
        datasets.load("busi", busi, tmp_path / "file" / "cache")


# ---------------------------------------------------------------- preparation


def test_changed_data_are_prepared_anew(busi, cache):
    before = datasets.load("busi", busi, cache)
    assert datasets.load("busi", busi, cache) == before
    path = busi / "normal" / "normal (1).png"
    stat = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")  # other size, same time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    grown = datasets.load("busi", busi, cache)
    assert [a.id for a, b in zip(before, grown, strict=True) if a != b] == ["normal/normal (1).png"]
    png(path, 12345)  # other time
    changed = datasets.load("busi", busi, cache)
    assert changed[-12].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    png(busi / "normal" / "normal (13).png", 13)
    assert len(datasets.load("busi", busi, cache)) == 21
    (busi / "normal" / "normal (13).png").unlink()
    assert len(datasets.load("busi", busi, cache)) == 20
    (busi / "benign" / "benign (2)_mask_1.png").unlink()
    assert len(datasets.load("busi", busi, cache)[1].masks) == 1


def test_prepared_data_are_not_decoded_again(busi, cache, monkeypatch):
    first = datasets.load("busi", busi, cache)
    monkeypatch.setattr(datasets.readers, "read", lambda path: pytest.fail("read again"))
    assert datasets.load("busi", busi, cache) == first


def run(code: str, *arguments, check=True) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=check,
        timeout=60,
    )


LOAD = """
import sys
from pathlib import Path
from medclip_jax.data import datasets
assert "tensorflow_datasets" not in sys.modules, "slow import at the top"
print(len(datasets.load("busi", Path(sys.argv[1]), Path(sys.argv[2]))))
assert "tensorflow_datasets" in sys.modules
assert not {"tensorflow", "torch"} & set(sys.modules)
"""

DIE = """
import os, sys
from pathlib import Path
from medclip_jax.data import builders, datasets
builders._sha256 = lambda path: os._exit(9) if path.name == "normal (5).png" else "0"
datasets.load("busi", Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_no_tensorflow_and_no_chatter(busi, cache):
    done = run(LOAD, busi, cache)
    assert done.stdout == "20\n" and done.stderr == ""


def test_killed_preparation_is_not_taken_for_whole(busi, cache):
    assert run(DIE, busi, cache, check=False).returncode == 9
    assert any(cache.rglob("*"))
    records = datasets.load("busi", busi, cache)
    assert len(records) == 20 and all(len(r.sha256) == 64 for r in records)


def test_the_slower_of_two_preparations_takes_the_quicker_one(busi, cache, monkeypatch):
    from medclip_jax.data import builders

    layout = layouts.busi(busi)
    hashed = builders._sha256

    def overtaken(path):
        monkeypatch.setattr(builders, "_sha256", hashed)
        builders.records("busi", layout, cache)
        return hashed(path)

    monkeypatch.setattr(builders, "_sha256", overtaken)
    assert len(builders.records("busi", layout, cache)) == 20


def test_builders_say_where_they_come_from(tmp_path):
    from medclip_jax.data import builders

    info = builders.Busi(data_dir=str(tmp_path)).info
    assert "104863" in info.citation and "CC BY 4.0" in info.description
    assert info.homepage.startswith("https://scholar.cu.edu.eg/") and info.release_notes
    assert builders.FolderAD(data_dir=str(tmp_path)).info.citation


# ---------------------------------------------------------------- download


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine in place of the official one; yields (folder, requests)."""
    from medclip_jax.data import builders

    (tmp_path / "web").mkdir()
    asked = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path)

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/Dataset_BUSI.zip"
        monkeypatch.setattr(builders, "BUSI_URL", url)
        yield tmp_path / "web", asked
        running.shutdown()


def test_busi_is_downloaded_once(busi, cache, server):
    web, asked = server
    with zipfile.ZipFile(web / "Dataset_BUSI.zip", "w") as archive:
        for path in busi.rglob("*.png"):
            archive.write(path, path.relative_to(busi.parent))
    first = datasets.load("busi", None, cache)
    assert [r.id for r in first] == [r.id for r in datasets.load("busi", busi, cache)]
    assert all(r.path.is_relative_to(cache) for r in first)
    assert datasets.load("busi", None, cache) == first and len(asked) == 1


def test_builder_downloads_by_itself(busi, cache, server):
    from medclip_jax.data import builders

    web, _ = server
    with zipfile.ZipFile(web / "Dataset_BUSI.zip", "w") as archive:
        for path in busi.rglob("*.png"):
            archive.write(path, path.relative_to(busi.parent))
    builder = builders.Busi(data_dir=str(cache))
    builder.download_and_prepare()
    source = builder.as_data_source(split="full")
    assert len(source) == 20 and {row["label"] for row in source} == {0, 1}


def test_failed_and_broken_downloads_say_how_to_fetch_by_hand(cache, server):
    web, _ = server
    with pytest.raises(DataError, match=r"could not be downloaded.*fetch it by hand.*data\.root"):
        datasets.load("busi", None, cache)
    (web / "Dataset_BUSI.zip").write_bytes(b"<html>moved</html>")
    for _ in range(2):  # the broken archive is not kept
        with pytest.raises(DataError, match=r"broken archive.*fetch it by hand"):
            datasets.load("busi", None, cache)


# ---------------------------------------------------------------- pools and splits


def test_supports_are_nested_healthy_and_apart_from_test(busi, cache):
    records = datasets.load("busi", busi, cache)
    big = datasets.split(records, 8, seed=3, pool_size=8)
    for k in range(1, 9):
        small = datasets.split(records, k, seed=3, pool_size=8)
        assert small.support == big.support[:k] and small.test == big.test
    assert all(r.label == 0 for r in big.support)
    assert not set(big.support) & set(big.test)
    assert [sum(r.label == label for r in big.test) for label in (0, 1)] == [4, 8]
    assert [r.id for r in big.test] == sorted((r.id for r in big.test), key=layouts.natural)


def test_draws_repeat_by_seed_and_differ_between_seeds(busi, cache):
    records = datasets.load("busi", busi, cache)
    draws = [datasets.split(records, 4, seed, pool_size=8) for seed in range(6)]
    assert draws[2] == datasets.split(records, 4, 2, pool_size=8)
    assert len({frozenset(r.id for r in d.support) for d in draws}) > 3
    assert len({frozenset(r.id for r in d.test) for d in draws}) > 3  # the pool itself is drawn


def test_folder_keeps_its_own_parts(folder, cache):
    records = datasets.load("folder", folder, cache)
    drawn = datasets.split(records, 6, seed=0)
    assert {r.part for r in drawn.support} == {"train"} and {r.part for r in drawn.test} == {"test"}
    assert len(drawn.test) == 18
    assert datasets.split(records, 2, seed=0).support == drawn.support[:2]


def test_k_beyond_the_pool_names_the_largest(busi, folder, cache):
    records = datasets.load("busi", busi, cache)
    for k in (-1, 9):
        with pytest.raises(ConfigError, match="give K from 0 to 8"):
            datasets.split(records, k, 0, pool_size=8)
    with pytest.raises(ConfigError, match="give K from 0 to 6"):
        datasets.split(datasets.load("folder", folder, cache), 7, 0)
    with pytest.raises(DataError, match="no healthy image"):
        datasets.split(records, 4, 0, pool_size=32)
    with pytest.raises(ConfigError, match="give one of peer"):
        datasets.split(records, 4, 0, kind="other")


def test_duplicates_between_support_and_test_are_counted_and_warned_of(folder, cache, caplog):
    copied = (folder / "train" / "good" / "2.png").read_bytes()
    (folder / "test" / "stain" / "4.png").write_bytes(copied)
    drawn = datasets.split(datasets.load("folder", folder, cache), 6, 0)
    assert datasets.duplicates(drawn) == (("train/good/2.png", "test/stain/4.png"),)
    assert "1 of the 6 support images" in caplog.text


def test_split_file_round_trip_and_refusal(busi, cache, tmp_path):
    records = datasets.load("busi", busi, cache)
    drawn = datasets.split(records, 4, 1, pool_size=8)
    path = tmp_path / "split.json"
    datasets.write_split(drawn, path, name="busi", seed=1)
    assert [p.name for p in tmp_path.glob("split.json*")] == ["split.json"]
    stored = datasets.read_split(path)
    assert (stored.dataset, stored.kind, stored.k, stored.seed) == ("busi", "peer", 4, 1)
    assert stored.support == tuple(datasets.Entry(r.id, r.sha256, r.label) for r in drawn.support)
    assert len(stored.test) == len(drawn.test)
    datasets.check_split(path, drawn)

    other = datasets.split(records, 4, 2, pool_size=8)
    with pytest.raises(DataError, match="in support, .* stands in the file where the data have"):
        datasets.check_split(path, other)
    changed = drawn._replace(test=(*drawn.test[:-1], drawn.test[-1]._replace(sha256="0" * 64)))
    with pytest.raises(DataError) as caught:
        datasets.check_split(path, changed)
    assert f"in test, {drawn.test[-1].id} has other bytes" in str(caught.value)
    with pytest.raises(DataError, match=f"{drawn.test[-1].id[:6]}.* is in the file only"):
        datasets.check_split(path, drawn._replace(test=drawn.test[:-1]))
    relabelled = drawn._replace(test=(drawn.test[0]._replace(label=0), *drawn.test[1:]))
    with pytest.raises(DataError, match="another label"):
        datasets.check_split(path, relabelled)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"support": 3, "test": []}', "\x00"])
def test_split_file_that_is_none(tmp_path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(DataError, match="not a stored split"):
        datasets.read_split(tmp_path / "split.json")
    with pytest.raises(DataError, match="cannot be read"):
        datasets.read_split(tmp_path / "gone.json")


def test_split_write_that_fails_leaves_the_old_file(busi, cache, tmp_path, monkeypatch):
    drawn = datasets.split(datasets.load("busi", busi, cache), 4, 1, pool_size=8)
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"old": 1}))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.os, "replace", full)
    with pytest.raises(WorkdirError, match="No space left"):
        datasets.write_split(drawn, path, name="busi", seed=1)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.glob("split.json*")] == ["split.json"]


# ---------------------------------------------------------------- the real thing

NAMED = os.environ.get("MEDCLIP_DATA")
REAL = Path(NAMED) if NAMED else REPO.parent / "shared" / "data"


def real_busi() -> Path | None:
    try:
        return layouts.busi(REAL).root
    except DataError:
        return None


@pytest.mark.skipif(real_busi() is None, reason=f"no BUSI below {REAL}; set $MEDCLIP_DATA")
def test_real_busi_counts(cache):
    records = datasets.load("busi", REAL, cache)
    kinds = [r.id.split("/")[0] for r in records]
    counts = {kind: kinds.count(kind) for kind in layouts.BUSI_LABELS}
    assert counts == {"benign": 437, "malignant": 210, "normal": 133}
    assert sum(len(r.masks) for r in records) == 798
    for k in (4, 32):
        drawn = datasets.split(records, k, seed=0)
        assert len(drawn.support) == k
        assert [sum(r.label == label for r in drawn.test) for label in (0, 1)] == [101, 647]
    twins = {r.id for r in records if r.sha256 == records[432].sha256}
    assert twins == {"benign/benign (433).png", "malignant/malignant (145).png"}
