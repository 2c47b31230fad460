"""Prediction through the door: results, resume, hostile names, bad files, privacy, shares."""

import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

import medclip_jax
from medclip_jax import build_detector, main
from medclip_jax.inference import inputs, predictor
from medclip_jax.io import read
from tests.support.paths import ROOT
from tests.support.predicting import PLANTED, dicom, noise, pages, png, run, table, walked
from tests.support.runs import predictions


@pytest.fixture(scope="module")
def data(world) -> Path:
    return world.data


def test_the_stored_scorer_gives_the_test_scores_again(whole, data):
    """From the workdir alone, against what training wrote for the same images."""
    held = predictions(whole)
    model = build_detector.load_predictor(whole)
    size = model.size
    images = [read.fit(read.read(data / i).pixels[0], size) for i in held["id"]]
    got = predictor.score(model, np.stack(images))
    np.testing.assert_allclose(got.score, held["score"], atol=2e-3)
    np.testing.assert_allclose(got.p_value, held["p_value"], atol=1e-6)
    np.testing.assert_allclose(got.maps, held["maps"].astype(float), atol=3e-3)
    np.testing.assert_allclose(got.uncertainty, held["uncertainty"], atol=2e-3)
    assert (got.alarm == (got.score >= 0.5)).all()


def test_an_image_alone_is_scored_as_among_others(whole, data):
    scorer = medclip_jax.load(whole)
    paths = [data / name for name in predictions(whole)["id"][:2]]
    together, alone = scorer.predict(paths), [scorer.predict([path])[0] for path in paths]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.score, other.score, atol=2e-5)
        np.testing.assert_allclose(one.map, other.map, atol=2e-4)
        assert (one.alarm, len(one.boxes)) == (other.alarm, len(other.boxes))


def test_a_path_alone_is_one_image_and_a_home_folder_is_written_out(
    whole, data, tmp_path, monkeypatch
):
    scorer, name = medclip_jax.load(whole), predictions(whole)["id"][0]
    monkeypatch.setenv("HOME", str(data))
    ways = [data / name], data / name, str(data / name), f"~/{name}"
    assert len({scorer.predict(way)[0].score for way in ways}) == 1
    assert scorer.predict_files(f"~/{name}", output=tmp_path / "out").scored == 1
    (tmp_path / "~").mkdir()
    Image.fromarray(noise()).save(tmp_path / "~" / "~a.png")
    monkeypatch.chdir(tmp_path)
    assert walked("./~/~a.png")[0] == [("~a.png",)]  # a folder of that name


def test_boxes_of_command_line_notebook_and_report_are_equal(whole, data, tmp_path):
    written = predictions(whole)
    ends = [0, *written["boxes_end"]]
    first = np.argsort(-np.diff(ends), kind="stable")[:3].tolist()  # the most boxes
    paths = [data / written["id"][i] for i in first]
    assert run(whole, tmp_path, *paths) == 0
    commands = {page["source"]: page for page in pages(tmp_path)}
    notebook = medclip_jax.load(whole).predict(paths)
    count = 0
    for i, path, result in zip(first, paths, notebook, strict=True):
        report = written["boxes"][ends[i] : ends[i + 1]]
        page = commands[path.name]
        for boxes in (
            [list(box.values())[:4] for box in page["frames"][0]["boxes"]],
            [box[:4] for box in result.boxes],
        ):
            np.testing.assert_array_equal(np.reshape(boxes, (-1, 4)), report[:, :4])
        # equation (10), as in predictions.npz
        frame = page["frames"][0]
        with np.load(tmp_path / page["files"]["mc_dropout"]) as maps:
            for name in ("patch_mean", "patch_variance"):
                np.testing.assert_allclose(maps[name][0], written[name][i], atol=2e-3)
            assert frame["patch_variance_max"] == maps["patch_variance"].max() > 0
        count += len(report)
    assert count


def test_a_folder_without_test_images_leaves_the_same_scorer(world, data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "alone" / "train")
    left = []
    for name, given in (("measured", world), ("alone", world._replace(data=tmp_path / "alone"))):
        run_of = tmp_path / f"run-{name}"
        assert given.main(run_of, arguments="k=4,method=memory", report=False) == 0
        head = json.loads((run_of / "scorer.json").read_text())
        left.append([head["sha256"], head["calibration"]])
    assert left[0] == left[1]
    assert not (tmp_path / "run-alone" / "metrics.json").exists()
    assert run(tmp_path / "run-alone", tmp_path / "out", data / "test" / "good") == 0
    assert len(table(tmp_path / "out")) == 6


@pytest.mark.parametrize("more", [[], ["--pseudonymise"]], ids=["names", "pseudonyms"])
def test_a_file_of_the_same_name_elsewhere_replaces_no_result(whole, tmp_path, capsys, more):
    """Results are named by paths below what is given: two patients' `series/1.png` are equal."""
    for i, patient in enumerate(("one", "two")):
        png(tmp_path / patient / "series" / "1.png", i)
    output = tmp_path / "out"
    assert run(whole, output, tmp_path / "one" / "series", more=more) == 0
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    assert run(whole, output, tmp_path / "two" / "series", more=more) == 2
    said = capsys.readouterr().err
    assert "holds the result of another file called" in said and "into a new folder" in said
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    png(tmp_path / "one" / "series" / "1.png", 2)  # the same file, changed: scored again
    assert run(whole, output, tmp_path / "one" / "series", more=more) == 0
    assert {p.name: p.read_bytes() for p in output.iterdir()} != before


def test_a_file_that_is_gone_is_listed_and_its_result_removed(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(png(tmp_path / "a.png").parent)
    png(tmp_path / "b.png")
    assert run(whole, tmp_path / "out", "a.png", "b.png") == 0 and len(pages(tmp_path / "out")) == 2
    (tmp_path / "a.png").unlink()
    assert run(whole, tmp_path / "out", "a.png", "b.png") == 0
    assert [page["source"] for page in pages(tmp_path / "out")] == ["b.png"]
    assert [row["source"] for row in table(tmp_path / "out", "unreadable.csv")] == ["a.png"]


def test_results_bad_files_and_resume(whole, data, tmp_path, caplog):
    folder, output = tmp_path / "in", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "sub/b.png", "c\nd;=1.png", "x" * 200 + ".png")):
        Image.fromarray(noise(i)).save(folder / name)
    Image.fromarray(np.full((1, 1), 255, np.uint8)).save(folder / "one.png")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not for us")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    assert run(whole, output, folder, tmp_path / "absent.png") == 0
    rows, bad = table(output), table(output, "unreadable.csv")
    assert len(rows) == 5 and len(bad) == 3
    assert {"in/broken.png", "in/pipe.png", "absent.png"} == {row["source"] for row in bad}
    assert all("\n" not in row["source"] for row in rows)
    inside = {p.resolve().parent for p in output.rglob("*")}
    assert inside == {output.resolve()} and max(len(p.name) for p in output.iterdir()) < 130
    for page in pages(output):
        heat = np.asarray(Image.open(output / page["files"]["map"]))
        assert heat.shape == (page["height"], page["width"])
        for box in page["frames"][0]["boxes"]:
            part = heat[box["row0"] : box["row1"], box["col0"] : box["col1"]]
            assert part.max() >= 32768 and "width_mm" not in box
    before = {p.name: p.stat().st_mtime_ns for p in output.glob("*.json")}
    Image.fromarray(noise(9)).save(folder / "a.png")  # other bytes
    assert run(whole, output, folder) == 0
    changed = {p.name for p in output.glob("*.json") if p.stat().st_mtime_ns != before[p.name]}
    assert len(changed) == 1 and next(iter(changed)).startswith("in_a.png")


def test_shares_cover_everything_once_and_join(whole, tmp_path):
    for i in range(5):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(noise(i)).save(tmp_path / "in" / f"{i}.png")
    output = tmp_path / "out"
    for part in ("1/2", "2/2"):
        assert run(whole, output, tmp_path / "in", more=[f"--part={part}"]) == 0
    parts = [table(output, f"results.{i}-of-2.csv") for i in (1, 2)]
    assert [len(p) for p in parts] == [3, 2]
    assert run(whole, output, tmp_path / "in") == 0
    joined = table(output)
    assert sorted(r["source"] for r in joined) == sorted(r["source"] for p in parts for r in p)
    assert {r["score"] for r in joined} == {r["score"] for p in parts for r in p}


def test_grad_cam_is_written_if_wanted(whole, tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    for more in ([], ["--cam"]):  # the second call scores the item again
        assert run(whole, tmp_path / "out", tmp_path / "a.png", more=more) == 0
        (page,) = pages(tmp_path / "out")
        assert ("cam" in page["files"]) == bool(more)
    cam = np.asarray(Image.open(tmp_path / "out" / page["files"]["cam"]))
    heat = np.asarray(Image.open(tmp_path / "out" / page["files"]["overlay"]))
    assert page["files"]["cam"].endswith(".cam.png") and cam.shape == heat.shape
    assert (cam != heat).any() and (cam.max(2) > cam.min(2)).any()


def test_nothing_to_read_is_the_users_to_mend(whole, tmp_path, capfd):
    assert run(whole, tmp_path / "out", tmp_path / "absent.png") == 2
    assert "none of the 1 item(s) could be read" in capfd.readouterr().err
    assert run(whole, tmp_path / "out", tmp_path) == 2
    assert run(whole, tmp_path / "out", tmp_path, more=["--part=3/2"]) == 2
    assert run(tmp_path, tmp_path / "out", tmp_path) == 2
    assert main.main(["main", "--mode=predict", f"--workdir={whole}"]) == 2


@pytest.mark.parametrize("pseudonymise", [False, True])
def test_a_dicom_series_gives_objects_without_identity(whole, tmp_path, caplog, pseudonymise):
    for number in (2, 1, 3):
        dicom(tmp_path / "in" / f"s{4 - number}.dcm", number)
    output = tmp_path / "out"
    more = ["--pseudonymise"] if pseudonymise else []
    assert run(whole, output, tmp_path / "in", more=more) == 0
    (page,) = pages(output)
    assert len(page["frames"]) == 3 and page["spacing_mm"] == [0.5, 0.7] and not page["notes"]
    seg = pydicom.dcmread(output / page["files"]["seg"])
    capture = pydicom.dcmread(output / page["files"]["capture"])
    assert seg.SOPClassUID == pydicom.uid.SegmentationStorage and (seg.Rows, seg.Columns) == (
        40,
        50,
    )
    referred = {
        r.ReferencedSOPInstanceUID
        for r in seg.ReferencedSeriesSequence[0]["ReferencedInstanceSequence"]
    }
    ours = {f"1.2.826.0.1.77.3.{n}" for n in (1, 2, 3)}
    assert not referred & ours if pseudonymise else referred == ours
    assert "BurnedInAnnotation" not in capture and capture.StudyInstanceUID == seg.StudyInstanceUID
    # PS3.3 asks that objects of a study share the patient's name, id and birth date: no more
    allowed = () if pseudonymise else PLANTED[:3]
    for path in output.rglob("*"):
        raw = path.read_bytes()
        held = [p for p in PLANTED if p.encode() in raw]
        assert set(held) <= set(allowed if path.suffix == ".dcm" else ()), (path.name, held)
    assert not any(p in caplog.text for p in PLANTED)
    if pseudonymise:
        assert not any(u.encode() in p.read_bytes() for u in ours for p in output.rglob("*"))


def test_a_header_with_several_values_for_one_is_a_slice_of_its_own(tmp_path):
    path = dicom(tmp_path / "in" / "a.dcm")
    whole = path.read_bytes()
    dicom(tmp_path / "in" / "b.dcm", 2)
    at = whole.index(b"\x28\x00\x10\x00US\x02\x00")  # Rows, of one value
    rows = whole[at : at + 6] + b"\x04\x00" + whole[at + 8 : at + 10] * 2
    path.write_bytes(whole[:at] + rows + whole[at + 10 :])
    items = inputs.find([str(tmp_path / "in")])
    assert [len(item.paths) for item in items] == [1, 1]


def test_every_page_of_a_stack_has_its_map(whole, data, tmp_path):
    """As each image alone; a single map would be of the first page, whichever has the alarm."""
    healthy, abnormal = (next((data / "test").glob(f"{kind}/*.png")) for kind in ("good", "[!g]*"))
    pages_of = [Image.open(path).convert("L").resize((64, 64)) for path in (healthy, abnormal)]
    (tmp_path / "in").mkdir()
    for name, some in {"one": pages_of[:1], "two": pages_of[1:], "both": pages_of}.items():
        path = tmp_path / "in" / f"{name}.tif"
        some[0].save(path, save_all=True, append_images=some[1:])
    assert run(whole, tmp_path / "out", tmp_path / "in") == 0
    found = {page["source"]: page for page in pages(tmp_path / "out")}
    both = found["in/both.tif"]
    assert "map.png" not in both["files"]["map"] and len(both["frames"]) == 2
    maps = np.load(tmp_path / "out" / both["files"]["map"])["maps"]
    for i, name in enumerate(("one", "two")):
        alone = found[f"in/{name}.tif"]
        assert alone["score"] == pytest.approx(both["frames"][i]["score"], abs=1e-4)
        codes = np.asarray(Image.open(tmp_path / "out" / alone["files"]["map"]), np.float32)
        mine = read.to_frame(maps[i].astype(np.float32), 64, 64)
        np.testing.assert_allclose(codes / 65536, mine, atol=2e-3)


def test_a_volume_gives_a_map_on_its_own_grid(whole, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 900, (20, 24, 8)).astype(np.int16)
    affine = np.array([[-1.5, 0, 0, 9], [0, 0, 2.0, -7], [0, 1.2, 0, 3], [0, 0, 0, 1]])
    nibabel.Nifti1Image(voxels, affine).to_filename(tmp_path / "v.nii.gz")
    assert run(whole, tmp_path / "out", tmp_path / "v.nii.gz") == 0
    (page,) = pages(tmp_path / "out")
    made = nibabel.load(tmp_path / "out" / page["files"]["map"])
    np.testing.assert_allclose(made.affine, affine, atol=1e-5)
    assert made.shape == voxels.shape and 0 <= made.get_fdata().min()
    # axial slices run along the source's second axis, which is the patient's foot-to-head axis
    tops = [made.get_fdata()[:, i].max() >= 0.5 for i in range(24)]
    boxed = [bool(f["boxes"]) for f in page["frames"]]
    assert len(boxed) == 24 and all(t or not b for t, b in zip(tops, boxed, strict=True))


def test_a_volume_too_long_for_the_first_nifti_has_a_map_of_the_second(whole, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 900, (33000, 12, 1)).astype(np.int16)
    nibabel.Nifti2Image(voxels, np.diag([0.1, 0.2, 1, 1])).to_filename(tmp_path / "long.nii.gz")
    assert run(whole, tmp_path / "out", tmp_path) == 0
    (page,) = pages(tmp_path / "out")
    made = nibabel.load(path := tmp_path / "out" / page["files"]["map"])
    assert made.shape == voxels.shape and made.header["magic"].item() == b"n+2"
    np.testing.assert_allclose(made.affine, np.diag([0.1, 0.2, 1, 1]), atol=1e-6)
    assert walked(path)[1] == {path.name: inputs.OURS}


def test_a_config_by_name_is_the_packaged_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for given in ("configs/phantom.py:k=4", "./configs/phantom.py:k=4", "phantom:k=4"):
        argv = main.with_packaged_config(["main", f"--config={given}"])
        assert argv[1] == f"--config={ROOT}/configs/phantom.py:k=4"
    monkeypatch.setenv("HOME", str(tmp_path))  # of which a config is the user's own
    argv = main.with_packaged_config(["main", "--config", "~/configs/phantom.py:k=4"])
    assert argv[2] == f"{tmp_path}/configs/phantom.py:k=4"
    assert main.with_packaged_config(["main", "--config", "none.py"]) == [
        "main",
        "--config",
        "none.py",
    ]


def test_what_can_no_longer_be_read_leaves_no_earlier_result(whole, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(noise(i)).save(folder / f"{i}.png")
    assert run(whole, output, folder) == 0
    kept, gone = sorted(inputs.safe_name(f"in/{i}.png") for i in range(2))
    assert len(list(output.glob(f"{gone}.*"))) >= 3
    for number in (1, 2, 4, 17):  # Segmentations, two of which could not be built
        (output / f"{gone}.{number}.seg.dcm").touch()
    for name in (f"{kept}.2", f"{gone}-2.2"):  # of others
        (output / f"{name}.seg.dcm").touch()
    before = {path.name for path in output.glob("*") if not path.name.startswith(f"{gone}.")}
    (folder / "1.png").write_bytes(b"no image")
    assert run(whole, output, folder) == 0
    assert {path.name for path in output.iterdir()} == before
