"""The measuring scripts of speed: what they count and compare; no test asserts an absolute time."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import compare_speed
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench import (
    busi,
    encoder,
    growth,
    levers,
    peak,
    quick,
    stages,
    stages_worker,
    towers,
)

from medclip_jax.clip import vit
from tests.support.paths import ROOT


def given(module, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.arguments(parser)
    return parser.parse_args(words)


def test_what_got_slower_is_named():
    old = {"encode": 1.0, "help": 0.5, "score": 0.2}
    new = {"encode": 1.19, "help": 0.61, "score": 0.1, "more": 3.0}
    assert compare_speed.slower(old, new, 1.2) == {"help": pytest.approx(1.22)}
    assert compare_speed.slower(old, old, 1.2) == {}
    with pytest.raises(ValueError, match="not measured any more: score"):
        compare_speed.slower(old, {"encode": 1.0, "help": 0.5}, 1.2)
    with pytest.raises(ValueError, match="help"):
        compare_speed.slower(old, new | {"help": float("nan")}, 1.2)


@pytest.mark.parametrize("times, code", [(1.1, 0), (1.3, 1)])
def test_two_files_are_compared_from_the_command_line(tmp_path, times, code):
    for name, seconds in (("old", 1.0), ("new", times)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"seconds": {"encode": seconds}}))
    said = compared(tmp_path / "old.json", tmp_path / "new.json")
    assert said.returncode == code and ("SLOWER" in said.stdout) == bool(code)
    (tmp_path / "new.json").write_text("[]")
    said = compared(tmp_path / "old.json", tmp_path / "new.json")
    assert said.returncode == 2 and said.stderr.startswith("error: ")


def compared(*files: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "experiments/compare_speed.py"), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True)


def test_quick_measures_every_part_and_its_file_can_be_compared(tmp_path):
    words = ["--tower", "tiny", "--side", "64", "--images", "2", "--k", "2", "--times", "1"]
    found = quick.run(given(quick, *words))
    assert set(found["seconds"]) == {
        *("encode", "train step", "score", "help", "matmul float32", "matmul bfloat16")
    }
    assert found["images_per_second"] == pytest.approx(2 / found["seconds"]["encode"])
    (tmp_path / "new.json").write_text(json.dumps(found))
    assert compare_speed.seconds(tmp_path / "new.json") == found["seconds"]


def test_peak_is_told_by_number_format_and_side(capsys):
    found = peak.run(given(peak, "--sides", "32", "64", "--times", "1"))["gigaflops"]
    assert set(found) == {"xla"}  # no PyTorch was given
    assert all(set(rates) == {"32", "64"} for rates in found["xla"].values())
    assert "float32" in capsys.readouterr().out


def test_the_measured_tower_is_the_packages_and_its_products_are_counted():
    size = towers.SIZES["tiny"]
    weights, tower = towers.parameters(size), towers.tower(size)
    found = vit.encode_images(
        weights, towers.images(size, 2), tower=tower, mean=towers.MEAN, std=towers.STD
    )
    assert found.pooled.shape == (2, size.joint) and len(found.levels) == 3
    assert all(level.shape == (2, 16, size.width) for level in found.levels)
    assert np.isfinite(found.pooled).all()
    # by hand for one block of 17 positions: qkv, out, both of the MLP, scores and mixing
    block = 17 * 32 * (96 + 32 + 128 + 128) + 2 * 17 * 17 * 32
    assert towers.flops(size) == 2 * (4 * block + 16 * 192 * 32 + 32 * 16)


def test_the_encoder_is_measured_without_pytorch_too():
    args = given(encoder, "--tower", "tiny", "--batch", "2", "3", "--times", "1", "--python", "")
    found = encoder.run(args)
    assert [row["batch"] for row in found["rows"]] == [2, 3]
    for row in found["rows"]:
        assert set(row["images_per_second"]) == {"ours float32"} and not row["ratio"]
    assert found["largest_difference"] is None


def test_levers_compute_what_the_shipped_tower_does():
    words = ["--tower", "tiny", "--batch", "4", "--times", "1"]
    rows = levers.run(given(levers, *words, "--dtype", "float32", "bfloat16"))["rows"]
    moved = {(r["dtype"], r["lever"]): r["moved"] for r in rows}
    assert {lever for _, lever in moved} == {"shipped", *levers.LEVERS}
    for lever in ("loop", "apart", "in place"):
        assert moved["float32", lever] < 1e-5 and moved["bfloat16", lever] < 0.05
    assert 0 < moved["float32", "int8"] < 0.1


def test_int8_products_are_those_of_the_rounded_factors():
    rng = np.random.default_rng(0)
    x, p = rng.normal(size=(2, 3, 64)), {"kernel": rng.normal(size=(64, 5)), "bias": np.arange(5.0)}
    row, column = (
        np.abs(v).max(axis, keepdims=True) / 127 for v, axis in ((x, -1), (p["kernel"], 0))
    )
    wanted = (np.round(x / row) * row) @ (np.round(p["kernel"] / column) * column) + p["bias"]
    found = levers.quantised(
        *(jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), g) for g in (x, p))
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_ratios_are_to_pytorch_in_float32():
    seconds = {"ours float32": [2.0, 1.0], "torch float32": [2.0, 3.0]}
    found = encoder.row(8, seconds, towers.SIZES["tiny"], 1e9)
    assert found["images_per_second"] == {"ours float32": 8, "torch float32": 4}
    assert found["ratio"] == {"ours float32": 2, "torch float32": 1}


def test_a_busi_run_is_put_together_from_its_parts():
    seconds = {"encode": 8.0, "step": 0.5, "rows": 0.25, "score": 2.0, "judge": 0.125}
    # 748 + 16 + 16 * 50 images at one a second, 400 steps, 200 validations, 93.5 batches
    assert busi.ours(seconds, 16, 50, 400, 200) == 1564 + 300 + 25 + 187
    peer = busi.theirs(400, 200, 3.29, 2.42)
    assert peer["shipped"] == pytest.approx(46_812) and peer["once"] == pytest.approx(1543.48)


def test_every_part_of_a_busi_run_is_measured():
    words = ["--tower", "tiny", "--k", "8", "--epochs", "2", "--variants", "3", "--times", "1"]
    found = busi.run(given(busi, *words))
    assert set(found["parts"]["1"]) == {"encode", "step", "rows", "score"}
    assert set(found["parts"]["5"]) == {"encode", "step", "rows", "score", "judge"}
    for row in found["rows"]:
        parts = found["parts"][str(row["copies"])]
        assert row["seconds"] == busi.ours(parts, 8, 3, 2, 2)
        assert row["ratio"]["once"] == pytest.approx(found["peer"]["once"] / row["seconds"])


def test_an_exponent_is_a_slope_of_logarithms():
    assert growth.exponent([1, 10, 100], [2, 20, 200]) == pytest.approx(1)
    assert growth.exponent([2, 4, 8], [3, 12, 48]) == pytest.approx(2)
    assert growth.exponent([1, 10], [5, 5]) == pytest.approx(0)


def test_growth_is_told_for_every_axis_and_by_image(tmp_path, monkeypatch, capsys):
    from tests.support.checkpoints import tiny_checkpoint

    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    tower, *_ = tiny_checkpoint(tmp_path / "clip")
    words = ["--clip", str(tower), "--side", "64", "--images", "4", "8", "--tower", "tiny"]
    words += ["--pixels", "32", "64", "--prompts", "21", "42", "--tasks", "1", "2", "--times", "1"]
    found = growth.run(given(growth, *words))
    told = {(r["what"], r["axis"]) for r in found["rows"]}
    stages = ("encode", "score", "metrics", "predictions.npz", "report")
    assert told == {
        *((stage, "images") for stage in stages),
        ("encode 16 images", "pixels of a side"),
        ("training step", "prompts"),
        ("exact meta-step", "tasks"),
    }
    assert all(len(r["seconds"]) == len(r["megabytes"]) == 2 for r in found["rows"])
    assert all(min(r["seconds"]) > 0 and np.isfinite(r["exponent"]) for r in found["rows"])
    more = found["bytes_per_image"]
    # pooled and three levels of 16 patches in float32; maps are float16 of the frame
    assert more["feature_cache"] > 4 * (16 + 3 * 16 * 32) and more["predictions.npz"] > 2 * 32 * 32
    assert capsys.readouterr().out.count("\n|") >= 9


class Hands:
    """A clock that is moved by hand."""

    def __init__(self):
        self.at = 0.0

    def __call__(self) -> float:
        return self.at

    def go(self, seconds: float) -> None:
        self.at += seconds


def test_stages_count_their_own_seconds_alone():
    hands = Hands()
    clock = stages_worker.Clock(hands)
    with clock.stage("train"):
        hands.go(2)
        with clock.stage("read"):
            hands.go(3)
        hands.go(1)
        # a compilation of 4 s in which another of 1 s was reported before
        trace, compiled = sorted(stages_worker.COMPILE)[1:], sorted(stages_worker.COMPILE)[0]
        hands.go(1)
        clock.compiled(trace[0], 1)
        hands.go(3)
        clock.compiled(compiled, 4)
        clock.compiled("/jax/something/else", 9)
    assert clock.seconds == {"train": 3, "read": 3, "compile": 4}


def test_the_turns_of_a_generator_are_timed_and_what_stands_between_is_not():
    hands = Hands()
    clock = stages_worker.Clock(hands)

    class module:
        @staticmethod
        def rows(n):
            for i in range(n):
                hands.go(1)
                yield i

    clock.wrap_steps(module, "rows", "read")
    seen = []
    for i in module.rows(3):
        hands.go(10)
        seen.append(i)
    assert seen == [0, 1, 2] and clock.seconds == {"read": 3}


def test_every_stage_of_a_job_is_told_cold_again_and_warm(tiny_job, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # it compiles more than it computes
    found = stages.run(given(stages, *tiny_job))
    assert list(found) == ["cold", "again", "warm"]
    for name, job in found.items():
        assert set(job["stages"]) == set(stages.NAMES)
        assert sum(job["stages"].values()) == pytest.approx(job["seconds"])
        assert all(x >= 0 for x in job["stages"].values())
        assert job["first_step"] is None if name == "again" else 0 < job["first_step"]
        assert (job["first_step"] or 0) < job["seconds"]
    assert found["cold"]["stages"]["synthesise"] > 0
    assert found["warm"]["stages"]["synthesise"] == 0  # the feature cache is full
    assert found["warm"]["stages"]["encode"] == found["again"]["stages"]["encode"] == 0


@pytest.fixture
def tiny_job(tmp_path) -> list[str]:
    from medclip_jax.data import phantom
    from tests.support.checkpoints import tiny_checkpoint

    data = phantom.write_folder(tmp_path / "data", "ultrasound", 0, 64, 4, 3, 3)
    tower, *_ = tiny_checkpoint(tmp_path / "clip")
    fields = {"clip.checkpoint": tower, "steps": 2, "synthesis.variants": 2, "fusion.probes": 2}
    fields |= {"calibration.folds": 2, "score.passes": 2, "explained": 0}
    config = f"{ROOT}/configs/folder.py:k=4,root={data}"
    return ["--config", config, "--set", *(f"{n}={v}" for n, v in fields.items())]
