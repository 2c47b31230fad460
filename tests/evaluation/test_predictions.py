"""Small copies of the images: size, aspect, masks, and that nothing is lost on the way."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from medclip_jax.evaluation import predictions
from medclip_jax.explain.boxes import boxes_of
from medclip_jax.io import read
from medclip_jax.report import html, load
from tests.support.pictures import write_pictures

NO = np.zeros(9, bool)  # no alarm


def test_pictures_come_back_small_and_in_their_aspect(tmp_path):
    records = write_pictures(tmp_path, 2, start=50)  # 30 x 40 pixels
    large = np.random.default_rng(0).integers(0, 256, (300, 600), dtype=np.uint8)
    Image.fromarray(large).save(tmp_path / "large.png")
    mask = np.zeros((30, 40), np.uint8)
    mask[5:9, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    records[1] = records[1]._replace(masks=(tmp_path / "mask.png",))
    records.append(records[0]._replace(path=tmp_path / "large.png"))
    maps = np.zeros((3, 32, 32), np.float32)
    maps[1, 8:16, 16:24] = 0.75
    cams = np.linspace(0, 1, 48, dtype=np.float32).reshape(3, 16)
    arrays = predictions.pack(records, maps, np.ones(3, bool), "stretch", cams, cams / 2)
    assert arrays["frame"].tolist() == [[30, 40], [30, 40], [300, 600]]
    images = [np.asarray(Image.open(io.BytesIO(b))) for b in load.unpack(arrays, "thumb")]
    assert [x.shape for x in images] == [(30, 40), (30, 40), (128, 256)]
    masks = load.unpack(arrays, "thumb_mask")
    assert masks[0] == masks[2] == b""
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(masks[1]))), mask > 0)
    heat = [np.asarray(Image.open(io.BytesIO(b))) for b in load.unpack(arrays, "thumb_map")]
    assert [x.shape for x in heat] == [(30, 40), (30, 40), (64, 128)] and heat[1].max() == 192
    for name in ("thumb_cam", "thumb_deviation"):
        grey = [np.asarray(Image.open(io.BytesIO(b))) for b in load.unpack(arrays, name)]
        assert grey[2].shape == (64, 128) and grey[2].max() == 255 > grey[1].max() > grey[0].max()
    assert arrays["deviation_scale"] == 0.5
    rows = load.pictures(arrays, 3)
    assert [row.frame for row in rows] == [(30, 40), (30, 40), (300, 600)]
    assert len(rows[0].boxes) == len(rows[2].boxes) == 1  # alarms whose maps mark nothing
    assert rows[0].boxes[0].score == 0 and rows[0].mask == b""
    whole = boxes_of(read.to_frame(maps[1], 30, 40))  # of the original, not of the small copy
    assert rows[1].boxes == whole and len(whole) == 1


def test_maps_above_the_threshold_have_bytes_above_it():
    heat = np.array([[0.49999, 0.5, 0.0, 1.0]], np.float32)
    codes = np.asarray(Image.open(io.BytesIO(predictions.grey(heat))))
    assert codes.tolist() == [[127, 128, 0, 255]]


def test_without_small_copies_there_are_no_pictures():
    assert load.pictures({}, 5) == []
    with pytest.raises(ValueError, match="one per image"):
        load.pictures(predictions.pack([], np.zeros((0, 4, 4)), NO, "stretch") | {"frame": [1]}, 5)


def test_json_cannot_leave_its_script():
    script = html.as_script([None], cam="</script><!--&")
    assert not set("<>&") & set(script)
    assert json.loads(script)["cam"] == "</script><!--&" and json.loads(script)["images"] == [None]


def test_a_corrupt_index_is_refused():
    arrays = {"thumb": np.zeros(5, np.uint8), "thumb_end": np.array([2, 4])}
    with pytest.raises(ValueError, match="thumb_end"):
        load.unpack(arrays, "thumb")
    assert load.unpack({"thumb": np.zeros(0, np.uint8), "thumb_end": np.array([])}, "thumb") == []


def test_of_many_images_some_are_sampled(tmp_path, monkeypatch):
    """By seed; the viewer has no picture of the others."""
    monkeypatch.setattr(predictions, "MOST", 4)
    records = write_pictures(tmp_path, 9, start=50)
    maps = np.zeros((9, 32, 32), np.float32)
    arrays = predictions.pack(records, maps, NO, "stretch", seed=3)
    index = arrays["thumb_index"].tolist()
    assert len(index) == 4 and index == sorted(set(index)) and arrays["frame"].shape == (4, 2)
    assert index != predictions.pack(records, maps, NO, "stretch", seed=4)["thumb_index"].tolist()
    rows = load.pictures(arrays, 9)
    assert [i for i, row in enumerate(rows) if row] == index
    whole = load.pictures(predictions.pack(records[:4], maps[:4], NO, "stretch"), 4)
    first = load.pictures(predictions.pack([records[i] for i in index], maps[:4], NO, "stretch"), 4)
    assert all(whole) and [rows[i] for i in index] == first
    with pytest.raises(ValueError, match="one per image"):
        load.pictures(arrays, max(index))
