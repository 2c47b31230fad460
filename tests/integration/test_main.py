"""The command line: what a user can fix is one sentence on stderr and exit code 2."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medclip_jax import files, main, train
from medclip_jax.features import cache as features_cache
from tests.support.paths import ROOT


@pytest.fixture
def data(world, tmp_path) -> Path:
    """A copy of the data that a test may spoil."""
    return Path(shutil.copytree(world.data, tmp_path / "data"))


def sentence(capfd, code: int) -> str:
    """The one sentence of a refusal."""
    said = capfd.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.splitlines()[-1] == errors[0], said
    return errors[0]


def refused(capfd, world, tmp_path, *more: str, arguments: str = "k=4") -> str:
    workdir = tmp_path / "run"
    error = sentence(capfd, world.main(workdir, *more, arguments=arguments))
    left = {p.name for p in workdir.iterdir()} if workdir.is_dir() else set()
    assert left <= {".lock", "config.json"}, left  # no result of a run
    return error


# --- flags ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, named",
    [
        ("--config.stepz=3", 'config has no such field: .*"steps" instead of "stepz"'),
        ("--config.data.rot=x", '"root" instead of "rot"'),
        ("--config.steps=many", "config.steps=many"),
        ("--config.seed=-1", "config.seed is -1: give 0 or more"),
        ("--config.k=-1", "config.k is -1: give 0 or more"),
        ("--config.k=9", "pool holds 8 healthy images|only 8 healthy images"),
        ("--config.method=ous", "give one of ours, paper, mediclip, memory, zero_shot"),
        ("--config.data.name=bussi", "'bussi': give one of busi, folder"),
        ("--config.clip.layers=99", "need rising block numbers between 1 and 4"),
        ("--mode=trian", "one of <train|evaluate|predict|export|check|report>"),
        ("--stepz=3", "'stepz'"),
        ("extra", "'extra' is not a flag"),
    ],
)
def test_a_bad_flag_is_named(world, tmp_path, capfd, flag, named):
    error = refused(capfd, world, tmp_path, flag)
    assert re.search(named, error), error


@pytest.mark.parametrize("spelling", ["--config={}", "--config={}:k=3", "-config {}"])
def test_a_config_file_that_is_a_giant_or_a_pipe(spelling, tmp_path, capfd):
    path = tmp_path / "a.py"
    words = [word.format(path) for word in spelling.split()]
    path.touch()
    os.truncate(path, 1 << 30)
    error = sentence(capfd, main.main(["main", f"--workdir={tmp_path / 'run'}", *words]))
    assert f"config file {path} cannot be used (it has 1073741824 bytes where at most" in error
    path.unlink()
    os.mkfifo(path)
    error = sentence(capfd, main.main(["main", f"--workdir={tmp_path / 'run'}", *words]))
    assert f"config file {path} cannot be used (it is not a regular file)" in error


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--config=configs/busi.py:kk=3", "--workdir=W"], "config argument 'kk': give any of k"),
        (["--config=configs/busi.py:k=many", "--workdir=W"], "k='many' is not a whole number"),
        (["--config=configs/bus.py:k=3", "--workdir=W"], "configs/bus.py.* cannot be read"),
        (["--config=configs/bus.py", "--workdir=W", "--config.k=3"], "file configs/bus.py cannot"),
        (["--config=LICENSE", "--workdir=W"], "LICENSE|syntax"),
        (["--config=configs/busi.py"], "--config and --workdir are needed"),
        (["--workdir=W"], "--config and --workdir are needed"),
        ([], "--config and --workdir are needed"),
    ],
)
def test_a_command_that_cannot_start_says_why(argv, named, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    argv = [a.replace("=W", f"={tmp_path / 'run'}") for a in argv]
    error = sentence(capfd, main.main(["main", *argv]))
    assert re.search(named, error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line, named",
    [
        ("c.steps = tru", "config file mine.py line 4: name 'tru' is not defined (see --help)"),
        ("c.k = (4, 8)[2]", "config file mine.py line 4: tuple index out of range (see --help)"),
        ("assert c.k > 99", "config file mine.py line 4: AssertionError (see --help)"),
        ("c.stepz = 3", 'config is locked. Did you mean "steps" instead of "stepz"? (see --help)'),
        ("return None", "the config file gives no settings: see configs/folder.py"),
        ("c.steps = None", "config.steps is None where a int belongs"),
        ("c.data.root = None", "config.data.root is None where a str belongs"),
        (
            "c = config.ConfigDict({'k': 4})",
            "config.augment is missing or unknown (--help lists all)",
        ),
        # words of the data set: a misspelt one was passed over, a text taken for its letters
        (
            "c = config.base(conditons=('a',))",
            "config.data.conditons is missing or unknown (--help lists all)",
        ),
        (
            "c = config.base(conditions='ab')",
            "config.data.conditions is 'ab' where a tuple belongs",
        ),
    ],
)
def test_a_config_file_that_fails_names_its_line(line, named, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    head = ["from medclip_jax import config", "def get_config(arg=''):", "    c = config.base(arg)"]
    Path("mine.py").write_text("\n".join([*head, f"    {line}", "    return c"]))
    error = sentence(capfd, main.main(["main", "--config=mine.py:k=4", "--workdir=w"]))
    assert error.endswith(named) and len(error) < 200
    assert os.listdir() == ["mine.py"]


@pytest.mark.parametrize(
    "name", ["porj/configs/folder.py", "../configs/folder.py", "configs/folder.txt", "~/folder.py"]
)
def test_a_config_elsewhere_is_not_the_packaged_one(name, tmp_path, monkeypatch, capfd):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    error = sentence(capfd, main.main(["main", f"--config={name}:k=4", "--workdir=w"]))
    assert f"config file {name.replace('~', str(tmp_path))} cannot be read" in error


@pytest.mark.parametrize(
    "flag", ["--input=a.png", "--part=1/2", "--cam", "--boxes_of_passed", "--pseudonymise"]
)
@pytest.mark.parametrize("mode", ["train", "evaluate", "check", "export", "report"])
def test_a_flag_of_prediction_is_refused_elsewhere(flag, mode, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    more = ["--output=o"] if mode == "export" else ["--config=phantom"]
    for given in (flag, "--follow_links", "--keep_burned_in"):
        error = sentence(capfd, main.main(["main", f"--mode={mode}", "--workdir=w", *more, given]))
        name = given.partition("=")[0]
        assert f"error: {name} goes with --mode predict: see --help" == error
    assert not list(tmp_path.iterdir())


def test_an_output_is_of_predict_and_export_and_no_word_is_left_unread(tmp_path, capfd):
    error = sentence(capfd, main.main(["main", "--config=phantom", "--workdir=w", "--output=o"]))
    assert "error: --output goes with --mode predict or export: see --help" == error
    export = ["main", "--mode=export", f"--workdir={tmp_path}", f"--output={tmp_path}/o", "a.png"]
    assert "'a.png' is not a flag" in sentence(capfd, main.main(export))


def test_a_platform_that_is_not_there_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "medclip_jax.main", "--mode=predict", "--input=a.png"]
    command += [f"--workdir={tmp_path}", f"--output={tmp_path}/out"]
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: JAX_PLATFORMS is 'cuda', which JAX cannot use here (")
    assert not list(tmp_path.iterdir())


def test_help_ends_quietly_when_its_reader_leaves():
    command = [sys.executable, "-m", "medclip_jax.main", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as head does
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_check_ends_quietly_when_its_reader_leaves(world):
    command = [sys.executable, "-m", "medclip_jax.main", "--mode=check", *world.flags(world.base)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert b"Traceback" not in said and b"error" not in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_cannot_show_are_escaped(encoding, world, data, tmp_path):
    """Japanese folders, checked on a terminal without its letters."""
    folder = data.rename(tmp_path / "\u753b\u50cf")
    command = [sys.executable, "-m", "medclip_jax.main", "--mode", "check"]
    command += ["--config", f"configs/folder.py:k=4,root={folder}"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert done.returncode in (0, 2) and b"Traceback" not in done.stderr, done.stderr
    assert rb"\u753b\u50cf" in done.stdout + done.stderr


def test_a_path_that_the_locale_cannot_name_is_one_sentence(world, tmp_path, capfd, monkeypatch):
    def unnameable(*_, **__):
        "\u753b".encode("ascii")

    monkeypatch.setattr(train, "prepare", unnameable)
    error = sentence(capfd, world.main(tmp_path / "run"))
    assert "has letters beyond ascii: set LC_ALL=C.UTF-8" in error


def test_a_caller_may_collect_what_is_said(monkeypatch):
    """Streams that are no files, as in a notebook, have no encoding to set."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    assert main.main(["main", "--stepz=3"]) == 2
    assert said.getvalue().startswith("error: ") and "'stepz'" in said.getvalue()


def test_help_is_quick_and_imports_neither_jax_nor_transformers():
    command = [sys.executable, "-X", "importtime", "-m", "medclip_jax.main", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for word in ("--config", "--workdir", "evaluate", "--config.data.root", "--config.steps"):
        assert word in done.stdout
    imported = set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE))
    assert "ml_collections" in imported
    heavy = {"jax", "transformers", "flax", "orbax", "tensorflow_datasets", "sklearn", "numpy"}
    assert not imported & heavy


# --- the data -------------------------------------------------------------------------------


def test_a_data_root_that_is_not_there(world, tmp_path, capfd):
    error = refused(capfd, world, tmp_path, f"--config.data.root={tmp_path}/absent")
    assert f"there is no folder {tmp_path}/absent" in error and "--config.data.root" in error


def test_a_data_set_without_any_root(world, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("MEDCLIP_DATA", raising=False)
    error = refused(capfd, world, tmp_path, "--config.data.root=")
    assert "no folder was named" in error and "$MEDCLIP_DATA" in error


def spoil_missing_mask(data: Path) -> str:
    path = next((data / "ground_truth/lesion").iterdir())
    path.unlink()
    return f"has no mask ground_truth/lesion/{path.name}"


def spoil_image(data: Path) -> str:
    path = next((data / "train/good").iterdir())
    path.write_bytes(path.read_bytes()[:200])
    return f"{path.name} cannot be decoded"


def spoil_not_an_image(data: Path) -> str:
    path = next((data / "test/good").iterdir())
    path.write_bytes(b"hello")
    return f"{path.name} is not a PNG"


def spoil_mask_size(data: Path) -> str:
    path = next((data / "ground_truth/lesion").iterdir())
    Image.fromarray(np.zeros((10, 20), np.uint8)).save(path)
    return f"mask .*{path.name} is .*20.* pixels but its image is .*64"


def spoil_no_test(data: Path) -> str:
    shutil.rmtree(data / "test")  # masks are left; with them gone too, a run trains only
    return "mask ground_truth/lesion/0014_mask.png has no image"


@pytest.mark.parametrize(
    "spoil",
    [spoil_missing_mask, spoil_image, spoil_not_an_image, spoil_mask_size, spoil_no_test],
    ids=lambda f: f.__name__,
)
def test_spoilt_data_are_named(world, data, tmp_path, capfd, spoil):
    named = spoil(data)
    error = refused(capfd, world, tmp_path, f"--config.data.root={data}")
    assert re.search(named, error), error


def test_data_that_changed_since_the_run(world, data, tmp_path, capfd):
    """The split of a workdir belongs to the very bytes it was drawn from."""
    memory, root = "k=4,method=memory", f"--config.data.root={data}"
    assert world.main(tmp_path / "run", root, arguments=memory, report=False) == 0
    capfd.readouterr()
    path = next((data / "test/good").iterdir())
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(path)
    error = sentence(capfd, world.main(tmp_path / "run", root, arguments=memory))
    assert f"test/good/{path.name} has other bytes" in error


# --- the checkpoint -------------------------------------------------------------------------


def test_an_unknown_checkpoint(world, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = refused(capfd, world, tmp_path, f"--config.clip.checkpoint={tmp_path}/absent")
    assert f"{tmp_path}/absent" in error


@pytest.mark.parametrize(
    "names, said",
    [
        (("vocab.json", "merges.txt"), "no tokenizer"),
        (("flax_model.msgpack",), "no weights"),
        (("config.json",), "config.json"),
    ],
)
def test_a_checkpoint_that_lacks_a_file(world, tmp_path, capfd, names, said):
    folder = Path(shutil.copytree(world.clip, tmp_path / "clip"))
    for name in names:
        (folder / name).unlink()
    error = refused(capfd, world, tmp_path, f"--config.clip.checkpoint={folder}")
    assert said in error and str(folder) in error


# --- the workdir ----------------------------------------------------------------------------


def test_a_workdir_that_cannot_be_made(world, tmp_path, capfd):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        error = sentence(capfd, world.main(place))
        assert str(place) in error and "give another --workdir" in error


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc on this system")
def test_a_workdir_that_cannot_be_written(world, capfd):
    error = sentence(capfd, world.main(Path("/proc")))
    assert "/proc" in error and "give another" in error


def test_a_workdir_of_a_run_with_other_settings(world, whole, capfd):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    error = sentence(capfd, world.main(whole, "--config.seed=1"))
    assert "holds a run with seed = 0, not 1" in error and "another --workdir" in error
    error = sentence(capfd, world.main(whole, "--config.model.dropout=0.5"))
    assert re.search(r"model.*dropout.*0\.5", error)
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}


def test_a_report_of_nothing(world, tmp_path, capfd):
    error = refused(capfd, world, tmp_path, "--mode=report")
    assert "config.json is missing" in error


# --- the disk -------------------------------------------------------------------------------


def fill(monkeypatch, pattern: str, after: int = 0) -> list[str]:
    """Let the disk be full for files whose name matches, after so many of them."""
    seen: list[str] = []

    def replace(source, target):
        if re.search(pattern, Path(target).name):
            seen.append(Path(target).name)
            if len(seen) > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    real = os.replace
    monkeypatch.setattr(files.os, "replace", replace)
    return seen


def test_a_full_disk_while_the_bank_is_written(world, tmp_path, capfd, caplog, monkeypatch):
    cache = f"--config.cache={tmp_path / 'cache'}"
    arguments = "k=4,method=memory"
    with monkeypatch.context() as patch:
        fill(patch, r"safetensors$", after=5)
        code = world.main(tmp_path / "run", cache, arguments=arguments)
    error = sentence(capfd, code)
    assert "No space left" in error and "safetensors" in error and "free space" in error
    held = list((tmp_path / "cache/feature_cache").rglob("*.*"))
    assert len(held) == 5 and all(features_cache.is_whole(path) for path in held)
    assert not (tmp_path / "run/metrics.json").exists()
    held[0].write_bytes(held[0].read_bytes()[:100])  # a power cut may do this
    assert world.main(tmp_path / "run", cache, arguments=arguments, report=False) == 0
    assert f"{held[0].name} is damaged and " in caplog.text
    assert all(
        features_cache.is_whole(path) for path in (tmp_path / "cache/feature_cache").rglob("*.*")
    )


@pytest.mark.parametrize("name", ["predictions.npz", "metrics.json", "report.html", "split.json"])
def test_a_full_disk_while_results_are_written(world, tmp_path, capfd, monkeypatch, name):
    arguments = "k=4,method=memory"
    with monkeypatch.context() as patch:
        assert fill(patch, rf"^{name}$") == []
        code = world.main(tmp_path / "run", arguments=arguments)
    error = sentence(capfd, code)
    assert name in error and "No space left" in error
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "run" / name).exists()


def test_a_read_only_cache_serves_a_run_and_what_it_lacks_is_one_sentence(
    world, tmp_path, capfd, read_only
):
    """At another path, too: nothing is listed, encoded or compared again."""
    cache, arguments = tmp_path / "cache", "k=4,method=memory"
    assert (
        world.main(tmp_path / "a", f"--config.cache={cache}", arguments=arguments, report=False)
        == 0
    )
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    place = f"--config.cache={read_only(cache)}"
    assert world.main(tmp_path / "b", place, arguments=arguments, report=False) == 0
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    assert a["image"] == b["image"] and a["pixel"] == b["pixel"]
    capfd.readouterr()
    victim = next((cache / "feature_cache").rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:100])
    code = world.main(tmp_path / "c", place, arguments=arguments, report=False)
    error = sentence(capfd, code)
    assert f"Cannot write {tmp_path / 'read-only'}" in error and "Read-only file system" in error
    assert not (tmp_path / "c/metrics.json").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_cache_that_refuses_the_first_file_is_one_sentence(
    world, tmp_path, capfd, monkeypatch, code
):
    """At the one place of writing; root passes over the modes of files."""
    real, cache = os.open, tmp_path / "cache"

    def refuse(path, flags, *mode, **more):
        if flags & os.O_CREAT and str(path).startswith(str(cache / "feature_cache")):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *mode, **more)

    monkeypatch.setattr(files.os, "open", refuse)
    place = f"--config.cache={cache}"
    error = sentence(capfd, world.main(tmp_path / "run", place, arguments="k=4,method=memory"))
    assert f"Cannot write {cache / 'feature_cache'}" in error and os.strerror(code) in error
    assert "fix its permissions or give another folder" in error
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize("place", ["run", "cache"])
def test_a_folder_that_is_removed_during_a_run_is_one_sentence(
    world, tmp_path, capfd, monkeypatch, place
):
    real = train.fit

    def fit(*arguments, **named):
        shutil.rmtree(tmp_path / place)
        return real(*arguments, **named)

    monkeypatch.setattr(train, "fit", fit)
    cache = f"--config.cache={tmp_path / 'cache'}"
    error = sentence(capfd, world.main(tmp_path / "run", cache, arguments="k=4,method=memory"))
    assert str(tmp_path / place) in error and "removed meanwhile: run the same command" in error
