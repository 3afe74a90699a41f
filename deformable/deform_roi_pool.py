"""Deformable RoI pooling, plain and position-sensitive: every bin is moved by an offset.

    y[k, c, p] = mask[k, p] · mean of the samples X(n, c, q) of bin p
    q = corner + p · bin + gamma · size[k] · offset[k, p] + step of the sample

X is the image between its pixels, clamped to them as in ``roi_align``; offsets are fractions of
the RoI's size, times gamma. It is Eq. 6 of Dai et al., "Deformable Convolutional Networks"
(2017), and the modulated form of Zhu et al., "Deformable ConvNets v2" (2018).

RoI offsets are **(dx, dy)**; those of a deformable convolution are (dy, dx).

The operator is the sparse matrix of ``roi_align``, and the gradient of a position is the same
matrix with the hats along that axis replaced by their derivatives.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from deformable import _cuda
from deformable._array import (
    CALLS,
    Array,
    Pair,
    Spec,
    array_module,
    check_shape,
    check_wrt,
    compute_dtype,
    pair,
)
from deformable._roi import (
    IMAGE,
    RoIGeometry,
    Rule,
    arrange,
    bins_launch,
    blocks,
    boxes,
    cuda_image,
    cuda_output_rows,
    empty_image,
    image_from_rows,
    in_double,
    macros,
    make_bins,
    make_plan,
    mask_rows,
    matrix_bytes,
    output_rows,
    padded,
    parts,
    roi_geometry,
)
from deformable.roi_align import ALIGNED, average, cuda_image_gradient

INCLUSIVE = Rule(rounding=IMAGE, shift=0.5, least=0.1, whole=0, phase=0.0, margin=0.5, kept=1)


class DeformRoIPoolGradients(NamedTuple):
    """Gradients of :func:`deform_roi_pool` and :func:`deform_ps_roi_pool`."""

    x: Array | None
    offset: Array | None
    mask: Array | None


def deform_roi_pool(
    x: Array,
    rois: Array,
    offset: Array | None,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: Pair = -1,
    gamma: float = 0.1,
    mask: Array | None = None,
) -> Array:
    """RoIAlign whose bins are moved by offsets.

    Parameters
    ----------
    x : (N, C, H, W) array
        Feature maps: float16, bfloat16, float32 or float64, of numpy or cupy, in any memory order.
    rois : (K, 5) array
        Index of the feature map in the batch (truncated to an integer) and x1, y1, x2, y2 in pixels
        of the image. Of the dtype of `x`, float32 or float64.
    offset : (K, 2, PH, PW) array or None
        Channel 0 is **dx** and channel 1 **dy**, the reverse of a convolution's offsets. A bin
        moves by gamma times the RoI's width times dx, and by gamma times its height times dy.
        Dtypes as for `rois`. ±inf is outside of the image, NaN gives NaN. None: no bin moves.
    output_size : int or (height, width)
        Bins of a RoI, PH x PW.
    spatial_scale : float
        Pixels of the feature map per pixel of the image.
    sampling_ratio : int or (height, width)
        Samples of a bin along each axis; 0 or less: its size in pixels, rounded up.
    gamma : float
        What an offset of 1 means, as a part of the RoI.
    mask : (K, PH, PW) array, optional
        Factor of every bin (v2), used as it is. Dtypes as for `rois`.

    Returns
    -------
    (K, C, PH, PW) array
        It lies channels-last in memory. Positions are computed in float64, sums in float32 at
        least.

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
    With offsets of zero it is ``roi_align(..., aligned=True)``, bit for bit, and the rules for
    samples at the border are that operator's.
    Dai et al. 2017 (arXiv 1703.06211), Eq. 6, with the samples of RoIAlign; Zhu et al. 2018
    (arXiv 1811.11168), Eq. 2.

    Examples
    --------
    A RoI of one bin looks a tenth of its width, half a pixel, to the right:

    >>> import numpy as np
    >>> x = np.tile(np.arange(8.0), (8, 1))[None, None]
    >>> rois, offset = np.array([[0.0, 1, 1, 6, 6]]), np.zeros((1, 2, 1, 1))
    >>> offset[:, 0] = 1.0
    >>> deform_roi_pool(x, rois, None, 1), deform_roi_pool(x, rois, offset, 1)
    (array([[[[3.]]]]), array([[[[3.5]]]]))
    """
    g = _geometry(
        "deform_roi_pool", x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, mask
    )
    return average("deform_roi_pool", g, ALIGNED, x, rois, offset, mask)


def deform_roi_pool_backward(
    grad_y: Array,
    x: Array,
    rois: Array,
    offset: Array | None,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: Pair = -1,
    gamma: float = 0.1,
    mask: Array | None = None,
    wrt: Iterable[str] | None = None,
) -> DeformRoIPoolGradients:
    """Gradients of :func:`deform_roi_pool` with respect to its arrays.

    Parameters
    ----------
    grad_y : (K, C, PH, PW) array
        Gradient of the result: of the dtype of `x`, float32 or float64.
    x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, mask
        As given to :func:`deform_roi_pool`.
    wrt : iterable of str, optional
        Names of the gradients to compute, of ``x``, ``offset``, ``mask``; all by default.

    Returns
    -------
    DeformRoIPoolGradients
        Fields ``x``, ``offset``, ``mask``, each of the dtype of its array; None where not asked
        for or where the argument was None. Bitwise reproducible.

    Raises
    ------
    TypeError, ValueError
        As :func:`deform_roi_pool`, and where `grad_y` or `wrt` do not fit.

    Notes
    -----
    The derivative by a position is the right-hand one, that of the cell [floor, floor + 1), and 0
    along an axis on which the sample is clamped to the image.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.tile(np.arange(8.0), (8, 1))[None, None]
    >>> rois, offset = np.array([[0.0, 1, 1, 6, 6]]), np.zeros((1, 2, 1, 1))
    >>> grads = deform_roi_pool_backward(np.ones((1, 1, 1, 1)), x, rois, offset, 1, 1.0, 2)
    >>> grads.offset.ravel()  # gamma times the width of 5 along x, nothing along y
    array([0.5, 0. ])
    """
    name = "deform_roi_pool_backward"
    g = _geometry(
        name, x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, mask,
        grad_y=grad_y,
    )  # fmt: skip
    return _backward(name, g, ALIGNED, grad_y, x, rois, offset, mask, wrt)


def deform_ps_roi_pool(
    x: Array,
    rois: Array,
    offset: Array | None,
    output_size: Pair,
    spatial_scale: float = 1.0,
    group_size: Pair | None = None,
    sampling_ratio: Pair = 4,
    gamma: float = 0.1,
    mask: Array | None = None,
) -> Array:
    """Position-sensitive RoI pooling whose bins are moved by offsets.

    Parameters
    ----------
    x : (N, C, H, W) array
        Feature maps, as for :func:`deform_roi_pool`; C is a multiple of gh gw. Output channel c of
        bin (ph, pw) sees channel (c gh + ph gh // PH) gw + pw gw // PW.
    rois : (K, 5) array
        As for :func:`deform_roi_pool`; the corners are rounded, half away from zero, in pixels of
        the image, and the lower right pixel belongs to the RoI.
    offset : (K, 2 classes, part height, part width) array or None
        Channel 2 i is **dx** and channel 2 i + 1 **dy** (the reverse of a convolution's offsets)
        of the i-th of so many equal shares of the output channels. Bin (ph, pw) is moved by part
        (ph · part height // PH, pw · part width // PW).
    output_size, spatial_scale, gamma, mask
        As for :func:`deform_roi_pool`.
    group_size : int or (height, width), optional
        Groups of channels, gh x gw: `output_size` by default. With 1 it is the paper's deformable
        RoI pooling.
    sampling_ratio : int or (height, width)
        Samples of a bin along each axis.

    Returns
    -------
    (K, C // (gh gw), PH, PW) array
        It lies channels-last in memory.

    Raises
    ------
    TypeError, ValueError
        As :func:`deform_roi_pool`, and where C is no multiple of gh gw, or the output channels
        none of the classes.

    Notes
    -----
    Samples begin at the bin's upper left corner. One outside of [−0.5, H − 0.5] x [−0.5, W − 0.5]
    is skipped, any other is clamped to the outermost pixels; the result is the mean of those kept,
    0 if there are none.
    Dai et al. 2017 (arXiv 1703.06211), Eq. 6 and Sec. 2.2; Zhu et al. 2018 (arXiv 1811.11168).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(8.0).reshape(1, 1, 1, 8).repeat(2, axis=1)
    >>> offset = np.zeros((1, 2, 1, 2))
    >>> offset[0, 0, 0, 1] = 0.5  # the right bin, by half of the width of 4
    >>> rois = np.array([[0.0, 0, 0, 3, 0]])
    >>> deform_ps_roi_pool(x, rois, None, (1, 2), gamma=1.0)
    array([[[[0.375, 2.25 ]]]])
    >>> deform_ps_roi_pool(x, rois, offset, (1, 2), gamma=1.0)
    array([[[[0.375, 4.25 ]]]])
    """
    name = "deform_ps_roi_pool"
    g = _ps_geometry(
        name, x, rois, offset, output_size, spatial_scale, group_size, sampling_ratio, gamma, mask
    )
    return average(name, g, INCLUSIVE, x, rois, offset, mask)


def deform_ps_roi_pool_backward(
    grad_y: Array,
    x: Array,
    rois: Array,
    offset: Array | None,
    output_size: Pair,
    spatial_scale: float = 1.0,
    group_size: Pair | None = None,
    sampling_ratio: Pair = 4,
    gamma: float = 0.1,
    mask: Array | None = None,
    wrt: Iterable[str] | None = None,
) -> DeformRoIPoolGradients:
    """Gradients of :func:`deform_ps_roi_pool` with respect to its arrays.

    Parameters
    ----------
    grad_y : (K, C // (gh gw), PH, PW) array
        Gradient of the result: of the dtype of `x`, float32 or float64.
    x, rois, offset, output_size, spatial_scale, group_size, sampling_ratio, gamma, mask
        As given to :func:`deform_ps_roi_pool`.
    wrt : iterable of str, optional
        Names of the gradients to compute, of ``x``, ``offset``, ``mask``; all by default.

    Returns
    -------
    DeformRoIPoolGradients
        Fields ``x``, ``offset``, ``mask``, each of the dtype of its array; None where not asked
        for or where the argument was None. Bitwise reproducible.

    Raises
    ------
    TypeError, ValueError
        As :func:`deform_ps_roi_pool`, and where `grad_y` or `wrt` do not fit.

    Notes
    -----
    Derivatives as in :func:`deform_roi_pool_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.tile(np.arange(8.0), (8, 1))[None, None]
    >>> rois, offset = np.array([[0.0, 2, 2, 5, 5]]), np.zeros((1, 2, 1, 1))
    >>> grads = deform_ps_roi_pool_backward(np.ones((1, 1, 1, 1)), x, rois, offset, 1)
    >>> grads.offset.ravel()  # gamma times the width of 4
    array([0.4, 0. ])
    """
    name = "deform_ps_roi_pool_backward"
    g = _ps_geometry(
        name, x, rois, offset, output_size, spatial_scale, group_size, sampling_ratio, gamma, mask,
        grad_y=grad_y,
    )  # fmt: skip
    return _backward(name, g, INCLUSIVE, grad_y, x, rois, offset, mask, wrt)


def _geometry(
    function, x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, mask, **gradient
):
    return roi_geometry(
        function, x, rois, output_size, spatial_scale, sampling_ratio=sampling_ratio, gamma=gamma,
        with_offset=_with_bins, offset=offset, mask=mask, **gradient,
    )  # fmt: skip


def _with_bins(function: str, g: RoIGeometry, offset: Spec) -> RoIGeometry:
    """An offset for every bin."""
    check_shape(function, "offset", offset, (g.rois, 2, g.pooled_h, g.pooled_w))
    return g._replace(part_h=g.pooled_h, part_w=g.pooled_w)


def _ps_geometry(
    function, x, rois, offset, output_size, spatial_scale, group_size, sampling_ratio, gamma, mask,
    **gradient,
):  # fmt: skip
    return roi_geometry(
        function, x, rois, output_size, spatial_scale,
        group_size=output_size if group_size is None else group_size,
        sampling_ratio=pair(function, "sampling_ratio", sampling_ratio, 1), gamma=gamma,
        with_offset=_with_parts, offset=offset, mask=mask, **gradient,
    )  # fmt: skip


def _with_parts(function: str, g: RoIGeometry, offset: Spec) -> RoIGeometry:
    """An offset for every class and part."""
    check_shape(function, "offset", offset, (g.rois, "2 classes", "part height", "part width"))
    _, channels, part_h, part_w = offset.shape
    classes = channels // 2
    if channels % 2 or min(classes, part_h, part_w) < 1 or g.out_channels % classes:
        raise ValueError(
            f"{function}: offset has shape {offset.shape}, expected at least one part and "
            f"2 classes channels, with a number of classes that divides the {g.out_channels} "
            f"output channels"
        )
    return g._replace(classes=classes, part_h=part_h, part_w=part_w)


def _backward(function, g, rule, grad_y, x, rois, offset, mask, wrt):
    wanted = check_wrt(function, wrt, DeformRoIPoolGradients._fields, offset=offset, mask=mask)
    run = _numpy_backward if array_module(x) is np else _cuda_backward
    return run(function, g, rule, grad_y, x, rois, offset, mask, wanted)


def _gradients(x, offset, mask, wanted, grad_image, grad_offset, grad_mask):
    """The wanted gradients, each in the dtype of its array."""
    return DeformRoIPoolGradients(
        x=grad_image.astype(x.dtype, copy=False) if "x" in wanted else None,
        offset=grad_offset.astype(offset.dtype, copy=False) if "offset" in wanted else None,
        mask=grad_mask.astype(mask.dtype, copy=False) if "mask" in wanted else None,
    )


# ---- NumPy


@np.errstate(all="ignore")
def _numpy_backward(function, g, rule, grad_y, x, rois, offset, mask, wanted):
    box = boxes(function, g, rule, rois)
    at = make_bins(g, rule, box, offset)
    masks = mask_rows(mask, g)
    dtype = compute_dtype(x.dtype)
    image = arrange(x, g, dtype)
    grad_image = empty_image(g, dtype)
    along_y, along_x, of_mask = np.zeros((3, g.rows), dtype)
    ones = np.ones(g.depth, dtype)
    size = matrix_bytes(at) + g.depth * dtype.itemsize
    for rows, seen, bins in blocks(g, at, size, limit=2 * grad_image.nbytes):
        pattern = bins.pattern(g, seen, dtype, slopes="offset" in wanted)
        scale = bins.means(rule) * masks[rows]
        grad = output_rows(grad_y, g, dtype, rows)

        def dots(matrix, seen=seen, grad=grad):
            """<what a row of the matrix sees, gradient of that row>"""
            return ((matrix @ image[seen]) * grad) @ ones

        if "x" in wanted:
            grad_image[seen] += pattern.matrix(scale).T @ grad
        if "offset" in wanted:
            along_y[rows] = dots(pattern.matrix(scale, y="slope"))
            along_x[rows] = dots(pattern.matrix(scale, x="slope"))
        if "mask" in wanted:
            of_mask[rows] = dots(pattern.matrix(bins.means(rule)))
        for gradient in along_y, along_x, of_mask:
            gradient[rows][bins.lost()] = np.nan
    per_bin = (g.rois, g.pooled_h, g.pooled_w, g.classes)
    grad_offset = None
    if "offset" in wanted:
        grad_offset = _sum_over_parts(g, box, along_y.reshape(per_bin), along_x.reshape(per_bin))
    grad_mask = of_mask.reshape(per_bin).sum(axis=3)
    grad_x = image_from_rows(grad_image, g)
    return _gradients(x, offset, mask, wanted, grad_x, grad_offset, grad_mask)


def _sum_over_parts(g, box, along_y, along_x):
    """The gradient of the offsets from those of the bins' positions along each axis."""
    by_part = np.zeros((g.part_h, g.part_w, g.rois, g.classes, 2), along_y.dtype)
    for xy, along, length in (0, along_x, box.width), (1, along_y, box.height):
        part_y, part_x = parts(g)
        of_bins = along * (g.gamma * length)[:, None, None, None]
        np.add.at(by_part[..., xy], (part_y[:, None], part_x), of_bins.transpose(1, 2, 0, 3))
    return by_part.transpose(2, 3, 4, 0, 1).reshape(g.rois, 2 * g.classes, g.part_h, g.part_w)


# ---- CUDA: cuda/deform_roi_pool.cu, the rest is in roi_align.py


def _cuda_backward(function, g, rule, grad_y, x, rois, offset, mask, wanted):
    with x.device:
        xp, dtype = array_module(x), compute_dtype(x.dtype)
        rois, masks = in_double(rois), in_double(mask)
        wide = padded(g, x.dtype)
        plan = make_plan(wide, rule, rois, offset, dtype)
        grad = cuda_output_rows(grad_y, wide, x.dtype)
        grad_image = grad_offset = grad_mask = None
        if "x" in wanted:
            rows = cuda_image_gradient(wide, rule, plan, grad, masks)
            grad_image = image_from_rows(rows[:, : g.depth], g)
        if wanted & {"offset", "mask"}:
            image = cuda_image(x, wide)
            along = xp.empty((g.rows, 3), dtype)
            launch = bins_launch("deform_roi_pool.cu", "offset_gradient", wide, (image, grad), rule)
            launch(image, grad, plan.runs, plan.images, masks, along)
            sum_over_parts, sum_over_classes = _sums(g, rule, x.dtype)
        if "offset" in wanted:
            grad_offset = xp.empty(offset.shape, dtype)
            sum_over_parts(along, rois, grad_offset)
        if "mask" in wanted:
            grad_mask = xp.empty(mask.shape, dtype)
            sum_over_classes(along, grad_mask)
        return _gradients(x, offset, mask, wanted, grad_image, grad_offset, grad_mask)


@functools.lru_cache(maxsize=CALLS)
def _sums(g: RoIGeometry, rule: Rule, dtype: np.dtype) -> tuple[_cuda.Launch, _cuda.Launch]:
    """The launches that add up what bins give to each part of the offsets, and to each mask."""
    kernel: Callable[..., _cuda.Launch] = functools.partial(
        _cuda.row_launch, "deform_roi_pool.cu", **macros(g, dtype)
    )
    parts, masks = g.rois * g.classes * g.part_h * g.part_w, g.rois * g.pooled_h * g.pooled_w
    return (
        kernel("sum_over_parts", parts, 1, g, rule),
        kernel("sum_over_classes", masks, 1, g),
    )
