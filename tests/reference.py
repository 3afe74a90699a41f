"""The formulas of the papers as plain float64 loops: slow, obvious, and all that tests trust."""

import itertools
import math

import numpy as np


def bilinear(image, y, x):
    """Σ_r G(r, (y, x)) image[:, r]: (C, H, W) sampled at one point, zeros outside."""
    _, height, width = image.shape
    value = np.zeros(len(image))
    if not (-1 <= y < height and -1 <= x < width):
        return value + 0 * (y if math.isnan(y) else 0) + 0 * (x if math.isnan(x) else 0)
    for r, c in itertools.product(
        (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
    ):
        if 0 <= r < height and 0 <= c < width:
            value += (1 - abs(r - y)) * (1 - abs(c - x)) * image[:, r, c]
    return value


def deform_conv2d(
    x, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None
):
    """Eq. 2-4 of arXiv 1703.06211, with the mask of arXiv 1811.11168."""
    n, channels, _, _ = x.shape
    out_channels, depth, kh, kw = weight.shape
    _, per_position, out_h, out_w = offset.shape
    groups, offset_groups = channels // depth, per_position // (2 * kh * kw)
    y = np.zeros((n, out_channels, out_h, out_w))
    for b, oy, ox in np.ndindex(n, out_h, out_w):
        for i, j in np.ndindex(kh, kw):
            sample = np.empty(channels)
            for og in range(offset_groups):
                tap = og * kh * kw + i * kw + j
                at_y = oy * stride[0] - padding[0] + i * dilation[0] + offset[b, 2 * tap, oy, ox]
                at_x = (
                    ox * stride[1] - padding[1] + j * dilation[1] + offset[b, 2 * tap + 1, oy, ox]
                )
                own = slice(og * channels // offset_groups, (og + 1) * channels // offset_groups)
                sample[own] = bilinear(x[b, own], at_y, at_x)
                if mask is not None:
                    sample[own] *= mask[b, tap, oy, ox]
            for group in range(groups):
                outs = slice(group * out_channels // groups, (group + 1) * out_channels // groups)
                y[b, outs, oy, ox] += weight[outs, :, i, j] @ sample[group * depth :][:depth]
    return y if bias is None else y + bias[:, None, None]


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
