"""What the catalogue says of data sets and of what the embedded CLIP has read."""

import re

import pytest

from medclip_jax import config
from medclip_jax.data import catalog


def cautions(modality="dermoscopy", arguments="k=4", **fields):
    c = config.base(arguments, name="folder", root="/data", modality=modality)
    c.update_from_flattened_dict(fields)
    return catalog.cautions(config.resolve(c))


def test_the_modalities_with_captions_are_those_of_the_card():
    card = " ".join((catalog.ASSETS / "compact_clip" / "README.md").read_text("utf-8").split())
    said = re.search(r"captions of these findings: (.*?)\. Say so", card)[1]
    assert {x.partition(":")[0] for x in said.split("; ")} == {*map(str.lower, catalog.CAPTIONED)}


def test_a_modality_without_captions_is_said_with_what_to_do():
    (line,) = cautions()
    assert "'dermoscopy'" in line and "read captions of brain MRI, chest X-ray, " in line
    assert "--config.branches=\"('learned','memory')\"" in line
    assert cautions("medical image")  # the default: nobody has said what is shown


@pytest.mark.parametrize(
    "modality", ["brain MRI", "MRI of the Brain", "chest CT", "breast ultrasound"]
)
def test_a_modality_with_captions_is_passed_over(modality):
    assert not cautions(modality)


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ("k=4,method=memory", {}),
        ("k=4,method=zero_shot", {}),
        ("k=4,method=mediclip", {}),
        ("k=4,method=paper", {}),
        ("k=4", {"branches": ("learned", "memory")}),
        ("k=4", {"clip.checkpoint": "openai/clip-vit-base-patch16"}),
    ],
)
def test_where_plain_prompts_are_not_fused_nothing_is_said(arguments, fields):
    assert not cautions(arguments=arguments, **fields)


@pytest.mark.parametrize("name", [*catalog.PRESETS, *catalog.SETS])
def test_sets_of_the_catalogue(name):
    """The seven kinds that pre-training never saw, by name."""
    unseen = {"oct_mx", "fundus_mx", "derm_ph2", "histo_lung", *catalog.with_role("report")}
    words = {**catalog.PRESETS, **catalog.SETS}[name]
    assert bool(cautions(words["modality"])) == (name in unseen)
