"""What makes other implementations crash, read foreign memory or answer nonsense.

torchvision 0.28 ends with a segmentation fault on one NaN offset or RoI, and so does the backward
of mmcv; both read outside of the images where the batch index of a RoI is wrong. Their half
precision kernels compute positions in half precision. Some need batches that their block size
divides, or fail on empty ones.
"""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import deform_conv2d, deform_conv2d_backward, deform_roi_pool_backward, roi_align
from deformable.testing import error_bound
from tests.arrays import host
from tests.fuzz import OPERATORS, legal_call, results_of

ROI_OPERATORS = [name for name in OPERATORS if "conv" not in name]
DTYPES = [np.float16, np.float32, np.float64]


def deformed(xp, dtype, n=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (n, 4, 6, 5),
        "offset": (n, 36, 6, 5),
        "weight": (3, 4, 3, 3),
        "mask": (n, 18, 6, 5),
    }
    arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    return {name: xp.asarray(a) for name, a in arrays.items()} | {"padding": 1}


def pooled(name, xp, k=3):
    """A legal call with ``k`` RoIs: repeats of one."""
    operator, seed = OPERATORS[name], 0
    while len((call := legal_call(operator, np, seed))["rois"]) == 0:
        seed += 1
    repeated = {
        key: np.repeat(a[:1], k, axis=0) if key in ("rois", "offset", "mask") else a
        for key, a in call.items()
        if isinstance(a, np.ndarray)
    }
    return operator, call | {key: xp.asarray(a) for key, a in repeated.items()}


def off_by_a_byte(array, xp):
    """Zeros at an address that the dtype does not allow."""
    return xp.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)


def apart(array, xp):
    """Zeros with a byte too much between neighbours along the first axis."""
    step = array.nbytes // len(array) + 1
    room = xp.zeros(step * len(array) // array.itemsize + 1, array.dtype)
    return xp.lib.stride_tricks.as_strided(room, array.shape, (step, *array.strides[1:]))


@pytest.mark.parametrize("moved", [off_by_a_byte, apart])
@pytest.mark.parametrize("name", ["offset", "mask", "x", "weight"])
def test_memory_that_no_kernel_can_read_is_refused(name, moved, xp):
    call = deformed(xp, np.float32)
    call[name] = moved(call[name], xp)
    if xp is np:  # reads them all the same
        y = deform_conv2d(**call)
        assert_array_equal(y, deform_conv2d(**call | {name: call[name].copy()}))
        return
    with pytest.raises(ValueError, match=f"^deform_conv2d: {name} .* multiples of 4 bytes"):
        deform_conv2d(**call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["offset", "mask", "x", "weight"])
def test_one_nan_is_no_crash(name, dtype, xp):
    call = deformed(xp, dtype)
    y = host(xp, deform_conv2d(**call))
    call[name][0, 0, 2, 2] = np.nan
    with_nan = host(xp, deform_conv2d(**call))
    grads = deform_conv2d_backward(xp.ones(y.shape, dtype), **call)
    assert np.isnan(with_nan[0]).any()
    if name != "weight":
        assert_array_equal(with_nan[1], y[1])
        assert all(
            np.isfinite(host(xp, getattr(grads, k))[1]).all() for k in ("x", "offset", "mask")
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_nan_is_no_crash(dtype, xp):
    call = deformed(xp, dtype)
    for name in ("offset", "mask", "x"):
        call[name][...] = np.nan
    y = deform_conv2d(**call)
    grads = deform_conv2d_backward(y, **call)
    assert np.isnan(host(xp, y)).all()
    assert np.isnan(host(xp, grads.offset)).all() and np.isnan(host(xp, grads.mask)).all()


WRONG_ROIS = {
    "nan corner": (2, np.nan),
    "infinite corner": (4, -np.inf),
    "index below": (0, -1.0),
    "index above": (0, 2.0),
    "far index": (0, 2.0**31),
    "farther index": (0, -(2.0**63)),
    "nan index": (0, np.nan),
}


@pytest.mark.parametrize("wrong", WRONG_ROIS)
@pytest.mark.parametrize("name", ROI_OPERATORS)
def test_a_wrong_roi_reads_nothing_and_disturbs_no_other(name, wrong, xp):
    column, value = WRONG_ROIS[wrong]
    operator, call = pooled(name, xp)
    before = [host(xp, a) for a in results_of(operator, call)]
    call["rois"][1, column] = value
    if xp is np:
        with pytest.raises(ValueError, match=rf"^{operator.forward.__name__}: rois\[1\] is \["):
            operator.forward(**call)
        return
    grad_y = xp.asarray(before[0])
    y, grads = operator.forward(**call), operator.backward(grad_y, **call)
    assert np.isnan(host(xp, y)[1]).all()
    for have, want in zip((y, *grads[1:]), (before[0], *before[2:]), strict=False):
        if have is not None:
            assert_array_equal(host(xp, have)[[0, 2]], want[[0, 2]])
    # the image gets what the other two RoIs send back: two thirds, as the three are the same
    error = np.abs(host(xp, grads.x) - before[1] * (2 / 3))
    assert (error <= error_bound(np.float64, np.abs(before[1]).max(), terms=64)).all()


@pytest.mark.parametrize("name", ["deform_roi_pool", "deform_ps_roi_pool"])
def test_a_nan_in_the_offsets_of_a_roi_stays_there(name, xp):
    operator = OPERATORS[name]
    seed = 0
    while (call := legal_call(operator, xp, seed))["offset"] is None or len(call["rois"]) < 2:
        seed += 1
    call["offset"][0] = np.nan
    y = operator.forward(**call)
    grads = operator.backward(xp.ones(y.shape), **call)
    assert np.isnan(host(xp, y)[0]).all() and np.isfinite(host(xp, y)[1:]).all()
    assert (
        np.isnan(host(xp, grads.offset)[0]).any() and np.isfinite(host(xp, grads.offset)[1:]).all()
    )
    assert np.isfinite(host(xp, grads.x)).all()


@pytest.mark.parametrize("name", ["deform_roi_pool", "deform_ps_roi_pool"])
def test_offsets_of_opposite_infinities_are_outside_and_no_nan(name, xp):
    operator, call = OPERATORS[name], {"output_size": 1}
    arrays = {
        "x": np.ones((1, 1, 4, 4)),
        "rois": np.array([[0.0, 0, 0, 3, 3]]),
        "offset": np.array([np.inf, -np.inf]).reshape(1, 2, 1, 1),
    }
    call |= {key: xp.asarray(a) for key, a in arrays.items()}
    assert host(xp, operator.forward(**call)).ravel().tolist() == [0]
    grads = operator.backward(xp.ones((1, 1, 1, 1)), **call)
    assert not host(xp, grads.x).any() and not host(xp, grads.offset).any()


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("dtype, value", [(np.float64, np.inf), (np.float32, 1e300)])
def test_an_infinite_mask_stays_with_the_pixels_of_its_bin(dtype, value, moved, xp):
    """Pixels that the bin does not see get no 0 · inf, not even those that it may move to.

    Infinite is also what the dtype of the sums cannot hold.
    """
    x, rois = xp.ones((1, 1, 8, 8), dtype), xp.asarray(np.array([[0.0, 2, 2, 3, 3]]))
    mask, offset = xp.full((1, 1, 1), value), xp.zeros((1, 2, 1, 1)) if moved else None
    grads = deform_roi_pool_backward(xp.ones((1, 1, 1, 1), dtype), x, rois, offset, 1, mask=mask)
    seen = np.zeros((8, 8), bool)
    seen[2, 2] = True
    assert_array_equal(~np.isfinite(host(xp, grads.x)[0, 0]), seen)


def test_a_gradient_that_half_precision_cannot_hold_is_infinite_without_a_warning(xp):
    x = xp.asarray(np.arange(64, dtype=np.float16).reshape(1, 1, 8, 8))
    rois = xp.asarray(np.array([[0, 2, 2, 5, 5]], np.float16))
    grad_y, offset = xp.full((1, 1, 1, 1), 1e4, np.float16), xp.zeros((1, 2, 1, 1), np.float16)
    grads = deform_roi_pool_backward(grad_y, x, rois, offset, 1, gamma=1.0)
    assert np.isinf(host(xp, grads.offset)[0, 1])


def test_a_roi_as_large_as_numbers_go_takes_no_longer(xp):
    """One sample per pixel of it would be 10^60."""
    x, rois = xp.ones((1, 1, 4, 4)), xp.asarray(np.array([[0.0, -1e30, -1e30, 1e30, 1e30]]))
    for mode in ("avg", "max"):
        assert np.isfinite(host(xp, roi_align(x, rois, 2, mode=mode))).all()


@pytest.mark.parametrize("n", [1, 2, 37, 64, 67])
def test_any_number_of_images_will_do(n, xp):
    """mmcv's must be a multiple of im2col_step, or below it."""
    call = deformed(xp, np.float64, n)
    y = host(xp, deform_conv2d(**call))
    one = call | {name: call[name][n - 1 :] for name in ("x", "offset", "mask")}
    error = np.abs(y[n - 1] - host(xp, deform_conv2d(**one))[0])
    assert error.max() <= error_bound(np.float64, np.abs(y).max(), terms=36)


@pytest.mark.parametrize("size", [16, 200])
def test_half_precision_keeps_positions(size, xp):
    """In half precision there are but 8 positions to a pixel at 200: an error of 0.06.

    The image is 0 and 1 by turns, so that its values between are fractions of a pixel.
    """
    x = np.zeros((1, 1, 1, size), np.float16)
    x[..., 1::2] = 1
    offset = np.zeros((1, 2, 1, size), np.float16)
    offset[:, 1] = np.linspace(0.02, 0.98, size)
    y = deform_conv2d(*map(xp.asarray, (x, offset, np.ones((1, 1, 1, 1), np.float16))))
    fraction = offset[0, 1, 0].astype(np.float64)
    exact = np.where(np.arange(size) % 2, 1 - fraction, fraction)
    error = np.abs(host(xp, y)[0, 0, 0].astype(np.float64) - exact)[: size - 1]
    assert error.max() <= error_bound(np.float16)


@pytest.mark.parametrize("name", OPERATORS)
def test_empty_calls_have_empty_results_and_gradients_of_zero(name, xp):
    operator, call = OPERATORS[name], legal_call(OPERATORS[name], xp, 1)
    per_call = ("rois", "offset", "mask") if "rois" in call else ("x", "offset", "mask")
    call |= {k: call[k][:0] for k in per_call if call.get(k) is not None}
    y = operator.forward(**call)
    grads = operator.backward(y, **call)
    assert y.shape[0] == 0
    for argument, grad in grads._asdict().items():
        if call.get(argument) is None:
            assert grad is None
        else:
            assert grad.shape == call[argument].shape and not host(xp, grad).any()
