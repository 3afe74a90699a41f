"""Which library an array is of, which dtypes it may have, and how a mistake is reported.

Only metadata is looked at: nothing here ever reads the values of a device array.
"""

import functools
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray
Pair = int | tuple[int, int]

FLOATS = ("float16", "bfloat16", "float32", "float64")
INT32_MAX = 2**31 - 1
# What a call is checked for and how it is launched follow from the metadata of its arrays and from
# its options. Both are cached, for so many different calls of a function.
CALLS = 1024

Signature = tuple[tuple[Any, ...], ...]  # (name, shape, dtype) of each array: a key of the caches


class Spec(NamedTuple):
    """An array without its values: ``check_`` functions take it in the place of the array."""

    shape: tuple[int, ...]
    dtype: np.dtype


def specs(signature: Signature) -> dict[str, Spec]:
    """What the ``signature`` of some arrays says of each of them that is not None."""
    return {name: Spec(shape, dtype) for name, shape, dtype in signature}


def array_module(array: Array) -> ModuleType:
    """The library of an array. cupy is found through ``sys.modules``: it is never imported here."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(array, cupy.ndarray) else np


def check_library(
    function: str, arrays: Mapping[str, Array | None], optional: Collection[str] = ()
) -> tuple[ModuleType, Signature]:
    """The one library, and the one device, of ``arrays``; the ``optional`` ones may be None.

    Kernels can only read what is aligned to its dtype. The signature is made on the way: shapes and
    dtypes of the arrays that are not None.
    """
    first = next(iter(arrays))
    example: Array = arrays[first]
    xp = array_module(example)
    library, device = xp.ndarray, None if xp is np else example.data.device_id
    signature = []
    for name, array in arrays.items():
        if array is None and name in optional:
            continue
        if not isinstance(array, library):
            other = array_module(array)
            if not isinstance(array, other.ndarray):
                raise TypeError(
                    f"{function}: {name} is {type(array).__name__}, expected a numpy or cupy array"
                )
            raise TypeError(
                f"{function}: {name} is a {other.__name__} array, expected {xp.__name__} "
                f"as {first} is"
            )
        dtype = array.dtype
        if device is not None:
            data = array.data
            if data.device_id != device:
                raise ValueError(
                    f"{function}: {name} is on {array.device}, expected {example.device} where "
                    f"{first} is"
                )
            if math.gcd(data.ptr, *array.strides) % dtype.itemsize:
                raise ValueError(
                    f"{function}: {name} begins at address {data.ptr:#x} and has strides "
                    f"{array.strides}, expected multiples of {dtype.itemsize} bytes, as its dtype "
                    f"has"
                )
        signature.append((name, array.shape, dtype))
    return xp, tuple(signature)


def check_dtypes(function: str, data: Mapping[str, Array], real: Mapping[str, Array]) -> None:
    """``data`` share one floating dtype; ``real`` (positions, masks) have it or a common one."""
    first, dtype = next((name, array.dtype) for name, array in data.items())
    for name, array in data.items():
        if array is None:
            continue
        if array.dtype.name not in FLOATS or not array.dtype.isnative:
            raise TypeError(
                f"{function}: {name} has dtype {array.dtype}, expected one of {', '.join(FLOATS)}"
            )
        if array.dtype != dtype:
            raise TypeError(
                f"{function}: {name} has dtype {array.dtype}, expected {dtype} as {first} has"
            )
    for name, array in real.items():
        if array is None:
            continue
        allowed = dict.fromkeys((dtype.name, "float32", "float64"))
        if array.dtype.name not in allowed or not array.dtype.isnative:
            raise TypeError(
                f"{function}: {name} has dtype {array.dtype}, expected {' or '.join(allowed)}"
            )


def check_shape(
    function: str, name: str, array: Array | None, expected: tuple[int | str, ...]
) -> None:
    """Raise unless ``array`` is None or has this shape; a string stands for any size."""
    if array is None:
        return
    fits = array.shape == expected or (
        len(array.shape) == len(expected)
        and all(
            isinstance(want, str) or have == want
            for have, want in zip(array.shape, expected, strict=True)
        )
    )
    if not fits:
        wanted = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{function}: {name} has shape {array.shape}, expected ({wanted})")


def check_wrt(
    function: str, wrt: Iterable[str] | None, fields: tuple[str, ...], **optional: Array | None
) -> frozenset[str]:
    """The gradients to compute: all of ``fields``, or those that ``wrt`` names, where given."""
    if wrt is None:
        names = fields
    elif not np.iterable(wrt):
        raise TypeError(f"{function}: wrt is {wrt!r}, expected some of {', '.join(fields)}")
    else:
        names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
        for name in names:
            if not isinstance(name, str) or name not in fields:
                raise ValueError(
                    f"{function}: wrt has {name!r}, expected some of {', '.join(fields)}"
                )
    wanted = set(names)
    for name, array in optional.items():
        if array is None:
            wanted.discard(name)
    return frozenset(wanted)


def pair(function: str, name: str, value: Pair, least: int) -> tuple[int, int]:
    """``value`` as (height, width), both integers of at least ``least``."""
    if type(value) is int and least <= value <= INT32_MAX:  # at once what most calls have
        return value, value
    both = tuple(value) if np.iterable(value) else (value, value)
    if len(both) != 2 or not all(map(_is_integer, both)):
        raise TypeError(f"{function}: {name} is {value!r}, expected an int or a pair of ints")
    if min(both) < least:
        raise ValueError(f"{function}: {name} is {value!r}, expected at least {least}")
    if max(both) > INT32_MAX:
        raise ValueError(f"{function}: {name} is {value!r}, expected at most {INT32_MAX}")
    return int(both[0]), int(both[1])


def integer(function: str, name: str, value: int, least: int) -> int:
    """``value`` as a Python int of at least ``least``."""
    if not _is_integer(value):
        raise TypeError(f"{function}: {name} is {value!r}, expected an int")
    return pair(function, name, value, least)[0]


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def real_number(function: str, name: str, value: float) -> float:
    """``value`` as a finite Python float."""
    if type(value) is float and math.isfinite(value):  # at once what most calls have
        return value
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise TypeError(f"{function}: {name} is {value!r}, expected a number")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{function}: {name} is {value!r}, expected a finite number")
    return number


@functools.cache
def compute_dtype(dtype: np.dtype) -> np.dtype:
    """What positions, weights and sums are computed in: float32 at least."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)
