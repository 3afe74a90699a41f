"""A substitute for cupy where there is no GPU: what the library uses of it, over NumPy.

It is stricter than cupy: only the names, methods and parameters listed here exist, and what cupy
refuses is refused. Kernels run in the simulator.
"""

import sys

import numpy as np
from numpy import (  # noqa: F401
    bool_,
    broadcast_shapes,
    e,
    euler_gamma,
    finfo,
    float16,
    float32,
    float64,
    iinfo,
    inf,
    int8,
    int16,
    int32,
    int64,
    nan,
    newaxis,
    pi,
    promote_types,
    uint8,
    uint16,
    uint32,
    uint64,
)

from tests.simt.fakecupy import _memory, _sync, cuda, lib
from tests.simt.fakecupy._ndarray import LOW_PRECISION, checked, empty, is_native, ndarray, wrap
from tests.simt.fakecupy._ndarray import _native as _native
from tests.simt.module import RawModule

dtype = np.dtype

__all__ = ["RawModule", "cuda", "empty", "lib", "ndarray"]

UFUNCS = """
    abs absolute add arccos arccosh arcsin arcsinh arctan arctan2 arctanh bitwise_and bitwise_or
    bitwise_xor ceil conj conjugate copysign cos cosh divide equal exp exp2 expm1 fabs floor
    floor_divide fmax fmin fmod frexp greater greater_equal hypot invert isfinite isinf isnan ldexp
    left_shift less less_equal log log10 log1p log2 logaddexp logical_and logical_not logical_or
    logical_xor maximum minimum mod modf multiply negative nextafter not_equal power reciprocal
    remainder right_shift rint sign signbit sin sinh sqrt square subtract tan tanh true_divide trunc
""".split()  # noqa: SIM905

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
    "diff": "a, n=1, axis=-1, prepend=None, append=None",
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
    "std": "a, axis=None, dtype=None, out=None, ddof=0, keepdims=False",
    "swapaxes": "a, axis1, axis2",
    "take": "a, indices, axis=None, out=None, mode='wrap'",
    "take_along_axis": "a, indices, axis",
    "tile": "A, reps",
    "transpose": "a, axes=None",
    "tril": "m, k=0",
    "triu": "m, k=0",
    "var": "a, axis=None, dtype=None, out=None, ddof=0, keepdims=False",
    "where": "condition, x, y",
}


def _ufunc(name):
    function = checked(getattr(np, name), "*args, out=None, dtype=None, casting='same_kind'")
    function.at = function.outer = function.reduce = _refuse(name)
    return function


def _refuse(name):
    def refuse(*args, **kwargs):
        raise NotImplementedError(f"the substitute cupy has no methods of {name}")

    return refuse


for _name in UFUNCS:
    globals()[_name] = _ufunc(_name)
for _name, _parameters in FUNCTIONS.items():
    globals()[_name] = checked(getattr(np, _name), _parameters)


# ---- making arrays


def array(obj, dtype=None, copy=True, order="K", ndmin=0):
    if is_native(obj):
        same = not copy and _is(obj, dtype) and obj.ndim >= ndmin
        with np.errstate(all="ignore"):
            return obj if same else wrap(np.array(obj._host, dtype, order=order, ndmin=ndmin))
    if isinstance(obj, list | tuple) and any(is_native(x) for x in obj):
        obj = [x._host if is_native(x) else x for x in obj]
    return wrap(np.array(obj, dtype, order=order, ndmin=ndmin))


def _is(a, dtype):
    """Whether ``a`` has the dtype, if one is asked for; NumPy's float64 equals None."""
    return dtype is None or a.dtype == dtype


def asarray(a, dtype=None, order=None):
    if is_native(a) and _is(a, dtype) and order is None:
        return a
    return array(a, dtype, order=order or "K")


def asanyarray(a, dtype=None, order=None):
    return asarray(a, dtype, order)


def ascontiguousarray(a, dtype=None):
    if not is_native(a):
        raise TypeError(f"Argument 'a' has incorrect type (got {type(a).__name__})")
    if a.ndim and a.flags.c_contiguous and _is(a, dtype):
        return a
    with np.errstate(all="ignore"):
        return wrap(np.ascontiguousarray(a._host, dtype))


def arange(start, stop=None, step=1, dtype=None):
    return wrap(np.arange(*((start, stop) if stop is not None else (0, start)), step, dtype))


def linspace(start, stop, num=50, endpoint=True, retstep=False, dtype=None, axis=0):
    return wrap(np.linspace(start, stop, num, endpoint, retstep, dtype, axis))


def eye(N, M=None, k=0, dtype=float, order="C"):
    return wrap(np.eye(N, M, k, dtype, order))


def full(shape, fill_value, dtype=None, order="C"):
    if dtype is None:
        dtype = fill_value.dtype if hasattr(fill_value, "dtype") else np.array(fill_value).dtype
    out = empty(shape, dtype, order)
    out[...] = fill_value
    return out


def zeros(shape, dtype=float, order="C"):
    out = empty(shape, dtype, order)
    if out.nbytes <= _memory.POISON_LIMIT:  # what is larger has never been touched: it is zero
        out.fill(0)
    return out


def ones(shape, dtype=float, order="C"):
    return full(shape, 1, dtype or float, order)


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    like = np.empty_like(_host_of(prototype), dtype, order=order, shape=shape)
    from tests.simt.fakecupy._ndarray import _allocate_like

    return _native(_allocate_like(like))


def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    out = empty_like(a, dtype, order, subok, shape)
    out.fill(0)
    return out


def ones_like(a, dtype=None, order="K", subok=None, shape=None):
    out = empty_like(a, dtype, order, subok, shape)
    out.fill(1)
    return out


def full_like(a, fill_value, dtype=None, order="K", subok=None, shape=None):
    out = empty_like(a, dtype, order, subok, shape)
    out[...] = fill_value
    return out


def _host_of(a):
    if not is_native(a):
        raise TypeError(f"Unsupported type {type(a)}")
    return a._host


def copyto(dst, src, casting="same_kind", where=None):
    where = True if where is None else _host_of(where)
    np.copyto(_host_of(dst), src._host if is_native(src) else src, casting, where)


# ---- sums and products: float16 and bfloat16 are summed in float32


def sum(a, axis=None, dtype=None, out=None, keepdims=False):
    return a.sum(axis, dtype, out, keepdims)


def mean(a, axis=None, dtype=None, out=None, keepdims=False):
    return a.mean(axis, dtype, out, keepdims)


def prod(a, axis=None, dtype=None, out=None, keepdims=False):
    return a.prod(axis, dtype, out, keepdims)


def _product(name, operands, *args, out=None, **kwargs):
    hosts = [_host_of(x) for x in operands]
    kind = np.result_type(*hosts)
    if kind.name in LOW_PRECISION:
        hosts = [x.astype(np.float32) for x in hosts]
    leading = [args[0]] if name == "einsum" else []
    with np.errstate(all="ignore"):
        result = getattr(np, name)(*leading, *hosts, *args[len(leading) :], **kwargs)
        result = np.asarray(result).astype(kind, copy=False)
    if out is None:
        return wrap(result)
    out._host[...] = result
    return out


def matmul(x1, x2, out=None):
    return _product("matmul", (x1, x2), out=out)


def dot(a, b, out=None):
    return _product("dot", (a, b), out=out)


def tensordot(a, b, axes=2):
    return _product("tensordot", (a, b), axes)


def einsum(subscripts, *operands, optimize=False):
    return _product("einsum", operands, subscripts, optimize=optimize)


# ---- waiting for the device


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get(stream, order, out) if is_native(a) else np.asarray(a, order=order)


def nonzero(a):
    return a.nonzero()


def argwhere(a):
    _sync.declare("argwhere")
    return wrap(np.argwhere(_host_of(a)))


def flatnonzero(a):
    _sync.declare("flatnonzero")
    return wrap(np.flatnonzero(_host_of(a)))


def unique(ar, return_index=False, return_inverse=False, return_counts=False):
    _sync.declare("unique")
    return wrap(np.unique(_host_of(ar), return_index, return_inverse, return_counts))


def array_equal(a1, a2):
    return wrap(np.asarray(np.array_equal(_host_of(a1), _host_of(a2))))


def allclose(a, b, rtol=1e-05, atol=1e-08, equal_nan=False):
    return wrap(np.asarray(np.allclose(_host_of(a), _host_of(b), rtol, atol, equal_nan)))


def bincount(x, weights=None, minlength=None):
    _sync.declare("bincount")
    weights = None if weights is None else _host_of(weights)
    return wrap(np.bincount(_host_of(x), weights, minlength or 0))


# ---- the rest


def get_array_module(*args):
    return sys.modules[__name__] if any(is_native(a) for a in args) else np


def result_type(*arrays_and_dtypes):
    return np.result_type(*(x._host if is_native(x) else x for x in arrays_and_dtypes))


def may_share_memory(a, b, max_work=None):
    return np.may_share_memory(_host_of(a), _host_of(b))


def shares_memory(a, b, max_work=None):
    return np.shares_memory(_host_of(a), _host_of(b))


def ndim(a):
    return a.ndim


def is_available():
    """No GPU is here."""
    return False


# ---- for tests


forbid_synchronisation = _sync.forbidden


def synchronisations():
    """How often the host has waited for the device so far."""
    return _sync.count


def install():
    """Stand in for cupy: from now on ``import cupy`` and its submodules answer this package."""
    own = __name__ + "."
    for name in [name for name in sys.modules if name == "cupy" or name.startswith("cupy.")]:
        del sys.modules[name]
    for name, module in list(sys.modules.items()):
        if name == __name__ or name.startswith(own):
            sys.modules["cupy" + name.removeprefix(__name__)] = module
