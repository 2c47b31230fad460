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
    (variant, d), *others = differences(cell).items()
    assert variant == "memory" and not others
    pairs = list(zip(cell["memory"], cell["ours"], strict=True))
    a, b = (np.array([p[i]["image"]["auroc"] for p in pairs]) for i in (0, 1))
    assert d.mean == pytest.approx((a - b).mean()) and d.low < d.mean < d.high < 0
    assert d.wilcoxon_p == d.least_p == 0.125  # the least that four draws can reach
    assert d.t_p == pytest.approx(significance.paired_t(a, b).p)
    each = [significance.delong(x["score"], y["score"], x["label"]).p for x, y in pairs]
    assert (d.delong, d.draws) == (int((significance.holm(np.array(each)) < 0.05).sum()), 4)
    assert d.delong_p == np.median(each)
    # only draws that both have are compared
    fewer = differences({"ours": cell["ours"][1:3], "memory": cell["memory"]})["memory"]
    assert fewer.draws == 2 and fewer.mean == pytest.approx((a - b)[1:3].mean())


@pytest.mark.parametrize("rows", [np.arange(59), np.roll(np.arange(60), 2)], ids=["cut", "moved"])
def test_variants_of_other_test_images_are_not_compared(cell, rows):
    """As where an image was added between two sweeps: scores would be paired by their place."""
    other = [r | {name: r[name][rows] for name in ("id", "label", "score")} for r in cell["ours"]]
    with pytest.raises(DataError, match="tested on different data"):
        differences({"ours": other, "memory": cell["memory"]})


def differences(cell):
    place = "busi", "clean", 4
    return tables.differences({place: cell}, next(iter(cell)))[place]


def test_holm_counts_sets_ks_and_methods_of_a_split(cell):
    alone = differences(cell)["memory"]
    places = [(name, "clean", k) for name in ("busi", "brain_mri") for k in (4, 16)]
    cells = {place: {**cell, "same": cell["memory"]} for place in places}
    summaries = tables.summarise({**cells, ("busi", "peer", 4): cell}, "ours")
    for place in places:
        for d in summaries[place].differences.values():
            assert d.p == pytest.approx(min(1, 8 * alone.p))
            assert d.wilcoxon_p == d.least_p == 8 * 0.125
    assert summaries["busi", "peer", 4].differences["memory"] == alone


def test_p_holds_the_variance_of_test_images(cell):
    """One draw: the two-level test is DeLong's up to the bootstrap; Wilcoxon can say nothing."""
    one = {"ours": cell["ours"][:1], "memory": cell["memory"][:1]}
    d = differences(one)["memory"]
    a, b = one["memory"][0], one["ours"][0]
    delong = significance.delong(a["score"], b["score"], a["label"])
    assert (d.low, d.high) == pytest.approx((delong.low, delong.high), abs=0.05)
    assert np.log(d.p) == pytest.approx(np.log(delong.p), rel=0.35)
    assert d.t_p == d.wilcoxon_p == d.least_p == 1


def test_copies_are_one_unit(cell):
    """Every image four times: intervals and p are those of the images once."""
    four = {}
    for variant, runs in cell.items():
        four[variant] = [
            {
                **r,
                "id": np.array([f"{i}-{n}" for n in range(4) for i in r["id"]]),
                "label": np.tile(r["label"], 4),
                "score": np.tile(r["score"], 4),
                "unit": np.tile(np.arange(60), 4),
                "pixel_counts": lambda r=r: np.tile(r["pixel_counts"](), (4, 1, 1)),
            }
            for r in runs
        ]
    once, grouped = tables.intervals(cell["ours"]), tables.intervals(four["ours"])
    for name in ("image auroc", "pixel dice"):
        assert grouped[name] == pytest.approx(once[name], abs=1e-9)
    one = {name: x for name, x in four["ours"][0].items() if name != "unit"}
    alone, once = tables.intervals([one]), tables.intervals(cell["ours"][:1])
    for name in ("image auroc", "pixel dice"):  # as if there were four times as many images
        assert np.ptp(alone[name]) == pytest.approx(np.ptp(once[name]) / 2, rel=0.25)
    assert differences(four)["memory"].p == pytest.approx(differences(cell)["memory"].p)
    assert tables.duplicates(four["ours"]) == (240, 180) and tables.duplicates(cell["ours"]) is None


def test_draws_say_what_they_share(cell):
    supports = (["a", "b", "c", "d"], ["a", "b", "e", "f"], ["a", "x", "y", "z"])
    runs = [{**r, "support": s} for r, s in zip(cell["ours"], supports, strict=False)]
    assert tables.overlap(runs) == pytest.approx((2 + 1 + 1) / 4 / 3)
    assert tables.overlap(runs[:1]) is None is tables.overlap(cell["ours"])
    assert "share 33% of their supports" in tables.known_of({"ours": runs})


def test_a_constant_gain_has_an_interval_without_width(cell):
    """Scores that move together: what images and draws have in common leaves the difference."""
    same = differences({"ours": cell["ours"], "copy": cell["ours"]})["copy"]
    assert (same.mean, same.low, same.high, same.p, same.delong) == (0, 0, 0, 1, 0)
    assert same.wilcoxon_p == 1


def test_one_healthy_image_is_too_few_for_tests_but_not_for_tables(cell):
    """DeLong's test and the two-level interval need two images of a class."""
    first = int(np.flatnonzero(cell["ours"][0]["label"] == 0)[0])
    few = {
        variant: [
            {**r, **{n: r[n][(r["label"] == 1) | (np.arange(60) == first)] for n in (
                "id", "label", "score")}, "pixel_counts": lambda: None} for r in runs
        ] for variant, runs in cell.items()
    }  # fmt: skip
    d = differences(few)["memory"]
    assert (d.low, d.high, d.p, d.delong, d.delong_p) == (None, None, 1, 0, 1)
    assert tables.numbers(few["ours"])["image auroc"].low is None


def test_without_the_base_nothing_is_compared(cell):
    place = "busi", "clean", 4
    assert tables.differences({place: {"memory": cell["memory"]}}, "ours") == {place: {}}


def test_files_name_variants_and_published_numbers(cell):
    few = {"ours": cell["ours"][:2]}
    cells = {("busi", "peer", 4): cell, ("busi", "peer", 8): few, ("busi", "clean", 4): few}
    summaries = tables.summarise(cells, "ours")
    rows = list(csv.DictReader(tables.summary_csv(cells, summaries).decode().splitlines()))
    assert len(rows) == 4 * len(tables.METRICS)
    first = rows[0]
    assert (first["dataset"], first["k"], first["variant"]) == ("busi", "4", "ours")
    assert float(first["mean"]) == np.mean([r["image"]["auroc"] for r in cell["ours"]])
    paper = "context, published: the paper, Table 1"
    assert {(r["metric"], r["split"], r["k"], r[paper]) for r in rows if r[paper]} == {
        ("image auroc", "peer", "4", "0.8636"),
        ("image auroc", "peer", "8", "0.8701"),
    }
    tested = [(r["variant"], r["metric"]) for r in rows if r["difference"]]
    assert tested == [("memory", "image auroc")]
    runs = list(csv.DictReader(tables.runs_csv(cells).decode().splitlines()))
    assert len(runs) == 12 and runs[1]["seed"] == "1" and runs[1]["pixel auroc"] == "0.81"
    assert runs[0]["gradients"] == runs[0]["pixel aupro"] == ""
    text = tables.markdown(cells, summaries).decode()
    shown = tables.brief(summaries["busi", "peer", 4].numbers["ours"]["image auroc"])
    assert f"| {shown} |" in text and f"| ours | 4 | {shown} |" in text
    assert "| variant | clean, K = 4 | peer, K = 4 | peer, K = 8 |" in text
    assert "| *published:* the paper, Table 1 |  | 0.864 | 0.870 |" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 5
    assert all(len({line.count("|") for line in block}) == 1 for block in blocks)
