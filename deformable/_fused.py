"""Convolutions forward without a column buffer: columns are made in registers, and used up there.

The kernels, ``cuda/fused_conv.cu`` on tensor cores and ``cuda/fused_depthwise.cu`` for one channel
per group, say how they work. Here a convolution is cut into pieces for them: which samples share a
step, how large tiles are, and whether sums are split so that all of the GPU has something to do.

Besides the result a call takes memory for its weights, packed, and for a copy of an image that does
not lie channels-last. Sums that are split take at most a tile for each block that the GPU can hold,
that is 128 KiB per multiprocessor.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from deformable import _cuda
from deformable._arrange import channels_last
from deformable._array import (
    CALLS,
    INT32_MAX,
    Array,
    array_module,
    compute_dtype,
)
from deformable._conv import ConvGeometry

TENSOR_CORES = 80  # the compute capability from which on they know bfloat16 and TF32
UNIT_BYTES = 16  # of channels that a lane loads at once
STEP_UNITS = 4  # of a position that are multiplied at once, one by each lane of a quad
WIDTHS = (32, 64, 128)  # output channels of a tile
WARPS = 8  # of a multiprocessor, which the registers suffice for
LEAST_STEPS = 8  # of a block where sums are split
LEAST_PLANNED = 2  # slots planned at once, for which fewer blocks share a multiprocessor
DEPTHWISE_PLAN = 32 << 10  # bytes of shared memory


class Strides(NamedTuple):
    """Steps of four axes in elements; kernels get it by value as the struct of the same fields."""

    axis0: np.int64
    axis1: np.int64
    axis2: np.int64
    axis3: np.int64


class Layout(NamedTuple):
    """How the product is walked through; the struct of that name explains the fields."""

    depth: int
    outs: int
    run: int
    run_bytes: int
    runs: int
    rows: int
    rows_shared: int
    samples: int
    lane_bits: int
    step_bytes: int
    chunks: int
    slots: int
    planned: int
    steps: int
    split: int
    tiles: int


class Variant(NamedTuple):
    """A compiled kernel and how it is launched."""

    tile_n: int
    warps: int
    grid: tuple[int, int, int]
    stage: int  # units of weights in a step
    shared: int  # bytes
    layout: Layout


class View(NamedTuple):
    """How an array of four axes is read."""

    dtype: np.dtype
    strides: tuple[int, ...]  # bytes


class Operands(NamedTuple):
    """What of its arrays, and of where it runs, tells how a convolution of given sizes is done."""

    multiprocessors: int
    shared: int  # bytes per multiprocessor
    terms: int  # products on tensor cores that make one: 3 of TF32 are one of float32
    dtype: np.dtype
    vector: int  # channels that a load from the image takes at most
    offset: View | None
    mask: View | None

    @property
    def corners(self) -> int:
        """Pixels that a sample sees."""
        return 1 if self.offset is None else 4

    @property
    def offset_strides(self) -> Strides:
        """Of the offsets; zeros if there are none."""
        return strides(self.offset)

    @property
    def mask_strides(self) -> Strides:
        """Of the masks; zeros if there are none."""
        return strides(self.mask)

    @property
    def macros(self) -> dict[str, Any]:
        """What every one of these kernels is compiled for."""
        return {
            "DTYPE": self.dtype,
            "INDEX": "int",
            "CORNERS": self.corners,
            "OFFSET": (self.offset or self).dtype,
            "MASK": (self.mask or self).dtype,
        }


def view(array: Array | None) -> View | None:
    """How an array is read, if there is one."""
    return None if array is None else View(array.dtype, array.strides)


def operands(image: Array, offset: Array | None, mask: Array | None) -> Operands:
    """Those of a call, for what is kept of calls of its kind; float32_precision is among them."""
    dtype = image.dtype
    strict = dtype == np.float32 and not _cuda.allows_tf32()
    return Operands(
        *resources(image.device.id), 3 if strict else 1, dtype, _cuda.vector(image),
        view(offset), view(mask),
    )  # fmt: skip


@functools.cache
def resources(device: int) -> tuple[int, int]:
    """Multiprocessors of a device, and bytes of shared memory of each."""
    from cupy.cuda import Device

    attributes = Device(device).attributes
    return attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerMultiprocessor"]


def covers(g: ConvGeometry, x: Array) -> bool:
    """Whether these kernels compute this convolution on the device of ``x``."""
    return _covers(g, x.dtype, x.device.compute_capability)


@functools.lru_cache(maxsize=CALLS)
def _covers(g: ConvGeometry, dtype: np.dtype, capability: str) -> bool:
    rows = g.batch * g.height * g.width * (g.channels // g.run_length)
    most = INT32_MAX - _cuda.THREADS  # they count by int, up to a tile's end
    if max(rows, g.batch * g.positions) > most:
        return False
    if g.is_depthwise:
        blocks = max(g.offset_groups, g.out_channels // g.channels)
        fits = g.taps * _plan_bytes(4, dtype) <= DEPTHWISE_PLAN
        return blocks <= _cuda.GRID_MAX and g.out_channels * g.taps <= most and fits
    blocks = max(g.offset_groups, g.out_channels)
    return dtype != np.float64 and int(capability) >= TENSOR_CORES and blocks <= _cuda.GRID_MAX


def convolve(
    g: ConvGeometry,
    x: Array,
    weight: Array,
    bias: Array | None,
    offset: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """The output rows (N · Ho · Wo, O): of a deformable convolution if there is an ``offset``."""
    xp, dtype = array_module(x), x.dtype
    run = _depthwise if g.is_depthwise else _product
    bias = None if bias is None else xp.ascontiguousarray(bias)
    image = channels_last(x, dtype)
    y = xp.empty((g.batch * g.positions, g.out_channels), dtype)
    run(g, operands(image, offset, mask), image, weight, bias, offset, mask, y)
    return y


def strides(array: Array | View | None) -> Strides:
    """The steps along the axes of an array; zeros if there is none."""
    if array is None:
        return Strides(*[np.int64(0)] * 4)
    return Strides(*(np.int64(step // array.dtype.itemsize) for step in array.strides))


# ---- on tensor cores


def variant(
    g: ConvGeometry, itemsize: int, terms: int, corners: int, processors: int, shared: int
) -> Variant:
    """How to compute a convolution on a GPU of so many processors, of so much shared memory each.

    ``terms`` is 3 for float32 as three products of TF32, else 1.
    """
    depth, outs, run = g.channels // g.groups, g.out_channels // g.groups, g.run_length
    unit = UNIT_BYTES // itemsize
    lanes = next(n for n in (1, 2, 4) if n * unit >= run or n == STEP_UNITS)
    samples = STEP_UNITS // lanes
    chunks = -(-run // (unit * lanes))
    slots = -(-(depth // run * g.taps) // samples)
    steps = chunks * slots

    # wide tiles gather least; three terms need the registers for low parts
    tiles = -(-outs // (WIDTHS[-1] if terms == 1 else WIDTHS[-2]))
    tile_n = next(width for width in WIDTHS if width * tiles >= outs)
    stage = tile_n * STEP_UNITS * (2 if terms == 3 else 1)

    def blocks(warps):
        return -(-g.batch * g.positions // (32 * warps)) * g.groups * tiles

    warps = 4 if blocks(4) * 4 >= WARPS * processors else 2
    resident = WARPS // warps * processors
    parts = max(1, min(steps // LEAST_STEPS, resident // max(1, blocks(warps))))
    split = -(-steps // parts)

    positions = 32 * warps
    fixed = 2 * stage * UNIT_BYTES + (positions * tile_n * 4 if terms == 3 else 0)
    slot = samples * positions * corners * (4 if corners == 1 else 8)
    for blocks_at_once in range(WARPS // warps, 0, -1):
        room = shared // blocks_at_once - (1 << 10) - positions * 12 - fixed
        if room >= slot * min(slots, LEAST_PLANNED):
            break
    planned = max(1, min(slots, 32, room // slot))
    return Variant(
        tile_n=tile_n,
        warps=warps,
        grid=(-(-g.batch * g.positions // positions), g.groups * tiles, -(-steps // split)),
        stage=stage,
        shared=fixed + planned * slot,
        layout=Layout(
            depth=depth, outs=outs, run=run, run_bytes=run * itemsize, runs=depth // run,
            rows=g.channels // run, rows_shared=g.channels // g.offset_groups // run,
            samples=samples, lane_bits=lanes.bit_length() - 1, step_bytes=lanes * UNIT_BYTES,
            chunks=chunks, slots=slots, planned=planned, steps=steps, split=split, tiles=tiles,
        ),
    )  # fmt: skip


class Product(NamedTuple):
    """The launches of a product, and the shapes of what they share."""

    packed: tuple[int, int]
    samples: tuple[int, int]
    parts: int
    pack_weights: _cuda.Launch
    multiply: _cuda.Launch
    add_parts: _cuda.Launch


@functools.lru_cache(maxsize=CALLS)
def product_plan(g: ConvGeometry, o: Operands, weight: View) -> Product:
    """The launches of a convolution on tensor cores."""
    v = variant(g, o.dtype.itemsize, o.terms, o.corners, o.multiprocessors, o.shared)
    layout, parts = v.layout, v.grid[2]
    units = (v.grid[1] * layout.steps + 1) * v.stage  # with a step of zeros behind the last one
    size = g.batch * g.positions * g.out_channels
    kernel: Callable[..., _cuda.Launch] = functools.partial(
        _cuda.Launch, "fused_conv.cu",
        TERMS=o.terms, TILE_N=v.tile_n, WARPS=v.warps, VEC=math.gcd(layout.run, o.vector),
        OUT=o.dtype if parts == 1 else np.dtype(np.float32), **o.macros,
    )  # fmt: skip
    return Product(
        packed=(units, UNIT_BYTES // 4),
        samples=(g.groups * layout.slots * layout.samples, 4),
        parts=parts,
        pack_weights=kernel(
            "pack_weights", *_cuda.threads(units), strides(weight), g, layout, units
        ),
        multiply=kernel(
            "fused_conv", v.grid, (32, v.warps),
            g, layout, o.offset_strides, o.mask_strides, shared=v.shared,
        ),
        add_parts=kernel("add_parts", *_cuda.threads(size), size, g.out_channels, parts),
    )  # fmt: skip


def _product(g, o, image, weight, bias, offset, mask, y):
    xp = array_module(image)
    plan = product_plan(g, o, view(weight))
    packed, samples = xp.empty(plan.packed, np.uint32), xp.empty(plan.samples, np.int32)
    plan.pack_weights(weight, packed, samples)
    if plan.parts == 1:
        plan.multiply(image, offset, mask, packed, samples, bias, y)
    else:
        sums = xp.empty((plan.parts, *y.shape), np.float32)
        plan.multiply(image, offset, mask, packed, samples, None, sums)
        plan.add_parts(sums, bias, y)


# ---- one channel per group


@functools.lru_cache(maxsize=CALLS)
def depthwise_launch(g: ConvGeometry, o: Operands) -> _cuda.Launch:
    """The launch that computes a convolution with one channel per group."""
    outs, depth = g.out_channels // g.channels, g.channels // g.offset_groups
    sample = _plan_bytes(o.corners, o.dtype)
    tile = max(1, min(64, DEPTHWISE_PLAN // (g.taps * sample)))
    vec = math.gcd(depth, o.vector)
    return _cuda.Launch(
        "fused_depthwise.cu", "depthwise",
        (-(-g.batch * g.positions // tile), outs, g.offset_groups), _cuda.row_block(depth // vec),
        g, o.offset_strides, o.mask_strides, tile,
        shared=tile * g.taps * sample, VEC=vec, **o.macros,
    )  # fmt: skip


def _depthwise(g, o, image, weight, bias, offset, mask, y):
    depthwise_launch(g, o)(image, offset, mask, by_tap(g, weight), bias, y)


def by_tap(g: ConvGeometry, weight: Array) -> Array:
    """The weights of one channel per group as (O // C, taps, C), copied: the copy is aligned."""
    turned = weight.reshape(g.channels, g.out_channels // g.channels, g.taps).transpose(1, 2, 0)
    return turned.copy(order="C")


def _plan_bytes(corners: int, dtype: np.dtype) -> int:
    """Of a sample: the pixel and the weight of every corner, aligned to the weights."""
    weight = compute_dtype(dtype).itemsize
    return -(-corners * (4 + weight) // weight) * weight
