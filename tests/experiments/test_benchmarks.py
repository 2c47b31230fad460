"""The measuring scripts: their counting and their statistics, on numbers known beforehand."""

import json
import time
from functools import partial
from pathlib import Path

import learners
import numpy as np
import pytest
from bench import metrics as bench_metrics
from bench import predict_inputs, prepare, workload

from medclip_jax.inference import inputs
from medclip_jax.io import read


def rows(gain, gradients=400):
    rng = np.random.default_rng(0)
    made = []
    for seed in range(6):
        base = 0.7 + 0.05 * rng.random()
        for name, more, taken in (("joint", 0.0, 400), ("maml", gain, gradients)):
            value = base + more + 0.002 * rng.random() * (name != "joint")
            made.append([4, name, seed, taken, value, value, None, None])
    return made


def test_a_planted_gain_is_found_and_written(tmp_path):
    learners.write(tmp_path, rows(0.1))
    found = {t["measure"]: t for t in json.loads((tmp_path / "tests.json").read_text())}
    assert set(found) == {"image auroc", "pixel auroc"}  # no masks: no other measure
    test = found["image auroc"]
    assert 0.1 < test["low"] < test["difference"] < test["high"] < 0.102
    assert test["p_holm"] < 1e-6 and test["p_wilcoxon"] == pytest.approx(2 / 2**6)
    text = (tmp_path / "table.md").read_text()
    assert "| 4 | maml | 400 |" in text and "+0.101" in text
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 13


def test_variants_with_other_numbers_of_gradients_are_refused():
    learners.equal_gradients(rows(0.0, 410))
    with pytest.raises(ValueError, match="gradients differ"):
        learners.equal_gradients(rows(0.0, 800))


def test_runs_take_turns_and_where_asked_the_second_of_each_turn_counts():
    order = []

    def run(name):
        order.append(name)
        return float(len(order))

    runs = {name: partial(run, name) for name in "ab"}
    plain = workload.in_turn(runs, 2)
    assert order == ["a", "b"] * 3 and plain == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    order.clear()
    taken = workload.in_turn(runs, 2, again=True)
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 2
    assert taken == {"a": [4.0, 8.0], "b": [6.0, 10.0]}


def test_the_workload_is_the_one_that_is_named():
    work = workload.build("tiny", 3, 2)
    assert len(work.design.prompts.ids) == 21 and work.episodes.valid.shape == (3, 1)
    assert work.params["context"].shape == (21, 8, 32)
    assert workload.SIZES["ViT-B/16"][:3] == (512, 12, 8)
    assert workload.SIZES["ViT-L/14"][:3] == (768, 12, 12)


@pytest.mark.parametrize("kind", predict_inputs.MAKERS)
def test_files_to_predict_are_whole_and_all_different(tmp_path, kind):
    folder = predict_inputs.MAKERS[kind](tmp_path / kind, 3, 5)
    items = inputs.find([str(folder)])
    assert len(items) == (1 if kind == "nifti" else 3)
    pixels = np.concatenate([read.read(Path(item.paths[0])).pixels for item in items])
    assert len(pixels) == 3 and len({x.tobytes() for x in pixels}) == 3
    assert all(0.05 < x.std() < 0.5 for x in pixels)


def test_a_folder_of_links_is_listed_and_read_whole(tmp_path):
    found = prepare.worker("folder", prepare.links(tmp_path / "data", 40))
    assert found["images"] == 40 and found["per_second"] > 0
    assert found["peak_mb"] >= found["before_mb"] > 0


def test_scenes_are_the_same_at_every_reading_and_growth_is_seen():
    maps, masks = (bench_metrics.Scenes(9, 0, part) for part in (0, 1))
    first, again = list(maps), list(maps)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert first[0].dtype == np.float16 and len({x.tobytes() for x in first}) == 9
    held = list(masks)
    assert [bool(m.any()) for m in held] == [i % 7 > 0 for i in range(9)]
    inside = np.mean([v[m].mean() for v, m in zip(first, held, strict=True) if m.any()])
    assert inside > 0.5 > np.mean([v[~m].mean() for v, m in zip(first, held, strict=True)])
    with bench_metrics.Growth() as memory:
        block = np.ones(40_000_000)
        time.sleep(0.2)
    assert memory.peak > 0.9 * block.nbytes


def test_operations_count_every_inner_step():
    """XLA counts a loop's body once; two steps make no loop and are counted whole."""
    work = workload.build("tiny", 2, 2)
    compiled = {n: workload.step(work, "maml", n)[0] for n in (1, 2, 4)}
    one, two, four = (workload.operations(work, "maml", n, c) for n, c in compiled.items())
    assert one < two == workload.flops(compiled[2])
    plain = one + 3 * (two - one)
    assert workload.flops(compiled[4]) < plain < four < 1.5 * plain  # the loop recomputes
