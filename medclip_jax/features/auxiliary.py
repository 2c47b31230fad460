"""Data sets beside the target in one run: each with its own words, preprocessing and augmentation.

They are named in config.meta.data, "name" or "name=folder". What each shows is in data/presets.py;
a set that is not there (a folder) takes the target's, and a warning says so.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medclip_jax import config_validation
from medclip_jax.data import augmentation, datasets, preprocessing, splits
from medclip_jax.data.catalog import PRESETS, RECIPES
from medclip_jax.data.records import Record, Split
from medclip_jax.data.synthetic_variants import Synthesis
from medclip_jax.errors import ConfigError
from medclip_jax.features import cache, training_pool

IMAGES = 32  # healthy images of each auxiliary data set


class Other(NamedTuple):
    """A data set whose healthy images are trained on beside the target's."""

    name: str
    root: Path | None  # None: where the data lie by default
    words: dict[str, Any]  # modality, anatomy and conditions, for the prompts
    recipe: tuple[str, ...]  # preprocess.STEPS
    strengths: augmentation.Strengths


def read(c) -> tuple[Other, ...]:
    """The data sets that config.meta.data names, without the target.

    Each set takes the recipe of its own modality where the target has one. Where config.augment.elastic may not deform a
    modality, it is off for that data set and a warning says so. Raises ConfigError for an unknown
    name.
    """
    _, strengths = augmentation.chosen(config_validation.augment(c), c.data.modality)
    return tuple(_other(given, c, strengths) for given in c.meta.data if given != c.data.name)


def _other(given: str, c, strengths: augmentation.Strengths) -> Other:
    name, _, root = given.partition("=")
    if name not in (known := (*datasets.LAYOUTS, *datasets.PHANTOMS)):
        raise ConfigError(f"config.meta.data has {given!r}: give any of {', '.join(known)}.")
    preset, recipe = PRESETS.get(name), c.data.recipe
    if preset is None:
        logging.warning(
            "%s of config.meta.data has no words of its own: it takes the target's, "
            "whose modality is %r",
            given,
            c.data.modality,
        )
        preset = {n: c.data[n] for n in ("modality", "anatomy", "conditions")}
    elif recipe:
        recipe = RECIPES[name]
    if strengths.elastic and not augmentation.deforms(preset["modality"]):
        logging.warning(
            "config.augment.elastic is off for %s, whose modality is %r: only ultrasound and MRI "
            "may be deformed",
            given,
            preset["modality"],
        )
        strengths = strengths._replace(elastic=0.0)
    return Other(
        name, Path(root) if root else None, dict(preset), preprocessing.steps(recipe), strengths
    )


def records(other: Other, c, drawn: Split) -> tuple[Record, ...]:
    """Healthy images of a data set beside the target, none of them in the target's split."""
    policy = (c.data.uncertain, "negative")  # only CheXpert asks for it
    found = datasets.load(other.name, other.root, Path(c.cache), policy=policy)
    return splits.healthy(found, drawn, IMAGES, c.seed)


def open_pools(
    others: Sequence[Other],
    c,
    drawn: Split,
    feature_cache: cache.FeatureCache,
    synthesis: Synthesis,
) -> list[training_pool.Pool]:
    """A pool of each data set; `feature_cache` and `synthesis` are the target's."""
    return [
        training_pool.open_pool(
            cache.with_recipe(feature_cache, other.recipe),
            records(other, c, drawn),
            synthesis._replace(strengths=other.strengths),
        )
        for other in others
    ]
