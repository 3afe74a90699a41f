"""The array class: a NumPy array in 'device' memory that NumPy cannot touch."""

import functools
import inspect

import numpy as np

from tests.simt.fakecupy import _memory, _sync
from tests.simt.fakecupy._current import check_device

LOW_PRECISION = ("float16", "bfloat16")
NO_BFLOAT16 = ("argsort", "cumprod", "cumsum", "searchsorted", "sort")  # has no kernel in CuPy


class Flags:
    """What CuPy tells of an array's memory."""

    def __init__(self, flags):
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.owndata, self.forc = flags.owndata, flags.forc


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """cupy.ndarray, as far as the library uses it. ``_host`` is the array that it wraps."""

    __slots__ = ("_host", "data")
    __hash__ = None

    def __new__(cls, shape, dtype=float, memptr=None, strides=None, order="C"):
        if memptr is not None or strides is not None:
            raise NotImplementedError("ndarray: memptr and strides")
        return native(allocate(shape, dtype, order))

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: Flags(self._host.flags))
    T = property(lambda self: wrap(self._host.T))
    mT = property(lambda self: wrap(self._host.mT))

    @property
    def device(self):
        return _cupy().cuda.Device(self.data.device_id)

    # ---- refusing to mix with NumPy

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        function = getattr(_cupy(), ufunc.__name__, None)
        if function is None or method != "__call__":
            return NotImplemented
        return function(*inputs, out=out[0] if out else None, **kwargs)

    def __array_function__(self, func, types, args, kwargs):
        path = (*func.__module__.split(".")[1:], func.__name__)
        own = functools.reduce(lambda module, name: getattr(module, name, None), path, _cupy())
        return NotImplemented if own is None or own is func else own(*args, **kwargs)

    # ---- what makes the host wait

    def get(self, stream=None, order="C", out=None, blocking=True):
        _sync.declare("ndarray.get")
        if out is None:
            return self._host.copy(order=order)
        out[...] = self._host
        return out

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype or arr.shape != self.shape:
            raise ValueError("dtype or shape mismatch")
        self._host[...] = arr

    # ---- indexing

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        if any(is_native(part) and part.dtype == bool for part in parts):
            _sync.declare("ndarray[mask]")
        if not any(part is Ellipsis for part in parts):
            parts = (*parts, Ellipsis)  # makes NumPy answer a view, where it would make a scalar
        return wrap(self._host[unwrap(parts)])

    def __setitem__(self, index, value):
        with np.errstate(all="ignore"):
            self._host[unwrap(index)] = unwrap(value)

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    # ---- comparing with None, as CuPy does

    def __eq__(self, other):
        return wrap(np.zeros(self.shape, bool)) if other is None else super().__eq__(other)

    def __ne__(self, other):
        return wrap(np.ones(self.shape, bool)) if other is None else super().__ne__(other)

    # ---- in place, views and copies

    def fill(self, value):
        self._host.fill(unwrap(value))

    def sort(self, axis=-1, kind=None):
        self._host[...] = _cupy().sort(self, axis, kind)._host

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if casting is not None or subok is not None:
            raise TypeError("casting and subok are not supported yet")
        flags = self._host.flags
        lies = {"K": True, "A": flags.forc, "C": flags.c_contiguous, "F": flags.f_contiguous}
        if not copy and self.dtype == dtype and lies[order]:
            return self
        with np.errstate(all="ignore"):
            return wrap(self._host.astype(dtype, order=order))

    def copy(self, order="C"):
        return wrap(self._host.copy(order))

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def reshape(self, *shape, order="C"):
        return wrap(self._host.reshape(*shape, order=order))

    def view(self, dtype=None):
        return wrap(self._host.view() if dtype is None else self._host.view(dtype))

    def __matmul__(self, other):
        return _cupy().matmul(self, other)

    def dot(self, b, out=None):
        return _cupy().dot(self, b, out)


# ---- between the two worlds


def is_native(x):
    return isinstance(x, ndarray)


def native(host):
    """The array object of a NumPy array that lies in device memory."""
    array = object.__new__(ndarray)
    array._host = host
    array.data = _memory.MemoryPointer(host.ctypes.data)
    return array


def unwrap(x):
    """What NumPy may see of an argument; NumPy's arrays and another device's are refused."""
    if isinstance(x, ndarray):
        check_device(_memory.device(x.data.ptr))
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, tuple | list):
        return type(x)(map(unwrap, x))
    return x


def wrap(x):
    """A result of NumPy's, brought to device memory unless it is a view of it already.

    As in CuPy an answer is never a scalar but an array of no dimensions.
    """
    if isinstance(x, np.ndarray | np.generic):
        host = np.asarray(x)
        return native(host if _memory.is_device(host) else _upload(host))
    if isinstance(x, tuple | list) and any(isinstance(part, np.ndarray) for part in x):
        return type(x)(map(wrap, x))
    return x


def _upload(host):
    if host.dtype.kind not in "?biufcV":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    device = allocate_like(host)
    device[...] = host
    return device


def allocate(shape, dtype, order="C"):
    """Uninitialised device memory, poisoned."""
    dtype = np.dtype(float if dtype is None else dtype)
    block = _memory.allocate(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    return np.ndarray(shape, dtype, block, order=order)


def allocate_like(host):
    """The same, of the shape, dtype and memory order of a NumPy array."""
    axes = sorted(range(host.ndim), key=lambda axis: -abs(host.strides[axis]))
    device = allocate(tuple(host.shape[axis] for axis in axes), host.dtype)
    return device.transpose(np.argsort(axes)) if axes else device


def checked(function, parameters):
    """A NumPy function for device arrays, with the parameters that CuPy's has and no other."""
    signature = inspect.signature(eval(f"lambda {parameters}: None"))

    @functools.wraps(function)
    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        args, kwargs = unwrap(bound.args), {k: unwrap(v) for k, v in bound.kwargs.items()}
        if function.__name__ in NO_BFLOAT16 and args[0].dtype.name == "bfloat16":
            raise TypeError(f"{function.__name__} of bfloat16 does not exist")
        if bound.arguments.get("kind") not in (None, "stable"):
            raise ValueError("kind can only be None or 'stable'")
        with np.errstate(all="ignore"):  # a GPU does not warn
            result = function(*args, **kwargs)
        out = bound.arguments.get("out")
        return wrap(result) if out is None else out

    call.__signature__ = signature
    return call


def reduction(function, parameters):
    """A sum, which counts float16 and bfloat16 in float32."""
    signature = inspect.signature(eval(f"lambda {parameters}: None"))

    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        array, axis, dtype, out, *rest = (bound.apply_defaults(), *bound.args)[1:]
        host = unwrap(array)
        answer = None if dtype is None else np.dtype(dtype)
        if host.dtype.name in LOW_PRECISION:
            answer = answer or host.dtype
            host = host.astype(np.float32)
        inner = np.float32 if answer is not None and answer.name in LOW_PRECISION else answer
        options = dict(zip(list(signature.parameters)[4:], rest, strict=True))
        with np.errstate(all="ignore"):
            result = np.asarray(function(host, axis=axis, dtype=inner, **options))
            result = result if answer is None else result.astype(answer)
        if out is None:
            return wrap(result)
        out[...] = wrap(result)
        return out

    call.__name__, call.__signature__ = function.__name__, signature
    return call


def _cupy():
    import tests.simt.fakecupy as cupy

    return cupy


METHODS = {
    "all": "self, axis=None, out=None, keepdims=False",
    "any": "self, axis=None, out=None, keepdims=False",
    "argmax": "self, axis=None, out=None, dtype=None, keepdims=False",
    "argmin": "self, axis=None, out=None, dtype=None, keepdims=False",
    "argsort": "self, axis=-1, kind=None",
    "clip": "self, min=None, max=None, out=None",
    "cumprod": "self, axis=None, dtype=None, out=None",
    "cumsum": "self, axis=None, dtype=None, out=None",
    "diagonal": "self, offset=0, axis1=0, axis2=1",
    "flatten": "self, order='C'",
    "max": "self, axis=None, out=None, keepdims=False",
    "min": "self, axis=None, out=None, keepdims=False",
    "ravel": "self, order='C'",
    "repeat": "self, repeats, axis=None",
    "round": "self, decimals=0, out=None",
    "searchsorted": "self, v, side='left', sorter=None",
    "squeeze": "self, axis=None",
    "swapaxes": "self, axis1, axis2",
    "take": "self, indices, axis=None, out=None",
    "transpose": "self, *axes",
}
SUMS = {
    "mean": "a, axis=None, dtype=None, out=None, keepdims=False",
    "prod": "a, axis=None, dtype=None, out=None, keepdims=False",
    "std": "a, axis=None, dtype=None, out=None, ddof=0, keepdims=False",
    "sum": "a, axis=None, dtype=None, out=None, keepdims=False",
    "var": "a, axis=None, dtype=None, out=None, ddof=0, keepdims=False",
}
WAITING = {
    "__bool__": bool,
    "__complex__": complex,
    "__float__": float,
    "__index__": int,
    "__int__": int,
    "__repr__": repr,
    "item": np.ndarray.item,
    "nonzero": np.ndarray.nonzero,
    "tobytes": np.ndarray.tobytes,
    "tolist": np.ndarray.tolist,
}


def _waiting(name, function):
    def method(self):
        _sync.declare(f"ndarray.{name}")
        return function(self._host)

    return method


for _name, _parameters in METHODS.items():
    setattr(ndarray, _name, checked(getattr(np.ndarray, _name), _parameters))
for _name, _parameters in SUMS.items():
    setattr(ndarray, _name, reduction(getattr(np, _name), _parameters.replace("a,", "self,", 1)))
for _name, _function in WAITING.items():
    setattr(ndarray, _name, _waiting(_name, _function))
