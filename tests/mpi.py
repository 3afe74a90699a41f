"""Running programs on several processes of MPI, where that is installed."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def require():
    """Skips where MPI does not start: importing it would end this process."""
    pytest.importorskip("mpi4py", exc_type=ImportError)
    if why := complaint(ranks=1):
        pytest.skip(why)


def launcher():
    """The command that starts ranks, up to their number; skips where it starts none."""
    require()
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("mpi4py without mpiexec")
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=True)
    options = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version.stdout else []
    command = [mpiexec, *options, "-n"]
    if why := complaint(*command, "2", ranks=2):
        pytest.skip(why)
    return command


@functools.cache
def complaint(*start, ranks):
    """Why this command, or none, does not start so many ranks; empty if it does."""
    hello = f"from mpi4py import MPI; assert MPI.COMM_WORLD.size == {ranks}"
    try:
        tried = started([*start, sys.executable, "-c", hello], timeout=60)
    except subprocess.TimeoutExpired as error:
        return f"MPI does not start here: {error}"
    return f"MPI does not start here: {tried.stderr}" if tried.returncode else ""


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
