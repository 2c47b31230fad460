"""Tables of made-up runs: what is averaged, tested, published and left out."""

import csv

import numpy as np
import pytest
import tables

from medclip_jax.errors import DataError
from medclip_jax.evaluation import bootstrap, metrics, significance
from medclip_jax.evaluation.pixel_metrics import PixelMetrics


def run(variant, seed, shift, n=60):
    """As sweep.read returns it."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    score = 1 / (1 + np.exp(-(rng.normal(size=n) + shift * label)))
    masks = np.zeros((n, 8, 8), bool)
    masks[label == 1, 2:5, 2:5] = True
    maps = np.clip(rng.normal(0.4 + 0.05 * shift * masks, 0.1), 0, 0.99).astype(np.float32)
    image = metrics.image_level(score, label)
    measured = PixelMetrics()
    counts = np.stack([measured.add(*pair) for pair in zip(maps, masks, strict=True)])
    return {
        "seed": seed,
        "image": {**image, "sensitivity_at_90": metrics.sensitivity_at(score, label, 0.9)},
        "pixel": {"auroc": 0.8 + 0.01 * seed, "auprc": 0.5, "aupro": None, "dice": 0.25},
        "calibration": {"false_alarm_rate": image["fpr"], "alpha_attained": 0.2},
        "oracle": {"f1": 0.7},
        "id": np.array([f"{i}.png" for i in range(n)]),
        "label": label,
        "score": score,
        "pixel_counts": lambda: counts,
    }


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(bootstrap, "ROUNDS", 300)


@pytest.fixture(scope="module")
def cell():
    shifts = {"ours": 2, "memory": 0}
    return {v: [run(v, s, x) for s in range(4)] for v, x in shifts.items()}


def test_numbers_are_means_with_two_level_limits(cell):
    numbers = tables.numbers(cell["ours"])
    values = [r["image"]["auroc"] for r in cell["ours"]]
    auroc = numbers["image auroc"]
    assert auroc.mean == pytest.approx(np.mean(values))
    assert auroc.sd == pytest.approx(np.std(values, ddof=1))
    assert numbers["pixel auroc"][:2] == pytest.approx(
        (0.815, np.std([0, 0.01, 0.02, 0.03], ddof=1))
    )
    assert tables.brief(numbers["pixel aupro"]) == "–"  # undefined
    assert numbers["gradients"].mean is None  # was not measured
    assert numbers["oracle f1"].low is None  # has no bootstrap
    assert auroc.low < auroc.mean < auroc.high


def test_draws_may_be_tested_on_different_images(cell):
    """As where the pool of healthy images is sampled anew: each draw leaves out others."""
    parts = []
    for number, one in enumerate(cell["ours"]):
        rest = np.setdiff1d(np.arange(60), np.arange(4 * number, 4 * number + 8))
        rest = np.random.default_rng(number).permutation(rest)
        counts = one["pixel_counts"]()[rest]
        part = {name: one[name][rest] for name in ("id", "label", "score")}
        parts.append({**one, **part, "pixel_counts": lambda counts=counts: counts})
    limits, whole = tables.intervals(parts), tables.intervals(cell["ours"])
    assert set(limits) == set(whole)
    for name in ("image auroc", "pixel dice"):
        assert limits[name] == pytest.approx(whole[name], abs=0.05) and limits[name] != whole[name]
    other = {**cell["ours"][1], "label": 1 - cell["ours"][1]["label"]}
    with pytest.raises(DataError, match="differs between draws"):
        tables.intervals([cell["ours"][0], other])


def test_differences_are_paired_by_draw_and_corrected(cell):
    (variant, d), *others = tables.differences(cell).items()
    assert variant == "memory" and not others
    pairs = list(zip(cell["memory"], cell["ours"], strict=True))
    a, b = (np.array([p[i]["image"]["auroc"] for p in pairs]) for i in (0, 1))
    assert d.mean == pytest.approx((a - b).mean()) and d.low < d.mean < d.high < 0
    assert d.p == d.least_p == 0.125  # the least that four draws can reach
    assert d.t_p == pytest.approx(significance.paired_t(a, b).p)
    each = [significance.delong(x["score"], y["score"], x["label"]).p for x, y in pairs]
    assert (d.delong, d.draws) == (int((significance.holm(np.array(each)) < 0.05).sum()), 4)
    # only draws that both have are compared
    fewer = tables.differences({"ours": cell["ours"][1:3], "memory": cell["memory"]})["memory"]
    assert fewer.draws == 2 and fewer.mean == pytest.approx((a - b)[1:3].mean())
    three = tables.differences({**cell, "same": cell["memory"]})
    assert three["memory"].p == three["same"].p == 0.25  # Holm over two tests


def test_a_constant_gain_has_an_interval_without_width(cell):
    """Scores that move together: what images and draws have in common leaves the difference."""
    same = tables.differences({"ours": cell["ours"], "copy": cell["ours"]})["copy"]
    assert (same.mean, same.low, same.high, same.p, same.delong) == (0, 0, 0, 1, 0)


def test_files_name_variants_and_published_numbers(cell):
    cells = {("busi", 4): cell, ("busi", 8): {"ours": cell["ours"][:2]}}
    summaries = {place: tables.summarise(c) for place, c in cells.items()}
    rows = list(csv.DictReader(tables.summary_csv(cells, summaries).decode().splitlines()))
    assert len(rows) == 3 * len(tables.METRICS)
    first = rows[0]
    assert (first["dataset"], first["k"], first["variant"]) == ("busi", "4", "ours")
    assert float(first["mean"]) == np.mean([r["image"]["auroc"] for r in cell["ours"]])
    paper = "context, published: the paper, Table 1"
    assert {(r["metric"], r["k"], r[paper]) for r in rows if r[paper]} == {
        ("image auroc", "4", "0.8636"),
        ("image auroc", "8", "0.8701"),
    }
    tested = [(r["variant"], r["metric"]) for r in rows if r["difference"]]
    assert tested == [("memory", "image auroc")]
    runs = list(csv.DictReader(tables.runs_csv(cells).decode().splitlines()))
    assert len(runs) == 10 and runs[1]["seed"] == "1" and runs[1]["pixel auroc"] == "0.81"
    assert runs[0]["gradients"] == runs[0]["pixel aupro"] == ""
    text = tables.markdown(cells, summaries).decode()
    shown = tables.brief(summaries["busi", 4].numbers["ours"]["image auroc"])
    assert f"| ours | {shown} |" in text and f"| ours | 4 | {shown} |" in text
    assert "| *published:* the paper, Table 1 | 0.864 | 0.870 |" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 4
    assert all(len({line.count("|") for line in block}) == 1 for block in blocks)
