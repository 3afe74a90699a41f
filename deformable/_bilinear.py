"""Bilinear sampling as a sparse matrix: the NumPy twin of ``cuda/bilinear.cuh``.

The image lies channels-last with a border of two zeros, (N, H + 4, W + 4, C). A position is
clipped to [-2, size] along each axis, so that the four corners floor and floor + 1 are always
in the array, and those that are outside of the image are zeros. Everything else follows without
a single test: a position in [-1, size) sees the image as the definition says, any other sees
only the border, and the derivative of the interpolation is the right-hand one everywhere.

One sample is one row of a sparse matrix S with four entries:

    samples = S @ image         gradient of the image = S.T @ gradient of the samples
"""

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from deformable._arrange import fill_channels_last
from deformable._array import INT32_MAX, Array

BORDER = 2


def bordered(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The (N, C, H, W) image, channels-last and with its border of zeros."""
    n, c, h, w = x.shape
    out = np.zeros((n, h + 2 * BORDER, w + 2 * BORDER, c), dtype)
    fill_channels_last(without_border(out), x)
    return out


def without_border(image: np.ndarray) -> np.ndarray:
    """The (N, H, W, C) inside of a bordered image: a view."""
    return image[:, BORDER:-BORDER, BORDER:-BORDER]


def split(position: Array, size: int) -> tuple[Array, Array]:
    """Integer cell and fraction in [0, 1) of positions along an axis (overwritten).

    ±inf becomes a cell of the border. NaN too, but its fraction stays NaN.
    """
    np.clip(position, -BORDER, size, out=position)
    floor = np.floor(position)
    position -= floor
    cell = floor.astype(np.int32)  # of NaN, any number
    return np.clip(cell, -BORDER, size, out=cell), position


class Samples(NamedTuple):
    """Where a block of sampling positions looks; all arrays are flat, in the order of the rows."""

    first: int  # the first row of the image that any of them sees
    corner: np.ndarray  # the row, counted from there, of the upper left corner
    steps: tuple[int, int, int, int]  # from that to the four corners 00, 01, 10, 11
    ly: np.ndarray
    lx: np.ndarray

    def seen(self, image: np.ndarray) -> np.ndarray:
        """The band of rows of ``image`` that these samples see: a view."""
        return image[self.first : self.first + int(self.corner.max()) + self.steps[3] + 1]

    def matrix(self, scale: np.ndarray | None, seen: np.ndarray) -> csr_array:
        """S: four weights per row, multiplied by ``scale``, acting on the rows ``seen``."""
        rows = len(self.ly)
        weight = np.empty((rows, 4), self.ly.dtype)
        bottom = self.ly if scale is None else self.ly * scale
        top = 1 - self.ly if scale is None else scale - bottom
        np.multiply(top, self.lx, out=weight[:, 1])
        np.subtract(top, weight[:, 1], out=weight[:, 0])
        np.multiply(bottom, self.lx, out=weight[:, 3])
        np.subtract(bottom, weight[:, 3], out=weight[:, 2])
        index = np.empty((rows, 4), self.corner.dtype)
        for j, step in enumerate(self.steps):
            np.add(self.corner, step, out=index[:, j])
        start = np.arange(0, 4 * rows + 1, 4, dtype=index.dtype)
        return csr_array((weight.ravel(), index.ravel(), start), shape=(rows, len(seen)))

    def corner_dots(self, seen: np.ndarray, grad: np.ndarray) -> tuple[np.ndarray, ...]:
        """<pixel of the corner, gradient of the sample> for the four corners: (rows,) each."""
        ones = np.ones(seen.shape[1], seen.dtype)
        taken = np.empty_like(grad)

        def dot(step: int) -> np.ndarray:
            seen.take(self.corner + step, axis=0, out=taken, mode="clip")
            return np.multiply(taken, grad, out=taken) @ ones

        return tuple(dot(step) for step in self.steps)

    def gradients(
        self, seen: np.ndarray, grad: np.ndarray, scale: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of the positions y and x and of ``scale``, given those of the samples.

        Every corner dot is weighted as its corner is: what hardly counts hardly errs.
        """
        a, b, c, d = self.corner_dots(seen, grad)
        left, upper = 1 - self.lx, 1 - self.ly
        top, bottom = left * a + self.lx * b, left * c + self.lx * d
        along_y = bottom - top
        along_x = upper * (b - a) + self.ly * (d - c)
        value = upper * top + self.ly * bottom
        # 0 · fraction: a NaN along one axis makes both gradients NaN
        factor = 0 * (self.ly + self.lx) + (1 if scale is None else scale)
        return along_y * factor, along_x * factor, value


def locate(y: np.ndarray, x: np.ndarray, height: int, width: int, groups: int) -> Samples:
    """Samples at the positions (images, ..., groups) ``y`` and ``x``, which are overwritten.

    The rows of the image are (images, height + 4, width + 4, groups), flattened: every group of
    channels of a pixel is a row of its own.
    """
    images = y.shape[0]
    rows, columns = height + 2 * BORDER, width + 2 * BORDER
    cell_y, ly = split(y, height)
    cell_x, lx = split(x, width)
    size = images * rows * columns * groups
    corner = cell_y.astype(np.int64 if size > INT32_MAX else np.int32, copy=False)
    corner += BORDER
    corner *= columns
    corner += cell_x
    corner += BORDER
    if groups > 1:
        corner *= groups
        corner += np.arange(groups, dtype=corner.dtype)
    if images > 1:
        begin = np.arange(0, size, rows * columns * groups, dtype=corner.dtype)
        corner += begin.reshape(images, *[1] * (corner.ndim - 1))
    steps = (0, groups, columns * groups, (columns + 1) * groups)
    corner = corner.ravel()
    first = int(corner.min())
    corner -= first
    return Samples(first, corner, steps, ly.ravel(), lx.ravel())
