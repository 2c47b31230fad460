"""The table of a data set's problems."""

import io
import shutil
from pathlib import Path

import fsspec
import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from medclip_jax import main
from medclip_jax.data import check, datasets, splits
from medclip_jax.errors import DataError
from tests.support.folders import ROOT, pair, png, write_busi, write_folder
from tests.support.pictures import write_pictures


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "mine")


def table(name: str, root: Path, k: int = 4, **options) -> tuple[dict, str]:
    """Rows by what they say, and the printed text."""
    text = io.StringIO()
    shown = Console(file=text, width=200)
    rows = check.run(name, root, root.parent / "cache", k, console=shown, **options)
    return {row.subject: row for row in rows}, text.getvalue()


def test_a_sound_folder(folder):
    rows, text = table("folder", folder)
    assert rows["train healthy"].images == 6 and rows["test healthy"].images == 6
    assert rows["with mask"].images == 6 and "9 x 7" not in text and "7 x 9" in text
    assert {row.state for row in rows.values()} == {"ok"}
    assert not (folder.parent / "cache").exists()


def test_what_is_worth_a_look(folder):
    copied = (folder / "train" / "good" / "0.png").read_bytes()
    (folder / "test" / "stain" / "0.png").write_bytes(copied)
    array = np.asarray(PIL.Image.open(folder / "train" / "good" / "1.png"))
    PIL.Image.fromarray(array // 2).save(folder / "test" / "good" / "1.png")
    PIL.Image.fromarray(np.full((9, 7), 8, np.uint8)).save(folder / "test" / "good" / "2.png")
    PIL.Image.fromarray(array // 32).save(folder / "test" / "stain" / "3.png")
    rows, _ = table("folder", folder)
    warnings = {what: row.images for what, row in rows.items() if row.state == "warning"}
    assert warnings == {
        "exact duplicate across the split": 1,
        "near-duplicate across the split": 2,
        "near-duplicates that contradict": 5,
        "constant image": 1,
        "contrast below 0.1": 1,
    }
    clean, _ = table("folder", folder, kind="clean")
    assert not [what for what in clean if "across" in what]


def test_images_for_calibration_are_looked_at_too(folder, tmp_path):
    (extra := tmp_path / "extra").mkdir()
    records = write_pictures(extra, 4)
    rows, _ = table("folder", folder, extra=str(extra), alpha=0.2)
    assert rows["calibration.extra"].state == "ok" and rows["calibration.extra"].images == 4
    with pytest.raises(DataError, match="1 problem"):
        table("folder", folder, extra=str(extra), alpha=0.1)  # needs nine
    shutil.copy(folder / "test" / "good" / "0.png", records[0].path)
    text = io.StringIO()
    with pytest.raises(DataError, match="1 problem"):
        how = {"extra": str(extra), "alpha": 0.2, "console": Console(file=text, width=300)}
        check.run("folder", folder, folder.parent, 4, **how)
    assert "0.png of config.calibration.extra is the test image test/good/0.png" in text.getvalue()
    assert not (folder.parent / "cache").exists() and not [*folder.parent.glob("near*")]


def test_what_cannot_be_used_is_all_in_one_table(folder):
    (folder / "ground_truth" / "crack" / "1_mask.png").unlink()
    png(folder / "ground_truth" / "crack" / "3_mask.png", 0, size=(5, 4), mask=True)
    (folder / "test" / "good" / "[0].png").write_bytes(b"no image")
    text = io.StringIO()
    with pytest.raises(
        DataError, match=r"cannot be used: 5 problem\(s\) in the table, fix these first"
    ):
        shown = Console(file=text, width=300)
        check.run("folder", folder, folder.parent, 8, console=shown)
    for words in ("1.png has no mask", "is 4 x 5 pixels", "[0].png", "K = 8"):
        assert words in text.getvalue()


def test_masks_whose_content_is_strange(folder, caplog):
    truth = folder / "ground_truth" / "crack"
    PIL.Image.new("L", (7, 9)).save(truth / "0_mask.png")
    PIL.Image.new("L", (7, 9), 255).save(truth / "1_mask.png")
    png(folder / "ground_truth" / "good" / "3_mask.png", 3, mask=True)
    rows, _ = table("folder", folder)
    warnings = {what: row.detail for what, row in rows.items() if row.state == "warning"}
    assert warnings == {
        "empty mask of an abnormal image": "ground_truth/crack/0_mask.png",
        "mask of nearly the whole image (inverted?)": "ground_truth/crack/1_mask.png",
        "mask of a healthy image that is not empty": "ground_truth/good/3_mask.png",
    }
    records = datasets.load("folder", folder, folder.parent / "cache")
    assert len(records) == 24 and "1 x empty mask of an abnormal image: ground" in caplog.text
    for n in range(6):
        PIL.Image.new("L", (7, 9)).save(truth / f"{n}_mask.png")
    with pytest.raises(DataError, match="cannot be used: 1 problem"):
        table("folder", folder)
    with pytest.raises(DataError, match="all 6 masks of abnormal images are empty, first ground"):
        datasets.load("folder", folder, folder.parent / "cache")


def test_folder_without_test_part(folder):
    (folder / "test").rename(folder.parent / "test")
    (folder / "ground_truth").rename(folder.parent / "truth")
    rows, _ = table("folder", folder)
    assert rows["test set"].state == "warning" and "no folder test" in rows["test set"].detail


def test_long_lists_are_cut(tmp_path):
    root = write_busi(tmp_path / "busi")
    for n in range(30, 45):
        png(root / "benign" / f"benign ({n}).png", n)
    text = io.StringIO()
    with pytest.raises(DataError, match="15 problem"):
        check.run("busi", root, tmp_path, 4, pool_size=8, console=Console(file=text, width=200))
    assert text.getvalue().count("has no mask") == 10 and "more" in text.getvalue()


def test_a_pool_that_leaves_no_healthy_image_to_test_on_is_an_error_as_in_a_run(tmp_path):
    root, text = write_busi(tmp_path / "busi"), io.StringIO()
    with pytest.raises(DataError, match="cannot be used: 1 problem"):
        check.run("busi", root, tmp_path, 4, pool_size=12, console=Console(file=text, width=200))
    assert "no healthy image is left: add some or take a smaller pool" in text.getvalue()
    with pytest.raises(DataError, match="no healthy image: add some or take a smaller pool"):
        splits.split(datasets.load("busi", root, tmp_path / "cache"), 4, 0, 12)


def test_a_test_part_that_contradicts_the_train_part_is_an_error_as_in_a_run(folder):
    """Of the clean split, which leaves out what is healthy in one part and abnormal in another."""
    healthy, cache = (folder / "train" / "good" / "0.png").read_bytes(), folder.parent / "cache"
    for path in (folder / "test").rglob("*.png"):
        path.write_bytes(healthy)
    text = io.StringIO()
    with pytest.raises(DataError, match="cannot be used: 1 problem"):
        shown = Console(file=text, width=400)
        check.run("folder", folder, cache, 2, kind="clean", console=shown)
    said = "nothing is left to test on: every image of the test part contradicts"
    assert said in text.getvalue() and "config.data.split=peer" in text.getvalue()
    records = datasets.load("folder", folder, cache)
    with pytest.raises(DataError, match=said):
        splits.split(records, 2, 0, kind="clean", cache=cache)
    assert len(splits.split(records, 2, 0, cache=cache).test) == 18
    apart = [r for r in records if r.part == "train"]
    assert not splits.split(apart, 2, 0, kind="clean", cache=cache).test  # there was none


def test_images_of_several_frames_are_listed_before_a_run_too(folder):
    for name in ("train/good/1.tif", "test/good/1.tif"):
        pages = [PIL.Image.new("L", (7, 9), shade) for shade in (1, 99)]
        pages[0].save(folder / name, save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match="cannot be used: 2 problem"):
        table("folder", folder)
    listed = "2 problem.*test/good/1.tif holds 2 frames.*train/good/1.tif holds 2 frames"
    with pytest.raises(DataError, match=listed):
        datasets.load("folder", folder, folder.parent / "cache")


def test_pairs_with_equal_headers_are_no_duplicates(tmp_path):
    for n, kind in enumerate(("train/good", "test/good", "test/mass")):
        for i in range(4):
            pair(tmp_path / "mine" / kind / str(i), 4 * n + i)
    rows, text = table("folder", tmp_path / "mine")
    assert rows["train healthy"].images == 4 and "duplicate" not in text


def test_mode_check_needs_no_workdir(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MEDCLIP_CACHE", str(tmp_path / "cache"))
    argv = ["main", f"--config=configs/folder.py:k=4,root={folder}", "--mode=check"]
    assert main.main(argv) == 0
    said = capsys.readouterr()
    assert "train healthy" in said.out and not said.err
    fetched = fsspec.filesystem("memory")
    assert main.main([*argv, "--config.cache=memory://nobody/cache"]) == 0  # before the first run
    fetched.pipe("/nobody/cache/tokens", b"many")
    assert main.main([*argv, "--config.cache=memory://nobody/cache"]) == 0
    fetched.rm("/nobody", recursive=True)
    assert not list((tmp_path / "cache").rglob("tokens"))  # nothing was copied
    capsys.readouterr()
    for field, value in (
        ("data.recipe", "clae"),
        ("explanation.layer", "9"),
        ("meta.data", "knee"),
    ):
        assert main.main([*argv, f"--config.{field}={value}"]) == 2  # as a run does
        assert f"config.{field} " in capsys.readouterr().err
    assert main.main([*argv, "--config.method=memory", "--config.learner=maml"]) == 0
    assert "config.learner has no effect: nothing trains\n" in capsys.readouterr().out
    (folder / "test" / "good" / "0.png").write_bytes(b"no image")
    assert main.main(argv) == 2
    held = capsys.readouterr()
    assert "error" in held.out and held.err.count("cannot be used") == 1
