"""The analysis of prompt design: what varies, what is run again, and the table it ends in."""

import csv
import json
import sys

import compare
import numpy as np
import prompt_design
import pytest
import scipy.stats as st

from medclip_jax import config as config_module
from tests.support.paths import ROOT


@pytest.fixture
def runs(monkeypatch):
    """train.run stands aside: it keeps the settings and writes an AUROC that depends on them."""
    kept = {}

    def run(config, workdir):
        config_module.resolve(config)
        kept[workdir] = config
        workdir.mkdir(parents=True)
        auroc = 0.8 + 0.01 * config.seed + 0.02 * (config.prompts.phrases == "ontology") ** 2
        auroc += 0.004 * config.seed * config.prompts.shared
        result = {"image": {"auroc": auroc, "auprc": 0.5}, "pixel": None, "calibration": None}
        (workdir / "metrics.json").write_text(json.dumps(result))
        (workdir / "predictions.npz").touch()

    monkeypatch.setattr(compare.train, "run", run)
    return kept


def analyse(monkeypatch, out, *more):
    config = str(ROOT / "configs" / "phantom.py")
    arguments = ["prompt_design", "--config", config, "--k", "4", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    prompt_design.main()


def test_each_variant_changes_one_field_of_the_base(tmp_path, monkeypatch, runs):
    analyse(monkeypatch, tmp_path, "--draws", "1", "--set", "epochs=5")
    changes = []
    for c in runs.values():
        assert c.epochs == 5 and c.k == 4 and c.method == "ours"
        changed = {n: v for n, v in c.prompts.items() if v != config_module.PROMPTS[n]}
        assert len(changed) <= 1
        changes.append(tuple(changed.items()))
    assert len(set(changes)) == len(changes) == 9
    wanted = {("phrases", "words"), ("phrases", "ontology"), ("context", 4), ("context", 16)}
    wanted |= {("shared", True), ("position", "front"), ("position", "middle")}
    wanted |= {("init", "a photo of a")}
    assert {c for (c,) in filter(None, changes)} == wanted


def test_finished_runs_are_not_made_again(tmp_path, monkeypatch, runs):
    analyse(monkeypatch, tmp_path, "--draws", "2", "--factors", "phrases")
    assert len(runs) == 6
    first = (tmp_path / "table.md").read_text()
    one, *_ = runs
    (one / "metrics.json").unlink()
    (one / "predictions.npz").unlink(missing_ok=True)
    one.rmdir()
    runs.clear()
    analyse(monkeypatch, tmp_path, "--draws", "2", "--factors", "phrases")
    assert list(runs) == [one] and (tmp_path / "table.md").read_text() == first


def test_the_table_pairs_draws_with_the_base(tmp_path, monkeypatch, runs):
    analyse(monkeypatch, tmp_path, "--draws", "3", "--factors", "phrases,sharing")
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = {c[3].strip(): [x.strip() for x in c] for c in (x.strip("|").split("|") for x in lines)}
    half = st.t.ppf(0.975, 2) * 0.01 / np.sqrt(3)
    assert rows[prompt_design.BASE][4:] == [
        *("3", "0.810", f"{0.81 - half:.3f} to {0.81 + half:.3f}", "", "")
    ]
    assert rows["templates + ontology"][5] == "0.830"
    assert rows["templates + ontology"][7:] == ["+0.020", "+0.020 to +0.020"]
    half = st.t.ppf(0.975, 2) * 0.004 / np.sqrt(3)
    assert rows["one shared context"][7:] == [
        *("+0.004", f"{0.004 - half:+.3f} to {0.004 + half:+.3f}")
    ]
    with (tmp_path / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 12 and table[0]["data"] == "phantom"
    assert float(table[2]["image auroc"]) == pytest.approx(0.82)


def test_an_unknown_factor_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        analyse(monkeypatch, tmp_path, "--factors", "phrases,length")
    assert "no factor length: choose among phrases" in capsys.readouterr().err
