"""Pooling on a regular grid. Windows are walked tap by tap: one array operation per tap."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from deformable._array import Array, Pair, array_module, pair
from deformable.nn.layer import Backward, Layer


class _Pool2d(Layer):
    """Windows of ``kernel_size`` that move by ``stride`` (as large by default)."""

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> None:
        name = type(self).__name__
        self.kernel = pair(name, "kernel_size", kernel_size, least=1)
        self.stride = self.kernel if stride is None else pair(name, "stride", stride, least=1)
        self.padding = pair(name, "padding", padding, least=0)
        if any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise ValueError(
                f"{name}: padding is {padding}, expected at most half of kernel_size {kernel_size}"
            )

    def _filled(self, x: Array, value: float) -> Array:
        """An output for x (N, C, H, W), in the memory order of x."""
        sizes = [
            (size + 2 * p - k) // s + 1
            for size, k, s, p in zip(
                x.shape[2:], self.kernel, self.stride, self.padding, strict=True
            )
        ]
        if min(sizes) < 1:
            raise ValueError(
                f"{type(self).__name__}: x has shape {x.shape}, "
                f"expected at least kernel_size {self.kernel} with padding {self.padding}"
            )
        return array_module(x).full_like(x, value, shape=(*x.shape[:2], *sizes))

    def _taps(self, x: Array, y: Array) -> Iterator[tuple[Any, Any]]:
        """Per tap, row-major: where in x it looks, and for which part of y it is inside x."""
        rows, columns = (
            [
                _tap(i, self.stride[axis], self.padding[axis], x.shape[2 + axis], y.shape[2 + axis])
                for i in range(self.kernel[axis])
            ]
            for axis in (0, 1)
        )
        for x_rows, y_rows in rows:
            for x_columns, y_columns in columns:
                yield (..., x_rows, x_columns), (..., y_rows, y_columns)


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
            grad_x = xp.zeros_like(x)
            open_ = xp.ones_like(y, dtype=bool)
            for at_x, at_y in self._taps(x, y):
                wins = open_[at_y] & (x[at_x] == y[at_y])
                open_[at_y] ^= wins
                grad_x[at_x] += grad_y[at_y] * wins
            return grad_x

        return y, backward

    def predict(self, x: Array) -> Array:
        """Pool x (N, C, H, W)."""
        xp = array_module(x)
        y = self._filled(x, -np.inf)
        for at_x, at_y in self._taps(x, y):
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
        share = 1 / (self.kernel[0] * self.kernel[1])
        y = self._filled(x, 0)
        for at_x, at_y in self._taps(x, y):
            y[at_y] += x[at_x] * share

        def backward(grad_y: Array) -> Array:
            grad_x = array_module(x).zeros_like(x)
            for at_x, at_y in self._taps(x, y):
                grad_x[at_x] += grad_y[at_y] * share
            return grad_x

        return y, backward


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
        n, c, h, w = shape = x.shape
        y = x.mean(axis=(2, 3))

        def backward(grad_y: Array) -> Array:
            grad_mean = (grad_y / (h * w)).reshape(n, c, 1, 1)
            return array_module(grad_y).broadcast_to(grad_mean, shape)

        return y, backward


def _tap(tap: int, stride: int, padding: int, size: int, out: int) -> tuple[slice, slice]:
    """Along one axis: the inputs that a tap meets, and the outputs that meet them."""
    shift = tap - padding
    first = max(-(shift // stride), 0)  # the smallest o with o * stride + shift >= 0
    last = min((size - 1 - shift) // stride, out - 1)
    first = min(first, last + 1)
    start = first * stride + shift
    return slice(start, start + (last - first) * stride + 1, stride), slice(first, last + 1)
