"""A training pool in memory, where anomalous patches carry a planted shift."""

import pytest

from medclip_jax import config
from medclip_jax.clip import checkpoint
from medclip_jax.features import training_pool
from tests.support.checkpoints import tiny_checkpoint
from tests.support.toy import planted_pool


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> checkpoint.Clip:
    return checkpoint.load(str(tiny_checkpoint(tmp_path_factory.mktemp("clip"))[0]))


@pytest.fixture(scope="module")
def pool(clip) -> training_pool.TrainingPool:
    """See `toy.planted_pool`; of the shapes of a CLIP."""
    return planted_pool(
        clip.grid, clip.size, clip.widths[0], len(clip.image_encoder.levels), clip.joint
    )


def settings(**fields):
    c = config.base("k=4,seed=0", name="folder", anatomy="breast", conditions=("mass",))
    c.update_from_flattened_dict({"model.dropout": 0.0, "prompts.context": 2} | fields)
    return config.resolve(c)
