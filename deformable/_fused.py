"""Convolutions without a column buffer: columns are made in registers and multiplied there.

The kernels are in ``cuda/fused_conv.cu``, where it is said how they work. Here is decided how a
convolution is cut into pieces for them: which samples share a step, how large tiles are, and
whether the sums are split so that all of the GPU has something to do.
"""

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deformable import _cuda
from deformable._array import INT32_MAX, Array, array_module, channels_last

if TYPE_CHECKING:
    from deformable.conv import ConvGeometry

TENSOR_CORES = 80  # compute capability from which on mma has bfloat16 and TF32, and cp.async exists
STEP_BYTES = 64  # of channels of a sample that are multiplied at once
STAGES = 3  # steps of which the weights are in shared memory
LEAST_STEPS = 8  # of a block, where the sums are split
WIDTHS = (32, 64, 128)  # output channels of a tile


class Layout(NamedTuple):
    """How the product is walked through; kernels get it by value as the struct of that name."""

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

    terms: int
    tile_n: int
    warps: int
    blocks: int
    parts: int
    shared: int
    layout: Layout


class Strides(NamedTuple):
    """Steps of four axes in elements, as the struct of that name."""

    axis0: np.int64
    axis1: np.int64
    axis2: np.int64
    axis3: np.int64


def _strides(array: Array | None) -> Strides:
    if array is None:
        return Strides(*[np.int64(0)] * 4)
    return Strides(*[np.int64(s // array.itemsize) for s in array.strides])


def covers(g: "ConvGeometry", x: Array) -> bool:
    """Whether these kernels compute this convolution on the device of ``x``."""
    rows = g.batch * g.height * g.width * (g.channels // _run(g))
    return (
        x.dtype != np.float64
        and int(x.device.compute_capability) >= TENSOR_CORES
        and max(rows, g.batch * g.positions) <= INT32_MAX
    )


def _run(g: "ConvGeometry") -> int:
    """Consecutive channels that share their samples and lie in one group of weights."""
    return math.gcd(g.channels // g.groups, g.channels // g.offset_groups)


@functools.lru_cache(maxsize=1024)
def variant(
    g: "ConvGeometry", itemsize: int, terms: int, corners: int, processors: int, shared: int
) -> Variant:
    """How to compute a convolution on a GPU of so many processors with so much shared memory."""
    depth, outs, run = g.channels // g.groups, g.out_channels // g.groups, _run(g)
    unit = 16 // itemsize
    lanes = min(4, 1 << (-(-run // unit) - 1).bit_length())
    chunks = -(-run // (unit * lanes))
    slots = -(-(depth // run * g.taps) // (4 // lanes))

    widest = 64 if terms == 3 else 128
    tiles = -(-outs // widest)
    tile_n = next(width for width in WIDTHS if width * tiles >= outs)
    positions = g.batch * g.positions
    blocks_of = lambda warps: -(-positions // (32 * warps)) * g.groups * tiles  # noqa: E731
    warps = 4 if blocks_of(4) >= 2 * processors else 2

    stage = tile_n * STEP_BYTES * (2 if terms == 3 else 1)
    per_slot = 4 // lanes * 32 * warps * (32 if corners == 4 else 4)
    resident = 8 // warps
    room = shared // resident - (1 << 10) - STAGES * stage - 12 * 32 * warps
    planned = max(1, min(32, slots, room // per_slot))

    steps = chunks * slots
    parts = max(1, min(steps // LEAST_STEPS, resident * processors // max(1, blocks_of(warps))))
    split = -(-steps // parts)
    return Variant(
        terms=terms, tile_n=tile_n, warps=warps, blocks=resident,
        parts=-(-steps // split), shared=STAGES * stage + planned * per_slot,
        layout=Layout(
            depth=depth, outs=outs, run=run, run_bytes=run * itemsize, runs=depth // run, rows=g.channels // run,
            rows_shared=g.channels // g.offset_groups // run, samples=4 // lanes, lane_bits=lanes.bit_length() - 1, step_bytes=16 * lanes, chunks=chunks,
            slots=slots, planned=planned, steps=steps, split=split, tiles=tiles,
        ),
    )  # fmt: skip


@functools.cache
def _device(number: int) -> tuple[int, int]:
    from cupy.cuda import Device

    attributes = Device(number).attributes
    return attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerMultiprocessor"]


def convolve(
    g: "ConvGeometry",
    x: Array,
    weight: Array,
    bias: Array | None,
    offset: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """The output rows (N · Ho · Wo, O): of a deformable convolution if there is an ``offset``."""
    xp, dtype = array_module(x), x.dtype
    terms = 3 if dtype == np.float32 and not _cuda.allows_tf32() else 1
    corners = 1 if offset is None else 4
    v = variant(g, dtype.itemsize, terms, corners, *_device(x.device.id))
    image = channels_last(x, dtype)
    if bias is not None:
        bias = xp.ascontiguousarray(bias)
    positions = g.batch * g.positions
    y = xp.empty((positions, g.out_channels), dtype)
    split = v.parts > 1
    sums = xp.empty((v.parts, *y.shape), np.float32) if split else y
    tiles = g.groups * v.layout.tiles
    units = tiles * v.layout.steps * v.tile_n * (STEP_BYTES // 16) * (2 if terms == 3 else 1)
    # kernels read on while they multiply the last steps: into what follows, of no use to them
    ahead = (STAGES - 1) * units // (tiles * v.layout.steps)
    packed = xp.empty((units + ahead) * 4, np.uint32)
    samples = xp.empty(g.groups * v.layout.slots * v.layout.samples * 4, np.int32)
    macros = {
        "DTYPE": dtype, "INDEX": "int", "TERMS": terms, "TILE_N": v.tile_n, "WARPS": v.warps,
        "CORNERS": corners, "VEC": _cuda.vector_width(v.layout.run, image),
        "OFFSET": dtype if offset is None else offset.dtype,
        "MASK": dtype if mask is None else mask.dtype,
        "OUT": sums.dtype,
    }  # fmt: skip
    _cuda.launch(
        "fused_conv.cu", "pack_weights", (-(-units // 256),), (256,),
        weight, _strides(weight), packed, samples, g, v.layout, units, **macros,
    )  # fmt: skip
    _cuda.launch(
        "fused_conv.cu", "fused_conv",
        (-(-positions // (32 * v.warps)), tiles, v.parts), (32 * v.warps,),
        image, offset, mask, packed, samples, None if split else bias, sums,
        g, v.layout, _strides(offset), _strides(mask), shared=v.shared, **macros,
    )  # fmt: skip
    if split:
        _cuda.launch(
            "fused_conv.cu", "add_parts", (-(-y.size // 256),), (256,),
            sums, bias, y, y.size, g.out_channels, v.parts, **macros,
        )  # fmt: skip
    return y
