"""Pooling on the regular grid."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.testing import assert_array_equal

from deformable import nn
from deformable.testing import check_layer, error_bound
from tests.arrays import host

WINDOWS = {
    "2": (2,),
    "3 overlapping": (3, 2, 1),
    "uneven": ((2, 3), (3, 1), (1, 0)),
    "gaps": (1, 3),
    "all of it": ((7, 6),),
    "wide padding": (4, 1, 2),
}
LAYERS = {
    **{f"max {name}": (nn.MaxPool2d, window) for name, window in WINDOWS.items()},
    **{f"mean {name}": (nn.AvgPool2d, window) for name, window in WINDOWS.items()},
    "mean of everything": (nn.GlobalAvgPool2d, ()),
}


def images(xp, n=2, dtype=np.float64, size=(7, 6)):
    return xp.asarray(np.random.default_rng(1).normal(size=(n, 3, *size)).astype(dtype))


def windows(x, kernel, stride=None, padding=0, fill=0.0):
    """Every window of x, flattened: (N, C, Ho, Wo, taps)."""
    pairs = [v if isinstance(v, tuple) else (v, v) for v in (kernel, stride or kernel, padding)]
    (kh, kw), (sh, sw), (ph, pw) = pairs
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=fill)
    seen = sliding_window_view(padded, (kh, kw), axis=(2, 3))[:, :, ::sh, ::sw]
    return seen.reshape(*seen.shape[:4], kh * kw)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name, xp):
    kind, window = LAYERS[name]
    check_layer(kind(*window), [images(xp)], rng=np.random.default_rng(0))


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_max_is_the_largest_of_each_window(window, xp):
    x = images(xp)
    expected = windows(host(xp, x), *window, fill=-np.inf).max(axis=-1)
    layer = nn.MaxPool2d(*window)
    assert_array_equal(host(xp, layer.predict(x)), expected)
    assert_array_equal(host(xp, layer(x)[0]), expected)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_mean_is_that_of_each_window_with_zeros_around(window, xp):
    x = images(xp)
    seen = windows(host(xp, x), *window)
    error = abs(host(xp, nn.AvgPool2d(*window).predict(x)) - seen.mean(axis=-1))
    assert (error <= error_bound("float64", abs(seen).mean(axis=-1), terms=42)).all()


def test_the_first_of_equal_values_gets_the_gradient(xp):
    x = xp.asarray(np.array([[[[1.0, 2.0, 2.0], [2.0, 2.0, 2.0]]]]))
    _, backward = nn.MaxPool2d(2, stride=1)(x)
    grad = host(xp, backward(xp.asarray(np.array([[[[3.0, 5.0]]]]))))
    assert grad.tolist() == [[[[0, 8, 0], [0, 0, 0]]]]


def test_a_nan_makes_its_windows_nan(xp):
    x = host(xp, images(xp)).copy()
    x[0, 1, 2, 3] = np.nan
    expected = np.isnan(windows(x, 3, 2, 1)).any(axis=-1)
    y, backward = nn.MaxPool2d(3, 2, 1)(xp.asarray(x))
    assert_array_equal(np.isnan(host(xp, y)), expected)
    assert np.isfinite(host(xp, backward(xp.ones_like(y)))).all()


def test_minus_infinity_may_win(xp):
    y, backward = nn.MaxPool2d(2)(xp.full((1, 1, 2, 2), -np.inf))
    assert host(xp, y).tolist() == [[[[-np.inf]]]]
    assert host(xp, backward(xp.ones_like(y))).tolist() == [[[[1, 0], [0, 0]]]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["max wide padding", "mean wide padding", "mean of everything"])
def test_low_precision_is_rounded_once(name, dtype, xp):
    pytest.importorskip("ml_dtypes")
    kind, window = LAYERS[name]
    x = abs(images(xp, size=(40, 50))).astype(dtype)
    y, backward = kind(*window)(x)
    expected, exact_backward = kind(*window)(x.astype(np.float64))
    grad_x, expected_grad = backward(y), exact_backward(y.astype(np.float64))
    assert y.dtype == grad_x.dtype == dtype
    for have, want in (y, expected), (grad_x, expected_grad):
        error = abs(host(xp, have).astype(np.float64) - host(xp, want))
        assert (error <= error_bound(dtype, host(xp, want), terms=2000)).all()


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_goes_through(name, xp):
    kind, window = LAYERS[name]
    y, backward = kind(*window)(images(xp, n=0))
    assert y.shape[:2] == (0, 3)
    assert backward(y).shape == (0, 3, 7, 6)


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
def test_memory_stays_channels_last(kind, xp):
    x = xp.ascontiguousarray(images(xp).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    y, backward = kind(3, 2, 1)(x)
    for array in y, backward(y):
        assert array.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((2, 1, 2), r"padding is \(2, 2\), expected at most half of kernel_size \(2, 2\)"),
        ((2, 0), "stride is 0, expected at least 1"),
        ((8,), r"x has shape \(2, 3, 7, 6\), expected one that a window fits in"),
    ],
)
def test_windows_that_do_not_fit_are_refused(window, message):
    with pytest.raises(ValueError, match=f"MaxPool2d: {message}"):
        nn.MaxPool2d(*window)(images(np))
    with pytest.raises(
        ValueError, match=r"AvgPool2d: x has shape \(3, 4\), expected \(N, C, H, W\)"
    ):
        nn.AvgPool2d(2)(np.ones((3, 4)))
