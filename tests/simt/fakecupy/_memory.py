"""'Device' memory: allocations with guards on both sides, filled with poison."""

import bisect
import weakref

import numpy as np

ALIGNMENT = 512  # CuPy's pool aligns so
GUARD = 1 << 20  # bytes on both sides that belong to nobody; pages never touched cost nothing
POISON = 0xFF  # makes NaN of every float format, -1 of integers
POISON_LIMIT = 1 << 26  # larger allocations stay untouched, hence unpoisoned and without memory

_starts = []  # of all living allocations, sorted
_sizes = {}


class MemoryPointer:
    """An address in device memory, as ``array.data``."""

    __slots__ = ("ptr",)

    def __init__(self, ptr):
        self.ptr = ptr

    def __int__(self):
        return self.ptr


def allocate(size):
    """An array of bytes which is the whole of a new allocation."""
    raw = np.empty(size + 2 * GUARD + ALIGNMENT, np.uint8)
    start = GUARD + -(raw.ctypes.data + GUARD) % ALIGNMENT
    block = raw[start : start + size]
    if size <= POISON_LIMIT:
        block.fill(POISON)
    address = block.ctypes.data
    bisect.insort(_starts, address)
    _sizes[address] = size
    weakref.finalize(raw, _forget, address)
    return block


def _forget(address):
    del _starts[bisect.bisect_left(_starts, address)]
    del _sizes[address]


def room(address):
    """Bytes from an address to the end of the allocation in which it lies, or None."""
    i = bisect.bisect_right(_starts, address) - 1
    if i < 0:
        return None
    left = _starts[i] + _sizes[_starts[i]] - address
    return left if left >= 0 else None


def is_device(host):
    """Whether a NumPy array is a view of an allocation (not memory that NumPy made)."""
    return host.size == 0 or room(host.ctypes.data) is not None
