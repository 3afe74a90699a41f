"""RoI pooling: the maximum, or the position-sensitive mean, of the pixels in a RoI's bins.

    y[k, c, p] = max_{q ∈ cell p of RoI k} x[n, c, q]

A cell holds every pixel that the bin touches (Girshick, "Fast R-CNN" (2015), Sec. 2.1). The mean
over the cells, with channels of their own for every bin, is Eq. 1 of Dai et al., "R-FCN" (2016),
and without them Eq. 5 of Dai et al., "Deformable Convolutional Networks" (2017).

In NumPy the maximum is taken along the lines of a cell first, then over these: lines are shared by
all bins that begin and end at the same columns.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from deformable._array import Array, Pair, array_module, check_wrt, compute_dtype
from deformable._roi import (
    IMAGE,
    MAP,
    Bins,
    RoIGeometry,
    RoIGradients,
    Rule,
    arrange,
    boxes,
    cuda_maximum,
    cuda_maximum_backward,
    empty_image,
    image_from_rows,
    make_bins,
    output_from_rows,
    output_rows,
    ranges,
    roi_geometry,
)
from deformable._segments import Segments, largest, segments, sortable, winners
from deformable.roi_align import average, average_backward

CELLS = Rule(rounding=MAP, shift=0.0, least=1.0, whole=1, phase=0.0, margin=0.0, kept=1)
PIXELS = CELLS._replace(rounding=IMAGE, least=0.1)


def roi_pool(x: Array, rois: Array, output_size: Pair, spatial_scale: float = 1.0) -> Array:
    """The largest pixel in each bin of regions of interest.

    Parameters
    ----------
    x : (N, C, H, W) array
        Feature maps: float16, bfloat16, float32 or float64, of numpy or cupy, in any memory order.
    rois : (K, 5) array
        Index of the feature map in the batch (truncated to an integer) and x1, y1, x2, y2 in pixels
        of the image, the last ones included. Of the dtype of `x`, float32 or float64.
    output_size : int or (height, width)
        Bins of a RoI, PH x PW.
    spatial_scale : float
        Pixels of the feature map per pixel of the image.

    Returns
    -------
    (K, C, PH, PW) array
        It lies channels-last in memory.

    Raises
    ------
    TypeError
        Arrays of different libraries, dtypes that are none of the four.
    ValueError
        Shapes that do not fit, arrays on different devices. For NumPy arrays also RoIs with an
        index outside of the batch or a number that is not finite; for CuPy arrays, whose values
        are not looked at, the result of such a RoI is NaN and it sends no gradient back.

    Notes
    -----
    Corners are multiplied by the scale and rounded, half away from zero. Bins share the pixels
    that their borders cross. One without pixels is 0, one with a NaN is NaN.
    Girshick 2015 (arXiv 1504.08083), Sec. 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> roi_pool(x, np.array([[0.0, 1, 0, 2, 3]]), (2, 1))
    array([[[[ 6.],
             [14.]]]])
    """
    g = roi_geometry("roi_pool", x, rois, output_size, spatial_scale)
    run = _numpy_maximum if array_module(x) is np else _cuda_maximum
    return run("roi_pool", g, x, rois)


def roi_pool_backward(
    grad_y: Array,
    x: Array,
    rois: Array,
    output_size: Pair,
    spatial_scale: float = 1.0,
    wrt: Iterable[str] | None = None,
) -> RoIGradients:
    """Gradient of :func:`roi_pool` with respect to `x`.

    Parameters
    ----------
    grad_y : (K, C, PH, PW) array
        Gradient of the result: of the dtype of `x`, float32 or float64.
    x, rois, output_size, spatial_scale
        As given to :func:`roi_pool`.
    wrt : iterable of str, optional
        Names of the gradients to compute, of ``x``; all by default.

    Returns
    -------
    RoIGradients
        Field ``x``, which lies channels-last in memory; None where not asked for. Bitwise
        reproducible.

    Raises
    ------
    TypeError, ValueError
        As :func:`roi_pool`, and where `grad_y` or `wrt` do not fit.

    Notes
    -----
    The gradient of a bin goes to the first of its largest pixels, in row-major order; a NaN is
    larger than any number.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[[[1.0, 2.0, 2.0]]]])
    >>> roi_pool_backward(np.ones((1, 1, 1, 1)), x, np.array([[0.0, 0, 0, 2, 0]]), 1).x
    array([[[[0., 1., 0.]]]])
    """
    name = "roi_pool_backward"
    g = roi_geometry(name, x, rois, output_size, spatial_scale, grad_y=grad_y)
    if "x" not in check_wrt(name, wrt, RoIGradients._fields):
        return RoIGradients(None)
    run = _numpy_maximum_backward if array_module(x) is np else _cuda_maximum_backward
    return RoIGradients(run(name, g, grad_y, x, rois))


def ps_roi_pool(
    x: Array,
    rois: Array,
    output_size: Pair,
    spatial_scale: float = 1.0,
    group_size: Pair | None = None,
) -> Array:
    """The mean pixel in each bin of regions of interest, of channels that belong to the bin.

    Parameters
    ----------
    x : (N, C, H, W) array
        Feature maps, as for :func:`roi_pool`; C is a multiple of gh gw. Output channel c of bin
        (ph, pw) sees channel (c gh + ph gh // PH) gw + pw gw // PW.
    rois, output_size, spatial_scale
        As for :func:`roi_pool`.
    group_size : int or (height, width), optional
        Groups of channels, gh x gw: `output_size` by default. With 1 it is average RoI pooling.

    Returns
    -------
    (K, C // (gh gw), PH, PW) array
        It lies channels-last in memory.

    Raises
    ------
    TypeError, ValueError
        As :func:`roi_pool`, and where C is no multiple of gh gw.

    Notes
    -----
    Corners are rounded, half away from zero, in pixels of the image; the lower right pixel belongs
    to the RoI, which is at least 0.1 large on the feature map. A bin without pixels is 0. It is
    the original operator; torchvision's never reads the last row and column.
    Dai et al. 2016 (arXiv 1605.06409), Eq. 1.

    Examples
    --------
    Channel 0 is for the left half of a RoI, channel 1 for the right one:

    >>> import numpy as np
    >>> x = np.stack([np.full((2, 4), 3.0), np.full((2, 4), 5.0)])[None]
    >>> ps_roi_pool(x, np.array([[0.0, 0, 0, 3, 1]]), (1, 2))
    array([[[[3., 5.]]]])
    """
    g = _ps_geometry("ps_roi_pool", x, rois, output_size, spatial_scale, group_size)
    return average("ps_roi_pool", g, PIXELS, x, rois)


def ps_roi_pool_backward(
    grad_y: Array,
    x: Array,
    rois: Array,
    output_size: Pair,
    spatial_scale: float = 1.0,
    group_size: Pair | None = None,
    wrt: Iterable[str] | None = None,
) -> RoIGradients:
    """Gradient of :func:`ps_roi_pool` with respect to `x`.

    Parameters
    ----------
    grad_y : (K, C // (gh gw), PH, PW) array
        Gradient of the result: of the dtype of `x`, float32 or float64.
    x, rois, output_size, spatial_scale, group_size
        As given to :func:`ps_roi_pool`.
    wrt : iterable of str, optional
        Names of the gradients to compute, of ``x``; all by default.

    Returns
    -------
    RoIGradients
        Field ``x``, which lies channels-last in memory; None where not asked for. Bitwise
        reproducible.

    Raises
    ------
    TypeError, ValueError
        As :func:`ps_roi_pool`, and where `grad_y` or `wrt` do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> x, rois = np.zeros((1, 2, 1, 4)), np.array([[0.0, 0, 0, 3, 0]])
    >>> ps_roi_pool_backward(np.ones((1, 1, 1, 2)), x, rois, (1, 2)).x
    array([[[[0.5, 0.5, 0. , 0. ]],
    <BLANKLINE>
            [[0. , 0. , 0.5, 0.5]]]])
    """
    name = "ps_roi_pool_backward"
    g = _ps_geometry(name, x, rois, output_size, spatial_scale, group_size, grad_y=grad_y)
    if "x" not in check_wrt(name, wrt, RoIGradients._fields):
        return RoIGradients(None)
    return RoIGradients(average_backward(name, g, PIXELS, grad_y, x, rois))


def _ps_geometry(function, x, rois, output_size, spatial_scale, group_size, **gradient):
    group_size = output_size if group_size is None else group_size
    return roi_geometry(
        function, x, rois, output_size, spatial_scale, group_size=group_size, **gradient
    )


# ---- NumPy


@np.errstate(all="ignore")
def _numpy_maximum(function, g, x, rois):
    dtype = compute_dtype(x.dtype)
    lines = _lines(g, make_bins(g, CELLS, boxes(function, g, CELLS, rois)))
    image = arrange(x, g, dtype)
    y = np.empty((g.rows, g.channels), dtype)
    for rows, own in _blocks(g, lines, dtype):
        along_x, along_y = _segments(g, lines, rows, own)
        y[rows][along_y.order] = largest(largest(image, along_x), along_y)
    return output_from_rows(y.astype(x.dtype, copy=False), g)


@np.errstate(all="ignore")
def _numpy_maximum_backward(function, g, grad_y, x, rois):
    dtype = compute_dtype(x.dtype)
    lines = _lines(g, make_bins(g, CELLS, boxes(function, g, CELLS, rois)))
    keys = sortable(arrange(x, g, dtype))
    grad_image = empty_image(g, dtype)
    channel = np.arange(g.channels)
    for rows, own in _blocks(g, lines, dtype):
        along_x, along_y = _segments(g, lines, rows, own)
        best, column = winners(keys, along_x)
        _, place = winners(best, along_y, codes=column, pitch=g.width)
        cell = along_y.order[: along_y.sizes[0] if len(along_y.sizes) else 0]  # with a pixel
        # so many pixels after the cell's first one lies the winner
        winner = np.multiply(place[: len(cell)], g.channels, dtype=np.intp)
        winner += lines.pixel[lines.first[rows][cell], None] * g.channels
        winner += channel
        grad = output_rows(grad_y, g, dtype, rows)
        np.add.at(grad_image.reshape(-1), winner.ravel(), grad[cell].ravel())
    return image_from_rows(grad_image.astype(x.dtype, copy=False), g)


class Lines(NamedTuple):
    """The lines of pixels that cells consist of.

    A RoI has a line for each of its rows of pixels and columns of bins; from one line of a cell to
    the next there are PW.
    """

    pixel: np.ndarray  # (lines,): the first one
    width: np.ndarray
    first: np.ndarray  # (cells,): the first line
    height: np.ndarray  # how many; 0 for a cell without pixels
    of_roi: np.ndarray  # (RoIs,): how many lines


def _lines(g: RoIGeometry, cells: Bins) -> Lines:
    first, size = (a.astype(np.int64) for a in (cells.runs.start, cells.runs.total))
    along_x = g.rois * g.pooled_h  # the first of these runs
    (first_y, first_x), (height, width) = (
        (a[:along_x].reshape(-1, g.pooled_h), a[along_x:].reshape(-1, g.pooled_w))
        for a in (first, size)
    )
    top, bottom = first_y[:, 0], first_y[:, -1] + height[:, -1]
    rows = np.maximum(bottom - top, 0)
    before = np.cumsum(rows) - rows  # rows of the RoIs before
    roi = np.repeat(np.arange(len(rows)), rows)
    start = (cells.image[:: g.bins] * g.height + top - before) * g.width  # of row 0 of all
    pixel = (start[roi] + np.arange(len(roi)) * g.width)[:, None] + first_x[roi]
    line = (first_y + (before - top)[:, None])[:, :, None] * g.pooled_w + np.arange(g.pooled_w)
    lines_of_cell = height[:, :, None] * (width > 0)[:, None]
    return Lines(
        pixel.ravel(), width[roi].ravel(), line.ravel(), lines_of_cell.ravel(), rows * g.pooled_w
    )


def _blocks(g: RoIGeometry, lines: Lines, dtype: np.dtype) -> Iterator[tuple[slice, slice]]:
    """The cells of some RoIs, and their lines."""
    ends = np.concatenate(([0], np.cumsum(lines.of_roi)))
    for first, stop in ranges((lines.of_roi + g.bins) * (2 * g.channels * dtype.itemsize)):
        yield slice(first * g.bins, stop * g.bins), slice(ends[first], ends[stop])


def _segments(g: RoIGeometry, lines: Lines, cells: slice, own: slice) -> tuple[Segments, Segments]:
    """The pixels of each of these lines, and the lines of each cell in the order of the former."""
    along_x = segments(lines.pixel[own], lines.width[own])
    first = lines.first[cells] - own.start
    return along_x, segments(first, lines.height[cells], g.pooled_w, along_x.inverse())


# ---- CUDA: cuda/roi_pool.cu


def _cuda_maximum(function, g, x, rois):
    return cuda_maximum("roi_pool.cu", g, CELLS, x, rois)


def _cuda_maximum_backward(function, g, grad_y, x, rois):
    return cuda_maximum_backward("roi_pool.cu", g, CELLS, grad_y, x, rois)
