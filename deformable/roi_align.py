"""RoIAlign: the mean, or the maximum, of bilinear samples in the bins of regions of interest.

    y[k, c, p] = 1 / (grid_y · grid_x) Σ_i X(n, c, q)        q = corner + (p + (i + ½) / grid) · bin

along both axes, where p counts the bins of RoI k and i the samples of a bin. X is the image
between its pixels, as in ``deform_conv``, but clamped to them instead of falling to zero. It is
Sec. 3 of He et al., "Mask R-CNN" (2017). In the position-sensitive form every bin has channels of
its own, as in Eq. 1 of Dai et al., "R-FCN" (2016).

The mean is linear in the image: one sparse matrix, see ``_roi``. The other operators of the family
that average do it with the functions of this file too.
"""

from collections.abc import Iterable

import numpy as np

from deformable._array import (
    Array,
    Pair,
    array_module,
    check_wrt,
    compute_dtype,
)
from deformable._roi import (
    ENTRY_BYTES,
    NONE,
    Bins,
    Plan,
    RoIGeometry,
    RoIGradients,
    Rule,
    Runs,
    arrange,
    bins_launch,
    blocks,
    boxes,
    cuda_image,
    cuda_maximum,
    cuda_maximum_backward,
    cuda_output_rows,
    empty_image,
    gather,
    image_from_rows,
    in_double,
    make_bins,
    make_plan,
    make_runs,
    mask_rows,
    matrix_bytes,
    output_from_rows,
    output_rows,
    padded,
    roi_geometry,
    spread,
)
from deformable._segments import largest, segments, sortable, winners

UNALIGNED = Rule(
    rounding=NONE, shift=0.0, least=1.0, whole=0, phase=0.5, margin=1.0, kept=0
)  # fmt: skip
ALIGNED = UNALIGNED._replace(shift=0.5, least=-np.inf)


def roi_align(
    x: Array,
    rois: Array,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: Pair = -1,
    aligned: bool = False,
    mode: str = "avg",
) -> Array:
    """Mean or maximum of bilinear samples in the bins of regions of interest.

    Parameters
    ----------
    x : (N, C, H, W) array
        Feature maps: float16, bfloat16, float32 or float64, of numpy or cupy, in any memory order.
    rois : (K, 5) array
        Index of the feature map in the batch (truncated to an integer) and x1, y1, x2, y2 in pixels
        of the image. Of the dtype of `x`, float32 or float64.
    output_size : int or (height, width)
        Bins of a RoI, PH x PW.
    spatial_scale : float
        Pixels of the feature map per pixel of the image.
    sampling_ratio : int or (height, width)
        Samples of a bin along each axis; 0 or less: its size in pixels, rounded up.
    aligned : bool
        Shift RoIs by half a pixel, as the centers of pixels lie at integers. Otherwise they are
        not shifted, but at least one pixel large.
    mode : {"avg", "max"}
        Mean of a bin's samples, or the largest of them.

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
    A sample outside of [−1, H] x [−1, W] is 0, any other is clamped to the outermost pixels. Pixels
    of weight 0 are not used. The maximum is NaN where a sample is.
    He et al. 2017 (arXiv 1703.06870), Sec. 3.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> roi_align(x, np.array([[0.0, 0, 0, 4, 4]]), 2, aligned=True)
    array([[[[ 2.5,  4.5],
             [10.5, 12.5]]]])
    """
    g, rule = _check(
        "roi_align", x, rois, output_size, spatial_scale, sampling_ratio, aligned, mode
    )
    return (average if mode == "avg" else _maximum)("roi_align", g, rule, x, rois)


def roi_align_backward(
    grad_y: Array,
    x: Array,
    rois: Array,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: Pair = -1,
    aligned: bool = False,
    mode: str = "avg",
    wrt: Iterable[str] | None = None,
) -> RoIGradients:
    """Gradient of :func:`roi_align` with respect to `x`.

    Parameters
    ----------
    grad_y : (K, C, PH, PW) array
        Gradient of the result: of the dtype of `x`, float32 or float64.
    x, rois, output_size, spatial_scale, sampling_ratio, aligned, mode
        As given to :func:`roi_align`.
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
        As :func:`roi_align`, and where `grad_y` or `wrt` do not fit.

    Notes
    -----
    The gradient of a maximum goes to the pixels of the first of the largest samples, in row-major
    order; a NaN is larger than any number.

    Examples
    --------
    >>> import numpy as np
    >>> x, rois = np.zeros((1, 1, 2, 4)), np.array([[0.0, 0, 0, 2, 2]])
    >>> roi_align_backward(np.ones((1, 1, 1, 1)), x, rois, 1, aligned=True).x
    array([[[[0.25, 0.25, 0.  , 0.  ],
             [0.25, 0.25, 0.  , 0.  ]]]])
    """
    name = "roi_align_backward"
    g, rule = _check(
        name, x, rois, output_size, spatial_scale, sampling_ratio, aligned, mode, grad_y=grad_y
    )
    run = average_backward if mode == "avg" else _maximum_backward
    wanted = check_wrt(name, wrt, RoIGradients._fields)
    return RoIGradients(run(name, g, rule, grad_y, x, rois) if "x" in wanted else None)


def ps_roi_align(
    x: Array,
    rois: Array,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: Pair = -1,
) -> Array:
    """Position-sensitive RoIAlign: every bin has channels of its own.

    Parameters
    ----------
    x : (N, C, H, W) array
        Feature maps, as for :func:`roi_align`; C is a multiple of PH PW. Channel
        (c PH + ph) PW + pw is seen by bin (ph, pw) of output channel c.
    rois, output_size, spatial_scale, sampling_ratio
        As for :func:`roi_align` with ``aligned=True``.

    Returns
    -------
    (K, C // (PH PW), PH, PW) array
        It lies channels-last in memory.

    Raises
    ------
    TypeError, ValueError
        As :func:`roi_align`, and where C is no multiple of PH PW.

    Notes
    -----
    Dai et al. 2016 (arXiv 1605.06409), Eq. 1, with the samples of RoIAlign.

    Examples
    --------
    Channel 0 is for the left half of a RoI, channel 1 for the right one:

    >>> import numpy as np
    >>> x = np.stack([np.full((2, 4), 3.0), np.full((2, 4), 5.0)])[None]
    >>> ps_roi_align(x, np.array([[0.0, 0, 0, 4, 2]]), (1, 2))
    array([[[[3., 5.]]]])
    """
    g = roi_geometry(
        "ps_roi_align", x, rois, output_size, spatial_scale,
        group_size=output_size, sampling_ratio=sampling_ratio,
    )  # fmt: skip
    return average("ps_roi_align", g, ALIGNED, x, rois)


def ps_roi_align_backward(
    grad_y: Array,
    x: Array,
    rois: Array,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: Pair = -1,
    wrt: Iterable[str] | None = None,
) -> RoIGradients:
    """Gradient of :func:`ps_roi_align` with respect to `x`.

    Parameters
    ----------
    grad_y : (K, C // (PH PW), PH, PW) array
        Gradient of the result: of the dtype of `x`, float32 or float64.
    x, rois, output_size, spatial_scale, sampling_ratio
        As given to :func:`ps_roi_align`.
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
        As :func:`ps_roi_align`, and where `grad_y` or `wrt` do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> x, rois = np.zeros((1, 2, 1, 2)), np.array([[0.0, 0, 0, 2, 1]])
    >>> ps_roi_align_backward(np.ones((1, 1, 1, 2)), x, rois, (1, 2)).x
    array([[[[1., 0.]],
    <BLANKLINE>
            [[0., 1.]]]])
    """
    name = "ps_roi_align_backward"
    g = roi_geometry(
        name, x, rois, output_size, spatial_scale,
        group_size=output_size, sampling_ratio=sampling_ratio, grad_y=grad_y,
    )  # fmt: skip
    if "x" not in check_wrt(name, wrt, RoIGradients._fields):
        return RoIGradients(None)
    return RoIGradients(average_backward(name, g, ALIGNED, grad_y, x, rois))


def _check(
    function, x, rois, output_size, spatial_scale, sampling_ratio, aligned, mode, **gradient
):
    g = roi_geometry(
        function, x, rois, output_size, spatial_scale, sampling_ratio=sampling_ratio, **gradient
    )
    if mode not in ("avg", "max"):
        raise ValueError(f"{function}: mode is {mode!r}, expected 'avg' or 'max'")
    return g, ALIGNED if aligned else UNALIGNED


# ---- means, of all operators of the family


def average(
    function: str,
    g: RoIGeometry,
    rule: Rule,
    x: Array,
    rois: Array,
    offset: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """The means of the bins, which ``offset`` shifts and ``mask`` multiplies."""
    run = _numpy_average if array_module(x) is np else _cuda_average
    return run(function, g, rule, x, rois, offset, mask)


def average_backward(
    function: str, g: RoIGeometry, rule: Rule, grad_y: Array, x: Array, rois: Array
) -> Array:
    """Gradient of the image of :func:`average` without offsets."""
    run = _numpy_average_backward if array_module(x) is np else _cuda_average_backward
    return run(function, g, rule, grad_y, x, rois)


@np.errstate(all="ignore")
def _numpy_average(function, g, rule, x, rois, offset, mask):
    at = make_bins(g, rule, boxes(function, g, rule, rois), offset)
    masks = mask_rows(mask, g)
    dtype = compute_dtype(x.dtype)
    image = arrange(x, g, dtype)
    y = np.empty((g.rows, g.depth), dtype)
    for rows, seen, part in blocks(g, at, matrix_bytes(at) + g.depth * dtype.itemsize):
        scale = part.means(rule) * masks[rows]
        y[rows] = part.pattern(g, seen, dtype).matrix(scale) @ image[seen]
        y[rows][np.isnan(scale) | part.lost()] = np.nan
    return output_from_rows(y.astype(x.dtype, copy=False), g)


@np.errstate(all="ignore")
def _numpy_average_backward(function, g, rule, grad_y, x, rois):
    at = make_bins(g, rule, boxes(function, g, rule, rois))
    dtype = compute_dtype(x.dtype)
    grad_image = empty_image(g, dtype)
    for rows, seen, part in blocks(g, at, matrix_bytes(at), limit=2 * grad_image.nbytes):
        matrix = part.pattern(g, seen, dtype).matrix(part.means(rule))
        grad_image[seen] += matrix.T @ output_rows(grad_y, g, dtype, rows)
    return image_from_rows(grad_image.astype(x.dtype, copy=False), g)


def _cuda_average(function, g, rule, x, rois, offset, mask):
    with x.device:
        wide = padded(g, x.dtype)
        plan = make_plan(wide, rule, rois, offset, compute_dtype(x.dtype))
        image = cuda_image(x, wide)
        y = array_module(x).empty((g.rows, wide.depth), x.dtype)
        launch = bins_launch("roi_align.cu", "average", wide, (image, y), rule)
        launch(image, plan.runs, plan.table, plan.images, in_double(mask), y)
        return output_from_rows(y[:, : g.depth], g)


def _cuda_average_backward(function, g, rule, grad_y, x, rois):
    with x.device:
        wide = padded(g, x.dtype)
        plan = make_plan(wide, rule, rois, weights=compute_dtype(x.dtype))
        rows = cuda_image_gradient(wide, rule, plan, cuda_output_rows(grad_y, wide, x.dtype))
        return image_from_rows(rows[:, : g.depth], g)


def cuda_image_gradient(
    g: RoIGeometry, rule: Rule, plan: Plan, grad: Array, masks: Array | None = None
) -> Array:
    """Gradient of the arranged image of :func:`average`, by that of its rows; masks in double."""
    arrays = plan.table, masks
    return gather("roi_align.cu", "average_gradient", g, plan, (grad,), *arrays, values=(rule,))


# ---- maxima


def _maximum(function, g, rule, x, rois):
    run = _numpy_maximum if array_module(x) is np else _cuda_maximum
    return run(function, g, rule, x, rois)


def _maximum_backward(function, g, rule, grad_y, x, rois):
    run = _numpy_maximum_backward if array_module(x) is np else _cuda_maximum_backward
    return run(function, g, rule, grad_y, x, rois)


@np.errstate(all="ignore")
def _numpy_maximum(function, g, rule, x, rois):
    at = make_bins(g, rule, boxes(function, g, rule, rois))
    dtype = compute_dtype(x.dtype)
    image = arrange(x, g, dtype)
    y = np.empty((g.rows, g.depth), dtype)
    for rows, seen, part in blocks(g, at, _sample_bytes(g, at, dtype)):
        samples, first, count = _samples(rule, part)
        values = samples.pattern(g, seen, dtype).matrix() @ image[seen]
        of = segments(first, count)
        y[rows][of.order] = largest(values, of)
        y[rows][part.lost()] = np.nan
    return output_from_rows(y.astype(x.dtype, copy=False), g)


@np.errstate(all="ignore")
def _numpy_maximum_backward(function, g, rule, grad_y, x, rois):
    at = make_bins(g, rule, boxes(function, g, rule, rois))
    dtype = compute_dtype(x.dtype)
    image = arrange(x, g, dtype)
    grad_image = empty_image(g, dtype)
    for rows, seen, part in blocks(g, at, _sample_bytes(g, at, dtype)):
        samples, first, count = _samples(rule, part)
        matrix = samples.pattern(g, seen, dtype).matrix()
        values = matrix @ image[seen]
        of = segments(first, count)
        _, place = winners(sortable(values), of)
        grad_values = np.zeros_like(values)
        some = of.order[: np.count_nonzero(count)]
        winner = first[some, None] + place[: len(some)]
        grad_values[winner, np.arange(g.depth)] = output_rows(grad_y, g, dtype, rows)[some]
        grad_image[seen] += matrix.T @ grad_values
    return image_from_rows(grad_image.astype(x.dtype, copy=False), g)


def _samples(rule: Rule, at: Bins) -> tuple[Bins, np.ndarray, np.ndarray]:
    """Every sample of some bins as a bin of its own; which is a bin's first one, and how many.

    Samples are in row-major order. Those outside of the image are all 0, so the first of them
    stands for all, as one that sees nothing.
    """
    kept = (at.runs.end - at.runs.first).astype(np.int64)
    single = np.cumsum(kept) - kept
    rows, columns = kept[at.run_y], kept[at.run_x]
    inside = rows * columns
    outside = inside < at.runs.total[at.run_y] * at.runs.total[at.run_x]
    # the first sample outside comes before all others, or after their first row, or after them
    skips = np.where(at.runs.backwards, at.runs.end < at.runs.total, at.runs.first > 0)
    begins_inside = (inside > 0) & ~(skips[at.run_y] | skips[at.run_x])
    row_ends_outside = columns < at.runs.total[at.run_x]
    stand_in = np.where(begins_inside, np.where(row_ends_outside, columns, inside), 0)

    count = inside + outside
    bin_ = np.repeat(np.arange(len(count)), count)
    place = spread(np.zeros_like(count), count)
    beyond = outside[bin_] & (place >= stand_in[bin_])
    sees_nothing = beyond & (place == stand_in[bin_])
    row, column = np.divmod(place - beyond, np.maximum(columns, 1)[bin_])
    runs = _singles(at.runs, rule)
    nothing = len(runs.start) - 1
    samples = Bins(
        image=at.image[bin_],
        runs=runs,
        run_y=np.where(sees_nothing, nothing, single[at.run_y][bin_] + row),
        run_x=np.where(sees_nothing, nothing, single[at.run_x][bin_] + column),
        plane=at.plane[bin_],
    )
    return samples, np.cumsum(count) - count, count


def _singles(run: Runs, rule: Rule) -> Runs:
    """A run for each sample that counts, in the order of the definition, and an empty last one."""
    kept = (run.end - run.first).astype(np.int64)
    of = run.take(np.repeat(np.arange(len(kept)), kept))
    i = spread(np.zeros_like(kept), kept)
    start = of.position(np.where(of.backwards, of.end - 1 - i, of.first + i))
    start, size = np.append(start, np.nan), np.append(of.size, 1)
    rule = rule._replace(phase=0.0)
    return make_runs(start, np.zeros_like(start), np.ones_like(start), size, rule)


def _sample_bytes(g: RoIGeometry, at: Bins, dtype: np.dtype) -> np.ndarray:
    """About what the samples of each bin take."""
    kept = at.runs.end - at.runs.first
    samples = kept[at.run_y] * kept[at.run_x] + 1
    return samples * (3 * g.depth * dtype.itemsize + 4 * ENTRY_BYTES)


def _cuda_maximum(function, g, rule, x, rois):
    return cuda_maximum("roi_align.cu", g, rule, x, rois)


def _cuda_maximum_backward(function, g, rule, grad_y, x, rois):
    return cuda_maximum_backward("roi_align.cu", g, rule, grad_y, x, rois)
