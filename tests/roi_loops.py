"""The RoI operators as plain float64 loops over RoIs, bins and pixels.

Every function has the arguments of the library's, and with ``grad_y`` it answers the gradients by
name. Factors of 0 are left out, so that a NaN behind them does not count. With ``size`` the
functions answer the sums of the absolute values of the terms, which is what rounding errors are
measured in; that is infinite for RoIs of too many samples to loop over, and NaN where a factor of
0 meets one that is not finite.
"""

import math
from typing import NamedTuple

import numpy as np

MANY = 1000  # samples of a bin along an axis that are not looped over


class Axis(NamedTuple):
    """What a bin sees along an axis: weights and slopes by pixel, both with their sizes."""

    pixels: dict  # pixel: [weight, slope, sum of |slope|]
    samples: int  # that there are
    kept: int  # of which so many are inside


class Bin(NamedTuple):
    k: int
    ph: int
    pw: int
    outs: range  # the output channels that it is for
    image: int
    y: Axis | None  # None: a position is NaN, or the RoI none
    x: Axis | None
    share: float
    part: tuple  # of the offsets: (class, row, column)
    scale: tuple  # what an offset of 1 moves along y and along x


# ---- where RoIs, bins and samples lie


def nearest(value):
    """To an integer, half away from zero."""
    return math.copysign(math.floor(abs(value) + 0.5), value)


def box(roi, batch, scale, rounding=None, shift=0.0, least=-math.inf):
    """Image and y, x, height, width on the feature map; None where the RoI is none."""
    if not np.isfinite(roi).all() or not 0 <= math.trunc(roi[0]) < batch:
        return None
    first, last = roi[1:3], roi[3:5]
    if rounding == "image":
        first, last = [nearest(v) for v in first], [nearest(v) + 1 for v in last]
    first, last = [v * scale for v in first], [v * scale for v in last]
    if rounding == "map":
        first, last = [nearest(v) for v in first], [nearest(v) + 1 for v in last]
    x, y = (v - shift for v in first)
    width, height = (max(b - shift - a, least) for a, b in zip((x, y), last, strict=True))
    return math.trunc(roi[0]), y, x, height, width


def run(start, extent, count, phase, margin, length):
    """The pixels that evenly spaced samples see; one outside by more than the margin is 0."""
    pixels, kept = {}, 0
    if math.isnan(start) or not abs(start) < math.inf:
        return None if math.isnan(start) else Axis({}, count, 0)
    if count > MANY:
        return Axis(None, count, 0)
    for i in range(count):
        at = start + (i + phase) * extent / count
        if -margin <= at <= length - 1 + margin:
            kept += 1
            see(pixels, at, length)
    return Axis(pixels, count, kept)


def see(pixels, at, length):
    """Add one sample, clamped to the outermost pixels, to what they weigh."""
    slope = 1 if 0 <= at < length - 1 else 0
    at = min(max(at, 0), length - 1)
    low = math.floor(at)
    for pixel, weight, sign in (low, 1 - (at - low), -1), (low + 1, at - low, 1):
        if pixel < length:
            entry = pixels.setdefault(pixel, [0.0, 0, 0])
            entry[0] += weight
            entry[1] += sign * slope
            entry[2] += slope


def cells(origin, length, p, pooled, rounding, size):
    """The pixels that a bin touches."""
    step = length / pooled
    base = origin if rounding == "map" else 0
    first = math.floor(p * step + (origin - base)) + base
    last = math.ceil((p + 1) * step + (origin - base)) + base
    first, last = (int(min(max(v, 0), size)) for v in (first, last))
    pixels = {pixel: [1.0, 0, 0] for pixel in range(first, last)}
    return Axis(pixels, len(pixels), len(pixels))


def bins(
    x, rois, output_size, spatial_scale, rule, sampling=(-1, -1), offset=None, gamma=0.0, outs=1
):
    """Every bin of every RoI, per class of offsets."""
    (batch, _, *size), rule = x.shape, dict(rule)
    phase, margin, kept, whole = (rule.pop(key) for key in ("phase", "margin", "kept", "whole"))
    classes, *part_size = (1, 1, 1) if offset is None else (offset.shape[1] // 2, *offset.shape[2:])
    for k, ph, pw, klass in np.ndindex(len(rois), *output_size, classes):
        placed = box(rois[k], batch, spatial_scale, **rule)
        image, y, x_, height, width = placed or (0, *[math.nan] * 4)
        part = tuple(
            p * parts // n for p, parts, n in zip((ph, pw), part_size, output_size, strict=True)
        )
        moves = (gamma * height, gamma * width)
        axes = []
        for a, (origin, length, p) in enumerate(((y, height, ph), (x_, width, pw))):
            if placed is None:
                axes.append(None)
            elif whole:
                axes.append(cells(origin, length, p, output_size[a], rule["rounding"], size[a]))
            else:
                step = length / output_size[a]
                count = sampling[a] if sampling[a] > 0 else max(math.ceil(step), 0)
                start = origin + p * step
                if offset is not None:
                    by = offset[(k, 2 * klass + 1 - a, *part)]
                    start += by if math.isinf(by) else moves[a] * by
                axes.append(run(start, step, count, phase, margin, size[a]))
        lost = None in axes
        counts = (0, 0) if lost else [axis.kept if kept else axis.samples for axis in axes]
        own = range(klass * outs // classes, (klass + 1) * outs // classes)
        share = 1 / max(counts[0] * counts[1], 1)
        both = (None, None) if lost else axes
        yield Bin(k, ph, pw, own, image, *both, share, (klass, *part), moves)


# ---- means


def channel(c, ph, pw, output_size, groups):
    """The input channel of an output channel's bin."""
    gh, gw = (p * g // n for p, g, n in zip((ph, pw), groups, output_size, strict=True))
    return (c * groups[0] + gh) * groups[1] + gw


def average(x, all_bins, output_size, groups, rois, mask=None, size=False):
    outs = x.shape[1] // (groups[0] * groups[1])
    y = np.zeros((len(rois), outs, *output_size))
    for b in all_bins:
        own = [channel(c, b.ph, b.pw, output_size, groups) for c in b.outs]
        at = b.k, list(b.outs), b.ph, b.pw
        scale = 1 if mask is None else mask[b.k, b.ph, b.pw]
        if b.y is None or math.isnan(scale):
            y[at] = math.nan
        elif b.y.pixels is None or b.x.pixels is None:
            y[at] = math.inf if size else 0
        else:
            y[at] = 0 * scale if size else 0
            for r, (wy, *_) in b.y.pixels.items():
                for c, (wx, *_) in b.x.pixels.items():
                    if wy * wx or size:
                        y[at] += wy * wx * b.share * scale * x[b.image, own, r, c]
    return y


def average_backward(grad_y, x, all_bins, output_size, groups, offset=None, mask=None, size=False):
    grads = {"x": np.zeros(x.shape)}
    grads |= {
        k: np.zeros(a.shape) for k, a in (("offset", offset), ("mask", mask)) if a is not None
    }
    for b in all_bins:
        own = [channel(c, b.ph, b.pw, output_size, groups) for c in b.outs]
        grad = grad_y[b.k, list(b.outs), b.ph, b.pw]
        scale = 1 if mask is None else mask[b.k, b.ph, b.pw]
        lost = b.y is None
        many = not lost and (b.y.pixels is None or b.x.pixels is None)
        value = math.nan if lost else math.inf if many and size else 0.0
        slopes = np.full(2, value + 0 * grad.sum() if size else value)
        value = slopes[0]
        if many and size:
            grads["x"][b.image, own] = math.inf
        for r, (wy, sy, ay) in () if lost or many else b.y.pixels.items():
            for c, (wx, sx, ax) in b.x.pixels.items():
                pixel = x[b.image, own, r, c]
                if wy * wx or size:
                    grads["x"][b.image, own, r, c] += wy * wx * b.share * scale * grad
                    value += wy * wx * (pixel @ grad)
                along = np.array((ay * wx, wy * ax) if size else (sy * wx, wy * sx))
                used = (along != 0) | size
                slopes[used] += along[used] * (pixel @ grad)
        if mask is not None:
            grads["mask"][b.k, b.ph, b.pw] += value * b.share
        if offset is not None:
            klass, row, column = b.part
            if size and math.isnan(b.scale[0]):  # no RoI: not only of the parts that move a bin
                grads["offset"][b.k] = math.nan
            for a in range(2):
                move = abs(b.scale[a]) if size else b.scale[a]
                if slopes[a] or size:
                    grads["offset"][b.k, 2 * klass + 1 - a, row, column] += (
                        slopes[a] * b.share * scale * move
                    )
    return grads


# ---- the operators

ALIGNED = {"shift": 0.5, "phase": 0.5, "margin": 1.0, "kept": False, "whole": False}
UNALIGNED = ALIGNED | {"shift": 0.0, "least": 1.0}
CELLS = {"rounding": "map", "least": 1.0, "phase": 0, "margin": 0, "kept": True, "whole": True}
PIXELS = CELLS | {"rounding": "image", "least": 0.1}
INCLUSIVE = {
    "rounding": "image", "shift": 0.5, "least": 0.1,
    "phase": 0.0, "margin": 0.5, "kept": True, "whole": False,
}  # fmt: skip


def _mean(x, rois, output_size, spatial_scale, rule, groups, sampling=(-1, -1), offset=None,
          gamma=0.0, mask=None, size=False, grad_y=None):  # fmt: skip
    outs = x.shape[1] // (groups[0] * groups[1])
    all_bins = bins(x, rois, output_size, spatial_scale, rule, sampling, offset, gamma, outs)
    if grad_y is None:
        return average(x, all_bins, output_size, groups, rois, mask, size)
    return average_backward(grad_y, x, all_bins, output_size, groups, offset, mask, size)


def roi_align(x, rois, output_size, spatial_scale=1.0, sampling_ratio=(-1, -1), aligned=False,
              mode="avg", **more):  # fmt: skip
    rule = ALIGNED if aligned else UNALIGNED
    if mode == "max":
        return _largest_sample(x, rois, output_size, spatial_scale, sampling_ratio, rule, **more)
    return _mean(x, rois, output_size, spatial_scale, rule, (1, 1), sampling_ratio, **more)


def ps_roi_align(x, rois, output_size, spatial_scale=1.0, sampling_ratio=(-1, -1), **more):
    return _mean(x, rois, output_size, spatial_scale, ALIGNED, output_size, sampling_ratio, **more)


def ps_roi_pool(x, rois, output_size, spatial_scale=1.0, group_size=None, **more):
    return _mean(x, rois, output_size, spatial_scale, PIXELS, group_size or output_size, **more)


def deform_roi_pool(x, rois, offset, output_size, spatial_scale=1.0, sampling_ratio=(-1, -1),
                    gamma=0.1, mask=None, **more):  # fmt: skip
    return _mean(
        x, rois, output_size, spatial_scale, ALIGNED, (1, 1), sampling_ratio, offset, gamma, mask,
        **more,
    )  # fmt: skip


def deform_ps_roi_pool(x, rois, offset, output_size, spatial_scale=1.0, group_size=None,
                       sampling_ratio=(4, 4), gamma=0.1, mask=None, **more):  # fmt: skip
    return _mean(
        x, rois, output_size, spatial_scale, INCLUSIVE, group_size or output_size, sampling_ratio,
        offset, gamma, mask, **more,
    )  # fmt: skip


def roi_pool(x, rois, output_size, spatial_scale=1.0, size=False, grad_y=None):
    """The largest pixel of each cell, the first of equal ones; the gradient goes to it."""
    y, grad_x = np.zeros((len(rois), x.shape[1], *output_size)), np.zeros(x.shape)
    for b in bins(x, rois, output_size, spatial_scale, CELLS, outs=x.shape[1]):
        if b.y is None:
            y[b.k, :, b.ph, b.pw] = math.nan
            continue
        seen = [(r, c) for r in b.y.pixels for c in b.x.pixels]
        for channel_ in range(x.shape[1] if seen else 0):
            values = [x[b.image, channel_, r, c] for r, c in seen]
            winner = int(np.argmax(values))  # the first; NaN above all
            y[b.k, channel_, b.ph, b.pw] = values[winner]
            if grad_y is not None:
                grad_x[(b.image, channel_, *seen[winner])] += grad_y[b.k, channel_, b.ph, b.pw]
    return y if grad_y is None else {"x": grad_x}


def _largest_sample(x, rois, output_size, spatial_scale, sampling, rule, size=False, grad_y=None):
    """The largest sample of each bin, ones outside being 0; the gradient goes to its pixels."""
    y, grad_x = np.zeros((len(rois), x.shape[1], *output_size)), np.zeros(x.shape)
    lengths = x.shape[2:]
    for k, ph, pw in np.ndindex(len(rois), *output_size):
        placed = box(rois[k], len(x), spatial_scale, rule.get("rounding"), rule["shift"],
                     rule.get("least", -math.inf))  # fmt: skip
        if placed is None:
            y[k, :, ph, pw] = math.nan
            continue
        image, *corner, height, width = placed
        lines = []
        for a, (length, p) in enumerate(((height, ph), (width, pw))):
            step = length / output_size[a]
            count = sampling[a] if sampling[a] > 0 else max(math.ceil(step), 0)
            if count > MANY:
                break
            lines.append([
                run(corner[a] + p * step + (i + rule["phase"]) * step / count, 0, 1, 0,
                    rule["margin"], lengths[a]).pixels
                for i in range(count)
            ])  # fmt: skip
        if len(lines) < 2:
            if size:
                y[k, :, ph, pw] = grad_x[image] = math.inf
            continue
        samples = [
            [(r, c, wy * wx) for r, (wy, *_) in ys.items() for c, (wx, *_) in xs.items() if wy * wx]
            for ys in lines[0] for xs in lines[1]
        ]  # fmt: skip
        for channel_ in range(x.shape[1] if samples else 0):
            values = [sum(w * x[image, channel_, r, c] for r, c, w in s) for s in samples]
            winner = int(np.argmax(values))
            y[k, channel_, ph, pw] = values[winner]
            for r, c, w in samples[winner] if grad_y is not None else ():
                grad_x[image, channel_, r, c] += w * grad_y[k, channel_, ph, pw]
    return y if grad_y is None else {"x": grad_x}
