"""The table of changed maps: raw values come back, and perfect maps have perfect metrics."""

import map_shapes
import numpy as np

from medclip_jax.detectors import calibration
from medclip_jax.models import similarity


def test_raw_values_come_back_from_unit_maps():
    raw = np.random.default_rng(0).normal(2, 3, (2, 8, 8))
    unit = calibration.to_unit(raw, 1.5, 0.7)
    np.testing.assert_allclose(1.5 + 0.7 * map_shapes.of_unit(unit), raw, atol=1e-5)


def test_changed_maps_are_measured():
    masks = np.zeros((3, 32, 32), bool)
    masks[0, 4:12, 4:12] = masks[1, 20:30, 2:9] = True
    rng = np.random.default_rng(1)
    maps = (masks * 5 + rng.random(masks.shape)).astype(np.float32)
    healthy = np.array([False, False, True])
    auroc, auprc, aupro, dice, oracle = map_shapes.measured(maps, masks, healthy)
    assert (auroc, auprc, aupro, oracle) == (1, 1, 1, 1) and 0.8 < dice < 1
    named = map_shapes.changed(maps, 2, corners=True)
    assert {x.shape for x in named.values()} == {(3, 32, 32)}
    for grid in (2, 4):  # patches of 16 and of 8 pixels
        patch = rng.normal(size=(1, grid, grid))
        one, two = (similarity.interpolation(grid, 32, corners) for corners in (True, False))
        moved = map_shapes.changed(one @ patch @ one.T, grid, corners=True)
        expected = two @ patch @ two.T
        np.testing.assert_allclose(moved["patches at their centres"], expected, atol=1e-5)
    np.testing.assert_array_equal(named["peak 0.25"], calibration.lowered(maps, 0.25))
