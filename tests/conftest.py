"""The libraries that the tests run over: NumPy, and CuPy on a GPU or, without one, on the CPU.

Where there is no GPU a substitute stands in for cupy and the kernels run in the simulator of
tests/simt, under two orders of threads. ``DEFORMABLE_REQUIRE_GPU=1`` makes a missing GPU an error.
"""

import contextlib
import os

import numpy
import pytest

try:
    import cupy

    HAVE_GPU = cupy.is_available()
except ImportError:
    HAVE_GPU = False

if not HAVE_GPU:
    if os.environ.get("DEFORMABLE_REQUIRE_GPU") == "1":
        raise RuntimeError("DEFORMABLE_REQUIRE_GPU is set and cupy finds no GPU")
    from tests.simt import build, substitute
    from tests.simt.settings import configure

    substitute.install()
    import cupy


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, help="random calls of every operator, in all dtypes")
    parser.addoption("--large", action="store_true", help="also what takes 20 GiB of memory")


ORDERS = ["cupy"] if HAVE_GPU else ["cupy", "cupy-reversed"]


@pytest.fixture(params=["numpy", *ORDERS], scope="module")
def xp(request):
    """The array library: ``numpy``, or ``cupy`` under every order of threads."""
    if request.param == "numpy":
        yield numpy
        return
    with kernels(request.param.partition("-")[2] or "forward"):
        yield cupy


@pytest.fixture(params=["numpy", "cupy"])
def device(request):
    """What an example is told as ``--device``; races are looked for in the operators' own tests."""
    if request.param == "numpy":
        yield "cpu"
        return
    with kernels("forward", races=False):
        yield "gpu"


@contextlib.contextmanager
def kernels(order, seed=0, races=True):
    """Kernels run, with these settings where they are simulated."""
    if HAVE_GPU:
        yield
    elif build.available():
        with configure(order=order, seed=seed, races=races):
            yield
    else:
        pytest.skip("no GPU, and no g++ to simulate one")


@pytest.fixture
def no_synchronisation():
    """A context manager in which waiting for the device is an error; without a GPU it sees all."""
    if HAVE_GPU:
        return contextlib.nullcontext
    return substitute.no_synchronisation


@pytest.fixture(autouse=True)
def kernels_end_with_their_test(request):
    """What fails on a GPU does so in the test that launched it: no kernel runs there afterwards."""
    yield
    if not HAVE_GPU:
        return
    try:
        cupy.cuda.Device().synchronize()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # another worker takes the place of this one
        pytest.exit(f"{request.node.nodeid}: {error}", returncode=1)


@pytest.fixture(scope="session", autouse=True)
def background_compiler():
    """Compiles every kernel that is simulated for every GPU, beside the tests."""
    from tests.simt import nvrtc
    from tests.simt.module import RawModule

    background = nvrtc.Background()
    RawModule.watchers.append(background.watch)
    yield background
    RawModule.watchers.remove(background.watch)
    background.close()


def pytest_collection_modifyitems(items):
    """The test that sums up what was launched runs last."""
    items.sort(key=lambda item: item.name == "test_all_that_was_launched_fits_on_every_gpu")
