"""Scripts end at a user's mistake as the program does: one sentence, exit code 2."""

import re
import sys
from pathlib import Path

import benchmark
import command
import pretrain_compact_clip
import pytest
from bench import stages

from medclip_jax.errors import UserError
from tests.support.paths import ROOT

SCRIPTS = [
    path for path in (ROOT / "experiments").glob("*.py") if "import argparse" in path.read_text()
]


@pytest.mark.parametrize(
    "error, said",
    [
        (UserError("give another"), "give another"),
        (SystemExit("run it first"), "run it first"),  # by itself Python ends with code 1 here
        (NotADirectoryError(20, "Not a directory", "runs/a"), "[Errno 20] Not a directory: 'runs"),
    ],
)
def test_what_a_user_can_correct_is_one_sentence(error, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        command.run(main)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.parametrize("code", [None, 0, 1, 2])
def test_other_codes_stay(code, capsys):
    for main in (lambda: code, lambda: sys.exit(code)):
        with pytest.raises(SystemExit) as ended:
            command.run(main)
        assert ended.value.code == code and not capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: 1 // 0)


def test_every_script_with_flags_ends_so():
    assert len(SCRIPTS) > 6
    for path in SCRIPTS:
        if path.stem != "command":
            assert path.read_text().endswith("    command.run(main)\n"), path.name


def test_counts_are_one_or_more():
    assert command.count("12") == 12
    for text in ("0", "-1", "1.5", "", "x"):
        with pytest.raises(command.argparse.ArgumentTypeError, match="whole number of 1 or more"):
            command.count(text)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("maml --times 0", "--times: '0': give a whole number of 1 or more"),
        ("encoder --batch 8 -1", "--batch: '-1': give a whole number of 1 or more"),
        ("table --tflops nan", "--tflops: 'nan': give a number above 0"),
        ("large --python x --dtype int4", "--dtype: invalid choice: 'int4'"),
        ("large --python false --size DINOv2-g/14@224", "--python false: it needs PyTorch and"),
        (
            "predict --kinds png --images 2 --few 1 --workdir /none",
            "predict ended with code 2: see",
        ),
    ],
)
def test_a_benchmark_that_cannot_be_run_is_a_sentence(flags, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        command.run(benchmark.main)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--stage=views"], "--data is needed"),
        (["--judge=clip"], "--data is needed"),
        (["--stage=train", "--data={}"], "captions.csv"),  # which is not there
    ],
)
def test_pre_training_without_its_data(flags, said, tmp_path, monkeypatch, capsys):
    own = [flag.format(tmp_path) for flag in flags]
    monkeypatch.setattr("sys.argv", ["x", f"--run={tmp_path}", *own])
    with pytest.raises(SystemExit) as ended:
        command.run(pretrain_compact_clip.main)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_stages_of_pre_training_of_empty_folders(tmp_path, monkeypatch, capsys):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "captions.csv").touch()
    for stage, said in (("train", "views: no finished shard"), ("leaks", "no image there")):
        monkeypatch.setattr(
            "sys.argv", f"x --run={tmp_path} --data={tmp_path} --stage={stage}".split()
        )
        with pytest.raises(SystemExit) as ended:
            command.run(pretrain_compact_clip.main)
        assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("weight", ["similarity=x", "similarity", "none=1"])
def test_a_weight_of_no_part_or_no_number(weight):
    with pytest.raises(SystemExit, match=re.escape(f"--weight {weight}: give PART=NUMBER")):
        pretrain_compact_clip.weights_of([weight])
    assert pretrain_compact_clip.weights_of(["similarity=0.5"]).similarity == 0.5


def test_a_job_that_is_refused_says_why(tmp_path, monkeypatch, capsys):
    """Its reason was thrown away, and a traceback said that a command had failed."""
    monkeypatch.setattr(stages.sys, "executable", str(tmp_path / "python"))
    Path(tmp_path / "python").write_text("#!/bin/sh\necho 'error: no such set' >&2\nexit 2\n")
    Path(tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.argv", ["x", "stages", "--jobs", "cold"])
    with pytest.raises(SystemExit) as ended:
        command.run(benchmark.main)
    assert ended.value.code == 2
    assert "the job ended with code 2: error: no such set" in capsys.readouterr().err
