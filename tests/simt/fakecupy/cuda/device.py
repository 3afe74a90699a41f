"""cupy.cuda.device: two devices, whose compute capability is in the simulator's settings."""

from tests.simt.fakecupy import _sync
from tests.simt.fakecupy._current import DEVICES, current
from tests.simt.settings import settings

CUBLAS_HANDLES = (0xB1A5, 0xB1A6)

ATTRIBUTES = {
    "MaxThreadsPerBlock": 1024,
    "MaxBlockDimX": 1024,
    "MaxBlockDimY": 1024,
    "MaxBlockDimZ": 64,
    "MaxGridDimX": 2**31 - 1,
    "MaxGridDimY": 65535,
    "MaxGridDimZ": 65535,
    "MaxSharedMemoryPerBlock": 48 << 10,
    "MaxSharedMemoryPerBlockOptin": 227 << 10,
    "MaxSharedMemoryPerMultiprocessor": 228 << 10,
    "MaxRegistersPerBlock": 65536,
    "MaxRegistersPerMultiprocessor": 65536,
    "MaxThreadsPerMultiProcessor": 2048,
    "MaxBlocksPerMultiprocessor": 32,
    "MultiProcessorCount": 4,
    "WarpSize": 32,
    "L2CacheSize": 50 << 20,
}


class Device:
    def __init__(self, device=None):
        self.id = current.device if device is None else int(device)
        if not 0 <= self.id < DEVICES:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return hash(self.id)

    def __enter__(self):
        self._before, current.device = [*getattr(self, "_before", ()), current.device], self.id
        return self

    def __exit__(self, *error):
        current.device = self._before.pop()

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    def use(self):
        current.device = self.id
        return self

    def synchronize(self):
        _sync.declare("Device.synchronize")

    @property
    def compute_capability(self):
        return settings.compute_capability

    @property
    def attributes(self):
        major, minor = divmod(int(self.compute_capability), 10)
        return ATTRIBUTES | {"ComputeCapabilityMajor": major, "ComputeCapabilityMinor": minor}

    @property
    def cublas_handle(self):
        return CUBLAS_HANDLES[self.id]

    @property
    def mem_info(self):
        return 64 << 30, 64 << 30


def get_device_id():
    return current.device


def get_compute_capability():
    return Device().compute_capability


def get_cublas_handle():
    return CUBLAS_HANDLES[current.device]
