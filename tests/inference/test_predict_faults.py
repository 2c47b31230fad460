"""What hands, disks and clocks do to prediction: a sentence or a row in a table, no traceback."""

import errno
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from medclip_jax import files, stored
from medclip_jax.inference import inputs, loading, predict, results
from tests.support.predicting import dicom, noise, pages, run, table


def some(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(noise(i)).save(folder / f"{i}.png")
    return folder


def huge_png(path: Path, side: int) -> Path:
    """A whole PNG of side x side black pixels whose file is small."""
    packer = zlib.compressobj(1)
    row = bytes(1 + -(-side // 8))  # one bit a pixel
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, part in ((b"IHDR", head), (b"IDAT", data), (b"IEND", b"")):
            check = zlib.crc32(kind + part)
            file.write(struct.pack(">I", len(part)) + kind + part + struct.pack(">I", check))
    return path


def test_extreme_values_and_shapes_are_scored(whole, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, pixels in {
        "black8": np.zeros((30, 40), np.uint8),
        "white8": np.full((30, 40), 255, np.uint8),
        "black16": np.zeros((30, 40), np.uint16),
        "white16": np.full((30, 40), 65535, np.uint16),
        "ends16": np.where(noise() > 127, 65535, 0).astype(np.uint16),
        "dot": np.full((1, 1), 7, np.uint8),
        "line": noise(1, (1, 300)),
        "column": noise(2, (700, 1)),
    }.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    assert run(whole, tmp_path / "out", folder) == 0
    rows = {row["source"].removeprefix("in/"): row for row in table(tmp_path / "out")}
    assert len(rows) == 8
    for row in rows.values():
        assert all(0 <= float(row[name]) <= 1 for name in ("score", "p_value", "uncertainty"))
    assert rows["black8.png"]["score"] == rows["black16.png"]["score"]
    assert rows["white8.png"]["score"] == rows["white16.png"]["score"]


def test_what_is_not_a_number_and_what_is_too_large_is_listed(whole, tmp_path):
    folder = some(tmp_path / "in", 1)
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus", -np.inf)):
        pixels = np.full((30, 40), 0.5, np.float32)
        pixels[3, 4] = value
        Image.fromarray(pixels).save(folder / f"{name}.tif")
        voxels = np.ones((8, 9, 2), np.float32)
        voxels[1, 2, 1] = value
        nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(folder / f"{name}.nii.gz")
    huge_png(folder / "huge.png", 20000)
    assert (folder / "huge.png").stat().st_size < 1 << 20  # of 400 million pixels
    assert run(whole, tmp_path / "out", folder) == 0
    assert [row["source"] for row in table(tmp_path / "out")] == ["in/0.png"]
    bad = {r["source"]: r["reason"] for r in table(tmp_path / "out", "unreadable.csv")}
    assert len(bad) == 7
    assert "pixels and at most 64,000,000 are read" in bad["in/huge.png"]
    for name in ("nan", "inf", "minus"):
        assert "NaN, infinite" in bad[f"in/{name}.nii.gz"]
        assert "NaN, infinite" in bad[f"in/{name}.tif"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_a_result_is_one_sentence(whole, tmp_path, capfd, monkeypatch, code):
    """Full, read-only, forbidden: what was written before stays, and the same command goes on."""
    folder, output = some(tmp_path / "in", 4), tmp_path / "out"

    def replace(source, target):
        if Path(target).name.startswith("in_2.png"):
            raise OSError(code, os.strerror(code), str(target))
        real(source, target)

    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        assert run(whole, output, folder) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: Cannot write ") and os.strerror(code) in last
    assert not (output / "results.csv").exists() and not list(output.glob(".*"))
    before = {p.name: p.stat().st_mtime_ns for p in output.glob("*.json")}
    assert not [name for name in before if name.startswith("in_2")]
    assert run(whole, output, folder) == 0
    assert len(table(output)) == 4
    assert all((output / name).stat().st_mtime_ns == when for name, when in before.items())


def test_a_file_where_the_output_folder_should_be(whole, tmp_path, capfd):
    (tmp_path / "out").write_text("mine")
    assert run(whole, tmp_path / "out", some(tmp_path / "in", 1)) == 2
    assert "Cannot write " in capfd.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("plant", ["link", "hard link", "dangling", "pipe"])
def test_things_planted_in_the_output_are_replaced_not_followed(whole, tmp_path, plant):
    """Files of every kind: pictures, maps, DICOM objects, JSON, tables."""
    folder, output, outside = some(tmp_path / "in", 1), tmp_path / "out", tmp_path / "outside"
    nibabel.Nifti1Image(np.ones((8, 9, 2), np.int16), np.eye(4)).to_filename(folder / "v.nii.gz")
    dicom(folder / "a.dcm")
    assert run(whole, output, folder) == 0
    before = pages(output)
    names = {path.name for path in output.iterdir()}
    assert len(before) == 3 and len(names) == 5 + sum(len(page["files"]) for page in before)
    if plant != "dangling":
        outside.write_text("mine")
    for name in names:
        (output / name).unlink()
        if plant == "pipe":
            os.mkfifo(output / name)
        elif plant == "hard link":
            os.link(outside, output / name)
        else:
            (output / name).symlink_to(outside)
    assert run(whole, output, folder) == 0
    assert outside.exists() == (plant != "dangling")
    assert plant == "dangling" or outside.read_text() == "mine"
    assert {path.name for path in output.iterdir()} == names
    for page, first in zip(pages(output), before, strict=True):
        for name in ("digest", "file_sha256"):  # objects say when they were written
            del page[name], first[name]
        assert page == first
    assert all(path.is_file() and not path.is_symlink() for path in output.iterdir())


@pytest.mark.parametrize("plant", ["link", "dangling", "pipe", "folder", "hard link"])
def test_a_salt_that_was_planted(whole, tmp_path, capfd, plant):
    folder, path = some(tmp_path / "in", 1), tmp_path / "out/.pseudonyms"
    path.parent.mkdir()
    (tmp_path / "outside").write_text("mine")
    if plant == "pipe":
        os.mkfifo(path)
    elif plant == "folder":
        path.mkdir()
    elif plant == "hard link":
        os.link(tmp_path / "outside", path)
    else:
        path.symlink_to(tmp_path / ("outside" if plant == "link" else "absent"))
    assert run(whole, path.parent, folder, more=["--pseudonymise"]) == 2
    assert f"{path}" in capfd.readouterr().err.splitlines()[-1]
    assert (tmp_path / "outside").read_text() == "mine" and not (tmp_path / "absent").exists()
    assert len(list(path.parent.iterdir())) == 1


def test_the_output_folder_may_lie_in_the_input_folder(whole, tmp_path, caplog):
    """As many rows each time, also where another run's results were copied to."""
    caplog.set_level("INFO")
    folder = some(tmp_path / "in")
    for number in range(3):
        assert run(whole, folder / "results", folder) == 0
        rows = table(folder / "results")
        assert [row["source"] for row in rows] == [f"in/{i}.png" for i in range(3)]
        assert not table(folder / "results", "unreadable.csv")
        assert f"{3 if number else 0} finished before" in caplog.messages[-1]
        shutil.copytree(folder / "results", folder / f"copy {number}")
    assert run(whole, folder, folder) == 0
    assert len(table(folder)) == 3


def test_a_result_of_far_too_many_values_is_not_parsed(tmp_path, monkeypatch):
    """Each value takes twenty times its bytes in memory."""
    monkeypatch.setattr(json, "loads", lambda raw: pytest.fail("it was parsed"))
    (tmp_path / "a.json").write_bytes(b'{"key":[' + b"0," * stored.MOST_VALUES + b"0]}")
    item = inputs.Item("a.png", ("a.png",), "image", "a")
    assert results.finished(tmp_path, item, "key") is None


def test_altered_results_are_made_again(whole, tmp_path, caplog):
    """An alarm that was taken out of a JSON, a map of the same size, a file that is gone."""
    caplog.set_level("INFO")
    folder, output = some(tmp_path / "in", 4), tmp_path / "out"
    assert run(whole, output, folder) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    first, second, third, _ = (page["files"] for page in pages(output))
    path = next(output.glob("in_0*.json"))
    page = json.loads(path.read_text())
    page["frames"][0]["alarm"] = not page["frames"][0]["alarm"]
    path.write_text(json.dumps(page))
    raw = (output / second["map"]).read_bytes()
    (output / second["map"]).write_bytes(raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:])
    (output / third["overlay"]).unlink()
    assert run(whole, output, folder) == 0
    assert "3 scored, 1 finished before" in caplog.messages[-1]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.parametrize("moment", ["before reading", "before writing"])
@pytest.mark.parametrize("kind", ["png", "nii.gz"])
def test_an_input_that_vanishes_is_one_line(whole, tmp_path, monkeypatch, moment, kind):
    folder = some(tmp_path / "in", 2)
    victim = folder / f"v.{kind}"
    if kind == "png":
        Image.fromarray(noise(7)).save(victim)
    else:
        nibabel.Nifti1Image(np.ones((8, 9, 2), np.int16), np.eye(4)).to_filename(victim)
    step = (loading, "load") if moment == "before reading" else (predict, "_write_scored")
    real = getattr(*step)

    def vanish(*arguments, **named):
        victim.unlink(missing_ok=True)
        return real(*arguments, **named)

    monkeypatch.setattr(*step, vanish)
    assert run(whole, tmp_path / "out", folder) == 0
    bad = table(tmp_path / "out", "unreadable.csv")
    rows = {row["source"] for row in table(tmp_path / "out")}
    if kind == "png" and moment == "before writing":  # it is no longer needed
        assert not bad and "in/v.png" in rows
    else:
        assert [row["source"] for row in bad] == [f"in/v.{kind}"]
        assert re.search("is not there|does not exist|No such file", bad[0]["reason"])
        assert str(tmp_path) not in bad[0]["reason"]
    assert rows >= {"in/0.png", "in/1.png"}


def test_whatever_a_decoder_raises_is_one_line(whole, tmp_path, monkeypatch):
    real = loading._open

    def image(item, *more):
        if item.source == "in/1.png":
            raise RecursionError("of a header that quotes DOE^JOHN")
        if item.source == "in/2.png":
            raise MemoryError
        if item.source == "in/3.png":
            raise PermissionError(errno.EACCES, "Permission denied", item.paths[0])
        return real(item, *more)

    monkeypatch.setattr(loading, "_open", image)
    assert run(whole, tmp_path / "out", some(tmp_path / "in", 5)) == 0
    assert [row["source"] for row in table(tmp_path / "out")] == ["in/0.png", "in/4.png"]
    bad = {row["source"]: row["reason"] for row in table(tmp_path / "out", "unreadable.csv")}
    assert bad == {
        "in/1.png": "in/1.png cannot be read (RecursionError): it is damaged",
        "in/2.png": "in/2.png needs more memory than there is",
        "in/3.png": "in/3.png cannot be read (Permission denied)",
    }


@pytest.mark.parametrize("plant", ["folder", "pipe", "json"])
def test_somebody_elses_things_in_the_output(whole, tmp_path, capfd, plant):
    folder, output = some(tmp_path / "in", 1), tmp_path / "out"
    assert run(whole, output, folder) == 0
    (path,) = output.glob("*.json")
    if plant == "folder":
        (output / "results.csv").unlink()
        (output / "results.csv").mkdir()
        assert run(whole, output, folder) == 2
        assert "results.csv (Is a directory)" in capfd.readouterr().err.splitlines()[-1]
        return
    target = path if plant == "json" else output / "results.csv"
    target.unlink()
    os.mkfifo(target)
    assert run(whole, output, folder) == 0  # replaced, and not waited for
    assert len(table(output)) == 1 and len(pages(output)) == 1


def test_what_is_no_image_is_listed_and_patterns_that_match_nothing(whole, tmp_path, caplog):
    folder = some(tmp_path / "in", 1)
    (folder / "out").symlink_to("/")
    (folder / "gone").symlink_to(folder / "absent")
    monday = tmp_path / "monday" / "*.dcm"
    assert run(whole, tmp_path / "out", folder, monday) == 0
    assert len(table(tmp_path / "out")) == 1
    bad = {row["source"]: row["reason"] for row in table(tmp_path / "out", "unreadable.csv")}
    assert set(bad.values()) == {
        "a link to what is not there",
        "a link out of the folder that was named: not followed (--follow_links)",
        "matches nothing",
    }
    assert f"{monday}: matches nothing" in caplog.messages
    caplog.clear()
    # under pseudonyms no name is left
    secret = tmp_path / "secret"
    assert run(whole, secret, folder, monday, more=["--pseudonymise"]) == 0
    text = (secret / "unreadable.csv").read_text() + caplog.text
    assert "monday" not in text and "gone" not in text and "in/" not in text
