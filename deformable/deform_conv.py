"""Deformable convolution, plain (v1) and modulated (v2).

    y[n, o, p] = bias[o] + Σ_{c,t} weight[o, c, t] · mask[n, t, p] · X(n, c, q)
    q = p·stride − padding + t·dilation + offset[n, t, p]

X is the image between its pixels, bilinear with zeros outside: Σ_r G(r, q) x[n, c, r] with
G(r, q) = max(0, 1 − |r_y − q_y|) · max(0, 1 − |r_x − q_x|). It is Eq. 2-4 of Dai et al.,
"Deformable Convolutional Networks" (2017); the mask is that of Zhu et al., "Deformable ConvNets v2"
(2018). Every tap samples the image once for all channels of its offset group; the samples, laid
out as columns, are multiplied with the weights as in any convolution.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from deformable import _cuda, _fused, _fused_backward
from deformable._arrange import channels_first, channels_last
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
    specs,
)
from deformable._bilinear import bordered, locate, without_border
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
    tap_slices,
    unpack_weight,
    unpacked,
)
from deformable._fused import Operands

SAMPLES = 64  # planned together by a block of threads
LISTED_BYTES = 40  # of a sample on a GPU: in a chain and in a list, and at most four double weights
SAMPLE_BYTES = 64  # about: of finding a sample on the CPU, and of its row of the sparse matrix


class DeformConv2dGradients(NamedTuple):
    """Gradients of :func:`deform_conv2d`."""

    x: Array | None
    offset: Array | None
    weight: Array | None
    bias: Array | None
    mask: Array | None


def deform_conv2d(
    x: Array,
    offset: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    mask: Array | None = None,
) -> Array:
    """Convolution whose taps look where `offset` sends them.

    Parameters
    ----------
    x : (N, C, H, W) array
        Images: float16, bfloat16, float32 or float64, of numpy or cupy, in any memory order.
    offset : (N, 2 * G * kh * kw, Ho, Wo) array
        For offset group g and tap t = i * kw + j, channel 2 (g * kh * kw + t) is **dy** and the
        next one **dx**, in input pixels (RoI offsets are the other way round). G divides C:
        channel c belongs to offset group c // (C // G).
        Of the dtype of `x`, float32 or float64. ±inf is outside of the image, NaN gives NaN.
    weight : (O, C // groups, kh, kw) array
        Kernel, of the dtype of `x`; it tells the number of groups.
    bias : (O,) array, optional
        Added to every position, of the dtype of `x`.
    stride, padding, dilation : int or (height, width)
        Step between output positions, zeros on every side, step between taps, in input pixels.
    mask : (N, G * kh * kw, Ho, Wo) array, optional
        Factor of every sample (v2), used as it is. Dtypes as for `offset`.

    Returns
    -------
    (N, O, Ho, Wo) array
        Ho = (H + 2 padding − (dilation (kh − 1) + 1)) // stride + 1. It lies channels-last in
        memory. Positions, bilinear weights and sums are computed in float32 at least.

    Raises
    ------
    TypeError
        Arrays of different libraries, dtypes that differ or are none of the four.
    ValueError
        Shapes that do not fit, an empty output, arrays on different devices.

    Notes
    -----
    A position counts where −1 <= y < H and −1 <= x < W; its corners outside of the image are 0.
    Dai et al. 2017 (arXiv 1703.06211), Eq. 2-4; Zhu et al. 2018 (arXiv 1811.11168), Eq. 1.

    Examples
    --------
    A 1x1 kernel that looks half a pixel to the right:

    >>> import numpy as np
    >>> x = np.array([[[[1.0, 2.0, 4.0]]]])
    >>> offset = np.zeros((1, 2, 1, 3))
    >>> offset[:, 1] = 0.5
    >>> deform_conv2d(x, offset, np.ones((1, 1, 1, 1)))
    array([[[[1.5, 3. , 2. ]]]])
    """
    g, xp = _check("deform_conv2d", x, offset, weight, bias, stride, padding, dilation, mask)
    run = _numpy_forward if xp is np else _cuda_forward
    return run(g, x, offset, weight, bias, mask)


def deform_conv2d_backward(
    grad_y: Array,
    x: Array,
    offset: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    mask: Array | None = None,
    wrt: Iterable[str] | None = None,
) -> DeformConv2dGradients:
    """Gradients of :func:`deform_conv2d` with respect to its arrays.

    Parameters
    ----------
    grad_y : (N, O, Ho, Wo) array
        Gradient of the result: of the dtype of `x`, float32 or float64.
    x, offset, weight, bias, stride, padding, dilation, mask
        As given to :func:`deform_conv2d`.
    wrt : iterable of str, optional
        Names of the gradients to compute, of ``x``, ``offset``, ``weight``, ``bias``, ``mask``; all
        by default.

    Returns
    -------
    DeformConv2dGradients
        Fields ``x``, ``offset``, ``weight``, ``bias``, ``mask``, each of the dtype of its array;
        None where not asked for or where the argument was None. Bitwise reproducible.

    Raises
    ------
    TypeError, ValueError
        As :func:`deform_conv2d`, and where `grad_y` or `wrt` do not fit.

    Notes
    -----
    The gradient of a position is the right-hand derivative, that of the cell [floor, floor + 1),
    also on the grid lines and at exactly −1 (Eq. 7 of arXiv 1703.06211 leaves these open): padded
    taps learn from offsets that begin at zero.

    On a GPU a call allocates, beside its results,

    - packed weights, the gradient of `x` in the dtype of sums, and copies of arrays that do not
      lie channels-last;
    - at most 128 MiB: first for partial sums of the gradient of the weights, later for the columns
      and samples of a chunk of positions;
    - 8 bytes per pixel and offset group of the images of a chunk;
    - another copy of `grad_y` if it is rounded to TF32, or if the output channels of a group do
      not fill units of 16 bytes.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[[[1.0, 2.0, 4.0]]]])
    >>> offset, weight = np.zeros((1, 2, 1, 3)), np.ones((1, 1, 1, 1))
    >>> grads = deform_conv2d_backward(np.ones((1, 1, 1, 3)), x, offset, weight, wrt=["offset"])
    >>> grads.offset[0, 1]  # along x, to the right
    array([[ 1.,  2., -4.]])
    """
    name = "deform_conv2d_backward"
    g, xp = _check(name, x, offset, weight, bias, stride, padding, dilation, mask, grad_y=grad_y)
    wanted = check_wrt(name, wrt, DeformConv2dGradients._fields, bias=bias, mask=mask)
    run = _numpy_backward if xp is np else _cuda_backward
    return run(g, grad_y, x, offset, weight, mask, wanted)


def _check(function, x, offset, weight, bias, stride, padding, dilation, mask, **gradient):
    arrays = {"x": x, "weight": weight, "bias": bias, "offset": offset, "mask": mask, **gradient}
    xp, signature = check_library(function, arrays, optional=("bias", "mask"))
    grid = conv_grid(function, stride, padding, dilation)
    return _geometry(function, grid, signature), xp


@functools.lru_cache(maxsize=CALLS)
def _geometry(function, grid, signature):
    arrays = specs(signature)
    real = {name: arrays.pop(name, None) for name in ("offset", "mask", "grad_y")}
    check_dtypes(function, arrays, real)
    g, offset = conv_geometry(function, arrays, grid), real["offset"]
    size = (g.out_height, g.out_width)
    channels = offset.shape[1] if len(offset.shape) == 4 else 0
    offset_groups = max(1, channels // (2 * g.taps))
    check_shape(function, "offset", offset, (g.batch, 2 * offset_groups * g.taps, *size))
    if g.channels % offset_groups:
        raise ValueError(
            f"{function}: offset has shape {offset.shape}, expected a number of offset groups "
            f"(here {offset_groups}) that divides the {g.channels} channels of x"
        )
    check_shape(function, "mask", real["mask"], (g.batch, offset_groups * g.taps, *size))
    check_shape(function, "grad_y", real["grad_y"], g.out_shape)
    return g._replace(offset_groups=offset_groups)


def _gradients(x, offset, mask, wanted, grad_image, grad_offset, grad_weight, grad_rows, grad_mask):
    """The wanted gradients, each in the dtype of its array."""

    def gradient(of, grad, like):
        return channels_first(grad.astype(like.dtype, copy=False)) if of in wanted else None

    return DeformConv2dGradients(
        x=gradient("x", grad_image, x),
        offset=gradient("offset", grad_offset, offset),
        weight=grad_weight if "weight" in wanted else None,
        bias=sum_rows(grad_rows, x.dtype) if "bias" in wanted else None,
        mask=gradient("mask", grad_mask, mask),
    )


# ---- NumPy: rows of a sparse matrix, see _bilinear.py


def _sampler(g, offset, mask, dtype):
    """A function that returns the samples, and their masks, of some taps of a block of positions.

    Samples are in the order of the columns: (image, row, column, tap, offset group).
    """
    size = (g.out_height, g.out_width)
    offset = offset.reshape(g.batch, g.offset_groups, g.taps, 2, *size).transpose(3, 0, 4, 5, 2, 1)
    if mask is not None:
        mask = mask.reshape(g.batch, g.offset_groups, g.taps, *size).transpose(0, 3, 4, 2, 1)
    tap_y, tap_x = np.divmod(np.arange(g.taps), g.kernel_w)
    out_y, out_x = np.arange(g.out_height), np.arange(g.out_width)
    grid_y = out_y[:, None] * g.stride_h - g.pad_h + tap_y * g.dilation_h
    grid_x = out_x[:, None] * g.stride_w - g.pad_w + tap_x * g.dilation_w
    grid_y = grid_y.astype(dtype).reshape(g.out_height, 1, g.taps, 1)
    grid_x = grid_x.astype(dtype).reshape(g.out_width, g.taps, 1)

    def samples_of(images, lines, taps):
        dy, dx = offset[:, images, lines, :, taps]
        y = np.add(dy, grid_y[lines, :, taps], out=np.empty(dy.shape, dtype))
        x = np.add(dx, grid_x[:, taps], out=np.empty(dx.shape, dtype))
        scale = None if mask is None else mask[images, lines, :, taps].astype(dtype, order="C")
        scale = None if scale is None else scale.ravel()
        return locate(y, x, g.height, g.width, g.offset_groups), scale

    return samples_of


def _blocks(g, dtype):
    """What is sampled at a time: some taps, and for each slice of these all blocks of positions."""
    tap_bytes = max(g.channels * dtype.itemsize, g.offset_groups * SAMPLE_BYTES)
    for taps in tap_slices(g, tap_bytes):
        yield taps, blocks(g, (taps.stop - taps.start) * tap_bytes)


def _pixels(image: Array, images: slice, g: ConvGeometry) -> Array:
    """Some bordered images as rows, one for every pixel and offset group: a view."""
    return image[images].reshape(-1, g.channels // g.offset_groups)


@np.errstate(all="ignore")
def _numpy_forward(g, x, offset, weight, bias, mask):
    dtype = compute_dtype(x.dtype)
    image = bordered(x, dtype)
    samples_of = _sampler(g, offset, mask, dtype)
    y = np.empty((g.batch * g.positions, g.out_channels), dtype)
    for taps, some in _blocks(g, dtype):
        packed = pack_weight(weight, g, dtype, taps)
        for images, lines, positions in some:
            samples, scale = samples_of(images, lines, taps)
            seen = samples.seen(_pixels(image, images, g))
            rows = y[positions]
            columns = (samples.matrix(scale, seen) @ seen).reshape(len(rows), -1)
            out, columns = by_group(rows, g), columns_by_group(columns, g)
            if taps.start:
                out += columns @ packed.mT
            else:
                np.matmul(columns, packed.mT, out=out)
            del columns  # makes room for the next ones
    if bias is not None:
        y += bias.astype(dtype)
    return image_rows(y.astype(x.dtype, copy=False), g)


@np.errstate(all="ignore")
def _numpy_backward(g, grad_y, x, offset, weight, mask, wanted):
    dtype = compute_dtype(x.dtype)
    grad = gradient_rows(grad_y, g, dtype)
    image = bordered(x, dtype)
    samples_of = _sampler(g, offset, mask, dtype)
    grad_image: Array = np.zeros_like(image) if "x" in wanted else None
    grad_weight = np.empty((g.out_channels, g.channels // g.groups, g.taps), x.dtype)
    per_position = (g.batch * g.positions, g.offset_groups, g.taps)
    grad_offset = np.empty((*per_position, 2), dtype)
    grad_mask = np.empty(per_position, dtype)
    for taps, some in _blocks(g, dtype) if wanted - {"bias"} else ():
        packed = pack_weight(weight, g, dtype, taps)
        grad_packed = np.zeros_like(packed)
        for images, lines, positions in some:
            samples, scale = samples_of(images, lines, taps)
            seen = samples.seen(_pixels(image, images, g))
            rows = grad[positions]
            grad_out, columns = by_group(rows, g), None
            if wanted & {"x", "weight"}:
                matrix = samples.matrix(scale, seen)
            if "weight" in wanted:
                columns = columns_by_group((matrix @ seen).reshape(len(rows), -1), g)
                grad_packed += grad_out.mT @ columns
            if wanted & {"x", "offset", "mask"}:
                grad_columns = np.matmul(grad_out, packed, out=columns)  # read, their room is free
                grad_samples = columns_from_groups(grad_columns, g).reshape(-1, seen.shape[1])
            if "x" in wanted:
                grad_seen = samples.seen(_pixels(grad_image, images, g))
                grad_seen += matrix.T @ grad_samples
            if wanted & {"offset", "mask"}:
                by_sample = samples.gradients(seen, grad_samples, scale)
                along_y, along_x, along_mask = (
                    a.reshape(len(rows), -1, g.offset_groups).mT for a in by_sample
                )
                grad_offset[positions, :, taps, 0] = along_y
                grad_offset[positions, :, taps, 1] = along_x
                grad_mask[positions, :, taps] = along_mask
        grad_weight[..., taps] = unpacked(grad_packed, g)
    inside = without_border(grad_image).astype(x.dtype) if "x" in wanted else None
    grad_weight = grad_weight.reshape(weight.shape)
    size = (g.batch, g.out_height, g.out_width)
    grad_offset = grad_offset.reshape(*size, offset.shape[1])
    grad_mask = grad_mask.reshape(*size, g.offset_groups * g.taps)
    return _gradients(x, offset, mask, wanted, inside, grad_offset, grad_weight, grad, grad_mask)


# ---- CUDA: cuda/deform_conv.cu; where there are tensor cores, _fused.py and _fused_backward.py;
# the gradient of the image is that of cuda/image_gradient.cu either way


def _cuda_forward(g, x, offset, weight, bias, mask):
    with x.device:
        if _fused.covers(g, x):
            return image_rows(_fused.convolve(g, x, weight, bias, offset, mask), g)
        image = channels_last(x, x.dtype)
        o = _fused.operands(image, offset, mask)
        packed = pack_weight(weight, g, x.dtype)
        y = array_module(x).empty((g.batch * g.positions, g.out_channels), x.dtype)
        for chunk in _chunks(g, x):
            columns = _im2col(g, o, image, offset, mask, chunk)
            _cuda.gemm(columns, packed.mT, out=by_group(chunk.rows(y), g))
        if bias is not None:
            y += bias
        return image_rows(y, g)


def _cuda_backward(g, grad_y, x, offset, weight, mask, wanted):
    xp = array_module(x)
    with x.device:
        grad = gradient_rows(grad_y, g, x.dtype)
        size = (g.batch, g.out_height, g.out_width)
        grad_image = grad_offset = grad_mask = grad_weight = None
        if "x" in wanted:
            grad_image = xp.empty((g.batch, g.height, g.width, g.channels), compute_dtype(x.dtype))
        if wanted & {"offset", "mask"}:
            grad_offset = xp.empty((*size, offset.shape[1]), offset.dtype)
        if "mask" in wanted:
            grad_mask = xp.empty((*size, mask.shape[1]), mask.dtype)
        if wanted - {"bias"}:
            fill = _column_gradients
            if _fused.covers(g, x):
                fill = _depthwise_gradients if g.is_depthwise else _fused_gradients
            image, out = channels_last(x, x.dtype), (grad_image, grad_offset, grad_mask)
            o = _fused.operands(image, offset, mask)
            grad_weight = fill(g, o, grad, image, offset, weight, mask, "weight" in wanted, out)
        return _gradients(
            x, offset, mask, wanted, grad_image, grad_offset, grad_weight, grad, grad_mask
        )


def _fused_gradients(g, o, grad, image, offset, weight, mask, weight_wanted, out):
    """Fill in gradients, and return the weight's: columns are made, or used up, in registers."""
    xp, grad_weight = array_module(image), None
    grad_image, grad_offset, grad_mask = out
    of_image, of_samples = grad_image is not None, grad_offset is not None
    rows = _fused_backward.pack_rows(g, o, grad)
    if weight_wanted:
        grad_weight = _fused_backward.weight_gradient(g, o, rows, image, weight, offset, mask)
    if of_image or of_samples:
        given = rows, image, offset, mask, _fused_backward.pack_weights(g, o, weight)
    if of_image:
        for columns, column_gradient, image_gradient in _fused_chunks(g, o, _chunks(g, image)):
            grad_columns = xp.empty(columns, image.dtype)
            column_gradient(*given, grad_columns, grad_offset, grad_mask)
            image_gradient(offset, mask, grad_columns, None, grad_image)
    elif of_samples:
        column_gradient = _fused_backward.column_launch(g, o, Chunk(0, len(grad), ()))
        column_gradient(*given, None, grad_offset, grad_mask)
    return grad_weight


@functools.lru_cache(maxsize=CALLS)
def _fused_chunks(g, o, chunks):
    """For each chunk the shape of its columns, and what computes their gradient and the image's."""
    return tuple(
        (
            chunk.columns,
            _fused_backward.column_launch(g, o, chunk),
            _image_gradient(g, o, chunk),
        )
        for chunk in chunks
    )


def _depthwise_gradients(g, o, grad, image, offset, weight, mask, weight_wanted, out):
    """The same with one channel per group, whose columns never lie in memory."""
    grad_image, grad_offset, grad_mask = out
    by_tap, vector = _fused.by_tap(g, weight), _cuda.vector(grad)
    for chunk in chunks(g, g.offset_groups * LISTED_BYTES):
        if grad_offset is not None:
            offset_gradient = _offset_gradient(g, o, chunk, vector)
            offset_gradient(image, offset, mask, grad, by_tap, grad_offset, grad_mask)
        if grad_image is not None:
            image_gradient = _image_gradient(g, o, chunk, vector)
            image_gradient(offset, mask, grad, by_tap, grad_image)
    if not weight_wanted:
        return None
    return _fused_backward.depthwise_weight_gradient(g, o, grad, image, weight, offset, mask)


def _column_gradients(g, o, grad, image, offset, weight, mask, weight_wanted, out):
    """The same by way of columns, chunk by chunk, and products of the BLAS."""
    xp = array_module(image)
    grad_image, grad_offset, grad_mask = out
    packed = pack_weight(weight, g, image.dtype)
    grad_packed = xp.zeros(packed.shape, compute_dtype(image.dtype))
    for chunk in _chunks(g, image):
        grad_out = by_group(chunk.rows(grad), g)
        if weight_wanted:
            columns = _im2col(g, o, image, offset, mask, chunk)
            _cuda.gemm(grad_out.mT, columns, grad_packed, accumulate=True)
        if grad_image is not None or grad_offset is not None:
            grad_columns = xp.empty(chunk.columns, image.dtype)
            _cuda.gemm(grad_out, packed, out=grad_columns)
        if grad_offset is not None:
            offset_gradient = _offset_gradient(g, o, chunk)
            offset_gradient(image, offset, mask, grad_columns, None, grad_offset, grad_mask)
        if grad_image is not None:
            _image_gradient(g, o, chunk)(offset, mask, grad_columns, None, grad_image)
    return unpack_weight(grad_packed, g, image.dtype) if weight_wanted else None


def _chunks(g, like):
    """Ranges of positions whose columns, and lists of samples with weights, fit together."""
    return chunks(g, g.channels * like.itemsize + g.offset_groups * LISTED_BYTES)


def _kernel(g, o, file, **macros):
    """A function that returns launches of this file."""
    return functools.partial(
        _cuda.Launch, file,
        DTYPE=o.dtype, INDEX=index_type(g),
        OFFSET=o.offset.dtype, MASK=(o.mask or o.offset).dtype, **macros,
    )  # fmt: skip


@functools.lru_cache(maxsize=CALLS)
def _im2col_launch(g: ConvGeometry, o: Operands, chunk: Chunk) -> _cuda.Launch:
    macros = column_macros(g, o.dtype, 0, o.vector)
    return _kernel(g, o, "deform_conv.cu", SAMPLES=SAMPLES, **macros)(
        "im2col",
        (-(-chunk.size * g.offset_groups * g.taps // SAMPLES),),
        _cuda.row_block(g.channels // g.offset_groups // macros["VEC"]),
        g, o.offset_strides, o.mask_strides, chunk.first, chunk.size,
    )  # fmt: skip


def _im2col(g, o, image, offset, mask, chunk):
    columns = array_module(image).empty(chunk.columns, image.dtype)
    _im2col_launch(g, o, chunk)(image, offset, mask, columns)
    return columns


@functools.lru_cache(maxsize=CALLS)
def _offset_gradient(
    g: ConvGeometry, o: Operands, chunk: Chunk, rows_vector: int = 0
) -> _cuda.Launch:
    macros = column_macros(g, o.dtype, rows_vector, o.vector)
    lanes, rows = _cuda.row_block(g.channels // g.offset_groups // macros["VEC"])
    return _kernel(g, o, "deform_conv.cu", SAMPLES=SAMPLES, **macros)(
        "offset_gradient", (-(-chunk.size * g.offset_groups * g.taps // rows),), (lanes, rows),
        g, o.offset_strides, o.mask_strides, chunk.first, chunk.size,
    )  # fmt: skip


class ImageGradient(NamedTuple):
    """The launches for a chunk, and how many samples and cells it has."""

    samples: int
    cells: int
    link_samples: _cuda.Launch
    list_samples: _cuda.Launch
    gather: _cuda.Launch

    def __call__(
        self,
        offset: Array,
        mask: Array | None,
        grad_rows: Array,
        by_tap: Array | None,
        grad_image: Array,
    ) -> None:
        """Gather the gradient of the pixels that the columns have seen, and add it."""
        xp = array_module(offset)
        cells = xp.zeros((self.cells + 1, 2), np.int32)
        links = xp.empty((2, self.samples), np.int32)  # and lists
        weights = xp.empty((self.samples, 4), grad_image.dtype)
        self.link_samples(offset, mask, cells, links, weights)
        self.list_samples(links, cells)
        self.gather(grad_rows, by_tap, cells, links, weights, grad_image)


@functools.lru_cache(maxsize=CALLS)
def _image_gradient(
    g: ConvGeometry, o: Operands, chunk: Chunk, rows_vector: int = 0
) -> ImageGradient:
    first, count, images = chunk.first, chunk.size, chunk.images(g)
    samples = count * g.offset_groups * g.taps
    cells = len(images) * g.offset_groups * (g.height + 1) * (g.width + 1)
    macros = column_macros(g, o.dtype, rows_vector)
    kernel = _kernel(g, o, "image_gradient.cu", **macros)
    lanes, rows = _cuda.row_block(g.channels // macros["VEC"])
    return ImageGradient(
        samples,
        cells,
        kernel(
            "link_samples", *_cuda.threads(samples),
            g, o.offset_strides, o.mask_strides, images.start, first, count,
        ),
        kernel("list_samples", *_cuda.threads(cells), samples, cells),
        kernel(
            "image_gradient", (-(-len(images) * g.height * g.width // rows),), (lanes, rows),
            g, len(images), images.start, first, count,
        ),
    )  # fmt: skip
