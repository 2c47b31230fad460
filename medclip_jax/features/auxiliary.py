"""Auxiliary datasets: healthy images trained on beside the target's, with their own words.

They are named "name" or "name=folder". What each shows is in data/catalog.py; one that is not there
(a folder) takes the target's words, and a warning says so.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medclip_jax.data import augmentation, datasets, preprocessing, splits
from medclip_jax.data.augmentation import Synthesis
from medclip_jax.data.catalog import PRESETS, RECIPES, SETS
from medclip_jax.data.records import Split
from medclip_jax.errors import ConfigError
from medclip_jax.features import cache, encoder
from medclip_jax.features.cache import FeatureCache
from medclip_jax.features.training_pool import TrainingPool

IMAGES = 32  # healthy images of each dataset


class Auxiliary(NamedTuple):
    """An auxiliary dataset."""

    name: str
    root: Path | None  # None: where the data lie by default
    words: dict[str, Any]  # modality, anatomy and conditions, for the prompts
    recipe: tuple[str, ...]  # preprocessing.STEPS
    strengths: augmentation.Strengths
    window: str  # of CT: the target's for a dataset without words of its own


def choose(
    names: Sequence[str],
    *,
    words: dict[str, Any],
    recipe: str,
    strengths: augmentation.Strengths,
    window: str = "",
) -> tuple[Auxiliary, ...]:
    """The auxiliary datasets of these names ("name" or "name=folder").

    Elastic deformation is off for modalities that must not be deformed, and a warning says so.

    Args:
      names: without the target's.
      words: of the target: modality, anatomy, conditions.
      recipe: of the target; where it has one, each dataset takes that of its own modality.
      strengths: of augmentation.
      window: CT window of the target.

    Raises:
      ConfigError: for an unknown name.
    """
    chosen = []
    for full in names:
        name, _, root = full.partition("=")
        if name not in (known := (*datasets.LAYOUTS, *SETS, *datasets.PHANTOMS)):
            raise ConfigError(f"config.meta.data has {full!r}: choose any of {', '.join(known)}.")
        named = PRESETS | SETS
        own, steps, changes = dict(named.get(name, words)), recipe, strengths
        if name not in named:
            logging.warning(
                "%s of config.meta.data has no words of its own: it takes the target's, "
                "whose modality is %r",
                *(full, words["modality"]),
            )
        elif recipe:
            steps = RECIPES.get(name, "")
        if strengths.elastic and not augmentation.deforms(own["modality"]):
            logging.warning(
                "config.augment.elastic is off for %s, whose modality is %r: only ultrasound and "
                "MRI may be deformed",
                *(full, own["modality"]),
            )
            changes = strengths._replace(elastic=0.0)
        place, ct = Path(root) if root else None, "" if name in named else window
        chosen.append(Auxiliary(name, place, own, preprocessing.steps(steps), changes, ct))
    return tuple(chosen)


def open_pools(
    auxiliary: Sequence[Auxiliary],
    target: Split,
    feature_cache: FeatureCache,
    synthesis: Synthesis,
    *,
    folder: Path,
    uncertain: str,
    seed: int,
) -> list[TrainingPool]:
    """A pool of healthy images of each dataset, none of them in the target's split.

    Args:
      auxiliary: the datasets.
      target, feature_cache, synthesis: the target's.
      folder: of prepared data (config.cache).
      uncertain: what CheXpert's label -1 means.
      seed: of the sample of images.
    """
    pools = []
    for dataset in auxiliary:
        records = datasets.load(
            dataset.name, dataset.root, folder, uncertain=uncertain, window=dataset.window
        )
        images = splits.healthy(records, target, IMAGES, seed)
        own = cache.with_recipe(feature_cache, dataset.recipe, dataset.window)
        changes = synthesis._replace(strengths=dataset.strengths)
        pools.append(encoder.open_pool(own, images, changes))
    return pools
