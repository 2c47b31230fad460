"""What is written besides DICOM: PNG, overlays, and maps on the voxel grid of a volume (NIfTI)."""

import gzip
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import Float, UInt8, UInt16, UInt32
from nibabel import orientations

from medclip_jax import files
from medclip_jax.io.image import AXES
from medclip_jax.io.nifti_header import affine_of, read_header

PNG_MARK = b"Software\0medclip_jax"  # text of every PNG that is written
NIFTI_MARK = b"medclip_jax anomaly map"  # description of every volume
OVERLAY_SIDE = 1024  # pixels of an overlay's longer side at most
HEAT = 0.45  # weight of the anomaly map in an overlay
BOX = (230, 159, 0)  # orange of Okabe and Ito
MAP_SLOPE = 2.0**-16  # of written maps, uint16: a voxel is at least 0.5 exactly where its map is
GEOMETRY = (
    *("qform_code", "sform_code", "pixdim", "quatern_b", "quatern_c", "quatern_d", "xyzt_units"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def encode_png(pixels: UInt8[np.ndarray, "h w *_"] | UInt16[np.ndarray, "h w"]) -> bytes:
    """A PNG of grey (8 or 16 bits) or RGB [h, w, 3] (8 bits) pixels, compressed for speed."""
    buffer = BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return marked(buffer.getvalue())


def marked(png: bytes) -> bytes:
    """The same PNG with a text chunk after its header that says which program wrote it."""
    chunk = b"tEXt" + PNG_MARK
    sizes = len(PNG_MARK).to_bytes(4), zlib.crc32(chunk).to_bytes(4)
    return png[:33] + sizes[0] + chunk + sizes[1] + png[33:]


def draw_overlay(
    pixels: UInt8[np.ndarray, "h w"], heat: Float[np.ndarray, "h w"], boxes: list[dict]
) -> UInt8[np.ndarray, "a b 3"]:
    """A grey image with its anomaly map [0, 1] in colour and boxes; RGB, at most 1024 x 1024.

    Args:
      boxes: row0, col0, row1, col1 in pixels of the image, ends not included.
    """
    height, width = pixels.shape
    scale = min(1.0, OVERLAY_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    grey, warm = PIL.Image.fromarray(pixels), PIL.Image.fromarray(heat)
    if scale < 1:
        grey = grey.resize(size, PIL.Image.Resampling.BOX)
        warm = warm.resize(size, PIL.Image.Resampling.BILINEAR)
    level = np.clip(np.asarray(warm) * 255, 0, 255).astype(np.uint8)
    colours = _blends()[np.asarray(grey).astype(np.intp) * 256 + level]
    picture = PIL.Image.frombuffer("RGBX", size, colours.tobytes(), "raw", "RGBX", 0, 1)
    picture = picture.convert("RGB")
    pen = PIL.ImageDraw.Draw(picture)
    for box in boxes:
        corners = [box["col0"], box["row0"], box["col1"] - 1, box["row1"] - 1]
        pen.rectangle([round(v * scale) for v in corners], outline=BOX, width=2)
    return np.asarray(picture)


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
    turn = orientations.io_orientation(affine_of(source, header))
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
    written["magic"], written["descrip"] = b"n+1", NIFTI_MARK
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


@cache
def _blends() -> UInt32[np.ndarray, " 65536"]:
    """Colour (four bytes, the last unused) at 256 * grey + heat: looked up, not computed."""
    import matplotlib  # slow to import

    palette = (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)
    blend = ((1 - HEAT) * np.arange(256)[:, None, None] + HEAT * palette).astype(np.uint8)
    padded = np.concatenate([blend, np.full((256, 256, 1), 255, np.uint8)], axis=2)
    return padded.reshape(-1, 4).copy().view(np.uint32).ravel()
