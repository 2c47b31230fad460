"""Files of tensors -> float32 NumPy arrays: safetensors, Flax msgpack, PyTorch's without torch.

A PyTorch file is a pickle, which may run any program when it is read in the usual way. Here only
the names that tensors need are known; a file that names anything else is refused.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from medclip_jax import stored
from medclip_jax.errors import CheckpointError

Flat = dict[str, np.ndarray]
LARGEST_PICKLE = 64 << 20  # bytes, without the values of tensors
LARGEST_SIDE = 1 << 40  # of a tensor, and the most that an offset or stride may be
ENTRY = 50  # bytes of a file that an entry of a dict takes at least, of a tensor over 100
SUFFIXES = ".safetensors", ".bin", ".msgpack", ".pt"  # what an index may name
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    **{"LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16},
    **{"CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_},
}


def read(path: Path) -> Flat:
    """The floating-point tensors of a file, or of an index of files. Raises CheckpointError."""
    if path.name.endswith(".index.json"):
        return {name: x for part in parts(path)[1:] for name, x in read(part).items()}
    readers: dict[str, Callable[[Path], Mapping]] = {
        ".safetensors": _safetensors,
        ".msgpack": _msgpack,
    }
    tensors = readers.get(path.suffix, _torch)(path)
    kinds = "f", "V"  # V: bfloat16
    floats = {n: x for n, x in tensors.items() if x.dtype.kind in kinds and x.dtype.names is None}
    if sum(x.size for x in floats.values()) > 2 * path.stat().st_size:  # views of few bytes
        raise CheckpointError(f"{path}: its tensors are larger than the file; download it again")
    return {name: np.asarray(x, np.float32) for name, x in floats.items()}


def named(path: Path) -> list[str]:
    """The files that an index names; [] for another file. Raises CheckpointError."""
    if not path.name.endswith(".index.json"):
        return []
    try:
        names = sorted(set(stored.read_json(path)["weight_map"].values()))
        plain = all(Path(name).name == name and name.endswith(SUFFIXES) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None
    if not names or not plain:
        raise CheckpointError(
            f"{path}: it must name weights ({', '.join(SUFFIXES)}) in its own folder; "
            "download it again"
        )
    return names


def parts(path: Path) -> list[Path]:
    """The file, and those that it names. Raises CheckpointError if one is not there."""
    names = named(path)
    for name in names:
        if not (path.parent / name).is_file():
            raise CheckpointError(
                f"{path.parent / name} is missing, one of {len(names)} files that {path.name} "
                "lists; copy all of them"
            )
    return [path, *(path.parent / name for name in names)]


def _safetensors(path: Path) -> Mapping:
    from safetensors import SafetensorError, safe_open

    result: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
        few = 1 + len(names) * (256 << 20) // path.stat().st_size
        for start in range(0, len(names), few):  # opened anew, what was read takes no memory twice
            with safe_open(path, "np") as file:
                result |= {name: file.get_tensor(name) for name in names[start : start + few]}
        return result
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: damaged or not safetensors ({error}); download it again"
        ) from None


def _msgpack(path: Path) -> Mapping:
    """A Flax checkpoint."""
    from flax.serialization import msgpack_restore

    try:
        flat = flatten_dict(msgpack_restore(path.read_bytes()), sep="/")
        return {name: np.asarray(x, np.float32) for name, x in flat.items()}
    except Exception as error:  # msgpack raises many unrelated types on damaged bytes
        raise CheckpointError(
            f"{path}: damaged or not Flax msgpack ({type(error).__name__}); download it again"
        ) from None


# in pure Python: the C one reserves as much memory as a damaged file asks for
PICKLE: Any = pickle._Unpickler
UNUSED = (  # opcodes that PyTorch does not write
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
)


class Forbidden(Exception):
    """The pickle names what no tensor needs."""


class Inert:
    """Stands for any class of a TorchScript archive: its attributes and nothing else."""

    state: Any = None


class _Tensors(PICKLE):
    def __init__(self, file, archive: zipfile.ZipFile, root: str, scripted: bool, room: int):
        super().__init__(file)
        self.archive, self.root, self.scripted = archive, root, scripted
        self.room = room  # bytes of the file, which its storages share
        self.values: dict[str, np.ndarray] = {}

    def build(self) -> None:
        """The opcode that sets attributes: of `Inert` alone, of an OrderedDict they are dropped."""
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, Inert):
            instance.state = state
        elif not isinstance(instance, OrderedDict):
            raise Forbidden("attributes of its own")

    def fill(self, first: int, load: Callable[[Any], None]) -> None:
        """An opcode that fills a dict; the hash of tuples in tuples may take for ever."""
        if any(isinstance(key, tuple) for key in self.stack[first::2]):
            raise ValueError("a dict under tuples")
        load(self)

    def refuse(self) -> None:
        """An opcode that PyTorch does not write: memory of any size, or more hashes."""
        raise ValueError("an opcode of no tensor")

    dispatch: ClassVar[Any] = PICKLE.dispatch | {
        pickle.BUILD[0]: build,
        pickle.SETITEM[0]: lambda self: self.fill(-2, PICKLE.load_setitem),
        pickle.SETITEMS[0]: lambda self: self.fill(0, PICKLE.load_setitems),
        pickle.DICT[0]: lambda self: self.fill(0, PICKLE.load_dict),
        **dict.fromkeys([opcode[0] for opcode in UNUSED], refuse),
    }

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): lambda: OrderedDict(),  # a copy of none
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): lambda size: size if isinstance(size, tuple) else (),
        }
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        if (module, name) in known:
            return known[module, name]
        if self.scripted and module.partition(".")[0] == "__torch__":
            return Inert
        raise Forbidden(f"{module}.{name}"[:100])

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, count = pid
        known = kind == "storage" and isinstance(dtype, np.dtype) and type(count) is int
        if not known or type(key) is not str:
            raise ValueError("an unknown storage")
        if key not in self.values:
            info = self.archive.getinfo(f"{self.root}data/{key}")
            if (
                info.compress_type != zipfile.ZIP_STORED
                or not 0 <= count * dtype.itemsize <= info.file_size
            ):
                raise ValueError(f"storage {key} has {info.file_size} bytes")
            self.room -= info.file_size
            if self.room < 0:
                raise ValueError("its storages are larger than the file")
            self.values[key] = np.frombuffer(self.archive.read(info), dtype, count)
        return self.values[key]


def _tensor(values: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    """A view of a storage; ValueError if it reaches out of it."""
    sides = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(
        type(n) is int and 0 <= n < LARGEST_SIDE for n in sides
    ):
        raise ValueError("a shape that cannot be")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    size = math.prod(shape)
    if size and last >= len(values) or size > len(values):
        raise ValueError("a tensor that is larger than its storage")
    bytes_of = tuple(s * values.itemsize for s in strides)
    return np.lib.stride_tricks.as_strided(values[offset:], shape, bytes_of, writeable=False)


def _torch(path: Path) -> Mapping:
    """A state dict of torch.save (version 1.6 or later), or OpenAI's TorchScript archive."""
    advice = "convert it to safetensors with the program that made it"
    try:
        with zipfile.ZipFile(path) as archive:
            listed = [
                n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")
            ]
            info = archive.getinfo(listed[0] if listed else "data.pkl")
            if info.file_size > LARGEST_PICKLE or info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"data.pkl is packed or has {info.file_size} bytes")
            root = info.filename.removesuffix("data.pkl")
            scripted = f"{root}constants.pkl" in archive.namelist()
            with archive.open(info) as file:
                size = path.stat().st_size
                reader = _Tensors(file, archive, root, scripted, size)
                flat = _flatten(reader.load(), size)
    except Forbidden as error:
        raise CheckpointError(
            f"{path}: it holds more than tensors ({error}), which could run a program; {advice}"
        ) from None
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path}: damaged, or not in the format of PyTorch 1.6 or later; {advice}, "
            "or download it again"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        said = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"{path}: damaged ({said}); download it again") from None
    if not flat:
        raise CheckpointError(f"{path}: there is no tensor in it; give a file of weights")
    return flat


def _flatten(result: Any, room: int) -> Flat:
    """Tensors by dotted name; of a training checkpoint those of its `state_dict` alone.

    room: bytes that all entries and their names may take. Raises ValueError for more, as of dicts
    that lie in one another several times.
    """
    if isinstance(result, Inert):
        result = result.state
    if isinstance(result, Mapping):
        result = next((result[n] for n in ("state_dict", "model") if n in result), result)
    flat, rest = {}, [("", result)]
    while rest:
        start, part = rest.pop()
        part = part.state if isinstance(part, Inert) else part
        for last, x in part.items() if isinstance(part, Mapping) else ():
            name = f"{start}{last}"
            room -= ENTRY + len(name)
            if room < 0:
                raise ValueError("its entries would take more bytes than it has")
            if isinstance(x, np.ndarray):
                flat[name] = x
            elif isinstance(x, Inert | Mapping):
                rest.append((f"{name}.", x))
    return flat
