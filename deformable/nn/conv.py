"""Convolution layers: ordinary, and deformable with the convolution that predicts its offsets.

A deformable layer holds two convolutions over the same input (Dai et al. 2017, arXiv 1703.06211,
Sec. 2.1): one predicts an offset (dy, dx) for every tap at every output position, the other sums
over the taps so displaced. Zero-initialised offsets make it an ordinary convolution at the start.
The modulated form (Zhu et al. 2018, arXiv 1811.11168) also predicts a factor in [0, 1] per tap.
"""

import math
from typing import Any, Self

import numpy as np

from deformable._array import Array, Pair, array_module, integer, pair, real_number
from deformable.conv import conv2d, conv2d_backward
from deformable.deform_conv import deform_conv2d, deform_conv2d_backward
from deformable.nn.layer import Backward, Layer, Param, check_input, he_normal, load_buffers


class Conv2d(Layer):
    """Convolution: :func:`deformable.conv2d` with its parameters.

    Parameters
    ----------
    in_channels, out_channels : int
        Multiples of ``groups``.
    kernel_size, stride, padding, dilation : int or (int, int)
    groups : int
    bias : bool
        False where a BatchNorm2d follows.
    dtype : dtype
    rng : numpy.random.Generator, optional
        Draws the weights: normal with variance 2 / inputs (He et al. 2015). The bias is zero.

    Attributes
    ----------
    weight : Param
        (out_channels, in_channels / groups, kernel height, kernel width)
    bias : Param or None
        (out_channels,)

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> layer = nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1)
    >>> y, backward = layer(np.ones((2, 3, 16, 16), np.float32))
    >>> y.shape, backward(y).shape, layer.weight.grad.shape
    ((2, 8, 8, 8), (2, 3, 16, 16), (8, 3, 3, 3))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        dtype: Any = np.float32,
        rng: np.random.Generator | None = None,
    ) -> None:
        name = type(self).__name__
        groups = integer(name, "groups", groups, least=1)
        check_multiples(name, "groups", groups, in_channels=in_channels, out_channels=out_channels)
        kernel = pair(name, "kernel_size", kernel_size, least=1)
        self.weight = Param(he_normal((out_channels, in_channels // groups, *kernel), dtype, rng))
        self.bias = Param(np.zeros(out_channels, dtype), decay=False) if bias else None
        self.stride = pair(name, "stride", stride, least=1)
        self.padding = pair(name, "padding", padding, least=0)
        self.dilation = pair(name, "dilation", dilation, least=1)
        self.groups = groups

    def __call__(self, x: Array) -> tuple[Array, Backward]:
        """Convolve x (N, in_channels, H, W)."""
        weight, bias = self.weight.data, self.bias and self.bias.data
        self._check(x)
        geometry = self.stride, self.padding, self.dilation, self.groups
        y = conv2d(x, weight, bias, *geometry)

        def backward(grad_y: Array) -> Array:
            grad = conv2d_backward(grad_y, x, weight, bias, *geometry)
            self.weight.add_grad(grad.weight)
            if self.bias is not None:
                self.bias.add_grad(grad.bias)
            return grad.x

        return y, backward

    def _check(self, x: Array) -> None:
        weight = self.weight.data
        channels = weight.shape[1] * self.groups
        check_input(type(self).__name__, x, weight, ("N", channels, "H", "W"))


class DeformConv2d(Conv2d):
    """Deformable convolution: a convolution that predicts where its taps look.

    Parameters
    ----------
    in_channels, out_channels : int
        Multiples of ``groups``; ``in_channels`` also of ``offset_groups``.
    kernel_size, stride, padding, dilation : int or (int, int)
    groups : int
    offset_groups : int
        Channels of one group share their offsets.
    bias : bool
    modulated : bool
        Also predict a factor per tap (DCNv2), the sigmoid of a map: 1/2 at the start.
    offset_lr_mult : float
        Learning rate of the predicting convolution relative to the rest. Lower it where offsets
        grow without bound.
    rng : numpy.random.Generator, optional
        Draws the weights as in :class:`Conv2d`.
    max_offset : float, optional
        Bounds every offset smoothly: ``max_offset * tanh(predicted / max_offset)`` pixels.
    dtype : dtype

    Attributes
    ----------
    weight, bias : Param
        As in :class:`Conv2d`.
    offset_conv : Conv2d
        Predicts, for every offset group and tap, (dy, dx), and behind them the mask channels;
        zero-initialised.

    Notes
    -----
    The bound must not be too tight: where an offset has reached it, its gradient vanishes.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> layer = nn.DeformConv2d(4, 8, kernel_size=3, padding=1, modulated=True)
    >>> x = np.ones((2, 4, 9, 9), np.float32)
    >>> y, backward = layer(x)
    >>> y.shape, backward(y).shape, layer.offsets(x).shape
    ((2, 8, 9, 9), (2, 4, 9, 9), (2, 18, 9, 9))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        modulated: bool = False,
        offset_lr_mult: float = 1.0,
        rng: np.random.Generator | None = None,
        max_offset: float | None = None,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            dtype,
            rng,
        )
        offset_groups = integer("DeformConv2d", "offset_groups", offset_groups, least=1)
        check_multiples("DeformConv2d", "offset_groups", offset_groups, in_channels=in_channels)
        self.modulated = modulated
        self.max_offset = offset_bound("DeformConv2d", max_offset)
        taps = offset_groups * math.prod(self.weight.data.shape[2:])
        self.offset_channels = 2 * taps
        self.offset_conv = Conv2d(
            in_channels,
            3 * taps if modulated else 2 * taps,
            kernel_size,
            stride,
            padding,
            dilation,
            dtype=dtype,
        )
        self.load_state(self.state() | self._zero_offsets())
        for param in self.offset_conv.params():
            param.lr_mult = offset_lr_mult

    def __call__(self, x: Array) -> tuple[Array, Backward]:
        """Predict the offsets of x (N, in_channels, H, W), and convolve it with them."""
        weight, bias = self.weight.data, self.bias and self.bias.data
        self._check(x)
        geometry = self.stride, self.padding, self.dilation
        offset, mask, branch_backward = self._branch(x)
        y = deform_conv2d(x, offset, weight, bias, *geometry, mask)

        def backward(grad_y: Array) -> Array:
            grad = deform_conv2d_backward(grad_y, x, offset, weight, bias, *geometry, mask)
            self.weight.add_grad(grad.weight)
            if self.bias is not None:
                self.bias.add_grad(grad.bias)
            return grad.x + branch_backward(grad.offset, grad.mask)

        return y, backward

    def offsets(self, x: Array) -> Array:
        """The offsets (N, 2 * offset_groups * taps, Ho, Wo) in pixels that x leads to."""
        self._check(x)
        return self._branch(x)[0]

    def from_conv(self, conv: Conv2d) -> Self:
        """Take over a trained convolution: afterwards this layer computes what ``conv`` does.

        The offsets start at zero. In a modulated layer the weights are doubled, which undoes the
        factor 1/2 of an untrained mask. Returns the layer itself.

        Raises
        ------
        TypeError
            Where ``conv`` is no Conv2d, or a deformable one.
        ValueError
            Where the two layers differ in shape, dtype, stride, padding, dilation or groups, or
            only one of them has a bias.

        Examples
        --------
        >>> import numpy as np
        >>> from deformable import nn
        >>> conv = nn.Conv2d(3, 8, 3, padding=1)
        >>> layer = nn.DeformConv2d(3, 8, 3, padding=1).from_conv(conv)
        >>> x = np.ones((1, 3, 5, 5), np.float32)
        >>> bool(abs(layer.predict(x) - conv.predict(x)).max() < 1e-5)
        True
        """
        if not isinstance(conv, Conv2d) or isinstance(conv, DeformConv2d):
            raise TypeError(
                f"DeformConv2d.from_conv: conv is {type(conv).__name__}, expected Conv2d"
            )
        for name in ("stride", "padding", "dilation", "groups"):
            have, want = getattr(conv, name), getattr(self, name)
            if have != want:
                raise ValueError(f"DeformConv2d.from_conv: {name} is {have}, expected {want}")
        load_buffers("DeformConv2d.from_conv", self.buffers(), self._zero_offsets() | conv.state())
        if self.modulated:
            self.weight.data = 2 * self.weight.data
        return self

    def _branch(self, x: Array) -> tuple[Array, Array | None, Backward]:
        """Offsets and mask, and the backward from their gradients to that of x."""
        maps, conv_backward = self.offset_conv(x)
        offset, mask, maps_backward = split_offsets(maps, self.offset_channels, self.max_offset)

        def backward(grad_offset: Array, grad_mask: Array | None) -> Array:
            return conv_backward(maps_backward(grad_offset, grad_mask))

        return offset, mask, backward

    def _zero_offsets(self) -> dict[str, Array]:
        """The state of an untrained offset convolution."""
        return {
            f"offset_conv.{name}": array_module(array).zeros_like(array)
            for name, array in self.offset_conv.state().items()
        }


def split_offsets(
    maps: Array, offset_channels: int, limit: float | None
) -> tuple[Array, Array | None, Backward]:
    """The offsets in predicted maps, bounded, and the mask behind them, None if there is none.

    The backward leads from the gradients of both to that of the maps.
    """
    xp, offset, mask = array_module(maps), maps[:, :offset_channels], None
    if limit is not None:
        offset = limit * xp.tanh(offset / limit)
    if maps.shape[1] > offset_channels:
        mask = sigmoid(maps[:, offset_channels:])

    def backward(grad_offset: Array, grad_mask: Array | None) -> Array:
        grad_maps = xp.empty_like(maps)
        if limit is not None:
            grad_offset = grad_offset * (1 - xp.square(offset / limit))
        grad_maps[:, :offset_channels] = grad_offset
        if mask is not None:
            grad_maps[:, offset_channels:] = grad_mask * mask * (1 - mask)
        return grad_maps

    return offset, mask, backward


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) in a form that cannot overflow."""
    return 0.5 + 0.5 * array_module(x).tanh(0.5 * x)


def offset_bound(function: str, limit: float | None) -> float | None:
    """``max_offset`` as a finite Python float above 0, or None."""
    if limit is not None:
        limit = real_number(function, "max_offset", limit)
        if limit <= 0:
            raise ValueError(f"{function}: max_offset is {limit}, expected above 0")
    return limit


def check_multiples(function: str, parts: str, number: int, **channels: int) -> None:
    """Raise unless all counts of channels are positive multiples of the ``number`` of parts."""
    for name, count in channels.items():
        if integer(function, name, count, least=1) % number:
            raise ValueError(
                f"{function}: {name} is {count}, expected a multiple of {parts}, {number}"
            )
