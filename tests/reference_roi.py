"""The RoI operators from their definitions, as plain float64 loops over samples and pixels."""

import itertools
import math
from typing import NamedTuple

import numpy as np

# Operations between the numbers of a RoI and the weight of a pixel, along one axis: 5 for its two
# corners, 2 for its length and that of a bin, 5 for the start of a bin that an offset shifts, 3 for
# a sample, and 2 for the shares of the pixels beside it.
OPERATIONS = 17


class Bin(NamedTuple):
    """One bin of one RoI, for some of the output's channels."""

    place: tuple  # RoI, row and column of the bin
    image: int
    outs: slice  # output channels, and the channels that these see
    ins: slice
    y: list  # positions of the samples along each axis
    x: list
    size: tuple  # of the image
    margin: float  # how far outside of its outermost pixels samples still count
    count: float  # what the sum of the samples is divided by
    offsets: tuple = ()  # index of dy and of dx in the offsets
    moves: tuple = ()  # how far an offset of 1 moves the bin along y and along x
    lost: bool = False  # a position is NaN
    blur: tuple = (0, 0)  # how far from each other two may compute a position along y and along x

    def samples(self):
        """Along y and along x, what every sample sees."""
        return tuple(
            [sees(position, size, self.margin, blur) for position in axis]
            for axis, size, blur in zip((self.y, self.x), self.size, self.blur, strict=True)
        )


def round_half_away(value):
    """As ``round`` of C."""
    whole = math.trunc(value)
    return whole + math.copysign(abs(value - whole) >= 0.5, value)


def sees(position, size, margin, blur):
    """The pixels that a sample sees along one axis, or would see if it were moved by ``blur``.

    Of each the index, the weight, its slope, and how far it may be off: a hat is nowhere steeper
    than 1 and nowhere higher. None: the sample is outside.
    """
    if not -margin <= position <= size - 1 + margin:
        return None
    inside = min(max(position, 0), size - 1)
    cell, slope = math.floor(inside), 1 if 0 <= position < size - 1 else 0
    both = {cell: (1 - (inside - cell), -slope), cell + 1: (inside - cell, slope)}
    first, last = math.floor(max(inside - blur, 0)), math.floor(min(inside + blur, size - 1)) + 1
    seen = range(first, min(last + 1, size))
    return [(pixel, *both.get(pixel, (0, 0)), min(blur, 1)) for pixel in seen]


def positions(start, p, step, shift, count, phase):
    """The samples of bin p along one axis."""
    first = start + p * step + shift
    return [] if math.isnan(first) else [first + (i + phase) * step / count for i in range(count)]


def channels(outs, groups, bin_, output_size):
    """The input channels that some output channels of a bin see."""
    gh, gw = (p * g // bins for p, g, bins in zip(bin_, groups, output_size, strict=True))
    stride = groups[0] * groups[1]
    return slice(outs.start * stride + gh * groups[1] + gw, outs.stop * stride, stride)


def blurs(firsts, lasts, factors):
    """How far apart rounding leaves the positions of two who compute them in float64.

    Both are off by eps / 2 of the largest number at hand for every operation. Along an axis none is
    larger than the RoI's corners together, and 1 for the halves of a pixel that these are shifted
    by and for the least length; what an offset shifts, the error included, is a multiple of it.
    Whether a sample counts, and between which pixels, jumps, and nobody may answer it otherwise:
    that takes the operations of the definition in their order.
    """
    along = zip(firsts, lasts, factors, strict=True)
    largest = [(abs(first) + abs(last) + 1) * (1 + abs(factor)) for first, last, factor in along]
    return tuple(OPERATIONS * math.ulp(1.0) * number for number in largest)


def shift(offset, places, moves):
    """How far offsets move a bin along y and x; an infinite one as far, whatever it is times."""
    values = [offset[place] for place in places]
    return [v if math.isinf(v) else v * move for v, move in zip(values, moves, strict=True)]


# ---- where the bins of the operators look


def aligned_bins(x, rois, output_size, scale, sampling, half, least, groups, offset=None, gamma=0):
    outs = slice(0, x.shape[1] // (groups[0] * groups[1]))
    for k, roi in enumerate(rois):
        x1, y1, x2, y2 = (v * scale - half for v in roi[1:])
        lengths = max(y2 - y1, least), max(x2 - x1, least)
        steps = [length / bins for length, bins in zip(lengths, output_size, strict=True)]
        grid = [n if n > 0 else math.ceil(step) for n, step in zip(sampling, steps, strict=True)]
        moves = gamma * lengths[0], gamma * lengths[1]
        for bin_ in np.ndindex(*output_size):
            places, by, factors = (), (0, 0), (0, 0)
            if offset is not None:
                places = (k, 1, *bin_), (k, 0, *bin_)
                by = shift(offset, places, moves)
                factors = [gamma * offset[place] for place in places]
            along = zip((y1, x1), bin_, steps, by, grid, (0.5, 0.5), strict=True)
            yield Bin(
                (k, *bin_), int(roi[0]), outs, channels(outs, groups, bin_, output_size),
                *(positions(*axis) for axis in along), x.shape[2:], 1,
                max(max(grid[0], 0) * max(grid[1], 0), 1), places, moves, any(map(math.isnan, by)),
                blurs((y1, x1), (y2, x2), factors),
            )  # fmt: skip


def inclusive_bins(x, rois, output_size, scale, sampling, groups, offset, gamma):
    classes = 1 if offset is None else offset.shape[1] // 2
    depth = x.shape[1] // (groups[0] * groups[1]) // classes
    for k, roi in enumerate(rois):
        x1, y1 = (round_half_away(v) * scale - 0.5 for v in roi[1:3])
        x2, y2 = ((round_half_away(v) + 1) * scale - 0.5 for v in roi[3:])
        lengths = max(y2 - y1, 0.1), max(x2 - x1, 0.1)
        steps = [length / bins for length, bins in zip(lengths, output_size, strict=True)]
        moves = gamma * lengths[0], gamma * lengths[1]
        for *bin_, i in np.ndindex(*output_size, classes):
            places, by, factors = (), (0, 0), (0, 0)
            if offset is not None:
                part = [
                    p * parts // bins
                    for p, parts, bins in zip(bin_, offset.shape[2:], output_size, strict=True)
                ]
                places = (k, 2 * i + 1, *part), (k, 2 * i, *part)
                by = shift(offset, places, moves)
                factors = [gamma * offset[place] for place in places]
            along = [
                positions(*axis)
                for axis in zip((y1, x1), bin_, steps, by, sampling, (0, 0), strict=True)
            ]
            kept = [
                sum(-0.5 <= position <= size - 0.5 for position in axis)
                for axis, size in zip(along, x.shape[2:], strict=True)
            ]
            outs = slice(i * depth, (i + 1) * depth)
            yield Bin(
                (k, *bin_), int(roi[0]), outs, channels(outs, groups, bin_, output_size),
                *along, x.shape[2:], 0.5, max(kept[0] * kept[1], 1),
                places, moves, any(map(math.isnan, by)), blurs((y1, x1), (y2, x2), factors),
            )  # fmt: skip


def cells(x, rois, output_size, scale, groups, on_map):
    """Bins of whole pixels, each a sample."""
    outs = slice(0, x.shape[1] // (groups[0] * groups[1]))
    for k, roi in enumerate(rois):
        if on_map:
            x1, y1, x2, y2 = (round_half_away(v * scale) for v in roi[1:])
            lengths = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
            starts, added = (0, 0), (y1, x1)
        else:
            x1, y1 = (round_half_away(v) * scale for v in roi[1:3])
            x2, y2 = ((round_half_away(v) + 1) * scale for v in roi[3:])
            lengths = max(y2 - y1, 0.1), max(x2 - x1, 0.1)
            starts, added = (y1, x1), (0, 0)
        for bin_ in np.ndindex(*output_size):
            along = []
            for axis, p in enumerate(bin_):
                step, size = lengths[axis] / output_size[axis], x.shape[2 + axis]
                first = math.floor(p * step + starts[axis]) + added[axis]
                end = math.ceil((p + 1) * step + starts[axis]) + added[axis]
                along.append(range(*(int(min(max(v, 0), size)) for v in (first, end))))
            yield Bin(
                (k, *bin_), int(roi[0]), outs, channels(outs, groups, bin_, output_size),
                *along, x.shape[2:], 0, max(len(along[0]) * len(along[1]), 1),
            )  # fmt: skip


# ---- what the operators make of samples


def pixels_of(sample_y, sample_x, slack=False):
    """The pixels of a sample and their weights; those of weight 0 are not looked at.

    With ``slack``, how far the weights may be off.
    """
    along = itertools.product(sample_y or (), sample_x or ())
    for (r, weight_y, _, blur_y), (c, weight_x, _, blur_x) in along:
        off = weight_y * blur_x + blur_y * weight_x + blur_y * blur_x
        weight = off if slack else weight_y * weight_x
        if weight != 0:
            yield r, c, weight


def totals(samples, part):
    """What samples along an axis add up to per pixel: weights (1), slopes (2) or slack (3)."""
    found = {}
    for pixel in itertools.chain.from_iterable(sample or () for sample in samples):
        found[pixel[0]] = found.get(pixel[0], 0) + pixel[part]
    return found.items()


def mean(x, bins, shape, mask, slack):
    y = np.zeros(shape)
    for b in bins:
        k, *bin_ = b.place
        at, image = (k, b.outs, *bin_), x[b.image, b.ins]
        factor = 1 if mask is None else mask[b.place]
        y[at] += math.nan if b.lost or math.isnan(factor) else 0
        for sample in itertools.product(*b.samples()) if factor != 0 else ():
            for r, c, weight in pixels_of(*sample, slack):
                y[at] += weight * factor / b.count * image[:, r, c]
    return y


def mean_backward(grad_y, x, bins, offset, mask, size, slack):
    arrays = {"x": x, "offset": offset, "mask": mask}
    grads = {name: np.zeros(a.shape) for name, a in arrays.items() if a is not None}
    for b in bins:
        k, *bin_ = b.place
        grad, image = grad_y[(k, b.outs, *bin_)], x[b.image, b.ins]
        factor = 1 if mask is None else mask[b.place]
        for sample in itertools.product(*b.samples()):
            for r, c, weight in pixels_of(*sample, slack):
                if factor != 0:
                    grads["x"][b.image, b.ins, r, c] += weight * factor / b.count * grad
                if mask is not None:
                    grads["mask"][b.place] += weight / b.count * (image[:, r, c] @ grad)
        if mask is not None and b.lost:
            grads["mask"][b.place] = math.nan
        for axis, place in enumerate(b.offsets):
            grads["offset"][place] += math.nan if b.lost else 0
            beside = 3 if slack else 1  # slopes are whole numbers
            parts = (2, beside) if axis == 0 else (beside, 2)
            along = (totals(*axis) for axis in zip(b.samples(), parts, strict=True))
            for (r, of_y), (c, of_x) in itertools.product(*along):
                slope = of_y * of_x * factor / b.count * b.moves[axis]
                if of_y * of_x * factor != 0:
                    slope = abs(slope) if size or slack else slope
                    grads["offset"][place] += slope * (image[:, r, c] @ grad)
    return grads


def winner(image, b):
    """For every channel the first of the largest samples, and its number; NaN is larger still."""
    best, number = np.zeros(len(image)), np.full(len(image), -1)
    for i, (sample_y, sample_x) in enumerate(itertools.product(*b.samples())):
        value = np.zeros(len(image))
        for r, c, weight in pixels_of(sample_y, sample_x):
            value += weight * image[:, r, c]
        wins = (value > best) | (np.isnan(value) & ~np.isnan(best)) | (number < 0)
        best, number = np.where(wins, value, best), np.where(wins, i, number)
    return best, number


def maximum(x, bins, shape):
    y = np.zeros(shape)
    for b in bins:
        k, *bin_ = b.place
        y[(k, b.outs, *bin_)] = winner(x[b.image, b.ins], b)[0]
    return y


def maximum_backward(grad_y, x, bins):
    grad_x = np.zeros(x.shape)
    for b in bins:
        k, *bin_ = b.place
        _, numbers = winner(x[b.image, b.ins], b)
        for channel, number in enumerate(numbers):
            if number < 0:
                continue
            for r, c, weight in pixels_of(*list(itertools.product(*b.samples()))[number]):
                grad_x[b.image, channel, r, c] += weight * grad_y[(k, channel, *bin_)]
    return {"x": grad_x}


# ---- the operators


def bins_of(
    operator, x, rois, output_size, spatial_scale=1.0, sampling_ratio=None, aligned=False,
    group_size=None, offset=None, gamma=0.1,
):  # fmt: skip
    """The bins of an operator by its name and arguments, and the shape of its result."""
    groups, common = (1, 1), (x, rois, output_size, spatial_scale)
    if "ps_" in operator:
        groups = output_size if group_size is None else group_size
    if operator == "roi_pool":
        bins = cells(*common, groups, on_map=True)
    elif operator == "ps_roi_pool":
        bins = cells(*common, groups, on_map=False)
    elif operator == "deform_ps_roi_pool":
        bins = inclusive_bins(*common, sampling_ratio or (4, 4), groups, offset, gamma)
    else:
        aligned = aligned or operator != "roi_align"
        half, least = (0.5, -math.inf) if aligned else (0, 1)
        grid = sampling_ratio or (-1, -1)
        bins = aligned_bins(*common, grid, half, least, groups, offset, gamma)
    return list(bins), (len(rois), x.shape[1] // (groups[0] * groups[1]), *output_size)


def pool(operator, x, rois, output_size, mode="avg", mask=None, slack=False, **options):
    """The result of an operator.

    With ``slack``, by how much the roundings of positions may change it, for a positive image and
    mask. A maximum's samples stand for themselves: no one computes their positions otherwise.
    """
    bins, shape = bins_of(operator, x, rois, output_size, **options)
    if operator == "roi_pool" or mode == "max":
        return np.zeros(shape) if slack else maximum(x, bins, shape)
    return mean(x, bins, shape, mask, slack)


def pool_backward(
    operator, grad_y, x, rois, output_size, mode="avg", mask=None, size=False, slack=False,
    **options,
):  # fmt: skip
    """Its gradients by name; with ``size``, the sums of their terms' absolute values.

    With ``slack``, as :func:`pool`.
    """
    bins, _ = bins_of(operator, x, rois, output_size, **options)
    if operator == "roi_pool" or mode == "max":
        return {"x": np.zeros(x.shape)} if slack else maximum_backward(grad_y, x, bins)
    return mean_backward(grad_y, x, bins, options.get("offset"), mask, size, slack)
