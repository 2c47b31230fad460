"""What the walk takes of the files that people, scanners, servers and this program leave."""

import errno
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid

from medclip_jax.errors import DataError
from medclip_jax.inference import inputs, pseudonyms, walk
from medclip_jax.io import nifti_write, pillow
from tests.support.predicting import dicom, noise

MAMMOGRAM = "1.2.840.10008.5.1.4.1.1.1.2"


def png(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path)
    return path


def change(path: Path, **elements) -> Path:
    """A DICOM file with other elements; None removes one."""
    ds = pydicom.dcmread(path)
    for name, value in elements.items():
        if value is None:
            del ds[name]
        else:
            setattr(ds, name, value)
        if name in ("SOPClassUID", "SOPInstanceUID"):
            setattr(ds.file_meta, f"MediaStorage{name}", value)
    ds.save_as(path, enforce_file_format=True)
    return path


def walked(*named, **options) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """(names of the files of each item, why the others are none)."""
    items = inputs.find([str(name) for name in named], **options)
    assert len({item.output for item in items}) == len(items)
    return [i.names for i in items if not i.error], {i.source: i.error for i in items if i.error}


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


def test_results_of_this_program_are_no_images(tmp_path):
    import nibabel

    png(tmp_path / "in" / "scan.png")
    out = tmp_path / "in" / "results"
    out.mkdir()
    for name, pixels in {
        "overlay": noise(0, (9, 9, 3)),
        "map": noise().astype(np.uint16),
        "cam": noise(1, (1, 1)),
    }.items():
        (out / f"renamed_{name}.png").write_bytes(pillow.encode_png(pixels))
        assert np.array_equal(np.asarray(Image.open(out / f"renamed_{name}.png")), pixels)
    nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)).to_filename(
        tmp_path / "volume.nii.gz"
    )
    nifti_write.write_nifti(
        out / "v.nii.gz", tmp_path / "volume.nii.gz", np.zeros((6, 5, 4), np.uint16)
    )
    change(dicom(out / "capture.dcm"), Manufacturer="medclip_jax")
    ours = {"Manufacturer": "medclip_jax", "SOPClassUID": uid.SegmentationStorage}
    change(dicom(out / "seg.dcm"), **ours)
    for named in ("in", "in/**/*", "in/**/*.png"):
        assert walked(tmp_path / named) == ([("in/scan.png",)], {}), named
    named = [tmp_path / "in" / "scan.png", *sorted(out.iterdir())]  # as a shell expands in/*
    names, refused = walked(*named)
    assert names == [("scan.png",)] and set(refused.values()) == {inputs.OURS}
    assert len(refused) == 6
    with pytest.raises(DataError, match="no image there"):
        walked(out)


@pytest.mark.parametrize(
    ("storage", "rows", "reason"),
    [
        (uid.MediaStorageDirectoryStorage, False, "DICOMDIR"),
        (uid.ComprehensiveSRStorage, False, "Comprehensive SR Storage"),
        (uid.KeyObjectSelectionDocumentStorage, False, "Key Object Selection"),
        (uid.GrayscaleSoftcopyPresentationStateStorage, False, "Presentation State"),
        (uid.RTStructureSetStorage, False, "RT Structure Set"),
        (uid.RTDoseStorage, True, "RT Dose"),
        (uid.RTPlanStorage, False, "RT Plan"),
        (uid.SegmentationStorage, True, "Segmentation Storage"),
        (uid.SurfaceSegmentationStorage, False, "Surface Segmentation"),
        (uid.ParametricMapStorage, True, "Parametric Map"),
        (uid.EncapsulatedPDFStorage, False, "Encapsulated PDF"),
        (uid.TwelveLeadECGWaveformStorage, False, "ECG"),
        (uid.MRSpectroscopyStorage, True, "Spectroscopy"),
        (uid.SpatialRegistrationStorage, False, "Registration"),
        (uid.RawDataStorage, False, "Raw Data"),
        ("1.2.826.0.1.77.9", False, "without rows"),
    ],
)
def test_dicom_objects_that_are_no_images(tmp_path, storage, rows, reason):
    dicom(tmp_path / "in" / "image.dcm")
    for name in ("other.dcm", "OTHER"):
        path = change(dicom(tmp_path / "in" / name, 7), SOPClassUID=str(storage))
        if not rows:
            change(path, Rows=None, Columns=None, PixelData=None)
    names, refused = walked(tmp_path / "in")
    assert names == [("in/image.dcm",)] and set(refused) == {"in/other.dcm", "in/OTHER"}
    assert all(text.startswith("not an image (") and reason in text for text in refused.values())


@pytest.mark.parametrize(
    "storage",
    [
        *(uid.CTImageStorage, uid.SecondaryCaptureImageStorage, uid.UltrasoundImageStorage),
        *(uid.EnhancedMRImageStorage, uid.RTImageStorage, uid.XRayAngiographicImageStorage),
        *("1.2.840.10008.5.1.4.1.1.1.2", "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.3.4.5"),
    ],
)
def test_dicom_images_of_all_classes_are_taken(tmp_path, storage):
    change(dicom(tmp_path / "in" / "a.dcm"), SOPClassUID=str(storage))
    assert walked(tmp_path / "in") == ([("in/a.dcm",)], {})


def test_an_image_without_rows_is_left_to_its_reader(tmp_path):
    change(dicom(tmp_path / "in" / "a.dcm"), Rows=None)
    assert walked(tmp_path / "in") == ([("in/a.dcm",)], {})


# --- series ----------------------------------------------------------------------------------


def stack(folder: Path, count: int = 4, **elements) -> list[Path]:
    return [change(dicom(folder / f"{i}.dcm", i), **elements) for i in range(count)]


def test_a_series_names_its_files_and_instances_in_order(tmp_path):
    folder = tmp_path / "in"
    for i, name in enumerate("cabd"):
        dicom(folder / name, i)
    (item,) = inputs.find([str(folder)])
    assert item.names == ("in/c", "in/a", "in/b", "in/d") and item.source == "in/c (+3)"
    assert item.paths == tuple(str(folder / name) for name in "cabd")
    assert item.uids == tuple(f"1.2.826.0.1.77.3.{i}" for i in range(4))
    (hidden,) = pseudonyms.rename([item], b"salt")
    assert len(set(hidden.names)) == 4 and not hidden.uids and hidden.source == hidden.output
    assert not set(hidden.names) & set(item.names) and hidden.paths == item.paths
    assert pseudonyms.rename([item], b"salt") == [hidden]
    assert pseudonyms.rename([item], b"other")[0].output != hidden.output


@pytest.mark.parametrize("case", ["copied", "resent"])
def test_a_slice_that_is_there_twice_counts_once(tmp_path, case):
    folder = tmp_path / "in"
    stack(folder)
    twin = folder / "2 (1).dcm"
    shutil.copy(folder / "2.dcm", twin)
    if case == "resent":  # by a server that gave it another UID
        change(twin, SOPInstanceUID="1.2.3.4", InstanceNumber=77)
    names, refused = walked(folder)
    assert names == [tuple(f"in/{i}.dcm" for i in range(4))]
    assert refused == {"in/2 (1).dcm": inputs.COPY}


def test_slices_that_only_look_like_copies_stay(tmp_path):
    """Time points at one place, and one UID that a careless program gave to all."""
    first = stack(tmp_path / "points", 3)
    for path in first:
        later = change(Path(shutil.copy(path, path.with_name(f"t{path.name}"))))
        ds = pydicom.dcmread(later)
        pixels = noise(99 + ds.InstanceNumber).tobytes()
        number = f"1.2.3.{ds.InstanceNumber + 1}"
        change(later, PixelData=pixels, SOPInstanceUID=number)
    stack(tmp_path / "careless", 3, SOPInstanceUID="1.2.3")
    (points,), refused = walked(tmp_path / "points")
    assert len(points) == 6 and not refused
    (careless,), refused = walked(tmp_path / "careless")
    assert len(careless) == 3 and not refused


@pytest.mark.parametrize(
    "storage",
    [
        MAMMOGRAM,
        uid.DigitalXRayImageStorageForPresentation,
        uid.ComputedRadiographyImageStorage,
        uid.UltrasoundImageStorage,
        uid.XRayAngiographicImageStorage,
        uid.SecondaryCaptureImageStorage,
        uid.VLPhotographicImageStorage,
    ],
)
@pytest.mark.parametrize("places", [False, True])
def test_films_of_one_series_are_items_of_their_own(tmp_path, storage, places):
    if places and storage in (uid.SecondaryCaptureImageStorage, uid.VLPhotographicImageStorage):
        return  # reformatted stacks have places
    gone = {} if places else {"ImagePositionPatient": None, "ImageOrientationPatient": None}
    stack(tmp_path / "in", SOPClassUID=str(storage), **gone)
    names, refused = walked(tmp_path / "in")
    assert names == [(f"in/{i}.dcm",) for i in range(4)] and not refused
    shutil.copy(tmp_path / "in" / "3.dcm", tmp_path / "in" / "copy of 3.dcm")
    names, refused = walked(tmp_path / "in")
    assert len(names) == 4 and refused == ({"in/copy of 3.dcm": inputs.COPY})


def test_slices_without_places_stay_one_series(tmp_path):
    stack(tmp_path / "in", ImagePositionPatient=None, ImageOrientationPatient=None)
    assert walked(tmp_path / "in") == ([tuple(f"in/{i}.dcm" for i in range(4))], {})


@pytest.mark.parametrize("jitter", [2e-9, 5e-5, 4e-4])
def test_cosines_a_rounding_apart_are_one_stack_and_others_are_not(tmp_path, jitter):
    """Around a value that rounds either way."""
    folder = tmp_path / "in"
    for i, path in enumerate(stack(folder)):
        tilt = 0.12345 + jitter * (-1) ** i
        change(path, ImageOrientationPatient=[1, 0, 0, 0, (1 - tilt**2) ** 0.5, tilt])
    scout = dicom(folder / "scout.dcm", 9)
    change(scout, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    names, refused = walked(folder)
    assert names == [tuple(f"in/{i}.dcm" for i in range(4)), ("in/scout.dcm",)] and not refused


# --- links and what cannot be opened ---------------------------------------------------------


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


# --- what is named ---------------------------------------------------------------------------


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


def test_damaged_headers_stop_nobody(tmp_path):
    """Each byte of a header in turn: an item, or a refusal, and the others as they are."""
    whole = dicom(tmp_path / "in" / "b.dcm").read_bytes()
    rng = np.random.default_rng(0)
    dicom(tmp_path / "in" / "a.dcm", 2)
    for _ in range(300):
        raw = bytearray(whole)
        for at in rng.integers(132, len(whole) - 2000, 3):
            raw[at] = rng.integers(256)
        (tmp_path / "in" / "b.dcm").write_bytes(raw)
        names, refused = walked(tmp_path / "in")
        named = sorted(name for item in names for name in item)
        assert sorted([*named, *refused]) == ["in/a.dcm", "in/b.dcm"]


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
