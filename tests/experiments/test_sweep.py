"""sweep.py: nothing is run twice or lost, processes share the work, variants are configs."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import archive
import filelock
import looks
import pytest
import sweep
from sklearn.metrics import roc_auc_score

from medclip_jax import config as config_module
from medclip_jax.data import phantom
from medclip_jax.errors import UserError, WorkdirError
from medclip_jax.features import encoder
from tests.support.checkpoints import tiny_checkpoint
from tests.support.workdirs import edit, make_workdir

PHANTOM = sweep.Path(sweep.__file__).parents[1] / "configs" / "phantom.py"
TABLES = [p.stem for p in sorted(PHANTOM.parents[1].glob("experiments/variants/[a-z]*.py"))]


def supports(seed):
    """Hashes of four made-up supports; draws next to each other share three."""
    return [hashlib.sha256(bytes([seed + i])).hexdigest() for i in range(4)]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(*flags) runs the script on made-up runs; command.runs: their names in order."""

    def train_run(c, workdir, report):
        command.runs.append(workdir.name)
        if command.stop_at == len(command.runs):
            (workdir / "checkpoints").mkdir(parents=True)
            raise KeyboardInterrupt
        make_workdir(workdir, n=20)
        resolved = config_module.resolve(c)
        backbone = f"compact (digest{resolved.memory_encoder})"
        edit(workdir, seed=c.seed, method=c.method, backbone=backbone)
        (workdir / "config.json").write_text(resolved.to_json_best_effort())
        split = {"support": [{"sha256": x} for x in supports(c.seed)]}
        (workdir / "split.json").write_text(json.dumps(split))

    def command(*flags, folder=tmp_path):
        fixed = [f"--out={folder}/results", f"--runs={folder}/runs", f"--config={PHANTOM}"]
        fixed += [
            "--k=4",
            "--draws=2",
            "--split=peer",
            "--only=ours,memory",
            f"--set=cache={tmp_path}/cache",
        ]
        monkeypatch.setattr("sys.argv", ["sweep.py", *fixed, *flags])
        sweep.main()
        return {p.name: p.read_bytes() for p in (folder / "results").iterdir()}

    monkeypatch.setattr(sweep.train, "run", train_run)
    command.stop_at, command.runs = None, []
    return command


NAMES = [f"phantom-k4-{variant}-{seed}" for seed in (0, 1) for variant in ("ours", "memory")]


def test_a_stopped_sweep_resumes_and_nothing_is_run_twice(command, tmp_path):
    whole = command(folder=tmp_path / "whole")
    assert command.runs == NAMES
    assert set(whole) == {"runs.csv", "runs.npz", "summary.csv", "tables.md"}
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


def test_where_nothing_is_finished_the_tables_stay_as_they_are(command, tmp_path):
    before = command()
    (tmp_path / "others").mkdir()
    with filelock.FileLock(tmp_path / "others" / f"{NAMES[0]}.lock"):
        with pytest.raises(UserError, match="no run in .*others is finished: no table is written"):
            command(f"--runs={tmp_path}/others", "--only=ours", "--draws=1")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "results").iterdir()}


def test_a_finished_run_with_other_settings_is_refused(command):
    command()
    with pytest.raises(WorkdirError, match="finished run with k = 4|model"):
        command("--set=model.dropout=0.0")


def test_archived_runs_are_not_repeated_and_make_the_same_tables(command, tmp_path):
    archived = tmp_path / "there" / "results" / "runs.npz"
    whole = command(folder=tmp_path / "there")
    command.runs.clear()
    assert command(f"--archive={archived}", folder=tmp_path / "here") == whole
    assert command.runs == []
    more = command("--draws=3", f"--archive={archived}", folder=tmp_path / "here")
    assert command.runs == [f"phantom-k4-{variant}-2" for variant in ("ours", "memory")]
    assert {*whole["runs.csv"].splitlines()} < {*more["runs.csv"].splitlines()}
    assert more == command("--draws=3", folder=tmp_path / "fresh")


def test_archived_runs_with_other_settings_are_refused(command, tmp_path):
    command(folder=tmp_path / "there")
    archived = f"--archive={tmp_path}/there/results/runs.npz"
    with pytest.raises(WorkdirError, match="finished run with model.dropout = 0.1, not 0.0"):
        command("--set=model.dropout=0.0", archived, folder=tmp_path / "here")
    assert command("--set=data.root=/elsewhere", archived, folder=tmp_path / "here")


def test_runs_of_a_clip_that_has_changed_are_not_tabulated_together(command, tmp_path):
    command("--only=ours,mediclip", folder=tmp_path / "there")  # with and without memory_encoder
    edit(tmp_path / "there" / "runs" / NAMES[0], backbone="compact (another)")
    with pytest.raises(UserError, match="the CLIP has changed between them"):
        command(folder=tmp_path / "there")


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_what_is_no_archive_is_refused_before_anything_runs(command, tmp_path, content):
    if content is not None:
        (tmp_path / "runs.npz").write_bytes(content)
    with pytest.raises(UserError, match="no file of runs"):
        command(f"--archive={tmp_path}/runs.npz")
    assert command.runs == []


def test_archived_scores_of_the_docs_give_their_numbers():
    scores = PHANTOM.parents[1] / "docs" / "scores"
    files = [archive.read(path) for path in scores.glob("*.npz")]
    assert sum(map(len, files)) >= 390
    for run in (run for runs in files for run in runs.values()):
        auroc = roc_auc_score(run["label"], run["score"])
        assert auroc == pytest.approx(run["image"]["auroc"], abs=1e-5)
        assert len(run["support"]) == run["settings"]["k"]


def test_a_student_waits_for_its_teacher(command, tmp_path):
    command("--variants=distillation", "--only=student")
    assert command.runs == [f"phantom-k4-{v}-{s}" for s in (0, 1) for v in ("teacher", "student")]
    stored = json.loads((tmp_path / "runs" / "phantom-k4-student-1" / "config.json").read_text())
    assert stored["teacher"] == str(tmp_path / "runs" / "phantom-k4-teacher-1")


def test_anomalies_of_one_draws_supports_are_forgotten_when_it_is_done(command, tmp_path):
    own, other = (encoder.supports_folder(x) for x in (supports(0), ["cd"]))
    for name in (own, other):
        (tmp_path / "cache" / "feature_cache" / "clip" / name).mkdir(parents=True)
    command.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        command()
    (folder,) = (tmp_path / "cache" / "feature_cache").iterdir()
    assert {p.name for p in folder.iterdir()} == {own, other}
    command.stop_at = None
    command()
    assert {p.name for p in folder.iterdir()} == {other}


def test_the_peers_steps_follow_from_k(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["sweep.py", "--variants=peers", f"--config={PHANTOM}", "--runs=r", "--out=o"]
    )
    args = sweep.arguments()
    for k, steps in ((4, 200), (8, 200), (16, 400), (32, 800)):
        peer, top5, short = (
            config_module.resolve(
                sweep.settings(args, sweep.Job(str(PHANTOM), k, 0, "peer", f"mediclip{x}"))
            )
            for x in ("", "-top5", "-top5-100-steps")
        )
        assert (peer.steps, top5.steps, short.steps) == (steps, steps, 100)
        assert peer.synthesis.variants == top5.synthesis.variants == 200
        assert (peer.score.top, top5.score.top, short.score.top) == (0, 0.05, 0.05)
        same = {n: x for n, x in config_module.flat(peer) if n not in ("method", "score.top")}
        assert same == {n: x for n, x in config_module.flat(top5) if n in same}


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
            sweep.settings(args, sweep.Job(str(PHANTOM), 16, 0, "peer", variant))
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


@pytest.mark.parametrize("field", ["k=8", "seed=1", "data.split=clean"])
def test_fields_that_flags_of_their_own_set_are_refused(command, field, capsys):
    """Else all "draws" would be one run, under the wrong K."""
    with pytest.raises(SystemExit):
        command(f"--set={field}")
    assert "give --k, --draws, --split" in capsys.readouterr().err and not command.runs


@pytest.mark.parametrize("words", ["k=8", "method=ours,k=8", "seed=1"])
def test_k_and_seed_of_a_config_are_refused_too(command, words, capsys):
    """Nothing came of them, and `k=8` was the name of the data set."""
    with pytest.raises(SystemExit):
        command(f"--config={PHANTOM}:{words}")
    assert "give --k, --draws, --split" in capsys.readouterr().err and not command.runs


def test_two_data_sets_of_one_name_are_refused(command, capsys):
    """The runs of the first were taken for those of the second."""
    one = f"{PHANTOM}:root=a"
    for pair in (["a/mine.py", "b/mine.py"], [one, f"{one},method=ours"]):
        with pytest.raises(SystemExit):
            command("--config", *pair)
        assert "--config has two data sets called" in capsys.readouterr().err
    command("--config", str(PHANTOM), str(PHANTOM))  # the same one twice
    assert command.runs == NAMES


def test_what_a_later_run_would_refuse_ends_the_sweep_before_the_first(command):
    with pytest.raises(UserError, match="^phantom-k0-memory-0: config.k is 0, but method memory"):
        command("--k", "4", "0")
    assert not command.runs


def test_no_draws_leave_the_tables_as_they_are(command, tmp_path):
    before = command()
    with pytest.raises(SystemExit):
        command("--draws=0")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "results").iterdir()}


def test_a_data_set_without_test_images_is_one_sentence(command, monkeypatch):
    monkeypatch.setattr(sweep.train, "run", lambda *_, **__: None)  # as it ends there
    with pytest.raises(UserError, match="^phantom-k4-ours-0: the data set has no test images"):
        command()


@pytest.mark.parametrize("field", ["score.tops=0", "steps=ten", "steps", "steps=(", "steps='a'"])
def test_a_field_or_value_that_cannot_be_is_named(command, field):
    with pytest.raises(UserError, match="give a field and its value"):
        command(f"--set={field}")


def test_the_base_is_the_first_variant_whatever_is_finished_first(command, tmp_path):
    """Draw 0 of `ours` is another process's: nothing is compared with `memory` in its place."""
    (tmp_path / "runs").mkdir()
    for seed in (0, 1):
        (tmp_path / "runs" / f"phantom-k4-ours-{seed}").mkdir()
    locks = [sweep.filelock.FileLock(f"{tmp_path}/runs/phantom-k4-ours-{n}.lock") for n in (0, 1)]
    with locks[0], locks[1]:
        alone = command()["summary.csv"].decode()
    assert ",memory,2," in alone and ",ours," not in alone
    rows = list(csv.DictReader(alone.splitlines()))
    assert {row["difference"] for row in rows} == {""}
    rows = list(csv.DictReader(command()["summary.csv"].decode().splitlines()))
    assert {row["variant"] for row in rows if row["difference"]} == {"memory"}
    assert rows[0]["variant"] == "ours"


def test_two_variants_of_a_phantom_are_run_and_tabulated(tmp_path, monkeypatch):
    clip, *_ = tiny_checkpoint(tmp_path / "clip")
    data = phantom.write_folder(tmp_path / "data", "ultrasound", 0, 64, 4, 3, 4)
    fields = {"data.root": data, "cache": tmp_path / "cache", "clip.checkpoint": clip}
    fields["explained"] = 0
    flags = [f"--config={PHANTOM.with_name('folder.py')}", "--k=4", "--draws=1", "--split=peer"]
    flags += ["--variants=methods", "--only=memory,grey_level"]  # without training
    flags += [f"--runs={tmp_path}/runs", f"--out={tmp_path}/results"]
    flags += [f"--set={name}={value}" for name, value in fields.items()]
    monkeypatch.setattr("sys.argv", ["sweep.py", *flags])
    sweep.main()
    lines = (tmp_path / "results" / "runs.csv").read_text().splitlines()
    assert [line.split(",")[3] for line in lines] == ["variant", "memory", "grey_level"]
    row = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    stored = json.loads((tmp_path / "runs/folder-k4-memory-0/metrics.json").read_text())
    assert float(row["image auroc"]) == stored["image"]["auroc"]
    assert float(row["seconds score"]) > 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed")
def test_a_table_on_ray_is_that_of_one_process_and_resumes(tmp_path):
    clip, *_ = tiny_checkpoint(tmp_path / "clip")
    data = phantom.write_folder(tmp_path / "data", "ultrasound", 0, 64, 4, 3, 4)
    fields = {"data.root": data, "clip.checkpoint": clip, "explained": 0, "cache": tmp_path / "c"}
    flags = [f"--config={PHANTOM.with_name('folder.py')}", "--k=4", "--draws=2", "--split=peer"]
    flags += ["--only=memory,grey_level", *(f"--set={n}={value}" for n, value in fields.items())]

    def table(name, *more):
        where = [f"--runs={tmp_path}/{name}", f"--out={tmp_path}/{name}-tables"]
        command = [sys.executable, sweep.__file__, *flags, *where, *more]
        env = os.environ | {"PYTHONPATH": str(PHANTOM.parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=env)
        assert done.returncode == 0 and "4 of 4 runs are finished" in done.stderr, done.stderr
        rows = list(csv.DictReader((tmp_path / f"{name}-tables/runs.csv").read_text().splitlines()))
        assert len(rows) == 4
        return [{n: x for n, x in row.items() if not n.startswith("seconds")} for row in rows]

    whole = table("one")
    assert table("ray", "--engine=ray", "--ray.workers=2") == whole
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("ray/*/scores.npz")}
    (path := next(iter(before))).unlink()
    assert table("ray", "--engine=ray") == whole
    assert [p for p in before if p.stat().st_mtime_ns != before[p]] == [path]


def test_both_splits_are_run_the_headline_first(command):
    command("--split", "clean", "peer", "--draws=1", "--only=memory")
    assert command.runs == ["phantom-clean-k4-memory-0", "phantom-k4-memory-0"]


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Where frozen.json and looks.csv are written to."""
    monkeypatch.setattr(looks, "FROZEN", tmp_path / "frozen.json")
    monkeypatch.setattr(looks, "LOOKS", tmp_path / "looks.csv")
    monkeypatch.setattr(looks, "commit", lambda: "abc")
    return tmp_path


def test_report_sets_are_scored_as_frozen_and_every_look_is_a_line(command, pages):
    """A change of any field, of a variant or of a set's words is refused, and runs nothing."""
    report = f"--config={PHANTOM.with_name('sets.py')}:mammo_mias"
    with pytest.raises(UserError, match="mammo_mias: a report set .* add --report"):
        command(report)
    with pytest.raises(UserError, match="freeze the configuration first"):
        command(report, "--report")
    with pytest.raises(SystemExit):
        command(report, "--freeze")
    assert not command.runs and not looks.LOOKS.exists()
    command(report, "--report", "--only=memory")
    assert command.runs == [f"mammo_mias-k4-memory-{seed}" for seed in (0, 1)]
    day, commit, name, sets = looks.LOOKS.read_text().splitlines()[1].split(",")
    assert (commit, sets) == ("abc", "mammo_mias") and len(day) == 10
    assert name == json.loads(looks.FROZEN.read_text())["hash"]
    elsewhere = "--set=data.root=/elsewhere"  # changes no score
    command(report, "--report", "--only=memory", elsewhere, folder=pages / "again")
    assert len(looks.LOOKS.read_text().splitlines()) == 3
    refused = {
        "--set=score.top=0.1": "fields: score.top is 0.1, not 0.05",
        "--only=zero_shot": "zero_shot is not among the frozen variants",
        f"{report.replace('mammo_mias', 'spine_xr')}": "spine_xr is not among the frozen sets",
        "--set=data.anatomy=chest": "sets: mammo_mias is",
    }
    for flag, words in refused.items():
        with pytest.raises(UserError, match=f"takes the configuration frozen .*{words}"):
            command(report, "--report", flag)
    edited = json.loads(looks.FROZEN.read_text())
    edited["config"]["fields"]["score.top"] = 0.1
    looks.FROZEN.write_text(json.dumps(edited))
    with pytest.raises(UserError, match="was edited"):
        command(report, "--report", "--set=score.top=0.1")
    assert len(looks.LOOKS.read_text().splitlines()) == 3 and len(command.runs) == 4


def test_a_report_set_under_another_name_is_known_by_its_folder(command):
    with pytest.raises(UserError, match="a report set"):
        command(f"--config={PHANTOM.with_name('folder.py')}", "--set=data.root=/d/sets/blood_rbc")


def test_a_development_set_needs_no_report(command):
    command(f"--config={PHANTOM.with_name('sets.py')}:oct_mx", "--only=memory")
    assert command.runs == [f"oct_mx-k4-memory-{seed}" for seed in (0, 1)]
