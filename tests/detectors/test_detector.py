"""Detectors: what holds a support out, what zero-shot is, and what dropout samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.clip import checkpoint, hf_weights
from medclip_jax.detectors import calibration, detector, prompt_detector
from medclip_jax.detectors.anomaly_maps import MapFilter
from medclip_jax.models import model, similarity
from tests.support.checkpoints import Theirs
from tests.support.models import design_of, rows, tokens
from tests.support.scenes import POOL, RATES, SIZE

# --- learned ------------------------------------------------------------------------------------


def score_batch(made, calibrated, features, keys):
    """Both halves of scoring, as evaluation and prediction run them."""
    return detector.finish(jax.device_get(detector.read_batch(made, features, keys)), calibrated)


@pytest.fixture(scope="module")
def folded(tiny):
    """Three sets of parameters that differ, for two folds of five supports."""
    design, frozen = design_of(tiny, dropout=0.3)
    starts = [model.init(jax.random.key(i), tiny, design, 2, False) for i in range(3)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    folds = [np.array([0, 3]), np.array([1, 2, 4])]
    own = tokens(5)
    made = prompt_detector.build(params, frozen, design, POOL, own, folds, 5)
    return made, starts, design, frozen, own, folds


def test_each_fold_scores_what_it_did_not_see(folded):
    made, starts, design, frozen, own, folds = folded

    @jax.jit
    def values(params, features):
        text = model.text_features(params, frozen, design)
        return model.forward(params, text, features, design).logit

    each = [np.asarray(values(params, own)) for params in starts]
    for fold, group in enumerate(folds, 1):
        np.testing.assert_allclose(made.calibration.patch[group], each[fold][group], atol=1e-5)
        assert np.abs(made.calibration.patch[group] - each[0][group]).max() > 1e-3
    np.testing.assert_allclose(detector.score(made, own).patch, each[0], atol=1e-5)
    np.testing.assert_allclose(made.calibration.image, made.calibration.patch.max(1), atol=1e-6)
    folds = detector.read_batch(made, own, jax.random.split(jax.random.key(0), 1)).folds
    np.testing.assert_allclose(folds, np.stack([x.max(1) for x in each[1:]], 1), atol=1e-5)


def test_rows_of_one_support_are_scored_by_its_fold(tiny, folded):
    """As of tiles: two rows per support."""
    made, starts, design, frozen, own, folds = folded
    twice = jax.tree.map(lambda x: x.repeat(2, 0), own)
    params = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    both = prompt_detector.build(params, frozen, design, POOL, twice, folds, 5)
    wanted = made.calibration.patch.repeat(2, 0)
    np.testing.assert_allclose(both.calibration.patch, wanted, atol=1e-5)


def passes(made, features, keys):
    return np.asarray(detector.read_batch(made, features, keys).passes.patch)  # [n, t, p]


def test_passes_depend_on_keys_alone(folded):
    made, *_, own, _ = folded
    keys = jax.random.split(jax.random.key(0), 6)
    sampled = passes(made, own, keys)
    assert sampled.shape == (5, 6, 16)
    np.testing.assert_array_equal(sampled, passes(made, own, keys))
    np.testing.assert_allclose(sampled[:, ::-1], passes(made, own, keys[::-1]), atol=1e-6)
    assert sampled.std(1).min() > 0
    # nor on the other images of the batch, nor on its order
    turned = passes(made, rows(own, range(4, -1, -1)), keys)
    np.testing.assert_allclose(sampled[::-1], turned, atol=1e-5)


def test_no_dropout_has_one_pass_and_variance_exactly_0(tiny):
    design, frozen = design_of(tiny, dropout=0.0)
    params = jax.tree.map(lambda x: x[None], model.init(jax.random.key(0), tiny, design, 2, False))
    own = tokens(2)
    made = prompt_detector.build(params, frozen, design, POOL, own, [], 2)
    assert not made.stochastic and made.fold_params is None
    scores = detector.score(made, own)
    np.testing.assert_array_equal(made.calibration.patch, scores.patch)  # no folds: the main ones
    keys = jax.random.split(jax.random.key(0), 4)
    got = score_batch(made, detector.calibrate(made, **RATES), own, keys)
    np.testing.assert_array_equal(got.patch_variance, 0)
    np.testing.assert_array_equal(got.uncertainty, 0)


def test_a_batch_is_calibrated_by_the_held_out_supports(folded):
    """Equation (10) and the decisions, by hand from the raw scores."""
    made, *_ = folded
    new, keys = tokens(3, seed=2), jax.random.split(jax.random.key(1), 8)
    result = detector.calibrate(made, **RATES)
    got, raw = score_batch(made, result, new, keys), detector.read_batch(made, new, keys)
    unit = calibration.to_unit(np.asarray(raw.passes.patch), result.pixel.value, result.pixel_scale)
    np.testing.assert_allclose(got.patch_mean, unit.mean(1), atol=1e-6)
    np.testing.assert_allclose(got.patch_variance, unit.var(1), atol=1e-7)
    assert got.patch_variance.min() > 0
    image = np.asarray(raw.image, float)
    np.testing.assert_array_equal(got.alarm, image > result.image.value)
    np.testing.assert_array_equal(got.score >= 0.5, got.alarm)
    p = calibration.p_values(image, made.calibration.image, steps=False)  # no bound is proven
    np.testing.assert_allclose(got.p_value, p)
    np.testing.assert_allclose(got.uncertainty, got.passes.std(1))
    assert got.maps.shape == (3, SIZE, SIZE) and got.folds.shape == (3, 2)
    limits = result.pixel.value, result.pixel_scale
    maps = np.asarray(raw.maps)
    np.testing.assert_allclose(got.maps, calibration.to_unit(maps, *limits), atol=1e-6)
    peaked = detector.calibrate(made, **RATES, peak=0.25)
    assert peaked.image == result.image and peaked.peak == 0.25
    assert peaked.pixel.value < result.pixel.value and peaked.pixel.rate_attained < 0.03
    limits = peaked.pixel.value, peaked.pixel_scale
    got = score_batch(made, peaked, new, keys)
    wanted = calibration.to_unit(calibration.lowered(maps, 0.25), *limits)
    np.testing.assert_allclose(got.maps, wanted, atol=1e-6)
    each = np.asarray(raw.passes.patch)  # patches are lowered as maps are
    off = 0.25 * (each.max(-1) - np.median(each, -1))
    unit = calibration.to_unit(each - off[..., None], *limits)
    np.testing.assert_allclose(got.patch_mean, unit.mean(1), atol=1e-6)
    np.testing.assert_allclose(got.patch_variance, unit.var(1), atol=1e-7)


@pytest.mark.parametrize("entries", [1 << 19, 16])  # all images at a time, one at a time
def test_similar_patches_share_their_values_and_image_scores_stay(folded, monkeypatch, entries):
    monkeypatch.setattr(detector, "MOST_COSINES", entries)
    made, own = folded[0], folded[4]
    wide = detector.sharing_detector(made, own, 0.4)
    assert detector.sharing_detector(made, own, 0.0).apply is made.apply
    for plain, got, images in (
        (made.calibration, wide.calibration, own),
        (detector.score(made, tokens(3)), detector.score(wide, tokens(3)), tokens(3)),
    ):
        weights = similarity.affinity(images.levels[len(images.levels) // 2], 0.4)
        wanted = np.einsum("npq,nq->np", np.asarray(weights, np.float64), plain.patch)
        np.testing.assert_allclose(got.patch, wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got.image, plain.image)
    keys, new = jax.random.split(jax.random.key(3), 2), tokens(2)
    raw, shared = (detector.read_batch(d, new, keys).passes for d in (made, wide))
    weights = similarity.affinity(new.levels[len(new.levels) // 2], 0.4)
    wanted = np.einsum("npq,ntq->ntp", weights, raw.patch)
    np.testing.assert_allclose(shared.patch, wanted, rtol=1e-4, atol=1e-5)


# --- zero shot ----------------------------------------------------------------------------------


def test_zero_shot_is_clip_on_the_embedded_checkpoint(compact):
    """Image scores and last-level patches against transformers' own model and parameters."""
    design, frozen = design_of(compact, context=0)
    rng = np.random.default_rng(0)
    grey = jnp.asarray(rng.random((1, 224, 224)), jnp.float32)
    got = checkpoint.encode_images(
        compact.vision, grey, encoder=compact.image_encoder, mean=compact.mean, std=compact.std
    )
    made = prompt_detector.zero_shot(compact, frozen, design, got, 1)

    theirs = Theirs.from_pretrained(hf_weights.EMBEDDED)
    params = theirs.params
    pixels = np.asarray(checkpoint.normalise(grey, compact.mean, compact.std)).transpose(0, 3, 1, 2)

    @jax.jit
    def reference(params):
        ids = design.prompts.ids
        text = theirs.get_text_features(ids, params=params)
        image = theirs.get_image_features(pixels, params=params)
        last = theirs(ids, pixels, params=params, output_hidden_states=True)
        tokens = last.vision_model_output.hidden_states[-1][:, 1:]
        return text, image, tokens

    text, image, last = reference(params)
    norm = params["vision_model"]["post_layernorm"]
    centred = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
    joint = (centred * norm["scale"][None, None] + norm["bias"][None, None]) @ params[
        "visual_projection"
    ]["kernel"]
    pair = np.stack([text[:2].mean(0), text[2]])

    def logit(v):
        v = v / np.linalg.norm(v, axis=-1, keepdims=True)
        both = v @ (pair / np.linalg.norm(pair, axis=-1, keepdims=True)).T
        return np.exp(params["logit_scale"]) * (both[..., 1] - both[..., 0])

    scores = detector.score(made, got)
    np.testing.assert_allclose(scores.image, logit(image), atol=2e-3)
    np.testing.assert_allclose(scores.patch, logit(joint), atol=5e-3)
    jax.tree.map(np.testing.assert_array_equal, made.calibration, scores)
    assert not made.stochastic


def test_without_supports_the_decision_is_where_both_classes_are_equally_likely(tiny):
    design, frozen = design_of(tiny, context=0)
    made = prompt_detector.zero_shot(tiny, frozen, design, None, 0)
    result = detector.calibrate(made, **RATES)
    got = score_batch(made, result, tokens(3), jax.random.split(jax.random.key(0), 2))
    np.testing.assert_array_equal(got.alarm, np.asarray(detector.score(made, tokens(3)).image) > 0)
    assert np.isnan(got.p_value).all() and result.k == 0
    steps = {"median": 3.0, "sigma": 2.0, "ceiling": 1.0}
    filtered = detector.calibrate(made, **RATES, filter_steps=steps)
    assert filtered == result._replace(healthy=filtered.healthy, filter=MapFilter(3, sigma=2.0))
