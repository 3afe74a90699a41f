"""Puts fakecupy in cupy's place, and watches what runs on it."""

import contextlib
import sys

from tests.simt import fakecupy
from tests.simt.fakecupy import _memory, _sync

DeviceSynchronized = _sync.DeviceSynchronized


def install():
    """From now on ``import cupy`` and its submodules answer the substitute."""
    own = fakecupy.__name__
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        del sys.modules[name]
    for name, module in list(sys.modules.items()):
        if name == own or name.startswith(f"{own}."):
            sys.modules[f"cupy{name.removeprefix(own)}"] = module


def synchronisations():
    """How often the host has waited for the device so far."""
    return _sync.count


@contextlib.contextmanager
def no_synchronisation():
    """Raise DeviceSynchronized where the host would wait for the device."""
    with _sync.forbidden():
        yield


@contextlib.contextmanager
def memory():
    """Measure device memory: the list that it gives holds the peak, above the start, at the end."""
    before = _memory.peak
    start = _memory.peak = _memory.used
    answer = []
    try:
        yield answer
    finally:
        answer.append(_memory.peak - start)
        _memory.peak = max(before, _memory.peak)
