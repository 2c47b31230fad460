"""Three branches on random images, and their ensemble."""

import numpy as np
import pytest

from medclip_jax.detectors import ensemble, memory_bank, prompt_detector, tiling
from medclip_jax.features import cache, encoder
from tests.support.models import design_of
from tests.support.pictures import one_device, write_pictures
from tests.support.scenes import POOL, SIZE, stacked


@pytest.fixture(scope="module")
def fused(tmp_path_factory, tiny):
    """(branches by name, the ensemble of all)."""
    folder = tmp_path_factory.mktemp("fused")
    supports = write_pictures(folder, 4, start=40)
    feature_cache = cache.open(folder, tiny, "stretch", "float32", one_device())
    encoder.encode_images(feature_cache, supports)
    tokens = tiling.load_supports(feature_cache, supports).tokens
    design, frozen = design_of(tiny, dropout=0.2)
    plain, _ = design_of(tiny, context=0)
    folds, params = [np.array([0, 2]), np.array([1, 3])], stacked(tiny, design)
    branches = {
        "learned": prompt_detector.build(params, frozen, design, POOL, tokens, folds, 4),
        "memory": memory_bank.build(tokens, POOL, SIZE, k=4),
        "zero_shot_image": prompt_detector.zero_shot(tiny, frozen, plain, tokens, 4),
    }
    return branches, ensemble.build(branches)
