"""Charts, and the printed gallery: one scale for all images, boxes and outlines in place."""

import io

import numpy as np
import pytest
from PIL import Image

from medclip_jax.evaluation import predictions
from medclip_jax.explain.boxes import Box
from medclip_jax.report import figures, load


def picture(map, mask=None, boxes=()):
    """Of a black image of 400 x 400 pixels."""
    image = predictions.small(Image.new("L", (400, 400)), "JPEG")
    lesion = b"" if mask is None else predictions.small(Image.fromarray(mask), "PNG")
    return load.Picture(image, predictions.grey(map), lesion, b"", b"", (400, 400), list(boxes))


def cells(pictures):
    """The cells of the one page [row, column, 250, 250, 3], without the gap around them."""
    (page,) = figures.gallery(pictures, ["a"] * len(pictures), "Grad-CAM")
    sheet = np.asarray(Image.open(io.BytesIO(page)).convert("RGB")).astype(int)
    assert Image.open(io.BytesIO(figures.stacked([page, page]))).height == 2 * len(sheet)
    sheet = sheet[figures.HEAD :, figures.LABEL :]
    sheet = sheet.reshape(len(pictures), figures.CELL, 4, figures.CELL, 3).swapaxes(1, 2)
    return sheet[:, :, 3:-3, 3:-3]


def test_a_value_has_the_same_colour_in_every_row():
    low = np.full((64, 64), 0.25, np.float32)
    high = low.copy()
    high[:16, :16] = 1.0
    maps = cells([picture(low), picture(high)])[:, 1]
    np.testing.assert_array_equal(maps[0, 200, 200], maps[1, 200, 200])
    assert maps[1, 20, 20].sum() > 2 * maps[1, 200, 200].sum()


def test_boxes_and_outlines_are_where_they_belong():
    mask = np.zeros((400, 400), np.uint8)
    mask[240:320, 160:320] = 255
    box = Box(80, 160, 240, 320, 0.9, 25600)
    row = cells([picture(np.zeros((64, 64), np.float32), mask, [box])])[0]
    places = ((230, 159, 0), (0.2, 0.6, 0.4, 0.8)), ((86, 180, 233), (0.6, 0.8, 0.4, 0.8))
    for colour, wanted in places:
        rows, columns = np.nonzero(np.abs(row[2] - np.array(colour)).sum(2) < 60)
        edges = np.array([rows.min(), rows.max(), columns.min(), columns.max()]) / 250
        np.testing.assert_allclose(edges, wanted, atol=0.02)


def test_a_box_of_one_row_is_drawn_in_the_smaller_copy():
    line = Box(row0=200, col0=100, row1=201, col1=300, score=0.9, area=200)
    ((_, _, marked, _),) = cells([picture(np.zeros((64, 64), np.float32), boxes=[line])])
    rows, columns = np.nonzero(marked.max(-1) > 100)
    assert abs(rows.mean() - 125) < 3 and abs(columns.mean() - 125) < 3


@pytest.mark.parametrize("chart", ["roc", "risk_coverage"])
def test_a_score_of_the_threshold_is_an_alarm(monkeypatch, chart):
    """As in metrics.json: 0.5 is what lies just above it, rounded."""
    drawn_on = []
    monkeypatch.setattr(figures, "png", lambda figure: drawn_on.extend(figure.axes) or b"")
    label, score = np.array([0, 1, 1, 1]), np.array([0.2, 0.5, 0.5, 0.8])
    given = (label, score, None if chart == "roc" else np.arange(4.0))
    getattr(figures, chart)(*given)
    (axes,) = drawn_on
    drawn = {line.get_label(): np.ravel(line.get_data()).tolist() for line in axes.lines}
    if chart == "roc":
        assert drawn["threshold (0.5)"] == [0.0, 1.0]
    else:
        assert "all images: 0.000" in drawn  # nothing is missed
