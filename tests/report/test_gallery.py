"""The gallery's sheets: one scale, the image's own frame, boxes where they are."""

import io

import numpy as np
from PIL import Image

from medclip_jax.explain.boxes import Box
from medclip_jax.report import figures, gallery


def test_gallery_keeps_scale_frame_and_pixels():
    """Two rows with other image contents: the colour of a map value is the same in both."""
    image = np.zeros((50, 50), np.uint8)
    low, high = np.full((50, 50), 0.25, np.float32), np.full((50, 50), 0.25, np.float32)
    high[10:20, 10:20] = 1.0
    panels = [gallery.Panel("a", image, m, None, ()) for m in (low, high)]
    sheet = np.asarray(Image.open(io.BytesIO(gallery.pages(panels)[0])).convert("RGB"))
    dpi, left, wide, gap, top = figures.DPI, 1.15, 2.2, 0.08, 0.35
    x = int((left + wide + gap + 0.9 * wide) * dpi)
    rows = [int((top + 0.9 * wide + i * (wide + gap)) * dpi) for i in range(2)]
    assert (sheet[rows[0], x] == sheet[rows[1], x]).all()
    bright = int((left + wide + gap + 0.3 * wide) * dpi), int((top + wide * 1.3 + gap) * dpi)
    assert sheet[bright[1], bright[0]].sum() > 2 * sheet[rows[1], x].sum()


def test_gallery_draws_boxes_where_they_are():
    image = np.zeros((100, 100), np.uint8)
    box = Box(20, 40, 60, 80, 0.9, 1600)
    panels = [gallery.Panel("a", image, np.zeros((100, 100), np.float32), None, (box,))]
    sheet = np.asarray(Image.open(io.BytesIO(gallery.pages(panels)[0])).convert("RGB")).astype(int)
    left, top, size = 1.15 + 2 * 2.28, 0.35, 2.2
    panel = sheet[
        int(top * figures.DPI) : int((top + size) * figures.DPI),
        int(left * figures.DPI) : int((left + size) * figures.DPI),
    ]
    orange = np.abs(panel - np.array([230, 159, 0])[None, None]).sum(2) < 30
    rows, columns = np.nonzero(orange)
    edges = np.array([rows.min(), rows.max(), columns.min(), columns.max()]) / panel.shape[0]
    np.testing.assert_allclose(edges, (0.2, 0.6, 0.4, 0.8), atol=0.012)
