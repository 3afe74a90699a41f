"""'Device' memory: allocations with guards on both sides, filled with poison."""

import bisect
import mmap
import threading
import weakref

import numpy as np

from tests.simt.fakecupy._current import current

ALIGNMENT = 512  # CuPy's pool aligns so
GUARD = 1 << 20  # bytes on both sides that belong to nobody; pages never touched cost nothing
POISON = 0xFF  # makes NaN of every float format, -1 of integers
LAZY = 1 << 26  # larger allocations take no memory before they are touched, and begin as zeros
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)

_starts = []  # of all living allocations, sorted
_sizes = {}
_devices = {}
_lock = threading.RLock()  # memory is freed by whichever thread drops it last, at any moment
used = peak = 0  # bytes


class MemoryPointer:
    """An address in device memory, as ``array.data``."""

    __slots__ = ("ptr",)

    def __init__(self, ptr):
        self.ptr = ptr

    def __int__(self):
        return self.ptr

    @property
    def device_id(self):
        found = device(self.ptr)
        return current.device if found is None else found


def allocate(size):
    """A new allocation, as an array of its bytes."""
    global used, peak
    raw = _raw(size + 2 * GUARD + ALIGNMENT)
    start = GUARD + -(raw.ctypes.data + GUARD) % ALIGNMENT
    block = raw[start : start + size]
    if size <= LAZY:
        block.fill(POISON)
    address = block.ctypes.data
    with _lock:
        bisect.insort(_starts, address)
        _sizes[address], _devices[address] = size, current.device
        used += size
        peak = max(peak, used)
    weakref.finalize(raw, _forget, address)
    return block


def _raw(size):
    if size <= LAZY + 2 * GUARD + ALIGNMENT:
        return np.empty(size, np.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)


def _forget(address):
    global used
    with _lock:
        del _starts[bisect.bisect_left(_starts, address)], _devices[address]
        used -= _sizes.pop(address)


def _find(address):
    """The start of the allocation in which an address lies, or None."""
    with _lock:
        i = bisect.bisect_right(_starts, address) - 1
        if i < 0 or address > _starts[i] + _sizes[_starts[i]]:
            return None
        return _starts[i]


def room(address):
    """Bytes from an address to the end of the allocation in which it lies, or None."""
    start = _find(address)
    return None if start is None else start + _sizes[start] - address


def device(address):
    """The device of the allocation in which an address lies, or None."""
    return _devices.get(_find(address))


def is_device(host):
    """Whether a NumPy array is a view of an allocation (not memory that NumPy made)."""
    return host.size == 0 or room(host.ctypes.data) is not None
