"""RoIAlign: golden cases, closed forms and the maximum; the rest is in test_roi.py."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from deformable import ps_roi_align, ps_roi_align_backward, roi_align, roi_align_backward
from deformable.testing import check_backward, error_bound
from tests import reference_roi as reference
from tests.arrays import host, on
from tests.golden_cases import check_golden, golden_cases
from tests.roi_cases import random_case


@pytest.mark.parametrize(("case", "dtype"), golden_cases("roi_align"))
def test_golden_cases(case, dtype, xp):
    check_golden(case, dtype, roi_align, roi_align_backward, xp)


@pytest.mark.parametrize(("case", "dtype"), golden_cases("ps_roi_align"))
def test_golden_cases_of_ps_roi_align(case, dtype, xp):
    check_golden(case, dtype, ps_roi_align, ps_roi_align_backward, xp)


@pytest.mark.parametrize("sampling_ratio", [1, 2, 7, 0])
def test_bins_of_a_ramp_are_their_centers(sampling_ratio, xp):
    rows, columns = np.mgrid[:20, :30]
    x = xp.asarray(np.stack([rows, columns])[None].astype(float))
    rois = xp.asarray(np.array([[0, 3.5, 2.5, 24.5, 17.5]]))
    y = host(xp, roi_align(x, rois, (5, 3), 1.0, sampling_ratio, aligned=True))
    assert np.abs(y[0, 0] - (2 + 3 * (np.arange(5)[:, None] + 0.5))).max() <= 1e-13
    assert np.abs(y[0, 1] - (3 + 7 * (np.arange(3) + 0.5))).max() <= 1e-13


def test_unaligned_rois_are_not_shifted_but_one_pixel_large(xp):
    x = xp.asarray(np.arange(8.0).reshape(1, 1, 1, 8))
    rois = xp.asarray(np.array([[0.0, 2, 0, 2, 0], [0, 2, 0, 5, 0]]))
    assert host(xp, roi_align(x, rois, 1)).ravel().tolist() == [2.5, 3.5]
    assert host(xp, roi_align(x, rois, 1, aligned=True)).ravel().tolist() == [0, 0]


def test_positions_in_half_precision_do_not_lose_bits(xp):
    """RoIs of 2048 pixels and more would be off by a pixel."""
    x = xp.asarray(np.arange(128, dtype=np.float16).reshape(1, 1, 1, 128))
    rois = xp.asarray(np.array([[0, 2040, 0, 2048, 16]], np.float16))
    y = roi_align(x, rois, 1, 1 / 16, 1, aligned=True)
    assert host(xp, y).item() == np.float16(127)  # 127.25, clamped
    y = roi_align(x, rois, (1, 2), 1 / 32, 1, aligned=True)
    assert host(xp, y).ravel().tolist() == [63.3125, 63.4375]


@pytest.mark.parametrize("sampling_ratio", [1, 2, 5])
@pytest.mark.parametrize("bins", [3, 5])
def test_samples_on_the_border_count_where_the_definition_computes_them(bins, sampling_ratio, xp):
    """Thirds and fifths of whole numbers that add up to −1 or to the size of the image."""
    x = np.random.default_rng(3).normal(size=(1, 1, 5, 7))
    first, size = (a.ravel() for a in np.mgrid[-4:8, 1:15])
    rois = np.stack([np.zeros_like(first), first, first, first + size, first + size], 1) * 1.0
    arguments = {"output_size": (bins,) * 2, "sampling_ratio": (sampling_ratio,) * 2}
    y = roi_align(xp.asarray(x), xp.asarray(rois), **arguments, aligned=True)
    want = reference.pool("roi_align", x, rois, **arguments, aligned=True)
    assert np.abs(host(xp, y) - want).max() <= 1e-13


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("corners", [(1e300, 1, 2e300, 3), (1, 1e300, 3, 2e300)])
def test_a_roi_that_overflows_along_one_axis_is_nan(corners, mode, xp):
    rois = xp.asarray(np.array([[0, *corners]]))
    y = roi_align(xp.ones((1, 2, 4, 4)), rois, 2, 1e10, 2, aligned=True, mode=mode)
    assert np.isnan(host(xp, y)).all()


# ---- the maximum


@pytest.mark.parametrize("values", ["distinct", "ties", "non-finite"])
@pytest.mark.parametrize("seed", range(10))
def test_maximum_equals_the_definition(seed, values, xp):
    """In ties the first sample wins, as does the first NaN; samples outside are 0."""
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case("roi_align", rng)
    keywords["mode"] = "max"
    if values == "ties":
        arrays["x"] = rng.integers(-2, 1, arrays["x"].shape).astype(float)
    elif values == "non-finite":
        where = rng.random(arrays["x"].shape) < 0.1
        arrays["x"][where] = rng.choice([np.nan, np.inf, -np.inf], where.sum())
    y = host(xp, roi_align(**on(xp, arrays), **keywords))
    grad_y = rng.normal(size=y.shape)
    with np.errstate(invalid="ignore"):
        want_y = reference.pool("roi_align", **arrays, **keywords)
        want = reference.pool_backward("roi_align", grad_y, **arrays, **keywords)["x"]
    assert_allclose(y, want_y, rtol=1e-12, atol=1e-12)
    have = roi_align_backward(xp.asarray(grad_y), **on(xp, arrays), **keywords).x
    assert np.abs(host(xp, have) - want).max() <= 1e-12 * max(1, np.abs(want).max())


@pytest.mark.parametrize("seed", range(200))
def test_gradients_of_the_maximum(seed):
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case("roi_align", rng, mode="max")
    check_backward(roi_align, roi_align_backward, [], arrays | keywords, rng=rng)


def test_maximum_of_more_samples_than_a_tile(xp):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 40, 45))
    rois = [[0, -3, -2, 48, 41], [0, 50, 43, 2, -4], [0, 2, 1, 41, 9], [0, 3, 2, 11, 38]]
    rois = np.array(rois, float)
    for sampling_ratio in (0, 37):
        arguments = {"output_size": (1, 1), "sampling_ratio": (sampling_ratio,) * 2}
        arguments |= {"aligned": True, "mode": "max"}
        y = roi_align(xp.asarray(x), xp.asarray(rois), **arguments)
        want = reference.pool("roi_align", x, rois, **arguments)
        assert np.abs(host(xp, y) - want).max() <= 1e-13
        grad = roi_align_backward(xp.ones(y.shape), xp.asarray(x), xp.asarray(rois), **arguments)
        want = reference.pool_backward("roi_align", np.ones(want.shape), x, rois, **arguments)["x"]
        assert np.abs(host(xp, grad.x) - want).max() <= 1e-12


def test_zeros_outside_win_when_their_turn_comes(xp):
    """Of samples of 0: RoIs begin inside or outside and end behind the image, or turn back."""
    rng, k = np.random.default_rng(5), 80
    x = -rng.integers(0, 2, (1, 1, 5, 6)).astype(float)
    ends = rng.integers(-2, 8, (2, k, 2))
    rois = np.concatenate([np.zeros((k, 1)), *ends], axis=1)
    arguments = {"output_size": (1, 1), "sampling_ratio": (3, 4), "mode": "max", "aligned": True}
    grad_y = rng.normal(size=(k, 1, 1, 1))
    have = roi_align_backward(xp.asarray(grad_y), xp.asarray(x), xp.asarray(rois), **arguments).x
    want = reference.pool_backward("roi_align", grad_y, x, rois, **arguments)["x"]
    assert np.abs(host(xp, have) - want).max() <= 1e-12 * np.abs(want).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_of_samples_that_differ_by_rounding_the_same_one_wins(dtype, xp):
    """On images of one value all samples of a bin are that value, rounded."""
    rng = np.random.default_rng(6)
    x = np.empty((1, 40, 8, 9), dtype)
    x[...] = rng.uniform(-1, 1, (40, 1, 1))
    rois = np.concatenate(
        [np.zeros((6, 1)), rng.uniform(1, 3, (6, 2)), rng.uniform(4, 6, (6, 2))], 1
    )
    arguments = {"output_size": 3, "sampling_ratio": 2, "mode": "max", "aligned": True}
    y = roi_align(x, rois, **arguments)
    want = roi_align_backward(np.ones_like(y), x, rois, **arguments).x
    x, rois = xp.asarray(x), xp.asarray(rois)
    assert_array_equal(host(xp, roi_align(x, rois, **arguments)), y)
    have = roi_align_backward(xp.ones(y.shape, dtype), x, rois, **arguments).x
    assert np.abs(host(xp, have) - want).max() <= error_bound(dtype, want.max(), terms=50)


def test_ten_maxima_are_bitwise_equal(xp):
    rng = np.random.default_rng(1)
    arrays, keywords = random_case("roi_align", rng, k=30, mode="max")
    arrays = on(xp, arrays)
    y = roi_align(**arrays, **keywords)
    first = host(xp, roi_align_backward(y, **arrays, **keywords).x)
    for _ in range(9):
        assert_array_equal(host(xp, roi_align_backward(y, **arrays, **keywords).x), first)


def test_a_bin_larger_than_a_tile_is_one_mean(xp):
    """Kernels weigh pixels in tiles of 16."""
    rng = np.random.default_rng(2)
    x, rois = (
        rng.normal(size=(1, 3, 40, 45)),
        np.array([[0.0, -3, -2, 48, 41], [0, 3, 2, 42, 37.5]]),
    )
    for sampling_ratio in ((0, 0), (50, 3)):
        arguments = {"output_size": (1, 1), "sampling_ratio": sampling_ratio, "aligned": True}
        y = roi_align(xp.asarray(x), xp.asarray(rois), **arguments)
        assert (
            np.abs(host(xp, y) - reference.pool("roi_align", x, rois, **arguments)).max() <= 1e-14
        )
        grad_y = rng.normal(size=y.shape)
        have = roi_align_backward(xp.asarray(grad_y), xp.asarray(x), xp.asarray(rois), **arguments)
        want = reference.pool_backward("roi_align", grad_y, x, rois, **arguments)["x"]
        assert np.abs(host(xp, have.x) - want).max() <= 1e-14


def test_more_channels_than_lanes_see_all_tiles_of_a_bin(xp):
    """Of several tiles along one axis alone: weights are listed anew for every turn of lanes."""
    x = np.random.default_rng(4).normal(size=(1, 70, 22, 36))
    rois = np.array([[0.0, 1, 2, 34, 8], [0, 3, 1, 12, 21]])
    for roi in rois:
        y = roi_align(xp.asarray(x), xp.asarray(roi[None]), 1, sampling_ratio=20)
        want = reference.pool("roi_align", x, roi[None], (1, 1), sampling_ratio=(20, 20))
        assert np.abs(host(xp, y) - want).max() <= 1e-14
