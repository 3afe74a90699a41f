"""Pictures of where deformable operators look. Needs matplotlib: the extra ``plot``.

    layers = visualize.samplings(net, x)                     # what the offsets of a network say
    ax = visualize.sampling_points(layers, (10, 12), image)  # 9 ** 3 points for three layers
    ax.figure.savefig("points.png")

Numbers first, drawing after: :func:`trace`, :func:`middles`, :func:`effective_dilation`,
:func:`roi_bins`, :func:`input_gradient` and :func:`effective_size` compute and know nothing of
matplotlib; :func:`sampling_points`, :func:`offset_field`, :func:`roi_parts` and
:func:`receptive_field` draw what they say, on the Axes given or on new ones, and return the Axes.

Points are (y, x) in pixels, the pixel in the upper left corner being at (0, 0), as matplotlib's
``imshow`` has it. Arrays of cupy are moved to the host. Colours are told apart without red and
green receptors too (Okabe and Ito), and points have a pale edge for dark and light images.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from scipy.ndimage import map_coordinates

from deformable import nn
from deformable._array import Array, Pair, array_module, check_shape, pair
from deformable._roi import round_half_away
from deformable.nn.layer import to_host

GREEN, ORANGE, YELLOW, BLUE = "#009E73", "#D55E00", "#F0E442", "#56B4E9"
NEGLIGIBLE = 1 - 0.9545  # of the largest gradient: two standard deviations of a normal one


class Sampling(NamedTuple):
    """Where one layer looks: its geometry, and its offsets if it has any.

    An ordinary layer counts as one tap, in the middle of its window. A backbone of stride 16 below
    the deformable layers, for example, is ``Sampling(None, kernel_size=1, stride=16)``; the taps
    of an ordinary convolution are seen with offsets of zero.

    Attributes
    ----------
    offset : (N, 2 * G * kh * kw, Ho, Wo) array or None
        As :func:`deformable.deform_conv2d` takes it: (dy, dx) for every group and tap.
    kernel_size, stride, padding, dilation : int or (height, width)
    group : int
        The offset group that is looked at.

    Examples
    --------
    >>> import numpy as np
    >>> Sampling(np.zeros((1, 18, 4, 4)), padding=1).looks((0, 0))[:4].tolist()
    [[-1.0, -1.0], [-1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]]
    """

    offset: Array | None
    kernel_size: Pair = 3
    stride: Pair = 1
    padding: Pair = 0
    dilation: Pair = 1
    group: int = 0

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return pair("Sampling", "kernel_size", self.kernel_size, least=1)

    @property
    def taps(self) -> int:
        """How many points an output position leads to."""
        return 1 if self.offset is None else math.prod(self.kernel)

    def shifts(self, index: int = 0) -> np.ndarray:
        """The offsets of image `index` that `group` has: (taps, 2, Ho, Wo)."""
        if self.offset is None:
            raise ValueError("Sampling: offset is None, expected those of a deformable layer")
        grouped = _by_group("Sampling", self.offset, self.kernel)
        n, groups, *_ = grouped.shape
        for name, value, count in ("index", index, n), ("group", self.group, groups):
            if not 0 <= value < count:
                raise ValueError(f"Sampling: {name} is {value}, expected 0 <= {name} < {count}")
        return to_host(grouped[index, self.group]).astype(np.float64)

    def grid(self, points: Any) -> np.ndarray:
        """The regular taps of output positions: (..., 2) to (..., kh * kw, 2) in the input."""
        tap = np.indices(self.kernel).reshape(2, -1).T * self.dilation
        return np.asarray(points, np.float64)[..., None, :] * self.stride - self.padding + tap

    def middle(self, points: Any) -> np.ndarray:
        """The middle of the regular taps of output positions: (..., 2) to (..., 2)."""
        return self.grid(points).mean(axis=-2)

    def looks(self, points: Any, index: int = 0) -> np.ndarray:
        """Where output positions look: (..., 2) to (..., taps, 2) in the input.

        Between the positions of the output the offsets are interpolated. Beyond them lie zeros,
        which are not computed from anything: a point there leads nowhere, to NaN. One that is
        less than a pixel away sees the outermost positions.
        """
        points = np.asarray(points, np.float64)
        if self.offset is None:
            return self.middle(points)[..., None, :]
        shifts = self.shifts(index)
        last = np.array(shifts.shape[2:]) - 1
        computed = ((points > -1) & (points < last + 1)).all(axis=-1, keepdims=True)
        seen = np.clip(np.where(computed, points, 0), 0, last)
        at = seen.reshape(math.prod(seen.shape[:-1]), 2).T
        channels = shifts.reshape(2 * self.taps, *shifts.shape[2:])
        between = np.stack([map_coordinates(channel, at, order=1) for channel in channels], axis=1)
        displaced = self.grid(seen) + between.reshape(*points.shape[:-1], self.taps, 2)
        return np.where(computed[..., None], displaced, np.nan)


def samplings(net: nn.Layer, x: Array) -> list[Sampling]:
    """Where the layers of a network look, given its input; the first layer first.

    Parameters
    ----------
    net : nn.Layer
        Often an ``nn.Sequential``, also a nested one. What keeps the size of the image, as
        normalisation does, sends no position elsewhere and is passed over; what ends it, as
        global pooling does, ends the list.
    x : (N, C, H, W) array
        Input of `net`.

    Returns
    -------
    list of Sampling
        Those of ordinary convolutions and of poolings have no offsets.

    Raises
    ------
    ValueError
        A layer that changes the size of the image and is neither convolution nor pooling.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.DeformConv2d(4, 4, 3))
    >>> [layer.taps for layer in samplings(net, np.ones((1, 1, 9, 9), np.float32))]
    [1, 9]
    """
    found = []
    for layer in _chain(net):
        y = layer.predict(x)
        if y.ndim != 4:
            break
        if isinstance(layer, nn.Conv2d):
            offset = to_host(layer.offsets(x)) if isinstance(layer, nn.DeformConv2d) else None
            kernel = layer.weight.data.shape[2:]
            found.append(Sampling(offset, kernel, layer.stride, layer.padding, layer.dilation))
        elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            kernel, stride, padding = zip(*layer.axes, strict=True)
            found.append(Sampling(None, kernel, stride, padding))
        elif y.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"samplings: {type(layer).__name__} makes {y.shape[2:]} of {x.shape[2:]}, "
                f"expected a convolution or a pooling where the size changes"
            )
        x = y
    return found


def trace(
    layers: Sampling | Sequence[Sampling], positions: Any, index: int = 0
) -> list[np.ndarray]:
    """Where stacked layers look for output positions, layer by layer.

    Nothing is rounded on the way: a tap of an upper layer looks between the positions of the layer
    below, and so the offsets of that one are interpolated. A tap that looks outside of what the
    deformable layer below computes reads a zero and leads no further: NaN from then on.

    Parameters
    ----------
    layers : Sampling or sequence of Sampling
        The first layer first, as in a network.
    positions : (..., 2) array
        Output positions (y, x) of the last layer, whole or not.
    index : int
        The image of the batch.

    Returns
    -------
    list of (..., number of points, 2) array
        Where each layer looks, the first layer first, in pixels of its input. With three layers
        of 9 taps these are 729, 81 and 9 points.

    Raises
    ------
    ValueError
        Positions outside of the output, offsets whose shape does not fit.

    Examples
    --------
    A tap that looks 1.5 pixels to the right, twice, the second time of every second pixel:

    >>> import numpy as np
    >>> offset = np.zeros((1, 2, 8, 8))
    >>> offset[:, 1] = 1.5
    >>> layers = [Sampling(offset, 1, stride=2), Sampling(offset, 1)]
    >>> [points.tolist() for points in trace(layers, (3, 3))]
    [[[6.0, 10.5]], [[3.0, 4.5]]]
    """
    layers = _stack(layers)
    points = _checked_positions("trace", positions, layers[-1])[..., None, :]
    found = []
    for layer in reversed(layers):
        looks = layer.looks(points, index)
        points = looks.reshape(*looks.shape[:-3], looks.shape[-3] * layer.taps, 2)
        found.append(points)
    return found[::-1]


def middles(layers: Sampling | Sequence[Sampling], positions: Any) -> np.ndarray:
    """The pixels in the middle of what undisplaced taps would see: (..., 2) to (..., 2).

    Parameters
    ----------
    layers : Sampling or sequence of Sampling
        The first layer first.
    positions : (..., 2) array
        Output positions (y, x) of the last layer.

    Examples
    --------
    >>> import numpy as np
    >>> layer = Sampling(np.zeros((1, 18, 4, 4)), stride=2, padding=1)
    >>> middles([layer, layer], (1, 2)).tolist()
    [4.0, 8.0]
    """
    points = np.asarray(positions, np.float64)
    for layer in reversed(_stack(layers)):
        points = layer.middle(points)
    return points


def effective_dilation(offset: Array, dilation: Pair = 1, kernel_size: Pair = 3) -> np.ndarray:
    """How far apart neighbouring taps look: mean distance over the adjacent pairs, in pixels.

    A 3x3 kernel has 12 pairs. Without offsets the result is the dilation. In the paper's Table 2
    it grows with the size of the object (Dai et al. 2017, arXiv 1703.06211, Sec. 3.1).

    Parameters
    ----------
    offset : (N, 2 * G * kh * kw, Ho, Wo) array
    dilation, kernel_size : int or (height, width)
        Of the layer.

    Returns
    -------
    (N, G, Ho, Wo) array
        In pixels of the layer's input.

    Raises
    ------
    ValueError
        A shape that does not fit, a kernel of one tap.

    Examples
    --------
    >>> import numpy as np
    >>> effective_dilation(np.zeros((1, 18, 1, 1)), dilation=2).tolist()
    [[[[2.0]]]]
    """
    kernel = kh, kw = pair("effective_dilation", "kernel_size", kernel_size, least=1)
    dilation = pair("effective_dilation", "dilation", dilation, least=1)
    if kh * kw == 1:
        raise ValueError(f"effective_dilation: kernel_size is {kernel_size}, expected two taps")
    shifts = to_host(_by_group("effective_dilation", offset, kernel)).astype(np.float64)
    n, groups, _, _, *size = shifts.shape
    tap = np.indices(kernel).transpose(1, 2, 0) * dilation
    points = shifts.reshape(n, groups, kh, kw, 2, *size) + tap.reshape(kh, kw, 2, 1, 1)
    distances = [
        np.linalg.norm(np.diff(points, axis=axis), axis=4).reshape(n, groups, pairs, *size)
        for axis, pairs in ((2, (kh - 1) * kw), (3, kh * (kw - 1)))
    ]
    return np.concatenate(distances, axis=2).mean(axis=2)


def sampling_points(
    layers: Sampling | Sequence[Sampling],
    position: Any = None,
    image: Array | None = None,
    ax: Axes | None = None,
    *,
    index: int = 0,
    every_depth: bool = False,
) -> Axes:
    """Draw where one or several stacked deformable layers look: Fig. 5 of arXiv 1703.06211.

    Parameters
    ----------
    layers : Sampling or sequence of Sampling
        The first layer first, as :func:`samplings` returns them.
    position : (2,) or (M, 2) array, optional
        Output positions (y, x) of the last layer; all of them by default.
    image : (H, W), (C, H, W) or (H, W, C) array, optional
        Drawn below, with 1 or 3 channels: the input of the first layer.
    ax : matplotlib.axes.Axes, optional
    index : int
        The image of the batch.
    every_depth : bool
        Also draw, larger, where the upper layers look, over the pixels that these stand for.

    Returns
    -------
    matplotlib.axes.Axes
        The points are in ``ax.collections``: "sampling points" (orange), with `every_depth` those
        of "deformable layer 2" and so on (blue), "output position" (green squares).

    Raises
    ------
    ValueError
        As :func:`trace`.

    Notes
    -----
    Taps of upper layers that look outside of the map below lead nowhere, and are left out.

    Examples
    --------
    >>> import numpy as np
    >>> layer = Sampling(np.zeros((1, 18, 9, 9)), padding=1)
    >>> ax = sampling_points([layer, layer, layer], (4, 4), image=np.zeros((9, 9)))
    >>> [(drawn.get_label(), len(drawn.get_offsets())) for drawn in ax.collections]
    [('sampling points', 729), ('output position', 1)]
    >>> plt.close(ax.figure)
    """
    layers = _stack(layers)
    positions = _checked_positions("sampling_points", position, layers[-1]).reshape(-1, 2)
    looks = trace(layers, positions, index)
    ax = _axes(ax, image)
    _scatter(ax, looks[0], "sampling points", ORANGE)
    if every_depth:
        upper = [i for i, layer in enumerate(layers) if layer.taps > 1][1:]
        for number, i in enumerate(upper, start=2):
            _scatter(ax, middles(layers[:i], looks[i]), f"deformable layer {number}", BLUE)
    _scatter(ax, middles(layers, positions), "output position", GREEN, marker="s")
    return ax


def offset_field(
    layer: Sampling,
    tap: int | None = None,
    image: Array | None = None,
    ax: Axes | None = None,
    *,
    index: int = 0,
    every: int = 1,
    magnify: float = 1.0,
    colours: bool = False,
) -> Axes:
    """Draw the offsets of one tap, or their mean over the taps, as arrows or as colours.

    Parameters
    ----------
    layer : Sampling
    tap : int, optional
        Row-major position in the kernel. By default the mean over all taps: how far the layer
        looks away as a whole.
    image : array, optional
        Drawn below arrows, as in :func:`sampling_points`.
    ax : matplotlib.axes.Axes, optional
    index : int
        The image of the batch.
    every : int
        Draw every `every`-th arrow along both axes.
    magnify : float
        Draw arrows longer than they are.
    colours : bool
        One coloured pixel per output position instead of arrows, and a legend. Yellow is to the
        right, blue to the left, bright is up and dark is down; grey is no offset.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        A tap that the kernel has not, offsets whose shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> offset = np.zeros((1, 2, 4, 4))
    >>> offset[:, 1] = 1.5
    >>> ax = offset_field(Sampling(offset, 1), every=2)
    >>> ax.collections[0].U.tolist(), ax.collections[0].V.tolist()
    ([1.5, 1.5, 1.5, 1.5], [0.0, 0.0, 0.0, 0.0])
    >>> plt.close(ax.figure)
    """
    if tap is not None and not 0 <= tap < layer.taps:
        raise ValueError(f"offset_field: tap is {tap}, expected 0 <= tap < {layer.taps}")
    chosen = slice(None) if tap is None else slice(tap, tap + 1)
    shift = layer.shifts(index)[chosen].mean(axis=0)
    if colours:
        ax = _axes(ax)
        longest = float(np.linalg.norm(shift, axis=0).max()) or 1.0
        ax.imshow(_direction_colours(shift / longest), interpolation="nearest")
        _colour_legend(ax, longest)
        return ax
    ax = _axes(ax, image)
    positions = np.moveaxis(np.indices(shift.shape[1:]), 0, -1)[::every, ::every]
    start = layer.grid(positions)[..., chosen, :].mean(axis=-2)
    dy, dx = shift[:, ::every, ::every]
    ax.quiver(
        start[..., 1], start[..., 0], dx, dy,
        color=ORANGE, angles="xy", scale_units="xy", scale=1 / magnify, label="offsets",
    )  # fmt: skip
    return ax


def roi_bins(
    roi: Any,
    offset: Array | None = None,
    output_size: Pair = 7,
    gamma: float = 0.1,
    rounded: bool = False,
) -> np.ndarray:
    """The bins of a deformable RoI pooling, as rectangles in pixels of the image.

    A bin is shifted by gamma times the size of the RoI times its offset; RoI offsets are
    **(dx, dy)**, those of convolutions (dy, dx).

    Parameters
    ----------
    roi : (4,) or (5,) sequence
        x1, y1, x2, y2 in pixels of the image, a batch index before them or not.
    offset : (2, parts high, parts wide) array, optional
        Of this RoI, and of one class. Bin ph uses part row (ph * parts high) // output height.
    output_size : int or (height, width)
        Number of bins.
    gamma : float
    rounded : bool
        False: the RoI of :func:`deformable.deform_roi_pool`. True: that of
        :func:`deformable.deform_ps_roi_pool`, whose corners are rounded to pixels and belong
        to it.

    Returns
    -------
    (output height, output width, 4) array
        x1, y1, x2, y2. Pixels are squares around their positions: the first one from -0.5 to 0.5.

    Raises
    ------
    ValueError
        Shapes that do not fit.

    Examples
    --------
    >>> roi_bins((0.5, 0.5, 4.5, 4.5), output_size=2)[0].tolist()
    [[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0]]
    """
    rows, columns = pair("roi_bins", "output_size", output_size, least=1)
    roi = np.asarray(to_host(roi) if hasattr(roi, "shape") else roi, np.float64)
    if roi.shape not in ((4,), (5,)):
        raise ValueError(f"roi_bins: roi has shape {roi.shape}, expected (4,) or (5,)")
    corners = roi[-4:].reshape(2, 2)
    if rounded:
        corners = round_half_away(corners)
        corners[1] += 1
    size = corners[1] - corners[0]
    step = size / (columns, rows)
    column, row = np.meshgrid(np.arange(columns), np.arange(rows))
    first = corners[0] - 0.5 + np.stack([column, row], axis=-1) * step
    if offset is not None:
        check_shape("roi_bins", "offset", offset, (2, "parts high", "parts wide"))
        _, high, wide = offset.shape
        shift = to_host(offset)[:, row * high // rows, column * wide // columns]
        first += gamma * size * shift.astype(np.float64).transpose(1, 2, 0)
    return np.concatenate([first, first + step], axis=-1)


def roi_parts(
    roi: Any,
    offset: Array | None = None,
    output_size: Pair = 7,
    gamma: float = 0.1,
    image: Array | None = None,
    ax: Axes | None = None,
    *,
    rounded: bool = False,
) -> Axes:
    """Draw a RoI and the shifted bins of a deformable RoI pooling: Fig. 6 of arXiv 1703.06211.

    Parameters
    ----------
    roi, offset, output_size, gamma, rounded
        As in :func:`roi_bins`.
    image : array, optional
        Drawn below, as in :func:`sampling_points`.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
        The rectangles are in ``ax.collections``: "bins" (orange) and "RoI" (yellow).

    Raises
    ------
    ValueError
        Shapes that do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> offset = np.zeros((2, 3, 3))
    >>> offset[0, 1, 1] = 0.5                   # the part in the middle goes right
    >>> ax = roi_parts((10, 10, 40, 40), offset, output_size=3)
    >>> [(drawn.get_label(), len(drawn.get_paths())) for drawn in ax.collections]
    [('bins', 9), ('RoI', 1)]
    >>> plt.close(ax.figure)
    """
    bins = roi_bins(roi, offset, output_size, gamma, rounded).reshape(-1, 4)
    whole = roi_bins(roi, None, 1, gamma, rounded).reshape(1, 4)
    ax = _axes(ax, image)
    for label, boxes, colour, width in ("bins", bins, ORANGE, 1.6), ("RoI", whole, YELLOW, 2.4):
        x1, y1, x2, y2 = boxes.T
        outlines = list(np.stack([x1, y1, x2, y1, x2, y2, x1, y2], axis=1).reshape(-1, 4, 2))
        lines = PolyCollection(outlines, facecolors="none", edgecolors=colour, linewidths=width)
        lines.set_label(label)
        # seen on bright images too
        dark = Stroke(linewidth=width + 1, foreground="black", alpha=0.6)
        lines.set_path_effects([dark, Normal()])
        ax.add_collection(lines)
    ax.autoscale_view()
    return ax


def input_gradient(
    net: nn.Layer, x: Array, position: tuple[int, int] | None = None, channel: int | None = None
) -> np.ndarray:
    """How much every input pixel moves one output position of a network.

    The network is taken as it predicts: normalisation by running averages, no dropout. It is left
    as it was, gradients included.

    Parameters
    ----------
    net : nn.Layer
        Returns (N, channels, Ho, Wo) or (N, channels).
    x : (N, C, H, W) array
    position : (int, int), optional
        Output position (y, x); the one in the middle by default.
    channel : int, optional
        Output channel; the sum of all by default.

    Returns
    -------
    (H, W) array
        Length over the channels of the gradient by `x`, mean over the images.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> net = nn.Conv2d(1, 1, 3, padding=1)
    >>> net.weight.data = np.ones_like(net.weight.data)
    >>> input_gradient(net, np.zeros((1, 1, 5, 5), np.float32)).astype(int)
    array([[0, 0, 0, 0, 0],
           [0, 1, 1, 1, 0],
           [0, 1, 1, 1, 0],
           [0, 1, 1, 1, 0],
           [0, 0, 0, 0, 0]])
    """
    with _as_it_predicts(net):
        y, backward = net(x)
        if position is None:
            position = tuple(size // 2 for size in y.shape[2:])
        grad_y = array_module(y).zeros_like(y)
        grad_y[(slice(None), slice(None) if channel is None else channel, *position)] = 1
        gradient = to_host(backward(grad_y)).astype(np.float64)
    return np.linalg.norm(gradient, axis=1).mean(axis=0)


def effective_size(magnitude: np.ndarray) -> float:
    """Side of the square with as many pixels as matter: those above 4.55 % of the largest one.

    Luo et al. 2016, "Understanding the Effective Receptive Field" (arXiv 1701.04128), Sec. 3.

    Parameters
    ----------
    magnitude : (H, W) array
        As :func:`input_gradient` returns it.

    Examples
    --------
    >>> import numpy as np
    >>> effective_size(np.pad(np.ones((3, 3)), 4))
    3.0
    """
    return float(np.sqrt((magnitude > NEGLIGIBLE * magnitude.max()).sum()))


def receptive_field(
    net: nn.Layer,
    x: Array,
    position: tuple[int, int] | None = None,
    ax: Axes | None = None,
    *,
    channel: int | None = None,
) -> Axes:
    """Draw how much every input pixel moves one output position of a network.

    Parameters
    ----------
    net, x, position, channel
        As in :func:`input_gradient`.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
        Its title says the :func:`effective_size`; a square of that size is around their centre.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> net = nn.Conv2d(1, 1, 3, padding=1)
    >>> net.weight.data = np.ones_like(net.weight.data)
    >>> ax = receptive_field(net, np.zeros((1, 1, 9, 9), np.float32))
    >>> ax.get_title()
    'effective size 3.0 pixels'
    >>> plt.close(ax.figure)
    """
    magnitude = input_gradient(net, x, position, channel)
    side = effective_size(magnitude)
    ax = _axes(ax)
    ax.imshow(np.sqrt(magnitude), cmap="cividis", vmin=0)  # the root shows the faint ones too
    total = magnitude.sum() or 1.0
    y, x = (float((at * magnitude).sum()) / total for at in np.indices(magnitude.shape))
    square = Rectangle((x - side / 2, y - side / 2), side, side, fill=False, edgecolor="white")
    ax.add_patch(square)
    ax.set_title(f"effective size {side:.1f} pixels")
    return ax


def _by_group(function: str, offset: Array, kernel: tuple[int, int]) -> Array:
    """Offsets (N, 2 G kh kw, Ho, Wo), checked, as (N, G, kh kw, 2, Ho, Wo)."""
    check_shape(function, "offset", offset, ("N", "2 * G * kh * kw", "Ho", "Wo"))
    n, channels, *size = offset.shape
    taps = kernel[0] * kernel[1]
    groups = max(channels // (2 * taps), 1)
    check_shape(function, "offset", offset, (n, 2 * groups * taps, *size))
    return offset.reshape(n, groups, taps, 2, *size)


def _chain(net: nn.Layer) -> Iterator[nn.Layer]:
    """The layers of a network in the order in which they are called."""
    if isinstance(net, nn.Sequential):
        for layer in net.layers:
            yield from _chain(layer)
    else:
        yield net


def _stack(layers: Sampling | Sequence[Sampling]) -> list[Sampling]:
    return [layers] if isinstance(layers, Sampling) else list(layers)


def _checked_positions(function: str, positions: Any, layer: Sampling) -> np.ndarray:
    """Output positions (..., 2) of `layer` as an array; all of them for None."""
    if positions is None and layer.offset is not None:
        positions = np.moveaxis(np.indices(layer.offset.shape[2:]), 0, -1)
    points = np.asarray(positions, np.float64)
    if points.shape[-1:] != (2,):
        raise ValueError(f"{function}: positions have shape {points.shape}, expected (..., 2)")
    size = (np.inf, np.inf) if layer.offset is None else layer.offset.shape[2:]
    inside = ((points >= 0) & (points <= np.array(size) - 1)).all(axis=-1)
    if not inside.all():
        raise ValueError(
            f"{function}: position {tuple(points[~inside][0].tolist())} is outside of the output, "
            f"which is {size}"
        )
    return points


@contextmanager
def _as_it_predicts(net: nn.Layer) -> Iterator[None]:
    """The training form computes what ``predict`` does; everything is put back afterwards."""
    layers = list(_all_layers(net))
    kept = [(vars(part), dict(vars(part))) for part in (*layers, *net.params())]
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.frozen = True
        elif isinstance(layer, nn.Dropout):
            layer.p, layer.rng = 0.0, np.random.default_rng()
    try:
        yield
    finally:
        for now, before in kept:
            now.update(before)


def _all_layers(net: nn.Layer) -> Iterator[nn.Layer]:
    yield net
    for _, child in net.children():
        if isinstance(child, nn.Layer):
            yield from _all_layers(child)


def _axes(ax: Axes | None, image: Array | None = None) -> Axes:
    """The Axes to draw on, with y pointing down; `image` is drawn."""
    if ax is None:
        _, ax = plt.subplots()
    if image is not None:
        ax.imshow(_picture(image), cmap="gray")
    elif not ax.yaxis_inverted():
        ax.invert_yaxis()
    ax.set_aspect("equal")
    return ax


def _picture(image: Array) -> np.ndarray:
    """An image of 1 or 3 channels, which may come first, as imshow takes it."""
    picture = to_host(image)
    if picture.ndim == 3 and picture.shape[0] in (1, 3):
        picture = np.moveaxis(picture, 0, -1)
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[..., 0]
    if picture.ndim == 3 and picture.dtype != np.uint8:  # colours have to be in [0, 1]
        picture = picture - min(picture.min(), 0)
        picture = picture / max(picture.max(), 1)
    return picture


def _scatter(ax: Axes, points: np.ndarray, label: str, colour: str, **style: Any) -> None:
    """Draw those of the points (..., 2) that are somewhere; the more there are, the smaller."""
    y, x = points[np.isfinite(points).all(axis=-1)].T
    size = 80 / max(len(x), 1) ** 0.4  # 33 for 9 points, 14 for 81, 6 for 729
    edge = {"edgecolors": "white", "linewidths": min(size / 20, 0.8)}
    ax.scatter(x, y, size, colour, label=label, **edge, **style)


def _direction_colours(shift: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) of directions (2, H, W) of length at most 1: see :func:`offset_field`."""
    dy, dx = shift[:, :, :, None]
    return np.clip(0.5 + dx * np.array([0.4, 0.28, -0.42]) - dy * np.array([0.4, 0.4, 0.4]), 0, 1)


def _colour_legend(ax: Axes, longest: float) -> None:
    """The colours of all directions, beside the picture."""
    wheel = np.stack(np.meshgrid(*[np.linspace(-1, 1, 101)] * 2, indexing="ij"))
    inside = np.linalg.norm(wheel, axis=0) <= 1
    colours = np.concatenate([_direction_colours(wheel), inside[..., None]], axis=2)
    legend = ax.inset_axes((1.04, 0.0, 0.25, 0.25))
    legend.imshow(colours)
    legend.set_title(f"{longest:.1f} px", fontsize="small")
    legend.set_axis_off()
