"""The array class: a NumPy array in 'device' memory that NumPy cannot touch."""

import functools
import inspect

import numpy as np

from tests.simt.fakecupy import _memory, _sync

LOW_PRECISION = ("float16", "bfloat16")


class ndarray(np.lib.mixins.NDArrayOperatorsMixin):
    """cupy.ndarray, as far as the library uses it. ``_host`` is the array that it wraps."""

    __slots__ = ("_host",)

    def __new__(cls, shape, dtype=float, memptr=None, strides=None, order="C"):
        if memptr is not None or strides is not None:
            raise NotImplementedError("ndarray(memptr=, strides=)")
        return empty(shape, dtype, order)

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    data = property(lambda self: _memory.MemoryPointer(self._host.ctypes.data))
    T = property(lambda self: wrap(self._host.T))
    mT = property(lambda self: wrap(self._host.mT))
    base = property(lambda self: None if self._host.base is None else wrap(self._host.base))

    @property
    def device(self):
        from tests.simt.fakecupy.cuda import Device

        return Device(0)

    # ---- refusing to mix with NumPy

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        out = kwargs.get("out", ())
        function = ufunc if method == "__call__" else getattr(ufunc, method)
        values = unwrap(inputs)
        if all(x is None or is_native(x) for x in out):
            kwargs["out"] = unwrap(out) or None
        with np.errstate(all="ignore"):  # a GPU does not warn
            result = function(*values, **kwargs)
        return out[0] if out and len(out) == 1 else wrap(result)

    def __array_function__(self, func, types, args, kwargs):
        import tests.simt.fakecupy as cupy

        own = functools.reduce(
            lambda module, name: getattr(module, name, None),
            (*func.__module__.split(".")[1:], func.__name__),
            cupy,
        )
        return NotImplemented if own is None or own is func else own(*args, **kwargs)

    # ---- what makes the host wait

    def get(self, stream=None, order="C", out=None, blocking=True):
        _sync.declare("ndarray.get")
        if out is None:
            return self._host.copy(order=order)
        out[...] = self._host
        return out

    def item(self, *args):
        _sync.declare("ndarray.item")
        return self._host.item(*args)

    def tolist(self):
        _sync.declare("ndarray.tolist")
        return self._host.tolist()

    def tobytes(self, order="C"):
        _sync.declare("ndarray.tobytes")
        return self._host.tobytes(order)

    def __bool__(self):
        _sync.declare("bool(ndarray)")
        return bool(self._host)

    def __int__(self):
        _sync.declare("int(ndarray)")
        return int(self._host)

    def __float__(self):
        _sync.declare("float(ndarray)")
        return float(self._host)

    def __complex__(self):
        _sync.declare("complex(ndarray)")
        return complex(self._host)

    def __index__(self):
        _sync.declare("index(ndarray)")
        return self._host.__index__()

    def __repr__(self):
        _sync.declare("repr(ndarray)")
        return repr(self._host)

    def nonzero(self):
        _sync.declare("ndarray.nonzero")
        return wrap(self._host.nonzero())

    # ---- indexing

    def __getitem__(self, index):
        if _selects_by_mask(index):
            _sync.declare("ndarray[mask]")
        return wrap(self._host[unwrap(index)])

    def __setitem__(self, index, value):
        self._host[unwrap(index)] = unwrap(value)

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __eq__(self, other):
        if other is None:
            return wrap(np.zeros(self.shape, bool))
        return super().__eq__(other)

    def __ne__(self, other):
        if other is None:
            return wrap(np.ones(self.shape, bool))
        return super().__ne__(other)

    __hash__ = None

    # ---- in place

    def fill(self, value):
        self._host.fill(unwrap(value))

    def sort(self, axis=-1, kind=None):
        if kind not in (None, "stable"):
            raise ValueError("kind can only be None or 'stable'")
        self._host.sort(axis, kind="stable")

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype or arr.shape != self.shape:
            raise ValueError("dtype or shape mismatch")
        self._host[...] = arr

    # ---- views and copies

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if casting is not None or subok is not None:
            raise TypeError("casting and subok are not supported")
        if not copy and self.dtype == dtype:
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
        return wrap(self._host.view(dtype) if dtype is not None else self._host.view())

    # ---- sums: float16 and bfloat16 are summed in float32

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return self._reduce("sum", axis, dtype, out, keepdims)

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        return self._reduce("mean", axis, dtype, out, keepdims)

    def prod(self, axis=None, dtype=None, out=None, keepdims=False):
        return self._reduce("prod", axis, dtype, out, keepdims)

    def _reduce(self, name, axis, dtype, out, keepdims):
        host = self._host
        answer = np.dtype(dtype) if dtype is not None else None
        if host.dtype.name in LOW_PRECISION:
            answer = answer or host.dtype
            host = host.astype(np.float32)
        inner = np.float32 if answer is not None and answer.name in LOW_PRECISION else answer
        with np.errstate(all="ignore"):
            result = np.asarray(getattr(host, name)(axis=axis, dtype=inner, keepdims=keepdims))
            result = result if answer is None else result.astype(answer)
        if out is None:
            return wrap(result)
        out[...] = wrap(result)
        return out

    def __matmul__(self, other):
        import tests.simt.fakecupy as cupy

        return cupy.matmul(self, other) if is_native(other) else NotImplemented

    def dot(self, b, out=None):
        import tests.simt.fakecupy as cupy

        return cupy.dot(self, b, out)


def checked(function, parameters):
    """A NumPy function for device arrays, with the parameters that CuPy's has and no other."""
    signature = inspect.signature(eval(f"lambda {parameters}: None"))

    @functools.wraps(function)
    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        with np.errstate(all="ignore"):
            result = function(*unwrap(bound.args), **unwrap(bound.kwargs))
        out = bound.arguments.get("out")
        return wrap(result) if out is None else out

    call.__signature__ = signature
    return call


def _method(name, parameters):
    function = checked(getattr(np.ndarray, name), f"self, {parameters}")
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


METHODS = {
    "all": "axis=None, out=None, keepdims=False",
    "any": "axis=None, out=None, keepdims=False",
    "argmax": "axis=None, out=None, keepdims=False",
    "argmin": "axis=None, out=None, keepdims=False",
    "argsort": "axis=-1, kind=None",
    "clip": "min=None, max=None, out=None",
    "cumsum": "axis=None, dtype=None, out=None",
    "cumprod": "axis=None, dtype=None, out=None",
    "diagonal": "offset=0, axis1=0, axis2=1",
    "flatten": "order='C'",
    "max": "axis=None, out=None, keepdims=False",
    "min": "axis=None, out=None, keepdims=False",
    "ravel": "order='C'",
    "repeat": "repeats, axis=None",
    "round": "decimals=0, out=None",
    "searchsorted": "v, side='left', sorter=None",
    "squeeze": "axis=None",
    "std": "axis=None, dtype=None, out=None, ddof=0, keepdims=False",
    "swapaxes": "axis1, axis2",
    "take": "indices, axis=None, out=None",
    "transpose": "*axes",
    "var": "axis=None, dtype=None, out=None, ddof=0, keepdims=False",
}


# ---- between the two worlds


def is_native(x):
    return isinstance(x, ndarray)


def unwrap(x):
    """What NumPy may see of an argument; a NumPy array is refused, as CuPy does."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, tuple):
        return tuple(map(unwrap, x))
    if isinstance(x, list):
        return list(map(unwrap, x))
    if isinstance(x, dict):
        return {key: unwrap(value) for key, value in x.items()}
    return x


def wrap(x):
    """A result of NumPy's, brought to device memory unless it is a view of it already.

    As in CuPy an answer is never a scalar but an array of no dimensions.
    """
    if isinstance(x, np.ndarray | np.generic):
        host = np.asarray(x)
        return _native(host if _memory.is_device(host) else _upload(host))
    if isinstance(x, tuple | list) and any(isinstance(v, np.ndarray) for v in x):
        return type(x)(map(wrap, x))
    return x


def _native(host):
    array = object.__new__(ndarray)
    array._host = host
    return array


def _upload(host):
    if host.dtype.kind not in "?biufcV":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    out = _allocate_like(host)
    out[...] = host
    return out


def _allocate_like(host):
    """Uninitialised device memory of the same shape, and of the same memory order."""
    order = sorted(range(host.ndim), key=lambda i: (-abs(host.strides[i]), i))
    out = allocate(tuple(host.shape[i] for i in order), host.dtype)
    return out.transpose(np.argsort(order)) if host.ndim else out


def allocate(shape, dtype, order="C"):
    dtype = np.dtype(dtype)
    block = _memory.allocate(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    return np.ndarray(shape, dtype, block, order=order)


def empty(shape, dtype=float, order="C"):
    if dtype is None:
        dtype = float
    return _native(allocate(shape, dtype, order))


def _selects_by_mask(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, ndarray) and part.dtype == bool for part in parts)


for _name, _parameters in METHODS.items():
    setattr(ndarray, _name, _method(_name, _parameters))
