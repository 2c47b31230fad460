"""sweep.py: nothing is run twice or lost, processes share the work, variants are configs."""

import json

import filelock
import pytest
import sweep

from medclip_jax import config as config_module
from medclip_jax.data import phantom
from medclip_jax.errors import WorkdirError
from tests.support.checkpoints import tiny_checkpoint
from tests.support.workdirs import edit, make_workdir

PHANTOM = sweep.Path(sweep.__file__).parents[1] / "configs" / "phantom.py"
TABLES = [p.stem for p in sorted(PHANTOM.parents[1].glob("experiments/variants/[a-z]*.py"))]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(*flags) runs the script on made-up runs; command.runs: their names in order."""

    def train_run(c, workdir, report):
        command.runs.append(workdir.name)
        if command.stop_at == len(command.runs):
            (workdir / "checkpoints").mkdir(parents=True)
            raise KeyboardInterrupt
        make_workdir(workdir, n=20)
        edit(workdir, seed=c.seed, method=c.method)
        settings = config_module.resolve(c).to_json_best_effort()
        (workdir / "config.json").write_text(settings)

    def command(*flags, folder=tmp_path):
        fixed = [f"--out={folder}/results", f"--runs={folder}/runs", f"--config={PHANTOM}"]
        fixed += ["--k=4", "--draws=2", "--only=ours,memory", f"--set=cache={tmp_path}/cache"]
        monkeypatch.setattr("sys.argv", ["sweep.py", *fixed, *flags])
        sweep.main()
        return {p.name: p.read_bytes() for p in (folder / "results").iterdir()}

    monkeypatch.setattr(sweep.train, "run", train_run)
    command.stop_at, command.runs = None, []
    return command


NAMES = [f"phantom-k4-{variant}-{seed}" for seed in (0, 1) for variant in ("ours", "memory")]


def test_a_stopped_sweep_resumes_and_nothing_is_run_twice(command, tmp_path):
    whole = command(folder=tmp_path / "whole")
    assert command.runs == NAMES and set(whole) == {"runs.csv", "summary.csv", "tables.md"}
    command.runs.clear()
    command.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        command()
    assert command.runs == NAMES[:3] and not (tmp_path / "results").exists()
    command.stop_at = None
    assert command() == whole
    assert command.runs == NAMES[:3] + NAMES[2:]  # the third once more, the first two not
    assert command() == whole and len(command.runs) == 5
    files = {p.name for p in (tmp_path / "runs" / NAMES[0]).iterdir()}
    assert "scores.npz" in files and not files & {"predictions.npz", "checkpoints", ".scores.npz"}


def test_a_run_of_another_process_is_left_to_it(command, tmp_path):
    (tmp_path / "runs").mkdir()
    with filelock.FileLock(tmp_path / "runs" / f"{NAMES[1]}.lock"):
        command()
    assert command.runs == [NAMES[0], *NAMES[2:]]
    command()
    assert command.runs[3:] == [NAMES[1]]


def test_a_finished_run_with_other_settings_is_refused(command):
    command()
    with pytest.raises(WorkdirError, match="finished run with k = 4|model"):
        command("--set=model.dropout=0.0")


def test_a_student_waits_for_its_teacher(command, tmp_path):
    command("--variants=distillation", "--only=student")
    assert command.runs == [f"phantom-k4-{v}-{s}" for s in (0, 1) for v in ("teacher", "student")]
    stored = json.loads((tmp_path / "runs" / "phantom-k4-student-1" / "config.json").read_text())
    assert stored["teacher"] == str(tmp_path / "runs" / "phantom-k4-teacher-1")


@pytest.mark.parametrize("table", TABLES)
def test_every_variant_is_a_config_that_can_be_run(table, monkeypatch):
    flags = [
        "--runs=runs",
        "--out=out",
        f"--config={PHANTOM}",
        "--set=data.modality=breast ultrasound",
    ]
    monkeypatch.setattr("sys.argv", ["sweep.py", f"--variants={table}", *flags])
    args = sweep.arguments()
    resolved = {
        variant: config_module.resolve(
            sweep.settings(args, sweep.Job(PHANTOM, 16, variant, 0))
        ).to_json_best_effort()
        for variant in args.only
    }
    assert len(set(resolved.values())) == len(resolved)  # every variant differs
    if table == "learners":
        each = [json.loads(c) for c in resolved.values()]
        per_step = [config_module.gradients(config_module.ConfigDict(c)) * c["steps"] for c in each]
        assert set(per_step) == {400}


def test_unknown_names_are_refused(command):
    for flags in (["--variants=none"], ["--only=ours,nothing"]):
        with pytest.raises(SystemExit):
            command(*flags)


def test_two_variants_of_a_phantom_are_run_and_tabulated(tmp_path, monkeypatch):
    clip, *_ = tiny_checkpoint(tmp_path / "clip")
    data = phantom.write_folder(tmp_path / "data", "ultrasound", 0, 64, 4, 3, 4)
    fields = {"data.root": data, "cache": tmp_path / "cache", "clip.checkpoint": clip}
    fields["explanation.count"] = 0
    flags = [f"--config={PHANTOM.with_name('folder.py')}", "--k=4", "--draws=1"]
    flags += ["--variants=methods", "--only=memory,grey_level"]  # without training
    flags += [f"--runs={tmp_path}/runs", f"--out={tmp_path}/results"]
    flags += [f"--set={name}={value}" for name, value in fields.items()]
    monkeypatch.setattr("sys.argv", ["sweep.py", *flags])
    sweep.main()
    lines = (tmp_path / "results" / "runs.csv").read_text().splitlines()
    assert [line.split(",")[2] for line in lines] == ["variant", "memory", "grey_level"]
    row = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    stored = json.loads((tmp_path / "runs/folder-k4-memory-0/metrics.json").read_text())
    assert float(row["image auroc"]) == stored["image"]["auroc"]
    assert float(row["seconds score"]) > 0
