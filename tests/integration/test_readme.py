"""The README's Python runs as it stands there, in a folder that holds what it names."""

import re
import shutil

import pytest

import medclip_jax
from medclip_jax import build_detector
from medclip_jax.errors import ConfigError
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def desk(world, whole, tmp_path_factory):
    """runs/mine (joint), runs/maml, scan.png of a lesion, a.png and b.png of healthy tissue."""
    folder = tmp_path_factory.mktemp("desk")
    flags = ("--config.learner=maml", "--config.steps=4", "--config.synthesis.variants=16")
    flags += ("--config.branches=('learned',)",)
    assert world.main(folder / "runs" / "maml", *flags, report=False) == 0
    (folder / "runs" / "mine").symlink_to(whole)
    for name, kind in (("scan", "test/lesion"), ("a", "train/good"), ("b", "train/good")):
        images = sorted((world.data / kind).glob("*.png"))
        shutil.copy(images[-1 if name == "b" else 0], folder / f"{name}.png")
    return folder


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_each_public_name_is_there_and_the_readme_starts_from_load():
    for name in medclip_jax.__all__:
        assert name == "__version__" or getattr(medclip_jax, name).__doc__, name
    assert "medclip_jax.load(" in "".join(blocks())


@pytest.mark.parametrize("block", blocks(), ids=["notebook", "new site"])
def test_python_blocks_run(block, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    exec(compile(block, "README.md", "exec"), {})
    assert "True" in (said := capsys.readouterr().out) or "False" in said


def test_an_adapted_scorer_is_of_the_new_site(desk, monkeypatch):
    scorer = medclip_jax.load(desk / "runs" / "maml")
    healthy = [desk / "a.png", desk / "b.png"]
    before = scorer.predict([desk / "scan.png"])[0]
    adapted = scorer.adapt(healthy)
    (after,) = adapted.predict([desk / "scan.png"])
    assert after.score != before.score and after.uncertainty == 0
    assert 1 / 3 - 1e-9 <= after.p_value <= 1  # of two images, linear between their scores
    assert scorer.predict([desk / "scan.png"])[0].score == before.score
    monkeypatch.setattr(build_detector, "load_start", None)  # loaded and compiled once
    (again,) = adapted.adapt(healthy).predict([desk / "scan.png"])
    assert again.score == after.score  # from the meta-trained params, not from the adapted one
    with pytest.raises(ConfigError, match="in memory alone"):
        adapted.predict_files("scan.png", output=desk / "out")
    with pytest.raises(ConfigError, match="give 2 or more"):
        scorer.adapt(healthy[:1])
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="learned jointly"):
        medclip_jax.load(desk / "runs" / "mine").adapt(healthy)
