"""Plain two-dimensional convolution, as the layers need it: columns times weights.

    y[n, o, p] = bias[o] + Σ_{c,t} weight[o, c, t] · x[n, c, p·stride − padding + t·dilation]

It is ``deform_conv`` with columns that look where the grid says; ``_conv`` has what both share.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from deformable import _cuda, _fused, _fused_backward
from deformable._arrange import channels_first, channels_last, fill_channels_last
from deformable._array import (
    CALLS,
    Array,
    Pair,
    array_module,
    check_dtypes,
    check_library,
    check_shape,
    check_wrt,
    compute_dtype,
    integer,
    specs,
)
from deformable._conv import (
    Chunk,
    ConvGeometry,
    blocks,
    by_group,
    chunks,
    column_macros,
    columns_by_group,
    columns_from_groups,
    conv_geometry,
    conv_grid,
    gradient_rows,
    image_rows,
    index_type,
    pack_weight,
    sum_rows,
    unpack_weight,
)


class Conv2dGradients(NamedTuple):
    """Gradients of :func:`conv2d`."""

    x: Array | None
    weight: Array | None
    bias: Array | None


def conv2d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Array:
    """Two-dimensional convolution (cross-correlation) with zeros around the image.

    Parameters
    ----------
    x : (N, C, H, W) array
        Images: float16, bfloat16, float32 or float64, of numpy or cupy, in any memory order.
    weight : (O, C // groups, kh, kw) array
        Kernel, of the dtype of `x`.
    bias : (O,) array, optional
        Added to every position, of the dtype of `x`.
    stride, padding, dilation : int or (height, width)
        Step between output positions, zeros on every side, step between taps, in input pixels.
    groups : int
        Channels and output channels are split into this many independent convolutions.

    Returns
    -------
    (N, O, Ho, Wo) array
        Ho = (H + 2 padding − (dilation (kh − 1) + 1)) // stride + 1. It lies channels-last in
        memory. Sums are computed in float32 at least.

    Raises
    ------
    TypeError
        Arrays of different libraries, dtypes that differ or are none of the four.
    ValueError
        Shapes that do not fit, an empty output, arrays on different devices.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(9.0).reshape(1, 1, 3, 3)
    >>> conv2d(x, np.ones((1, 1, 2, 2)))
    array([[[[ 8., 12.],
             [20., 24.]]]])
    """
    g, xp = _check("conv2d", x, weight, bias, stride, padding, dilation, groups)
    run = _numpy_forward if xp is np else _cuda_forward
    return run(g, x, weight, bias)


def conv2d_backward(
    grad_y: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    wrt: Iterable[str] | None = None,
) -> Conv2dGradients:
    """Gradients of :func:`conv2d` with respect to its arrays.

    Parameters
    ----------
    grad_y : (N, O, Ho, Wo) array
        Gradient of the result: of the dtype of `x`, float32 or float64.
    x, weight, bias, stride, padding, dilation, groups
        As given to :func:`conv2d`.
    wrt : iterable of str, optional
        Names of the gradients to compute, of ``x``, ``weight``, ``bias``; all by default.

    Returns
    -------
    Conv2dGradients
        Fields ``x``, ``weight``, ``bias``; None where not asked for or where the argument was
        None. Bitwise reproducible.

    Raises
    ------
    TypeError, ValueError
        As :func:`conv2d`, and where `grad_y` or `wrt` do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(9.0).reshape(1, 1, 3, 3)
    >>> grads = conv2d_backward(np.ones((1, 1, 2, 2)), x, np.ones((1, 1, 2, 2)))
    >>> grads.x
    array([[[[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]]]])
    """
    name = "conv2d_backward"
    g, xp = _check(name, x, weight, bias, stride, padding, dilation, groups, grad_y=grad_y)
    wanted = check_wrt(name, wrt, Conv2dGradients._fields, bias=bias)
    run = _numpy_backward if xp is np else _cuda_backward
    return run(g, grad_y, x, weight, wanted)


def _check(function, x, weight, bias, stride, padding, dilation, groups, **gradient):
    arrays = {"x": x, "weight": weight, "bias": bias, **gradient}
    xp, signature = check_library(function, arrays, optional=("bias",))
    grid = conv_grid(function, stride, padding, dilation)
    groups = integer(function, "groups", groups, 1)
    return _geometry(function, grid, groups, signature), xp


@functools.lru_cache(maxsize=CALLS)
def _geometry(function, grid, groups, signature):
    arrays = specs(signature)
    grad_y = arrays.pop("grad_y", None)
    check_dtypes(function, arrays, {"grad_y": grad_y})
    g = conv_geometry(function, arrays, grid, groups)
    check_shape(function, "grad_y", grad_y, g.out_shape)
    return g


def _gradients(x, wanted, grad_image, grad_weight, grad_rows):
    """The wanted gradients in the dtype of ``x``."""
    return Conv2dGradients(
        x=channels_first(grad_image.astype(x.dtype, copy=False)) if "x" in wanted else None,
        weight=grad_weight if "weight" in wanted else None,
        bias=sum_rows(grad_rows, x.dtype) if "bias" in wanted else None,
    )


# ---- NumPy


def _padding(g: ConvGeometry, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Zeros for a padded image, channels-last, and the view (N, H, W, C) of what is inside."""
    height, width = g.height + 2 * g.pad_h, g.width + 2 * g.pad_w
    padded = np.zeros((g.batch, height, width, g.channels), dtype)
    return padded, padded[:, g.pad_h : g.pad_h + g.height, g.pad_w : g.pad_w + g.width]


def _windows(padded: np.ndarray, g: ConvGeometry) -> np.ndarray:
    """What every tap sees at every position, (N, Ho, Wo, kh, kw, C): a view."""
    extent = (g.dilation_h * (g.kernel_h - 1) + 1, g.dilation_w * (g.kernel_w - 1) + 1)
    windows = sliding_window_view(padded, extent, axis=(1, 2), writeable=True)
    windows = windows[:, :: g.stride_h, :: g.stride_w, :, :: g.dilation_h, :: g.dilation_w]
    return windows.transpose(0, 1, 2, 4, 5, 3)


def _image_windows(x: np.ndarray, g: ConvGeometry, dtype: np.dtype) -> np.ndarray:
    """The windows of the image (N, C, H, W)."""
    padded, inside = _padding(g, dtype)
    fill_channels_last(inside, x)
    return _windows(padded, g)


@np.errstate(all="ignore")
def _numpy_forward(g, x, weight, bias):
    dtype = compute_dtype(x.dtype)
    windows = _image_windows(x, g, dtype)
    packed = pack_weight(weight, g, dtype)
    y = np.empty((g.batch * g.positions, g.out_channels), dtype)
    for images, lines, positions in blocks(g, g.taps * g.channels * dtype.itemsize):
        out = y[positions]
        columns = windows[images, lines].reshape(len(out), g.taps * g.channels)
        np.matmul(columns_by_group(columns, g), packed.mT, out=by_group(out, g))
    if bias is not None:
        y += bias.astype(dtype)
    return image_rows(y.astype(x.dtype, copy=False), g)


@np.errstate(all="ignore")
def _numpy_backward(g, grad_y, x, weight, wanted):
    dtype = compute_dtype(x.dtype)
    grad = gradient_rows(grad_y, g, dtype)
    packed = pack_weight(weight, g, dtype)
    if "weight" in wanted:
        windows, grad_packed = _image_windows(x, g, dtype), np.zeros_like(packed)
    if "x" in wanted:
        grad_padded, inside = _padding(g, dtype)
        grad_windows = _windows(grad_padded, g)
    size = g.taps * g.channels
    some = blocks(g, size * dtype.itemsize) if wanted & {"x", "weight"} else ()
    for images, lines, positions in some:
        grad_out = by_group(grad[positions], g)
        if "weight" in wanted:
            columns = windows[images, lines].reshape(grad_out.shape[1], size)
            grad_packed += grad_out.mT @ columns_by_group(columns, g)
        if "x" in wanted:
            grad_seen = grad_windows[images, lines]
            grad_columns = columns_from_groups(grad_out @ packed, g).reshape(grad_seen.shape)
            for i, j in np.ndindex(g.kernel_h, g.kernel_w):
                # windows overlap, but those of one tap never do
                grad_seen[:, :, :, i, j] += grad_columns[:, :, :, i, j]
    grad_image = inside.astype(x.dtype) if "x" in wanted else None
    grad_weight = unpack_weight(grad_packed, g, x.dtype) if "weight" in wanted else None
    return _gradients(x, wanted, grad_image, grad_weight, grad)


# ---- CUDA: cuda/conv.cu; where there are tensor cores, _fused.py and _fused_backward.py


def _cuda_forward(g, x, weight, bias):
    with x.device:
        if _fused.covers(g, x):
            return image_rows(_fused.convolve(g, x, weight, bias), g)
        image = channels_last(x, x.dtype)
        packed = pack_weight(weight, g, x.dtype)
        y = array_module(x).empty((g.batch * g.positions, g.out_channels), x.dtype)
        for chunk in chunks(g, g.channels * x.itemsize):
            columns = _im2col(g, image, chunk)
            _cuda.gemm(columns, packed.mT, out=by_group(chunk.rows(y), g))
        if bias is not None:
            y += bias
        return image_rows(y, g)


def _cuda_backward(g, grad_y, x, weight, wanted):
    with x.device:
        grad = gradient_rows(grad_y, g, x.dtype)
        grad_image = grad_weight = None
        if wanted & {"x", "weight"}:
            run = _column_gradients
            if _fused.covers(g, x):
                run = _depthwise_gradients if g.is_depthwise else _fused_gradients
            grad_image, grad_weight = run(g, grad, channels_last(x, x.dtype), weight, wanted)
        return _gradients(x, wanted, grad_image, grad_weight, grad)


def _fused_gradients(g, grad, image, weight, wanted):
    """The gradients by kernels that make columns, and multiply for their gradients, themselves."""
    grad_image = grad_weight = None
    o = _fused.operands(image, None, None)
    grad = _fused_backward.pack_rows(g, o, grad)
    if "weight" in wanted:
        grad_weight = _fused_backward.weight_gradient(g, o, grad, image, weight)
    if "x" in wanted:
        xp = array_module(image)
        grad_image = xp.empty(image.shape, compute_dtype(image.dtype))
        packed = _fused_backward.pack_weights(g, o, weight)
        for chunk in chunks(g, g.channels * image.itemsize):
            grad_columns = xp.empty(chunk.columns, image.dtype)
            column_gradient = _fused_backward.column_launch(g, o, chunk)
            column_gradient(grad, image, None, None, packed, grad_columns, None, None)
            _col2im_launch(g, image.dtype, chunk)(grad_columns, None, grad_image)
    return grad_image, grad_weight


def _depthwise_gradients(g, grad, image, weight, wanted):
    """The gradients with one channel per group, whose columns never lie in memory."""
    xp, grad_image, grad_weight = array_module(image), None, None
    if "weight" in wanted:
        o = _fused.operands(image, None, None)
        grad_weight = _fused_backward.depthwise_weight_gradient(g, o, grad, image, weight)
    if "x" in wanted:
        grad_image = xp.empty(image.shape, compute_dtype(image.dtype))
        col2im = _col2im_launch(g, image.dtype, Chunk(0, len(grad), ()), _cuda.vector(grad))
        col2im(grad, _fused.by_tap(g, weight), grad_image)
    return grad_image, grad_weight


def _column_gradients(g, grad, image, weight, wanted):
    """The gradients by way of columns, chunk by chunk, and products of the BLAS."""
    xp, dtype = array_module(image), compute_dtype(image.dtype)
    packed = pack_weight(weight, g, image.dtype)
    grad_packed = xp.zeros(packed.shape, dtype)
    grad_image = xp.empty(image.shape, dtype) if "x" in wanted else None
    for chunk in chunks(g, g.channels * image.itemsize):
        grad_out = by_group(chunk.rows(grad), g)
        if "weight" in wanted:
            columns = _im2col(g, image, chunk)
            _cuda.gemm(grad_out.mT, columns, grad_packed, accumulate=True)
        if "x" in wanted:
            grad_columns = xp.empty(chunk.columns, image.dtype)
            _cuda.gemm(grad_out, packed, out=grad_columns)
            _col2im_launch(g, image.dtype, chunk)(grad_columns, None, grad_image)
    return grad_image, unpack_weight(grad_packed, g, image.dtype) if "weight" in wanted else None


@functools.lru_cache(maxsize=CALLS)
def _im2col_launch(g: ConvGeometry, dtype: np.dtype, vector: int, chunk: Chunk) -> _cuda.Launch:
    vec = math.gcd(g.channels // g.groups, vector)
    return _cuda.row_launch(
        "conv.cu", "im2col", chunk.size * g.taps, g.channels // vec, g, chunk.first, chunk.size,
        DTYPE=dtype, VEC=vec, DEPTHWISE=0, INDEX=index_type(g),
    )  # fmt: skip


def _im2col(g, image, chunk):
    columns = array_module(image).empty(chunk.columns, image.dtype)
    _im2col_launch(g, image.dtype, _cuda.vector(image), chunk)(image, columns)
    return columns


@functools.lru_cache(maxsize=CALLS)
def _col2im_launch(
    g: ConvGeometry, dtype: np.dtype, chunk: Chunk, rows_vector: int = 0
) -> _cuda.Launch:
    images, macros = chunk.images(g), column_macros(g, dtype, rows_vector)
    return _cuda.row_launch(
        "conv.cu", "col2im", len(images) * g.height * g.width, g.channels // macros["VEC"],
        g, len(images), images.start, chunk.first, chunk.size,
        DTYPE=dtype, INDEX=index_type(g), **macros,
    )  # fmt: skip
