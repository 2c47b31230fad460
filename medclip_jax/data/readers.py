"""`read(path)` as other tools call it; the readers themselves are in `io`."""

from pathlib import Path

from medclip_jax import files
from medclip_jax.io import read as io_read
from medclip_jax.io.image import Image

__all__ = ["read"]


def read(
    path: str | Path,
    axis: io_read.Axis = "axial",
    frames: tuple[int, int] | None = None,
    window: str | None = None,
) -> Image:
    """As `io.read.read`, but NIfTI volumes are sliced axially unless another axis is named."""
    return io_read.read(files.expanded(path), axis, frames, window)
