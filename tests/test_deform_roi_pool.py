"""Deformable RoI pooling: golden cases and what offsets mean; the rest is in test_roi.py."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import (
    deform_ps_roi_pool,
    deform_ps_roi_pool_backward,
    deform_roi_pool,
    deform_roi_pool_backward,
    roi_align,
    roi_align_backward,
)
from tests import reference_roi as reference
from tests.arrays import host, on
from tests.golden_cases import check_golden, golden_cases
from tests.roi_cases import DEFORMABLE, functions, random_case


@pytest.mark.parametrize(("case", "dtype"), golden_cases("deform_roi_pool"))
def test_golden_cases(case, dtype, xp):
    check_golden(case, dtype, deform_roi_pool, deform_roi_pool_backward, xp)


@pytest.mark.parametrize(("case", "dtype"), golden_cases("deform_ps_roi_pool"))
def test_golden_cases_of_deform_ps_roi_pool(case, dtype, xp):
    check_golden(case, dtype, deform_ps_roi_pool, deform_ps_roi_pool_backward, xp)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(4))
def test_zero_offset_is_roi_align_bit_for_bit(seed, dtype, xp):
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case("deform_roi_pool", rng, mask=False)
    arrays = on(xp, {key: a.astype(dtype) for key, a in arrays.items()})
    offset, gamma = xp.zeros_like(arrays.pop("offset")), keywords.pop("gamma")
    want = roi_align(**arrays, **keywords, aligned=True)
    want_grad = roi_align_backward(want, **arrays, **keywords, aligned=True).x
    for given in (offset, None):
        options = keywords | {"offset": given, "gamma": gamma}
        assert_array_equal(host(xp, deform_roi_pool(**arrays, **options)), host(xp, want))
        grads = deform_roi_pool_backward(want, **arrays, **options)
        assert (grads.offset is None) == (given is None)
        assert grads.mask is None
        if xp is np:  # a block of rows, whose gradients are summed up apart, has another size
            assert np.abs(grads.x - want_grad).max() <= 1e-6 * np.abs(want_grad).max()
        else:
            assert_array_equal(host(xp, grads.x), host(xp, want_grad))


@pytest.mark.parametrize("name", DEFORMABLE)
def test_no_offset_is_zero_offset(name, xp):
    arrays, keywords = random_case(name, np.random.default_rng(0), classes=1, mask=True)
    arrays["offset"][:] = 0
    want = functions(name)[0](**on(xp, arrays), **keywords)
    arrays["offset"] = None
    given = {key: a if a is None else xp.asarray(a) for key, a in arrays.items()}
    assert_array_equal(host(xp, functions(name)[0](**given, **keywords)), host(xp, want))


@pytest.mark.parametrize("name", DEFORMABLE)
def test_offsets_are_dx_dy_in_parts_of_the_roi(name, xp):
    """On a ramp, the bin of a RoI of 4 x 10 pixels moves by gamma · (10 · dx, 4 · dy)."""
    rows, columns = np.mgrid[:40, :40]
    x = xp.asarray(np.stack([rows, columns])[None].astype(float))
    last = 0 if name == "deform_roi_pool" else 1  # is the last pixel's, not behind it
    rois = xp.asarray(np.array([[0.0, 10, 12, 20 - last, 16 - last]]))
    options = {"group_size": 1} if last else {}
    offset = xp.asarray(np.array([1.0, -2.0]).reshape(1, 2, 1, 1))
    forward = functions(name)[0]
    plain, moved = (
        host(xp, forward(x, rois, by, 1, gamma=0.5, **options)).ravel() for by in (None, offset)
    )
    assert np.abs(moved - plain - [0.5 * 4 * -2, 0.5 * 10 * 1]).max() <= 1e-13


def test_every_class_and_part_moves_its_own_bins(xp):
    """2 classes of 1 channel, 4 x 4 bins moved by 2 x 2 parts: offsets of one part and class."""
    rng = np.random.default_rng(1)
    x, rois = rng.normal(size=(1, 2, 30, 30)), np.array([[0.0, 8, 8, 19, 19]])
    offset = np.zeros((1, 4, 2, 2))
    arguments = xp.asarray(x), xp.asarray(rois)
    options = {"output_size": 4, "group_size": 1}
    plain = host(xp, deform_ps_roi_pool(*arguments, xp.asarray(offset), **options))
    offset[0, 3, 0, 1] = 1.0  # dy of class 1, upper right part
    moved = host(xp, deform_ps_roi_pool(*arguments, xp.asarray(offset), **options))
    changed = np.zeros((1, 2, 4, 4), bool)
    changed[0, 1, :2, 2:] = True
    assert_array_equal(moved != plain, changed)
    grads = deform_ps_roi_pool_backward(
        xp.asarray(changed * 1.0), *arguments, xp.asarray(offset), **options
    )
    own = np.zeros(offset.shape, bool)
    own[0, 2:, 0, 1] = True
    assert_array_equal(host(xp, grads.offset) != 0, own)


def test_parts_that_move_no_bin_have_no_gradient(xp):
    x, rois = xp.ones((1, 1, 9, 9)), xp.asarray(np.array([[0.0, 1, 1, 6, 6]]))
    offset = xp.zeros((1, 2, 3, 3))
    y = deform_ps_roi_pool(x, rois, offset, 1)
    grads = deform_ps_roi_pool_backward(y, x, rois, offset, 1)
    assert grads.offset.shape == (1, 2, 3, 3)
    assert not host(xp, grads.offset).any()


def test_bins_that_left_the_image_are_zero_and_send_nothing_back(xp):
    x, rois = xp.ones((1, 1, 9, 9)), xp.asarray(np.array([[0.0, 1, 1, 6, 6]]))
    offset, mask = xp.full((1, 2, 1, 1), 40.0), xp.ones((1, 1, 1))
    for name in DEFORMABLE:
        forward, backward = functions(name)
        assert host(xp, forward(x, rois, offset, 1, mask=mask)).item() == 0
        for grad in backward(xp.ones((1, 1, 1, 1)), x, rois, offset, 1, mask=mask):
            assert not host(xp, grad).any()


@pytest.mark.parametrize("name", DEFORMABLE)
def test_bins_larger_than_a_tile_have_gradients(name, xp):
    """Kernels weigh pixels in tiles of 16: a bin sees three of them along one axis."""
    rng = np.random.default_rng(2)
    arrays = {
        "x": rng.normal(size=(1, 2, 44, 46)),
        "rois": np.array([[0.0, 1, 2, 43, 12], [0, 2, 1, 14, 42]]),
        "offset": rng.integers(-16, 17, (2, 2, 1, 1)) / 64,
        "mask": rng.normal(size=(2, 1, 1)),
    }
    keywords = {"output_size": (1, 1), "sampling_ratio": (40, 44), "gamma": 0.5}
    grad_y = rng.normal(size=(2, 2, 1, 1))
    want = reference.pool_backward(name, grad_y, **arrays, **keywords)
    have = functions(name)[1](xp.asarray(grad_y), **on(xp, arrays), **keywords)
    for key, grad in have._asdict().items():
        assert np.abs(host(xp, grad) - want[key]).max() <= 1e-12 * np.abs(want[key]).max()
