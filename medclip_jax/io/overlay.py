"""Image and anomaly map as one picture: grey below, colour above, boxes round lesions."""

from functools import cache

import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import Float, UInt8, UInt32

SIDE = 1024  # pixels of the longer side at most
HEAT = 0.45  # weight of the map
BOX = (230, 159, 0)  # orange of Okabe and Ito


def draw(
    pixels: UInt8[np.ndarray, "h w"], heat: Float[np.ndarray, "h w"], boxes: list[dict]
) -> UInt8[np.ndarray, "a b 3"]:
    """The image in grey with the map in colour and the boxes; nothing else is drawn on it.

    Args:
      pixels: grey levels of the image.
      heat: its anomaly map, [0, 1].
      boxes: row0, col0, row1, col1 in pixels of the image, ends not included.

    Returns:
      RGB, shrunk to at most 1024 pixels on the longer side.
    """
    height, width = pixels.shape
    scale = min(1.0, SIDE / max(height, width))
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


@cache
def _blends() -> UInt32[np.ndarray, " 65536"]:
    """Colour (four bytes, the last unused) at 256 * grey + heat: looked up, not computed."""
    import matplotlib  # slow to import

    palette = (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)
    blend = ((1 - HEAT) * np.arange(256)[:, None, None] + HEAT * palette).astype(np.uint8)
    padded = np.concatenate([blend, np.full((256, 256, 1), 255, np.uint8)], axis=2)
    return padded.reshape(-1, 4).copy().view(np.uint32).ravel()
