"""Checks of explanations in a run: by hand, on a detector that is known, and through evaluate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy import stats

from medclip_jax.clip import resnet
from medclip_jax.clip.layers import Features
from medclip_jax.detectors import calibration, detector
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.explain import faithfulness, grad_cam
from medclip_jax.features import cache
from tests.support.paths import REFERENCE
from tests.support.scenes import thresholds_of

RESNET = REFERENCE / "clip_resnet"


def total(params, batch, key):
    """Anomaly of a patch: the sum of its last layer."""
    patch = batch.levels[-1].sum(-1)
    return Scores(patch, patch.max(1))


def test_deletion_replaces_the_most_important_first():
    rng = np.random.default_rng(0)
    level = rng.random((2, 16, 3)).astype(np.float32)
    tokens = Features(np.zeros((2, 4), np.float32), (level,))
    healthy = Features(np.zeros((1, 4), np.float32), (np.zeros((1, 16, 3), np.float32),))
    value = level.sum(-1)
    orders = {"map": value, "worst": -value}
    made = Detector(total, {}, None, None, 0, False, 32)
    found = faithfulness.deletion(made, tokens, healthy, orders, thresholds_of(), top=1.0)
    assert found["share"] == [i / 8 for i in range(9)]
    for name, sign in (("map", 1), ("worst", -1)):
        order = np.argsort(-sign * value, axis=1)
        wanted = []
        for count in range(0, 17, 2):
            left = value.copy()
            np.put_along_axis(left, order[:, :count], 0, axis=1)
            wanted.append(calibration.to_unit(left.mean(1), 0.0, 1.0).mean())
        np.testing.assert_allclose(found[name], wanted, atol=1e-6)
    assert found["map"][0] == found["worst"][0] and found["map"][-1] == found["worst"][-1]
    assert np.mean(found["map"]) < np.mean(found["worst"])
    peaked = thresholds_of()._replace(peak=0.25)  # the threshold is that of lowered maps
    found = faithfulness.deletion(made, tokens, healthy, orders, peaked, top=1.0)
    lowered = value - 0.25 * (value.max(1) - np.median(value, 1))[:, None]
    first = calibration.to_unit(lowered.mean(1), 0.0, 1.0).mean()
    assert found["map"][0] == pytest.approx(first, abs=1e-6)


def test_coarse_levels_and_inputs_lose_the_same_place():
    gone = np.zeros((2, 16), bool)
    gone[1, [0, 1, 4]] = True  # three of the first 2 x 2 cell
    fine, coarse = np.ones((1, 16, 2), np.float32), np.ones((1, 4, 2), np.float32)
    inputs = np.ones((1, 17, 2), np.float32)
    whole = Features(np.ones((1, 3), np.float32), (coarse, fine), (inputs,))
    made = faithfulness.replaced(whole, whole._replace(
        levels=(0 * coarse, 0 * fine), inputs=(0 * inputs,)), 0, gone)  # fmt: skip
    assert made.pooled.shape == (2, 3)
    np.testing.assert_array_equal(made.levels[1][..., 0], 1.0 - gone)
    np.testing.assert_array_equal(made.levels[0][..., 0], [[1, 1, 1, 1], [0, 1, 1, 1]])
    np.testing.assert_array_equal(made.inputs[0][1, :, 0], [1, *(1.0 - gone[1])])
    bare = whole._replace(inputs=(inputs[:, 1:],))  # of an encoder without a class token
    made = faithfulness.replaced(bare, bare._replace(inputs=(0 * inputs[:, 1:],)), 0, gone)
    np.testing.assert_array_equal(made.inputs[0][..., 0], 1.0 - gone)


def test_of_model_on_a_bank(scene):
    feature_cache, supports, test, made = scene
    how = grad_cam.Explanation(top=0.25)
    asked = dict(how=how, count=8, randomised=True, seed=0)
    found = faithfulness.of_model(made, feature_cache, supports[0], test, thresholds_of(), **asked)
    assert found["images"] == [r.id for r in test if r.label]
    curves = found["deletion"]
    assert set(curves) == {"share", "map", "grad_cam", "random"}
    ends = np.array([[curves[n][0], curves[n][-1]] for n in ("map", "grad_cam", "random")])
    np.testing.assert_allclose(ends, ends[[0, 0, 0]], atol=1e-6)
    # all replaced: the support's own score
    (own,) = cache.load_images(feature_cache, supports[:1], 1)
    values = np.sort(np.asarray(detector.score(made, own).patch), axis=1)[:, -4:].mean()
    unit = calibration.to_unit(np.array(values), 0.0, 1.0)
    assert ends[0, 1] == pytest.approx(float(unit), abs=1e-5)
    assert -1 <= found["spearman"] <= 1
    for told in found["randomised"].values():
        assert set(told) == {"map", "grad_cam"} and all(x < 0.999 for x in told.values())
    again = faithfulness.of_model(made, feature_cache, supports[0], test, thresholds_of(), **asked)
    assert again == found
    plain = asked | {"randomised": False}
    plain = faithfulness.of_model(made, feature_cache, supports[0], test, thresholds_of(), **plain)
    assert plain == {name: x for name, x in found.items() if name != "randomised"}


def test_where_there_is_nothing_to_check(scene):
    feature_cache, supports, test, made = scene
    asked = dict(how=grad_cam.Explanation(top=0.25), randomised=False, seed=0)
    held = feature_cache, supports[0], test, thresholds_of()
    assert faithfulness.of_model(made, *held, count=0, **asked) is None
    pixels = made._replace(read=lambda *_: iter(()))
    assert faithfulness.of_model(pixels, *held, count=4, **asked) is None
    healthy = [r for r in test if not r.label]
    held = feature_cache, supports[0], healthy, thresholds_of()
    assert faithfulness.of_model(made, *held, count=4, **asked) is None
    flat = made._replace(apply=lambda p, b, k: Scores(jnp.zeros((len(b.pooled), 16)), None))
    held = feature_cache, supports[0], test, thresholds_of()
    assert faithfulness.of_model(flat, *held, count=4, **asked) is None


def test_rank_correlation_is_spearman():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, (3, 20)), rng.random((3, 20))
    wanted = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(faithfulness.rank_correlation(a, b), wanted)
    assert np.isnan(faithfulness.rank_correlation(np.zeros((1, 4)), b[:1, :4])).all()


def test_randomised_encoders_keep_norms_and_other_blocks(tiny):
    key = jax.random.key(5)
    for last, kept in ((True, 3), (False, 0)):
        vision = faithfulness.reinitialised(tiny.image_encoder, tiny.vision, key, last)
        old, new = (x["vision_model"]["encoder"]["layers"] for x in (tiny.vision, vision))
        old, new = (jax.tree.map(lambda *x: np.stack(x), *x.values()) for x in (old, new))
        norms = (x["layer_norm1"]["scale"] for x in (old, new))
        np.testing.assert_array_equal(*norms)
        old, new = (x["mlp"]["fc1"]["kernel"] for x in (old, new))
        np.testing.assert_array_equal(old[:kept], new[:kept])
        assert (old[kept:] != new[kept:]).mean() > 0.99
        assert float(new[-1].std()) == pytest.approx(float(old[-1].std()), rel=0.1)


def test_randomised_stages_of_a_resnet():
    params, encoder = resnet.read(load_file(RESNET / "tower.safetensors"))
    params = jax.tree.map(jnp.asarray, params)
    new = faithfulness.reinitialised(encoder, params, jax.random.key(0), True)
    for name, block in params.items():
        leaves = zip(*map(jax.tree.leaves, (block, new[name])), strict=True)
        changed = any((a != b).any() for a, b in leaves)
        assert changed == name.startswith("layer4")
