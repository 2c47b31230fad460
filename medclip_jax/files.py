"""Files that appear whole or not at all, temporary arrays, and JSON that any reader can read."""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medclip_jax.errors import WorkdirError


def write_json(path: str | os.PathLike[str], obj: Any, durable: bool = True) -> None:
    """Write a JSON file in one piece: readers see the old file or the new one, never half.

    Values that are not finite become null; numpy scalars, arrays and paths become plain values.
    Raises WorkdirError if it cannot be written, TypeError for a value that JSON cannot hold.
    """
    text = json.dumps(plain(obj), indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode(), durable)


def write_bytes(path: str | os.PathLike[str], data: bytes, durable: bool = True) -> None:
    """Write a file in one piece; the rest as of `writing`."""
    with writing(path, durable) as file:
        file.write(data)


@contextmanager
def writing(path: str | os.PathLike[str], durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write into that appears in one piece; a temporary one beside it until then.

    durable: wait for the disk, so that the file outlives a power cut. Without, it outlives any kill
    of the process, but after a power cut it may be missing or cut short.
    Raises WorkdirError if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def temporary_array(shape: tuple[int, ...], dtype: Any, folder: Path | None = None) -> np.ndarray:
    """Zeros on disk: what grows with the test set stays out of memory.

    The file has no name: it is gone with the process, however that ends. Its space is reserved at
    once, as writing to a memory map on a full disk would kill the process.

    Args:
      shape, dtype: of the array.
      folder: on whose disk; None for the system's temporary folder.

    Raises:
      WorkdirError: if the disk is full or the folder cannot be written.
    """
    folder = Path(folder or tempfile.gettempdir())
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise cannot_write(folder, error) from error


def plain(obj: Any) -> Any:
    """The same value in JSON's types; a number that is not finite becomes None."""
    if isinstance(obj, Mapping):
        return {str(name): plain(value) for name, value in obj.items()}
    if isinstance(obj, np.generic | np.ndarray):
        return plain(obj.tolist())
    if isinstance(obj, list | tuple | set | frozenset):
        values = sorted(obj) if isinstance(obj, set | frozenset) else obj
        return [plain(value) for value in values]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return str(obj) if isinstance(obj, Path) else obj


def cannot_write(path: Path, error: OSError) -> WorkdirError:
    return WorkdirError(
        f"Cannot write {path} ({error.strerror or error}): "
        "free space there, fix its permissions or give another workdir."
    )
