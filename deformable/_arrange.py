"""How images lie in memory: what is called (N, C, H, W) is read with its channels side by side.

An image that lies so already is used as it is. Others are copied, on a GPU by ``cuda/arrange.cu``.
"""

import functools
from typing import NamedTuple

import numpy as np

from deformable import _cuda
from deformable._array import CALLS, Array, array_module

SIDE = 32  # pixels, and channels, that a block copies


def channels_last(x: Array, dtype: np.dtype) -> Array:
    """The (N, C, H, W) image as a contiguous (N, H, W, C) array; no copy if it lies so already."""
    xp, nhwc = array_module(x), x.transpose(0, 2, 3, 1)
    if x.dtype == dtype and nhwc.flags.c_contiguous:
        return nhwc
    out = xp.empty(nhwc.shape, dtype)
    if xp is np:
        fill_channels_last(out, x)
    else:
        _launch(1, 1, x.shape[1], dtype, x.shape, x.strides, x.dtype)(x, out)
    return out


def channels_first(x: Array) -> Array:
    """The (N, H, W, C) array seen as (N, C, H, W): a view."""
    return x.transpose(0, 3, 1, 2)


def fill_channels_last(out: np.ndarray, x: np.ndarray) -> None:
    """Copy the (N, C, H, W) image ``x`` into the (N, H, W, C) array ``out``, of any dtype.

    Channels that are a power of two apart share a few lines of the cache; so few of them are
    copied at a time then that all stay there.
    """
    step = 8 if x.strides[1] % 512 == 0 else x.shape[1]
    for c in range(0, x.shape[1], step):
        out[..., c : c + step] = x[:, c : c + step].transpose(0, 2, 3, 1)


def cuda_rows(array: Array, groups: int, classes: int, pitch: int, dtype: np.dtype) -> Array:
    """The (N, C, H, W) array as rows (N · H · W · groups · classes, depth), zeros up to ``pitch``.

    Channel (class · depth + d) · groups + group is channel d of a row. It is a copy unless the
    array lies so already, as channels-last memory of one group, or of one channel each, does.
    """
    n, c, h, w = array.shape
    shape = n * h * w * groups * classes, pitch
    nhwc = array.transpose(0, 2, 3, 1)
    in_order = c == groups * classes * pitch and 1 in (groups, classes * pitch)
    if in_order and array.dtype == dtype and nhwc.flags.c_contiguous:
        return nhwc.reshape(shape)
    rows = array_module(array).empty(shape, dtype)
    _launch(groups, classes, pitch, dtype, array.shape, array.strides, array.dtype)(array, rows)
    return rows


class Layout(NamedTuple):
    """An (N, C, H, W) array, and the rows of its channels that are seen together."""

    images: int
    channels: int
    height: int
    width: int
    groups: int
    depth: int
    pitch: int
    step_image: np.int64
    step_channel: np.int64
    step_y: np.int64
    step_x: np.int64


@functools.lru_cache(maxsize=CALLS)
def _launch(
    groups: int,
    classes: int,
    pitch: int,
    dtype: np.dtype,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int, int],
    given: np.dtype,
) -> _cuda.Launch:
    """The launch that copies an array ``given`` in this dtype into rows."""
    n, c, h, w = shape
    depth = c // (groups * classes)
    layout = Layout(
        n, c, h, w, groups, depth, pitch, *(np.int64(s // given.itemsize) for s in strides)
    )
    row = classes * pitch
    blocks = n * -(-h * w // SIDE) * groups * -(-row // SIDE)
    return _cuda.Launch(
        "arrange.cu", "arrange", (blocks,), (SIDE, min(row, 8)), layout,
        DTYPE=dtype, FROM=given, INDEX="int", VEC=1, SIDE=SIDE,
    )  # fmt: skip
