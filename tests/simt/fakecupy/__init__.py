"""A substitute for cupy where there is no GPU: what the library uses of it, over NumPy.

It is stricter than cupy: only these names, methods and parameters exist (tests/test_simt_cupy.py
holds them against the real cupy where that is installed), and what cupy refuses is refused. Kernels
run in the simulator.
"""

from tests.simt.fakecupy import _functions, cuda, lib
from tests.simt.fakecupy._kernel import RawModule
from tests.simt.fakecupy._ndarray import ndarray

__all__ = ["RawModule", "cuda", "lib", "ndarray"]

globals().update(_functions.namespace())
