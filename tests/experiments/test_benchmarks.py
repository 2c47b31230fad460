"""The measuring scripts: that they run, and that they count what they say, at a tiny size."""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bench import (
    clock,
    encoder,
    large,
    maml,
    predict,
    predict_inputs,
    scaling,
    sizes,
    stages,
    table,
    workload,
)
from bench import input as bench_input

from medclip_jax.clip import checkpoint, hf_weights
from medclip_jax.inference import inputs
from medclip_jax.io import read
from tests.support.paths import ROOT


def flags(module, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.arguments(parser)
    return parser.parse_args(words)


def test_runs_take_turns_and_the_second_of_each_turn_may_count():
    order = []

    def run(name):
        order.append(name)
        return float(len(order))

    runs = {name: partial(run, name) for name in "ab"}
    plain = clock.in_turn(runs, 2)
    assert order == ["a", "b"] * 3 and plain == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    order.clear()
    seconds = clock.in_turn(runs, 2, again=True)
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 2
    assert seconds == {"a": [4.0, 8.0], "b": [6.0, 10.0]}


def test_products_of_the_image_encoder_are_counted(tmp_path):
    clip = checkpoint.load(str(sizes.write("tiny", tmp_path / "clip")))
    # by hand for one block of 17 positions: qkv, out, both of the MLP, scores and mixing
    block = 17 * 32 * (96 + 32 + 128 + 128) + 2 * 17 * 17 * 32
    assert sizes.flops("tiny") == 2 * (4 * block + 16 * 192 * 32 + 32 * 16)
    assert np.ptp(np.asarray(clip.text["text_model"]["final_layer_norm"]["scale"])) > 0


def test_the_encoder_is_measured_without_pytorch():
    words = ["--size", "tiny", "--batch", "2", "3", "--times", "1", "--python", ""]
    result = encoder.run(flags(encoder, *words))
    assert [row["batch"] for row in result["rows"]] == [2, 3]
    for row in result["rows"]:
        assert set(row["images_per_second"]) == {"ours float32"} and not row["ratio"]
    assert result["largest_difference"] is None


def test_a_large_encoder_is_measured_in_int8(tmp_path):
    row, wide = (
        large.worker(str(hf_weights.EMBEDDED), dtype, 1, 1) for dtype in ("int8", "float32")
    )
    assert row["peak_mb"] >= row["peak_mb_of_loading"] > wide["vision_mb"]
    # kernels of the blocks are all but a tenth of the encoder
    assert 0.25 < row["vision_mb"] / wide["vision_mb"] < 0.4
    large.tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()


def test_ratios_are_to_pytorch_in_float32():
    seconds = {"ours float32": [2.0, 1.0], "torch float32": [2.0, 3.0]}
    row = encoder.row(8, seconds, 1e6, 1e9)
    assert row["images_per_second"] == {"ours float32": 8, "torch float32": 4}
    assert row["ratio"] == {"ours float32": 2, "torch float32": 1}
    assert row["share_of_matmul_peak"]["ours float32"] == 8e-3


@pytest.fixture(scope="module")
def work() -> workload.Work:
    return workload.build("tiny", 2, 2)


def test_the_workload_is_the_one_that_is_named(work):
    assert len(work.design.prompts.ids) == 21 and work.episodes.valid.shape == (2, 1)
    assert work.params["context"].shape == (21, 8, 32)


@pytest.mark.slow
def test_learners_are_measured_side_by_side():
    words = ["--size", "tiny", "--learner", "anil", "joint", "--tasks", "2", "--times", "1"]
    rows = maml.run(flags(maml, *words))["rows"]
    assert [(r["learner"], r["inner_steps"]) for r in rows] == [("anil", 1), ("joint", 0)]
    assert all(r["seconds"] > 0 and r["gigaflop"] > 0 for r in rows)


@pytest.mark.slow
def test_operations_count_every_inner_step(work):
    """XLA counts a loop's body once; two steps make no loop and are counted whole."""
    compiled = {n: workload.step(work, "maml", n)[0] for n in (1, 2, 4)}
    one, two, four = (workload.operations(work, "maml", n, c) for n, c in compiled.items())
    assert one < two == workload.flops(compiled[2])
    plain = one + 3 * (two - one)
    assert workload.flops(compiled[4]) < 0.9 * plain < four < 1.5 * plain


@pytest.mark.parametrize("kind", predict_inputs.MAKERS)
def test_files_to_predict_are_whole_and_all_different(tmp_path, kind):
    folder = predict_inputs.MAKERS[kind](tmp_path / kind, 3, 5)
    items = inputs.find([str(folder)])
    assert len(items) == (1 if kind == "nifti" else 3)
    pixels = np.concatenate([read.read(Path(item.paths[0])).pixels for item in items])
    assert len(pixels) == 3 and len({x.tobytes() for x in pixels}) == 3
    assert all(0.05 < x.std() < 0.5 for x in pixels)


@pytest.mark.slow
def test_operations_of_a_table_are_counts_times_runs():
    image, step, maps, memory = table.parts("ours", "tiny", [4], 2)
    # 1,592 test images, 32 + 32 + 2 x 4 supports of 50 variants; three sets, two draws, four folds
    assert image[:2] == ("image encoder", 1592 + 72 * 51) and image.flops == sizes.flops("tiny")
    assert step[:2] == ("gradient, 4 rows, K = 4", 3 * 2 * 5 * 100) and step.flops > image.flops
    assert maps.times == 1592 * 2 * (5 + 20 + 2) and memory.times == 1592 * 2 * 3
    # 16 patches of 32 numbers with those of four supports, at three layers
    assert memory.flops == pytest.approx(3 * 2 * 16 * 64 * 32, rel=0.3)
    meta = table.parts("paper", "tiny", [4], 2)
    assert meta[0].times == (1592 + 72 * 33) * 5 and meta[1].name.startswith("exact meta-step")


def test_a_consumer_waits_for_what_the_cores_cannot_read():
    spent = {"decode ms": 3.0, "resize ms": 1.0, "SHA-256 ms": 1.0}
    row = bench_input.row("png", spent, cores=2, consumer=2000, encoder=300)
    assert row["images/s"] == pytest.approx(400) and row["cores for 2000/s"] == pytest.approx(10)
    assert row["waits at 2000/s"] == pytest.approx(0.8) and row["waits as encoder"] == 0


def test_parts_of_reading_are_timed(tmp_path):
    paths = sorted(predict_inputs.png(tmp_path / "png", 2, 0).iterdir())
    spent = bench_input.milliseconds(paths, 32)
    assert list(spent) == ["decode ms", "resize ms", "SHA-256 ms"] and min(spent.values()) > 0
    assert bench_input.one(paths[0], 32).shape == (32, 32)


@pytest.mark.slow
def test_a_job_is_timed_cold_again_and_warm(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = "--config", f"{stages.CONFIG}:k=2", "--set", "steps=2"
    jobs = stages.run(flags(stages, *config))
    assert list(jobs) == ["cold", "again", "warm"] and set(jobs["again"]) < set(jobs["cold"])
    assert jobs["again"]["in all"] < jobs["cold"]["in all"] and jobs["warm"]["train"] > 0
    large = stages.run(flags(stages, *config, "--size", "tiny", "--jobs", "cold"))
    assert list(large) == ["cold"] and large["cold"]["peak, GB"] > 0.2


@pytest.mark.slow
def test_prediction_and_devices_are_measured(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    actual = predict.run(flags(predict, "--kinds", "png", "--images", "64", "--few", "8"))
    assert actual["png"]["per_second"] > 0 and actual["png"]["peak_megabytes"] > 100
    words = ["--devices", "1", "2", "--size", "tiny", "--tasks", "2", "--times", "1"]
    rows = scaling.run(flags(scaling, *words))["rows"]
    assert [r["devices"] for r in rows] == [1, 2] and rows[0]["relative"] == 1
