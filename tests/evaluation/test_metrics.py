"""Metrics against the reference fixtures, closed forms and brute force."""

import json
import tracemalloc
import warnings

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from medclip_jax.errors import DataError, UserError
from medclip_jax.evaluation import metrics, pixel_metrics
from medclip_jax.evaluation.ranking import PixelRanks
from medclip_jax.evaluation.surface_distance import (
    hausdorff,
    hausdorff95,
    outline_scores,
    surface_distances,
)
from tests.support.reference import reference_files

FIXTURES = reference_files("metrics_*.npz")
IMAGE_KEYS = (
    "auroc auprc accuracy precision recall f1 specificity balanced_accuracy mcc fpr tpr threshold"
)
PIXEL_KEYS = (
    "auroc auprc accuracy precision recall f1 specificity balanced_accuracy mcc iou dice "
    "tp tn fp fn hausdorff hausdorff95 boundary_f1 aupro"
)


@pytest.fixture(params=FIXTURES, ids=lambda p: p.stem)
def fixture(request):
    with np.load(request.param) as arrays:
        return dict(arrays), json.loads(request.param.with_suffix(".json").read_text())


def test_image_level_meets_reference(fixture):
    arrays, expected = fixture
    scores, labels = arrays["image_scores"], arrays["image_labels"]
    for name, threshold in (("at_0.5_ge", 0.5), ("at_0.5_gt", np.nextafter(0.5, 1))):
        got = metrics.image_level(scores, labels, threshold)
        assert sorted(got) == sorted(IMAGE_KEYS.split())
        assert got["auroc"] == pytest.approx(expected["image"]["auroc"], abs=1e-12)
        ap = expected["image"]["auprc_average_precision"]
        assert got["auprc"] == pytest.approx(ap, abs=1e-12)
        for key in set(expected["image"][name]) - {"tp", "tn", "fp", "fn"}:
            assert got[key] == pytest.approx(expected["image"][name][key], abs=1e-12), key


def test_image_curves_meet_reference(fixture):
    arrays, expected = fixture
    scores, labels = arrays["image_scores"], arrays["image_labels"]
    for got, name in zip(metrics.roc(scores, labels), ("fpr", "tpr", "thresholds"), strict=True):
        np.testing.assert_allclose(got, arrays[f"roc_{name}"], atol=1e-12)
    names = ("precision", "recall", "thresholds")
    for got, name in zip(metrics.precision_recall(scores, labels), names, strict=True):
        np.testing.assert_allclose(got, arrays[f"pr_{name}"], atol=1e-12)
    image = expected["image"]
    assert metrics.fpr_at(scores, labels, 0.95) == pytest.approx(image["fpr_at_tpr_ge_0.95"])
    f1, threshold = metrics.oracle_f1(scores, labels)
    assert f1 == pytest.approx(image["max_f1"], abs=1e-12)
    assert threshold == pytest.approx(image["max_f1_threshold"], abs=1e-12)


def test_image_edge_cases(fixture):
    for name, case in fixture[1]["image_edge_cases"].items():
        scores = np.array(case["scores"], float)  # null becomes NaN
        labels = np.array(case["labels"], int)
        if "ValueError" in case["expected"] and "AUROC" not in case["expected"]:
            with pytest.raises(ValueError):
                metrics.image_level(scores, labels)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = metrics.image_level(scores, labels)
        for key in ("precision", "recall", "f1"):
            assert got[key] == pytest.approx(case["at_0.5_ge"][f"sklearn_{key}_zero_division_0"])
        assert got["mcc"] == case["at_0.5_ge"]["sklearn_mcc"]
        if name == "constant_scores":
            assert (got["auroc"], got["auprc"]) == (0.5, 0.25)
        else:
            assert np.isnan(got["auroc"])
            np.testing.assert_equal(got["auprc"], 1.0 if name == "all_positive" else np.nan)


def test_one_class_rates_are_nan():
    healthy = metrics.image_level(np.array([0.1, 0.9]), np.array([0, 0]))
    assert healthy["fpr"] == healthy["specificity"] == 0.5
    assert np.isnan([healthy["tpr"], healthy["balanced_accuracy"]]).all()
    ill = metrics.image_level(np.array([0.1, 0.9]), np.array([1, 1]))
    assert np.isnan([ill["fpr"], ill["specificity"], ill["balanced_accuracy"]]).all()
    assert np.isnan(metrics.sensitivity_at(np.array([0.1, 0.9]), np.array([1, 1])))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_undefined_scores_name_the_image(bad):
    with pytest.raises(metrics.MetricError, match="image 2 "):
        metrics.image_level(np.array([0.1, 0.2, bad]), np.array([0, 1, 1]))
    maps, masks = np.zeros((4, 5, 6)), np.zeros((4, 5, 6), bool)
    maps[3, 1, 1] = bad
    for source in (maps, iter(maps)):
        with pytest.raises(metrics.MetricError, match="Map 3 "):
            pixel_metrics.pixel_level(source, masks)
    assert issubclass(metrics.MetricError, (UserError, ValueError))
    assert issubclass(metrics.MetricError, DataError)


def test_sensitivity_at_specificity_by_hand():
    labels = np.array([0] * 10 + [1] * 4)
    scores = np.concatenate([np.arange(10) / 10, [0.95, 0.85, 0.75, 0.05]])
    # One false alarm in ten (0.9) leaves thresholds above 0.8.
    assert metrics.sensitivity_at(scores, labels, 0.9) == 0.5
    assert metrics.sensitivity_at(scores, labels, 1.0) == 0.25


def test_pixel_level_meets_reference(fixture):
    arrays, expected = fixture
    got = pixel_metrics.pixel_level(arrays["pixel_maps"], arrays["pixel_masks"])
    assert sorted(got) == sorted(PIXEL_KEYS.split())
    pooled = expected["pixel_pooled"]
    assert got["auroc"] == pytest.approx(pooled["auroc"], abs=1e-12)
    assert got["auprc"] == pytest.approx(pooled["average_precision"], abs=1e-12)
    assert got["iou"] == pytest.approx(pooled["iou_pooled"], abs=1e-12)
    assert got["dice"] == pytest.approx(pooled["dice_pooled"], abs=1e-12)
    assert [got[k] for k in ("tp", "tn", "fp", "fn")] == list(arrays["pix_tp_tn_fp_fn"].sum(0))
    assert got["aupro"] == pytest.approx(expected["aupro"]["limit0.3_conn8"], abs=1e-10)
    finite = np.isfinite(arrays["pix_hd_monai"])
    assert got["hausdorff"] == pytest.approx(arrays["pix_hd_monai"][finite].mean(), abs=1e-5)
    assert got["hausdorff95"] == pytest.approx(arrays["pix_hd95_monai"][finite].mean(), abs=1e-5)
    either = ~np.isnan(arrays["pix_dice"])
    assert got["boundary_f1"] == pytest.approx(arrays["pix_bf1_tol2"][either].mean(), abs=1e-9)


def test_per_image_meets_reference(fixture):
    arrays, expected = fixture
    maps, masks = arrays["pixel_maps"], arrays["pixel_masks"]
    for tolerance in (1, 2, 3):
        got = pixel_metrics.per_image(maps, masks, tolerance=tolerance)
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


def test_outline_distances_meet_medpy_and_monai(fixture):
    arrays, _ = fixture
    pairs = zip(arrays["pixel_maps"] >= 0.5, arrays["pixel_masks"] == 1, strict=True)
    for index, (predicted, mask) in enumerate(pairs):
        d1, d2 = surface_distances(predicted, mask)
        precision, recall, _ = outline_scores((d1, d2), 2)
        np.testing.assert_allclose(precision, arrays["pix_bprec_tol2"][index], atol=1e-9)
        np.testing.assert_allclose(recall, arrays["pix_brec_tol2"][index], atol=1e-9)
        if len(d1) and len(d2):
            assert hausdorff((d1, d2)) == pytest.approx(arrays["pix_hd_medpy"][index])
            pooled = np.concatenate([d1, d2])
            assert np.percentile(pooled, 95) == pytest.approx(arrays["pix_hd95_medpy"][index])
            assert pooled.mean() == pytest.approx(arrays["pix_assd_medpy"][index])


def test_empty_masks():
    empty, square = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    square[3:6, 3:6] = True
    got = pixel_metrics.per_image(
        np.stack([square, empty, empty]).astype(np.float32), np.stack([empty, square, empty])
    )
    np.testing.assert_equal(got["hausdorff"], [np.inf, np.inf, np.nan])
    np.testing.assert_equal(got["hausdorff95"], [np.nan, np.nan, np.nan])
    np.testing.assert_equal(got["boundary_f1"], [0, 0, 1])
    np.testing.assert_equal(got["dice"], [0, 0, np.nan])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        healthy = pixel_metrics.pixel_level(empty[None].astype(float), empty[None])
    for key in (
        "auroc",
        "auprc",
        "iou",
        "dice",
        "hausdorff",
        "hausdorff95",
        "boundary_f1",
        "aupro",
    ):
        assert np.isnan(healthy[key]), key
    assert (healthy["tn"], healthy["accuracy"], healthy["specificity"]) == (81, 1.0, 1.0)
    full = pixel_metrics.pixel_level(np.ones((1, 4, 4)), np.ones((1, 4, 4), bool))
    assert np.isnan(full["auroc"]) and np.isnan(full["aupro"]) and full["auprc"] == 1.0


def test_distances_in_millimetres():
    maps, masks = np.zeros((2, 20, 20)), np.zeros((2, 20, 20), bool)
    maps[:, 2, 2] = 1.0
    masks[:, 5, 6] = True  # 3 rows and 4 columns away
    assert pixel_metrics.pixel_level(maps, masks)["hausdorff"] == 5.0
    assert pixel_metrics.pixel_level(maps, masks, spacing=(2.0, 2.0))["hausdorff"] == 10.0
    each = pixel_metrics.per_image(maps, masks, spacing=[(1.0, 0.0001), (4.0, 1.25)], tolerance=3.1)
    np.testing.assert_allclose(each["hausdorff"], [3.0, 13.0], atol=1e-6)
    np.testing.assert_allclose(each["boundary_f1"], [1.0, 0.0])
    for wrong in ([(1.0, 1.0), None], [(1.0, 1.0)], [(1.0, 1.0)] * 3, (0.0, 1.0)):
        with pytest.raises(metrics.MetricError, match="pacing"):
            pixel_metrics.pixel_level(maps, masks, spacing=wrong)


def test_hausdorff95_takes_the_larger_direction():
    d1, d2 = np.arange(101.0), np.arange(11.0)
    assert hausdorff95((d1, d2)) == 95.0
    assert hausdorff95((d2, d1)) == 95.0


@pytest.mark.parametrize("columns", [[3], [1, 3, 5]])
def test_aupro_analytic_case_of_anomalib(columns):
    """anomalib, tests/unit/metrics/aupro: 1/6 up to a false-positive rate of 1/3."""
    mask = np.zeros((400, 7), bool)
    mask[:, columns] = True
    ranks = PixelRanks(0, 1)
    ranks.add(np.arange(2800).reshape(400, 7) / 2800, mask)
    assert ranks.aupro(1 / 3) == pytest.approx(1 / 6, abs=1e-3)


def test_aupro_limits_and_curve(fixture):
    arrays, expected = fixture
    ranks = PixelRanks(0, 1)
    for values, mask in zip(arrays["pixel_maps"], arrays["pixel_masks"] == 1, strict=True):
        ranks.add(values, mask)
    assert ranks.components == expected["aupro"]["n_components_conn8"]
    for limit in (0.05, 0.3, 1.0):
        want = expected["aupro"][f"limit{limit}_conn8"]
        assert ranks.aupro(limit) == pytest.approx(want, abs=1e-10)
    fpr, pro = ranks.pro_curve()
    np.testing.assert_allclose(fpr, arrays["pro_curve_fpr"], atol=1e-12)
    np.testing.assert_allclose(pro, arrays["pro_curve_pro"], atol=1e-12)


def continuous_maps(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.normal(size=(6, 40, 50)), (0, 4, 4)) > 0.08
    return rng.normal(size=masks.shape) + masks, masks


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


@pytest.mark.parametrize("bins", [2**6, 2**10, 2**20])
def test_bins_keep_their_error_bounds(bins):
    maps, masks = continuous_maps(bins)
    ranks = PixelRanks(maps.min(), maps.max(), bins)
    for values, mask in zip(maps, masks, strict=True):
        ranks.add(values, mask)
    exact = roc_auc_score(masks.ravel(), maps.ravel())
    assert abs(ranks.auroc() - exact) <= ranks.auroc_error() + 1e-12
    exact = average_precision_score(masks.ravel(), maps.ravel())
    assert abs(ranks.average_precision() - exact) <= ranks.average_precision_error() + 1e-12
    exact = exact_aupro(maps, masks, 0.3)
    assert abs(ranks.aupro(0.3) - exact) <= ranks.aupro_error(0.3) + 1e-12
    if bins == 2**20:
        assert abs(ranks.auroc() - roc_auc_score(masks.ravel(), maps.ravel())) < 1e-6
        assert abs(ranks.aupro(0.3) - exact) < 1e-6
        assert ranks.auroc_error() < 1e-5


def test_generators_and_odd_sizes_equal_arrays():
    maps, masks = continuous_maps(3)
    maps = 1 / (1 + np.exp(-maps))
    a = pixel_metrics.pixel_level(maps, masks, value_range=(0, 1))
    assert a == pixel_metrics.pixel_level((m for m in maps), (m for m in masks))
    halves = [maps[:, :20], maps[:, 20:, :25], maps[:, 20:, 25:]]
    parts = [masks[:, :20], masks[:, 20:, :25], masks[:, 20:, 25:]]
    b = pixel_metrics.pixel_level(
        [m for half in halves for m in half], [m for part in parts for m in part]
    )
    for key in ("tp", "tn", "fp", "fn"):
        assert a[key] == b[key]
    assert a["auroc"] == pytest.approx(b["auroc"], abs=1e-6)


def test_aupro_never_exceeds_one():
    """Values above 1 reached the literature (anomalib issue 2442)."""
    rng = np.random.default_rng(0)
    masks = rng.random((40, 30, 30)) < 0.1
    assert pixel_metrics.pixel_level(masks.astype(np.float32), masks)["aupro"] == 1.0
    assert pixel_metrics.pixel_level(1 - masks.astype(np.float32), masks)["aupro"] == pytest.approx(
        0
    )


def test_thresholds_are_compared_in_double_precision():
    """float32(0.1) is above 0.1 and float32(0.3) above 0.3; float32(0.7) is below 0.7."""
    values = np.array([[0.1, 0.3, 0.7]], np.float32)
    for column, threshold, positive in ((0, 0.1, True), (1, 0.3, True), (2, 0.7, False)):
        got = pixel_metrics.per_image(values[None], np.zeros((1, 1, 3), bool), threshold)
        assert (got["fp"][0] == (values >= np.float64(threshold)).sum()).all()
        image = metrics.image_level(values[0, column : column + 1], np.array([0]), threshold)
        assert image["fpr"] == positive


def peak_memory(maps, masks) -> int:
    tracemalloc.start()
    pixel_metrics.pixel_level(maps, masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("mapped", [False, True])
def test_memory_does_not_grow_with_the_set(tmp_path, mapped):
    """300 images (25 MB) memory-mapped or generated need no more than 4 images do."""
    shape = (300, 128, 128)
    maps = np.memmap(tmp_path / "maps", np.float32, "w+", shape=shape)
    masks = np.memmap(tmp_path / "masks", bool, "w+", shape=shape)
    maps[:, :9, :9], masks[:, :7, :8] = 0.75, True

    def source(array):
        return array if mapped else (a + 0 for a in array)

    few = peak_memory(source(maps[:4]), source(masks[:4]))
    assert peak_memory(source(maps), source(masks)) < few + 2e6


def test_wrong_input_is_named():
    maps, masks = np.zeros((2, 4, 4)), np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(metrics.MetricError, match="Image 1 has no map or no mask"):
        pixel_metrics.pixel_level(maps, masks[:1])
    with pytest.raises(metrics.MetricError, match="Mask 0 has shape"):
        pixel_metrics.pixel_level(maps, masks[:, :3])
    with pytest.raises(metrics.MetricError, match="Mask 1 holds values"):
        pixel_metrics.pixel_level(maps, masks + np.array([0, 255], np.uint8)[:, None, None])
    with pytest.raises(metrics.MetricError, match="Map 0 leaves"):
        pixel_metrics.pixel_level(iter(maps - 1), masks)
    with pytest.raises(metrics.MetricError, match="no maps"):
        pixel_metrics.pixel_level([], [])


def test_threshold_itself_is_positive():
    got = pixel_metrics.pixel_level(np.full((1, 2, 2), 0.5), np.ones((1, 2, 2), bool))
    assert got["tp"] == 4
    assert metrics.image_level(np.array([0.5, 0.4]), np.array([1, 0]))["accuracy"] == 1.0
