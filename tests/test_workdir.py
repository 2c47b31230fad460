"""The claim of a run on its workdir, and the lock that keeps other runs out."""

import json
import subprocess
import sys

import pytest

from medclip_jax import config
from medclip_jax.errors import WorkdirError
from medclip_jax.workdir import claim, locked
from tests.support.paths import ROOT


def settings(arg="k=4", **given):
    c = config.base(arg, name="folder")
    c.update(given)
    return config.resolve(c)


def test_a_claim_is_kept_and_renewed(tmp_path):
    claim(tmp_path, settings())
    first = json.loads((tmp_path / "config.json").read_text())
    assert first["k"] == 4 and first["steps"] > 0 and first["data"]["name"] == "folder"
    claim(tmp_path, settings(cache="/elsewhere", checkpoint_every=3))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["cache"] == "/elsewhere" and stored["checkpoint_every"] == 3


@pytest.mark.parametrize(
    "arg, given, named",
    [
        ("k=8", {}, "k = 4, not 8"),
        ("k=4,seed=1", {}, "seed = 0, not 1"),
        ("k=4,method=memory", {}, "method = ours, not memory"),
        ("k=4", {"steps": 7}, "steps = .*, not 7"),
        ("k=4", {"loss": {"dice": 0.5}}, "loss"),
    ],
)
def test_a_claim_on_another_run_is_refused(tmp_path, arg, given, named):
    claim(tmp_path, settings())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(WorkdirError, match=named):
        claim(tmp_path, settings(arg, **given))
    assert (tmp_path / "config.json").read_bytes() == before


def test_one_run_in_a_workdir_and_a_dead_one_leaves_no_lock(tmp_path):
    code = (
        "import sys, time, pathlib; from medclip_jax import workdir\n"
        "with workdir.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in\n"
        with pytest.raises(WorkdirError, match="in use by another run"):
            with locked(tmp_path):
                pass
    finally:
        process.kill()
        process.communicate()  # closes the pipe, too
    with locked(tmp_path):
        pass
