"""Plain two-dimensional convolution, as the layers need it: columns times weights.

    y[n, o, p] = bias[o] + Σ_{c,t} weight[o, c, t] · x[n, c, p·stride − padding + t·dilation]

``deform_conv`` shares the geometry, the blocks and the products with the weights; the two
operators differ only in where the columns look.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from deformable import _cuda, _fused, _fused_backward
from deformable._arrange import channels_first, channels_last, fill_channels_last
from deformable._array import (
    CALLS,
    INT32_MAX,
    Array,
    Pair,
    Spec,
    array_module,
    check_dtypes,
    check_library,
    check_shape,
    check_wrt,
    compute_dtype,
    integer,
    pair,
    specs,
)

BLOCK_BYTES = 3 << 19  # of columns alive on the CPU: about what the caches of a core hold
LEAST_ROWS = 1024  # of a product on the CPU
SUM_BLOCK = 32, 8  # columns, and rows at a time, of a block of cuda/sum_rows.cu
CHUNK_BYTES = 32 << 20  # of columns alive on a GPU: they stay in its L2 cache

# Every block allocates what the one before has freed. glibc's malloc maps large arrays afresh each
# time, and the page faults cost up to a third of the time, until it has freed a larger one: that
# raises its mmap threshold, for arrays of up to 32 MiB. So one is freed here, once.
np.empty(30 << 20, np.uint8)


class ConvGeometry(NamedTuple):
    """All sizes of a convolution; kernels get it by value as the struct of the same fields."""

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    offset_groups: int

    @property
    def taps(self) -> int:
        return self.kernel_h * self.kernel_w

    @property
    def positions(self) -> int:
        """Output positions of one image."""
        return self.out_height * self.out_width

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.out_channels, self.out_height, self.out_width


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


def conv_grid(
    function: str, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[tuple[int, int], ...]:
    """Stride, padding and dilation, checked, along both axes each."""
    return (
        pair(function, "stride", stride, 1),
        pair(function, "padding", padding, 0),
        pair(function, "dilation", dilation, 1),
    )


def conv_geometry(
    function: str,
    arrays: Mapping[str, Spec],
    grid: tuple[tuple[int, int], ...],
    groups: int | None = None,
) -> ConvGeometry:
    """The sizes of a convolution, checked; ``groups`` is inferred from the shapes if None."""
    x, weight = arrays["x"], arrays["weight"]
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = grid
    check_shape(function, "x", x, ("N", "C", "H", "W"))
    check_shape(function, "weight", weight, ("O", "C // groups", "kh", "kw"))
    n, c, h, w = x.shape
    o, group_channels, kernel_h, kernel_w = weight.shape
    if min(c, o, group_channels, kernel_h, kernel_w) < 1:
        raise ValueError(
            f"{function}: x has shape {x.shape} and weight {weight.shape}, expected at least one "
            f"channel, output channel and tap"
        )
    if groups is None:
        groups = c // group_channels
    if groups < 1 or groups * group_channels != c:
        raise ValueError(
            f"{function}: weight has shape {weight.shape}, expected (O, C // groups, kh, kw) with "
            f"the {c} channels of x"
        )
    if o % groups:
        raise ValueError(
            f"{function}: weight has shape {weight.shape}, expected its first size to be "
            f"divisible by groups = {groups}"
        )
    check_shape(function, "bias", arrays.get("bias"), (o,))
    out_height = (h + 2 * pad_h - (dilation_h * (kernel_h - 1) + 1)) // stride_h + 1
    out_width = (w + 2 * pad_w - (dilation_w * (kernel_w - 1) + 1)) // stride_w + 1
    if min(out_height, out_width) < 1:
        raise ValueError(
            f"{function}: x has shape {x.shape}, expected an image that the kernel fits in "
            f"(the output would be {out_height} x {out_width})"
        )
    if max(h + 2 * pad_h, w + 2 * pad_w) > INT32_MAX:
        raise ValueError(
            f"{function}: padding is {(pad_h, pad_w)}, expected a padded side below 2^31"
        )
    return ConvGeometry(
        batch=n, channels=c, height=h, width=w,
        out_channels=o, out_height=out_height, out_width=out_width,
        kernel_h=kernel_h, kernel_w=kernel_w, stride_h=stride_h, stride_w=stride_w,
        pad_h=pad_h, pad_w=pad_w, dilation_h=dilation_h, dilation_w=dilation_w,
        groups=groups, offset_groups=1,
    )  # fmt: skip


# ---- columns times weights: what every convolution of the library is


def pack_weight(
    weight: Array, g: ConvGeometry, dtype: np.dtype, taps: slice = slice(None)
) -> Array:
    """The weights as (groups, output channels, taps · channels), in the order of the columns."""
    by_tap = weight.reshape(g.out_channels, g.channels // g.groups, g.taps).transpose(0, 2, 1)
    packed = by_tap[:, taps].astype(dtype, order="C")
    return packed.reshape(g.groups, g.out_channels // g.groups, -1)


def unpack_weight(packed: Array, g: ConvGeometry, dtype: np.dtype) -> Array:
    """The inverse of :func:`pack_weight`."""
    return (
        unpacked(packed, g)
        .astype(dtype, order="C")
        .reshape(g.out_channels, g.channels // g.groups, g.kernel_h, g.kernel_w)
    )


def unpacked(packed: Array, g: ConvGeometry) -> Array:
    """Packed weights of some taps as (output channels, channels // groups, taps): a view."""
    return packed.reshape(g.out_channels, -1, g.channels // g.groups).transpose(0, 2, 1)


def by_group(rows: Array, g: ConvGeometry) -> Array:
    """Output rows (M, O) seen as (groups, M, O // groups): a view."""
    return rows.reshape(len(rows), g.groups, g.out_channels // g.groups).transpose(1, 0, 2)


def image_rows(rows: Array, g: ConvGeometry) -> Array:
    """Output rows (N · Ho · Wo, O) seen as the image (N, O, Ho, Wo)."""
    return channels_first(rows.reshape(g.batch, g.out_height, g.out_width, g.out_channels))


def gradient_rows(grad_y: Array, g: ConvGeometry, dtype: np.dtype) -> Array:
    """The image (N, O, Ho, Wo) as output rows (N · Ho · Wo, O)."""
    return channels_last(grad_y, dtype).reshape(-1, g.out_channels)


def sum_rows(rows: Array, dtype: np.dtype) -> Array:
    """The sum of the rows of a matrix in this dtype, made in float32 at least."""
    xp, sums = array_module(rows), compute_dtype(dtype)
    if xp is np:
        return rows.sum(axis=0, dtype=sums).astype(dtype, copy=False)
    shape, sum_parts, add_parts = _sum_plan(rows.shape, rows.dtype, dtype)
    parts, out = xp.empty(shape, sums), xp.empty(shape[1], dtype)
    sum_parts(rows, parts)
    add_parts(parts, out)
    return out


def _gradients(x, wanted, grad_image, grad_weight, grad_rows):
    """The wanted gradients in the dtype of ``x``."""
    return Conv2dGradients(
        x=channels_first(grad_image.astype(x.dtype, copy=False)) if "x" in wanted else None,
        weight=grad_weight if "weight" in wanted else None,
        bias=sum_rows(grad_rows, x.dtype) if "bias" in wanted else None,
    )


# ---- NumPy


def tap_slices(g: ConvGeometry, tap_bytes: int) -> Iterator[slice]:
    """Slices of the taps, so short that a block of them has ``LEAST_ROWS`` positions, or all.

    A tap of a position takes ``tap_bytes``. Products of fewer rows spend their time on packing the
    weights.
    """
    rows = max(1, min(LEAST_ROWS, g.batch * g.positions))
    most = max(1, BLOCK_BYTES // (tap_bytes * rows))
    step = -(-g.taps // -(-g.taps // most))
    for first in range(0, g.taps, step):
        yield slice(first, min(first + step, g.taps))


def blocks(g: ConvGeometry, position_bytes: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of images, of their output rows, and of the positions (N · Ho · Wo) that these are.

    A block is several small images or some rows of a large one. It takes about ``BLOCK_BYTES``
    where a position takes ``position_bytes``.
    """
    line = g.out_width * position_bytes
    lines = min(g.out_height, max(1, BLOCK_BYTES // line))
    images = max(1, BLOCK_BYTES // (line * g.out_height))
    for n in range(0, g.batch, images):
        last = min(n + images, g.batch)
        for r in range(0, g.out_height, lines):
            end = min(r + lines, g.out_height)
            first = (n * g.out_height + r) * g.out_width
            count = (last - n) * (end - r) * g.out_width
            yield slice(n, last), slice(r, end), slice(first, first + count)


def columns_by_group(columns: np.ndarray, g: ConvGeometry) -> np.ndarray:
    """Columns (M, taps · channels) as (groups, M, taps · channels // groups)."""
    m, depth = len(columns), g.channels // g.groups
    split = columns.reshape(m, -1, g.groups, depth).transpose(2, 0, 1, 3)
    return split.reshape(g.groups, m, -1)


def columns_from_groups(columns: np.ndarray, g: ConvGeometry) -> np.ndarray:
    """The inverse of :func:`columns_by_group`."""
    m, depth = columns.shape[1], g.channels // g.groups
    split = columns.reshape(g.groups, m, -1, depth).transpose(1, 2, 0, 3)
    return split.reshape(m, -1)


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
    for images, lines, positions in (
        blocks(g, size * dtype.itemsize) if wanted & {"x", "weight"} else ()
    ):
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


class Chunk(NamedTuple):
    """Some of the N · Ho · Wo positions."""

    first: int
    size: int
    columns: tuple[int, int, int]  # their shape: (groups, size, taps · channels // groups)

    def rows(self, rows: Array) -> Array:
        """Those of the output rows (N · Ho · Wo, O)."""
        return rows[self.first : self.first + self.size]

    def images(self, g: ConvGeometry) -> range:
        """The images in which the positions lie."""
        return range(self.first // g.positions, (self.first + self.size - 1) // g.positions + 1)


def chunks(g: ConvGeometry, tap_bytes: int) -> tuple[Chunk, ...]:
    """All positions; a chunk takes ``CHUNK_BYTES`` where a tap of one takes ``tap_bytes``."""
    return _chunks(g, tap_bytes, CHUNK_BYTES)


@functools.lru_cache(maxsize=CALLS)
def _chunks(g: ConvGeometry, tap_bytes: int, limit: int) -> tuple[Chunk, ...]:
    total, depth = g.batch * g.positions, g.taps * (g.channels // g.groups)
    step = max(1, limit // (g.taps * tap_bytes))
    counts = ((first, min(step, total - first)) for first in range(0, total, step))
    return tuple(Chunk(first, count, (g.groups, count, depth)) for first, count in counts)


def index_type(g: ConvGeometry) -> str:
    """The C type that counts pixels and positions."""
    most = g.batch * max(g.height * g.width, g.positions)
    return "int" if most <= INT32_MAX else "int64"


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
                run = _depthwise_gradients if _fused.is_depthwise(g) else _fused_gradients
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
        grad_weight = depthwise_weight_gradient(g, o, grad, image, weight)
    if "x" in wanted:
        grad_image = xp.empty(image.shape, compute_dtype(image.dtype))
        col2im = _col2im_launch(g, image.dtype, Chunk(0, len(grad), ()), _cuda.vector(grad))
        col2im(grad, _fused.by_tap(g, weight), grad_image)
    return grad_image, grad_weight


def depthwise_weight_gradient(
    g: ConvGeometry,
    o: _fused.Operands,
    grad_rows: Array,
    image: Array,
    weight: Array,
    offset: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """The gradient of ``weight`` with one channel per group."""
    parts = _fused_backward.depthwise_parts(g, o, grad_rows, image, offset, mask)
    return sum_rows(parts, weight.dtype).reshape(weight.shape)


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


def column_macros(
    g: ConvGeometry, dtype: np.dtype, rows_vector: int, *vectors: int
) -> dict[str, int]:
    """Where kernels find the gradients of columns, and how many channels they load at once.

    They lie in memory if ``rows_vector`` is 0. Otherwise, with one channel per group, they are made
    of the gradient of the output rows, of which a load takes so many elements at most; ``vectors``
    is the same of other arrays.
    """
    run = g.channels // g.offset_groups if rows_vector else _fused.run_length(g)
    most = rows_vector or _cuda.LOAD_BYTES // dtype.itemsize
    return {"DEPTHWISE": int(rows_vector > 0), "VEC": math.gcd(run, most, *vectors)}


@functools.lru_cache(maxsize=CALLS)
def _sum_plan(
    shape: tuple[int, int], given: np.dtype, dtype: np.dtype
) -> tuple[tuple[int, int], _cuda.Launch, _cuda.Launch]:
    """The launches that add up rows, about as many parts as a part has rows, and then the parts."""
    rows, columns = shape
    split = max(1, math.isqrt(rows), -(-rows // _fused.GRID_MAX))
    parts, strips = max(1, -(-rows // split)), -(-columns // SUM_BLOCK[0])
    sums = compute_dtype(dtype)
    kernel = functools.partial(_cuda.Launch, "sum_rows.cu", "sum_rows", INDEX="int", VEC=1)
    return (
        (parts, columns),
        kernel((strips, parts), SUM_BLOCK, rows, columns, split, DTYPE=given, OUT=sums),
        kernel((strips, 1), SUM_BLOCK, parts, columns, parts, DTYPE=sums, OUT=dtype),
    )
