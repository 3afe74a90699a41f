"""The shapes that are measured, and random arguments for them.

A workload names an operator of the library and knows its arguments by their names there. Numbers
are drawn in float64 and few bits, so that they mean the same in every dtype; positions of a
deformable convolution keep away from the pixels, where rounding would decide which derivative is
meant.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np


class Products(NamedTuple):
    """The matrix products (groups, M, K) @ (groups, K, N) of a forward convolution."""

    groups: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        return 2 * self.groups * self.m * self.k * self.n


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution that keeps the size of the image, deformable or (``operator``) plain."""

    name: str
    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    dilation: int = 1
    groups: int = 1
    offset_groups: int = 1
    modulated: bool = False
    spread: float = 2.0  # standard deviation of the offsets, in pixels
    outside: float = 0.0  # share of the samples that are sent out of the image
    operator: str = "deform_conv2d"

    @property
    def label(self) -> str:
        shape = f"{self.batch}x{self.channels}x{self.height}x{self.width}->{self.out_channels}"
        parts = [self.name, shape]
        if self.groups > 1:
            parts.append(f"groups {self.groups}")
        if self.offset_groups > 1:
            parts.append(f"offset groups {self.offset_groups}")
        if self.operator == "deform_conv2d":
            parts.append("v2" if self.modulated else "v1")
        return " ".join(parts)

    @property
    def keywords(self) -> dict[str, Any]:
        around = {"padding": self.dilation, "dilation": self.dilation}
        return around if self.operator == "deform_conv2d" else {**around, "groups": self.groups}

    @property
    def result_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.out_channels, self.height, self.width

    @property
    def products(self) -> Products:
        return Products(
            groups=self.groups,
            m=self.batch * self.height * self.width,
            k=9 * self.channels // self.groups,
            n=self.out_channels // self.groups,
        )

    def tiny(self) -> "Convolution":
        """The same case in a size that any machine runs at once."""
        offset_groups = min(self.offset_groups, 2)
        depthwise = self.groups == self.channels
        channels = 4 * offset_groups
        return replace(
            self, batch=min(self.batch, 2), channels=channels, out_channels=channels,
            height=min(self.height, 5), width=min(self.width, 6), offset_groups=offset_groups,
            groups=channels if depthwise else min(self.groups, 2),
        )  # fmt: skip

    def arrays(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        size = (self.height, self.width)
        shape = (self.out_channels, self.channels // self.groups, 3, 3)
        images = {"x": _normal(rng, self.batch, self.channels, *size)}
        weights = {
            "weight": _normal(rng, *shape) / 2.0 ** round(math.log2(9 * shape[1]) / 2),
            "bias": _normal(rng, self.out_channels),
        }
        if self.operator == "conv2d":
            return {**images, **weights}
        samples = (self.batch, self.offset_groups * 9, *size)
        offset = rng.normal(0, self.spread, (2, *samples))
        offset[:, rng.random(samples) < self.outside] += 2 * max(size)
        # odd multiples of 1/256 px: never on a pixel, and exact also when the tap is added
        offset = (np.floor(offset * 128) * 2 + 1) / 256
        arrays = {**images, "offset": _interleaved(offset), **weights}
        return {**arrays, "mask": rng.integers(1, 256, samples) / 256} if self.modulated else arrays


@dataclass(frozen=True)
class Pooling:
    """RoIs of random place and size on a feature map."""

    name: str
    operator: str
    batch: int
    channels: int
    height: int
    width: int
    rois: int
    size: int  # bins along each side
    scale: float = 1 / 16
    sides: tuple[float, float] = (64, 448)  # of the RoIs, in pixels of the image
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: int = 1  # with offsets of their own, where the operator is deformable

    products = None

    @property
    def label(self) -> str:
        options = "".join(f" {key} {value}" for key, value in self.options.items())
        shape = f"{self.batch}x{self.channels}x{self.height}x{self.width}"
        return f"{self.name} {shape} {self.rois} RoIs {self.size}x{self.size}{options}"

    @property
    def keywords(self) -> dict[str, Any]:
        return {"output_size": self.size, "spatial_scale": self.scale, **self.options}

    @property
    def result_shape(self) -> tuple[int, int, int, int]:
        return self.rois, self.channels // self.group_size**2, self.size, self.size

    @property
    def group_size(self) -> int:
        """Cells along each side that have channels of their own; 1 is plain pooling."""
        position_sensitive = "ps" in self.operator.split("_")
        return self.options.get("group_size", self.size) if position_sensitive else 1

    def tiny(self) -> "Pooling":
        """The same case in a size that any machine runs at once."""
        size = min(self.size, 3)
        channels = 2 * size * size if self.group_size > 1 else 4
        return replace(
            self, batch=min(self.batch, 2), channels=channels, height=9, width=10,
            rois=5, size=size, sides=(1 / self.scale, 6 / self.scale),
        )  # fmt: skip

    def arrays(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        rois = np.empty((self.rois, 5))
        rois[:, 0] = rng.integers(self.batch, size=self.rois)
        whole = np.array([self.width, self.height]) / self.scale
        sides = np.minimum(rng.uniform(*self.sides, (self.rois, 2)), whole)
        rois[:, 1:3] = rng.uniform(0, 1, sides.shape) * (whole - sides)
        rois[:, 3:5] = rois[:, 1:3] + sides
        rois[:, 1:] = np.round(rois[:, 1:] * 8) / 8
        x = _normal(rng, self.batch, self.channels, self.height, self.width)
        if not self.operator.startswith("deform"):
            return {"x": x, "rois": rois}
        shape = (self.rois, 2 * self.classes, self.size, self.size)
        return {"x": x, "rois": rois, "offset": _normal(rng, *shape)}


Workload = Convolution | Pooling


def draw(workload: Workload, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arguments by their names, and a gradient of the result, in float64."""
    return workload.arrays(rng), _normal(rng, *workload.result_shape)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal numbers of 10 bits or less, exact in half precision."""
    return np.clip(np.round(rng.standard_normal(shape) * 128), -511, 511) / 128


def _interleaved(offset: np.ndarray) -> np.ndarray:
    """Offsets (2, N, G·taps, H, W) as the channels dy, dx of every tap."""
    _, n, samples, h, w = offset.shape
    return offset.transpose(1, 2, 0, 3, 4).reshape(n, 2 * samples, h, w)
