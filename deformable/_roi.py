"""Where RoIs lie, where their bins look and what a pixel weighs there: NumPy and ``cuda/roi.cuh``.

All operators of the family cut a RoI into bins. Along an axis a bin holds a run of samples, evenly
spaced, and a sample at t sees the pixel p with the weight of a hat, max(0, 1 − |p − t|). Whether
a sample counts and where it is clamped is a matter of one axis too. So a bin's average is an outer
product of two short vectors, each a sum of hats, and an operator that averages is one sparse matrix
whose rows are its bins:

    y = S @ image        gradient of the image = S.T @ gradient of y

The sum of hats takes no loop over the samples. m samples in the cell [q, q + 1), whose fractions
add up to F, give m − F to pixel q and F to pixel q + 1, and moved to the right they take m from
the one and give it to the other. Samples being evenly spaced, m is a difference of two counts and
F is m times the fraction of the middle one: a RoI of a million pixels costs what its pixels inside
of the image do.

Positions are computed in float64, whatever the arrays hold: how many samples a bin has, and which
of them are inside, jumps.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from deformable import _cuda
from deformable._arrange import channels_first, cuda_rows
from deformable._array import (
    CALLS,
    INT32_MAX,
    Array,
    Pair,
    Spec,
    array_module,
    check_dtypes,
    check_library,
    check_shape,
    compute_dtype,
    pair,
    real_number,
    specs,
)

BLOCK_BYTES = 4 << 20  # of a sparse matrix and its product, or of the lines of maxima, alive
ENTRY_BYTES = 32  # of an entry of a matrix, while it is made
TAP_BYTES = 64  # of a pixel that a run sees, while its weight is found


class RoIGeometry(NamedTuple):
    """All sizes of a RoI operator; kernels get it by value as the struct of the same fields."""

    batch: int
    channels: int
    height: int
    width: int
    rois: int
    pooled_h: int
    pooled_w: int
    group_h: int  # bins along y that see channels of their own
    group_w: int
    sampling_h: int  # samples of a bin along y; below 1: one per pixel
    sampling_w: int
    classes: int  # equal shares of the output's channels with offsets of their own
    part_h: int  # offsets along y; 0: there are none
    part_w: int
    spatial_scale: float
    gamma: float

    @property
    def out_channels(self) -> int:
        return self.channels // (self.group_h * self.group_w)

    @property
    def depth(self) -> int:
        """Channels that share a bin's weights."""
        return self.channels // (self.group_h * self.group_w * self.classes)

    @property
    def planes(self) -> int:
        """Groups of ``depth`` channels in a pixel."""
        return self.group_h * self.group_w * self.classes

    @property
    def bins(self) -> int:
        """Bins of a RoI, one per class."""
        return self.pooled_h * self.pooled_w * self.classes

    @property
    def rows(self) -> int:
        """Bins of all RoIs."""
        return self.rois * self.pooled_h * self.pooled_w * self.classes

    @property
    def shifted(self) -> bool:
        """Whether there are offsets."""
        return self.part_h > 0

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.rois, self.out_channels, self.pooled_h, self.pooled_w


class Rule(NamedTuple):
    """How an operator places RoIs and samples; kernels get it as RoIGeometry."""

    rounding: int  # of the corners: NONE, in the IMAGE, or on the feature MAP after scaling
    shift: float  # of the corners to the upper left, in pixels of the map
    least: float  # a RoI's smallest height and width
    whole: int  # bins hold all pixels that they touch, instead of samples
    phase: float  # of the first sample, in steps after the bin's start
    margin: float  # how far outside of the outermost pixels a sample still counts
    kept: int  # the sum is divided by the samples that count, instead of by all


NONE, IMAGE, MAP = range(3)


class RoIGradients(NamedTuple):
    """Gradients of an operator without offsets."""

    x: Array | None


WithOffset = Callable[[str, RoIGeometry, Spec], RoIGeometry]


def roi_geometry(
    function: str,
    x: Array,
    rois: Array,
    output_size: Pair,
    spatial_scale: float,
    *,
    group_size: Pair = 1,
    sampling_ratio: Pair = -1,
    gamma: float = 0.0,
    with_offset: WithOffset | None = None,
    **others: Array | None,
) -> RoIGeometry:
    """The sizes of a RoI operator, its arguments checked; ``with_offset`` adds those of an offset.

    ``others`` are the arrays grad_y, offset and mask, of which the last two may be None.
    """
    arrays = {"x": x, "rois": rois, **others}
    _, signature = check_library(function, arrays, optional=("offset", "mask"))
    return _geometry(
        function,
        pair(function, "output_size", output_size, 1),
        pair(function, "group_size", group_size, 1),
        pair(function, "sampling_ratio", sampling_ratio, -INT32_MAX),
        real_number(function, "spatial_scale", spatial_scale),
        real_number(function, "gamma", gamma),
        with_offset,
        signature,
    )


@functools.lru_cache(maxsize=CALLS)
def _geometry(
    function, output_size, group_size, sampling_ratio, spatial_scale, gamma, with_offset, signature
):
    arrays = specs(signature)
    x, rois = arrays.pop("x"), arrays["rois"]
    check_dtypes(function, {"x": x}, arrays)
    (pooled_h, pooled_w), (group_h, group_w) = output_size, group_size
    sampling_h, sampling_w = sampling_ratio
    check_shape(function, "x", x, ("N", "C", "H", "W"))
    check_shape(function, "rois", rois, ("K", 5))
    n, c, h, w = x.shape
    if min(c, h, w) < 1:
        raise ValueError(
            f"{function}: x has shape {x.shape}, expected at least one channel, row and column"
        )
    if c % (group_h * group_w):
        raise ValueError(
            f"{function}: x has shape {x.shape}, expected a number of channels that is divisible "
            f"by {group_h} x {group_w} groups"
        )
    g = RoIGeometry(
        batch=n, channels=c, height=h, width=w,
        rois=rois.shape[0], pooled_h=pooled_h, pooled_w=pooled_w,
        group_h=group_h, group_w=group_w, sampling_h=sampling_h, sampling_w=sampling_w,
        classes=1, part_h=0, part_w=0,
        spatial_scale=spatial_scale, gamma=gamma,
    )  # fmt: skip
    check_shape(function, "mask", arrays.get("mask"), (g.rois, g.pooled_h, g.pooled_w))
    check_shape(function, "grad_y", arrays.get("grad_y"), g.out_shape)
    return with_offset(function, g, arrays["offset"]) if "offset" in arrays else g


# ---- layouts


def arrange(x: Array, g: RoIGeometry, dtype: np.dtype) -> Array:
    """The image as rows (N · H · W · planes, depth): what a bin sees of a pixel lies together."""
    split = x.reshape(g.batch, g.out_channels, g.group_h, g.group_w, g.height, g.width)
    rows = array_module(x).ascontiguousarray(split.transpose(0, 4, 5, 2, 3, 1), dtype=dtype)
    return rows.reshape(g.batch * g.height * g.width * g.planes, g.depth)


def image_from_rows(rows: Array, g: RoIGeometry) -> Array:
    """The inverse of :func:`arrange`: it lies channels-last."""
    split = rows.reshape(g.batch, g.height, g.width, g.group_h, g.group_w, g.out_channels)
    image = split.transpose(0, 1, 2, 5, 3, 4).reshape(g.batch, g.height, g.width, g.channels)
    return channels_first(image)


def empty_image(g: RoIGeometry, dtype: np.dtype) -> np.ndarray:
    """An arranged image of zeros."""
    return np.zeros((g.batch * g.height * g.width * g.planes, g.depth), dtype)


def output_from_rows(rows: Array, g: RoIGeometry) -> Array:
    """Rows (K · bins, depth) seen as (K, channels, PH, PW)."""
    return rows.reshape(g.rois, g.pooled_h, g.pooled_w, g.out_channels).transpose(0, 3, 1, 2)


def output_rows(grad_y: np.ndarray, g: RoIGeometry, dtype: np.dtype, rows: slice) -> np.ndarray:
    """The inverse of :func:`output_from_rows`, of the rows of some RoIs, contiguous."""
    own = grad_y[rows.start // g.bins : rows.stop // g.bins].transpose(0, 2, 3, 1)
    return np.ascontiguousarray(own, dtype=dtype).reshape(rows.stop - rows.start, g.depth)


def mask_rows(mask: np.ndarray | None, g: RoIGeometry) -> np.ndarray:
    """The mask of every row, ones where there is none."""
    if mask is None:
        return np.ones(g.rois * g.bins)
    return np.repeat(mask.astype(np.float64).ravel(), g.classes)


# ---- the geometry of a RoI and of a bin


class Boxes(NamedTuple):
    """RoIs on the feature map: (K,) each."""

    image: np.ndarray
    y: np.ndarray
    x: np.ndarray
    height: np.ndarray
    width: np.ndarray


def boxes(function: str, g: RoIGeometry, rule: Rule, rois: np.ndarray) -> Boxes:
    """Where the RoIs lie; their values are checked here."""
    rois = rois.astype(np.float64)
    image = np.trunc(rois[:, 0])
    valid = np.isfinite(rois).all(axis=1) & (image >= 0) & (image < g.batch)
    if not valid.all():
        bad = int(valid.argmin())
        raise ValueError(
            f"{function}: rois[{bad}] is {rois[bad].tolist()}, expected finite numbers and an "
            f"image index in [0, {g.batch})"
        )
    first, last = rois[:, 1:3], rois[:, 3:5]
    if rule.rounding == IMAGE:
        first, last = round_half_away(first), round_half_away(last) + 1
    first, last = first * g.spatial_scale, last * g.spatial_scale
    if rule.rounding == MAP:
        first, last = round_half_away(first), round_half_away(last) + 1
    first, last = first - rule.shift, last - rule.shift
    size = np.fmax(last - first, rule.least)
    return Boxes(image.astype(np.int64), first[:, 1], first[:, 0], size[:, 1], size[:, 0])


def round_half_away(v: np.ndarray) -> np.ndarray:
    """To the nearest integer, half away from zero, as ``round`` of C (np.rint: half to even)."""
    whole = np.trunc(v)
    return whole + np.copysign(np.abs(v - whole) >= 0.5, v)


class Runs(NamedTuple):
    """Runs of evenly spaced samples, each along one axis: (runs,) each, float64 but the direction.

    Sample i lies at start + (phase + direction · i) · extent / total, in the order of the axis.
    Those in [first, end) count; of these the ones in [inner, outer) lie between two pixels, the
    others are clamped to an outermost one.
    """

    start: np.ndarray
    extent: np.ndarray
    total: np.ndarray
    size: np.ndarray  # of the image along the axis
    phase: np.ndarray  # of sample 0, in steps
    first: np.ndarray
    inner: np.ndarray
    outer: np.ndarray
    end: np.ndarray
    pixel: np.ndarray  # the first one that a run sees
    pixels: np.ndarray  # how many it sees at most
    direction: np.ndarray  # 1, or -1 where they go backwards

    @property
    def backwards(self) -> np.ndarray:
        """Where sample 0 is the last one by the definition."""
        return self.direction < 0

    def take(self, chosen: np.ndarray | slice) -> "Runs":
        return Runs._make(a[chosen] if isinstance(a, np.ndarray) else a for a in self)

    def position(self, i: np.ndarray) -> np.ndarray:
        steps = self.direction * i + self.phase
        return self.start + steps * self.extent / self.total

    def before(self, q: np.ndarray | float) -> np.ndarray:
        """How many samples lie before q: the sample next to q decides by its position."""
        steps = (q - self.start) * (self.total / self.extent) - self.phase
        i = np.rint(self.direction * steps)
        i = np.fmin(np.fmax(i, 0), self.total)  # 0 where all samples are at q: that is NaN
        i += self.position(i) < q
        return np.fmin(i, self.total)

    def taps(self, dtype: np.dtype, slopes: bool = False) -> "Taps":
        """What the pixels weigh that each run sees and, on demand, the slopes of the weights."""
        reach = np.where(self.pixels > 0, self.pixels + 2, 0).astype(np.int64)
        owner = np.repeat(np.arange(len(reach)), reach)
        run = self.take(owner)
        step = spread(np.full_like(reach, -1), reach)  # from one pixel before to one after
        at = run.pixel + step
        before = np.clip(run.before(at), run.inner, run.outer)
        after = _moved(before, -1)
        samples = after - before  # of the cell to the right of a pixel
        right = samples * (run.position((before + after - 1) / 2) - at)
        slope = _moved(samples, 1) - samples
        weight = _moved(right, 1) + (samples - right)
        weight += np.where(at == 0, run.inner - run.first, 0)
        weight += np.where(at == run.size - 1, run.end - run.outer, 0)
        counts = (weight != 0) | (slope != 0) if slopes else weight != 0
        counts &= (step >= 0) & (step < run.pixels)
        length = np.bincount(owner[counts], minlength=len(reach))
        return Taps(
            np.cumsum(length) - length,
            length,
            at[counts].astype(np.int64),
            weight[counts].astype(dtype),
            slope[counts].astype(dtype) if slopes else None,
        )


def _moved(a: np.ndarray, by: int) -> np.ndarray:
    """The elements one place further or, by −1, back: np.roll in a fifth of the time."""
    return np.concatenate((a[-by:], a[:-by]))


def make_runs(
    start: np.ndarray, extent: np.ndarray, total: np.ndarray, size: np.ndarray, rule: Rule
) -> Runs:
    """Runs of which the samples in [−margin, size − 1 + margin] count."""
    # samples of a RoI that ends before it begins are counted from the other end, but lie where the
    # definition computes them
    direction = np.where(extent < 0, np.int8(-1), np.int8(1))
    phase = rule.phase + np.where(extent < 0, total - 1, 0)
    unknown = (start,) * 6  # of which `before` looks at none
    run = Runs(start, extent, total, size, phase, *unknown, direction)
    first = run.before(-rule.margin)
    end = run.before(np.nextafter(size - 1 + rule.margin, np.inf))
    inner = np.clip(run.before(0), first, end)
    outer = np.clip(run.before(size - 1), inner, end)
    pixel, last = (
        np.fmin(np.fmax(np.floor(run.position(i)) + step, 0), size - 1)
        for i, step in ((first, 0), (end - 1, 1))
    )
    pixels = np.where(end > first, last - pixel + 1, 0)
    return run._replace(first=first, inner=inner, outer=outer, end=end, pixel=pixel, pixels=pixels)


class Bins(NamedTuple):
    """Where the bins of all RoIs look. They are the rows of an operator.

    Rows are in the order (RoI, bin's row, bin's column, class). Bins that offsets shift have runs
    of their own, others share those of their row and of their column.
    """

    image: np.ndarray  # (rows,)
    runs: Runs  # along y those of all RoIs, then those along x
    run_y: np.ndarray  # (rows,): which of the runs
    run_x: np.ndarray
    plane: np.ndarray  # (rows,): which group of channels

    def means(self, rule: Rule) -> np.ndarray:
        """The factors that make sums of samples means, (rows,)."""
        samples = self.runs.end - self.runs.first if rule.kept else self.runs.total
        return 1 / np.maximum(samples[self.run_y] * samples[self.run_x], 1)

    def lost(self) -> np.ndarray:
        """Whether a position is NaN, (rows,)."""
        lost = np.isnan(self.runs.start)
        return lost[self.run_y] | lost[self.run_x]

    def pattern(
        self, g: RoIGeometry, seen: slice, dtype: np.dtype, slopes: bool = False
    ) -> "Pattern":
        """The matrices on the rows ``seen`` of the arranged image, from the first image on."""
        taps = self.runs.taps(dtype, slopes)
        width = seen.stop - seen.start
        index_type = np.int32 if width <= INT32_MAX else np.int64
        lines, entries = taps.length[self.run_y], taps.length[self.run_x]
        start = np.zeros(len(lines) + 1, index_type)
        np.cumsum(lines * entries, out=start[1:])
        row = np.repeat(np.arange(len(lines)), lines)
        line = spread(taps.first[self.run_y], lines)
        length = entries[row]
        entry = spread(taps.first[self.run_x][row], length)
        first = (self.image[row] * g.height + taps.pixel[line]) * g.width * g.planes + self.plane[
            row
        ]
        column = np.repeat(first.astype(index_type), length)
        column += (taps.pixel * g.planes).astype(index_type)[entry]
        return Pattern(taps, row, line, length, entry, column, start, width)


def make_bins(g: RoIGeometry, rule: Rule, box: Boxes, offset: np.ndarray | None = None) -> Bins:
    """The bins of ``box``, shifted by ``offset``."""
    row = np.arange(g.rois * g.bins)
    if offset is None:
        run_y, run_x = row // g.pooled_w, row // g.bins * g.pooled_w + row % g.pooled_w
        shift_y = shift_x = None
    else:
        run_y = run_x = row
        shift_y, shift_x = shifts(g, box, offset)
    y = _along(rule, box.y, box.height, g.pooled_h, g.sampling_h, g.height, shift_y, (2, 3))
    x = _along(rule, box.x, box.width, g.pooled_w, g.sampling_w, g.width, shift_x, (1, 3))
    start, extent, total, size = np.concatenate((y, x), axis=1)
    runs = make_runs(start, extent, total, size, rule)

    group_y = np.arange(g.pooled_h) * g.group_h // g.pooled_h
    group_x = np.arange(g.pooled_w) * g.group_w // g.pooled_w
    plane = (group_y[:, None, None] * g.group_w + group_x[:, None]) * g.classes
    plane = np.tile((plane + np.arange(g.classes)).ravel(), g.rois)
    return Bins(np.repeat(box.image, g.bins), runs, run_y, run_x + y.shape[1], plane)


def _along(rule, origin, length, pooled, sampling, size, shift, axes):
    """Arguments of :func:`make_runs` for one axis: its bins, shifted along other ``axes`` too."""
    origin, step = origin[:, None], length[:, None] / pooled
    p = np.arange(pooled)
    if rule.whole:
        base = origin if rule.rounding == MAP else 0
        first = np.floor(p * step + (origin - base)) + base
        last = np.ceil((p + 1) * step + (origin - base)) + base
        first, last = (np.fmin(np.fmax(pixel, 0), size) for pixel in (first, last))
        total = np.maximum(last - first, 0)
        start, step = first, total
    else:
        start = origin + p * step
        total = np.fmax(np.ceil(step), 0) if sampling < 1 else np.full_like(step, sampling)
    if shift is not None:
        start = np.expand_dims(start, axes) + shift
        step, total = step[:, :, None, None], total[:, :, None, None]
    return np.stack([a.ravel() for a in np.broadcast_arrays(start, step, total, size)])


def shifts(g: RoIGeometry, box: Boxes, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far offsets move the bins along y and along x: (K, PH, PW, classes) each."""
    part_y, part_x = parts(g)
    by = offset.astype(np.float64)[:, :, part_y[:, None], part_x]
    by = by.reshape(g.rois, g.classes, 2, g.pooled_h, g.pooled_w)
    by_x, by_y = by.transpose(2, 0, 3, 4, 1)

    def shift(by, size):
        # an infinite offset is far outside, also where gamma or the size of the RoI is 0
        return np.where(np.isinf(by), by, by * (g.gamma * size)[:, None, None, None])

    return shift(by_y, box.height), shift(by_x, box.width)


def parts(g: RoIGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Which row of the offsets moves each row of bins, and which column each column."""
    part_y = np.arange(g.pooled_h) * g.part_h // g.pooled_h
    return part_y, np.arange(g.pooled_w) * g.part_w // g.pooled_w


# ---- bins as rows of a sparse matrix


class Taps(NamedTuple):
    """What runs see: for each a list of pixels along the axis, their weights and their slopes."""

    first: np.ndarray  # (runs,): where its list begins
    length: np.ndarray  # (runs,)
    pixel: np.ndarray
    weight: np.ndarray
    slope: np.ndarray | None


def spread(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The ranges [first, first + count), one after the other."""
    end = np.cumsum(count)
    return np.repeat(first - (end - count), count) + np.arange(count.sum())


class Pattern(NamedTuple):
    """Sparse matrices of one pattern: row by row, outer products of taps along y and along x.

    A row consists of lines, one for each of its taps along y.
    """

    taps: Taps
    row: np.ndarray  # (lines,)
    line: np.ndarray  # (lines,): tap along y
    length: np.ndarray  # (lines,): entries
    entry: np.ndarray  # (entries,): tap along x
    column: np.ndarray  # (entries,)
    start: np.ndarray  # (rows + 1,)
    width: int

    def matrix(
        self, scale: np.ndarray | None = None, y: str = "weight", x: str = "weight"
    ) -> csr_array:
        """Of the weights or the slopes along each axis, every row multiplied by its ``scale``.

        Entries of 0 are dropped: what they stand at may be infinite.
        """
        line = getattr(self.taps, y)[self.line]
        if scale is not None:
            scale = scale.astype(line.dtype)
            line *= scale[self.row]
        data = np.repeat(line, self.length) * getattr(self.taps, x)[self.entry]
        if scale is not None and not np.isfinite(scale).all():
            seen = np.repeat(getattr(self.taps, y)[self.line], self.length)
            data[(seen == 0) | (getattr(self.taps, x)[self.entry] == 0)] = 0  # and not 0 · inf
        shape = (len(self.start) - 1, self.width)
        matrix = csr_array((data, self.column, self.start), shape=shape)
        if not data.all():
            matrix = matrix.copy()  # the pattern is shared
            matrix.eliminate_zeros()
        return matrix


def ranges(size: np.ndarray, limit: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of RoIs whose ``size`` in bytes adds up to ``BLOCK_BYTES``, or to a larger limit."""
    ends, stop = np.cumsum(size), 0
    limit = max(limit, BLOCK_BYTES)
    while stop < len(size):
        first, used = stop, ends[stop - 1] if stop else 0
        stop = max(stop + 1, int(np.searchsorted(ends, used + limit, "right")))
        yield first, stop


def blocks(
    g: RoIGeometry, at: Bins, size: np.ndarray, limit: int = 0
) -> Iterator[tuple[slice, slice, Bins]]:
    """Blocks of RoIs: their rows, the rows of the arranged image that they see, and their bins.

    The ``size`` in bytes of the rows adds up to ``BLOCK_BYTES``, or to ``limit`` if that is more.
    The bins count images from the first one seen.
    """
    # of a RoI: those along y, of which the first is run 0, and those along x
    first_x = int(at.run_x[0]) if g.rois else 0
    runs_y, runs_x = (n // max(g.rois, 1) for n in (first_x, len(at.runs.start) - first_x))
    pixels = g.height * g.width * g.planes
    for first, stop in ranges(size.reshape(g.rois, g.bins).sum(axis=1), limit):
        rows = slice(first * g.bins, stop * g.bins)
        image = at.image[rows]
        low, high = int(image.min()), int(image.max()) + 1
        along_y = np.arange(first * runs_y, stop * runs_y)
        along_x = np.arange(first * runs_x, stop * runs_x) + first_x
        part = Bins(
            image=image - low,
            runs=at.runs.take(np.concatenate((along_y, along_x))),
            run_y=at.run_y[rows] - along_y[0],
            run_x=at.run_x[rows] - along_x[0] + len(along_y),
            plane=at.plane[rows],
        )
        yield rows, slice(low * pixels, high * pixels), part


def matrix_bytes(at: Bins) -> np.ndarray:
    """About what each row takes while its matrix is made."""
    along_y, along_x = at.runs.pixels[at.run_y], at.runs.pixels[at.run_x]
    own = len(at.runs.start) / max(1, 2 * len(at.run_y))  # share of a run that is a row's own
    return ENTRY_BYTES * along_y * along_x + own * TAP_BYTES * (along_y + along_x)


# ---- CUDA: cuda/roi.cu

RUN = 11  # doubles in a Run of cuda/roi.cuh
REACH = 4  # ints in a Reach of cuda/roi_gather.cuh
TILE = 16  # pixels along each axis that a bin weighs together
TILE_WIDTH = 8  # pixels of a row whose gradients a thread sums up


class Plan(NamedTuple):
    """Where the bins of all RoIs look, on a GPU.

    It takes 176 bytes per row where offsets shift bins, 88 to 216 times PH + PW bytes per RoI where
    they do not, and 20 bytes per RoI.
    """

    runs: Array  # (K · runs, RUN): those along y, then those along x
    table: Array | None  # (K · runs, TILE): what their first pixels weigh, if bins share them
    images: Array  # (K,)
    reaches: Array  # (K, REACH): the pixels that a RoI's bins see lie within these


def make_plan(
    g: RoIGeometry,
    rule: Rule,
    rois: Array,
    offset: Array | None = None,
    weights: np.dtype | None = None,
) -> Plan:
    """The bins of ``rois``, shifted by ``offset``; with ``weights`` of this dtype, if any."""
    xp = array_module(rois)
    runs, launch = _plan_launch(g, rule, weights or np.dtype(np.float32))
    plan = Plan(
        xp.empty((g.rois * runs, RUN), np.float64),
        None if weights is None or g.shifted else xp.empty((g.rois * runs, TILE), weights),
        xp.empty(g.rois, np.int32),
        xp.empty((g.rois, REACH), np.int32),
    )
    launch(in_double(rois), in_double(offset), *plan)
    return plan


@functools.lru_cache(maxsize=CALLS)
def _plan_launch(g: RoIGeometry, rule: Rule, weights: np.dtype) -> tuple[int, _cuda.Launch]:
    """How many runs a RoI has, and the launch that makes them."""
    runs = 2 * g.bins if g.shifted else g.pooled_h + g.pooled_w
    return runs, _cuda.Launch(
        "roi.cu", "plan", (g.rois,), _line(runs), g, rule, **macros(g, weights)
    )


@functools.lru_cache(maxsize=CALLS)
def padded(g: RoIGeometry, dtype: np.dtype) -> RoIGeometry:
    """With whole vectors of channels in every row, where rows are copies anyway."""
    vec = _cuda.LOAD_BYTES // dtype.itemsize
    if g.planes == 1 or g.depth < vec:
        return g
    return g._replace(channels=g.planes * (-(-g.depth // vec) * vec))


def cuda_image(x: Array, g: RoIGeometry) -> Array:
    """The image as rows for a kernel, of the padded depth of ``g``."""
    return cuda_rows(x, g.group_h * g.group_w, g.classes, g.depth, x.dtype)


def cuda_output_rows(grad_y: Array, g: RoIGeometry, dtype: np.dtype) -> Array:
    """The gradient of the result as rows for a kernel, of the padded depth of ``g``."""
    return cuda_rows(grad_y, 1, g.classes, g.depth, dtype)


def in_double(array: Array | None) -> Array | None:
    """RoIs, offsets or masks as kernels read them: contiguous and in float64."""
    return None if array is None else array.astype(np.float64, order="C", copy=False)


def macros(g: RoIGeometry, dtype: np.dtype, vec: int = 1, rows: int = 1) -> dict[str, Any]:
    """The macros of all kernels, for blocks of so many thread rows."""
    elements = g.height * g.width * g.channels  # a tile may go beyond the image by TILE pixels
    beyond = TILE * (g.width + 1) * g.channels
    index = "int" if max(2 * g.rows, g.batch * elements + beyond) <= INT32_MAX else "int64"
    return _macros(dtype, vec, rows, index)


def _macros(dtype: np.dtype, vec: int = 1, rows: int = 1, index: str = "int") -> dict[str, Any]:
    return {
        "DTYPE": dtype,
        "VEC": vec,
        "INDEX": index,
        "ROWS": rows,
        "COLUMNS": TILE_WIDTH,
        "TILE": TILE,
    }


def bins_launch(
    file: str, name: str, g: RoIGeometry, vectors: tuple[Array, ...], *values: Any
) -> _cuda.Launch:
    """A launch of a thread row per bin, whose lanes move channels of ``vectors``."""
    vec = _cuda.vector_width(g.depth, *vectors)
    return _bins_launch(file, name, g, vectors[0].dtype, vec, values)


@functools.lru_cache(maxsize=CALLS)
def _bins_launch(
    file: str, name: str, g: RoIGeometry, dtype: np.dtype, vec: int, values: tuple[Any, ...]
) -> _cuda.Launch:
    lanes, rows = _block(g, vec)
    return _cuda.Launch(
        file, name, (-(-g.rows // rows),), (lanes, rows), g, *values,
        **macros(g, dtype, vec, rows),
    )  # fmt: skip


def gather(
    file: str,
    name: str,
    g: RoIGeometry,
    plan: Plan,
    rows: tuple[Array, ...],
    *arrays: Array | None,
    values: tuple[Any, ...] = (),
) -> Array:
    """The gradient of an arranged image, gathered from ``rows`` by a kernel: by tiles of pixels."""
    xp, dtype = array_module(rows[0]), rows[0].dtype
    vec = min(4, _cuda.vector_width(g.depth, *rows))  # times TILE_WIDTH sums
    shape, sort_by_image, collect = _gather_plan(file, name, g, dtype, vec, values)
    grad_image, order = xp.empty(shape, dtype), xp.empty(g.rois + g.batch + 1, np.int32)
    sort_by_image(plan.images, order)
    collect(*rows, plan.runs, order, plan.reaches, grad_image, *arrays)
    return grad_image


@functools.lru_cache(maxsize=CALLS)
def _gather_plan(
    file: str, name: str, g: RoIGeometry, dtype: np.dtype, vec: int, values: tuple[Any, ...]
) -> tuple[tuple[int, int], _cuda.Launch, _cuda.Launch]:
    """The shape of the gradient, and the launches."""
    lanes, tile_height = _block(g, vec)
    tiles = -(-g.height // tile_height) * -(-g.width // TILE_WIDTH)
    chunks = -(-g.depth // (lanes * vec))
    sort_by_image = _cuda.Launch(
        "roi.cu", "sort_by_image", (g.batch + 1,), _line(g.rois), g,
        **macros(g, np.dtype(np.float32)),
    )  # fmt: skip
    shape = g.batch * g.height * g.width * g.planes, g.depth
    return shape, sort_by_image, _cuda.Launch(
        file, name, (g.batch * tiles * g.planes * chunks,), (lanes, tile_height), g, *values,
        **macros(g, dtype, vec, tile_height),
    )  # fmt: skip


def cuda_maximum(file: str, g: RoIGeometry, rule: Rule, x: Array, rois: Array) -> Array:
    """The largest values of the bins, by the kernel ``maximum`` of an operator's file."""
    with x.device:
        image = cuda_image(x, g)
        y = array_module(x).empty((g.rows, g.depth), x.dtype)
        plan = make_plan(g, rule, rois)
        launch = bins_launch(file, "maximum", g, (image, y))
        launch(image, plan.runs, plan.images, y, None, None)
        return output_from_rows(y, g)


def cuda_maximum_backward(
    file: str, g: RoIGeometry, rule: Rule, grad_y: Array, x: Array, rois: Array
) -> Array:
    """Gradient of the image of :func:`cuda_maximum`."""
    with x.device:
        image = cuda_image(x, g)
        places = (g.rows, g.depth), compute_dtype(x.dtype)
        winner_y, winner_x = (array_module(x).empty(*places) for _ in range(2))
        plan = make_plan(g, rule, rois)
        launch = bins_launch(file, "maximum", g, (image, winner_y, winner_x))
        launch(image, plan.runs, plan.images, None, winner_y, winner_x)
        rows = cuda_output_rows(grad_y, g, x.dtype), winner_y, winner_x
        return image_from_rows(gather("roi_pool.cu", "winner_gradient", g, plan, rows), g)


def _line(steps: int) -> tuple[int]:
    """Block of whole warps, a thread per step as far as it goes."""
    return (min(_cuda.THREADS, -(-max(steps, 1) // 32) * 32),)


def _block(g: RoIGeometry, vec: int) -> tuple[int, int]:
    """Lanes and thread rows of a block: 8 to 32 of the latter."""
    lanes, rows = _cuda.row_block(g.depth // vec)
    return lanes, min(rows, 32)
