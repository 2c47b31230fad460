"""The ablations: one switch at a time from both ends, resumed, and the table with its tests."""

import csv
import json
import sys

import ablations
import numpy as np
import pytest
import scipy.stats as st

from medclip_jax import config as config_module
from tests.support.paths import ROOT


@pytest.fixture
def runs(monkeypatch):
    """switched.run stands aside: it keeps the settings and gives an AUROC that depends on them."""
    kept = []

    def run(ground, config):
        kept.append(config_module.resolve(config))
        auroc = 0.8 + 0.01 * config.seed + 0.05 * (config.score.tiles > 1)
        auroc += (0.02 + 0.004 * config.seed) * (config.loss.dice > 0)
        return {"image": {"auroc": auroc, "auprc": 0.5}, "pixel": None, "number": len(kept) - 1}

    monkeypatch.setattr(ablations.switched, "run", run)
    return kept


def settings(out, runs):
    """The settings of every run by the folder of its file, such as full/without_tiles."""
    found = sorted((out / "phantom").rglob("*.json"))
    return {
        str(path.parent.relative_to(out / "phantom")): runs[json.loads(path.read_text())["number"]]
        for path in found
    }


def analyse(monkeypatch, out, *more):
    config = str(ROOT / "configs" / "phantom.py")
    arguments = ["ablations", "--config", config, "--k", "4", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    ablations.main()


def table(out):
    lines = (out / "table.md").read_text().splitlines()[2:]
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    return {(r[2], r[3]): r[4:] for r in rows}


def differences(a, b) -> set[str]:
    x, y = dict(config_module.flat(a)), dict(config_module.flat(b))
    derived = {"steps"}  # follows from the learner
    return {n for n in x if x[n] != y[n]} - derived


def test_every_variant_turns_one_switch(tmp_path, monkeypatch, runs):
    analyse(monkeypatch, tmp_path, "--draws", "1", "--set", "epochs=5")
    made = settings(tmp_path, runs)
    switches = ablations.SWITCHES
    assert len(made) == 2 * (1 + len(switches)) + len(ablations.WITHIN)
    for path, c in made.items():
        side, name = path.split("/")
        base = made[f"{side}/{side}"]
        wanted: set[str] = set()
        for words in ("without_", "with_"):
            part = name.removeprefix(words).replace("_", " ")
            if part in switches:
                wanted = {a.split("=")[0] for a in switches[part].on}
            elif part in ablations.WITHIN:
                wanted = {a.split("=")[0] for a in ablations.WITHIN[part]}
        assert differences(c, base) == wanted, path
        assert c.epochs == 5 and c.k == 4 and c.method == "ours"
        assert wanted or name == side
    whole, bare = made["full/full"], made["bare/bare"]
    every = {a.split("=")[0] for s in switches.values() for a in s.on}
    assert differences(whole, bare) == every


def test_the_two_ends_are_what_they_are_called():
    for name, switch in ablations.SWITCHES.items():
        on, off = ({a.split("=")[0] for a in side} for side in switch)
        assert on == off and on, name


def test_changes_of_the_default_are_what_they_say(tmp_path, monkeypatch, runs):
    analyse(monkeypatch, tmp_path, "--draws", "1", "--sides", "default")
    made = {path.split("/")[1]: c for path, c in settings(tmp_path, runs).items()}
    assert len(made) == 1 + len(ablations.CHANGES)
    shipped = config_module.resolve(made["default"])
    for name, assignments in ablations.CHANGES.items():
        wanted = {a.split("=")[0] for a in assignments}
        found = differences(made[name.replace(" ", "_").replace(",", "")], shipped)
        assert found <= wanted, name  # fewer where the default already has it
    assert sum(not differences(c, shipped) for c in made.values()) == 1  # itself


def test_finished_runs_are_not_made_again(tmp_path, monkeypatch, runs):
    more = ["--draws", "2", "--switches", "tiles,dice loss"]
    analyse(monkeypatch, tmp_path, *more)
    assert len(runs) == 2 * 3 * 2
    first, one = (tmp_path / "table.md").read_text(), next((tmp_path / "phantom").rglob("k4-1*"))
    one.unlink()
    runs.clear()
    analyse(monkeypatch, tmp_path, *more)
    assert [c.seed for c in runs] == [1] and (tmp_path / "table.md").read_text() == first
    assert one.is_file()


def test_the_table_pairs_draws_and_corrects(tmp_path, monkeypatch, runs):
    analyse(monkeypatch, tmp_path, "--draws", "3", "--switches", "tiles,dice loss,dropout")
    rows = table(tmp_path)
    assert rows["full", "full"][0] == "3" and rows["full", "full"][4:] == [""] * 5
    assert rows["bare", "bare"][1] == "0.810"
    assert rows["bare", "with tiles"][4] == rows["bare", "with tiles"][5].split()[0] == "+0.050"
    assert rows["full", "without tiles"][4] == "-0.050"
    found = rows["bare", "with dice loss"]
    steps = np.array([0.02, 0.024, 0.028])
    half = st.t.ppf(0.975, 2) * steps.std(ddof=1) / np.sqrt(3)
    assert found[4] == "+0.024" and found[5] == f"{0.024 - half:+.3f} to {0.024 + half:+.3f}"
    p = st.ttest_1samp(steps, 0).pvalue
    assert found[6] == f"{p:.3f}" and found[7] == "0.250"
    assert float(found[8]) >= 2 * float(found[6]) - 0.001  # at least two tests
    assert rows["bare", "with dropout"][4] == "+0.000" and rows["bare", "with dropout"][6] == "nan"
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 2 * 4 and lines[0]["side"] == "full"


@pytest.mark.parametrize(
    "more, said",
    [
        (["--switches", "tiles,size"], "no size: choose among all, fusion"),
        (["--sides", "half"], "no half: choose among full, bare, default"),
        (["--k", "1"], "give 2 or more"),
    ],
)
def test_what_is_unknown_is_refused(tmp_path, monkeypatch, capsys, more, said):
    with pytest.raises(SystemExit):
        analyse(monkeypatch, tmp_path, *more)
    assert said in capsys.readouterr().err
