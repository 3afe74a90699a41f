"""Images with their channels side by side, however they lie in memory."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable._arrange import channels_first, channels_last, cuda_rows
from tests.arrays import host
from tests.conftest import kernels
from tests.test_deform_conv import LAYOUTS, with_strides


@pytest.mark.parametrize("lay", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 70, 5, 9), (3, 32, 4, 16), (2, 1, 6, 5), (0, 4, 3, 3)])
def test_channels_lie_last(shape, lay, xp):
    x = np.random.default_rng(18).normal(size=shape).astype(np.float16)
    for given in xp.asarray(x), with_strides(xp, LAYOUTS[lay](x)):
        for dtype in np.float16, np.float32, np.float64:
            image = channels_last(given, np.dtype(dtype))
            assert image.dtype == dtype and image.flags.c_contiguous
            assert_array_equal(host(xp, image), x.transpose(0, 2, 3, 1))


def test_what_lies_channels_last_is_not_copied(xp):
    image = xp.ones((2, 5, 6, 4))
    again = channels_last(channels_first(image), image.dtype)
    assert xp.shares_memory(again, image)
    assert again.flags.c_contiguous


@pytest.mark.parametrize(
    ("groups", "classes", "copied"), [(1, 2, False), (4, 1, False), (2, 1, True)]
)
def test_rows_that_lie_together_are_not_copied(groups, classes, copied):
    with kernels("forward"):
        import cupy

        image = cupy.arange(24, dtype=np.float32).reshape(1, 3, 2, 4)
        depth = 4 // (groups * classes)
        rows = cuda_rows(channels_first(image), groups, classes, depth, image.dtype)
        assert cupy.shares_memory(rows, image) != copied
        by_group = image.reshape(6, classes * depth, groups).transpose(0, 2, 1)
        assert_array_equal(rows.get(), by_group.get().reshape(-1, depth))


@pytest.mark.parametrize("lay", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups", "depth", "pitch"),
    [
        ((2, 70, 5, 9), 1, 70, 70),
        ((2, 36, 6, 6), 4, 3, 4),
        ((1, 90, 7, 5), 2, 45, 48),
        ((3, 8, 1, 1), 1, 8, 8),
        ((2, 33, 4, 8), 1, 33, 33),
        ((2, 64, 3, 3), 1, 64, 64),
        ((0, 4, 3, 3), 2, 2, 2),
        ((2, 4, 0, 3), 1, 4, 4),
    ],
)
def test_rows_for_kernels_hold_what_is_seen_together(shape, groups, depth, pitch, lay, xp):
    if xp is np:
        pytest.skip("is for kernels")
    x = np.random.default_rng(18).normal(size=shape).astype(np.float16)
    n, c, h, w = shape
    classes = c // (groups * depth)
    want = np.zeros((n, h, w, groups, classes, pitch), np.float32)
    split = x.reshape(n, classes, depth, groups, h, w)
    want[..., :depth] = split.transpose(0, 4, 5, 3, 1, 2)
    for given in xp.asarray(x), with_strides(xp, LAYOUTS[lay](x)):
        for dtype in np.float16, np.float32:
            rows = cuda_rows(given, groups, classes, pitch, np.dtype(dtype))
            assert rows.dtype == dtype and rows.flags.c_contiguous
            assert_array_equal(host(xp, rows), want.reshape(-1, pitch))
