"""cupy.cuda.cublas: the matrix products that the library calls, with cuBLAS's own rules checked.

Matrices are column-major: the element (row, column) lies ``row + column * ld`` elements behind the
pointer.
"""

import ctypes

import numpy as np

from tests.simt.fakecupy import _memory
from tests.simt.fakecupy._current import current, note
from tests.simt.fakecupy.cuda import device
from tests.simt.fakecupy.cuda.runtime import CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F, CUDA_R_64F

CUBLAS_OP_N = 0
CUBLAS_OP_T = 1
CUBLAS_GEMM_DEFAULT = -1
CUBLAS_COMPUTE_32F = 68
CUBLAS_COMPUTE_32F_PEDANTIC = 69
CUBLAS_COMPUTE_64F = 70
CUBLAS_COMPUTE_32F_FAST_TF32 = 77

LEGAL = {  # compute type: its (A and B, C) types
    CUBLAS_COMPUTE_32F: {
        (CUDA_R_16F, CUDA_R_16F),
        (CUDA_R_16F, CUDA_R_32F),
        (CUDA_R_16BF, CUDA_R_16BF),
        (CUDA_R_16BF, CUDA_R_32F),
        (CUDA_R_32F, CUDA_R_32F),
    },
    CUBLAS_COMPUTE_32F_FAST_TF32: {(CUDA_R_32F, CUDA_R_32F)},
    CUBLAS_COMPUTE_64F: {(CUDA_R_64F, CUDA_R_64F)},
}
LEGAL[CUBLAS_COMPUTE_32F_PEDANTIC] = LEGAL[CUBLAS_COMPUTE_32F]


class CUBLASError(RuntimeError):
    """A call that cuBLAS would refuse, or that would touch memory outside an allocation."""


def gemmEx(
    handle,
    transa,
    transb,
    m,
    n,
    k,
    alpha,
    A,
    Atype,
    lda,
    B,
    Btype,
    ldb,
    beta,
    C,
    Ctype,
    ldc,
    computeType,
    algo,
):
    """C = alpha op(A) op(B) + beta C with op(A) (m, k), op(B) (k, n)."""
    gemmStridedBatchedEx(
        *(handle, transa, transb, m, n, k, alpha, A, Atype, lda, 0, B, Btype, ldb, 0),
        *(beta, C, Ctype, ldc, 0, 1, computeType, algo),
    )


def gemmStridedBatchedEx(
    handle,
    transa,
    transb,
    m,
    n,
    k,
    alpha,
    A,
    Atype,
    lda,
    strideA,
    B,
    Btype,
    ldb,
    strideB,
    beta,
    C,
    Ctype,
    ldc,
    strideC,
    batchCount,
    computeType,
    algo,
):
    """The same for a batch, whose matrices lie ``stride`` elements apart."""
    for name, value in locals().items():
        if type(value) is not int:
            raise TypeError(f"gemm: {name} is {type(value).__name__}, expected int")
    if handle != device.get_cublas_handle():
        raise CUBLASError(f"gemm: {handle} is no handle of device {current.device}")
    _check(
        computeType in LEGAL and algo == CUBLAS_GEMM_DEFAULT, "unknown compute type or algorithm"
    )
    _check(Atype == Btype and (Atype, Ctype) in LEGAL[computeType], "illegal combination of types")
    _check({transa, transb} <= {CUBLAS_OP_N, CUBLAS_OP_T}, "unknown operation")
    for name, value in zip(("m", "n", "k", "batchCount"), (m, n, k, batchCount), strict=True):
        _check(0 <= value < 2**31, f"{name} is {value}")
    for name, stride in (("strideA", strideA), ("strideB", strideB), ("strideC", strideC)):
        _check(stride >= 0, f"{name} is {stride}")
    _check(batchCount <= 1 or strideC > 0, "all results of the batch lie in one place")
    if 0 in (m, n, batchCount):
        return

    note("gemm")
    sums = np.float64 if computeType == CUBLAS_COMPUTE_64F else np.float32
    scale_a, scale_c = (ctypes.c_double if sums == np.float64 else ctypes.c_float for _ in range(2))
    alpha, beta = scale_a.from_address(alpha).value, scale_c.from_address(beta).value
    a = _matrices("A", A, Atype, (m, k), transa, lda, strideA, batchCount)
    b = _matrices("B", B, Btype, (k, n), transb, ldb, strideB, batchCount)
    c = _matrices("C", C, Ctype, (m, n), CUBLAS_OP_N, ldc, strideC, batchCount)
    a, b = a.astype(sums), b.astype(sums)
    if computeType == CUBLAS_COMPUTE_32F_FAST_TF32:
        a, b = _to_tf32(a), _to_tf32(b)
    with np.errstate(all="ignore"):
        result = sums(alpha) * (a @ b)
        if beta:  # otherwise C is not read, and may hold NaN
            result += sums(beta) * c.astype(sums)
        c[...] = result.astype(c.dtype)


def _check(condition, text):
    if not condition:
        raise CUBLASError(f"CUBLAS_STATUS_INVALID_VALUE: {text}")


def _matrices(name, pointer, kind, shape, operation, ld, stride, batch):
    """(batch, *shape): op of the column-major matrices at a pointer into device memory."""
    rows, columns = shape if operation == CUBLAS_OP_N else shape[::-1]
    _check(ld >= max(1, rows), f"ld{name.lower()} is {ld}, {name} has {rows} rows")
    dtype = _dtype(kind)
    size = 0
    if rows and columns:
        size = ((batch - 1) * stride + (columns - 1) * ld + rows) * dtype.itemsize
    room = _memory.room(pointer)
    if size and (room is None or room < size or pointer % dtype.itemsize):
        raise CUBLASError(
            f"gemm: {name} takes {size} bytes, {room or 0} lie between its pointer and the end of "
            "the allocation"
        )
    if size and _memory.device(pointer) != current.device:
        raise CUBLASError(f"gemm: {name} lies on device {_memory.device(pointer)}")
    raw = np.frombuffer((ctypes.c_char * size).from_address(pointer), np.uint8)
    strides = (stride * dtype.itemsize, dtype.itemsize, ld * dtype.itemsize)
    matrices = np.lib.stride_tricks.as_strided(raw.view(dtype), (batch, rows, columns), strides)
    return matrices if operation == CUBLAS_OP_N else matrices.transpose(0, 2, 1)


def _dtype(kind):
    if kind == CUDA_R_16BF:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    names = {CUDA_R_16F: np.float16, CUDA_R_32F: np.float32, CUDA_R_64F: np.float64}
    return np.dtype(names[kind])


def _to_tf32(x):
    """Rounded to 10 bits of mantissa, to nearest, ties away from zero; inf and NaN stay."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)
