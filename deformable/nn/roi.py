"""Layers that pool regions of interest: ``y, backward = layer(x, rois)``.

``backward(grad_y)`` returns ``(grad_x, None)``: RoIs have no gradient.

The deformable ones predict how far each bin of each RoI moves, as a part of the RoI's size (Dai et
al. 2017, arXiv 1703.06211, Sec. 2.2): :class:`DeformRoIPool` from the RoI pooled once without
offsets, :class:`DeformPSRoIPool` from maps of offsets, pooled without offsets too. Both begin with
offsets of zero. The modulated form (Zhu et al. 2018, arXiv 1811.11168) also predicts a factor in
[0, 1] per bin. RoI offsets are **(dx, dy)**, those of a deformable convolution (dy, dx).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from deformable._array import Array, Pair, check_library, check_shape, integer, pair
from deformable.deform_roi_pool import (
    deform_ps_roi_pool,
    deform_ps_roi_pool_backward,
    deform_roi_pool,
    deform_roi_pool_backward,
)
from deformable.nn.basic import Flatten, Linear
from deformable.nn.conv import Conv2d, offset_bound, split_offsets
from deformable.nn.layer import Backward, Layer
from deformable.roi_align import ps_roi_align, ps_roi_align_backward, roi_align, roi_align_backward
from deformable.roi_pool import ps_roi_pool, ps_roi_pool_backward, roi_pool, roi_pool_backward


class _Pool(Layer):
    """A pooling function, its backward, and the arguments that follow the arrays."""

    _pool: Callable[..., Array]
    _pool_backward: Callable[..., Any]

    def __init__(self, output_size: Pair, **options: Any) -> None:
        output_size = pair(type(self).__name__, "output_size", output_size, least=1)
        self.options = {"output_size": output_size, **options}

    def __call__(self, x: Array, rois: Array) -> tuple[Array, Backward]:
        """Pool the RoIs (K, 5) of x (N, C, H, W)."""
        y = self._pool(x, rois, **self.options)

        def backward(grad_y: Array) -> tuple[Array, None]:
            return self._pool_backward(grad_y, x, rois, **self.options).x, None

        return y, backward


class RoIPool(_Pool):
    """The largest pixel of each bin: :func:`deformable.roi_pool`.

    Parameters
    ----------
    output_size : int or (int, int)
    spatial_scale : float

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> layer = nn.RoIPool(2)
    >>> x, rois = np.arange(16.0).reshape(1, 1, 4, 4), np.array([[0.0, 0, 0, 3, 3]])
    >>> y, backward = layer(x, rois)
    >>> y[0, 0].tolist(), backward(np.ones_like(y))[0][0, 0, 1].tolist()
    ([[5.0, 7.0], [13.0, 15.0]], [0.0, 1.0, 0.0, 1.0])
    """

    _pool = staticmethod(roi_pool)
    _pool_backward = staticmethod(roi_pool_backward)

    def __init__(self, output_size: Pair, spatial_scale: float = 1.0) -> None:
        super().__init__(output_size=output_size, spatial_scale=spatial_scale)


class RoIAlign(_Pool):
    """Mean or maximum of bilinear samples of each bin: :func:`deformable.roi_align`.

    Parameters
    ----------
    output_size : int or (int, int)
    spatial_scale : float
    sampling_ratio : int or (int, int)
    aligned : bool
    mode : {"avg", "max"}

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> layer = nn.RoIAlign(2, aligned=True)
    >>> layer.predict(np.ones((1, 3, 8, 8)), np.array([[0.0, 1, 2, 5, 7]])).shape
    (1, 3, 2, 2)
    """

    _pool = staticmethod(roi_align)
    _pool_backward = staticmethod(roi_align_backward)

    def __init__(
        self,
        output_size: Pair,
        spatial_scale: float = 1.0,
        sampling_ratio: Pair = -1,
        aligned: bool = False,
        mode: str = "avg",
    ) -> None:
        super().__init__(
            output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio,
            aligned=aligned, mode=mode,
        )  # fmt: skip


class PSRoIPool(_Pool):
    """The mean pixel of each bin, of channels of its own: :func:`deformable.ps_roi_pool`.

    Parameters
    ----------
    output_size : int or (int, int)
    spatial_scale : float
    group_size : int or (int, int), optional
        ``output_size`` by default; 1 is average RoI pooling.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> layer = nn.PSRoIPool(2)
    >>> layer.predict(np.ones((1, 12, 8, 8)), np.array([[0.0, 1, 2, 5, 7]])).shape
    (1, 3, 2, 2)
    """

    _pool = staticmethod(ps_roi_pool)
    _pool_backward = staticmethod(ps_roi_pool_backward)

    def __init__(
        self, output_size: Pair, spatial_scale: float = 1.0, group_size: Pair | None = None
    ) -> None:
        super().__init__(
            output_size=output_size, spatial_scale=spatial_scale, group_size=group_size
        )


class PSRoIAlign(_Pool):
    """RoIAlign with channels of its own for each bin: :func:`deformable.ps_roi_align`.

    Parameters
    ----------
    output_size : int or (int, int)
    spatial_scale : float
    sampling_ratio : int or (int, int)

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> layer = nn.PSRoIAlign(2)
    >>> layer.predict(np.ones((1, 12, 8, 8)), np.array([[0.0, 1, 2, 5, 7]])).shape
    (1, 3, 2, 2)
    """

    _pool = staticmethod(ps_roi_align)
    _pool_backward = staticmethod(ps_roi_align_backward)

    def __init__(
        self, output_size: Pair, spatial_scale: float = 1.0, sampling_ratio: Pair = -1
    ) -> None:
        super().__init__(
            output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio
        )


class _DeformPool(_Pool):
    """A pooling whose bins are moved by maps (K, offset channels and mask, PH, PW)."""

    def __init__(
        self, classes: int, modulated: bool, max_offset: float | None, **options: Any
    ) -> None:
        super().__init__(**options)
        name = type(self).__name__
        self.max_offset = offset_bound(name, max_offset)
        self.offset_channels = 2 * integer(name, "classes", classes, least=1)
        self.map_shape = (self.offset_channels + modulated, *self.options["output_size"])

    def offsets(self, features: Array, rois: Array) -> Array:
        """The offsets (K, 2 classes, PH, PW), (dx, dy) before gamma, that features lead to."""
        maps, _ = self._maps(features, rois)
        return split_offsets(maps, self.offset_channels, self.max_offset)[0]

    def _maps(self, features: Array, rois: Array) -> tuple[Array, Backward]:
        """What the branch predicts, and the backward to the gradient of the features."""
        raise NotImplementedError

    def _begin_at_zero(self, branch: Layer, offset_lr_mult: float) -> None:
        """Make the parameters of an offset branch zero, and set their learning rate."""
        for param in branch.params():
            param.data = np.zeros_like(param.data)
            param.lr_mult = offset_lr_mult

    def _moved(self, x: Array, rois: Array, maps: Array) -> tuple[Array, Backward]:
        """Pool as the maps say; the backward returns the gradients of x and of the maps."""
        offset, mask, maps_backward = split_offsets(maps, self.offset_channels, self.max_offset)
        mask = None if mask is None else mask[:, 0]
        y = self._pool(x, rois, offset, mask=mask, **self.options)

        def backward(grad_y: Array) -> tuple[Array, Array]:
            grad = self._pool_backward(grad_y, x, rois, offset, mask=mask, **self.options)
            grad_mask = None if mask is None else grad.mask[:, None]
            return grad.x, maps_backward(grad.offset, grad_mask)

        return y, backward


class DeformRoIPool(_DeformPool):
    """Deformable RoI pooling: pools once without offsets, predicts them, and pools with them.

    Parameters
    ----------
    in_channels : int
    output_size : int or (int, int)
    spatial_scale : float
    sampling_ratio : int or (int, int)
    gamma : float
        What an offset of 1 means, as a part of the RoI's size.
    modulated : bool
        Also predict a factor per bin (DCNv2), the sigmoid of a map: 1/2 at the start.
    offset_lr_mult : float
        Learning rate of the predicting layer relative to the rest: 0.01 in the paper, for SGD.
        With Adam, whose steps do not depend on the gradient's size, begin with 0.1.
    max_offset : float, optional
        Bounds every offset smoothly: ``max_offset * tanh(predicted / max_offset)``, before gamma.
    dtype : dtype

    Attributes
    ----------
    offset_fc : Linear
        Predicts (dx, dy) of every bin from the pooled RoI, and behind them the mask;
        zero-initialised.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> layer = nn.DeformRoIPool(4, output_size=3, spatial_scale=0.25)
    >>> x, rois = np.ones((1, 4, 8, 8), np.float32), np.array([[0, 4, 4, 20, 28]], np.float32)
    >>> y, backward = layer(x, rois)
    >>> y.shape, backward(y)[0].shape, layer.offsets(x, rois).shape
    ((1, 4, 3, 3), (1, 4, 8, 8), (1, 2, 3, 3))
    """

    _pool = staticmethod(deform_roi_pool)
    _pool_backward = staticmethod(deform_roi_pool_backward)

    def __init__(
        self,
        in_channels: int,
        output_size: Pair,
        spatial_scale: float = 1.0,
        sampling_ratio: Pair = -1,
        gamma: float = 0.1,
        modulated: bool = False,
        offset_lr_mult: float = 0.01,
        max_offset: float | None = None,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(
            1, modulated, max_offset, output_size=output_size, spatial_scale=spatial_scale,
            sampling_ratio=sampling_ratio, gamma=gamma,
        )  # fmt: skip
        self.in_channels = integer("DeformRoIPool", "in_channels", in_channels, least=1)
        _, *bins = self.map_shape
        features = self.in_channels * math.prod(bins)
        self.offset_fc = Linear(features, math.prod(self.map_shape), dtype=dtype)
        self._begin_at_zero(self.offset_fc, offset_lr_mult)

    def __call__(self, x: Array, rois: Array) -> tuple[Array, Backward]:
        """Pool the RoIs (K, 5) of x (N, in_channels, H, W)."""
        maps, branch_backward = self._maps(x, rois)
        y, moved_backward = self._moved(x, rois, maps)

        def backward(grad_y: Array) -> tuple[Array, None]:
            grad_x, grad_maps = moved_backward(grad_y)
            return grad_x + branch_backward(grad_maps), None

        return y, backward

    def _maps(self, x: Array, rois: Array) -> tuple[Array, Backward]:
        check_library("DeformRoIPool", {"x": x, "rois": rois})
        check_shape("DeformRoIPool", "x", x, ("N", self.in_channels, "H", "W"))
        pooled = self._pool(x, rois, None, **self.options)
        flat, flatten_backward = Flatten()(pooled)
        raw, fc_backward = self.offset_fc(flat)

        def backward(grad_maps: Array) -> Array:
            grad_pooled = flatten_backward(fc_backward(grad_maps.reshape(raw.shape)))
            return self._pool_backward(grad_pooled, x, rois, None, **self.options).x

        return raw.reshape(len(rois), *self.map_shape), backward


class DeformPSRoIPool(_DeformPool):
    """Deformable position-sensitive RoI pooling, with the offsets of deformable R-FCN.

    A 1x1 convolution makes maps of offsets with channels of their own for every bin. They are
    pooled position-sensitively without offsets; what comes out moves the bins of the pooling of x.

    Parameters
    ----------
    in_channels : int
        Of what the offsets are predicted from: the features, or x itself.
    output_size : int or (int, int)
    spatial_scale : float
    group_size : int or (int, int), optional
        ``output_size`` by default. With 1 it is the paper's deformable RoI pooling.
    sampling_ratio : int or (int, int)
    gamma : float
        What an offset of 1 means, as a part of the RoI's size.
    classes : int
        Equal shares of the output channels with offsets of their own.
    modulated : bool
        Also predict a factor per bin (DCNv2), the sigmoid of a map: 1/2 at the start.
    offset_lr_mult : float
        Learning rate of the predicting convolution relative to the rest.
    max_offset : float, optional
        Bounds every offset smoothly: ``max_offset * tanh(predicted / max_offset)``, before gamma.
    dtype : dtype

    Attributes
    ----------
    offset_conv : Conv2d
        Predicts, for every class, (dx, dy) of every bin, and behind them the mask;
        zero-initialised.

    Examples
    --------
    Score maps of two channels and 3x3 bins:

    >>> import numpy as np
    >>> from deformable import nn
    >>> layer = nn.DeformPSRoIPool(4, output_size=3, dtype=np.float64)
    >>> features, scores = np.ones((1, 4, 9, 9)), np.ones((1, 18, 9, 9))
    >>> rois = np.array([[0.0, 1, 1, 6, 7]])
    >>> y, backward = layer(scores, rois, features)
    >>> y.shape, [None if grad is None else grad.shape for grad in backward(y)]
    ((1, 2, 3, 3), [(1, 18, 9, 9), None, (1, 4, 9, 9)])
    """

    _pool = staticmethod(deform_ps_roi_pool)
    _pool_backward = staticmethod(deform_ps_roi_pool_backward)

    def __init__(
        self,
        in_channels: int,
        output_size: Pair,
        spatial_scale: float = 1.0,
        group_size: Pair | None = None,
        sampling_ratio: Pair = 4,
        gamma: float = 0.1,
        classes: int = 1,
        modulated: bool = False,
        offset_lr_mult: float = 1.0,
        max_offset: float | None = None,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(
            classes, modulated, max_offset, output_size=output_size, spatial_scale=spatial_scale,
            group_size=group_size, sampling_ratio=sampling_ratio, gamma=gamma,
        )  # fmt: skip
        self.offset_conv = Conv2d(in_channels, math.prod(self.map_shape), 1, dtype=dtype)
        self._begin_at_zero(self.offset_conv, offset_lr_mult)

    def __call__(
        self, x: Array, rois: Array, features: Array | None = None
    ) -> tuple[Array, Backward]:
        """Pool the RoIs (K, 5) of x (N, C, H, W).

        The offsets come from ``features`` (N, in_channels, H, W), of which ``backward`` returns
        the gradient too: ``(grad_x, None, grad_features)``. Without it they come from x.
        """
        maps, branch_backward = self._maps(x if features is None else features, rois)
        y, moved_backward = self._moved(x, rois, maps)

        def backward(grad_y: Array) -> tuple[Array | None, ...]:
            grad_x, grad_maps = moved_backward(grad_y)
            grad_features = branch_backward(grad_maps)
            if features is None:
                return grad_x + grad_features, None
            return grad_x, None, grad_features

        return y, backward

    def _maps(self, features: Array, rois: Array) -> tuple[Array, Backward]:
        options = self.options | {"group_size": None}
        image, conv_backward = self.offset_conv(features)
        maps = self._pool(image, rois, None, **options)

        def backward(grad_maps: Array) -> Array:
            grad = self._pool_backward(grad_maps, image, rois, None, wrt=("x",), **options)
            return conv_backward(grad.x)

        return maps, backward
