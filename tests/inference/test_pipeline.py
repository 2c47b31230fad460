"""The parts of prediction's stream: bounded reading, results, overlay and packed map volumes."""

import hashlib
import io
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from scipy import ndimage

from medclip_jax.detectors.detector import BatchScores
from medclip_jax.inference import loading, pipeline, predictor, pseudonyms, results
from medclip_jax.inference.inputs import Item
from medclip_jax.io import pillow
from medclip_jax.io.image import Frames
from medclip_jax.io.pillow import encode_png
from tests.support.folders import pair


def blobs(seed: int, shape=(60, 70)) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 2)
    return ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)


@pytest.mark.parametrize("shape", [(60, 70), (1500, 40), (1, 1)])
def test_an_overlay_is_the_weighted_sum_of_grey_and_colour(shape):
    import matplotlib

    rng = np.random.default_rng(0)
    pixels, heat = rng.integers(0, 256, shape, dtype=np.uint8), rng.random(shape, np.float32)
    drawn = pillow.draw_overlay(pixels, heat, [])
    scale = min(1, pillow.OVERLAY_SIDE / max(shape))
    size = tuple(max(1, round(side * scale)) for side in shape[::-1])
    grey = PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BOX)
    warm = PIL.Image.fromarray(heat).resize(size, PIL.Image.Resampling.BILINEAR)
    table = (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)
    colour = table[np.clip(np.asarray(warm) * 255, 0, 255).astype(np.uint8)]
    mixed = (1 - pillow.HEAT) * np.asarray(grey)[..., None] + pillow.HEAT * colour
    assert np.array_equal(drawn, mixed.astype(np.uint8))
    boxed = pillow.draw_overlay(
        pixels, heat, [{"row0": 0, "col0": 0, "row1": shape[0], "col1": shape[1]}]
    )
    assert tuple(boxed[0, 0]) == pillow.BOX


def test_an_overlay_has_the_contour_and_names_score_and_size_of_a_box():
    heat = np.zeros((60, 80), np.float32)
    heat[10:20, 30:50] = 0.7
    box = {"row0": 8, "col0": 28, "row1": 22, "col1": 52, "score": 0.7}
    plain = pillow.draw_overlay(np.zeros((60, 80), np.uint8), heat, [box])
    line = (plain == pillow.CONTOUR).all(-1)
    wanted = np.zeros((60, 80), bool)
    wanted[10:20, 30:50] = True
    wanted[11:19, 31:49] = False  # one pixel, inside of what is marked
    np.testing.assert_array_equal(line, wanted)
    sized = box | {"height_mm": 12.0, "width_mm": 20.0}
    sized = pillow.draw_overlay(np.zeros((60, 80), np.uint8), heat, [sized])
    assert (plain[24:37] != 0).any() and (sized[24:37] != plain[24:37]).any()


def test_results_of_parts_are_those_of_the_whole():
    maps = np.stack([blobs(i, (24, 24)) for i in range(4)]).astype(np.float64)
    columns = maps.max((1, 2)), maps.mean((1, 2)), maps[:, 0, 0] > 0, maps[:, 0, 1], maps
    scores = BatchScores(*columns, *[maps[:, 0]] * 4)
    codes = [np.zeros((4, 50, 30), np.uint16) for _ in range(2)]
    whole = predictor.part(scores, codes[0], 0, (0.5, 0.25), "pad")
    parts = []
    for a, b in ((0, 1), (1, 4)):
        some = BatchScores(*(column[a:b] for column in scores))
        parts += predictor.part(some, codes[1][a:b], a, (0.5, 0.25), "pad").frames
    assert parts == whole.frames and np.array_equal(*codes)
    assert [f["frame"] for f in whole.frames] == [0, 1, 2, 3]
    box = max((b for f in whole.frames for b in f["boxes"]), key=lambda b: b["area_pixels"])
    assert box["area_mm2"] == box["area_pixels"] * 0.125
    frame = predictor.frame_map(maps[2].astype(np.float16), (50, 30), "pad")
    assert np.array_equal(codes[0][2] >= predictor.HALF, frame >= 0.5)


@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 3), (1, 1), (1, 7, 3), (300, 2)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_files_hold_the_pixels(shape, dtype):
    if dtype == np.uint16 and len(shape) == 3:
        return  # no such result
    whole = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype)
    for pixels in (whole, whole[::-1], np.zeros_like(whole)):
        image = PIL.Image.open(io.BytesIO(encode_png(pixels)))
        assert np.array_equal(np.asarray(image), pixels) and image.format == "PNG"
        assert image.mode == {3: "RGB"}.get(len(shape), "L" if dtype == np.uint8 else "I;16")


def test_readers_wait_for_room_but_the_next_item_is_always_read(monkeypatch):
    """Every item is larger than the limit: at most those under way are read beside the next."""
    monkeypatch.setattr(pipeline, "READ_AHEAD", 1)
    monkeypatch.setattr(pipeline.Job, "size", lambda job: 5)
    read, threads = [], 3

    def load(item):
        read.append(item.source)
        return pipeline.Job(item)

    items = [Item(str(i), (f"/absent/{i}",), "image", str(i)) for i in range(40)]
    with ThreadPoolExecutor(threads) as pool:
        jobs = pipeline.read_ahead(pool, items, load, 16, threading.Event())
        for number, job in enumerate(jobs):
            assert job.item is items[number]
            assert len(read) <= number + 1 + threads
    assert sorted(read, key=int) == [item.source for item in items]


def test_closing_the_stream_lets_waiting_readers_go(monkeypatch):
    monkeypatch.setattr(pipeline, "READ_AHEAD", 1)
    monkeypatch.setattr(pipeline.Job, "size", lambda job: 5)
    items = [Item(str(i), (f"/absent/{i}",), "image", str(i)) for i in range(40)]
    pool = ThreadPoolExecutor(2)
    jobs = pipeline.read_ahead(pool, items, pipeline.Job, 16, threading.Event())
    assert next(jobs).item is items[0]
    jobs.close()
    pool.shutdown(wait=True)  # would hang if a reader still waited


def test_an_item_is_known_by_all_its_files(tmp_path, monkeypatch):
    """Other voxels under the same header are scored again; errors name no file of a pair."""
    monkeypatch.setattr(loading, "FITTED", 0)
    path = str(pair(tmp_path / "a", 0))
    encoder = SimpleNamespace(clip=SimpleNamespace(size=8), fit="pad")
    unused: dict = dict.fromkeys(predictor.Predictor._fields)
    plain = predictor.Predictor(**unused | {"window": "", "encoder": encoder})
    item = Item("a", (path,), "nifti", "a-1")

    def content(one=item):
        job = loading.load(one, plain, tmp_path, "stamp")
        return (job.error, "") if job.error else job.content()[:2]

    before = content()
    assert content() == before
    pair(tmp_path / "a", 1)
    assert content()[0] != before[0] and content()[1] != before[1]
    image = tmp_path / "b.png"
    image.write_bytes(encode_png(np.zeros((9, 9), np.uint8)))
    single = content(Item("b", (str(image),), "image", "b-1"))[1]
    assert single == hashlib.sha256(image.read_bytes()).hexdigest()
    (tmp_path / "a.img").unlink()
    error, _ = content()
    assert "a.img does not exist" in error
    assert "a.img" not in pseudonyms.without_names(error, item.paths, "0123")


def written(folder, p_value=0.5):
    """(item, rows) of a finished item with one alarm, written as prediction does."""
    item = Item("a", ("a.png",), "image", "a-1")
    maps = np.stack([blobs(0, (24, 24))])
    columns = (
        maps.max((1, 2)),
        np.full(1, p_value, np.float32),
        np.ones(1, bool),
        maps[:, 0, 1],
        maps,
    )
    scores = BatchScores(*columns, *[maps[:, 0]] * 4)._replace(passes=maps[:, 0, :1])
    pixels, codes = np.zeros((1, 50, 30), np.float32), np.zeros((1, 50, 30), np.uint16)
    frames = Frames(pixels.shape, lambda first, end: pixels[first:end], None, {}, "", 0)
    part = predictor.part(scores, codes, 0, None, "pad")
    loaded = predictor.Loaded("k", "0" * 64, frames, None, codes, True)
    privacy = results.Privacy()
    rows, _ = results.write(folder, item, loaded, [part], "pad", {}, privacy, lambda _: None, {})
    return item, rows


@pytest.fixture
def result(tmp_path):
    """(folder, item) of a finished item."""
    return tmp_path, written(tmp_path)[0]


def test_a_finished_item_gives_its_rows_again(result):
    folder, item = result
    (row,) = results.finished(folder, item, "k")
    assert row["alarm"] == 1 and row["result"] == "a-1.json"
    assert results.finished(folder, item, "other") is None


@pytest.mark.parametrize("p_value", [0.5, np.nan])  # nan: of a run with fewer than two supports
def test_the_rows_are_the_same_when_written_and_when_read_again(tmp_path, p_value):
    item, rows = written(tmp_path, p_value)
    assert rows == results.finished(tmp_path, item, "k")
    assert rows[0]["p_value"] == (0.5 if p_value == 0.5 else None)  # None: an empty cell


def test_an_altered_result_is_made_again(result):
    """Each byte of each file counts, and what the JSON says, though its size stays."""
    folder, item = result
    page = json.loads((folder / "a-1.json").read_text())
    names = [*page["files"].values()]
    assert len(names) >= 2
    for name in names:
        whole = (folder / name).read_bytes()
        for altered in (whole[:-3], bytes([*whole[:-9], whole[-9] ^ 1, *whole[-8:]]), b""):
            (folder / name).write_bytes(altered)
            assert results.finished(folder, item, "k") is None
        (folder / name).unlink()
        assert results.finished(folder, item, "k") is None
        (folder / "elsewhere").write_bytes(whole)
        (folder / name).symlink_to(folder / "elsewhere")
        assert results.finished(folder, item, "k") is None
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert results.finished(folder, item, "k") is None
        (folder / name).unlink()
        (folder / name).write_bytes(whole)
        assert results.finished(folder, item, "k")
    frame = page["frames"][0]
    for changed in (
        page | {"frames": [frame | {"alarm": False}]},
        page | {"frames": [frame | {"score": frame["score"] + 1e-9}]},
        page | {"source": "b"},
        page | {"files": {}},
        page | {"frames": []},
        {name: value for name, value in page.items() if name != "digest"},
    ):
        (folder / "a-1.json").write_text(json.dumps(changed))
        assert results.finished(folder, item, "k") is None
    (folder / "a-1.json").write_text(json.dumps(page))  # in another layout
    assert results.finished(folder, item, "k")
    (folder / "a-2.json").write_text(json.dumps(page))  # of another item
    assert results.finished(folder, item._replace(output="a-2"), "k") is None


def test_a_mutated_json_is_made_again(result):
    folder, item = result
    path = folder / "a-1.json"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for text in (b"", b"{}", b"[]", b"null", b"[" * 100_000, whole[:-3], b"\xff" + whole):
        path.write_bytes(text)
        assert results.finished(folder, item, "k") is None
    rows = []
    for _ in range(300):
        at, bit = rng.integers(len(whole)), 1 << rng.integers(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        rows.append(results.finished(folder, item, "k"))
    path.write_bytes(whole)
    (right,) = results.finished(folder, item, "k")
    assert all(each in (None, [right]) for each in rows)  # a space became another
    path.unlink()
    os.mkfifo(path)
    assert results.finished(folder, item, "k") is None


def test_images_of_many_pixels_are_decoded_one_after_another(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "LARGE_IMAGE", 100)
    most, now, lock = {"small": 0, "large": 0}, {"small": 0, "large": 0}, threading.Lock()
    meet = threading.Barrier(2)
    sizes = {"small": (10, 10), "large": (10, 11)}

    def read(item):
        kind = item.source
        with lock:
            now[kind] += 1
            most[kind] = max(most[kind], now[kind])
        if kind == "small":
            meet.wait(30)  # both are here at once
        else:
            time.sleep(0.05)
        with lock:
            now[kind] -= 1

    def in_turn(item):
        with loading.in_turn(loading.one_decoded, loading._pixels(item)):
            read(item)

    items = []
    for i, kind in enumerate(["small", "small", "large", "large", "large"]):
        path = tmp_path / f"{i}.png"
        PIL.Image.new("L", sizes[kind]).save(path)
        items.append(Item(kind, (str(path),), "image", f"{i}"))
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(in_turn, items))
    assert most == {"small": 2, "large": 1}


def test_a_size_that_cannot_be_read_is_no_obstacle(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    for name in ("a.png", "absent.png"):
        for kind in ("image", "nifti", "dicom"):
            item = Item(name, (str(tmp_path / name),), kind, name)
            assert loading.weight(item, 100) == 0


def test_a_heavy_item_is_in_memory_alone():
    """Nothing is read beside it: None asks for all others to be finished before and after."""
    items = [Item(str(i), (f"/absent/{i}",), "image", str(i)) for i in range(5)]
    weights = {"2": pipeline.HEAVY + 1}
    with ThreadPoolExecutor(3) as pool:
        stream = pipeline.read_ahead(
            pool, items, pipeline.Job, 16, threading.Event(), lambda i: weights.get(i.source, 0)
        )
        order = [job and job.item.source for job in stream]
    assert order == ["0", "1", None, "2", None, "3", "4"]
