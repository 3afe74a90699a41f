"""The launch and product helpers of _cuda.py, against NumPy, in simulation or on a GPU."""

import collections

import numpy as np
import pytest

from deformable import _cuda, conv2d, conv2d_backward, float32_precision
from deformable.testing import error_bound
from tests.arrays import host
from tests.conftest import ORDERS, kernels


@pytest.fixture(params=ORDERS)
def xp(request):
    """cupy alone: NumPy has no part in this module."""
    with kernels(request.param.partition("-")[2] or "forward"):
        import cupy

        yield cupy


def products(xp, dtype, batch, m, k, n, rng):
    a = rng.normal(size=(batch, m, k)).astype(dtype)
    b = rng.normal(size=(batch, k, n)).astype(dtype)
    return a, b, np.abs(a.astype(float)) @ np.abs(b.astype(float))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 5, 3, 7), (3, 1, 4, 1), (2, 6, 1, 5), (1, 1, 1, 1)])
@pytest.mark.parametrize("transposed", ["neither", "a", "b", "both"])
def test_gemm_reads_every_orientation(dtype, shape, transposed, xp):
    batch, m, k, n = shape
    a, b, size = products(xp, dtype, batch, m, k, n, np.random.default_rng(0))

    def laid(matrices, flipped):
        if not flipped:
            return xp.asarray(matrices)
        return xp.asarray(np.ascontiguousarray(matrices.transpose(0, 2, 1))).transpose(0, 2, 1)

    out = xp.empty((batch, m, n), dtype)
    _cuda.gemm(laid(a, transposed in ("a", "both")), laid(b, transposed in ("b", "both")), out)
    error = np.abs(host(xp, out).astype(float) - a.astype(float) @ b.astype(float))
    assert (error <= error_bound(dtype, size, terms=k)).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_gemm_accumulates_in_the_dtype_of_sums(dtype, xp):
    a, b, size = products(xp, dtype, 2, 4, 9, 3, np.random.default_rng(1))
    out = xp.ones((2, 4, 3), np.float32)
    _cuda.gemm(xp.asarray(a), xp.asarray(b), out, accumulate=True)
    error = np.abs(host(xp, out) - (1 + a.astype(float) @ b.astype(float)))
    assert (error <= error_bound(np.float32, 1 + size, terms=10)).all()


def test_gemm_writes_into_a_slice_of_the_last_axis(xp):
    """As for groups: the products of each stand side by side."""
    a, b, _ = products(xp, np.float64, 2, 4, 3, 5, np.random.default_rng(2))
    rows = xp.zeros((4, 10))
    _cuda.gemm(xp.asarray(a), xp.asarray(b), rows.reshape(4, 2, 5).transpose(1, 0, 2))
    error = np.abs(host(xp, rows) - np.concatenate(a @ b, axis=1))
    assert error.max() <= 1e-14


def test_high_precision_allows_tf32_and_highest_does_not(xp):
    """1 + 2^-12 has more bits than TF32 keeps."""
    a = xp.full((1, 16, 16), 1 + 2.0**-12, np.float32)
    b = xp.asarray(np.eye(16, dtype=np.float32)[None])
    out = xp.empty((1, 16, 16), np.float32)
    _cuda.gemm(a, b, out)
    assert host(xp, out)[0, 0, 0] == np.float32(1 + 2.0**-12)
    with float32_precision("high"):
        _cuda.gemm(a, b, out)
    assert abs(host(xp, out)[0, 0, 0] - 1) <= 2.0**-10
    _cuda.gemm(a, b, out)
    assert host(xp, out)[0, 0, 0] == np.float32(1 + 2.0**-12)


def test_precision_is_one_of_two_words():
    with pytest.raises(ValueError, match="precision is 'tf32', expected 'highest' or 'high'"):
        float32_precision("tf32").__enter__()


@pytest.mark.parametrize(
    ("depth", "start", "width"), [(8, 0, 4), (6, 0, 2), (7, 0, 1), (8, 1, 1), (8, 2, 2)]
)
def test_vectors_divide_the_depth_and_are_aligned(depth, start, width, xp):
    array = xp.zeros(64, np.float32)[start:]
    assert _cuda.vector_width(depth, array) == width


@pytest.mark.parametrize("width", [1, 2, 3, 5, 32, 33, 1000])
def test_thread_rows_never_straddle_a_warp(width):
    lanes, rows = _cuda.row_block(width)
    assert lanes * rows == _cuda.THREADS
    assert 32 % lanes == 0 and (lanes >= min(width, 32))


SHARED = """
#include "ptx.cuh"
extern "C" __global__ void __launch_bounds__(32) probe(float* out) {
  DYN_SHARED(float, room);
  room[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = room[31 - threadIdx.x];
}
"""


def test_a_launch_with_less_shared_memory_takes_none_from_others(xp, monkeypatch):
    """Threads that launch one kernel with two sizes would otherwise forbid each other's."""
    probe = SHARED.replace('#include "ptx.cuh"', _cuda.source("ptx.cuh"))
    monkeypatch.setattr(_cuda, "source", lambda file: probe)
    out = xp.empty(32, np.float32)
    for size in 60 << 10, 50 << 10:
        _cuda.Launch("probe.cu", "probe", (1,), (32,), shared=size)(out)
        assert host(xp, out)[0] == 31
    kernel = _cuda._kernel("probe.cu", "probe", (), xp.cuda.runtime.getDevice())
    assert kernel.max_dynamic_shared_size_bytes >= 60 << 10


def test_cupy_finds_a_value_at_once():
    """Where a struct lies, NumPy works out anew every time, together with all of its fields."""
    geometry = collections.namedtuple("Geometry", ["count", "scale"])(3, 0.5)
    launch = _cuda.Launch("any.cu", "any", (1,), (32,), geometry, 7)
    value, number = launch.values
    assert value.__array_interface__ is value.__array_interface__
    assert value.__array_interface__["data"][0] == value.ctypes.data
    assert (value["count"], value["scale"], number) == (3, 0.5, 7)


# ---- what is kept of a call serves the next one, if that is of its kind


def identity(xp, images):
    """Results of a convolution that leaves channels as they are, to the bit in float32."""
    weight = xp.asarray(np.eye(16, dtype=np.float32).reshape(16, 16, 1, 1))
    return conv2d(images, weight), conv2d_backward(images, images, weight, wrt=["x"]).x


def test_the_next_call_may_have_another_precision(xp):
    """1 + 2^-12 has more bits than TF32 keeps."""
    images = xp.full((1, 16, 3, 5), 1 + 2.0**-12, np.float32)
    for precision in "highest", "high", "highest":
        with float32_precision(precision):
            for result in identity(xp, images):
                exact = bool((host(xp, result) == host(xp, images)).all())
                assert exact == (precision == "highest")


def test_the_next_call_may_have_arrays_that_are_less_aligned(xp):
    rng = np.random.default_rng(3)
    values = rng.integers(-8, 9, (1, 3, 5, 16)).astype(np.float32)
    memory = xp.zeros(values.size + 4, np.float32)
    for start in 0, 1, 2, 0:
        rows = memory[start : start + values.size].reshape(values.shape)
        rows[...] = xp.asarray(values)
        for result in identity(xp, rows.transpose(0, 3, 1, 2)):
            assert (host(xp, result) == values.transpose(0, 3, 1, 2)).all()
