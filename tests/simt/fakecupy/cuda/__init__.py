"""cupy.cuda: two devices, and streams in which work is done at once."""

from tests.simt.fakecupy import _sync
from tests.simt.fakecupy._current import NULL_STREAM, current
from tests.simt.fakecupy.cuda import cublas, device, runtime
from tests.simt.fakecupy.cuda.device import Device, get_cublas_handle, get_device_id

__all__ = ["Device", "cublas", "device", "get_cublas_handle", "get_device_id", "runtime"]


class Stream:
    """Work is done at once, so there is nothing to order."""

    def __init__(self, null=False, non_blocking=False):
        self.ptr = NULL_STREAM if null else id(self)

    def __enter__(self):
        self._before, current.stream = current.stream, self.ptr
        return self

    def __exit__(self, *error):
        current.stream = self._before

    def synchronize(self):
        _sync.declare("Stream.synchronize")


Stream.null = Stream(null=True)


def get_current_stream():
    stream = Stream(null=True)
    stream.ptr = current.stream
    return stream


def is_available():
    return False
