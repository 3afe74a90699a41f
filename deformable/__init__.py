"""Deformable convolution and deformable RoI pooling on NumPy and CuPy arrays, with gradients."""

import importlib
from typing import TYPE_CHECKING

from deformable._cuda import float32_precision
from deformable.conv import conv2d, conv2d_backward
from deformable.deform_conv import deform_conv2d, deform_conv2d_backward
from deformable.deform_roi_pool import (
    deform_ps_roi_pool,
    deform_ps_roi_pool_backward,
    deform_roi_pool,
    deform_roi_pool_backward,
)
from deformable.roi_align import (
    ps_roi_align,
    ps_roi_align_backward,
    roi_align,
    roi_align_backward,
)
from deformable.roi_pool import (
    ps_roi_pool,
    ps_roi_pool_backward,
    roi_pool,
    roi_pool_backward,
)

__all__ = [
    "conv2d",
    "conv2d_backward",
    "deform_conv2d",
    "deform_conv2d_backward",
    "deform_ps_roi_pool",
    "deform_ps_roi_pool_backward",
    "deform_roi_pool",
    "deform_roi_pool_backward",
    "float32_precision",
    "ps_roi_align",
    "ps_roi_align_backward",
    "ps_roi_pool",
    "ps_roi_pool_backward",
    "roi_align",
    "roi_align_backward",
    "roi_pool",
    "roi_pool_backward",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from deformable import nn as nn
    from deformable import testing as testing
    from deformable import visualize as visualize
else:

    def __getattr__(name):
        """The parts that not everyone needs: each is imported when it is first asked for."""
        if name in ("nn", "testing", "visualize"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
