"""Deformable convolution and deformable RoI pooling on NumPy and CuPy arrays, with gradients."""

from deformable._cuda import float32_precision
from deformable.conv import conv2d, conv2d_backward
from deformable.deform_conv import deform_conv2d, deform_conv2d_backward

__all__ = [
    "conv2d",
    "conv2d_backward",
    "deform_conv2d",
    "deform_conv2d_backward",
    "float32_precision",
]
__version__ = "0.1.0"
