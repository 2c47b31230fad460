"""The reproduction's tables from made-up runs: what is averaged, tested and left out."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import reproduce
import tables

from medclip_jax.errors import DataError
from medclip_jax.evaluation import (
    bootstrap,
    metrics,
    pixel_metrics,
    significance,
)


def run(folder, method, seed, shift, n=60):
    """As reproduce.read gives it, with the maps' counts on disk."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    score = 1 / (1 + np.exp(-(rng.normal(size=n) + shift * label)))
    masks = np.zeros((n, 8, 8), bool)
    masks[label == 1, 2:5, 2:5] = True
    maps = np.clip(rng.normal(0.4 + 0.05 * shift * masks, 0.1), 0, 0.99).astype(np.float32)
    found = metrics.image_level(score, label)
    pixel = pixel_metrics.pixel_level(maps, masks)
    arrays = folder / f"{method}-{seed}.npz"
    np.savez(arrays, pixel_counts=bootstrap.pixel_counts(maps, masks))
    return {
        "seed": seed,
        "image": {**found, "sensitivity_at_90": metrics.sensitivity_at(score, label, 0.9)},
        "pixel": {name: pixel[name] for name in ("auroc", "auprc", "aupro", "dice")},
        "calibration": {"false_alarm_rate": found["fpr"], "alpha_attained": 0.2},
        "oracle": {"f1": 0.7},
        "id": np.array([f"{i}.png" for i in range(n)]),
        "label": label,
        "score": score,
        "arrays": arrays,
    }


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    shifts = {"ours": 2, "memory": 0}
    return {m: [run(folder, m, s, x) for s in range(4)] for m, x in shifts.items()}


def test_numbers_are_means_with_two_level_limits(cell):
    found = tables.numbers(cell["ours"])
    for (group, name), number in found.items():
        values = [r[group][name] for r in cell["ours"]]
        assert number.mean == pytest.approx(np.mean(values)), name
        assert number.sd == pytest.approx(np.std(values, ddof=1)), name
        bounded = (group, name) not in {("oracle", "f1"), ("calibration", "alpha_attained")}
        assert (number.low is not None) == bounded, name
        if bounded:
            assert 0 <= number.low <= number.mean <= number.high <= 1, name
    auroc = found["image", "auroc"]
    rng, scores = np.random.default_rng(0), np.stack([r["score"] for r in cell["ours"]])
    wanted = significance.bootstrap_interval(scores, cell["ours"][0]["label"], rng)
    assert auroc.low == pytest.approx(wanted.low, abs=0.4 * wanted.se)


def test_draws_with_test_images_of_their_own_have_intervals(cell, tmp_path):
    """As where the pool of healthy images is drawn anew: each draw leaves out others."""
    turned = []
    for number, run in enumerate(cell["ours"]):
        kept = np.setdiff1d(np.arange(60), np.arange(4 * number, 4 * number + 8))
        kept = np.random.default_rng(number).permutation(kept)
        with np.load(run["arrays"]) as held:
            np.savez(tmp_path / f"{number}.npz", pixel_counts=held["pixel_counts"][kept])
        cut = {name: run[name][kept] for name in ("id", "label", "score")}
        turned.append({**run, **cut, "arrays": tmp_path / f"{number}.npz"})
    got, whole = tables.intervals(turned), tables.intervals(cell["ours"])
    assert set(got) == set(whole) and ("pixel", "aupro") in got
    for name in (("image", "auroc"), ("pixel", "dice")):
        assert got[name][0] < got[name][1] and got[name] != whole[name]
        assert got[name] == pytest.approx(whole[name], abs=0.05)
    other = {**cell["ours"][1], "label": 1 - cell["ours"][1]["label"]}
    with pytest.raises(DataError, match="differs between draws"):
        tables.intervals([cell["ours"][0], other])


def test_markdown_names_methods_means_and_published_numbers(cell):
    cells = {("busi", 4): cell, ("busi", 8): {"ours": cell["ours"][:2]}}
    found = tables.measured(cells)
    text = tables.markdown(cells, found, 4)
    assert "## Table 1: busi, image auroc" in text and "## Table 2: busi, pixel auroc" in text
    assert "Table 3" not in text and "cannot be below 0.125" in text
    number = found["busi", 4]["ours"]["image", "auroc"]
    shown = f"{number.mean:.3f} ± {number.sd:.3f} ({number.low:.3f} to {number.high:.3f})"
    assert f"| ours | {shown} |" in text and f"| ours | 4 | {shown} |" in text
    assert "| the paper, Table 1 | 0.864 | 0.870 |" in text and "oracle f1" in text
    assert "- the paper, Table 1: image auroc 0.864" in text
    assert "`ours` itself, whose learner is joint" in text
    least = tables.Tests(0.125, 0.125, 1e-9, 4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "tests", lambda cell: {"memory": least})
        assert "| 0.125 | < 0.001 | 4 of 4 |" in tables.markdown(cells, found, 4)
    learned = {"ours": [{**r, "learner": "maml"} for r in cell["ours"]]}
    said = tables.markdown({("busi", 4): learned}, tables.measured({("busi", 4): learned}), 4)
    assert "`ours` learned by maml; `joint` is the same without episodes" in said
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 6
    assert all(len({line.count("|") for line in block}) == 1 for block in blocks)


def test_summary_has_published_numbers_in_columns_of_their_own(cell):
    cells = {("busi", 4): cell}
    rows = list(csv.DictReader(tables.summary(cells, tables.measured(cells)).splitlines()))
    assert len(rows) == 2 * len(tables.COLUMNS)
    first = rows[0]
    assert (first["dataset"], first["k"], first["metric"]) == ("busi", "4", "image auroc")
    assert float(first["mean"]) == np.mean([r["image"]["auroc"] for r in cell["ours"]])
    context = {
        name: row for row in rows for name in row if name.startswith("context") and row[name]
    }
    assert set(context) >= {"context, published: the paper, Table 1"}
    told = {(r["metric"], r["context, published: the paper, Table 1"]) for r in rows}
    assert {x for x in told if x[1]} == {("image auroc", "0.8636")}
    tested = [r for r in rows if r["wilcoxon_p_holm"]]
    assert [(r["method"], r["metric"]) for r in tested] == [("memory", "image auroc")]
    assert float(tested[0]["wilcoxon_least_p"]) == 0.125


def test_tests_are_paired_by_draw_and_corrected(cell):
    found = tables.tests(cell)
    assert set(found) == {"memory"}
    got = found["memory"]
    assert got.wilcoxon == got.least == 0.125  # the least that four draws can reach
    pairs = list(zip(cell["ours"], cell["memory"], strict=True))
    a, b = (np.array([p[i]["image"]["auroc"] for p in pairs]) for i in (0, 1))
    assert got.t == pytest.approx(significance.paired_t(a, b).p)
    each = np.array([significance.delong(x["score"], y["score"], x["label"]).p for x, y in pairs])
    assert (got.delong, got.draws) == (int((significance.holm(each) < 0.05).sum()), 4)
    one = tables.tests({name: runs[:1] for name, runs in cell.items()})["memory"]
    assert one.t is None and one.draws == 1 and one.least == 1.0


def test_undefined_is_a_dash(cell):
    bare = [{**r, "pixel": None} for r in cell["ours"]]
    assert tables.brief(tables.numbers(bare)["pixel", "aupro"]) == "–"
    assert tables.published(("image", "auroc"), "busi", 5, "the paper, Table 1") is None


def test_parts_and_flags(monkeypatch):
    flag = "--config.clip.checkpoint=openai/clip-vit-large-patch14"
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--part", "2/3", flag])
    args = reproduce.arguments()
    assert args.part == (2, 3)
    assert args.set == ["clip.checkpoint=openai/clip-vit-large-patch14"]
    c = reproduce.fields(args, Path(reproduce.ROOT) / "configs/phantom.py", 4, "fomaml", 3)
    assert (c.method, c.learner, c.seed, c.explained) == ("ours", "fomaml", 3, 0)
    assert reproduce.fields(
        args, Path(reproduce.ROOT) / "configs/phantom.py", 4, "ours", 0
    ).explained
    assert c.clip.checkpoint == "openai/clip-vit-large-patch14"
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--part", "4/3"])
    with pytest.raises(SystemExit):
        reproduce.arguments()
