"""Folders, links and patterns as they are named: what the walk comes upon, and what it lists."""

import errno
import os
import shutil
import socket

import pytest
from PIL import Image

from medclip_jax.errors import DataError
from medclip_jax.inference import inputs, pseudonyms, walk
from tests.support.folders import pair
from tests.support.predicting import noise, png, walked


def test_hidden_files_thumbnails_and_what_systems_leave_are_passed_over(tmp_path):
    png(tmp_path / "in" / "scan.png")
    apple = b"\0\x05\x16\x07\0\x02\0\0Mac OS X        " + b"\0" * 400
    for name in ("._scan.png", "__MACOSX/._scan.png", "__MACOSX/scan.png", ".AppleDouble/scan.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(apple)
    for name in (".thumbnails/scan.png", "@eaDir/scan.png/SYNO.jpg", "$RECYCLE.BIN/scan.png"):
        png(tmp_path / "in" / name)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", "LICENSE"):
        (tmp_path / "in" / name).write_bytes(b"x")
    for named in ("in", "in/*", "in/**", "i*", "**/*.png"):
        names, refused = walked(tmp_path / named)
        assert [os.path.basename(n) for (n,) in names] == ["scan.png"] and not refused, named
    names, _ = walked(tmp_path / "in" / ".thumbnails")  # but what is named is meant
    assert names == [(".thumbnails/scan.png",)]


def test_a_file_that_its_folder_passes_over_is_taken_where_it_is_named_too(tmp_path):
    png(tmp_path / "in" / "scan.png")
    png(tmp_path / "in" / "other.png").rename(tmp_path / "in" / "other.mr")
    for named in (["in", "in/other.mr"], ["in/other.mr", "in"], ["in", "in/*.mr", "in/other.mr"]):
        names, refused = walked(*(tmp_path / name for name in named))
        assert sorted(os.path.basename(n) for (n,) in names) == ["other.mr", "scan.png"], named
        assert not refused


def test_links_stay_in_the_folder_that_was_named(tmp_path):
    outside = tmp_path / "outside"
    png(outside / "secret.png")
    folder = tmp_path / "in"
    real = png(folder / ".store" / "object.png")
    png(folder / "a" / "x.png")
    (folder / "annexed.png").symlink_to(real)  # as git-annex and DVC keep their files
    for name, target in {
        "loop": folder,
        "0first": folder / "a",  # already has a name of its own
        "up": tmp_path,
        "root": "/",
        "folder_out": outside,
        "file_out.png": outside / "secret.png",
        "sibling": f"{folder}-2",
    }.items():
        (folder / name).symlink_to(target)
    png(tmp_path / "in-2" / "y.png")
    for named in (folder, f"{folder}/**"):
        names, refused = walked(named)
        assert names == [("in/annexed.png",), ("in/a/x.png",)], named
        out = {"up", "root", "folder_out", "file_out.png", "sibling"}
        assert set(refused) == {f"in/{name}" for name in out}
        assert all("a link out of the folder" in reason for reason in refused.values())
    (folder / "root").unlink()
    (folder / "up").unlink()
    names, refused = walked(folder, follow_links=True)
    assert not refused and len(names) == 5
    assert walked(folder / "file_out.png") == ([("file_out.png",)], {})  # named itself
    assert walked(folder / "folder_out") == ([("folder_out/secret.png",)], {})


def test_what_cannot_be_opened_is_listed_with_its_reason(tmp_path):
    folder = tmp_path / "in"
    png(folder / "a.png")
    (folder / "gone.png").symlink_to(folder / "absent")
    (folder / "self").symlink_to(folder / "self")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "IM0001")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    try:
        os.chdir(folder)  # names of sockets are short
        server.bind("socket.dcm")
    finally:
        os.chdir(here)
        server.close()
    (folder / "half.img").write_bytes(b"x")
    (folder / "whole.img").write_bytes(b"x")
    (folder / "whole.hdr").write_bytes(b"x")
    (folder / "slides.nrrd").write_bytes(b"x")
    names, refused = walked(folder, tmp_path / "absent.png", folder / "pipe.png")
    assert names == [("in/a.png",), ("in/whole.hdr",)]
    special = "no regular file: a pipe, a device or a socket"
    assert refused == {
        "in/gone.png": "a link to what is not there",
        "in/self": f"cannot be opened ({os.strerror(errno.ELOOP)})",
        "in/pipe.png": special,
        "in/IM0001": special,
        "in/socket.dcm": special,
        "in/half.img": "half of a NIfTI pair whose header (.hdr) is missing",
        "in/slides.nrrd": "a format that is not read: save it as PNG, TIFF, DICOM or NIfTI",
        "absent.png": "is not there",
    }


def test_a_nifti_pair_is_one_image_however_it_is_named(tmp_path):
    header = pair(tmp_path / "in" / "a", 0)
    voxels = header.with_suffix(".img")
    upper = [p.rename(p.with_name(f"B{p.suffix.upper()}")) for p in (pair(header, 1), voxels)]
    pair(header, 0)
    for named in ((header, voxels), (voxels,), (tmp_path / "in" / "a.*",)):
        (item,) = inputs.find([str(name) for name in named])
        assert item.paths == (str(header),) and item.kind == "nifti" and not item.error
    assert walked(tmp_path / "in") == ([("in/B.HDR",), ("in/a.hdr",)], {})
    assert walked(*upper) == ([("B.HDR",)], {})


@pytest.mark.parametrize("pattern", ["", "/**/*.png", "/*"])
def test_folders_and_files_without_permission_are_listed(tmp_path, monkeypatch, pattern):
    """Root may read everything: the system's refusal is made here."""
    folder = tmp_path / "in"
    png(folder / "a.png")
    png(folder / "locked" / "b.png")
    (folder / "IM0001").write_bytes(b"x")
    scandir, opened = os.scandir, os.open

    def forbid(real, *names):
        def call(path, *more, **other):
            if os.path.basename(path) in names:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *more, **other)

        return call

    monkeypatch.setattr(walk.os, "scandir", forbid(scandir, "locked"))
    monkeypatch.setattr(inputs.os, "open", forbid(opened, "IM0001"))
    names, refused = walked(f"{folder}{pattern}")
    assert names == [("in/a.png",)]
    wanted = {"in/locked": "a folder that cannot be listed (Permission denied)"}
    if "png" not in pattern:
        wanted["in/IM0001"] = "cannot be opened (Permission denied)"
    assert refused == wanted


def test_a_path_that_is_too_long_is_listed(tmp_path):
    png(tmp_path / "in" / "a.png")
    here, name = os.getcwd(), "d" * 250
    try:
        os.chdir(tmp_path / "in")
        for _ in range(17):  # beyond the 4096 bytes of a path
            os.mkdir(name)
            os.chdir(name)
        Image.fromarray(noise()).save("deep.png")
    finally:
        os.chdir(here)
    names, refused = walked(tmp_path / "in")
    assert names == [("in/a.png",)]
    (reason,) = refused.values()
    assert os.strerror(errno.ENAMETOOLONG) in reason
    shutil.rmtree(tmp_path / "in")


def test_a_pattern_or_folder_without_images_is_listed(tmp_path, caplog):
    png(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("x")
    monday = f"{tmp_path}/monday/*.dcm"
    names, refused = walked(
        tmp_path / "a.png", monday, tmp_path / "empty", tmp_path / "texts", f"{tmp_path}/*.tif"
    )
    assert names == [("a.png",)] and len(refused) == 4
    assert sorted(refused.values()) == ["matches nothing"] * 2 + ["no image in this folder"] * 2
    assert f"{monday}: matches nothing" in caplog.text
    with pytest.raises(DataError, match="no image there"):
        walked(monday, tmp_path / "empty")


def test_an_empty_name_is_not_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(png(tmp_path / "a.png").parent)
    names, refused = walked("", "a.png")
    assert names == [("a.png",)] and list(refused.values()) == ["is not there"]


def test_things_named_twice_are_taken_once(tmp_path):
    png(tmp_path / "in" / "a.png")
    png(tmp_path / "in" / "b" / "c.png")
    named = ("in", "in", "in/a.png", "in/b", "in/*.png", "i*")
    names, refused = walked(*(tmp_path / name for name in named))
    assert names == [("in/a.png",), ("in/b/c.png",)] and not refused


def test_the_same_name_below_two_folders_stays_apart(tmp_path):
    for folder in "xy":
        png(tmp_path / folder / "in" / "a.png")
    items = inputs.find([str(tmp_path / folder / "in") for folder in "xy"])
    assert [item.source for item in items] == ["in/a.png", "in/a.png (2)"]
    assert items[1].output == f"{items[0].output}-2"
    assert len({item.output for item in pseudonyms.rename(items, b"salt")}) == 2


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.png", ["a.png"]),
        ("*", ["a.png", "p1/b.png", "p1/s/c.png", "p2/b.png"]),  # folders with all below
        ("p*", ["p1/b.png", "p1/s/c.png", "p2/b.png"]),
        ("*/*.png", ["p1/b.png", "p2/b.png"]),
        ("p?/s", ["p1/s/c.png"]),
        ("p[1]/*", ["p1/b.png", "p1/s/c.png"]),
        ("**/*.png", ["a.png", "p1/b.png", "p1/s/c.png", "p2/b.png"]),
        ("**/s/**/*.png", ["p1/s/c.png"]),
        ("p*/**/b.png", ["p1/b.png", "p2/b.png"]),
        ("*.dat", ["x.dat"]),  # a named ending is tried whatever it is
    ],
)
def test_patterns(tmp_path, monkeypatch, pattern, wanted):
    for name in ("a.png", "p1/b.png", "p1/s/c.png", "p2/b.png", ".h/d.png"):
        png(tmp_path / "in" / name)
    (tmp_path / "in" / "x.dat").write_bytes(b"x")
    names, refused = walked(f"{tmp_path}/in/{pattern}")
    assert sorted(n for (n,) in names) == [f"in/{name}" for name in wanted] and not refused
    monkeypatch.chdir(tmp_path / "in")
    names, _ = walked(pattern)
    assert sorted(n for (n,) in names) in ([f"in/{n}" for n in wanted], wanted)


def test_a_pattern_does_not_walk_where_it_cannot_fit(tmp_path, monkeypatch):
    png(tmp_path / "in" / "a.png")
    png(tmp_path / "in" / "deep" / "deeper" / "b.png")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(walk.os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert len(walked(f"{tmp_path}/in/*.png")[0]) == 1
    assert listed == [str(tmp_path / "in")]
