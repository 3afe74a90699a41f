"""From a .cu file to a running kernel: the only place that compiles, launches or calls cuBLAS.

cupy is imported inside of the functions, which only run for cupy arrays.
"""

import contextlib
import contextvars
import functools
import math
import re
import threading
from collections.abc import Iterator
from importlib import resources
from typing import Any

import numpy as np

from deformable._array import Array, compute_dtype

CTYPE = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
}
THREADS = 256
GRID_MAX = 65535  # blocks along the second and third axis of a grid
LOAD_BYTES = 16  # that a thread loads at once, at most; what is allocated is aligned to them

_shared_memory = threading.Lock()
_precision = contextvars.ContextVar("float32_precision", default="highest")


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """What float32 products may be computed in on a GPU, within a ``with`` block.

    Every call looks at it for itself: that of a backward has to be within the block too.

    Parameters
    ----------
    precision : {"highest", "high"}
        ``"highest"``, the default, keeps float32; ``"high"`` lets tensor cores round the factors
        to TF32 (10 bits of mantissa; sums stay float32). On the CPU it changes nothing.

    Raises
    ------
    ValueError
        Any other word.

    Examples
    --------
    >>> import deformable
    >>> with deformable.float32_precision("high"):
    ...     pass  # calls on float32 cupy arrays may use TF32 here
    """
    if precision not in ("highest", "high"):
        raise ValueError(
            f"float32_precision: precision is {precision!r}, expected 'highest' or 'high'"
        )
    token = _precision.set(precision)
    try:
        yield
    finally:
        _precision.reset(token)


def allows_tf32() -> bool:
    """Whether float32 products may be computed with factors rounded to TF32."""
    return _precision.get() == "high"


# ---- compiling


@functools.cache
def source(file: str) -> str:
    """A kernel file with the project's own headers spliced in, each once.

    cupy caches compiled kernels by their text: it does not see a header on an include path.
    """
    seen: set[str] = set()

    def splice(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = resources.files("deformable").joinpath("cuda", name).read_text("utf-8")
        lines = []
        for number, line in enumerate(text.splitlines(), 1):
            include = re.fullmatch(r'#include "(.+)"', line)
            lines.append(f'{splice(include[1])}#line {number + 1} "{name}"' if include else line)
        return "\n".join([f'#line 1 "{name}"', *lines, ""])

    return splice(file)


@functools.cache
def _kernel(file: str, name: str, macros: tuple[tuple[str, Any], ...], device: int) -> Any:
    import cupy

    options = tuple(
        f"-D{key}={CTYPE[value.name] if isinstance(value, np.dtype) else value}"
        for key, value in sorted(macros)
    )
    return cupy.RawModule(code=source(file), options=options).get_function(name)


class Value(np.ndarray):
    """What a kernel gets by value.

    At every launch cupy asks where it lies, by an attribute that takes NumPy 8 µs for a struct.
    """

    @functools.cached_property
    def __array_interface__(self) -> dict[str, Any]:
        return super().__array_interface__


def struct(geometry: Any) -> np.ndarray:
    """A NamedTuple of numbers as a C struct of the same fields, to be passed by value.

    An int is ``int``, a float ``double``, a NumPy scalar what its dtype says.
    """
    kinds = {int: np.int32, float: np.float64}
    ctypes = [(f, kinds.get(type(v), type(v))) for f, v in geometry._asdict().items()]
    return np.array(tuple(geometry), np.dtype(ctypes, align=True)).view(Value)


class Launch:
    """Kernel ``name`` of ``cuda/file``, compiled for these macros, and how it is launched.

    It is called with arrays, any but the first of which may be None (a null pointer), and runs on
    the current stream. After their addresses the kernel gets ``values``: a NamedTuple (a struct by
    value) or an int (``long long``) each. A macro that is a dtype becomes its C type.

    It is all of a launch but the arrays: made once for calls of one kind, it is shared by them, and
    by all devices.
    """

    def __init__(
        self,
        file: str,
        name: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        *values: Any,
        shared: int = 0,
        **defines: Any,
    ) -> None:
        self.file, self.name = file, name
        self.grid, self.block, self.shared = grid, block, shared
        self.empty = 0 in grid  # cupy would run one block
        self.defines = tuple(defines.items())
        self.values = tuple(struct(v) if isinstance(v, tuple) else np.int64(v) for v in values)
        self.kernels: dict[int, Any] = {}  # by device

    def __call__(self, *arrays: Any) -> None:
        if self.empty:
            return
        device = arrays[0].data.device_id
        kernel = self.kernels.get(device) or self._compiled(device)
        kernel(self.grid, self.block, arrays + self.values, shared_mem=self.shared)

    def _compiled(self, device: int) -> Any:
        kernel = self.kernels[device] = _kernel(self.file, self.name, self.defines, device)
        if self.shared:
            _allow_shared(kernel, self.shared)
        return kernel


def _allow_shared(kernel: Any, size: int) -> None:
    """Let a kernel have so much shared memory; what other threads launch it with stays allowed.

    By default 48 KiB hold its static and its dynamic shared memory together, and the limit that it
    reports does not always leave room for the static part: so it is set whatever the size.
    """
    with _shared_memory:
        kernel.max_dynamic_shared_size_bytes = max(size, kernel.max_dynamic_shared_size_bytes)


def row_launch(file: str, name: str, rows: int, width: int, *values: Any, **defines: Any) -> Launch:
    """A launch of a thread row (threadIdx.y) per row of work.

    The lanes (threadIdx.x) of a thread row go through its ``width`` steps. They are a power of
    two, so that a thread row never straddles a warp.
    """
    lanes, per_block = row_block(width)
    return Launch(file, name, (-(-rows // per_block),), (lanes, per_block), *values, **defines)


def threads(count: int) -> tuple[tuple[int], tuple[int]]:
    """Grid and block for so many threads."""
    return (-(-count // THREADS),), (THREADS,)


def row_block(width: int) -> tuple[int, int]:
    """Block of threads for rows of ``width`` steps: lanes and thread rows, a power of 2 each."""
    lanes = min(32, 1 << (width - 1).bit_length())
    return lanes, THREADS // lanes


def vector_width(depth: int, *arrays: Array) -> int:
    """How many of ``depth`` channels one load takes: at most 16 bytes, aligned in all arrays."""
    return math.gcd(depth, *[vector(a) for a in arrays])


def vector(array: Array) -> int:
    """How many elements of an array one load from its beginning takes, at most."""
    return math.gcd(array.data.ptr, LOAD_BYTES) // array.itemsize


# ---- matrix products


def gemm(a: Array, b: Array, out: Array, accumulate: bool = False) -> None:
    """``out = a @ b`` or ``out += a @ b`` for batches (B, M, K) @ (B, K, N), by cuBLAS.

    ``a`` and ``b`` share a dtype; sums are float32 at least, also in half precision. ``out`` has
    that dtype or the one of the sums. Every matrix has unit stride along one of its axes,
    ``out`` along the last one.
    """
    from cupy.cuda import cublas, device, runtime

    if out.size == 0:
        return
    batch, m, k = a.shape
    n = b.shape[2]
    types = {
        "float16": runtime.CUDA_R_16F,
        "bfloat16": runtime.CUDA_R_16BF,
        "float32": runtime.CUDA_R_32F,
        "float64": runtime.CUDA_R_64F,
    }
    if a.dtype == np.float64:
        compute = cublas.CUBLAS_COMPUTE_64F
    elif a.dtype == np.float32 and allows_tf32():
        compute = cublas.CUBLAS_COMPUTE_32F_FAST_TF32
    else:
        compute = cublas.CUBLAS_COMPUTE_32F
    alpha, beta = (np.array(s, compute_dtype(a.dtype)) for s in (1, accumulate))
    # cuBLAS counts columns first: it computes outᵀ = bᵀ aᵀ
    op_a, step_a = _operand(a)
    op_b, step_b = _operand(b)
    cublas.gemmStridedBatchedEx(
        device.get_cublas_handle(), op_b, op_a, n, m, k, alpha.ctypes.data,
        b.data.ptr, types[b.dtype.name], step_b, b.strides[0] // b.itemsize,
        a.data.ptr, types[a.dtype.name], step_a, a.strides[0] // a.itemsize,
        beta.ctypes.data,
        out.data.ptr, types[out.dtype.name], _operand(out)[1], out.strides[0] // out.itemsize,
        batch, compute, cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip


def _operand(matrices: Array) -> tuple[int, int]:
    """How cuBLAS reads (B, M, N) ``matrices``: as they are or transposed, and the step."""
    from cupy.cuda import cublas

    _, rows, columns = matrices.shape
    _, row_step, column_step = (s // matrices.itemsize for s in matrices.strides)
    if column_step == 1 or columns == 1:
        return cublas.CUBLAS_OP_N, max(row_step, columns)
    return cublas.CUBLAS_OP_T, max(column_step, rows)
