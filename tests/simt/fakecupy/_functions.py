"""The functions of the module cupy: NumPy's, with CuPy's parameters and CuPy's refusals."""

import sys

import numpy as np

from tests.simt.fakecupy import _memory, _sync
from tests.simt.fakecupy._ndarray import (
    LOW_PRECISION,
    SUMS,
    allocate,
    allocate_like,
    checked,
    is_native,
    native,
    reduction,
    unwrap,
    wrap,
)

CONSTANTS = [
    *("bool_", "complex64", "complex128", "dtype", "e", "finfo", "float16", "float32", "float64"),
    *("iinfo", "inf", "int8", "int16", "int32", "int64", "integer", "nan", "newaxis", "number"),
    *("floating", "pi", "promote_types", "uint8", "uint16", "uint32", "uint64", "broadcast_shapes"),
]
UFUNCS = [
    *("abs", "absolute", "add", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2"),
    *("arctanh", "bitwise_and", "bitwise_or", "bitwise_xor", "ceil", "conj", "conjugate"),
    *("copysign", "cos", "cosh", "divide", "equal", "exp", "exp2", "expm1", "fabs", "floor"),
    *("floor_divide", "fmax", "fmin", "fmod", "greater", "greater_equal", "hypot", "invert"),
    *("isfinite", "isinf", "isnan", "ldexp", "left_shift", "less", "less_equal", "log", "log10"),
    *("log1p", "log2", "logaddexp", "logical_and", "logical_not", "logical_or", "logical_xor"),
    *("maximum", "minimum", "mod", "multiply", "negative", "nextafter", "not_equal", "power"),
    *("reciprocal", "remainder", "right_shift", "rint", "sign", "signbit", "sin", "sinh", "sqrt"),
    *("square", "subtract", "tan", "tanh", "true_divide", "trunc"),
]
FUNCTIONS = {
    "all": "a, axis=None, out=None, keepdims=False",
    "any": "a, axis=None, out=None, keepdims=False",
    "argmax": "a, axis=None, dtype=None, out=None, keepdims=False",
    "argmin": "a, axis=None, dtype=None, out=None, keepdims=False",
    "argsort": "a, axis=-1, kind=None",
    "broadcast_arrays": "*args",
    "broadcast_to": "array, shape",
    "clip": "a, a_min, a_max, out=None",
    "concatenate": "tup, axis=0, out=None, *, dtype=None, casting='same_kind'",
    "cumprod": "a, axis=None, dtype=None, out=None",
    "cumsum": "a, axis=None, dtype=None, out=None",
    "diagonal": "a, offset=0, axis1=0, axis2=1",
    "diff": "a, n=1, axis=-1",
    "expand_dims": "a, axis",
    "flip": "a, axis=None",
    "max": "a, axis=None, out=None, keepdims=False",
    "min": "a, axis=None, out=None, keepdims=False",
    "moveaxis": "a, source, destination",
    "pad": "array, pad_width, mode='constant', **kwargs",
    "ravel": "a, order='C'",
    "repeat": "a, repeats, axis=None",
    "reshape": "a, newshape, order='C'",
    "roll": "a, shift, axis=None",
    "searchsorted": "a, v, side='left', sorter=None",
    "sort": "a, axis=-1, kind=None",
    "split": "ary, indices_or_sections, axis=0",
    "squeeze": "a, axis=None",
    "stack": "tup, axis=0, out=None, *, dtype=None, casting='same_kind'",
    "swapaxes": "a, axis1, axis2",
    "take": "a, indices, axis=None, out=None",
    "take_along_axis": "a, indices, axis",
    "tile": "A, reps",
    "transpose": "a, axes=None",
    "tril": "m, k=0",
    "triu": "m, k=0",
    "where": "condition, x, y",
}


def ufunc(name):
    function = getattr(np, name)
    inputs = ", ".join(f"x{i}" for i in range(function.nin))
    return checked(function, f"{inputs}, /, *, out=None, casting='same_kind', dtype=None")


# ---- making arrays


def empty(shape, dtype=float, order="C"):
    return native(allocate(shape, dtype, order))


def full(shape, fill_value, dtype=None, order="C"):
    if dtype is None:
        dtype = np.asarray(unwrap(fill_value)).dtype
    out = empty(shape, dtype, order)
    out[...] = fill_value
    return out


def zeros(shape, dtype=float, order="C"):
    out = empty(shape, dtype, order)
    if out.nbytes <= _memory.LAZY:
        out.fill(0)
    return out


def ones(shape, dtype=float, order="C"):
    return full(shape, 1, dtype or float, order)


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    return native(
        allocate_like(np.empty_like(_host(prototype), dtype, order=order or "K", shape=shape))
    )


def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    return full_like(a, 0, dtype, order, subok, shape)


def ones_like(a, dtype=None, order="K", subok=None, shape=None):
    return full_like(a, 1, dtype, order, subok, shape)


def full_like(a, fill_value, dtype=None, order="K", subok=None, shape=None):
    out = empty_like(a, dtype, order, subok, shape)
    out[...] = fill_value
    return out


def array(obj, dtype=None, copy=True, order="K"):
    if is_native(obj):
        if not copy and _has(obj, dtype):
            return obj
        with np.errstate(all="ignore"):  # a GPU does not warn
            return wrap(np.array(obj._host, dtype, order=order))
    if isinstance(obj, list | tuple) and any(is_native(x) for x in obj):
        obj = [_host(x) for x in obj]
    if order in ("K", "A"):  # what comes from the host keeps no other order than these
        order = "F" if isinstance(obj, np.ndarray) and obj.flags.fnc else "C"
    return wrap(np.array(obj, dtype, order=order))


def _has(a, dtype):
    """Whether ``a`` has the dtype, if one is asked for: to NumPy float64 and None are equal."""
    return dtype is None or a.dtype == dtype


def asarray(a, dtype=None, order=None):
    if is_native(a) and _has(a, dtype) and order is None:
        return a
    return array(a, dtype, order=order or "K")


def ascontiguousarray(a, dtype=None):
    with np.errstate(all="ignore"):
        host = np.ascontiguousarray(_host(a), dtype)
    return a if host is a._host else wrap(host)


def arange(start, stop=None, step=1, dtype=None):
    limits = (0, start) if stop is None else (start, stop)
    return wrap(np.arange(*limits, step, dtype))


def linspace(start, stop, num=50, endpoint=True, retstep=False, dtype=None, axis=0):
    return wrap(np.linspace(start, stop, num, endpoint, retstep, dtype, axis))


def eye(N, M=None, k=0, dtype=float, order="C"):
    return wrap(np.eye(N, M, k, dtype, order))


def copyto(dst, src, casting="same_kind", where=None):
    np.copyto(_host(dst), unwrap(src), casting, True if where is None else _host(where))


def _host(a):
    if not is_native(a):
        raise TypeError(f"Unsupported type {type(a)}")
    return unwrap(a)


# ---- products, which sum float16 and bfloat16 in float32


def matmul(x1, x2, /, out=None):
    return _product(np.matmul, x1, x2, out=out)


def dot(a, b, out=None):
    return _product(np.dot, a, b, out=out)


def tensordot(a, b, axes=2):
    return _product(lambda x, y: np.tensordot(x, y, axes), a, b)


def einsum(subscripts, *operands, optimize=False):
    return _product(lambda *hosts: np.einsum(subscripts, *hosts, optimize=optimize), *operands)


def _product(function, *operands, out=None):
    hosts = [_host(x) for x in operands]
    dtype = np.result_type(*hosts)
    if dtype.name in LOW_PRECISION:
        if function is np.matmul and {*hosts[0].shape[:-1], *hosts[1].shape[1:]} <= {1}:
            a, b = hosts  # CuPy rounds the products of a result of one number
            with np.errstate(all="ignore"):
                hosts = [(a.ravel() * b.ravel()).reshape(a.shape), np.ones_like(b)]
        hosts = [x.astype(np.float32) for x in hosts]
    with np.errstate(all="ignore"):
        result = np.asarray(function(*hosts)).astype(dtype, copy=False)
    if out is None:
        return wrap(result)
    out._host[...] = result
    return out


# ---- waiting for the device


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get(stream, order, out) if is_native(a) else np.asarray(a, order=order)


def waiting(name, parameters):
    function = checked(getattr(np, name), parameters)

    def call(*args, **kwargs):
        _sync.declare(name)
        return function(*args, **kwargs)

    call.__name__, call.__signature__ = name, function.__signature__
    return call


WAITING = {
    "argwhere": "a",
    "bincount": "x, weights=None, minlength=0",
    "flatnonzero": "a",
    "nonzero": "a",
    "unique": "ar, return_index=False, return_inverse=False, return_counts=False",
}

# ---- the rest


def allclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=False):
    return wrap(np.asarray(np.allclose(_host(a), _host(b), rtol, atol, equal_nan)))


def array_equal(a1, a2):
    return wrap(np.asarray(np.array_equal(_host(a1), _host(a2))))


def get_array_module(*args):
    return sys.modules["tests.simt.fakecupy"] if any(map(is_native, args)) else np


def result_type(*arrays_and_dtypes):
    return np.result_type(*unwrap(arrays_and_dtypes))


def may_share_memory(a, b, max_work=None):
    return np.may_share_memory(_host(a), _host(b))


def shares_memory(a, b, max_work=None):
    return np.shares_memory(_host(a), _host(b))


def ndim(a):
    return a.ndim


def is_available():
    """No GPU is here."""
    return False


class MemoryPool:
    def used_bytes(self):
        return _memory.used

    def total_bytes(self):
        return _memory.used

    def free_all_blocks(self, stream=None):
        pass


def get_default_memory_pool():
    return MemoryPool()


def namespace():
    """Every public function by its name."""
    names = {name: getattr(np, name) for name in CONSTANTS}
    names |= {name: ufunc(name) for name in UFUNCS}
    names |= {name: checked(getattr(np, name), text) for name, text in FUNCTIONS.items()}
    names |= {name: reduction(getattr(np, name), text) for name, text in SUMS.items()}
    names |= {name: waiting(name, text) for name, text in WAITING.items()}
    for function in (
        *(allclose, arange, array, array_equal, asarray, ascontiguousarray, asnumpy, copyto, dot),
        *(einsum, empty, empty_like, eye, full, full_like, get_array_module),
        *(get_default_memory_pool, is_available, linspace, matmul, may_share_memory, ndim, ones),
        *(ones_like, result_type, shares_memory, tensordot, zeros, zeros_like),
    ):
        names[function.__name__] = function
    return names
