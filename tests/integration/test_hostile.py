"""Files that mean harm: bounded memory, one sentence each, and everything else goes on."""

import csv
import errno
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from medclip_jax import build_detector, stored
from medclip_jax.detectors import saved
from medclip_jax.errors import CheckpointError, UserError, WorkdirError
from medclip_jax.features import cache
from medclip_jax.inference import export, pipeline
from medclip_jax.report import load
from tests.support import hostile
from tests.support.folders import png
from tests.support.paths import ROOT
from tests.support.predicting import run, table

FAST = {label: one for label, one in hostile.KINDS.items() if one.fast}


def compare(paths: dict[str, Path], output: Path) -> None:
    """What each kind gave, in a folder "in" of which each has a folder of its own."""
    rows = {row["source"] for row in table(output)}
    bad = {r["source"]: r["reason"] for r in table(output, "unreadable.csv")}
    assert "in/good.png" in rows and not rows & set(bad)
    for label, path in paths.items():
        place = f"in/{path.parent.name}/"
        reason = "".join(text for source, text in bad.items() if source.startswith(place))
        read = any(source.startswith(place) for source in rows)
        wanted = hostile.KINDS[label].expect
        assert read or reason, label
        if wanted != hostile.TOGETHER:
            assert read == (wanted == hostile.READ), (label, reason)
        assert read or wanted in reason, (label, reason)
        assert reason.isprintable() and str(output.parent) not in reason


def test_a_sample_of_the_kinds(whole, tmp_path):
    """Each as its own folder, all at once; the good image among them has its result."""
    png(tmp_path / "in" / "good.png", 1, (30, 40))
    paths = hostile.write(tmp_path / "in", FAST)
    assert run(whole, tmp_path / "out", tmp_path / "in") == 0
    compare(paths, tmp_path / "out")


@pytest.mark.slow
def test_all_kinds_in_one_run_of_the_command_line(whole, tmp_path):
    png(tmp_path / "in" / "good.png", 1, (30, 40))
    paths = hostile.write(tmp_path / "in")
    command = [sys.executable, "-m", "medclip_jax.main", "--mode=predict", f"--workdir={whole}"]
    command += [f"--output={tmp_path / 'out'}", f"--input={tmp_path / 'in'}"]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    text = (tmp_path / "said").read_text()
    assert process.returncode == 0 and "Traceback" not in text, text[-3000:]
    compare(paths, tmp_path / "out")
    assert usage.ru_maxrss < 2_000_000  # kB


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({one.family for one in hostile.KINDS.values()}))
def test_every_kind_alone_stays_below_two_gigabytes(whole, tmp_path, family):
    """In one process of its own, the high-water mark of which is reset before each file."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.hostile_memory", f"--workdir={whole}"]
        + [f"--table={tmp_path / 'table.csv'}", f"--only=^{family}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(one.family == family for one in hostile.KINDS.values())
    assert max(int(row["mb"]) for row in rows) < 2000


# ---- exported files


@pytest.fixture(scope="module")
def exported(whole, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "detector.medclip"
    export.save(build_detector.load_predictor(whole), path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def forged(parts: dict[str, bytes], **changes) -> dict[str, bytes]:
    """With right digests, which anybody can make."""
    manifest = json.loads(parts["manifest.json"])
    for name, value in changes.items():
        manifest["calibration"][name] = value
    manifest["sha256"] = {name: hashlib.sha256(parts[name]).hexdigest() for name in export.MEMBERS}
    return parts | {"manifest.json": json.dumps(stored.sealed(manifest)).encode()}


def write(path: Path, parts, packing=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, raw in parts.items() if isinstance(parts, dict) else parts:
            archive.writestr(name, raw)
    return path


def with_array(parts: dict[str, bytes], raw: bytes, name="w0.npy") -> dict[str, bytes]:
    """One array of the weights replaced by these bytes."""
    with zipfile.ZipFile(io.BytesIO(parts["weights.npz"])) as archive:
        arrays = {n: archive.read(n) for n in archive.namelist()} | {name: raw}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for n, content in arrays.items():
            archive.writestr(n, content)
    return forged(parts | {"weights.npz": packed.getvalue()})


def npy(array: np.ndarray, shape=None, descr=None) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    raw = file.getvalue()
    if shape is not None or descr is not None:
        head = (
            f"{{'descr': {descr or '<f4'!r}, 'fortran_order': False, 'shape': {shape or (1,)}, }}"
        )
        raw = (
            b"\x93NUMPY\1\0" + struct.pack("<H", 118) + head.ljust(117).encode() + b"\n" + raw[128:]
        )
    return raw


def other_program() -> bytes:
    """A whole one that takes and gives something else."""
    platforms = export.PLATFORMS
    shape = jax.ShapeDtypeStruct((4,), np.float32)
    made = jax.export.export(jax.jit(lambda x: x + 1), platforms=platforms)(shape)
    return bytes(made.serialize())


def first_array(parts: dict[str, bytes]) -> np.ndarray:
    with np.load(io.BytesIO(parts["weights.npz"])) as arrays:
        return arrays["w0"]


PROGRAM, WEIGHTS, CARD = export.MEMBERS
DIGEST = "it was changed since it was written: its digest differs"
OTHER_MEMBERS = "its members are not those of an exported detector"
CASES = {
    "threshold": (
        lambda p: (
            p
            | {
                "manifest.json": p["manifest.json"].replace(
                    b'"threshold":', b'"threshold": 1e1 ,"x":'
                )
            }
        ),
        "digest differs",
    ),
    "forged threshold": (
        lambda p: forged(p, threshold=1e9),
        "calibration.threshold is 1000000000.0",
    ),
    "forged scale": (lambda p: forged(p, scale=0), "calibration.scale is 0, outside"),
    "forged k": (lambda p: forged(p, k="many"), "calibration.k is 'many' where"),
    "no weights": (lambda p: {n: r for n, r in p.items() if n != WEIGHTS}, OTHER_MEMBERS),
    "one more": (lambda p: p | {"x.py": b"import os"}, OTHER_MEMBERS),
    "absolute name": (lambda p: p | {"/etc/x": b""}, OTHER_MEMBERS),
    "name above": (lambda p: p | {"../x": b""}, OTHER_MEMBERS),
    "twice": (lambda p: [*p.items(), (CARD, b"again")], OTHER_MEMBERS),
    "no program": (lambda p: forged(p | {PROGRAM: b""}), "not a whole exported detector"),
    "random program": (
        lambda p: forged(p | {PROGRAM: np.random.default_rng(0).bytes(9000)}),
        "not a whole exported detector",
    ),
    "cut program": (lambda p: forged(p | {PROGRAM: p[PROGRAM][:9000]}), "not a whole exported"),
    "other program": (
        lambda p: forged(p | {PROGRAM: other_program()}),
        "its program does not take",
    ),
    "shape of 2^40": (
        lambda p: with_array(p, npy(first_array(p), shape=(1 << 40,))),
        "has not the size that it promises",
    ),
    "another shape": (lambda p: with_array(p, npy(np.zeros(3, "f4"))), "does not fit its weights"),
    "another type": (
        lambda p: with_array(p, npy(first_array(p).astype(np.float64))),
        "does not fit its weights",
    ),
    "not a number": (
        lambda p: with_array(p, npy(np.full_like(first_array(p), np.nan))),
        "a weight of it is not a finite number",
    ),
    "objects": (lambda p: with_array(p, npy(np.array([os.getcwd], object))), "has not the size"),
    "head of an array": (
        lambda p: with_array(p, b"\x93NUMPY\2\0\xff\xff\xff\x7f" + bytes(99)),
        "is of another version",
    ),
    "one array more": (lambda p: with_array(p, npy(np.zeros(1)), "w99.npy"), "not those that its"),
    "deep manifest": (
        lambda p: p | {"manifest.json": b'{"a":' * 100_000 + b"1" + b"}" * 100_000},
        "nested too deeply",
    ),
    "zeros as weights": (
        lambda p: forged(p | {WEIGHTS: bytes(64 << 20)}),
        "weights.npz in it has more than",
    ),
    "zeros as program": (
        lambda p: forged(p | {PROGRAM: bytes((64 << 20) + 1)}),
        "detector.stablehlo in it has more than 67108864 bytes",
    ),
    "zeros as manifest": (
        lambda p: p | {"manifest.json": bytes(8 << 20)},
        "manifest.json in it has",
    ),
    "50,000 members": (
        lambda p: [*p.items(), *((f"{i}", b"") for i in range(5_000))],
        "its list of members is far too long",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_exported_file_that_means_harm_is_one_sentence(exported, tmp_path, case):
    change, sentence = CASES[case]
    path = write(tmp_path / "x", change(members(exported)))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        export.load(path)
    assert str(caught.value).startswith(f"{path} ") and "\n" not in str(caught.value)


def test_no_zip_file_link_or_pipe_as_an_exported_file(exported, tmp_path):
    path = tmp_path / "x"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="it is not a regular file"):
        export.load(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="it has 1099511627776 bytes where at most"):
        export.load(path)
    with path.open("wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(CheckpointError, match="not a whole exported detector"):
        export.load(path)


# ---- a workdir that was received


@pytest.fixture
def received(whole, tmp_path) -> Path:
    """What prediction and the report read."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in whole.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def huge(path: Path, size=1 << 40, head=b"") -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


def test_a_detector_of_a_workdir_that_means_harm_is_one_sentence(received):
    path, tensors = received / saved.SETTINGS, received / saved.TENSORS
    whole_text, whole_tensors = path.read_bytes(), tensors.read_bytes()
    for raw, sentence in {
        b"{" + b'"a":{' * 100_000: "nested too deeply|digest|Expecting",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000: "nested too deeply",
        b'{"a": ['
        + b"0," * 8_000_000
        + b"0]}": "has more than 8,000,000 values|bytes where at most",
        b'{"format": 1e999}': "Infinity|digest|no number",
    }.items():
        path.write_bytes(raw)
        with pytest.raises(WorkdirError, match=sentence):
            saved.read(received)
    huge(path)
    with pytest.raises(WorkdirError, match="it has 1099511627776 bytes where at most 16777216"):
        saved.read(received)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(WorkdirError, match="it is not a regular file"):
        saved.read(received)
    path.unlink()
    path.write_bytes(whole_text)
    huge(tensors)
    with pytest.raises(WorkdirError, match="it has 1099511627776 bytes where at most"):
        saved.read(received)
    bombs = {
        "shape": struct.pack("<Q", 64)
        + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'.ljust(64)
        + bytes(4),
        "header of 1 GB": struct.pack("<Q", 1 << 30) + b"{}",
        "no end": struct.pack("<Q", 2**64 - 1) + b"{}",
        "deep": struct.pack("<Q", 600_000) + b'{"a":' * 100_000 + b"1" * 100_000,
        "nothing": b"",
    }
    for label, raw in bombs.items():
        tensors.write_bytes(raw)
        head = json.loads(whole_text) | {"sha256": hashlib.sha256(raw).hexdigest()}
        path.write_text(json.dumps(stored.sealed(head)))
        with pytest.raises(WorkdirError, match="is damaged") as caught:
            saved.read(received)
        assert "\n" not in str(caught.value), label
    path.write_bytes(whole_text)
    tensors.write_bytes(whole_tensors)
    assert saved.read(received).params.keys()
    assert load_file(tensors)


@pytest.mark.parametrize("name", ["config.json", "split.json", "metrics.json", "metrics.jsonl"])
def test_files_of_a_report_that_mean_harm_are_one_sentence(received, name):
    load.read(received)
    line = b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n"
    for raw in (
        line,
        b"[" * 100_000 + b"\n",
        b"\0" * 1000 + b"\n",
        b'{"step": 1e999, "seconds": 1}\n',
    ):
        (received / name).write_bytes(raw)
        with pytest.raises(UserError) as caught:
            load.read(received)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    huge(received / name)
    with pytest.raises(UserError, match=f"{name}.*it has 1099511627776 bytes"):
        load.read(received)


def test_predictions_that_mean_harm_are_one_sentence(received):
    """Also with the right digest."""
    path, metrics = (
        received / "predictions.npz",
        json.loads((received / "metrics.json").read_text()),
    )
    parts = members(path)
    for change, packing, sentence in (
        ({"score.npy": npy(np.zeros(9, "f4"), shape=(1 << 40,))}, zipfile.ZIP_STORED, "promises"),
        ({"score.npy": npy(np.array([os.getcwd], object))}, zipfile.ZIP_STORED, "promises"),
        ({"thumb.npy": npy(np.zeros(64 << 20, "u1"))}, zipfile.ZIP_DEFLATED, "is packed"),
        ({str(i): b"" for i in range(5000)}, zipfile.ZIP_STORED, "far too long"),
    ):
        write(path, parts | change, packing)
        metrics["finished"]["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        (received / "metrics.json").write_text(json.dumps(stored.sealed(metrics)))
        with pytest.raises(WorkdirError, match=f"{path} cannot be used .*{sentence}"):
            load.read(received)


def test_what_lies_where_a_file_of_the_cache_should_be(tmp_path, caplog):
    """Links, pipes and giants are made again; what a link leads to is left alone."""
    path, outside = tmp_path / "a.safetensors", tmp_path / "outside"
    outside.write_bytes(b"mine")
    path.symlink_to(outside)
    assert not cache.is_whole(path) and not path.is_symlink()
    assert outside.read_bytes() == b"mine" and "damaged" in caplog.text
    os.mkfifo(path)
    assert not cache.is_whole(path)
    path.unlink()
    huge(path)
    assert not cache.is_whole(path) and not path.exists()
    for raw in (b"", b"\0", struct.pack("<Q", 2**64 - 1) + b"{}", struct.pack("<Q", 1 << 30)):
        path.write_bytes(raw)
        assert not cache.is_whole(path) and not path.exists()


def test_a_frame_that_cannot_be_made_costs_its_item_alone(whole, tmp_path, monkeypatch):
    for i in range(3):
        png(tmp_path / "in" / f"{i}.png", i, (30, 40))
    real = pipeline.fit

    def fit(predictor, job, number):
        if job.item.source == "in/1.png":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", job.item.paths[0])
        return real(predictor, job, number)

    monkeypatch.setattr(pipeline, "fit", fit)
    assert run(whole, tmp_path / "out", tmp_path / "in") == 0
    assert [row["source"] for row in table(tmp_path / "out")] == ["in/0.png", "in/2.png"]
    (bad,) = table(tmp_path / "out", "unreadable.csv")
    assert bad["reason"] == "in/1.png cannot be read (No such file or directory)"
