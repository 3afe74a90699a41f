"""Results are the same bits on every run: whatever the addresses, the threads and their order.

Another number of threads of the BLAS is another matter: OpenBLAS rounds some products otherwise
with one thread than with several, so the same bits need the same number.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.arrays import host
from tests.conftest import HAVE_GPU, kernels
from tests.fuzz import OPERATORS, legal_call, results_of

ROOT = Path(__file__).parent.parent
RUNS = 10


def digest(operator, xp, arguments):
    """A hash of the result and of all gradients."""
    parts = [host(xp, a).tobytes() for a in results_of(operator, arguments)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def moved(array, by):
    """A copy that begins ``by`` elements behind an aligned address."""
    memory = np.empty(array.size + 64, array.dtype)
    first = -(memory.ctypes.data // array.itemsize) % (64 // array.itemsize) + by
    copy = memory[first : first + array.size].reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ten_runs_are_the_same_bits(name, dtype, xp):
    operator = OPERATORS[name]
    arguments = legal_call(operator, xp, dtype=dtype, large=xp is np or HAVE_GPU)
    digests = set()
    for run in range(RUNS):
        if xp is np:
            arguments = {k: moved(v, run) if np.ndim(v) > 1 else v for k, v in arguments.items()}
        digests.add(digest(operator, xp, arguments))
    assert len(digests) == 1


@pytest.mark.skipif(HAVE_GPU, reason="a GPU chooses the order of its threads itself")
@pytest.mark.parametrize("name", OPERATORS)
def test_the_order_of_gpu_threads_does_not_matter(name):
    digests = {}
    for order in ("forward", "reversed", "random"):
        with kernels(order):
            import cupy

            digests[order] = [
                digest(OPERATORS[name], cupy, legal_call(OPERATORS[name], cupy, seed, np.float32))
                for seed in range(8)
            ]
    assert digests["forward"] == digests["reversed"] == digests["random"]


SEVERAL_RUNS = f"""
import numpy as np
from tests.fuzz import OPERATORS, legal_call
from tests.test_reproducible import digest
for name, operator in OPERATORS.items():
    call = legal_call(operator, np, dtype=np.float32, large=True)
    print(name, len({{digest(operator, np, call) for _ in range({RUNS})}}))
"""


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_several_threads_of_the_blas_keep_the_bits(threads):
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", SEVERAL_RUNS], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split("\n")[:-1] == [f"{name} 1" for name in OPERATORS]
