"""A data set of twelve images with a learned detector, and its scores."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medclip_jax.detectors import anomaly_maps, calibration, detector, prompt_detector, tiling
from medclip_jax.evaluation import evaluate, predictions
from medclip_jax.evaluation.predictions import Predictions
from medclip_jax.explain import grad_cam
from medclip_jax.features import cache, encoder
from medclip_jax.models import model
from tests.support.models import design_of
from tests.support.pictures import one_device, write_pictures

SIZE = 32  # pixels of the encoder frame
POOL = partial(detector.image_score, size=SIZE, top=0.05)
RATES = {"alpha": 0.2, "pixel_rate": 0.02}


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
    tokens = tiling.load_supports(feature_cache, supports).tokens
    folds = [np.array([0, 1, 2]), np.array([3, 4])]
    design, frozen = design_of(tiny, dropout=0.2)
    params = stacked(tiny, design)
    learned = prompt_detector.build(params, frozen, design, POOL, tokens, folds, 5)
    return feature_cache, supports, test, learned


def stacked(clip, design):
    """Parameters of two folds after the main ones."""
    start = model.init(jax.random.key(0), clip, design, 2, False)
    return jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 1.1 * x]), start)


def score(learned, feature_cache, test, passes=3, thresholds=None) -> predictions.Scored:
    """The test set as a run scores it."""
    thresholds = thresholds or detector.calibrate(learned, **RATES)
    settings = {"how": grad_cam.Explanation(top=0.05), "passes": passes, "seed": 0}
    return evaluate.score_images(learned, thresholds, feature_cache, test, **settings)


@pytest.fixture(scope="module")
def scored(scene):
    feature_cache, _, test, learned = scene
    return score(learned, feature_cache, test)


def thresholds_of(value=0.0) -> calibration.Calibration:
    """Of raw scores: the pixel threshold is the value, the scale 1."""
    image = calibration.threshold(np.array([0.1, 0.2]), 0.2)
    pixel = calibration.pixel_threshold(np.full((2, 2, 2), 0.1), 0.1)._replace(value=value)
    healthy = np.array([0.1, 0.2])
    return calibration.Calibration(healthy, image, 1.0, pixel, 1.0, 5, anomaly_maps.MapFilter())


def perfect(test, size=SIZE) -> predictions.Scored:
    """Predictions that say the truth."""
    label = np.array([r.label for r in test])
    maps = 0.1 + 0.8 * np.stack([*evaluate.Masks(test, size, "stretch")]).astype(np.float16)
    patches = np.zeros((len(test), 4, 4), np.float32)
    columns = label, 0.1 + 0.8 * label, 1.0 - 0.9 * label, 0.0 * label, maps, patches, patches
    return predictions.Scored(Predictions(tuple(r.id for r in test), *columns), thresholds_of())
