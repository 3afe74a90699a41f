"""Running programs on several processes of MPI, where that is installed."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@functools.cache
def launcher():
    """The command that starts ranks, up to their number; skips where MPI starts none."""
    pytest.importorskip("mpi4py", exc_type=ImportError)
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("mpi4py without mpiexec")
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=True)
    options = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version.stdout else []
    command = [mpiexec, *options, "-n"]
    for ranks, start in (1, []), (2, [*command, "2"]):  # one alone needs no mpiexec
        hello = f"from mpi4py import MPI; assert MPI.COMM_WORLD.size == {ranks}"
        tried = started([*start, sys.executable, "-c", hello], timeout=60)
        if tried.returncode:  # it would end this process as well
            pytest.skip(f"MPI does not start here: {tried.stderr}")
    return command


def started(command, timeout, **options):
    """The finished process of a command."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, **options
    )


def run(ranks, *command, cwd, timeout=120):
    """The finished process of ``python *command`` on so many ranks; skips without MPI."""
    return started(
        [*launcher(), str(ranks), sys.executable, *command],
        timeout,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
