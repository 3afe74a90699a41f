"""Gradients of convolutions without a column buffer.

``cuda/fused_weight_gradient.cu`` and ``cuda/fused_column_gradient.cu``, on tensor cores, say how
they work, and so does ``cuda/fused_depthwise.cu`` for one channel per group. Here a convolution is
cut into pieces for them, as ``_fused.py`` does for the forward.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from deformable import _cuda, _fused
from deformable._array import CALLS, Array, array_module, compute_dtype
from deformable._conv import Chunk, ConvGeometry, sum_rows
from deformable._fused import Operands, View, strides, view

WORKSPACE_BYTES = 128 << 20  # of partial sums alive on a GPU
WEIGHT_WARPS = 8  # of a block for the gradient of the weights
UNITS = 16  # of 16 bytes, of columns of a tile
STAGE = 32 * WEIGHT_WARPS // UNITS  # positions that a block gathers at once, a thread one unit
PLANS = 512  # samples that a block plans at once, at most
LEAST_STAGES = 16  # of a block where sums are split
COLUMN_WARPS = 4  # of a block for the gradients of columns
TILE_M = 32 * COLUMN_WARPS  # positions of a tile of columns
BLOCKS = 8  # of a multiprocessor, among which sums of one channel per group are split


class WeightLayout(NamedTuple):
    """The struct Layout of ``fused_weight_gradient.cu``, which explains the fields."""

    outs: int
    run: int
    out_units: int
    rows: int
    rows_shared: int
    samples: int
    run_units: int
    planned: int
    plans: int
    tiles_o: int
    tiles_c: int
    split: int


class WeightVariant(NamedTuple):
    """A compiled kernel for the gradient of the weights and how it is launched."""

    tile_o: int
    tiles: int
    tiles_at_once: int
    parts: int
    shared: int  # bytes
    layout: WeightLayout


class ColumnLayout(NamedTuple):
    """The struct Layout of ``fused_column_gradient.cu``, which explains the fields."""

    outs: int
    run: int
    out_units: int
    runs: int
    rows: int
    rows_shared: int
    lane_bits: int
    samples: int
    slots: int
    chunks: int
    steps: int
    split: int


class ColumnVariant(NamedTuple):
    """A compiled kernel for the gradients of columns and samples and how it is launched."""

    tile_n: int
    grid: tuple[int, int, int]
    stage: int  # units of weights in a step
    stages: int
    shared: int  # bytes
    layout: ColumnLayout


# ---- on tensor cores


@functools.lru_cache(maxsize=CALLS)
def rows_plan(g: ConvGeometry, dtype: np.dtype, terms: int) -> tuple[tuple[int, int], _cuda.Launch]:
    """The shape of the packed rows, and the launch that packs them."""
    unit, outs = _fused.UNIT_BYTES // dtype.itemsize, g.out_channels // g.groups
    out_units = -(-outs // unit)
    units = g.batch * g.positions * g.groups * out_units
    return (units, unit), _cuda.Launch(
        "fused_gradient_rows.cu", "pack_rows", *_cuda.threads(units), outs, out_units, units,
        DTYPE=dtype, INDEX="int", VEC=unit, TERMS=terms,
    )  # fmt: skip


def pack_rows(g: ConvGeometry, o: Operands, grad_y: Array) -> Array:
    """The gradient of the output rows (N · Ho · Wo, O), in whole units of 16 bytes of every group.

    It is a copy only if it must be: where groups do not end with a unit, or for TF32, rounded.
    """
    unit = _fused.UNIT_BYTES // grad_y.itemsize
    whole = g.out_channels // g.groups % unit == 0 and _cuda.vector(grad_y) == unit
    if whole and (o.terms == 3 or o.dtype != np.float32):
        return grad_y
    shape, pack = rows_plan(g, o.dtype, o.terms)
    packed = array_module(grad_y).empty(shape, o.dtype)
    pack(grad_y, packed)
    return packed


def weight_variant(
    g: ConvGeometry, itemsize: int, terms: int, corners: int, processors: int, limit: int
) -> WeightVariant:
    """How to compute the gradient of the weights on a GPU of so many processors.

    Not more than ``limit`` bytes of partial sums are alive.
    """
    outs, run = g.out_channels // g.groups, g.run_length
    unit = _fused.UNIT_BYTES // itemsize
    run_units = -(-run // unit)
    samples = g.channels // g.groups // run * g.taps
    aligned = run_units % UNITS == 0 or UNITS % run_units == 0  # tiles begin where samples do
    plans = -(-UNITS // run_units) if aligned else (UNITS + run_units - 2) // run_units + 1
    planned = max(1, PLANS // (plans * STAGE)) * STAGE

    # three terms need the registers of wider tiles for their own sums
    tiles_o = -(-outs // _fused.WIDTHS[-1 if terms == 1 else -2])
    tile_o = next(width for width in _fused.WIDTHS if width * tiles_o >= outs)
    tile_c = UNITS * unit
    tiles_c = -(-samples * run_units // UNITS)
    tiles = g.groups * tiles_o * tiles_c
    positions = g.batch * g.positions
    tile_bytes = 4 * tile_o * tile_c
    most = min(positions // (LEAST_STAGES * STAGE), 2 * processors // tiles, limit // tile_bytes)
    split = max(1, -(-positions // (max(1, most) * STAGE))) * STAGE
    parts = -(-positions // split)
    rows = STAGE * itemsize * ((tile_o + 8) + (tile_c + 8))
    return WeightVariant(
        tile_o=tile_o,
        tiles=tiles,
        tiles_at_once=max(1, min(tiles, limit // (tile_bytes * max(1, parts)))),
        parts=parts,
        shared=PLANS * corners * 8 + rows,
        layout=WeightLayout(
            outs=outs, run=run, out_units=-(-outs // unit), rows=g.channels // run,
            rows_shared=g.channels // g.offset_groups // run, samples=samples,
            run_units=run_units, planned=planned, plans=plans,
            tiles_o=tiles_o, tiles_c=tiles_c, split=split,
        ),
    )  # fmt: skip


class WeightGradient(NamedTuple):
    """The launches, in pairs, and the shape of the parts of the sums."""

    parts: tuple[int, ...]
    launches: tuple[tuple[_cuda.Launch, _cuda.Launch], ...]


@functools.lru_cache(maxsize=CALLS)
def weight_plan(g: ConvGeometry, o: Operands, limit: int) -> WeightGradient:
    """The launches for the gradient of the weights, with at most ``limit`` bytes of its parts."""
    v = weight_variant(g, o.dtype.itemsize, o.terms, o.corners, o.multiprocessors, limit)
    kernel = functools.partial(
        _cuda.Launch, "fused_weight_gradient.cu",
        TERMS=o.terms, TILE_O=v.tile_o, VEC=math.gcd(v.layout.run, o.vector),
        WARPS=WEIGHT_WARPS, UNITS=UNITS, PLANS=PLANS, **o.macros,
    )  # fmt: skip
    size = g.out_channels * (g.channels // g.groups) * g.taps

    def pair(first):
        tiles = min(v.tiles_at_once, v.tiles - first)
        return (
            kernel(
                "weight_gradient", (tiles, v.parts), (32 * WEIGHT_WARPS,),
                g, v.layout, o.offset_strides, o.mask_strides, first, shared=v.shared,
            ),
            kernel("add_parts", *_cuda.threads(size), g, v.layout, first, tiles, v.parts),
        )  # fmt: skip

    return WeightGradient(
        (v.parts, v.tiles_at_once, v.tile_o, UNITS * _fused.UNIT_BYTES // o.dtype.itemsize),
        tuple(pair(first) for first in range(0, v.tiles, v.tiles_at_once)),
    )


def weight_gradient(
    g: ConvGeometry,
    o: Operands,
    grad_y: Array,
    image: Array,
    weight: Array,
    offset: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """The gradient of ``weight``, given that of the result as :func:`pack_rows` returns it.

    ``image`` is (N, H, W, C); the convolution is deformable if there is an ``offset``.
    """
    xp = array_module(image)
    plan = weight_plan(g, o, WORKSPACE_BYTES)
    parts, out = xp.empty(plan.parts, np.float32), xp.empty(weight.shape, image.dtype)
    for gradient, add_parts in plan.launches:
        gradient(grad_y, image, offset, mask, parts)
        add_parts(parts, out)
    return out


def column_variant(
    g: ConvGeometry, itemsize: int, terms: int, processors: int, count: int
) -> ColumnVariant:
    """How to compute the gradients of ``count`` positions on a GPU of so many processors."""
    outs, run = g.out_channels // g.groups, g.run_length
    unit = _fused.UNIT_BYTES // itemsize
    run_units = -(-run // unit)
    tile_n = 32 if 4 * run_units * unit <= 32 else 64  # narrow where 4 samples fit into it
    lane_units = tile_n // (4 * unit)
    lanes = next(n for n in (1, 2, 4) if n * lane_units >= run_units or n == 4)
    samples = 4 // lanes
    slots, chunks = -(-g.taps // samples), -(-run_units // (lanes * lane_units))
    steps = -(-outs // (4 * unit))
    rows_shared = g.channels // g.offset_groups // run

    tiles = -(-count // TILE_M) * g.offset_groups
    parts = max(1, min(slots, 8 * processors // max(1, tiles)))
    split = -(-slots // parts)
    stage = tile_n * 4 * (2 if terms == 3 else 1)
    totals = (tile_n + 16) * TILE_M * 4 if terms == 3 else 0  # of columns, and dots
    return ColumnVariant(
        tile_n=tile_n,
        grid=(-(-count // TILE_M), -(-slots // split), g.offset_groups),
        stage=stage,
        stages=g.offset_groups * slots * rows_shared * chunks * steps,
        shared=2 * stage * _fused.UNIT_BYTES + totals + samples * TILE_M * 32,
        layout=ColumnLayout(
            outs=outs, run=run, out_units=-(-outs // unit),
            runs=g.channels // g.groups // run, rows=g.channels // run,
            rows_shared=rows_shared, lane_bits=lanes.bit_length() - 1, samples=samples,
            slots=slots, chunks=chunks, steps=steps, split=split,
        ),
    )  # fmt: skip


@functools.lru_cache(maxsize=CALLS)
def packing_plan(
    g: ConvGeometry, o: Operands, weight: View
) -> tuple[tuple[int, int], _cuda.Launch]:
    """The shape of the packed weights, and the launch that packs them."""
    v = column_variant(g, o.dtype.itemsize, o.terms, o.multiprocessors, 0)
    units = (v.stages + 1) * v.stage  # with a step of zeros behind the last one
    return (units, 4), _column_kernel(o, v)(
        "pack_weights", *_cuda.threads(units), strides(weight), g, v.layout, units
    )


@functools.lru_cache(maxsize=CALLS)
def column_launch(g: ConvGeometry, o: Operands, chunk: Chunk) -> _cuda.Launch:
    """The launch that computes the gradients of columns and samples, for a chunk of positions.

    Its arrays: the gradient of the result, from :func:`pack_rows`, the image (N, H, W, C), offsets,
    masks, the weights, from :func:`pack_weights`, and those to fill in, or None: the gradients of
    the columns of these positions, as in ``cuda/conv.cuh``, of all offsets
    (N · Ho · Wo, G, taps, 2) and of all masks (N · Ho · Wo, G, taps).
    """
    v = column_variant(g, o.dtype.itemsize, o.terms, o.multiprocessors, chunk.size)
    return _column_kernel(o, v)(
        "column_gradient", v.grid, (TILE_M,),
        g, v.layout, o.offset_strides, o.mask_strides, chunk.first, chunk.size, shared=v.shared,
    )  # fmt: skip


def _column_kernel(o: Operands, v: ColumnVariant) -> Callable[..., _cuda.Launch]:
    return functools.partial(
        _cuda.Launch, "fused_column_gradient.cu",
        TERMS=o.terms, TILE_N=v.tile_n, VEC=math.gcd(v.layout.run, o.vector),
        WARPS=COLUMN_WARPS, **o.macros,
    )  # fmt: skip


def pack_weights(g: ConvGeometry, o: Operands, weight: Array) -> Array:
    """The weights as :func:`column_launch` reads them."""
    shape, pack = packing_plan(g, o, view(weight))
    packed = array_module(weight).empty(shape, np.uint32)
    pack(weight, packed)
    return packed


# ---- one channel per group


@functools.lru_cache(maxsize=CALLS)
def depthwise_plan(
    g: ConvGeometry, o: Operands, vector: int
) -> tuple[tuple[int, int], _cuda.Launch]:
    """The shape of the parts of the gradient of the weights, and the launch that adds them up."""
    depth, positions = g.channels // g.offset_groups, g.batch * g.positions
    vec = math.gcd(depth, vector)
    lanes, rows = _cuda.row_block(depth // vec)
    slabs = -(-depth // (lanes * vec))
    blocks = g.offset_groups * slabs * (g.out_channels // g.channels) * g.taps
    most = min(positions // _cuda.THREADS, BLOCKS * o.multiprocessors // blocks)
    split = max(1, -(-positions // max(1, most)))
    parts = -(-positions // split)
    return (parts, g.out_channels * g.taps), _cuda.Launch(
        "fused_depthwise.cu", "depthwise_weight_gradient", (blocks, parts), (lanes, rows),
        g, o.offset_strides, o.mask_strides, split, VEC=vec, **o.macros,
    )  # fmt: skip


def depthwise_weight_gradient(
    g: ConvGeometry,
    o: Operands,
    grad_y: Array,
    image: Array,
    weight: Array,
    offset: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """The gradient of ``weight``, given that of the output rows (N · Ho · Wo, O)."""
    shape, add_up = depthwise_plan(g, o, _cuda.vector_width(o.vector, grad_y))
    parts = array_module(image).empty(shape, compute_dtype(image.dtype))
    add_up(grad_y, image, offset, mask, parts)
    return sum_rows(parts, weight.dtype).reshape(weight.shape)
