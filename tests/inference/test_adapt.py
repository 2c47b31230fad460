"""A new site's detector: calibrated on images it has not seen, from parameters or a workdir."""

import jax
import nibabel
import numpy as np
import pytest
from PIL import Image

from medclip_jax import build, build_detector, config
from medclip_jax.detectors import calibration, detector
from medclip_jax.errors import ConfigError, DataError, WorkdirError
from medclip_jax.inference import adapt
from medclip_jax.models import model, similarity
from medclip_jax.synthesis import generate


def settings(**fields):
    c = config.base("k=4,seed=0", name="folder", anatomy="breast", conditions=("mass",))
    given = {"learner": "maml", "prompts.context": 2, "model.dropout": 0.0}
    c.update_from_flattened_dict(given | {"meta.inner_rate": 0.5} | fields)
    return config.resolve(c)


def started(tiny, **fields) -> adapt.Start:
    c = settings(**fields)
    design, frozen = build.model_parts(c, tiny)
    params = model.init(jax.random.key(0), model=tiny, design=design, context=2, shared=False)
    return build_detector.site_start(c, tiny, design, frozen, params)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 48), np.uint8)).save(path)
    return paths


def test_an_image_is_calibrated_by_what_has_not_seen_it(tiny, images):
    start = started(tiny)
    before = adapt.adapt(start, images)[0].calibration.patch
    assert before.shape == (5, 16) and np.isfinite(before).all()
    Image.fromarray(np.full((40, 48), 90, np.uint8)).save(images[0])
    after = adapt.adapt(start, images)[0].calibration.patch
    # folds are {0, 4}, {1}, {2}, {3}: image 0 is in what scores 1 to 3, not in what scores 4
    np.testing.assert_allclose(after[4], before[4], atol=1e-6)
    assert all(np.abs(after[i] - before[i]).max() > 1e-4 for i in range(4))


def test_without_steps_the_parameters_stay(tiny, images):
    start = started(tiny, **{"meta.adapt_steps": 0})
    ready, thresholds = adapt.adapt(start, images[:2])
    tokens = jax.tree.map(lambda x: x[:2], adapt.altered_rows(start, images[:2]).features)
    design, _ = build.model_parts(settings(), tiny)
    text = model.text_features(start.params, start.frozen, design)
    logits = model.forward(start.params, text, tokens, design).logit
    weights = similarity.affinity(tokens.levels[len(tokens.levels) // 2], settings().score.affinity)
    wanted = np.einsum("npq,nq->np", weights, logits)
    np.testing.assert_allclose(ready.calibration.patch, wanted, atol=1e-5)
    np.testing.assert_allclose(detector.score(ready, tokens).patch, wanted, atol=1e-5)
    assert np.isfinite(thresholds.image.value) and len(thresholds.healthy) == 2


def test_a_site_is_calibrated_with_its_own_number_of_images(tiny, images):
    """Five images, whatever K the run had: the conformal rank of five, and their p-values."""
    ready, thresholds = adapt.adapt(started(tiny, **{"calibration.alpha": 0.4}), images)
    scores = np.sort(ready.calibration.image.astype(np.float64))
    image, pixel = thresholds.image, thresholds.pixel
    assert thresholds.k == ready.k == len(thresholds.healthy) == 5
    assert image.value == pytest.approx(0.4 * scores[2] + 0.6 * scores[3])  # 2.4 of six above
    assert image.alpha_attained == pytest.approx(0.4) and image.attainable
    assert "with 5 healthy images" in image.message and "with 5 healthy images" in pixel.message
    p = calibration.p_values(np.array([scores[0] - 1, scores[4] + 1]), thresholds.healthy)
    np.testing.assert_allclose(p, [1, 1 / 6])


def test_an_image_of_several_frames_is_refused(tiny, images, tmp_path):
    volume = tmp_path / "v.nii"
    values = np.random.default_rng(0).integers(0, 99, (9, 8, 3)).astype(np.int16)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(volume)
    with pytest.raises(DataError, match=r"v\.nii holds 3 frames: give images of one frame"):
        adapt.adapt(started(tiny), [images[0], volume])


def test_an_image_that_is_there_twice_is_refused(tiny, images, tmp_path):
    """Of folds, one would be adapted to it and the other calibrated on it."""
    copy = tmp_path / "copy.bmp"
    Image.open(images[0]).save(copy)
    for given in ([images[0], images[1], images[0]], [*images, copy]):
        with pytest.raises(ConfigError, match="an image is there twice"):
            adapt.adapt(started(tiny), given)


def test_altered_rows_show_every_kind_once(tiny, images):
    rows = adapt.altered_rows(started(tiny), images[:2])
    kinds = generate.PRESETS["masses"]
    count = 2 * (1 + len(kinds))
    assert rows.label.tolist() == [0, 0] + [1] * 2 * len(kinds)
    assert rows.mask.shape == (count, 32, 32)
    assert not rows.mask[:2].any() and rows.mask[2:].any((1, 2)).all()
    assert isinstance(rows.features.pooled, jax.Array) and rows.features.pooled.shape[0] == count


def test_what_cannot_be_adapted_is_refused(tiny, images, tmp_path):
    with pytest.raises(ConfigError, match="1 images to adapt to: give 2 or more"):
        adapt.adapt(started(tiny), images[:1])
    with pytest.raises(WorkdirError, match="holds no run"):
        build_detector.load_start(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(settings(learner="joint").to_json_best_effort())
    with pytest.raises(ConfigError, match="learned jointly"):
        build_detector.load_start(tmp_path)
