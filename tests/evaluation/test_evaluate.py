"""Scoring a test set: what it may depend on, what is measured, and what is written."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medclip_jax import build_detector, config
from medclip_jax.data import splits
from medclip_jax.data.layouts import Record
from medclip_jax.detectors import anomaly_maps, calibration, detector
from medclip_jax.errors import DataError
from medclip_jax.evaluation import evaluate, predictions
from medclip_jax.features import cache
from medclip_jax.io import read as io_read
from medclip_jax.models import similarity
from tests.support.predicting import change, dicom
from tests.support.scenes import perfect, score


def test_scores_do_not_read_labels_or_masks(scene, scored):
    feature_cache, _, test, made = scene
    lied = [r._replace(label=1 - r.label, masks=()) for r in test]
    again = score(made, feature_cache, lied)
    for name in ("score", "p_value", "uncertainty", "maps", "patch_mean", "patch_variance"):
        np.testing.assert_array_equal(
            getattr(again.predictions, name), getattr(scored.predictions, name)
        )


def test_scores_depend_neither_on_order_nor_on_batches(scene, scored, monkeypatch):
    feature_cache, _, test, made = scene
    monkeypatch.setattr(evaluate, "BATCH", 3)
    turned = score(made, feature_cache, test[::-1])
    assert turned.predictions.id == scored.predictions.id[::-1]
    for name in ("score", "p_value", "uncertainty", "maps", "patch_mean", "patch_variance"):
        a, b = (np.array(getattr(x.predictions, name)) for x in (turned, scored))
        np.testing.assert_allclose(a[::-1], b, atol=1e-3 if name == "maps" else 1e-5)
    assert scored.predictions.uncertainty.min() > 0


def test_decision_and_p_value_agree(scored):
    p, found = scored.predictions, scored.calibration
    assert found.k == 5
    attained = 0.2  # as asked for: no bound is proven, so the threshold is between two supports
    np.testing.assert_array_equal(p.score >= 0.5, p.p_value <= attained + 1e-12)
    assert 0 < (p.score >= 0.5).mean() <= 1 and (p.score > 0).all() and (p.score < 1).all()


def test_more_healthy_images_calibrate_as_they_are_scored(scene):
    """Seven images that no fold saw, in batches of three: split conformal, the rate is proven."""
    feature_cache, supports, test, learned = scene
    ready = detector.recalibrated(learned, feature_cache, test, 3)
    thresholds = detector.calibrate(ready, alpha=0.3, pixel_rate=0.1)
    assert thresholds.k == ready.k == 7 and ready.calibration.patch.shape[0] == 7
    assert thresholds.image.bound == thresholds.image.alpha_attained == pytest.approx(2 / 8)
    assert thresholds.pixel.bound == pytest.approx((7 * 0.1 + 1) / 8)
    got = score(learned, feature_cache, test, thresholds=thresholds).predictions
    np.testing.assert_allclose(
        got.score,
        calibration.to_unit(ready.calibration.image, thresholds.image.value, thresholds.scale),
        atol=1e-5,
    )
    assert (got.score >= 0.5).sum() == 1 and got.p_value.min() == pytest.approx(2 / 8)


def test_a_score_that_is_not_finite_names_its_image(scene, monkeypatch):
    """Of the second batch's images the one with a strange token."""
    feature_cache, _, test, made = scene
    (odd,) = cache.load_images(feature_cache, test[6:], 1)

    def broken(params, batch, key):
        marked = jnp.isclose(batch.pooled[:, :1], odd.pooled[0, 0])
        scores = made.apply(params, batch, key)
        return scores._replace(patch=jnp.where(marked, jnp.nan, scores.patch))

    monkeypatch.setattr(evaluate, "BATCH", 4)
    with pytest.raises(DataError, match=f"^{test[6].id}: its score or map is not finite"):
        score(made._replace(apply=broken), feature_cache, test)


def test_half_precision_keeps_decisions():
    heat = np.array([[[0.5, np.nextafter(0.5, 0), 0.49999, 0.2, 0.50001]]])
    small = calibration.half_precision(heat)
    assert small.dtype == np.float16
    np.testing.assert_array_equal(small >= 0.5, heat >= 0.5)
    np.testing.assert_allclose(small, heat, atol=5e-4)


def test_the_truth_is_the_union_of_the_mask_files(scene):
    _, _, test, _ = scene
    wanted = np.zeros((30, 40), bool)
    wanted[2:5, 2:5] = wanted[20:25, 20:25] = True
    np.testing.assert_array_equal(evaluate.lesion_mask(test[0]), wanted)
    both = list(evaluate.Masks(test[:3], 32, "pad"))
    np.testing.assert_array_equal(both[0], io_read.fit_mask(wanted, 32, "pad"))
    assert not both[2].any()


def test_a_mask_of_another_size_is_refused(scene, tmp_path):
    _, _, test, _ = scene
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(DataError, match="small.png is 10 x 10 pixels but its image is 40 x 30"):
        evaluate.lesion_mask(test[0]._replace(masks=(tmp_path / "small.png",)))


def test_means_over_images_have_intervals(scene):
    """One of two lesions is found six rows off: the mean distance lies within its interval."""
    _, _, test, _ = scene
    said = perfect(test)
    wrong = np.array(said.predictions.maps)
    first = [i for i, r in enumerate(test) if r.label][0]
    wrong[first] = np.roll(wrong[first], 6, axis=0)
    said = said._replace(predictions=said.predictions._replace(maps=wrong))
    got = evaluate.measure(said, test, "stretch")
    for name in ("hausdorff", "hausdorff95", "boundary_f1"):
        low, high = got["intervals"]["pixel"][name]
        assert low <= got["pixel"][name] <= high and low < high, name


def test_copies_are_one_unit_of_all_intervals(scene):
    """Units that pair images widen every interval; units of one image each change none."""
    _, _, test, _ = scene
    rng, said = np.random.default_rng(0), perfect(test)
    score = np.clip(0.3 + 0.2 * said.predictions.label + rng.normal(0, 0.2, len(test)), 0, 1)
    said = said._replace(predictions=said.predictions._replace(score=score))

    def measured(unit):
        return evaluate.measure(said, with_unit(unit), "pad")

    def with_unit(unit):
        return [r._replace(unit=u) for r, u in zip(test, unit, strict=True)]

    alone = measured([-1] * len(test))["intervals"]
    assert measured(range(len(test)))["intervals"] == alone
    assert alone["image"]["auroc"].low < alone["image"]["auroc"].high
    one = [0 if r.label else 1 for r in test]  # one healthy unit and one abnormal: no interval
    assert measured(one)["intervals"] == {"image": {}, "pixel": {}}
    assert splits.unit_numbers(with_unit(one)).tolist() == one


def test_measure_counts_healthy_images_as_empty_masks(scene):
    _, _, test, _ = scene
    got = evaluate.measure(perfect(test), test, "stretch")
    assert got["image"]["auroc"] == got["pixel"]["auroc"] == got["pixel"]["dice"] == 1.0
    pixels = sum(got["pixel"][name] for name in ("tp", "tn", "fp", "fn"))
    assert pixels == len(test) * 32 * 32
    assert got["calibration"]["n_healthy_test"] == 5


def test_padding_is_no_pixel_of_an_image(scene):
    """Images of 30 x 40 pixels fill 24 x 32 of a frame of 32; a miss is as far as their diagonal.

    The threshold for pixels is of these alone, too: a share of the image, not of the square.
    """
    feature_cache, supports, test, made = scene
    named = [(r.path, r.window) for r in test[:1]]
    assert detector.places(named, 32, "stretch") is None
    assert detector.places(named, 32, "pad") == [np.s_[4:28, 0:32]]
    said = perfect(test)
    nothing = said.predictions._replace(maps=np.zeros_like(said.predictions.maps))
    got = evaluate.measure(said._replace(predictions=nothing), test, "pad")
    assert sum(got["pixel"][name] for name in ("tp", "tn", "fp", "fn")) == len(test) * 24 * 32
    assert got["pixel"]["hausdorff_or_diagonal"] == 40
    masks = [*evaluate.Masks([r for r in test if r.label], 32, "pad")]
    chance = np.mean([mask.sum() / (24 * 32) for mask in masks])
    assert got["explanations"]["pointing"]["map"]["chance"] == pytest.approx(chance)

    c = config.base()
    c.score.peak = 0.0
    padded = feature_cache._replace(fit="pad")
    found = build_detector.calibrate(c, made, padded, supports)
    maps = np.asarray(similarity.to_pixels(jnp.asarray(made.calibration.patch), 32))[:, 4:28]
    assert found.pixel == anomaly_maps.pixel_threshold(maps, c.calibration.pixel_rate)
    assert found.pixel_scale == calibration.spread(maps.ravel())


def test_measure_leaves_out_abnormal_images_whose_mask_is_unknown(scene):
    _, _, test, _ = scene
    partly = [test[0]._replace(masks=()), *test[1:]]
    got = evaluate.measure(perfect(test), partly, "stretch")["pixel"]
    assert sum(got[name] for name in ("tp", "tn", "fp", "fn")) == (len(test) - 1) * 32 * 32
    none = [r._replace(masks=()) for r in test]
    got = evaluate.measure(perfect(test), none, "stretch")
    assert got["pixel"] is None and got["image"]["auroc"] == 1.0


# --- predictions.npz ----------------------------------------------------------------------------


def test_predictions_come_back_without_pickle(scene, scored, tmp_path):
    _, _, test, _ = scene
    predictions.write_predictions(tmp_path, scored, test, "stretch", seed=0)
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as file:
        held = dict(file)
    p = scored.predictions
    assert held["id"].tolist() == list(p.id)
    for name in ("label", "score", "p_value", "uncertainty", "maps"):
        np.testing.assert_array_equal(held[name], getattr(p, name))
    assert held["frame"].tolist() == [[30, 40]] * len(test)  # pictures for the report
    predictions.write_predictions(tmp_path, scored, test, "stretch", seed=0, pictures=False)
    with np.load(tmp_path / "predictions.npz") as file:
        assert "frame" not in file and "maps" in file


@pytest.mark.parametrize("fit, wanted", [("stretch", (0.375, 1.0)), ("pad", (0.5, 1.0))])
def test_distances_are_in_millimetres_where_all_images_have_a_spacing(
    scene, monkeypatch, fit, wanted
):
    """Images of 30 x 40 pixels of 0.4 x 0.8 mm in a frame of 32."""
    _, _, test, _ = scene
    plain = evaluate.measure(perfect(test), test, fit)["pixel"]
    opened = io_read.open_image

    def with_spacing(*args, **how):
        return opened(*args, **how)._replace(spacing=(0.4, 0.8))

    monkeypatch.setattr(io_read, "open_image", with_spacing)
    assert evaluate.spacings(test, 32, fit) == [pytest.approx(wanted)] * len(test)
    said = perfect(test)
    wrong = np.array(said.predictions.maps)
    wrong[0] = np.roll(wrong[0], 2, axis=1)  # two columns off
    said = said._replace(predictions=said.predictions._replace(maps=wrong))
    got = evaluate.measure(said, test, "stretch")["pixel"]
    assert (got["distance_unit"], plain["distance_unit"]) == ("mm", "px")
    assert got["boundary_tolerance"] == plain["boundary_tolerance"] == 2
    assert got["hausdorff"] == pytest.approx(2 * 1.0 / 2)  # mean with the second, exact image


def test_one_image_without_spacing_makes_all_distances_pixels(scene, monkeypatch):
    _, _, test, _ = scene
    opened, last = io_read.open_image, test[-1].path

    def with_spacing(path, **how):
        return opened(path, **how)._replace(spacing=None if path == last else (0.4, 0.8))

    monkeypatch.setattr(io_read, "open_image", with_spacing)
    assert evaluate.spacings(test, 32, "stretch") is None


def test_images_are_measured_under_the_window_that_they_are_scored_with(tmp_path):
    """A CT whose own window cannot be used, 40 x 50 pixels of 0.5 x 0.7 mm."""
    ct = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}
    own = {"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "UNKNOWN"}
    path = change(dicom(tmp_path / "ct.dcm"), **ct, **own)
    with pytest.raises(DataError, match="unknown VOI LUT function"):
        io_read.read(path)
    record = Record("ct.dcm", 1, "test", path, (), "", window="lung")
    assert evaluate.spacings([record], 20, "stretch") == [pytest.approx((1.0, 1.75))]
    assert io_read.pixel_areas([record], 20, "stretch") == [pytest.approx(1.75)]
    assert evaluate.lesion_mask(record).shape == (40, 50)
