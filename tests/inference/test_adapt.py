"""A new site's detector: calibrated on images it has not seen, from a params or a workdir."""

import jax
import numpy as np
import pytest
from PIL import Image

from medclip_jax import build, config
from medclip_jax.errors import ConfigError, WorkdirError
from medclip_jax.inference import adapt
from medclip_jax.models import model


def settings(**fields):
    c = config.base("k=4,seed=0", name="folder", anatomy="breast", conditions=("mass",))
    given = {"learner": "maml", "calibration.folds": 2, "prompts.context": 2, "model.dropout": 0.0}
    c.update_from_flattened_dict(given | {"meta.inner_rate": 0.5} | fields)
    return config.resolve(c)


def started(tiny, **fields) -> adapt.Start:
    c = settings(**fields)
    design, frozen = build.build(c, tiny)
    params = model.init(jax.random.key(0), model=tiny, design=design, context=2, shared=False)
    return adapt.prepare(c, tiny, design, frozen, params)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 48), np.uint8)).save(path)
    return paths


def test_an_image_is_calibrated_by_what_has_not_seen_it(tiny, images):
    start = started(tiny)
    before = adapt.adapt(start, images).detector.held_out
    assert before.shape == (4, 16) and np.isfinite(before).all()
    Image.fromarray(np.full((40, 48), 90, np.uint8)).save(images[0])
    after = adapt.adapt(start, images).detector.held_out
    # folds are {0, 2} and {1, 3}: image 0 is in what scores 1 and 3, not in what scores 2
    np.testing.assert_allclose(after[2], before[2], atol=1e-6)
    assert all(np.abs(after[i] - before[i]).max() > 1e-4 for i in (0, 1, 3))


def test_without_steps_it_is_theta_itself(tiny, images):
    start = started(tiny, **{"meta.adapt_steps": 0})
    ready = adapt.adapt(start, images[:2])
    tokens = jax.tree.map(lambda x: x[:2], adapt.altered_rows(start, images[:2]).features)
    text = model.text_features(start.params, start.frozen, start.design)
    wanted = model.forward(start.params, text, tokens, start.design).logit
    np.testing.assert_allclose(ready.detector.held_out, wanted, atol=1e-5)
    np.testing.assert_allclose(ready.detector.patches(tokens), wanted, atol=1e-5)
    assert np.isfinite(ready.limits.image.value) and len(ready.limits.healthy) == 2


def test_altered_rows_show_every_kind_once(tiny, images):
    rows = adapt.altered_rows(started(tiny), images[:2])
    assert rows.label.tolist() == [0, 0] + [1] * 6 and rows.mask.shape == (8, 32, 32)
    assert not rows.mask[:2].any() and rows.mask[2:].any((1, 2)).all()
    assert isinstance(rows.features.pooled, jax.Array) and rows.features.pooled.shape[0] == 8


def test_what_cannot_be_adapted_is_refused(tiny, images, tmp_path):
    with pytest.raises(ConfigError, match="1 images to adapt to: give 2 or more"):
        adapt.adapt(started(tiny), images[:1])
    with pytest.raises(WorkdirError, match="holds no run"):
        adapt.load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(settings(learner="joint").to_json_best_effort())
    with pytest.raises(ConfigError, match="learned jointly"):
        adapt.adapt(tmp_path, images)
