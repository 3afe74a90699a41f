"""What all convolutions share: their sizes, products with the weights, and pieces of the work.

A convolution is a matrix of columns, what its taps see at every output position, times the weights.
Operators differ only in where the columns look.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from deformable import _cuda
from deformable._arrange import channels_first, channels_last
from deformable._array import (
    CALLS,
    INT32_MAX,
    Array,
    Pair,
    Spec,
    array_module,
    check_shape,
    compute_dtype,
    pair,
)

BLOCK_BYTES = 3 << 19  # of columns alive on the CPU: about what the caches of a core hold
LEAST_ROWS = 1024  # of a product on the CPU
SUM_BLOCK = 32, 8  # columns, and rows at a time, of a block that sums rows
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

    @property
    def run_length(self) -> int:
        """Consecutive channels that share their samples and lie in one group of weights."""
        return math.gcd(self.channels // self.groups, self.channels // self.offset_groups)

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel is a group of weights of its own."""
        return self.groups == self.channels > 1


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


# ---- columns times weights


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


# ---- NumPy: blocks of positions, and the columns of groups


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


# ---- CUDA: chunks of positions, and the columns of groups


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


def column_macros(
    g: ConvGeometry, dtype: np.dtype, rows_vector: int, *vectors: int
) -> dict[str, int]:
    """Where kernels find the gradients of columns, and how many channels they load at once.

    They lie in memory if ``rows_vector`` is 0. Otherwise, with one channel per group, they are made
    of the gradient of the output rows, of which a load takes so many elements at most; ``vectors``
    is the same of other arrays.
    """
    run = g.channels // g.offset_groups if rows_vector else g.run_length
    most = rows_vector or _cuda.LOAD_BYTES // dtype.itemsize
    return {"DEPTHWISE": int(rows_vector > 0), "VEC": math.gcd(run, most, *vectors)}


# ---- sums of rows; CUDA: cuda/sum_rows.cu


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


@functools.lru_cache(maxsize=CALLS)
def _sum_plan(
    shape: tuple[int, int], given: np.dtype, dtype: np.dtype
) -> tuple[tuple[int, int], _cuda.Launch, _cuda.Launch]:
    """The launches that add up rows, about as many parts as a part has rows, and then the parts."""
    rows, columns = shape
    split = max(1, math.isqrt(rows), -(-rows // _cuda.GRID_MAX))
    parts, strips = max(1, -(-rows // split)), -(-columns // SUM_BLOCK[0])
    sums = compute_dtype(dtype)
    kernel = functools.partial(
        _cuda.Launch, "sum_rows.cu", "sum_rows",
        INDEX="int", VEC=1, LANES=SUM_BLOCK[0], ROWS=SUM_BLOCK[1],
    )  # fmt: skip
    return (
        (parts, columns),
        kernel((strips, parts), SUM_BLOCK, rows, columns, split, DTYPE=given, OUT=sums),
        kernel((strips, 1), SUM_BLOCK, parts, columns, parts, DTYPE=sums, OUT=dtype),
    )
