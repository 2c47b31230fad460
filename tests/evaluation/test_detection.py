"""FROC and recall of boxes against values by hand, and the NIH boxes as truth."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from medclip_jax.evaluation import detection
from medclip_jax.evaluation.detection import RATES, Image

NIH = Path(os.environ.get("MEDCLIP_DATA", ".")) / "nih_boxes" / "labels.csv"


def image(boxes, score, lesions=(), small=None, alarm=True):
    lesions = np.reshape(np.array(lesions, float), (-1, 4))
    small = np.zeros(len(lesions), bool) if small is None else np.array(small)
    return Image(
        np.reshape(np.array(boxes, float), (-1, 4)), np.array(score), lesions, small, alarm
    )


def test_iou_by_hand():
    a = np.array([[0, 0, 2, 2], [0, 0, 4, 4.0]])
    b = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6.0]])
    np.testing.assert_allclose(detection.iou(a, b), [[1, 1 / 7, 0], [1 / 4, 1 / 4, 0]])


def test_a_second_box_on_a_lesion_and_a_poor_one_are_false():
    one = image([[0, 0, 4, 4], [0, 0, 4, 5], [20, 20, 30, 30]], [0.6, 0.9, 0.8], [[0, 0, 4, 4]])
    hit, seen = detection.found(one, 0.3)
    assert hit.tolist() == [False, True, False] and seen.tolist() == [True]
    hit, seen = detection.found(one, 0.9)
    assert hit.tolist() == [True, False, False] and seen.tolist() == [True]
    assert detection.found(image([], []), 0.1)[0].shape == (0,)


def test_froc_by_hand():
    """Two images, four lesions, by falling score: hit, miss, hit, miss and hit together, miss."""
    far = [50, 50, 60, 60]
    lesions = [[0, 0, 4, 4], [10, 10, 14, 14], [20, 20, 24, 24], [30, 30, 34, 34]]
    first = image([lesions[0], far, lesions[1]], [0.9, 0.8, 0.7], lesions)
    first = first._replace(
        boxes=np.concatenate([first.boxes, [lesions[2]]]), score=np.append(first.score, 0.6)
    )
    second = image([far, far], [0.6, 0.5])
    # misses per image up to each threshold: 0, 1/2, 1/2, 1, 3/2; lesions found: 1, 1, 2, 3, 3
    got = dict(zip(RATES, detection.froc([first, second], 0.1), strict=True))
    assert got == {1 / 8: 1 / 4, 1 / 4: 1 / 4, 1 / 2: 1 / 2, 1: 3 / 4, 2: 3 / 4, 4: 3 / 4, 8: 3 / 4}


def test_froc_of_random_boxes_has_the_closed_form():
    """Hits and misses of independent uniform scores: at rate r the expected sensitivity is r."""
    rng = np.random.default_rng(0)
    n, lesion, far = 4000, [0, 0, 4, 4], [50, 50, 60, 60]
    images = [image([lesion, far], rng.random(2), [lesion]) for _ in range(n)]
    np.testing.assert_allclose(detection.froc(images, 0.3)[:3], RATES[:3], atol=0.025)
    assert detection.froc(images, 0.3)[3:] == [1.0] * 4


def test_recall_is_of_alarms_and_small_lesions_are_apart():
    lesions = [[0, 0, 4, 4], [10, 10, 40, 40]]
    both = image(lesions, [0.9, 0.8], lesions, [True, False])
    healthy = image([[0, 0, 4, 4]], [0.7])
    unmarked = image([[0, 0, 4, 4], [5, 5, 9, 9]], [0.7, 0.6])  # abnormal, of an empty mask
    got = detection.measured([both, both._replace(alarm=False), healthy, unmarked], [1, 1, 0, 1])
    assert (got["count"], got["small_count"]) == (4, 2)
    assert got["recall"] == got["small_recall"] == 0.5 and got["boxes_per_healthy_image"] == 1
    assert got["froc"]["0.1"]["sensitivity"][-1] == 1.0  # boxes of images that passed, too
    assert detection.measured([healthy], [0]) is None


def test_lesions_and_boxes_of_a_map():
    map, mask = np.zeros((100, 100), np.float32), np.zeros((100, 100), bool)
    map[10:30, 10:30], mask[10:30, 12:30], mask[50:55, 50:55] = 0.8, True, True
    got = detection.image_of(map, False, mask)
    assert got.boxes.tolist() == [[10, 10, 30, 30]] and got.small.tolist() == [False, True]
    assert got.lesions.tolist() == [[10, 12, 30, 30], [50, 50, 55, 55]]
    hit, seen = detection.found(got, 0.3)
    assert hit.tolist() == [True] and seen.tolist() == [True, False]


@pytest.mark.skipif(not NIH.is_file(), reason="the NIH boxes are not here")
def test_boxes_of_annotators_find_themselves_and_shifted_ones_do_not():
    with NIH.open(encoding="utf-8") as file:
        texts = [row["boxes_xywh_in_1024px"] for row in csv.DictReader(file)]
    images = []
    for text in texts:
        boxes = [
            [float(x) for x in one.partition(":")[2].split(",")] for one in text.split(";") if one
        ]
        truth = np.reshape([[y, x, y + h, x + w] for x, y, w, h in boxes], (-1, 4))
        images.append(
            image(truth, np.ones(len(truth)), truth, np.prod(truth[:, 2:] - truth[:, :2], 1) < 1e4)
        )
    lesions = sum(len(x.lesions) for x in images)
    assert lesions >= 44 and len(images) == 124
    label = [int(len(x.lesions) > 0) for x in images]
    got = detection.measured(images, label)
    assert got["recall"] == 1.0 and got["froc"]["0.3"]["mean"] == 1.0
    assert got["boxes_per_healthy_image"] == 0.0
    # half a side to the right: IoU is 1/3; a whole side: 0
    for share, found in ((0.5, 1.0), (1.0, 0.0)):
        moved = []
        for one in images:
            boxes = one.boxes.copy()
            boxes[:, 1::2] += share * (one.boxes[:, 3:] - one.boxes[:, 1:2])
            moved.append(one._replace(boxes=boxes))
        got = detection.measured(moved, label)
        assert got["froc"]["0.3"]["sensitivity"][-1] == pytest.approx(found, abs=0.05)
