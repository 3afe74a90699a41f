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

from tests.arrays import host, on
from tests.conftest import HAVE_GPU, kernels
from tests.fuzz import OPERATORS

ROOT = Path(__file__).parent.parent
RUNS = 10


def digest(operator, xp, arrays, numbers):
    """A hash of the result and of all gradients."""
    arrays = on(xp, arrays)
    y = operator.forward(**arrays, **numbers)
    results = [y, *operator.backward(y, **arrays, **numbers)]
    parts = [host(xp, a).tobytes() for a in results if a is not None]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def call_of(operator, seed, dtype, large):
    """A random call whose samples meet at the same pixels."""
    arrays, numbers = (operator.large if large else operator.draw)(np.random.default_rng(seed))
    arrays = {name: a.astype(dtype) for name, a in arrays.items() if a is not None}
    return arrays, numbers


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
    arrays, numbers = call_of(OPERATORS[name], 0, dtype, large=xp is np or HAVE_GPU)
    digests = set()
    for run in range(RUNS):
        given = {name: moved(a, run) for name, a in arrays.items()}
        digests.add(digest(OPERATORS[name], xp, given, numbers))
    assert len(digests) == 1


@pytest.mark.skipif(HAVE_GPU, reason="a GPU chooses the order of its threads itself")
@pytest.mark.parametrize("name", OPERATORS)
def test_the_order_of_gpu_threads_does_not_matter(name):
    digests = {}
    for order in ("forward", "reversed", "random"):
        with kernels(order):
            import cupy

            digests[order] = [
                digest(OPERATORS[name], cupy, *call_of(OPERATORS[name], seed, np.float32, False))
                for seed in range(8)
            ]
    assert digests["forward"] == digests["reversed"] == digests["random"]


SEVERAL_RUNS = f"""
import numpy as np
from tests.fuzz import OPERATORS
from tests.test_reproducible import call_of, digest
for operator in OPERATORS.values():
    call = call_of(operator, 0, np.float32, large=True)
    print(operator.name, len({{digest(operator, np, *call) for _ in range({RUNS})}}))
"""


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_several_threads_of_the_blas_keep_the_bits(threads):
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", SEVERAL_RUNS], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split("\n")[:-1] == [f"{name} 1" for name in OPERATORS]
