"""Boxes of the command line, the notebook and the report are those of one function."""

import numpy as np
import pytest
from scipy import ndimage

from medclip_jax import api
from medclip_jax.detectors import calibration
from medclip_jax.detectors.detector import BatchScores
from medclip_jax.evaluation import predictions
from medclip_jax.explain.boxes import Box
from medclip_jax.inference import predictor
from medclip_jax.report import load
from tests.support.pictures import write_pictures


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_three_outputs_have_the_same_boxes(tmp_path, fit):
    records = write_pictures(tmp_path, 3)  # of 30 x 40 pixels
    noise = ndimage.gaussian_filter(np.random.default_rng(0).random((3, 32, 32)), (0, 2, 2))
    maps = 0.8 * (noise - noise.min()) / np.ptp(noise)
    columns = {name: np.zeros(3) for name in BatchScores._fields}
    alarm = np.array([True, True, False])
    scores = BatchScores(**{**columns, "maps": maps, "alarm": alarm})

    pages = predictor.part(scores, np.zeros((3, 30, 40), np.uint16), 0, None, fit).frames
    command_line = [
        [Box(*(box[name] for name in Box._fields[:5]), box["area_pixels"]) for box in page["boxes"]]
        for page in pages
    ]
    notebook = [list(api._prediction(scores, i, (30, 40), fit).boxes) for i in range(3)]
    small = predictions.pack(records, calibration.half_precision(maps), alarm, fit)
    report = [picture.boxes for picture in load.pictures(small, 3)]
    assert command_line == notebook == report
    assert sum(map(len, report)) > 3 and len(report[0]) and len(report[1]) and report[2] == []

    asked = predictor.part(scores, np.zeros((3, 30, 40), np.uint16), 0, None, fit, None, True, True)
    notebook = api._prediction(scores, 2, (30, 40), fit, of_passed=True).boxes
    assert len(asked.frames[2]["boxes"]) == len(notebook) > 0
