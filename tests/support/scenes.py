"""A data set of twelve images with a learned detector, and its scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medclip_jax.detectors import by_name, calibration, limits
from medclip_jax.evaluation import evaluate, ground_truth, predictions
from medclip_jax.evaluation.predictions import Predictions
from medclip_jax.features import cache, encoder
from medclip_jax.models import model
from tests.support.models import design_of
from tests.support.pictures import one_device, write_pictures

SETTINGS = dict(top=0.05, alpha=0.2, pixel_rate=0.02, passes=3, seed=0)


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tiny):
    """Five supports, seven test images (two with two masks), a cache, a learned detector."""
    folder = tmp_path_factory.mktemp("scene")
    pictures = write_pictures(folder, 12, start=100)
    supports, test = pictures[:5], pictures[5:]
    for i, boxes in ((0, [(2, 5), (20, 25)]), (1, [(8, 15), (10, 12)])):
        masks = []
        for part, (low, high) in enumerate(boxes):
            mask = np.zeros((30, 40), np.uint8)
            mask[low:high, low:high] = 255
            path = folder / f"mask{i}_{part}.png"
            Image.fromarray(mask).save(path)
            masks.append(path)
        test[i] = test[i]._replace(label=1, masks=tuple(masks))
    feature_cache = cache.open(folder, tiny, "stretch", "float32", one_device())
    encoder.encode_images(feature_cache, pictures)
    design, frozen = design_of(tiny, dropout=0.2)
    start = model.init(jax.random.key(0), tiny, design, 2, False)
    params = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 1.1 * x]), start)
    groups = [np.array([0, 1, 2]), np.array([3, 4])]
    made = by_name.build("ours", params, frozen, design, feature_cache, supports, groups)
    return feature_cache, supports, test, made


@pytest.fixture(scope="module")
def scored(scene):
    feature_cache, _, test, made = scene
    return evaluate.score_images(made, feature_cache, test, **SETTINGS)


# --- measures -----------------------------------------------------------------------------------


def perfect(test, size=32) -> predictions.Scored:
    """Predictions that say the truth."""
    label = np.array([r.label for r in test])
    maps = 0.1 + 0.8 * np.stack([*ground_truth.Masks(test, size, "stretch")]).astype(np.float16)
    said = Predictions(
        tuple(r.id for r in test), label, 0.1 + 0.8 * label, 1.0 - 0.9 * label, 0.0 * label, maps
    )
    one = calibration.threshold(np.array([0.1, 0.2]), 0.5)
    pixel = calibration.pixel_threshold(np.full((1, 2, 2), 0.1), 0.1)
    found = limits.Limits(np.array([0.1, 0.2]), one, 1.0, pixel, 1.0)
    return predictions.Scored(said, {"k": 5, "alpha": 0.2}, found)
