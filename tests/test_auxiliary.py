"""Auxiliary datasets: which words, preprocessing and augmentation each gets, and a run with one."""

import json
from pathlib import Path

import numpy as np
import pytest

from medclip_jax import build, config, train
from medclip_jax.data.catalog import PRESETS, SETS
from medclip_jax.data.preprocessing import RECIPES as STEPS
from medclip_jax.errors import CheckpointError, ConfigError
from tests.support.checkpoints import tiny_checkpoint

WORDS = {n: PRESETS["phantom-ultrasound"][n] for n in ("modality", "anatomy", "conditions")}


def choose(*names, recipe="", **strengths):
    c = config.base(name="target", recipe=recipe, **WORDS)
    augment = ",".join(f"{name}={value}" for name, value in strengths.items())
    c.update_from_flattened_dict({"meta.data": names, "augment": augment})
    return build.auxiliary_datasets(c)


def test_every_data_set_has_the_recipe_of_its_modality():
    recipes = {n: config.recipe_of(x["modality"]) for n, x in (PRESETS | SETS).items()}
    assert recipes == dict.fromkeys(recipes, "zscore") | {
        **dict.fromkeys(("busi", "phantom-ultrasound", "gallbladder_us"), "ultrasound"),
        **dict.fromkeys(("brain_mri", "phantom-mri"), "mri"),
        **dict.fromkeys(("chest_xray", "chexpert", "phantom-xray", "knee_xr", "spine_xr"), "xray"),
        **{"lung_ct": "ct", "mammo_mias": "mammography"},  # OCT is no CT
    }
    assert set(recipes.values()) == {*STEPS, "zscore"}


def test_each_dataset_has_its_own_words_and_where_the_target_has_one_its_own_recipe():
    mri, films = choose("phantom-mri", "chest_xray=/films")
    assert (mri.name, films.name) == ("phantom-mri", "chest_xray")
    assert mri.words == PRESETS["phantom-mri"] and films.words == PRESETS["chest_xray"]
    assert mri.root is None and films.root == Path("/films")
    assert mri.recipe == films.recipe == ()
    mri, films = choose("phantom-mri", "chest_xray", recipe="ultrasound")
    assert (mri.recipe, films.recipe) == (STEPS["mri"], STEPS["xray"])


def test_a_folder_takes_the_targets_words_and_a_warning_says_so(caplog):
    (folder,) = choose("folder=/mine")
    assert folder.words == WORDS and folder.recipe == ()
    assert "folder=/mine of config.meta.data has no words" in caplog.text


def test_elastic_deformation_is_off_where_a_modality_forbids_it(caplog):
    mri, xray = choose("phantom-mri", "phantom-xray", elastic=0.02, flip=0.5)
    assert (mri.strengths.elastic, mri.strengths.flip) == (0.02, 0.5)
    assert (xray.strengths.elastic, xray.strengths.flip) == (0.0, 0.5)
    assert "config.augment.elastic is off for phantom-xray" in caplog.text
    assert "phantom-mri" not in caplog.text


def test_an_unknown_name_or_one_that_is_there_twice_is_refused():
    with pytest.raises(ConfigError, match=r"^config.meta.data has a data set twice: give each"):
        choose("brain_mri", "busi=/a", "brain_mri")
    with pytest.raises(ConfigError, match=r"^config.meta.data has 'knees': choose any of busi, "):
        choose("knees")


def test_training_on_two_phantoms(tmp_path, monkeypatch):
    """Each dataset has its own preprocessing and prompts; the target's are as many."""
    folder, *_ = tiny_checkpoint(tmp_path / "clip")
    phantoms = {f"phantom-{m}": (m, 4, 2, 2) for m in ("ultrasound", "mri")}
    monkeypatch.setattr("medclip_jax.data.datasets.PHANTOMS", phantoms)
    c = config.base("k=2", name="phantom-ultrasound", **PRESETS["phantom-ultrasound"])
    changes = {
        "meta.data": ("phantom-ultrasound", "phantom-mri"),
        "learner": "fomaml",
        "meta.adapt_steps": 0,
        "clip.checkpoint": str(folder),
        "cache": str(tmp_path / "cache"),
        "synthesis.variants": 16,
        "data.recipe": "ultrasound",
        "steps": 1,
    }
    c.update_from_flattened_dict(changes)
    prepared = train.prepare(c)
    sets = prepared.design.sets
    assert sets.real.sum(1).tolist() == [len(prepared.design.prompts.ids)] * 2
    assert not np.array_equal(sets.ids[0], sets.ids[1])
    (other,) = build.auxiliary_datasets(prepared.config)
    assert (other.name, other.recipe) == ("phantom-mri", STEPS["mri"])
    encoded = train.encode(prepared)
    assert [len(pool.clean) for pool in encoded.pools] == [2, 4]
    assert len(list((tmp_path / "cache/feature_cache").iterdir())) == 2  # one per recipe
    train.fit(prepared, encoded, tmp_path)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(line)["loss"])
    train.fit(prepared, encoded, tmp_path)  # resumes
    target, other = encoded.pools
    changed = encoded._replace(pools=[target, other._replace(digest=target.digest)])
    with pytest.raises(CheckpointError, match="or other images of config.meta.data than"):
        train.fit(prepared, changed, tmp_path)
