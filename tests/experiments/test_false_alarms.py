"""Thresholds keep what they promise for simulated healthy images of three kinds."""

from functools import partial

import false_alarms
import numpy as np
import pytest

from medclip_jax.detectors import calibration

MORE = partial(pytest.param, marks=pytest.mark.slow)  # of the same with other K


@pytest.mark.parametrize("kind", false_alarms.KINDS)
@pytest.mark.parametrize("k, draws", [(4, 4000), (8, 4000), (16, 4000), (32, 2000)])
def test_fused_scores_keep_the_rate(kind, k, draws):
    """Neither more nor fewer than promised, with and without correlation."""
    for branches, correlation in ((2, 0.5), (3, 0.0)):
        promise, seen, error, others = false_alarms.image_rate(
            kind, k, branches, correlation, draws
        )
        assert promise == pytest.approx(max(1, (k + 1) // 10) / (k + 1))
        assert abs(seen - promise) < 2 * error
    if k == 4 and kind == "lognormal":
        assert others["by all"] > promise + 2 * error  # as in version 0.1


@pytest.mark.parametrize("kind", false_alarms.KINDS)
@pytest.mark.parametrize("k", [4, 8, 16, 32])
def test_single_scores_have_the_rate(kind, k):
    rng, draws = np.random.default_rng(k), 4000
    scores = false_alarms.drawn(rng, kind, (draws, k + 1, 1), 0.0)[..., 0]
    p = [calibration.p_values(row[k:], row[:k])[0] for row in scores]
    promise = calibration.threshold(scores[0, :k], 0.1, proven=True).bound
    error = (promise * (1 - promise) / draws) ** 0.5
    assert abs(np.mean(np.array(p) <= promise + 1e-12) - promise) < 3 * error


@pytest.mark.parametrize("kind", false_alarms.KINDS)
@pytest.mark.parametrize("k, draws", [(4, 40), MORE(8, 25), (32, 10)])
def test_pixel_thresholds_keep_their_share(kind, k, draws):
    """One branch: the proven bound, attainable or not. Fused maps: what is to be expected."""
    for rate in (0.02, 0.25):
        bound, seen, error = false_alarms.pixel_rate(kind, k, 1, 0.5, draws, rate, proven=True)
        assert bound == pytest.approx(rate if rate * (k + 1) >= 1 else (k * rate + 1) / (k + 1))
        assert seen < bound + 2 * error
        expected, seen, error = false_alarms.pixel_rate(kind, k, 2, 0.5, draws, rate)
        assert seen < expected + 2 * error


def test_the_script_prints_a_row_for_each_case(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["false_alarms", "--draws", "10"])
    monkeypatch.setattr(false_alarms, "KINDS", ("normal",))
    monkeypatch.setattr(false_alarms, "image_rate", lambda *_: (0.2, 0.19, 0.01, {"cv+": 0.2}))
    monkeypatch.setattr(false_alarms, "pixel_rate", lambda *_, **__: (0.02, 0.018, 0.001))
    false_alarms.main()
    rows = capsys.readouterr().out.splitlines()
    assert "| normal | 2 | 0.0 | 4 | 0.200 | 0.190 ± 0.010 | 0.200 |" in rows
    assert "| normal | 1 | 0.3 | 4 | 0.02 | 0.020 | 0.0180 ± 0.0010 |" in rows
