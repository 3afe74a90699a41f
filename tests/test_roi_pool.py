"""RoI pooling: golden cases, ties and rounding; the rest is in test_roi.py."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import ps_roi_pool, ps_roi_pool_backward, roi_pool, roi_pool_backward
from tests import reference_roi as reference
from tests.arrays import host, on
from tests.golden_cases import check_golden, golden_cases
from tests.roi_cases import random_case


@pytest.mark.parametrize(("case", "dtype"), golden_cases("roi_pool"))
def test_golden_cases(case, dtype, xp):
    check_golden(case, dtype, roi_pool, roi_pool_backward, xp)


@pytest.mark.parametrize(("case", "dtype"), golden_cases("ps_roi_pool"))
def test_golden_cases_of_ps_roi_pool(case, dtype, xp):
    check_golden(case, dtype, ps_roi_pool, ps_roi_pool_backward, xp)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(10))
def test_the_first_of_equal_pixels_wins(seed, dtype, xp):
    """0 and −0 are equal, and NaN is larger than any number, whatever its sign."""
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case("roi_pool", rng)
    values = [0.0, -0.0, -1.0, -1.5, -np.inf] + [np.nan, -np.nan, np.inf] * (seed % 2)
    arrays["x"] = rng.choice(values, arrays["x"].shape)
    given = on(xp, {key: a.astype(dtype) for key, a in arrays.items()})
    want = reference.pool("roi_pool", **arrays, **keywords)
    assert_array_equal(host(xp, roi_pool(**given, **keywords)), want)
    grad_y = rng.integers(1, 9, want.shape).astype(float)
    want = reference.pool_backward("roi_pool", grad_y, **arrays, **keywords)["x"]
    have = roi_pool_backward(xp.asarray(grad_y.astype(dtype)), **given, **keywords).x
    assert_array_equal(host(xp, have), want)


@pytest.mark.parametrize(
    ("at", "pixel"),
    [(0.49999999999999994, 0), (0.5, 1), (1.5, 2), (2.5, 3), (-0.5, -1), (-1.5, -2), (3.4, 3)],
)
@pytest.mark.parametrize("operator", [roi_pool, ps_roi_pool])
def test_corners_are_rounded_half_away_from_zero(operator, at, pixel, xp):
    x = np.zeros((1, 1, 1, 8))
    x[..., max(pixel, 0) :] = 1 if pixel >= 0 else 0
    options = {"group_size": 1} if operator is ps_roi_pool else {}
    rois = np.array([[0, at, 0, at, 0]])
    y = host(xp, operator(xp.asarray(x), xp.asarray(rois), 1, **options)).item()
    assert y == (1 if pixel >= 0 else 0)
    x[..., pixel + 1 :] = x[..., : max(pixel, 0)] = 5  # neighbours that must not count
    if pixel >= 0:
        assert host(xp, operator(xp.asarray(x), xp.asarray(rois), 1, **options)).item() == 1


def test_average_pooling_is_the_mean_of_cells(xp):
    x = np.random.default_rng(0).normal(size=(1, 3, 9, 9))
    rois = xp.asarray(np.array([[0.0, 1, 2, 6, 7]]))
    y = host(xp, ps_roi_pool(xp.asarray(x), rois, 2, group_size=1))
    want = x[0, :, 2:8, 1:7].reshape(3, 2, 3, 2, 3).mean(axis=(2, 4))
    assert np.abs(y[0] - want).max() <= 1e-15


def test_last_row_and_column_are_read(xp):
    x = np.zeros((1, 1, 4, 4))
    x[..., -1, :] = x[..., -1] = 1
    y = ps_roi_pool(xp.asarray(x), xp.asarray(np.array([[0.0, 0, 0, 3, 3]])), 1)
    assert host(xp, y).item() == 7 / 16


def test_cells_of_many_pixels(xp):
    """Places in a cell need more than 8 bits, and more than 16."""
    rng = np.random.default_rng(1)
    for shape in ((20, 30), (300, 300)):
        x = rng.normal(size=(1, 1, *shape))
        rois = np.array([[0.0, 0, 0, shape[1], shape[0]]])
        y = host(xp, roi_pool(xp.asarray(x), xp.asarray(rois), 1))
        assert y.item() == x.max()
        grad = roi_pool_backward(xp.ones((1, 1, 1, 1)), xp.asarray(x), xp.asarray(rois), 1).x
        assert_array_equal(host(xp, grad), x == x.max())
