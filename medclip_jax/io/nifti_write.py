"""Maps of a NIfTI volume as a volume: the voxel grid, affine and codes of the source.

Stored as uint16 with slope 2^-16, so that a voxel is at least 0.5 exactly where its map is. Nothing
of the source's header but its geometry is kept: the texts may name a patient.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import igzip
from jaxtyping import UInt16
from nibabel import orientations

from medclip_jax import files
from medclip_jax.io import nifti

SLOPE = 2.0**-16
LEVEL = 1  # of isal, 0 to 3
CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])


def write(path: Path, source: Path, codes: UInt16[np.ndarray, "f h w"]) -> None:
    """Write the map volume .nii.gz of a volume that was read as axial slices.

    codes: the map of every slice of all time points in order, 2^16 times its value.
    Raises WorkdirError if the disk refuses it.
    """
    header, shape = _geometry(source)
    volumes = codes.reshape(-1, shape[2], *codes.shape[1:])
    affine = header.get_best_affine()
    back = orientations.ornt_transform(CANONICAL, orientations.io_orientation(affine))
    turned = [orientations.apply_orientation(nifti.stack(v, "axial"), back) for v in volumes]
    written = _header(header, turned[0].shape, len(turned))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with igzip.open(temporary, "wb", compresslevel=LEVEL) as file:
            file.write(written.binaryblock + b"\0" * 4)
            for volume in turned:
                for z in range(volume.shape[2]):
                    file.write(volume[:, :, z].tobytes(order="F"))
        os.replace(temporary, path)
    except OSError as error:
        raise files.cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # also where there is no such folder
            temporary.unlink()


def _geometry(source: Path) -> tuple[nibabel.Nifti1Header, tuple[int, int, int]]:
    """The header of a source that was read before, and its shape in canonical order."""
    header: Any = nibabel.load(source).header  # of NIfTI-1 or NIfTI-2
    shape = (*header.get_data_shape(), 1, 1)[:3]
    turn = orientations.io_orientation(header.get_best_affine())
    canonical = [0, 0, 0]
    for axis, (to, _) in enumerate(turn):
        canonical[int(to)] = int(shape[axis])
    return header, (canonical[0], canonical[1], canonical[2])


def _header(source, shape: tuple[int, ...], points: int) -> nibabel.Nifti1Header:
    made = nibabel.Nifti1Header()
    made.set_data_dtype(np.uint16)
    made.set_data_shape(shape if points == 1 else (*shape, points))
    for name in ("qform_code", "sform_code", "pixdim", "quatern_b", "quatern_c", "quatern_d"):
        made[name] = source[name]
    for name in ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"):
        made[name] = source[name]
    made["xyzt_units"] = source["xyzt_units"]
    made["magic"] = b"n+1"
    made.set_data_offset(352)
    made.set_slope_inter(SLOPE, 0)
    return made
