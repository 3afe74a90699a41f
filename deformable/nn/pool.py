"""Pooling on a regular grid. Windows are walked tap by tap: one array operation per tap."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from deformable._array import Array, Pair, array_module, check_shape, compute_dtype, pair
from deformable.nn.layer import Backward, Layer

Shape = tuple[int, ...]


class _Pool2d(Layer):
    """Windows of ``kernel_size`` that move by ``stride`` (as large by default)."""

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> None:
        name = type(self).__name__
        kernel = pair(name, "kernel_size", kernel_size, least=1)
        stride = kernel if stride is None else pair(name, "stride", stride, least=1)
        padding = pair(name, "padding", padding, least=0)
        self.axes = tuple(zip(kernel, stride, padding, strict=True))
        if any(2 * p > k for k, _, p in self.axes):
            raise ValueError(
                f"{name}: padding is {padding}, expected at most half of kernel_size {kernel}"
            )

    def _filled(self, x: Array, value: float, dtype: Any = None) -> Array:
        """An output for x (N, C, H, W), in the memory order of x."""
        name = type(self).__name__
        check_shape(name, "x", x, ("N", "C", "H", "W"))
        sizes = [
            (size + 2 * p - k) // s + 1
            for size, (k, s, p) in zip(x.shape[2:], self.axes, strict=True)
        ]
        if min(sizes) < 1:
            raise ValueError(f"{name}: x has shape {x.shape}, expected one that a window fits in")
        return array_module(x).full_like(x, value, dtype=dtype, shape=(*x.shape[:2], *sizes))

    def _taps(self, shape_x: Shape, shape_y: Shape) -> Iterator[tuple[Any, Any]]:
        """For each tap, row-major: what it sees of x, and the part of y for which that is x."""
        rows, columns = (
            [_seen(i - p, s, size_x, size_y) for i in range(k)]
            for (k, s, p), size_x, size_y in zip(self.axes, shape_x[2:], shape_y[2:], strict=True)
        )
        for rows_x, rows_y in rows:
            for columns_x, columns_y in columns:
                yield (..., rows_x, columns_x), (..., rows_y, columns_y)


class MaxPool2d(_Pool2d):
    """The largest value of each window.

    The first of equal values, in row-major order, gets the gradient. A NaN makes the results NaN
    whose windows hold it; those send no gradient back. Padding never wins.

    Parameters
    ----------
    kernel_size : int or (int, int)
    stride : int or (int, int), optional
        ``kernel_size`` by default.
    padding : int or (int, int)
        At most half of ``kernel_size``.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> y, backward = nn.MaxPool2d(2)(np.arange(16.0).reshape(1, 1, 4, 4))
    >>> y[0, 0].tolist(), backward(np.ones_like(y))[0, 0, 1].tolist()
    ([[5.0, 7.0], [13.0, 15.0]], [0.0, 1.0, 0.0, 1.0])
    """

    def __call__(self, x: Array) -> tuple[Array, Backward]:
        """Pool x (N, C, H, W)."""
        xp = array_module(x)
        y = self.predict(x)

        def backward(grad_y: Array) -> Array:
            grad_x = xp.zeros_like(x, dtype=compute_dtype(x.dtype))
            open_ = xp.ones_like(y, dtype=bool)
            for at_x, at_y in self._taps(x.shape, y.shape):
                wins = open_[at_y] & (x[at_x] == y[at_y])
                open_[at_y] ^= wins
                grad_x[at_x] += grad_y[at_y] * wins
            return grad_x.astype(x.dtype, copy=False)

        return y, backward

    def predict(self, x: Array) -> Array:
        """Pool x (N, C, H, W)."""
        xp = array_module(x)
        y = self._filled(x, -np.inf)
        for at_x, at_y in self._taps(x.shape, y.shape):
            xp.maximum(y[at_y], x[at_x], out=y[at_y])
        return y


class AvgPool2d(_Pool2d):
    """The mean of each window, of which padding counts as zeros.

    Parameters
    ----------
    kernel_size : int or (int, int)
    stride : int or (int, int), optional
        ``kernel_size`` by default.
    padding : int or (int, int)
        At most half of ``kernel_size``.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> y, backward = nn.AvgPool2d(2)(np.arange(16.0).reshape(1, 1, 4, 4))
    >>> y[0, 0].tolist(), backward(np.ones_like(y))[0, 0, 0].tolist()
    ([[2.5, 4.5], [10.5, 12.5]], [0.25, 0.25, 0.25, 0.25])
    """

    def __call__(self, x: Array) -> tuple[Array, Backward]:
        """Pool x (N, C, H, W)."""
        share = 1 / math.prod(k for k, _, _ in self.axes)
        shape, dtype = x.shape, x.dtype
        total = self._filled(x, 0, compute_dtype(dtype))
        for at_x, at_y in self._taps(shape, total.shape):
            total[at_y] += x[at_x]

        def backward(grad_y: Array) -> Array:
            xp = array_module(grad_y)
            grad_x = xp.zeros_like(grad_y, dtype=compute_dtype(dtype), shape=shape)
            for at_x, at_y in self._taps(shape, grad_y.shape):
                grad_x[at_x] += grad_y[at_y]
            return (grad_x * share).astype(dtype, copy=False)

        return (total * share).astype(dtype, copy=False), backward


class GlobalAvgPool2d(Layer):
    """The mean of each channel: (N, C, H, W) to (N, C).

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> y, backward = nn.GlobalAvgPool2d()(np.ones((2, 3, 4, 4)))
    >>> y.shape, backward(y).shape
    ((2, 3), (2, 3, 4, 4))
    """

    def __call__(self, x: Array) -> tuple[Array, Backward]:
        """Average x (N, C, H, W)."""
        check_shape("GlobalAvgPool2d", "x", x, ("N", "C", "H", "W"))
        n, c, h, w = shape = x.shape
        wide = compute_dtype(x.dtype)
        y = (x.sum(axis=(2, 3), dtype=wide) / (h * w)).astype(x.dtype, copy=False)

        def backward(grad_y: Array) -> Array:
            grad_mean = (grad_y / (h * w)).reshape(n, c, 1, 1)
            return array_module(grad_y).broadcast_to(grad_mean, shape)

        return y, backward


def _seen(shift: int, stride: int, size_x: int, size_y: int) -> tuple[slice, slice]:
    """Along one axis: the x at ``y * stride + shift`` that exist, and their y."""
    first = max(0, -(shift // stride))
    count = max(0, min(size_y, (size_x - 1 - shift) // stride + 1) - first)
    start = first * stride + shift
    return slice(start, start + count * stride, stride), slice(first, first + count)
