"""The formulas of the papers as plain float64 loops: slow, obvious, and all that tests trust."""

import itertools
import math

import numpy as np


def corners(height, width, y, x):
    """The pixels that a position lies between: row, column, weight, its derivatives by y and x.

    The derivatives are those of the cell [floor, floor + 1): the right-hand ones.
    """
    if not (-1 <= y < height and -1 <= x < width):
        return
    for i, j in itertools.product((0, 1), (0, 1)):
        r, c = math.floor(y) + i, math.floor(x) + j
        if 0 <= r < height and 0 <= c < width:
            along_y, along_x = 1 - abs(r - y), 1 - abs(c - x)
            yield r, c, along_y * along_x, (2 * i - 1) * along_x, (2 * j - 1) * along_y


def nan_or_zero(y, x):
    """What a sample at this position is before any pixel is added."""
    return math.nan if math.isnan(y) or math.isnan(x) else 0.0


def bilinear(image, y, x):
    """Σ_r G(r, (y, x)) image[:, r]: (C, H, W) sampled at one point, zeros outside."""
    value = np.full(len(image), nan_or_zero(y, x))
    for r, c, weight, _, _ in corners(*image.shape[1:], y, x):
        value += weight * image[:, r, c]
    return value


def samples(offset, kernel, stride, padding, dilation):
    """Every sample of a deformable convolution, and where it looks.

    Output position (image, row, column), tap (row, column), offset group, mask channel, y, x.
    """
    n, channels, out_h, out_w = offset.shape
    for b, oy, ox, i, j in np.ndindex(n, out_h, out_w, *kernel):
        for group in range(channels // (2 * kernel[0] * kernel[1])):
            tap = (group * kernel[0] + i) * kernel[1] + j
            y = oy * stride[0] - padding[0] + i * dilation[0] + offset[b, 2 * tap, oy, ox]
            x = ox * stride[1] - padding[1] + j * dilation[1] + offset[b, 2 * tap + 1, oy, ox]
            yield (b, oy, ox), (i, j), group, tap, y, x


def parts(count, groups):
    """The slices of ``count`` channels that belong to each of ``groups``."""
    return [slice(g * count // groups, (g + 1) * count // groups) for g in range(groups)]


def deform_conv2d(
    x, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None
):
    """Eq. 2-4 of arXiv 1703.06211, with the mask of arXiv 1811.11168."""
    channels, (out_channels, depth, kh, kw) = x.shape[1], weight.shape
    own = parts(channels, offset.shape[1] // (2 * kh * kw))
    columns = np.zeros((channels, kh, kw, len(x), *offset.shape[2:]))
    for (b, oy, ox), (i, j), group, tap, at_y, at_x in samples(
        offset, (kh, kw), stride, padding, dilation
    ):
        scale = 1 if mask is None else mask[b, tap, oy, ox]
        columns[own[group], i, j, b, oy, ox] = bilinear(x[b, own[group]], at_y, at_x) * scale
    y = np.zeros((len(x), out_channels, *offset.shape[2:]))
    groups = channels // depth
    for outs, ins in zip(parts(out_channels, groups), parts(channels, groups), strict=True):
        y[:, outs] = np.einsum("ocij,cijnyx->noyx", weight[outs], columns[ins])
    return y if bias is None else y + bias[:, None, None]


def deform_conv2d_backward(
    grad_y,
    x,
    offset,
    weight,
    bias=None,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    mask=None,
    size=False,
):
    """Gradients of deform_conv2d by name; with ``size``, the sums of their terms' absolute values.

    The arrays but for the offsets are taken as absolute values then.
    """
    channels, (out_channels, depth, kh, kw) = x.shape[1], weight.shape
    groups = channels // depth
    own = parts(channels, offset.shape[1] // (2 * kh * kw))
    grad_columns = np.zeros((channels, kh, kw, len(x), *offset.shape[2:]))
    for outs, ins in zip(parts(out_channels, groups), parts(channels, groups), strict=True):
        grad_columns[ins] = np.einsum("ocij,noyx->cijnyx", weight[outs], grad_y[:, outs])
    columns = np.zeros_like(grad_columns)
    arrays = {"x": x, "offset": offset, "weight": weight, "mask": mask}
    grads = {name: np.zeros(a.shape) for name, a in arrays.items() if a is not None}
    for (b, oy, ox), (i, j), group, tap, at_y, at_x in samples(
        offset, (kh, kw), stride, padding, dilation
    ):
        at = own[group], i, j, b, oy, ox
        scale = 1 if mask is None else mask[b, tap, oy, ox]
        grad = grad_columns[at]
        value = bilinear(x[b, own[group]], at_y, at_x)
        columns[at] = value * scale
        if mask is not None:
            grads["mask"][b, tap, oy, ox] = value @ grad
        slopes = nan_or_zero(at_y, at_x) + 0 * grad.sum() * np.ones(2)  # 0 · NaN, also outside
        for r, c, share, *slope in corners(*x.shape[2:], at_y, at_x):
            grads["x"][b, own[group], r, c] += share * scale * grad
            slopes += (np.abs(slope) if size else np.array(slope)) * (x[b, own[group], r, c] @ grad)
        grads["offset"][b, 2 * tap : 2 * tap + 2, oy, ox] = slopes * scale
    for outs, ins in zip(parts(out_channels, groups), parts(channels, groups), strict=True):
        grads["weight"][outs] = np.einsum("noyx,cijnyx->ocij", grad_y[:, outs], columns[ins])
    return grads if bias is None else grads | {"bias": grad_y.sum(axis=(0, 2, 3))}


def conv2d(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Convolution from its definition."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    out_channels, depth, kh, kw = weight.shape
    out_h = (padded.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (padded.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    y = np.zeros((len(x), out_channels, out_h, out_w))
    for o, i, j in np.ndindex(out_channels, kh, kw):
        group = o // (out_channels // groups)
        seen = padded[:, group * depth : (group + 1) * depth, i * dilation[0] :, j * dilation[1] :]
        seen = seen[:, :, : out_h * stride[0] : stride[0], : out_w * stride[1] : stride[1]]
        y[:, o] += np.einsum("nchw,c->nhw", seen, weight[o, :, i, j])
    return y if bias is None else y + bias[:, None, None]


def conv2d_backward(
    grad_y, x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
):
    """Gradients of conv2d by name: every product, differentiated by each of its factors."""
    around = ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2)
    padded = np.pad(x, around)
    grad_padded, grad_weight = np.zeros_like(padded), np.zeros(weight.shape)
    out_channels, depth, kh, kw = weight.shape
    out_h, out_w = grad_y.shape[2:]
    for o, i, j in np.ndindex(out_channels, kh, kw):
        first = o // (out_channels // groups) * depth
        seen = (
            slice(None),
            slice(first, first + depth),
            slice(i * dilation[0], i * dilation[0] + (out_h - 1) * stride[0] + 1, stride[0]),
            slice(j * dilation[1], j * dilation[1] + (out_w - 1) * stride[1] + 1, stride[1]),
        )
        grad_weight[o, :, i, j] = np.einsum("nchw,nhw->c", padded[seen], grad_y[:, o])
        grad_padded[seen] += np.einsum("nhw,c->nchw", grad_y[:, o], weight[o, :, i, j])
    inside = (
        slice(padding[0], padding[0] + x.shape[2]),
        slice(padding[1], padding[1] + x.shape[3]),
    )
    grads = {"x": grad_padded[:, :, *inside], "weight": grad_weight}
    return grads if bias is None else grads | {"bias": grad_y.sum(axis=(0, 2, 3))}
