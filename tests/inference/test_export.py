"""The exported scorer equals the one in the process, alone with jax and numpy; the API."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import medclip_jax
from medclip_jax import build_detector, main
from medclip_jax.clip.layers import Features, ImageEncoder
from medclip_jax.detectors import detector
from medclip_jax.errors import CheckpointError, DataError, WorkdirError
from medclip_jax.inference import export, predictor
from medclip_jax.io import read
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def exported(whole, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "scorer.medclip"
    assert export.save(build_detector.load_predictor(whole), path) == path.stat().st_size
    return path


IMAGES = [np.random.default_rng(i).random((40 + 7 * i, 90 - i)).astype("float32") for i in range(3)]


def test_it_equals_the_scorer_in_the_process(whole, exported):
    model = build_detector.load_predictor(whole)
    frames = np.stack([read.fit(x, model.size) for x in IMAGES])
    mine, theirs = predictor.score(model, frames), export.load(exported)(IMAGES)
    for name in theirs._fields:
        a, b = (np.asarray(getattr(x, name), float) for x in (mine, theirs))
        np.testing.assert_allclose(b, a, atol=1e-5, err_msg=name)
    assert len(export.load(exported)(IMAGES[:1]).score) == 1  # any batch size


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_weights_of_another_format(whole, tmp_path, dtype):
    model = build_detector.load_predictor(whole)
    clip = model.encoder.clip
    encoder = clip.image_encoder.clone(dtype=dtype)
    vision = jax.tree.map(jnp.asarray, encoder.prepare(jax.device_get(clip.params)))
    clip = clip._replace(vision=vision, image_encoder=encoder)
    model = model._replace(encoder=model.encoder._replace(clip=clip, vision=vision))
    export.save(model, tmp_path / "x.medclip")
    frames = np.stack([read.fit(x, model.size) for x in IMAGES])
    theirs = export.load(tmp_path / "x.medclip")(frames)
    mine = predictor.score(model, frames)
    np.testing.assert_allclose(theirs.score, mine.score, atol=1e-5)


class Reader(ImageEncoder):
    """An image encoder without parameters."""

    inputs, depth = False, 1

    def apply(self, params, pixels):
        rows = pixels.mean(-1).reshape(pixels.shape[0], -1, 4)
        return Features(rows.mean(1), (rows,))


def test_the_program_does_not_name_the_folders_of_its_sources():
    def apply(params, features, key):
        patch = features.levels[0].mean(-1)
        return detector.Scores(patch, patch.max(1))

    clip = SimpleNamespace(image_encoder=Reader(), mean=(0.0,) * 3, std=(1.0,) * 3, vision={})
    model = SimpleNamespace(
        encoder=SimpleNamespace(clip=clip, dtype="float32"),
        calibration=SimpleNamespace(peak=0.25),
        keys=jax.random.split(jax.random.key(0), 2),
        detector=detector.Detector(apply, {}, None, None, 2, False, 8),
        size=8,
    )
    before = jax.config.jax_traceback_in_locations_limit
    code, _ = export._program(model)
    assert b"main" in code and b".py" not in code and str(ROOT).encode() not in code
    assert jax.config.jax_traceback_in_locations_limit == before


@pytest.mark.parametrize("mode", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (32, 32), (300, 47)])
def test_its_frame_is_the_readers_own(shape, mode):
    pixels = np.random.default_rng(0).random(shape).astype(np.float32)
    np.testing.assert_allclose(export.fit(pixels, 32, mode), read.fit(pixels, 32, mode), atol=2e-6)


@pytest.mark.parametrize("value", [255, 1.01, -0.1, np.nan, np.inf])
def test_values_beyond_the_unit_range_are_refused_as_in_a_notebook(exported, value):
    image = IMAGES[0].copy()
    image[3, 5] = value
    with pytest.raises(DataError, match=r"give finite values \[h, w\] in \[0, 1\]"):
        export.load(exported)([IMAGES[1], image])


def test_it_needs_jax_and_numpy_alone(exported):
    code = (
        "import sys, numpy\n"
        "from medclip_jax.inference import export\n"
        f"print(export.load({str(exported)!r})(numpy.zeros((2, 9, 9))).score.shape)\n"
        "bad = {'flax', 'transformers', 'scipy', 'PIL', 'ml_collections', 'orbax', 'jaxtyping'}\n"
        "assert not bad & set(sys.modules) - {'scipy'}, bad & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "(2,)" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("plant", ["link", "dangling", "folder", "pipe", "device", "hard link"])
def test_what_lies_at_the_target(whole, tmp_path, capfd, plant):
    """A link is replaced, what it leads to is left alone; what is no file is left as it is."""
    target, outside = tmp_path / "x.medclip", tmp_path / "outside"
    if plant != "dangling":
        outside.write_text("mine")
    if plant == "pipe":
        os.mkfifo(target)
    elif plant == "folder":
        target.mkdir()
    elif plant == "hard link":
        os.link(outside, target)
    else:
        target.symlink_to("/dev/null" if plant == "device" else outside)
    code = main.main(["main", "--mode=export", f"--workdir={whole}", f"--output={target}"])
    if plant in ("folder", "pipe", "device"):
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert code == 2 and error.startswith(f"error: {target} is a folder or no regular file")
        assert not target.is_file() and Path("/dev/null").is_char_device()
    else:
        assert code == 0 and not target.is_symlink() and export.load(target).manifest
    assert outside.exists() == (plant != "dangling")
    assert plant == "dangling" or outside.read_text() == "mine"


def test_a_file_of_the_run_is_no_target(whole, capfd):
    before = (whole / "scorer.json").read_bytes()
    target = whole / "figures/../scorer.json"
    assert main.main(["main", "--mode=export", f"--workdir={whole}", f"--output={target}"]) == 2
    assert "is a file of the run: give another --output" in capfd.readouterr().err
    assert (whole / "scorer.json").read_bytes() == before


@pytest.mark.parametrize("mode", ["predict", "export"])
@pytest.mark.parametrize("name", ["scorer.json", "scorer.safetensors"])
@pytest.mark.parametrize("plant", ["pipe", "folder", "dangling", "device"])
def test_a_received_workdir_whose_files_are_none(whole, tmp_path, capfd, mode, name, plant):
    workdir, source = tmp_path / "run", tmp_path / "in.png"
    workdir.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(source)
    for other in ("scorer.json", "scorer.safetensors"):
        (workdir / other).write_bytes((whole / other).read_bytes())
    (workdir / name).unlink()
    if plant == "pipe":
        os.mkfifo(workdir / name)
    elif plant == "folder":
        (workdir / name).mkdir()
    else:
        (workdir / name).symlink_to("/dev/zero" if plant == "device" else "/absent/file")
    flags = [f"--mode={mode}", f"--workdir={workdir}", f"--output={tmp_path / 'out'}"]
    assert main.main(["main", *flags, *[f"--input={source}"] * (mode == "predict")]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and name in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_the_home_folder_is_written_out(exported, monkeypatch):
    monkeypatch.setenv("HOME", str(exported.parent))
    assert export.load(f"~/{exported.name}").manifest == export.load(exported).manifest


def test_foreign_and_damaged_files_are_refused(exported, tmp_path):
    path = tmp_path / "x"
    raw = bytearray(exported.read_bytes())
    raw[len(raw) // 2] ^= 255
    for spoilt in (b"", b"hello", bytes(raw), exported.read_bytes()[:5000]):
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match="not a whole exported detector"):
            export.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", '{"kind": "medclip_jax detector", "format": 99}')
    with pytest.raises(CheckpointError, match="format 99"):
        export.load(path)


def test_the_names_of_a_notebook(whole, tmp_path):
    scorer = medclip_jax.load(whole)
    results = scorer.predict(IMAGES)
    assert [r.map.shape for r in results] == [x.shape for x in IMAGES]
    assert all(r.alarm == (r.score >= 0.5) for r in results)
    with pytest.raises(DataError, match="outside"):
        scorer.predict([IMAGES[0] * 300])
    with pytest.raises(DataError, match="NaN"):
        scorer.predict([np.full((4, 4), np.nan)])
    assert issubclass(DataError, medclip_jax.UserError)


WRONG = {  # as a user calls it -> words of the one sentence
    'scorer.predict_files(output="out")': "nothing to score: give",
    'scorer.predict_files(["a", "b"], output="out")': "type list where a path is",
    'scorer.predict_files("absent", output=None)': "type NoneType where a path is",
    "scorer.adapt([1, 2])": "type int where a path is",
    "scorer.adapt(None)": "type NoneType where images are",
    "scorer.predict(5)": "type int where images are",
    "scorer.predict([[[0.5, 0.5], [0.5]]])": "rows are not of one length",
    'medclip_jax.load(["run"])': "type list where a path is",
    "readers.read(7)": "type int where a path is",
}


def test_a_notebook_says_what_is_wrong_with_what_it_was_given(tmp_path):
    """In a process of its own: in this one types are checked before."""
    code = f"""
import types, medclip_jax
from medclip_jax import api
from medclip_jax.data import readers
scorer = api.Scorer.__new__(api.Scorer)
scorer.adapted, scorer._predictor = False, types.SimpleNamespace(window="")
for call in {[*WRONG]}:
    try:
        print(eval(call))
    except medclip_jax.UserError as error:
        print(error)
"""
    shown = {"capture_output": True, "text": True, "cwd": tmp_path, "check": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, **shown).stdout
    for line, words in zip(said.splitlines(), WRONG.values(), strict=True):
        assert words in line
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("images", [[], None, 5, np.zeros((0, 8, 8)), "a.png", [[[0.5], []]]])
def test_what_is_no_image_is_one_sentence(images):
    call = export.Exported({"recipe": {"size": 8, "fit": "pad"}}, lambda *_: None, [])
    with pytest.raises(DataError, match=r"image .*give .*\[h, w\]"):
        call(images)


def test_importing_the_package_is_light():
    code = "import medclip_jax, sys; assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_spoilt_scorer_is_refused(whole, tmp_path):
    for name in ("scorer.json", "scorer.safetensors"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    raw = bytearray((whole / "scorer.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "scorer.safetensors").write_bytes(raw)
    with pytest.raises(WorkdirError, match="is damaged"):
        build_detector.load_predictor(tmp_path)
    (tmp_path / "scorer.safetensors").unlink()
    with pytest.raises(WorkdirError, match="holds no trained detector"):
        build_detector.load_predictor(tmp_path)
