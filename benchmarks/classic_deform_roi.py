"""Deformable RoI pooling by the classic algorithm: no library of today has it on a GPU but by this.

One thread per output, atomic additions in the backward: a straight port, in float32, of how the
operator of the paper was first written. It is here to be compared with and nothing else. Where a
sample lies exactly on a pixel its derivative is 0 (between floor and ceil, one pixel, there is no
slope); ours is the right-hand one. Gradients of offsets differ by that now and then.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks import gpu
from benchmarks.gpu import Runner, cupy
from benchmarks.harness import BOTH, FORWARD, Contender
from benchmarks.workloads import Pooling
from deformable._cuda import struct

FILE = "classic_deform_roi.cu"
THREADS = 256


class Shape(NamedTuple):
    """Sizes, as the kernels get them: the struct of the same fields."""

    channels: int
    height: int
    width: int
    rois: int
    out_channels: int
    pooled: int
    group: int
    part: int
    samples: int
    classes: int
    scale: float
    gamma: float


def runner(case: Pooling, sets: list[tuple[dict[str, Any], Any]]) -> Runner:
    """The contender, on float32 arrays."""
    return Runner(
        [
            Contender("classic", _calls(case, arrays, grad_y), lambda array: array.get())
            for arrays, grad_y in sets
        ]
    )


def _calls(case: Pooling, arrays: Mapping[str, Any], grad_y: Any) -> dict[str, Callable[[], Any]]:
    shape = _shape(case)
    outputs = int(np.prod(case.result_shape))
    grid, numbers = (-(-outputs // THREADS),), (struct(shape), np.int64(outputs))
    forward_kernel = gpu.kernel(FILE, "classic_forward")
    backward_kernel = gpu.kernel(FILE, "classic_backward")
    inputs = (arrays["x"], arrays["rois"], arrays["offset"])

    def forward() -> tuple[Any, Any]:
        y = cupy.empty(case.result_shape, np.float32)
        counts = cupy.empty(case.result_shape, np.float32)
        forward_kernel(grid, (THREADS,), (*inputs, y, counts, *numbers))
        return y, counts

    def both() -> dict[str, Any]:
        y, counts = forward()
        grads = {name: cupy.zeros(arrays[name].shape, np.float32) for name in ("x", "offset")}
        backward_kernel(
            grid, (THREADS,), (grad_y, counts, *inputs, grads["x"], grads["offset"], *numbers)
        )
        return {"y": y, **grads}

    return {FORWARD: lambda: forward()[0], BOTH: both}


def _shape(case: Pooling) -> Shape:
    return Shape(
        channels=case.channels,
        height=case.height,
        width=case.width,
        rois=case.rois,
        out_channels=case.result_shape[1],
        pooled=case.size,
        group=case.group_size,
        part=case.size,
        samples=case.options["sampling_ratio"],
        classes=case.classes,
        scale=float(case.scale),
        gamma=0.1,
    )
