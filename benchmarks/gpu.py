"""Clocks, graphs, memory and kernels on a GPU, for the benchmarks.

Without a GPU everything runs over the tests' substitute for cupy, so that the benchmarks can be
tried out: times are then those of the host and mean nothing.
"""

import contextlib
import itertools
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import Contender

try:
    import cupy

    HAVE_GPU = cupy.is_available()
except ImportError:
    HAVE_GPU = False
if not HAVE_GPU:
    from tests.simt import substitute

    substitute.install()
    import cupy

KERNELS = Path(__file__).parent / "cuda"
BATCH = 20  # calls between two events at most, as many as fill
BATCH_SECONDS = 1e-3
L2_TIMES = 4  # how often the inputs of all calls in turn exceed the L2 cache
MOST_SETS = 32

Call = Callable[[], Any]


# ---- the device


def device_name() -> str:
    if not HAVE_GPU:
        return "none"
    return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()


def clocks() -> str:
    """What the driver says of clocks, power and temperature; they are read, never set."""
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def l2_bytes() -> int:
    return cupy.cuda.Device().attributes["L2CacheSize"]


def sets_needed(size: int) -> int:
    """How many sets of inputs of ``size`` bytes it takes to pass by the L2 cache."""
    if not HAVE_GPU:
        return 2
    return int(np.clip(-(-L2_TIMES * l2_bytes() // max(1, size)), 2, MOST_SETS))


def rotating(calls: Sequence[Call]) -> Call:
    """A call that makes the next one of several calls, each on memory of its own."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def synchronize() -> None:
    cupy.cuda.Device().synchronize()


def poison(size: int) -> None:
    """Fill free memory of the pool with NaN, so that what a kernel does not write is seen."""
    if HAVE_GPU:  # the substitute does so by itself
        cupy.empty(size, np.uint8).fill(0xFF)
        synchronize()


@contextlib.contextmanager
def attempt(what: str, failed: list[str]) -> Iterator[None]:
    """What fails in here is told and noted, and the rest goes on, as long as the device does."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        failed.append(what)
        synchronize()


def finish(failed: list[str]) -> None:
    """End the program with an error if anything failed."""
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


# ---- clocks


def batch_seconds(call: Call, calls: int = BATCH) -> float:
    """Seconds of the device per call, of some calls between two events."""
    if not HAVE_GPU:
        return wall_seconds(call, 1)
    before, after = cupy.cuda.Event(), cupy.cuda.Event()
    before.record()
    for _ in range(calls):
        call()
    after.record()
    after.synchronize()
    return cupy.cuda.get_elapsed_time(before, after) * 1e-3 / calls


def batch_size(call: Call) -> int:
    """How many calls a batch has."""
    if not HAVE_GPU:
        return 1
    call()
    return int(np.clip(-(-BATCH_SECONDS // batch_seconds(call, 2)), 1, BATCH))


def wall_seconds(call: Call, calls: int = BATCH) -> float:
    """Seconds of the host per eager call, until the device has finished."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - begin) / calls


def issue_seconds(call: Call, calls: int = BATCH) -> float:
    """Seconds of the host per eager call, without waiting for the device."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - begin
    synchronize()
    return elapsed / calls


class Graph:
    """Calls captured once and replayed together, without the host's work between them."""

    _pool: Any = None

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = len(calls)
        self._pool = cupy.cuda.MemoryPool()  # what the graph writes to belongs to nobody else
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream, cupy.cuda.using_allocator(self._pool.malloc):
            for call in calls:
                call()
            stream.synchronize()
            stream.begin_capture()
            try:
                self._results = [call() for call in calls]
            finally:
                self._graph = stream.end_capture()

    def __del__(self) -> None:
        self._graph = self._results = None
        if self._pool is not None:
            self._pool.free_all_blocks()  # a pool does not do so when it ends

    def replay(self) -> None:
        self._graph.launch(cupy.cuda.Stream.null)

    def seconds(self) -> float:
        """Seconds of the device per call."""
        return batch_seconds(self.replay, 1) / self.calls


class TorchGraph(Graph):
    """The same for calls of torch, which has a pool and a capture of its own."""

    def __init__(self, calls: Sequence[Call]) -> None:
        import torch

        self.calls = len(calls)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = [call() for call in calls]

    def replay(self) -> None:
        self._graph.replay()


def captured(kind: type[Graph], calls: Sequence[Call]) -> Graph | None:
    """The calls as a graph, or None where cupy cannot capture them, or has no memory left."""
    if not HAVE_GPU:
        return None
    try:
        return kind(calls)
    except (RuntimeError, MemoryError) as error:  # RuntimeError: as cuBLAS calls
        print(f"not captured: {type(error).__name__}: {error}", file=sys.stderr)
        synchronize()
        return None


# ---- memory


def peak_bytes(call: Call) -> int:
    """Bytes of cupy's memory that a call takes at most, its results included."""
    if not HAVE_GPU:
        with substitute.memory() as peak:
            call()
        return int(peak[0])

    class Peak(cupy.cuda.MemoryHook):
        name = "peak"
        used = most = 0

        def malloc_postprocess(self, **event: Any) -> None:
            self.used += event["mem_size"]
            self.most = max(self.most, self.used)

        def free_postprocess(self, **event: Any) -> None:
            self.used -= event["mem_size"]

    with Peak() as hook:
        result = call()
    del result
    return hook.most


def torch_peak_bytes(call: Call) -> int:
    """The same for torch."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


# ---- contenders


class Runner(NamedTuple):
    """A contender on a GPU: the same calls on several sets of inputs, each in memory of its own."""

    sets: Sequence[Contender]
    graph: type[Graph] = Graph
    peak: Callable[[Call], int] = peak_bytes
    same: bool = True  # computes what the reference does

    @property
    def name(self) -> str:
        return self.sets[0].name

    def calls(self, mode: str) -> list[Call]:
        return [contender.calls[mode] for contender in self.sets]


# ---- kernels of the benchmarks


def kernel(file: str, name: str, *headers: str, **macros: Any) -> Any:
    """A kernel of benchmarks/cuda, after headers of the library, specialised by macros."""
    from deformable import _cuda

    own = f'#line 1 "{file}"\n' + (KERNELS / file).read_text()
    options = tuple(f"-D{key}={value}" for key, value in sorted(macros.items()))
    code = "\n".join([*map(_cuda.source, headers), own])
    return cupy.RawModule(code=code, options=options).get_function(name)
