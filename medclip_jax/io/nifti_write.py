"""Maps of the slices of a volume, written back on its voxel grid as NIfTI."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
from jaxtyping import UInt16
from nibabel import orientations

from medclip_jax import files
from medclip_jax.io.nifti import AXES
from medclip_jax.io.nifti_header import read_header

MARK = b"medclip_jax anomaly map"  # description of what is written
MAP_SLOPE = 2.0**-16  # of written maps, uint16: a voxel is at least 0.5 exactly where its map is
GEOMETRY = (
    *("qform_code", "sform_code", "pixdim", "quatern_b", "quatern_c", "quatern_d", "xyzt_units"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


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
    header = read_header(source)
    turn = orientations.io_orientation(header.get_best_affine())
    order = AXES[axis]
    slow = int(np.flatnonzero(turn[:, 0] == order[0])[0])  # the source's axis along the slices
    depth = (*header.get_data_shape(), 1, 1)[slow]
    back = orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], turn)
    volumes = [
        orientations.apply_orientation(np.transpose(frames[:, ::-1, ::-1], np.argsort(order)), back)
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
