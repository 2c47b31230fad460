"""Three branches on random images, and their ensemble."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.detectors import by_name, ensemble
from medclip_jax.features import cache, encoder
from medclip_jax.models import model
from tests.support.models import design_of
from tests.support.pictures import one_device, write_pictures

# --- the whole -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fused(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("fused")
    supports = write_pictures(folder, 4, start=40)
    feature_cache = cache.open(folder, tiny, "stretch", "float32", one_device())
    encoder.encode_images(feature_cache, supports)
    design, frozen = design_of(tiny, dropout=0.2)
    plain, _ = design_of(tiny, context=0)
    start = model.init(jax.random.key(0), tiny, design, 2, False)
    params = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 1.1 * x]), start)
    groups = [np.array([0, 2]), np.array([1, 3])]
    made = {
        name: by_name.build(name, params, frozen, shape, feature_cache, supports, groups)
        for name, shape in (("learned", design), ("memory", design), ("zero_shot", plain))
    }
    settings = dict(
        weights="probes", modality="brain MRI", variants=4, seed=0, image_scores=lambda v: v.max(1)
    )
    return (
        made,
        settings,
        ensemble.fuse(made, feature_cache, supports, **settings),
        feature_cache,
        supports,
    )


def moved_scores(mix, drawn, plain):
    """What other values [t, n, p] of the learned branch add to the fused image score."""
    at = mix.names.index("learned")

    def said(v):
        return np.arcsinh(mix.image_gain[at] * (np.asarray(v) - mix.image_centre[at]))

    return mix.image_weight[at] * (said(drawn.max(2)) - said(plain.max(1))[None])
