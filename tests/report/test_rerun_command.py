"""The command of the report makes the same settings again."""

import json
import shlex
import subprocess

import pytest

from medclip_jax import config, main
from medclip_jax.data.catalog import PRESETS
from medclip_jax.report import rerun_command


def resolved(flags: list[str]) -> dict:
    return json.loads(config.resolve(main.parse(flags).config).to_json_best_effort())


@pytest.mark.parametrize(
    "named, more",
    [
        ("busi:k=4", ()),
        ("phantom:k=4,seed=3", ("epochs=20", "data.name=phantom-mri")),
        ("phantom:k=4", ("steps=7", "batch=3", "validations=0")),
        ("brain_mri:k=8,method=mediclip", ("calibration.alpha=0.05",)),
        ("busi:k=4,method=paper", ("meta.inner_steps=2",)),
        ("chest_xray:k=0", ()),  # becomes zero_shot
        ("busi:k=8,method=joint", ("learner=maml", "fusion.branches=('learned',)")),
        ("folder:k=8,root=/data/my own", ("data.modality=brain MRI", "data.conditions=('a b',)")),
        ("busi:k=4", ("learner=anil", "meta.shots=3", "meta.data=('brain_mri',)")),
    ],
)
def test_the_command_gives_the_same_settings(named, more, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # configs are taken from the package
    asked = ["main", "--config", named, "--workdir=w", *(f"--config.{field}" for field in more)]
    held = resolved([*asked, "--config.cache=/elsewhere"])
    said = shlex.split(rerun_command.again(held))
    assert said[:3] == ["python", "-m", "medclip_jax.main"]
    assert resolved([*said[2:], "--config.cache=/elsewhere"]) == held


def test_the_command_names_only_what_differs():
    c = config.base("k=4", name="busi", **PRESETS["busi"])
    c.epochs = 20
    held = json.loads(config.resolve(c).to_json_best_effort())
    # steps follow from epochs, and where the cache lies is no setting of the run
    wanted = "python -m medclip_jax.main --config busi:k=4,seed=0,method=ours --workdir DIR "
    assert rerun_command.again({**held, "cache": "/x"}) == wanted + "--config.epochs=20"
    assert rerun_command.again({**held, "later": 1, "epochs": 0, "steps": 100}) == wanted.strip()


def test_tuples_stand_in_double_quotes_and_nothing_is_expanded():
    c = config.base("k=4", name="folder")
    c.fusion.branches, c.data.anatomy = ("learned",), "a $HOME's `x`"
    said = rerun_command.again(json.loads(config.resolve(c).to_json_best_effort()))
    assert said.endswith("\"--config.fusion.branches=('learned',)\"")
    echoed = subprocess.run(["bash", "-c", f"printf '%s\n' {said}"], capture_output=True, text=True)
    assert "--config.data.anatomy=a $HOME's `x`" in echoed.stdout.splitlines()


@pytest.mark.parametrize("held", [{}, {"data": 3}, {"data": {"name": "busi"}, "k": -1}])
def test_settings_of_another_version_give_no_command(held):
    assert rerun_command.again(held) == ""
    assert (
        rerun_command.again({"k": 4, "seed": 0, "method": "gone", "data": {"name": "busi"}}) == ""
    )
