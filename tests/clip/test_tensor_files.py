"""Files of tensors: what they hold, and that nothing in them runs (reference/backbones/make.py)."""

import io
import json
import os
import pickle
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from medclip_jax.clip import tensor_files
from medclip_jax.errors import CheckpointError
from tests.support.paths import REFERENCE

FILES = REFERENCE / "backbones"
VALUES = np.arange(24, dtype=np.float32).reshape(4, 6) / 8
EXPECTED = {"a": VALUES.T[1:, ::2], "b": VALUES[1], "c": VALUES[:2], "d": np.float32(2.5)}


@pytest.mark.parametrize(
    ("file", "before", "names"),
    [
        ("state_dict.bin", "", "abcd"),
        ("trained.bin", "module.", "abcd"),
        ("scripted.pt", "inner.", "bd"),
    ],
)
def test_tensors_of_pytorch_are_read_without_it(file, before, names):
    tensors = tensor_files.read(FILES / file)
    assert set(tensors) == {f"{before}{n}" for n in names}  # whole numbers are no weights
    for name in names:
        assert tensors[f"{before}{name}"].dtype == np.float32
        np.testing.assert_array_equal(tensors[f"{before}{name}"], EXPECTED[name])


def archive(path, content: bytes, data: bytes = b"\0" * 16, way=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", way) as file:
        file.writestr("x/data.pkl", content)
        file.writestr("x/data/0", data)
    return path


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def storage(count: int, offset=0, shape=(4,), strides=(1,)) -> bytes:
    """A pickle of one tensor, as torch writes it."""
    pid = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ"
    out = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n("
    out += pid + count.to_bytes(4, "little", signed=True) + b"tQ"
    for value in (offset, shape, strides):
        out += pickle.dumps(value, 2)[2:-1]
    return out + b"\x89}tRs."


def test_a_tensor_lies_inside_its_storage(tmp_path):
    data = np.arange(4, dtype=np.float32).tobytes()
    whole = archive(tmp_path / "a.bin", storage(4), data)
    np.testing.assert_array_equal(tensor_files.read(whole)["w"], [0, 1, 2, 3])
    bad = [(5,), (4, 1), (4, 0, (5,)), (4, 0, (2, 2), (3, 1)), (4, 0, (9,), (0,)), (4, -1), (-4,)]
    for i, case in enumerate([*bad, (4, 0, (1 << 40,), (0,)), (4, 0, (4,), (1, 1))]):
        with pytest.raises(CheckpointError, match="damaged"):
            tensor_files.read(archive(tmp_path / f"{i}.bin", storage(*case), data))
    with pytest.raises(CheckpointError, match="damaged"):
        tensor_files.read(archive(tmp_path / "z.bin", storage(4), data, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    "value",
    [
        Call(os.system, "touch ran"),
        Call(eval, "open('ran', 'w')"),
        {"state_dict": {"w": Call(exec, "open('ran', 'w')")}},
        Call(getattr, dict, "fromkeys"),
        Call(io.open, "ran", "w"),
    ],
)
def test_nothing_in_a_file_runs(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 2, 4):
        path = archive(tmp_path / "a.bin", pickle.dumps(value, protocol))
        with pytest.raises(CheckpointError, match="more than tensors .*could run a program"):
            tensor_files.read(path)
    assert not (tmp_path / "ran").exists()


def test_attributes_of_our_own_functions_stay(tmp_path):
    """The opcode BUILD would set them: (None, {"__defaults__": ...})."""
    text = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\0\0\0__defaults__K\x01s\x86b."
    with pytest.raises(CheckpointError, match="attributes of its own"):
        tensor_files.read(archive(tmp_path / "a.bin", text))
    assert tensor_files._tensor.__defaults__ is None


@pytest.mark.parametrize(
    ("file", "said"),
    [("legacy.bin", "format of PyTorch 1.6"), ("module.bin", r"more than tensors \(torch.nn")],
)
def test_other_files_of_pytorch_are_refused(file, said):
    with pytest.raises(CheckpointError, match=said):
        tensor_files.read(FILES / file)


@pytest.mark.parametrize("content", [b"", b"}.", b"\x80\x02}r\xff\xff\xff\x7f.", b"(((", b"\xff"])
def test_damaged_pickles_are_one_sentence(tmp_path, content):
    """The third asks a reader in C for 16 GB."""
    with pytest.raises(CheckpointError, match="damaged|no tensor"):
        tensor_files.read(archive(tmp_path / "a.bin", content))


def doubled(value: bytes, levels: int, wrap: bytes) -> bytes:
    """A pickle of a value that lies twice in what lies twice in what ...; two bytes to fetch it."""
    out = b"\x80\x02" + value
    for i in range(levels):
        it = b"h" + bytes([100 + i])
        out += b"q" + bytes([100 + i]) + b"0" + wrap.replace(b"IT", it)
    return out


DICT = b"}(X\x01\0\0\0aITX\x01\0\0\0bITu"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x05\x96" + (10**12).to_bytes(8, "little") + b".", "an opcode of no tensor"),
        (doubled(b"}", 60, DICT) + b".", "more bytes than it has"),
        (doubled(storage(4)[2:-1], 60, DICT) + b".", "more bytes than it has"),
        (b"\x80\x02}q\x64X\x01\0\0\0ah\x64s.", "more bytes than it has"),  # in itself
        (b"\x80\x02}" + doubled(b"K\x01", 60, b"ITIT\x86")[2:] + b"K\x01s.", "under tuples"),
        (b"\x80\x02}(" + doubled(b"K\x01", 60, b"ITIT\x86")[2:] + b"K\x01u.", "under tuples"),
        (doubled(b"K\x01", 60, b"ITIT\x86") + b"(h\x9fK\x01d.", "under tuples"),
        (b"\x80\x04(" + doubled(b"K\x01", 60, b"ITIT\x86")[2:] + b"\x91.", "opcode of no tensor"),
        (b"\x80\x02ccollections\nOrderedDict\n}\x85R.", "damaged"),  # a copy
    ],
)
def test_a_small_pickle_takes_neither_memory_nor_time(tmp_path, content, said):
    path, start = archive(tmp_path / "a.bin", content), time.process_time()
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=said):
        tensor_files.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6 and time.process_time() - start < 1


def test_dicts_that_are_shared_are_read_under_each_name(tmp_path):
    """As a module that a network has twice; also in files of pickled zeros, which are packed."""
    content = doubled(storage(4)[2:-1], 1, DICT) + b"."
    data = np.arange(4, dtype=np.float32).tobytes()
    tensors = tensor_files.read(archive(tmp_path / "a.bin", content, data))
    assert set(tensors) == {"a.w", "b.w"} and all(x[3] == 3 for x in tensors.values())
    with zipfile.ZipFile(tmp_path / "b.bin", "w") as file:
        file.writestr("x/data.pkl", b"}" * (1 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="data.pkl is packed"):
        tensor_files.read(tmp_path / "b.bin")


@pytest.mark.parametrize("keep", [0, 10, 300, 900])
def test_truncated_files_are_one_sentence(tmp_path, keep):
    path = tmp_path / "a.bin"
    path.write_bytes((FILES / "state_dict.bin").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        tensor_files.read(path)


def test_an_index_names_the_files(tmp_path):
    save_file({"a": VALUES}, tmp_path / "one.safetensors")
    save_file({"b": VALUES.astype(ml_dtypes.bfloat16)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    tensors = tensor_files.read(index)
    for name in "ab":
        np.testing.assert_array_equal(tensors[name], VALUES)
    assert len(tensor_files.parts(index)) == 3
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match="two.safetensors is missing, one of 2 files"):
        tensor_files.read(index)
    own = {"a": index.name}  # in which it would be looked for again, and again
    paths = {"a": "../one.safetensors"}, {"a": "/etc/passwd"}, {"a": "config.json"}, {"a": ".."}
    for other in (own, *paths, {"a": ""}, {"a": 3}, {}, []):
        index.write_text(json.dumps({"weight_map": other}))
        with pytest.raises(CheckpointError, match=r"index\.json: "):
            tensor_files.read(index)
