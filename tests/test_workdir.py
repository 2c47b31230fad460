"""The claim of a run on its workdir."""

import json

import pytest

from medclip_jax import config
from medclip_jax.errors import WorkdirError
from medclip_jax.workdir import claim


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
