"""Maps of a NIfTI volume as a volume: the voxel grid, affine and codes of the source.

Stored as uint16 with slope 2^-16, so that a voxel is at least 0.5 exactly where its map is. Nothing
of the source's header but its geometry is copied: the texts may name a patient.
"""

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from jaxtyping import UInt16
from nibabel import orientations

from medclip_jax import files
from medclip_jax.io import nifti

SLOPE = 2.0**-16
CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])
GEOMETRY = (
    *("qform_code", "sform_code", "pixdim", "quatern_b", "quatern_c", "quatern_d", "xyzt_units"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def write(path: Path, source: Path, codes: UInt16[np.ndarray, "f h w"]) -> None:
    """Write the map volume of a volume that was read as axial slices.

    Args:
      path: .nii.gz to write.
      source: the volume that was read.
      codes: the map of every slice of all time points in order, 2^16 times its value.

    Raises:
      WorkdirError: the disk refuses it.
    """
    header = nifti.read_header(source)
    turn = orientations.io_orientation(header.get_best_affine())
    vertical = int(np.flatnonzero(turn[:, 0] == 2)[0])  # the source's axis from foot to head
    depth = (*header.get_data_shape(), 1, 1)[vertical]
    volumes = codes.reshape(-1, depth, *codes.shape[1:])
    back = orientations.ornt_transform(CANONICAL, turn)
    turned = [orientations.apply_orientation(nifti.stack(v, "axial"), back) for v in volumes]
    head = _header(header, turned[0].shape, len(turned))
    with (
        files.writing(path, durable=False) as file,
        gzip.GzipFile(fileobj=file, filename="", mode="wb", compresslevel=1, mtime=0) as packed,
    ):
        packed.write(head.binaryblock + b"\0" * 4)
        for volume in turned:
            for z in range(volume.shape[2]):
                packed.write(volume[:, :, z].tobytes(order="F"))


def _header(source: Any, shape: tuple[int, ...], points: int) -> nibabel.Nifti1Header:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint16)
    header.set_data_shape(shape if points == 1 else (*shape, points))
    for name in GEOMETRY:
        header[name] = source[name]
    header["magic"] = b"n+1"
    header.set_data_offset(352)
    header.set_slope_inter(SLOPE, 0)
    return header
