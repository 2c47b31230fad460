"""NIfTI-1 and NIfTI-2 through nibabel: slices of canonical volumes, and maps on their grids.

The header is checked before the voxels are unpacked, and a gzip stream is read to its end, so that
its checksum is verified. Free text of a header (it may name a patient) is never returned or copied.
"""

import gzip
import logging
import math
from pathlib import Path
from typing import Literal, NamedTuple

import nibabel
import numpy as np
from jaxtyping import Float, Num, UInt16
from nibabel import orientations

from medclip_jax import files
from medclip_jax.errors import DataError
from medclip_jax.io import image, nifti_header
from medclip_jax.io.image import AXES, Frames, Window

Axis = Literal["acquisition", "axial", "coronal", "sagittal"]
MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
MARK = b"medclip_jax anomaly map"  # description of every volume that is written
MAP_SLOPE = 2.0**-16  # of written maps, uint16: a voxel is at least 0.5 exactly where its map is
MOST_OF_1 = (1 << 15) - 1  # voxels along an axis of NIfTI-1
GEOMETRY = (
    *("qform_code", "sform_code", "pixdim", "quatern_b", "quatern_c", "quatern_d", "xyzt_units"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
COARSER = 1.5  # voxels along the slices are longer than those within by this, or more


class Volume(NamedTuple):
    """A NIfTI volume in RAS+ order: axes permuted and flipped, nothing resampled."""

    stored: Num[np.ndarray, "x y z *t"] | np.ndarray  # a view of the file's numbers, or of colours
    slope: float
    intercept: float
    affine: Float[np.ndarray, "4 4"]  # voxel index -> position, float64
    unit: float  # mm per unit of the affine

    @property
    def voxels(self) -> Float[np.ndarray, "x y z *t"]:
        """All values, float32."""
        return self.values(self.stored)

    def values(self, stored: np.ndarray) -> Float[np.ndarray, "*n"]:
        """float32, slope and intercept applied; a copy."""
        if stored.dtype.fields:
            alpha = stored["A"] / np.float32(255) if "A" in stored.dtype.fields else 1
            stored = image.luma(stored[band] for band in "RGB") * alpha
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float32: infinite
            values = stored.astype(np.float32)
            if (self.slope, self.intercept) != (1, 0):
                values *= np.float32(self.slope)
                values += np.float32(self.intercept)
        return values

    def sizes(self) -> Float[np.ndarray, " 3"]:
        """mm per voxel along each axis."""
        return np.sqrt((self.affine[:3, :3] ** 2).sum(0)) * self.unit

    def acquired(self) -> str:
        """The axis along which the slices were acquired: one voxel deep, or by far the coarsest.

        Axial where nothing tells.
        """
        flat = [a for a in range(3) if self.stored.shape[a] == 1]
        sizes = self.sizes()
        slow = 2
        if len(flat) == 1:
            slow = flat[0]
        elif sizes.max() >= COARSER * np.median(sizes):
            slow = int(sizes.argmax())
        return next(name for name, order in AXES.items() if order[0] == slow)


def open_nifti(path: Path, axis: Axis = "acquisition", window: Window | None = None) -> Frames:
    """Slices of a volume as a radiologist sees them.

    Args:
      axis: "axial": row 0 anterior, column 0 patient right, slices from foot to head. "coronal":
        row 0 superior, column 0 patient right, slices from back to front. "sagittal": row 0
        superior, column 0 anterior, slices from left to right. "acquisition": the one of these
        along which it was acquired, see `Volume.acquired`. Oblique volumes are not resampled.
        A 4-D volume has all slices of time 0, then those of time 1, and so on.
      window: maps Hounsfield units to [0, 1]. Without one, values are stretched by the least and
        the largest value of the whole volume (all time points), whichever slices are made;
        single spikes are clipped, see `image.stretch_of`; a constant volume becomes zeros.

    Raises:
      DataError: as `nifti_volume`; NaN or infinite voxels; a window
        on voxels of 8 bits or in colour, which hold no Hounsfield units.
    """
    volume = nifti_volume(path, hounsfield=window is not None)
    way = volume.acquired() if axis == "acquisition" else axis
    turned = _turned(volume.stored, way)  # [t, slices, rows, columns]
    count, shape = len(turned) * turned.shape[1], turned.shape[2:]

    def raw(index: int) -> Float[np.ndarray, "h w"]:
        return volume.values(turned[divmod(index, turned.shape[1])])

    stretch, low = image.range_of(path, raw, count, math.prod(shape))
    if window and low >= 0:
        logging.warning("%s has no value below 0: are these Hounsfield units?", path)

    def part(first: int, end: int) -> Float[np.ndarray, "n h w"]:
        pixels = np.stack([raw(index) for index in range(first, end)])
        if window:
            return window.apply(pixels)
        image.stretch_to_unit(pixels, stretch)
        return pixels

    row, column = (float(volume.sizes()[a]) for a in AXES[way][1:])
    known = np.isfinite((row, column)).all() and min(row, column) > 0
    known = known and nifti_header.states_sizes(path)
    hounsfield = window and f"window {window.centre:g}/{window.width:g} in Hounsfield units"
    return Frames(
        (count, *shape),
        part,
        (row, column) if known else None,
        {"format": "NIfTI"},
        hounsfield or f"all {count} slices' values: {stretch.words()}",
        volume.stored.nbytes,
        way,
    )


def nifti_volume(path: Path, hounsfield: bool = False) -> Volume:
    """Read .nii, .nii.gz, or a pair .hdr and .img (either may be named).

    A 2-D image becomes one slice, and axes of length 1 after the fourth are dropped; NaN and
    infinities stay as they are stored. A file without orientation (qform and sform codes 0) gets
    nibabel's fall-back and a warning.

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
    except OSError as error:
        raise DataError(f"{path} cannot be read ({image.reason(error)}).") from error
    except Exception as error:  # nibabel and numpy may raise anything for hostile bytes
        raise DataError(
            f"{path} cannot be read as NIfTI ({image.reason(error)}): the file is damaged or of "
            "another format, copy it again or remove it."
        ) from error


def write_nifti(
    path: Path, source: Path, codes: UInt16[np.ndarray, "f h w"], axis: str = "axial"
) -> None:
    """Write the maps of a volume's slices on the voxel grid of that volume.

    Args:
      path: .nii.gz to write.
      source: the volume that was read; of its header only the geometry is copied.
      axis: along which it was sliced, as `Frames.axis` says.
      codes: the map of every slice of all time points in order, 2^16 times its value.

    Raises:
      WorkdirError: the disk refuses it.
    """
    header = nifti_header.read_header(source)
    turn = orientations.io_orientation(nifti_header.affine_of(source, header))
    order = AXES[axis]
    slow = int(np.flatnonzero(turn[:, 0] == order[0])[0])  # the source's axis along the slices
    depth = (*header.get_data_shape(), 1, 1)[slow]
    back = orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], turn)
    volumes = [
        orientations.apply_orientation(np.transpose(frames[:, ::-1, ::-1], np.argsort(order)), back)
        for frames in codes.reshape(-1, depth, *codes.shape[1:])
    ]
    points = (len(volumes),) if len(volumes) > 1 else ()
    shape = (*volumes[0].shape, *points)
    written = (nibabel.Nifti1Header if max(shape) <= MOST_OF_1 else nibabel.Nifti2Header)()
    written.set_data_dtype(np.uint16)
    written.set_data_shape(shape)
    for name in GEOMETRY:
        written[name] = header[name]
    written["magic"], written["descrip"] = written.single_magic, MARK
    written.set_data_offset(written.single_vox_offset)
    written.set_slope_inter(MAP_SLOPE, 0)
    with (
        files.writing(path, durable=False) as file,
        gzip.GzipFile(fileobj=file, filename="", mode="wb", compresslevel=1, mtime=0) as packed,
    ):
        packed.write(written.binaryblock + b"\0" * 4)
        for volume in volumes:
            for z in range(volume.shape[2]):
                packed.write(volume[:, :, z].tobytes(order="F"))


def slices(voxels: Float[np.ndarray, "x y z *t"], axis: Axis) -> Float[np.ndarray, "f h w"]:
    """Slices along an axis of a canonical volume, a copy: [t * slices, rows, columns]."""
    turned = _turned(voxels, axis)
    return np.ascontiguousarray(turned.reshape(-1, *turned.shape[2:]))


def _turned(voxels: np.ndarray, axis: str) -> np.ndarray:
    """A view [t, slices, rows, columns] of a canonical volume."""
    turned = np.moveaxis(voxels, AXES[axis], (0, 1, 2))[:, ::-1, ::-1]
    return np.moveaxis(turned, 3, 0) if turned.ndim == 4 else turned[None]


def _volume(path: Path, hounsfield: bool) -> Volume:
    header, data = nifti_header.stored(path)
    slope, intercept = header.get_slope_inter()
    slope, intercept = (1, 0) if slope is None else (slope, intercept)
    colour = data.dtype.fields
    if hounsfield and (colour or (data.dtype.itemsize == 1 and (slope, intercept) == (1, 0))):
        raise image.no_hounsfield(path, "its voxels have 8 bits")
    if not colour and data.dtype.kind not in "iuf":
        raise DataError(f"{path} holds voxels of kind '{data.dtype}': save real numbers.")
    if not (header["qform_code"] or header["sform_code"]):
        logging.warning("%s does not say how the patient lay: left and right are a guess.", path)
    affine = nifti_header.affine_of(path, header)
    turn = orientations.io_orientation(affine)
    canonical = orientations.apply_orientation(data, turn)
    back = orientations.inv_ornt_aff(turn, data.shape[:3])
    return Volume(
        canonical,
        float(slope),
        float(intercept),
        affine @ back,
        MM.get(header.get_xyzt_units()[0], 1.0),
    )
