"""Running programs on several processes of MPI, where that is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(ranks, *command, cwd, timeout=120):
    """The finished process of ``python *command`` on so many ranks; skips without MPI."""
    pytest.importorskip("mpi4py", exc_type=ImportError)
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("mpi4py without mpiexec")
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=True)
    options = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version.stdout else []
    return subprocess.run(
        [mpiexec, *options, "-n", str(ranks), sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
