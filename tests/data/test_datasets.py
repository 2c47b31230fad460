"""Preparing data sets, and what is refused: on folders the tests make."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from medclip_jax import build, config, files
from medclip_jax.data import datasets, layouts, tfds_builders
from medclip_jax.data.catalog import SETS, with_role
from medclip_jax.data.layouts import Split
from medclip_jax.errors import ConfigError, DataError, WorkdirError
from tests.support.damaged import one_bit
from tests.support.folders import ROOT, png
from tests.support.pictures import write_pictures

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
    assert "3 problem(s) found, fix these first" in message
    assert "benign/benign (3).png has no mask benign (3)_mask.png" in message
    assert "mask malignant/malignant (2)_mask.png has no image" in message
    assert "normal/notes.txt has a suffix that is not read" in message


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
        "test/good/0.png is not a PNG",
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
    assert (
        "3 problem(s) found, fix these first" in message
        and "not a PNG" in message
        and "truncated" in message
    )
    assert "3_mask.png is 4 x 5 pixels but its image is 7 x 9" in message


def test_at_most_ten_problems_are_spelled_out(busi, cache):
    for path in [*busi.glob("*ign*/*_mask.png")]:
        path.unlink()
    for n in range(10, 15):
        png(busi / "benign" / f"benign ({n}).png", n)
    (busi / "benign" / "benign (2)_mask_1.png").unlink()
    with pytest.raises(DataError, match=r"13 problem\(s\).*; and 3 more") as caught:
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
    monkeypatch.setattr(datasets.read, "read", lambda path: pytest.fail("read again"))
    assert datasets.load("busi", busi, cache) == first


def run(code: str, *arguments, check=True) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
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
from medclip_jax import build, config, files
from medclip_jax.data import datasets
files.sha256_of = lambda path: os._exit(9) if path.name == "normal (5).png" else "0"
datasets.load("busi", Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_no_tensorflow_and_no_chatter(busi, cache):
    done = run(LOAD, busi, cache)
    assert done.stdout == "20\n" and done.stderr == ""


def test_preparing_leaves_nothing_in_the_temporary_folder(folder, cache, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    assert len(datasets.load("folder", folder, cache)) == 24
    assert not list((tmp_path / "scratch").iterdir())


def test_killed_preparation_is_not_taken_for_whole(busi, cache):
    assert run(DIE, busi, cache, check=False).returncode == 9
    assert any(cache.rglob("*"))
    records = datasets.load("busi", busi, cache)
    assert len(records) == 20 and all(len(r.sha256) == 64 for r in records)


def test_what_a_killed_preparation_left_is_swept_and_a_living_one_is_not(busi, cache):
    assert run(DIE, busi, cache, check=False).returncode == 9
    (left,) = cache.glob(".*.tmp")
    with files.temporary_folder(cache / "another") as living:
        assert len(datasets.load("busi", busi, cache)) == 20
        assert not left.exists() and living.is_dir()


def test_the_slower_of_two_preparations_takes_the_quicker_one(busi, cache, monkeypatch):

    layout = layouts.busi(busi)
    hashed = files.sha256_of

    def overtaken(path):
        monkeypatch.setattr(files, "sha256_of", hashed)
        tfds_builders.records("busi", layout, cache)
        return hashed(path)

    monkeypatch.setattr(files, "sha256_of", overtaken)
    assert len(tfds_builders.records("busi", layout, cache)) == 20
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_prepared_data_set_is_prepared_again(busi, cache):
    assert len(datasets.load("busi", busi, cache)) == 20
    (info,) = cache.rglob("dataset_info.json")
    info.unlink()
    assert len(datasets.load("busi", busi, cache)) == 20


def full_disk(folder: Path) -> None:
    """Mount a file system of 64 KB, or skip."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    (folder / "full").write_bytes(b"0" * (52 << 10))


def test_a_full_disk_under_the_cache_is_said_of_the_cache(busi, tmp_path):
    cache = tmp_path / "cache"
    full_disk(cache)
    try:
        with pytest.raises(WorkdirError, match=f"cache {cache} .*No space left"):
            datasets.load("busi", busi, cache)
        assert [path.name for path in cache.iterdir()] == ["full"]
    finally:
        subprocess.run(["umount", str(cache)], check=True)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), WorkdirError, "cache .*No space left"),
        (ValueError("riegeli: No space left on device"), WorkdirError, "cache .*No space left"),
        (FileNotFoundError(errno.ENOENT, "No such file"), DataError, "cannot be read"),
    ],
)
def test_a_disk_that_fails_while_preparing(busi, cache, monkeypatch, error, kind, said):
    if kind is DataError:
        error.filename = str(busi / "x.png")

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(tfds_builders.Busi, "download_and_prepare", refuse)
    with pytest.raises(kind, match=said):
        datasets.load("busi", busi, cache)
    assert not list(cache.iterdir())


def test_a_damaged_list_is_named_and_made_again(folder, cache, caplog):
    wanted = datasets.load("folder", folder, cache)
    (place,) = cache.glob("*/folder_ad/*")
    for path in sorted(place.iterdir()):
        whole = path.read_bytes()
        for flipped in one_bit(whole, 5):
            path.write_bytes(flipped)
            caplog.clear()
            assert datasets.load("folder", folder, cache) == wanted
            named = {f"{place / name} is damaged" for name in (path.name, "sha256.json")}
            assert any(name in caplog.text for name in named) and len(caplog.records) == 1
    (place / "features.json").unlink()
    assert datasets.load("folder", folder, cache) == wanted


@pytest.mark.parametrize("below", ["", "oct_mx", "sets/oct_mx"])
def test_a_named_set_lies_in_its_folder_or_is_it(folder, tmp_path, cache, below):
    place = tmp_path / "root" / below
    place.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(place)
    name, layout = datasets.find("oct_mx", tmp_path / "root", cache)
    assert (name, layout.root) == ("folder", place) and len(layout.examples) > 6


def test_every_evaluation_set_has_one_role_and_words():
    assert with_role("report") == ("mammo_mias", "blood_rbc", "spine_xr")
    assert {*SETS} | {"busi", "brain_mri", "chest_xray"} == {*with_role("development", "report")}
    for words in SETS.values():
        assert words["modality"] and words["anatomy"] and words["conditions"]


# --- healthy images for calibration alone -------------------------------------------------------


def extra_of(folder, support=(), test=(), alpha=0.2):
    c = config.base("k=4", name="folder")
    c.calibration.extra, c.calibration.alpha, c.cache = str(folder), alpha, f"{folder}-cache"
    return build.load_extra(c, Split(tuple(support), tuple(test)))


def test_extra_healthy_images_are_listed_once_each(tmp_path):
    records = write_pictures(tmp_path, 5)
    shutil.copy(records[0].path, tmp_path / "copy.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    got = extra_of(tmp_path)
    assert {r.sha256 for r in got} == {r.sha256 for r in records} and len(got) == 5
    assert all(r.label == 0 and r.path.is_file() for r in got)
    assert build.load_extra(config.base("k=4"), Split((), ())) == ()


@pytest.mark.parametrize("where", ["support", "test"])
def test_extra_images_must_be_no_supports_and_not_tested(tmp_path, where):
    records = write_pictures(tmp_path, 5)
    with pytest.raises(DataError, match=f"2.png of config.calibration.extra is the {where}"):
        extra_of(tmp_path, **{where: records[2:3]})


def test_extra_near_duplicates_of_what_is_used_or_of_one_another_are_left_out(tmp_path, caplog):
    """As files of their own: another format, other grey values."""
    (tmp_path / "data").mkdir(), (tmp_path / "extra").mkdir()
    records = write_pictures(tmp_path / "data", 3)
    write_pictures(tmp_path / "extra", 6)[0].path.unlink()  # 1 and 2 are those of the data
    for i in (1, 2, 4):
        with Image.open(tmp_path / "extra" / f"{i}.png") as image:
            image.point(lambda value: 0.8 * value).save(tmp_path / "extra" / f"darker-{i}.png")
        if i < 3:
            (tmp_path / "extra" / f"{i}.png").unlink()
    got = extra_of(tmp_path / "extra", records[:2], records[2:], alpha=0.25)
    assert [r.id for r in got] == ["3.png", "4.png", "5.png"]
    assert "3 of the 6 images of config.calibration.extra are near-duplicates" in caplog.text
    with pytest.raises(DataError, match="holds 3 healthy images: .* needs 4 or more"):
        extra_of(tmp_path / "extra", records[:2], records[2:])


def test_extra_images_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no folder .*nowhere"):
        extra_of(tmp_path / "nowhere")
    write_pictures(tmp_path, 4)
    with pytest.raises(
        DataError, match="holds 4 healthy images: a false-alarm rate of 0.1 needs 9"
    ):
        extra_of(tmp_path, alpha=0.1)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 problem.*broken.png"):
        extra_of(tmp_path)


def test_a_mask_is_no_extra_healthy_image(tmp_path):
    """As in BUSI's folder normal. One without its image is an image of that name."""
    records = write_pictures(tmp_path, 5)
    mask = tmp_path / f"{records[0].path.stem}_mask.png"
    shutil.copy(records[1].path, mask)
    with pytest.raises(DataError, match=f"1 problem.*{mask.name} is a mask: take it out"):
        extra_of(tmp_path)
    mask.rename(tmp_path / "other_mask.png")
    assert len(extra_of(tmp_path)) == 5
