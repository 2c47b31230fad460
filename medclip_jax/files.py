"""Files, whole or not there, read only if regular; temporary arrays; plain JSON; natural order."""

import errno
import fcntl
import hashlib
import json
import math
import operator
import os
import re
import secrets
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from medclip_jax import object_store
from medclip_jax.errors import ConfigError, WorkdirError

ODD = ValueError, OverflowError  # of a number
MOST_LOG = 1 << 27  # bytes of a metrics.jsonl that is read


def write_json(path: str | os.PathLike[str], obj: Any, durable: bool = True) -> None:
    """Write a JSON file in one piece: readers see the old file or the new one, never half.

    Values that are not finite become null; numpy scalars, arrays and paths become plain values.
    Raises WorkdirError if it cannot be written, TypeError for a value that JSON cannot hold.
    """
    text = json.dumps(plain(obj), indent=2, allow_nan=False, ensure_ascii=False)
    with suppress(UnicodeEncodeError):  # of a name that is no UTF-8
        return write_bytes(path, (text + "\n").encode(), durable)
    write_bytes(path, json.dumps(plain(obj), indent=2, allow_nan=False).encode(), durable)


def write_bytes(path: str | os.PathLike[str], data: bytes, durable: bool = True) -> None:
    """Write a file in one piece; the rest as of `writing`."""
    with writing(path, durable) as file:
        file.write(data)


class _Output(FileIO):
    """A file whose errors name the file that is written, so that they differ from all others."""

    path = Path()

    def write(self, data: Any) -> int:
        with disk_errors(self.path):
            return super().write(data)


@contextmanager
def writing(path: str | os.PathLike[str], durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write into that appears in one piece; a temporary one beside it until then.

    What lies at `path` is replaced, a link too: its target is left alone. Errors of the block that
    are not of this file pass as they are.

    durable: wait for the disk, so that the file outlives a power cut. Without, it outlives any kill
    of the process, but after a power cut it may be missing or cut short.
    Raises WorkdirError if it cannot be written.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, file = _create(path)
    try:
        with file:
            yield cast(BinaryIO, file)
            with disk_errors(path):
                file.flush()
                if durable:
                    os.fsync(file.fileno())
                os.replace(temporary, path)  # before the lock is given up
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, to be renamed to it; gone when the block is left.

    Raises WorkdirError if it cannot be made.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = _temporary_name(target)
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle)
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: Path) -> int:
    """Delete temporary files and folders that dead processes left in a folder; returns how many.

    Whoever writes one holds a lock on it, which ends with its process.
    """
    count = 0
    with suppress(OSError):  # no such folder, or not ours to list
        for entry in list(os.scandir(folder)):
            match = re.fullmatch(r"\..+\.(\d+)(\.[0-9a-f]{16})?\.tmp", entry.name)
            if match is None or entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                continue
            if not match[2] and Path("/proc", match[1]).exists():
                continue
            with suppress(OSError):  # it is locked, or another process was faster
                handle = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if entry.is_dir():
                        shutil.rmtree(entry.path)
                    else:
                        os.unlink(entry.path)
                    count += 1
                finally:
                    os.close(handle)
    return count


def read_regular(path: Path, most: int) -> bytes:
    """All bytes of a regular file, which is no link. Raises OSError for anything else, or larger.

    Never waits, as opening a pipe would.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if status.st_size > most:
            reason = f"it has {status.st_size} bytes where at most {most} are read"
            raise OSError(errno.EFBIG, reason, str(path))
        return file.read(most)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, which may still be growing.

    Raises WorkdirError if it cannot be read, naming the first line that is not a logged step.
    """
    try:
        raw = read_regular(path, MOST_LOG)
    except OSError as error:
        raise WorkdirError(
            f"Cannot read {path} ({error.strerror}): fix its permissions or set another workdir."
        ) from error
    lines = []
    for number, text in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            line = json.loads(text)
            values = [x for name, x in line.items() if name != "nonfinite" and x is not None]
            if not all(map(math.isfinite, values)):  # TypeError for what is no number
                raise ValueError(text)
            operator.index(line["step"]), float(line["seconds"])
        except (*ODD, TypeError, KeyError, RecursionError, AttributeError) as error:
            raise WorkdirError(
                f"Line {number} of {path} is not a logged step: "
                "delete that line or start in a new workdir."
            ) from error
        lines.append(line)
    return lines


def text_of(name: str | os.PathLike[str]) -> str:
    """A path or URL as text. Raises ConfigError for what is neither."""
    if not isinstance(name, str | os.PathLike):
        kind = type(name).__name__
        raise ConfigError(f"a value of type {kind} where a path is meant: give text or a Path")
    return str(name)


def expanded(name: str | os.PathLike[str]) -> Path:
    """A path, ~ written out, or the local copy of a URL: object_store's path_of and local."""
    if not text_of(name):
        raise ConfigError("an empty text where a path is meant: give a file or a folder")
    url = ":/" in str(name) and object_store.is_url(name)
    return object_store.local(str(name)) if url else object_store.path_of(name)


def write_npz(file: Any, arrays: Mapping[str, Any]) -> None:
    """As numpy.savez without the time of day, for which a clock before 1980 would be an error."""
    import numpy as np

    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def sha256_of(*paths: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, or of the hashes of several files in order.

    Raises OSError, also for what is no regular file.
    """
    if len(paths) != 1:
        return hashlib.sha256(" ".join(map(sha256_of, paths)).encode()).hexdigest()
    (path,) = paths
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with open(handle, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:40]}.{os.getpid()}.{secrets.token_hex(8)}.tmp")


def _create(path: Path) -> tuple[Path, BufferedWriter]:
    """A new file beside `path`, whatever was planted there, and locked for `sweep`."""
    while True:
        temporary = _temporary_name(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        raw = _Output(os.open(temporary, flags, 0o666), "wb")
        raw.path = path
        _lock(raw.fileno())
        if os.fstat(raw.fileno()).st_nlink:
            return temporary, BufferedWriter(raw, 1 << 20)
        raw.close()  # swept between its creation and its lock


def _lock(handle: int) -> None:
    with suppress(OSError):  # a file system without locks: nothing of it is swept, either
        fcntl.flock(handle, fcntl.LOCK_SH)


def temporary_array(shape: tuple[int, ...], dtype: Any, folder: Path | None = None) -> Any:
    """Zeros on disk: what grows with the test set stays out of memory.

    The file has no name: it is gone with the process, however that ends. Its space is reserved at
    once, as writing to a memory map on a full disk would kill the process.

    Args:
      shape, dtype: of the array.
      folder: on whose disk; None for the system's temporary folder.

    Raises:
      WorkdirError: if the disk is full or the folder cannot be written.
    """
    import numpy as np

    with disk_errors(Path(tempfile.tempdir or "a temporary folder")):
        folder = Path(folder or tempfile.gettempdir())
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return np.memmap(file, dtype, "r+", shape=shape)


def plain(obj: Any) -> Any:
    """The same value in JSON's types; a number that is not finite becomes None."""
    if isinstance(obj, Mapping):
        return {str(name): plain(value) for name, value in obj.items()}
    import numpy as np  # here, as --help needs none

    if isinstance(obj, np.generic | np.ndarray):
        return plain(obj.tolist())
    if isinstance(obj, list | tuple | set | frozenset):
        values = sorted(obj) if isinstance(obj, set | frozenset) else obj
        return [plain(value) for value in values]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return str(obj) if isinstance(obj, Path) else obj


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Every OSError of the block becomes a WorkdirError that names `path`."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"Cannot write {path} ({error.strerror or error}): "
            "free space there, fix its permissions or give another folder."
        ) from error


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts "a (2)" before "a (10)"; ties in number fall back on the spelling."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((1, int(p), p) if p.isdecimal() else (0, 0, p) for p in parts)
