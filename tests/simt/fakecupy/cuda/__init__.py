"""cupy.cuda: one device, one stream."""

from tests.simt.fakecupy import _sync
from tests.simt.fakecupy.cuda import cublas, device, runtime
from tests.simt.fakecupy.cuda.device import Device, get_cublas_handle, get_device_id

__all__ = ["Device", "cublas", "device", "get_cublas_handle", "get_device_id", "runtime"]


class Stream:
    """Work is done at once, so there is nothing to order."""

    def __init__(self, null=False, non_blocking=False):
        self.ptr = 0 if null else id(self)

    def __enter__(self):
        _streams.append(self)
        return self

    def __exit__(self, *error):
        _streams.pop()

    def synchronize(self):
        _sync.declare("Stream.synchronize")


Stream.null = Stream(null=True)
_streams = [Stream.null]


def get_current_stream():
    return _streams[-1]


def is_available():
    return False
