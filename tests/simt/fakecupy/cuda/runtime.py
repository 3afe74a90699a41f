"""cupy.cuda.runtime: numbers of CUDA's own headers."""

from tests.simt.fakecupy import _sync
from tests.simt.fakecupy._current import DEVICES, current

CUDA_R_32F = 0
CUDA_R_64F = 1
CUDA_R_16F = 2
CUDA_R_16BF = 14


class CUDARuntimeError(RuntimeError):
    pass


def getDevice():
    return current.device


def getDeviceCount():
    return DEVICES


def deviceSynchronize():
    _sync.declare("deviceSynchronize")
