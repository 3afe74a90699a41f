"""Kernels that belong to a device and run in its current stream."""

from tests.simt import module
from tests.simt.fakecupy import _current, _memory


class RawModule(module.RawModule):
    """A module whose kernels run on the device that was current when they were asked for."""

    def get_function(self, name):
        return Kernel(super().get_function(name))


class Kernel:
    def __init__(self, simulated):
        self._simulated = simulated
        self._device = _current.current.device

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._simulated.max_dynamic_shared_size_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        self._simulated.max_dynamic_shared_size_bytes = size

    def __call__(self, grid, block, args, *, shared_mem=0):
        _current.check_device(self._device)
        for argument in args:
            if hasattr(argument, "data") and hasattr(argument.data, "ptr"):
                _current.check_device(_memory.device(argument.data.ptr))
        _current.note(self._simulated.name)
        self._simulated(grid, block, args, shared_mem=shared_mem)
