"""Pixel metrics against the reference fixtures, brute force and cases worked out by hand."""

import json
import tracemalloc
import warnings

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from medclip_jax.evaluation import metrics, pixel_metrics
from medclip_jax.evaluation.pixel_metrics import IMAGE_BINS, PixelMetrics
from tests.support.pixels import pixel_level
from tests.support.reference import reference_files

PIXEL_KEYS = (
    "auroc auprc accuracy precision recall f1 specificity balanced_accuracy mcc iou dice "
    "tp tn fp fn hausdorff hausdorff95 boundary_f1 aupro oracle_dice "
    "hausdorff_or_diagonal hausdorff95_or_diagonal hausdorff_images "
    "hausdorff95_images hausdorff_or_diagonal_images hausdorff95_or_diagonal_images "
    "boundary_f1_images"
)


@pytest.fixture(params=reference_files("metrics_*.npz"), ids=lambda p: p.stem)
def fixture(request):
    with np.load(request.param) as arrays:
        return dict(arrays), json.loads(request.param.with_suffix(".json").read_text())


def measured(maps, masks, spacing=(1.0, 1.0), **settings) -> PixelMetrics:
    done = PixelMetrics(**settings)
    for pair in zip(maps, masks, strict=True):
        done.add(*pair, spacing)
    return done


def test_pooled_metrics_meet_reference(fixture):
    arrays, expected = fixture
    got = pixel_level(iter(arrays["pixel_maps"]), iter(arrays["pixel_masks"]))
    assert sorted(got) == sorted(PIXEL_KEYS.split())
    pooled = expected["pixel_pooled"]
    assert got["auroc"] == pytest.approx(pooled["auroc"], abs=1e-12)
    assert got["auprc"] == pytest.approx(pooled["average_precision"], abs=1e-12)
    assert got["iou"] == pytest.approx(pooled["iou_pooled"], abs=1e-12)
    assert got["dice"] == pytest.approx(pooled["dice_pooled"], abs=1e-12)
    maps, masks = (np.stack(arrays[f"pixel_{x}"]).ravel() for x in ("maps", "masks"))
    dice = [2 * masks[maps >= t].sum() / ((maps >= t).sum() + masks.sum()) for t in np.unique(maps)]
    assert got["oracle_dice"] == pytest.approx(max(dice), abs=1e-12) and max(dice) >= got["dice"]
    assert [got[k] for k in ("tp", "tn", "fp", "fn")] == list(arrays["pix_tp_tn_fp_fn"].sum(0))
    assert got["aupro"] == pytest.approx(expected["aupro"]["limit0.3_conn8"], abs=1e-10)
    finite = np.isfinite(arrays["pix_hd_monai"])
    assert got["hausdorff"] == pytest.approx(arrays["pix_hd_monai"][finite].mean(), abs=1e-5)
    assert got["hausdorff95"] == pytest.approx(arrays["pix_hd95_monai"][finite].mean(), abs=1e-5)
    either = ~np.isnan(arrays["pix_dice"])
    assert got["boundary_f1"] == pytest.approx(arrays["pix_bf1_tol2"][either].mean(), abs=1e-9)


def test_metrics_of_each_image_meet_reference(fixture):
    arrays, expected = fixture
    maps, masks = arrays["pixel_maps"], arrays["pixel_masks"]
    for tolerance in (1, 2, 3):
        got = measured(maps, masks, tolerance=tolerance).per_image()
        bf1 = arrays[f"pix_bf1_tol{tolerance}"]
        np.testing.assert_allclose(got["boundary_f1"], bf1, atol=1e-9)
    counts = np.stack([got[k] for k in ("tp", "tn", "fp", "fn")], 1)
    np.testing.assert_array_equal(counts, arrays["pix_tp_tn_fp_fn"])
    np.testing.assert_allclose(got["iou"], arrays["pix_iou"], atol=1e-12)
    np.testing.assert_allclose(got["dice"], arrays["pix_dice"], atol=1e-12)
    np.testing.assert_allclose(got["hausdorff"], arrays["pix_hd_monai"], atol=1e-4)
    np.testing.assert_allclose(got["hausdorff95"], arrays["pix_hd95_monai"], atol=1e-4)
    dice = expected["pixel_pooled"]["dice_mean_skip_both_empty"]
    assert np.nanmean(got["dice"]) == pytest.approx(dice, abs=1e-12)


def test_surface_distances_meet_medpy(fixture):
    arrays, _ = fixture
    pairs = zip(arrays["pixel_maps"] >= 0.5, arrays["pixel_masks"] == 1, strict=True)
    for index, (predicted, mask) in enumerate(pairs):
        d1, d2 = pixel_metrics.surface_distances(predicted, mask)
        if len(d1) and len(d2):
            assert np.mean(d1 <= 2) == pytest.approx(arrays["pix_bprec_tol2"][index], abs=1e-9)
            assert np.mean(d2 <= 2) == pytest.approx(arrays["pix_brec_tol2"][index], abs=1e-9)
            hausdorff = pixel_metrics.hausdorff((d1, d2))
            assert hausdorff == pytest.approx(arrays["pix_hd_medpy"][index])
            pooled = np.concatenate([d1, d2])
            assert np.percentile(pooled, 95) == pytest.approx(arrays["pix_hd95_medpy"][index])
            assert pooled.mean() == pytest.approx(arrays["pix_assd_medpy"][index])


def test_hausdorff95_is_of_the_larger_direction():
    d1, d2 = np.arange(101.0), np.arange(11.0)
    assert pixel_metrics.hausdorff95((d1, d2)) == pixel_metrics.hausdorff95((d2, d1)) == 95.0


def test_distances_say_how_many_images_and_what_a_missed_lesion_costs():
    """3-4-5: one lesion found 2 mm off, one missed, one false alarm, one healthy image."""
    lesion, beside, empty = (np.zeros((30, 20), bool) for _ in range(3))
    lesion[10:14, 5:9], beside[10:14, 6:10] = True, True
    got = pixel_metrics.PixelMetrics(tolerance=1)
    for predicted, mask in ((beside, lesion), (empty, lesion), (lesion, empty), (empty, empty)):
        got.add(predicted.astype(np.float32), mask, spacing=(1.0, 2.0))
    diagonal = 50.0  # 30 mm by 40 mm
    pooled = got.pooled()
    assert (pooled["hausdorff"], pooled["hausdorff_images"]) == (2.0, 1)
    assert pooled["hausdorff_or_diagonal"] == (2.0 + diagonal) / 2
    assert pooled["hausdorff95_or_diagonal"] == (pooled["hausdorff95"] + diagonal) / 2
    assert pooled["hausdorff_or_diagonal_images"] == pooled["hausdorff95_or_diagonal_images"] == 2
    assert pooled["boundary_f1_images"] == 3
    np.testing.assert_equal(got.averaged()["hausdorff_or_diagonal"], [2, 50, np.nan, np.nan])


def test_empty_masks():
    empty, square = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    square[3:6, 3:6] = True
    got = measured(np.stack([square, empty, empty]).astype(np.float32), [empty, square, empty])
    each = got.per_image()
    np.testing.assert_equal(each["hausdorff"], [np.inf, np.inf, np.nan])
    np.testing.assert_equal(each["hausdorff95"], [np.nan, np.nan, np.nan])
    np.testing.assert_equal(each["boundary_f1"], [0, 0, 1])
    np.testing.assert_equal(each["dice"], [0, 0, np.nan])
    # an image counts in a mean where both (distances) or either (F1) have a pixel
    np.testing.assert_equal(got.averaged()["boundary_f1"], [0, 0, np.nan])
    assert got.pooled()["boundary_f1"] == 0 and np.isnan(got.pooled()["hausdorff"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        healthy = pixel_level(empty[None].astype(float), empty[None])
    undefined = "auroc auprc iou dice hausdorff hausdorff95 boundary_f1 aupro".split()
    assert np.isnan([healthy[key] for key in undefined]).all()
    assert (healthy["tn"], healthy["accuracy"], healthy["specificity"]) == (81, 1.0, 1.0)
    full = pixel_level(np.ones((1, 4, 4)), np.ones((1, 4, 4), bool))
    assert np.isnan(full["auroc"]) and np.isnan(full["aupro"]) and full["auprc"] == 1.0


def test_distances_in_millimetres():
    maps, masks = np.zeros((2, 20, 20)), np.zeros((2, 20, 20), bool)
    maps[:, 2, 2] = 1.0
    masks[:, 5, 6] = True  # 3 rows and 4 columns away
    assert pixel_level(maps, masks)["hausdorff"] == 5.0
    got = pixel_level(maps, masks, spacing=[(1.0, 0.0001), (4.0, 1.25)], tolerance=3.1)
    assert got["hausdorff"] == pytest.approx(8.0)  # 3 and 13
    assert got["boundary_f1"] == 0.5


@pytest.mark.parametrize("columns", [[3], [1, 3, 5]])
def test_aupro_analytic_case_of_anomalib(columns):
    """anomalib, tests/unit/metrics/aupro: 1/6 up to a false-positive rate of 1/3."""
    mask = np.zeros((400, 7), bool)
    mask[:, columns] = True
    done = measured([np.arange(2800).reshape(400, 7) / 2800], [mask])
    aupro = metrics.aupro(*metrics.pro_curve(done.counts[None]), limit=1 / 3)
    assert aupro[0] == pytest.approx(1 / 6, abs=1e-3)


def test_pro_curve_meets_reference(fixture):
    arrays, expected = fixture
    done = measured(arrays["pixel_maps"], arrays["pixel_masks"])
    assert done.components == expected["aupro"]["n_components_conn8"]
    curve = metrics.pro_curve(done.counts[None, :, done.counts[:2].any(0)])
    for limit in (0.05, 0.3, 1.0):
        want = expected["aupro"][f"limit{limit}_conn8"]
        assert metrics.aupro(*curve, limit)[0] == pytest.approx(want, abs=1e-10)
    np.testing.assert_allclose(curve[0][0], arrays["pro_curve_fpr"], atol=1e-12)
    np.testing.assert_allclose(curve[1][0], arrays["pro_curve_pro"], atol=1e-12)


def continuous_maps(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.normal(size=(6, 40, 50)), (0, 4, 4)) > 0.08
    return 1 / (1 + np.exp(-rng.normal(size=masks.shape) - masks)), masks


def exact_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Every distinct score a threshold, region by region."""
    thresholds = np.unique(maps)[::-1]
    normal = np.sort(maps[~masks])
    fpr = 1 - np.searchsorted(normal, thresholds) / len(normal)
    overlaps = []
    for values, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        for region in range(1, count + 1):
            inside = np.sort(values[labels == region])
            overlaps.append(1 - np.searchsorted(inside, thresholds) / len(inside))
    fpr = np.append(0.0, fpr)
    pro = np.append(0.0, np.mean(overlaps, 0))
    x = np.append(fpr[fpr <= limit], limit)
    return float(np.trapezoid(np.append(pro[fpr <= limit], np.interp(limit, fpr, pro)), x) / limit)


def test_bins_cost_less_than_a_millionth():
    maps, masks = continuous_maps(1)
    got = pixel_level(maps, masks)
    assert got["auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-6)
    exact = average_precision_score(masks.ravel(), maps.ravel())
    assert got["auprc"] == pytest.approx(exact, abs=1e-5)
    assert got["aupro"] == pytest.approx(exact_aupro(maps, masks, 0.3), abs=1e-6)


def test_histograms_of_images_are_those_of_all_together():
    """Maps with a value per bin: the sum of the images' own histograms has the pooled metrics."""
    rng = np.random.default_rng(1)
    maps = (rng.integers(0, IMAGE_BINS, (6, 20, 30)) / IMAGE_BINS).astype(np.float16)
    masks = rng.random((6, 20, 30)) < 0.2 + 0.4 * maps
    done = PixelMetrics()
    total = sum(done.add(*pair) for pair in zip(maps, masks, strict=True))[None]
    wanted = done.pooled()
    tp, tn, fp, fn = metrics.confusion_from(total, IMAGE_BINS // 2)
    got = metrics.ranking(total) | metrics.rates(tp, tn, fp, fn) | metrics.overlap(tp, fp, fn)
    assert {"aupro", "dice", "mcc"} < set(got)
    for name, value in got.items():
        assert value[0] == pytest.approx(wanted[name], abs=1e-9), name


def test_images_of_any_size_are_pooled():
    maps, masks = continuous_maps(3)
    whole = pixel_level(maps, masks)
    cut = [slice(None, 20), slice(20, None)]
    parts = pixel_level(
        [m[rows] for m in maps for rows in cut], [m[rows] for m in masks for rows in cut]
    )
    for key in ("tp", "tn", "fp", "fn", "auroc", "auprc"):
        assert whole[key] == pytest.approx(parts[key], abs=1e-12), key


def test_aupro_never_exceeds_one():
    """Values above 1 reached the literature (anomalib issue 2442)."""
    masks = np.random.default_rng(0).random((40, 30, 30)) < 0.1
    assert pixel_level(masks.astype(np.float32), masks)["aupro"] == 1.0
    assert pixel_level(1 - masks.astype(np.float32), masks)["aupro"] == pytest.approx(0)


def test_the_threshold_itself_is_positive_in_double_precision():
    """float32(0.1) is above 0.1 and float32(0.3) above 0.3; float32(0.7) is below 0.7."""
    values, mask = np.array([[0.1, 0.3, 0.7]], np.float32), np.zeros((1, 3), bool)
    for threshold, positives in ((0.1, 3), (0.3, 2), (0.7, 0)):
        assert measured([values], [mask], threshold=threshold).per_image()["fp"][0] == positives


def test_memory_does_not_grow_with_the_set():
    """60 generated images (4 MB) need no more than 4 images do."""
    heat, mask = np.full((128, 128), 0.75, np.float32), np.eye(128, dtype=bool)

    def peak(count: int) -> int:
        tracemalloc.start()
        pixel_level((heat + 0 for _ in range(count)), (mask.copy() for _ in range(count)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(60) < peak(4) + 1e6


def test_wrong_input_is_named():
    maps, masks = np.zeros((2, 4, 4)), np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(ValueError, match="shorter"):
        pixel_level(maps, masks[:1])
    with pytest.raises(metrics.MetricError, match="Mask 0 has shape"):
        pixel_level(maps, masks[:, :3])
    with pytest.raises(metrics.MetricError, match="Mask 1 has values"):
        pixel_level(maps, masks + np.array([0, 255], np.uint8)[:, None, None])
    for wrong in (np.nan, np.inf, -0.1, 1.1):
        maps[1, 2, 2] = wrong
        with pytest.raises(metrics.MetricError, match=r"Map 1 has values outside \[0, 1\]"):
            pixel_level(maps, masks)
    with pytest.raises(metrics.MetricError, match="no maps"):
        pixel_level([], [])


def test_pointing_of_map_and_grad_cam_by_hand():
    maps, masks = np.zeros((3, 8, 8), np.float32), np.zeros((3, 8, 8), bool)
    masks[:2, :4, :4] = True
    maps[0, 1, 1] = maps[1, 7, 7] = 1
    cams = np.zeros((3, 16), np.float32)
    cams[:2, 0] = 1  # the upper left patch of 4 x 4
    measured = pixel_metrics.pointing(iter(maps), cams, masks)
    assert measured["map"] == {"hit": 0.5, "chance": 0.25, "n": 2, "empty": 0}
    assert measured["grad_cam"] == {"hit": 1.0, "chance": 0.25, "n": 2, "empty": 0}
    cams[1] = 0  # points nowhere: a miss, not the chance of a constant map
    measured = pixel_metrics.pointing(maps, cams, masks)
    assert measured["grad_cam"] == {"hit": 0.5, "chance": 0.25, "n": 2, "empty": 1}
    assert set(pixel_metrics.pointing(maps, None, masks)) == {"map"}
    inside = [np.s_[:, :4]] * 3  # the rest is padding: where the second map is largest
    maps[1, 2, 2] = 0.5
    padded = pixel_metrics.pointing(maps, None, masks, inside)
    assert padded["map"] == {"hit": 1.0, "chance": 0.5, "n": 2, "empty": 0}
    assert pixel_metrics.pointing(maps, cams, np.zeros_like(masks)) is None
