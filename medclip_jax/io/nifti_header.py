"""NIfTI files, pairs and gzip streams: the header, and the stored voxels once it proved harmless.

A gzip stream is read to its end, so that its checksum is verified. Free text of a header (it may
name a patient) and extensions are never returned or parsed.
"""

import gzip
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medclip_jax.errors import DataError
from medclip_jax.io import image
from medclip_jax.io.image import MAX_BYTES

SINGLE, PAIR = (b"n+1", b"n+2"), (b"ni1", b"ni2")  # magic letters of NIfTI-1 and NIfTI-2
PAIR_SUFFIXES = (".hdr", ".img")
PIECE = 1 << 20  # bytes
HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348

# nibabel prints what it repairs in a header to stderr, without the file's name: of no use to anyone
nibabel.imageglobals.logger.setLevel(logging.CRITICAL)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that hold an image: header and voxels of a pair, either named; else the one."""
    if not path.name.lower().endswith(PAIR_SUFFIXES):
        return (path,)
    upper = path.suffix.isupper()
    return tuple(path.with_suffix(x.upper() if upper else x) for x in PAIR_SUFFIXES)


def read_header(path: Path) -> nibabel.Nifti1Header:
    """The header of a file or pair, which proved harmless; raises as `stored`."""
    return stored(path, header_only=True)[0]


def size_of(path: Path) -> int:
    """Bytes of the voxels in memory and of the map written for them, by the header alone."""
    header = read_header(path)
    return _size(path, header) + 2 * math.prod(header.get_data_shape())


def stored(path: Path, header_only: bool = False) -> tuple[nibabel.Nifti1Header, np.ndarray]:
    """Header and stored voxels, 3-D or 4-D; unpacked only after the header proved harmless.

    Extensions (they may hold a whole DICOM header) are not even parsed.
    """
    path, *voxels_of_pair = files_of(path)
    magics, data = (PAIR, voxels_of_pair[0]) if voxels_of_pair else (SINGLE, path)
    with _opened(path) as file:
        header = _header(path, _read(path, file, HEADER_BYTES), magics)
    if header_only:
        return header, np.zeros(0)
    size, shape = _size(path, header), header.get_data_shape()
    with _opened(data) as file:
        raw = _read(data, file, size)
        if len(raw) < size:
            raise DataError(
                f"{data} holds {len(raw):,} of the {size:,} bytes that its header states: "
                "it is truncated, copy it again."
            )
        _check_end(data, file, size)
    kind, offset = header.get_data_dtype(), int(header.get_data_offset())
    voxels = np.frombuffer(raw, kind, math.prod(shape), offset).reshape(shape, order="F")
    return header, voxels.reshape(*shape, 1) if voxels.ndim == 2 else voxels


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The content of a file, unpacked where it is gzip, whatever its ending."""
    image.check_regular(path)
    with path.open("rb") as file:
        if not _is_packed(path, file.read(HEADER_BYTES)):
            file.seek(0)
            yield file
            return
        file.seek(0)
        with gzip.GzipFile(fileobj=file) as stream:
            yield stream


def _read(path: Path, file: Any, count: int) -> bytearray:
    """The first `count` bytes, or all; DataError for a damaged gzip."""
    try:
        raw, end = bytearray(), 0
        while end < count and (piece := file.read(min(PIECE, count - end))):
            raw += piece
            end += len(piece)
        return raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not gzip, or a damaged or truncated gzip ({error}): copy it again."
        ) from error


def _check_end(path: Path, file: Any, total: int) -> None:
    """Read the rest of a gzip stream for its checksum alone."""
    while isinstance(file, gzip.GzipFile) and (more := len(_read(path, file, PIECE))):
        total += more
        if total > MAX_BYTES:
            raise DataError(
                f"{path} unpacks to more than {MAX_BYTES:,} bytes: remove it if it is not yours."
            )


def _is_packed(path: Path, raw: bytes) -> bool:
    """Whether the content is gzip, whatever the suffix; a .gz that is no NIfTI either should be."""
    plain = raw[344:347] == SINGLE[0] or raw[4:7] == SINGLE[1]
    return not plain and (raw[:2] == b"\x1f\x8b" or path.name.lower().endswith(".gz"))


def _header(path: Path, raw: bytearray, magics: tuple[bytes, bytes]) -> nibabel.Nifti1Header:
    """The header of the NIfTI version that the magic letters name, with a harmless shape."""
    if raw[344:347] == magics[0]:
        header = nibabel.Nifti1Header(bytes(raw[:348]))
    elif raw[4:7] == magics[1]:
        header = nibabel.Nifti2Header(bytes(raw[:540]))
    else:
        if (348).to_bytes(4, "little") in (raw[:4], raw[3::-1]):
            raise DataError(
                f"{path} is not a NIfTI file but Analyze 7.5, or has lost its magic letters, and "
                "does not say which side is left: convert it to NIfTI."
            )
        raise DataError(f"{path} is not a NIfTI file (no magic letters): replace or remove it.")
    shape = [int(n) for n in header.get_data_shape()]
    while len(shape) > 3 and shape[-1] in (0, 1):
        shape.pop()  # an axis that holds nothing
    header.set_data_shape(shape)
    if magics is SINGLE and not header["vox_offset"]:
        header["vox_offset"] = header.single_vox_offset  # voxels cannot begin at the header
    if not 2 <= len(shape) <= 4:
        raise DataError(f"{path} has {len(shape)} axes and 2 to 4 are read: save it as 3-D.")
    image.check_size(path, shape[0], shape[1], math.prod(shape[2:]))
    return header


def states_sizes(path: Path) -> bool:
    """Whether a header that was accepted says how large voxels are; nibabel makes 1 of a 0."""
    path = files_of(path)[0]
    with _opened(path) as file:
        raw = bytes(_read(path, file, HEADER_BYTES))
    first = raw[344:347] in (SINGLE[0], PAIR[0])
    header = nibabel.Nifti1Header if first else nibabel.Nifti2Header
    fields = header(raw[: header.sizeof_hdr], check=False)
    absent = (fields["pixdim"][1:4] == 0) & (fields["dim"][1:4] > 1)
    return bool(fields["sform_code"] > 0 or not absent.any())


def affine_of(path: Path, header: nibabel.Nifti1Header) -> np.ndarray:
    """Voxel index -> position [4, 4]: the best of sform, qform and voxel sizes that is usable."""
    for affine in (header.get_best_affine(), header.get_qform(coded=True)[0]):
        if affine is not None and np.isfinite(affine).all() and np.linalg.det(affine[:3, :3]):
            return affine
    raise DataError(f"{path} has an affine that flattens space: fix its header.")


def _size(path: Path, header: nibabel.Nifti1Header) -> int:
    """Bytes up to the last voxel; too many are refused."""
    voxels = math.prod(int(n) for n in header.get_data_shape())
    offset = int(header.get_data_offset())
    size = offset + voxels * header.get_data_dtype().itemsize
    if not 0 <= offset <= size <= MAX_BYTES:
        raise DataError(
            f"{path} says it holds {size:,} bytes and at most {MAX_BYTES:,} are read: "
            "save it in parts or remove it if it is not yours."
        )
    return size
