"""NIfTI-1 and NIfTI-2 through nibabel: slices of canonical volumes, and maps back as volumes.

The header is checked before the voxels are unpacked, and a gzip stream is read to its end, so that
its checksum is verified. Free text of a header (it may name a patient) is never returned or copied.
"""

import gzip
import logging
import math
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nibabel
import numpy as np
from jaxtyping import Float, UInt16
from nibabel import orientations

from medclip_jax import files
from medclip_jax.errors import DataError
from medclip_jax.io import image
from medclip_jax.io.image import MAX_BYTES, Image, Window, load_bytes

Axis = Literal["axial", "coronal", "sagittal"]
AXES: dict[str, tuple[int, int, int]] = {  # canonical axis of (slices, rows, columns)
    "axial": (2, 1, 0),
    "coronal": (1, 2, 0),
    "sagittal": (0, 2, 1),
}
MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
SINGLE, PAIR = (b"n+1", b"n+2"), (b"ni1", b"ni2")  # magic letters of NIfTI-1 and NIfTI-2
PAIR_SUFFIXES = (".hdr", ".img")
HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348
MARK = b"medclip_jax anomaly map"  # description of what is written
MAP_SLOPE = 2.0**-16  # of written maps, uint16: a voxel is at least 0.5 exactly where its map is
GEOMETRY = (
    *("qform_code", "sform_code", "pixdim", "quatern_b", "quatern_c", "quatern_d", "xyzt_units"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)

# nibabel prints what it repairs in a header to stderr, without the file's name: of no use to anyone
nibabel.imageglobals.logger.setLevel(logging.CRITICAL)


class Volume(NamedTuple):
    """A NIfTI volume in RAS+ order: axes permuted and flipped, nothing resampled."""

    voxels: Float[np.ndarray, "x y z *t"]  # float32, slope and intercept applied
    affine: Float[np.ndarray, "4 4"]  # voxel index -> position, float64
    unit: float  # mm per unit of the affine


def read_nifti(
    path: Path,
    axis: Axis = "axial",
    frames: tuple[int, int] | None = None,
    window: Window | None = None,
) -> Image:
    """Slices of a volume as a radiologist sees them.

    Args:
      axis: "axial": row 0 anterior, column 0 patient right, slices from foot to head. "coronal":
        row 0 superior, column 0 patient right, slices from back to front. "sagittal": row 0
        superior, column 0 anterior, slices from left to right. Oblique volumes are not resampled.
      frames: (first, end) of the slices to return, end not included. A 4-D volume has all slices
        of time 0, then those of time 1, and so on.
      window: maps Hounsfield units to [0, 1]. Without one, values are stretched by the least and
        the largest value of the whole volume (all time points), whichever slices are returned; a
        constant volume becomes zeros.

    Raises:
      DataError: as `nifti_volume`; NaN or infinite voxels; a range that leaves the volume; a window
        on voxels of 8 bits or in colour, which hold no Hounsfield units.
    """
    volume = nifti_volume(path, hounsfield=window is not None)
    bad = volume.voxels.size - np.count_nonzero(np.isfinite(volume.voxels))
    if bad:
        raise DataError(
            f"{path} has {bad:,} voxels that are NaN, infinite or beyond float32: "
            "set them to a number first."
        )
    pixels = slices(volume.voxels, axis)
    low, high = float(pixels.min()), float(pixels.max())
    if window is None:
        image.stretch_to_unit(pixels, low, high)
    else:
        if low >= 0:
            logging.warning("%s has no value below 0: are these Hounsfield units?", path)
        pixels = window.apply(pixels)
    sizes = np.sqrt((volume.affine[:3, :3] ** 2).sum(0)) * volume.unit
    row, column = (float(sizes[a]) for a in AXES[axis][1:])
    known = np.isfinite((row, column)).all() and min(row, column) > 0
    selected = image.choose(path, len(pixels), frames)
    return Image(pixels[selected], (row, column) if known else None, {"format": "NIfTI"})


def nifti_volume(path: Path, hounsfield: bool = False) -> Volume:
    """Read .nii, .nii.gz, or a pair .hdr and .img (either may be named).

    A 2-D image becomes one slice; NaN and infinities stay as they are stored. A file without
    orientation (qform and sform codes 0) gets nibabel's fall-back and a warning.

    Args:
      hounsfield: refuse voxels that cannot be Hounsfield units.

    Raises:
      DataError: missing, empty, truncated, corrupt or too large; not NIfTI; more than 4 axes or
        complex voxels.
    """
    try:
        return _volume(path, hounsfield)
    except DataError:
        raise
    except Exception as error:  # nibabel and numpy may raise anything for hostile bytes
        raise DataError(
            f"{path} cannot be read as NIfTI ({image.reason(error)}): the file is damaged or of "
            "another format, copy it again or remove it."
        ) from error


def slices(voxels: Float[np.ndarray, "x y z *t"], axis: Axis) -> Float[np.ndarray, "f h w"]:
    """Slices along an axis of a canonical volume, a copy: [t * slices, rows, columns]."""
    turned = np.moveaxis(voxels, AXES[axis], (0, 1, 2))[:, ::-1, ::-1]
    if turned.ndim == 4:
        turned = np.moveaxis(turned, 3, 0).reshape(-1, *turned.shape[1:3])
    return np.ascontiguousarray(turned)


def write_nifti(path: Path, source: Path, codes: UInt16[np.ndarray, "f h w"]) -> None:
    """Write the maps of a volume that was read as axial slices, on the voxel grid of that volume.

    Args:
      path: .nii.gz to write.
      source: the volume that was read; of its header only the geometry is copied.
      codes: the map of every slice of all time points in order, 2^16 times its value.

    Raises:
      WorkdirError: the disk refuses it.
    """
    header = _source_header(source)
    turn = orientations.io_orientation(header.get_best_affine())
    vertical = int(np.flatnonzero(turn[:, 0] == 2)[0])  # the source's axis from foot to head
    depth = (*header.get_data_shape(), 1, 1)[vertical]
    back = orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], turn)
    volumes = [
        orientations.apply_orientation(np.transpose(frames[:, ::-1, ::-1], (2, 1, 0)), back)
        for frames in codes.reshape(-1, depth, *codes.shape[1:])
    ]
    points = (len(volumes),) if len(volumes) > 1 else ()
    written = nibabel.Nifti1Header()
    written.set_data_dtype(np.uint16)
    written.set_data_shape((*volumes[0].shape, *points))
    for name in GEOMETRY:
        written[name] = header[name]
    written["magic"], written["descrip"] = b"n+1", MARK
    written.set_data_offset(352)
    written.set_slope_inter(MAP_SLOPE, 0)
    with (
        files.writing(path, durable=False) as file,
        gzip.GzipFile(fileobj=file, filename="", mode="wb", compresslevel=1, mtime=0) as packed,
    ):
        packed.write(written.binaryblock + b"\0" * 4)
        for volume in volumes:
            for z in range(volume.shape[2]):
                packed.write(volume[:, :, z].tobytes(order="F"))


def _source_header(path: Path) -> nibabel.Nifti1Header:
    """The header of a file that was read before."""
    if path.name.lower().endswith(PAIR_SUFFIXES):
        image: Any = nibabel.load(path)
        return image.header
    with path.open("rb") as file:
        raw = file.read(1 << 16)
    return _header(path, _unpack(path, raw, HEADER_BYTES) if _is_packed(path, raw) else raw, SINGLE)


def _volume(path: Path, hounsfield: bool) -> Volume:
    header, data = _stored(path)
    slope, intercept = header.get_slope_inter()
    scaled = slope is not None and (slope, intercept) != (1, 0)
    if hounsfield and (data.dtype.fields or (data.dtype.itemsize == 1 and not scaled)):
        raise image.no_hounsfield(path, "its voxels have 8 bits")
    if data.dtype.fields:
        bands = [w * data[b].astype(np.float32) for w, b in zip(image.LUMA, "RGB", strict=True)]
        data = bands[0] + bands[1] + bands[2]
    elif data.dtype.kind not in "iuf":
        raise DataError(f"{path} holds voxels of kind '{data.dtype}': save real numbers.")
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32: infinite, for the caller
        voxels = data.astype(np.float32)
        if scaled:
            voxels *= np.float32(slope)
            voxels += np.float32(intercept)
    if not (header["qform_code"] or header["sform_code"]):
        logging.warning("%s does not say how the patient lay: left and right are a guess.", path)
    affine = header.get_best_affine()
    turn = orientations.io_orientation(affine)
    if np.isnan(turn).any():
        raise DataError(f"{path} has an affine that flattens space: fix its header.")
    canonical = orientations.apply_orientation(voxels, turn)
    back = orientations.inv_ornt_aff(turn, voxels.shape[:3])
    return Volume(canonical, affine @ back, MM.get(header.get_xyzt_units()[0], 1.0))


def _stored(path: Path) -> tuple[nibabel.Nifti1Header, np.ndarray]:
    """Header and stored voxels, 3-D or 4-D; unpacked only after the header proved harmless.

    Extensions (they may hold a whole DICOM header) are not even parsed.
    """
    raw = load_bytes(path)
    if path.name.lower().endswith(PAIR_SUFFIXES):
        upper = path.suffix.isupper()
        header = _header(path, load_bytes(path.with_suffix(".HDR" if upper else ".hdr")), PAIR)
        raw = load_bytes(path.with_suffix(".IMG" if upper else ".img"))
    elif _is_packed(path, raw):
        header = _header(path, _unpack(path, raw, HEADER_BYTES), SINGLE)
        raw = _unpack(path, raw, _size(path, header), to_the_end=True)
    else:
        header = _header(path, raw, SINGLE)
    size, shape = _size(path, header), header.get_data_shape()
    if len(raw) < size:
        raise DataError(
            f"{path} holds {len(raw):,} of the {size:,} bytes that its header states: "
            "it is truncated, copy it again."
        )
    kind, offset = header.get_data_dtype(), int(header.get_data_offset())
    stored = np.frombuffer(raw, kind, math.prod(shape), offset).reshape(shape, order="F")
    return header, stored.reshape(*shape, 1) if stored.ndim == 2 else stored


def _is_packed(path: Path, raw: bytes) -> bool:
    """Whether the content is gzip, whatever the suffix; a .gz that is no NIfTI either should be."""
    plain = raw[344:347] == SINGLE[0] or raw[4:7] == SINGLE[1]
    return not plain and (raw[:2] == b"\x1f\x8b" or path.name.lower().endswith(".gz"))


def _header(path: Path, raw: bytes, magics: tuple[bytes, bytes]) -> nibabel.Nifti1Header:
    """The header of the NIfTI version that the magic letters name, with a harmless shape."""
    if raw[344:347] == magics[0]:
        header = nibabel.Nifti1Header(raw[:348])
    elif raw[4:7] == magics[1]:
        header = nibabel.Nifti2Header(raw[:540])
    else:
        raise DataError(f"{path} is not a NIfTI file (no magic letters): replace or remove it.")
    shape = [int(n) for n in header.get_data_shape()]
    if not 2 <= len(shape) <= 4:
        raise DataError(f"{path} has {len(shape)} axes and 2 to 4 are read: save it as 3-D.")
    image.check_size(path, shape[0], shape[1], math.prod(shape[2:]))
    return header


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


def _unpack(path: Path, raw: bytes, count: int, to_the_end: bool = False) -> bytes:
    """The first `count` bytes of a gzip stream; the rest is read for its checksum alone."""
    try:
        with gzip.GzipFile(fileobj=BytesIO(raw)) as stream:
            head = stream.read(count)
            total = len(head)
            while to_the_end and (more := len(stream.read(1 << 20))):
                total += more
                if total > MAX_BYTES:
                    raise DataError(
                        f"{path} unpacks to more than {MAX_BYTES:,} bytes: "
                        "remove it if it is not yours."
                    )
            return head
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not gzip, or a damaged or truncated gzip ({error}): copy it again."
        ) from error
