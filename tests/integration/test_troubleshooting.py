"""The ten messages of docs/troubleshooting.md, each brought about and compared word for word."""

import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medclip_jax import main, workdir
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^\*\*`(error: .*)`\*\*$", PAGE, re.M)
FOLDER = f"--config={ROOT}/configs/folder.py:k=%d,root=mine"


def picture(path: Path, seed: int, size: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def desk(tmp_path, monkeypatch, world, whole):
    """A folder to work in: mine/ with 6 healthy images, runs/ and a small CLIP in the flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for i in range(4, 10):
        picture(Path(f"mine/train/good/{i}.png"), i)
        picture(Path(f"mine/test/good/{i + 6}.png"), i + 6)
    picture(Path("mine/test/lesion/21.png"), 21)
    picture(Path("mine/ground_truth/lesion/21_mask.png"), 22)
    Path("runs").mkdir()
    Path("whole").symlink_to(whole)
    return world


def no_config(desk):
    return ["--config=configs/bus.py", "--workdir=runs/mine"]


def no_field(desk):
    return [FOLDER % 4, "--workdir=runs/mine", "--config.stepz=3"]


def too_few(desk):
    return [FOLDER % 16, "--workdir=runs/mine"]


def not_an_image(desk):
    Path("mine/train/good/9.png").write_text("hello")
    return [FOLDER % 4, "--workdir=runs/mine"]


def another_mask(desk):
    picture(Path("mine/ground_truth/lesion/21_mask.png"), 22, size=32)
    return [FOLDER % 4, "--workdir=runs/mine"]


def another_run(desk):
    shutil.copytree(Path("whole").resolve(), "runs/mine")
    return desk.flags(Path("runs/mine"), arguments="k=5")[:5]


def in_use(desk):
    Path("runs/mine").mkdir()
    return [FOLDER % 4, "--workdir=runs/mine"]


def no_tower(desk):
    return [FOLDER % 4, "--workdir=runs/mine", "--config.clip.checkpoint=myclip"]


def no_scorer(desk):
    Path("runs/mine").mkdir()
    return ["--mode=predict", "--workdir=runs/mine", "--input=mine", "--output=out"]


def no_input(desk):
    Path("scans").mkdir()
    Path("runs/mine").symlink_to(Path("whole").resolve())
    return ["--mode=predict", "--workdir=runs/mine", "--input=scans", "--output=out"]


CASES = [no_config, no_field, too_few, not_an_image, another_mask, another_run, in_use, no_tower]
CASES += [no_scorer, no_input]


@pytest.mark.parametrize("number", range(10), ids=[case.__name__ for case in CASES])
def test_a_message_is_word_for_word_what_a_run_prints(number, desk, capfd):
    case = CASES[number]
    given = case(desk)
    if "--mode=predict" not in given and case not in (no_tower, another_run):
        given.append(f"--config.clip.checkpoint={desk.clip}")
    held = workdir.locked(Path("runs/mine")) if case is in_use else nullcontext()
    with held:
        code = main.main(["main", *given])
    said = capfd.readouterr().err.splitlines()[-1]
    assert code == 2 and said == QUOTED[number]
