"""reproduce.py stopped in the middle, and shared by processes: nothing twice, nothing lost."""

import json
import sys

import pytest
import reproduce

from tests.support.workdirs import edit, make_workdir

PHANTOM = reproduce.ROOT / "configs" / "phantom.py"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(folder, *flags) runs the script on made-up runs; made: their names in order."""
    made = []

    def run(c, workdir, pictures):
        made.append(workdir.name)
        if command.stop_at == len(made):
            (workdir / "checkpoints").mkdir(parents=True)
            raise KeyboardInterrupt
        make_workdir(workdir, n=20, shown=2)
        edit(workdir, seed=c.seed, method=c.method)

    def command(folder, *flags):
        fixed = [f"--out={folder}/results", f"--runs={folder}/runs", f"--config={PHANTOM}"]
        fixed += ["--k=4", "--draws=2", "--methods=ours,memory", f"--set=cache={tmp_path}/cache"]
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *fixed, *flags])
        reproduce.main()
        kept = sorted(p for p in (folder / "results").rglob("*") if p.is_file())
        return {str(p.relative_to(folder)): p.read_bytes() for p in kept}

    monkeypatch.setattr(reproduce.train, "run", run)
    command.stop_at, command.made = None, made
    return command


def test_a_stopped_command_goes_on_where_it_stood(command, tmp_path):
    whole = command(tmp_path / "whole")
    names = [f"phantom-k4-{m}-{s}" for s in (0, 1) for m in ("ours", "memory")]
    assert command.made == names
    assert {"results/runs.csv", "results/summary.csv", "results/tables.md"} <= set(whole)
    assert {"results/figures/phantom-maps.png", "results/figures/phantom-k4-training.png"} <= set(
        whole
    )
    command.made.clear()
    command.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path / "cut")
    assert command.made == names[:3] and not (tmp_path / "cut" / "results").exists()
    command.stop_at = None
    assert command(tmp_path / "cut") == whole
    assert command.made == names[:3] + names[2:]  # the third again, the first two not
    assert command(tmp_path / "cut") == whole and len(command.made) == 5
    left = {p.name for p in (tmp_path / "cut" / "runs" / names[0]).iterdir()}
    assert "scores.npz" in left and not left & {"predictions.npz", "checkpoints", ".scores.npz"}


def test_two_parts_are_the_whole(command, tmp_path):
    whole = command(tmp_path / "whole")
    command.made.clear()
    first = command(tmp_path / "shared", "--part=1/2")
    assert first != whole and len(command.made) == 2
    assert command(tmp_path / "shared", "--part=2/2") == whole
    assert len(command.made) == len(set(command.made)) == 4


def test_a_run_without_masks_keeps_its_line(command, tmp_path):
    command(tmp_path)
    for name in ("phantom-k4-ours-0", "phantom-k4-ours-1"):
        path = tmp_path / "runs" / name / "metrics.json"
        held = json.loads(path.read_text())
        path.write_text(json.dumps({**held, "pixel": None}))
    text = command(tmp_path)["results/tables.md"].decode()
    row = next(line for line in text.splitlines() if line.startswith("| ours | 2 |"))
    assert row.count("–") == 4  # the four pixel columns
