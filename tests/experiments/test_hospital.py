"""Past one machine: the simulated day of a hospital network, and what a platform does."""

import sys

import fleet
import hospital
import jax
import numpy as np
import pytest
from bench import towers


def steady(seconds: int, images: int, workers: int):
    return np.full(seconds, images), np.full(2 * seconds, workers), np.zeros(2 * seconds, int)


def test_a_fleet_that_is_fast_enough_keeps_nobody_waiting():
    day = hospital.run(*steady(1000, 10, 5), rate=2.0, batch=0)
    assert day.longest_wait == 0 and day.longest_queue == 0 and day.again == 0
    assert day.busy == pytest.approx(0.5)  # of twice the time


def test_too_small_a_fleet_falls_behind_at_the_known_rate():
    # 10 images a second come for 1,000 s, 8 are done: the last image waits 10,000 / 8 - 1,000 s
    day = hospital.run(*steady(1000, 10, 4), rate=2.0, batch=0)
    assert day.longest_wait == pytest.approx(250, abs=1)
    assert day.median_wait == pytest.approx(125, abs=1)
    assert day.longest_queue == 2000


def test_what_is_never_done_waits_for_ever():
    coming, there, gone = steady(1000, 10, 1)
    assert hospital.run(coming, there, gone, rate=2.0, batch=0).longest_wait == np.inf


def test_a_stop_of_all_workers_delays_by_its_length():
    coming, there, gone = steady(1000, 10, 10)
    there[200:300] = 0
    day = hospital.run(coming, there, gone, rate=2.0, batch=0)
    assert day.longest_wait == 100 and day.longest_queue == 1000


def test_a_lost_batch_is_computed_again_and_no_image_is_lost():
    coming, there, gone = steady(1000, 10, 5)
    gone[100] = 3
    day = hospital.run(coming, there, gone, rate=4.0, batch=2)
    assert day.again == pytest.approx(6 / 10_000) and day.lost == 3
    assert np.isfinite(day.longest_wait)


def test_lost_workers_come_back_and_are_as_many_as_asked():
    losses = hospital.Losses(mean_hours=1.0, seconds_away=60)
    there, gone = hospital.staff(100, losses, 36_000, np.random.default_rng(0))
    assert there.max() <= 100 and there.min() > 80
    assert there.mean() == pytest.approx(100 / (1 + 60 / 3600), rel=0.005)
    assert gone.sum() == pytest.approx(there.mean() * 10, rel=0.1)


def test_a_day_has_its_images_and_bursts():
    load = hospital.Load(images=1e6, bursts=2, burst_images=50_000, burst_seconds=60)
    coming = hospital.arrivals(load, np.random.default_rng(0))
    assert len(coming) == hospital.DAY
    assert coming.sum() == pytest.approx(1.1e6, rel=0.01)
    assert coming.max() > 800 > np.sort(coming)[-121]  # the two minutes of bursts alone


def test_the_smallest_fleet_is_enough_and_one_less_is_not():
    load = hospital.Load(images=1e6)
    n, day = hospital.fleet(load, None, 5.0, 30.0, seed=0)
    coming = hospital.arrivals(load, np.random.default_rng(0))
    there = np.full(hospital.DAY + 3600, n)
    fewer = hospital.run(coming, there - 1, 0 * there, 5.0, 0)
    assert day.wait_99 <= 30 < fewer.wait_99
    with_losses, _ = hospital.fleet(load, hospital.Losses(mean_hours=1.0), 5.0, 30.0, seed=0)
    assert with_losses > n


def test_the_table_is_printed(monkeypatch, capsys):
    words = ["--images", "1e5", "--rate", "5", "--price", "0.2", "--wait", "60"]
    monkeypatch.setattr(sys, "argv", ["hospital.py", *words])
    hospital.main()
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 and {x.count("|") for x in (head, rule, *rows)} == {11}


@pytest.mark.parametrize("name", ["tiny", "ViT-B/16"])
def test_operations_and_bytes_of_an_image(name):
    size = towers.SIZES[name]
    work = fleet.count(size, k=2)
    patches = (size.pixels // size.patch) ** 2
    # XLA counts norms, softmax and activation too: at most a tenth more than the products
    assert 1 < work.encode / towers.flops(size) < (1.1 if name != "tiny" else 1.5)
    products = 3 * 2 * patches * size.width * 2 * patches
    assert 1 < work.memory / products < (1.1 if name != "tiny" else 1.5)
    assert work.kept == 2 * (3 * patches * size.width + size.joint)


def test_shapes_are_those_of_the_parameters():
    size = towers.SIZES["tiny"]._replace(width=48, layers=3, patch=4)
    made = jax.tree.map(lambda x: x.shape, towers.parameters(size))
    assert made == jax.tree.map(lambda x: x.shape, fleet.shapes(size, "float32"))


def test_the_slower_of_arithmetic_and_memory_counts():
    work = fleet.Work(encode=8.0, prompts=1.0, memory=1.0, moved=2.0, kept=1.0)
    assert fleet.per_second(work, fleet.Platform("", 100.0, 1e9, 1.0)) == 10
    assert fleet.per_second(work, fleet.Platform("", 100.0, 4.0, 1.0)) == 2


def test_more_supports_cost_more_and_the_table_has_every_platform(monkeypatch, capsys):
    size = towers.SIZES["tiny"]
    assert fleet.count(size, 4).memory > fleet.count(size, 2).memory > fleet.count(size, 0).memory
    monkeypatch.setattr(sys, "argv", ["fleet.py", "--tower", "tiny", "--k", "2"])
    fleet.main()
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in ("cpu", "v5e", "h100"))
