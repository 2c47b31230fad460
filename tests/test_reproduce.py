"""The reproduction's tables from made-up runs: what is averaged, tested and left out."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import reproduce  # noqa: E402

from medclip_jax import stats  # noqa: E402


def run(seed, shift, n=60):
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    score = 1 / (1 + np.exp(-(rng.normal(size=n) + shift * label)))
    image = {
        "auroc": float(stats.auroc(score[None], label)[0]),
        "auprc": 0.5,
        "sensitivity_at_90": 0.4,
    }
    made = {"seed": seed, "image": image, "pixel": None, "calibration": {"false_alarm_rate": 0.1}}
    ids = np.array([f"{i}.png" for i in range(n)])
    return {**made, "oracle": {"f1": 0.7}, "id": ids, "label": label, "score": score}


@pytest.fixture
def cell():
    return {"ours": [run(s, 2) for s in range(4)], "memory": [run(s, 0) for s in range(4)]}


def test_tables_name_methods_means_and_published_numbers(cell):
    lines = reproduce.table(Path("configs/busi.py"), 4, cell)
    text = "\n".join(lines)
    values = [r["image"]["auroc"] for r in cell["ours"]]
    assert f"| ours | 4 | {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} |" in text
    assert "oracle f1" in text and "the paper, Table 1: image AUROC 0.864" in text
    widths = {line.count("|") for line in lines if line.startswith("| ")}
    assert len(widths) == 1


def test_tests_are_paired_by_draw_and_corrected(cell):
    found = reproduce.tests(cell)
    assert set(found) == {"memory"}
    p, delong = found["memory"]
    assert p == "0.125"  # the least that four draws can reach
    each = [stats.delong(a["score"], b["score"], a["label"]).p
            for a, b in zip(cell["ours"], cell["memory"], strict=True)]  # fmt: skip
    assert delong == f"{int((stats.holm(np.array(each)) < 0.05).sum())} of 4"


def test_intervals_need_the_same_test_images(cell):
    low, high = map(float, reproduce.interval(cell["ours"]).split(" to "))
    values = [r["image"]["auroc"] for r in cell["ours"]]
    assert low < np.mean(values) < high
    cell["ours"][1]["id"] = cell["ours"][1]["id"][::-1]
    assert reproduce.interval(cell["ours"]) == "–"


def test_parts_and_flags(monkeypatch):
    flag = "--config.clip.checkpoint=openai/clip-vit-large-patch14"
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--part", "2/3", flag])
    args = reproduce.arguments()
    assert args.part == (2, 3)
    assert args.set == ["clip.checkpoint=openai/clip-vit-large-patch14"]
    c = reproduce.fields(args, Path(reproduce.ROOT) / "configs/phantom.py", 4, "fomaml", 3)
    assert (c.method, c.learner, c.seed) == ("ours", "fomaml", 3)
    assert c.clip.checkpoint == "openai/clip-vit-large-patch14"
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--part", "4/3"])
    with pytest.raises(SystemExit):
        reproduce.arguments()
