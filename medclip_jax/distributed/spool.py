"""Rows of one shape in a temporary file: what grows with the test set stays out of memory."""

import math
import operator
import os
import tempfile
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from medclip_jax import files


class Rows:
    """Arrays of one shape and type, written by place and read one at a time, from any thread.

    The file has no name: it is gone with the process, however that ends. What was written is the
    system's to keep in memory or not.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype, folder: Path | None = None):
        """`count` rows of zeros. folder: on whose disk; None for the system's temporary folder."""
        self.shape, self.dtype = (count, *shape), np.dtype(dtype)
        self._folder = Path(folder or tempfile.gettempdir())
        self._size = math.prod(shape) * self.dtype.itemsize
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)
            weakref.finalize(self, self._file.close)
            self._file.truncate(count * self._size)
        except OSError as error:
            raise files.cannot_write(self._folder, error) from error

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: SupportsIndex) -> np.ndarray:
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        raw = os.pread(self._file.fileno(), self._size, i * self._size)
        return np.frombuffer(raw, self.dtype).reshape(self.shape[1:])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        whole = np.stack(list(self)) if len(self) else np.empty(self.shape, self.dtype)
        return whole if dtype is None else whole.astype(dtype)

    def put(self, start: int, rows: np.ndarray) -> None:
        """Write `rows` from row `start` on. Raises WorkdirError if the disk refuses them."""
        left = memoryview(np.ascontiguousarray(rows, self.dtype).tobytes())
        at = start * self._size
        try:
            while left:  # a nearly full disk takes a part
                done = os.pwrite(self._file.fileno(), left, at)
                left, at = left[done:], at + done
        except OSError as error:
            raise files.cannot_write(self._folder, error) from error

    def save(self, file: Any) -> None:
        """Write all rows as a .npy file into an open binary file."""
        head = np.lib.format.header_data_from_array_1_0(np.empty(0, self.dtype))
        np.lib.format.write_array_header_1_0(file, head | {"shape": self.shape})
        for row in self:
            file.write(row.tobytes())


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz file of arrays and Rows, in one piece; as numpy's own, without pickle.

    Raises WorkdirError if it cannot be written.
    """
    with files.writing(path) as whole, zipfile.ZipFile(whole, "w", allowZip64=True) as archive:
        for name, value in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                if isinstance(value, Rows):
                    value.save(member)
                else:
                    np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)
