"""What an eager call on cupy arrays costs the host in Python.

    python -m benchmarks.host_cost

Kernels and cuBLAS are replaced by functions that do nothing and cupy by a module over NumPy, so
thin that little but the library's own Python remains: sizes are tiny, and what NumPy does for a
call of cupy counts as well. The number of the library's functions that a call enters is exact.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import numpy as np

import deformable
from benchmarks import bench_conv, bench_deform_conv, bench_roi
from benchmarks.gpu import Call
from benchmarks.harness import (
    BOTH,
    FORWARD,
    available,
    library_call,
    markdown,
    seconds_per_call,
    take_turns,
)
from benchmarks.workloads import Workload, draw
from deformable import _cuda

LIBRARY = str(Path(deformable.__file__).parent)
ROUNDS = 50
WARM = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the same: sizes do not matter here")
    parser.parse_args()
    rows = [["operator", "mode", "functions of the library", "us"]]
    for case in cases():
        for mode in (FORWARD, BOTH):
            with no_device():
                call = prepared(case, mode)
                rows.append(
                    [case.operator, mode, str(python_calls(call)), f"{seconds(call) * 1e6:.1f}"]
                )
    print(markdown(rows))


def cases() -> Iterator[Workload]:
    """A case of every operator."""
    pools = {case.operator: case for case in (*bench_roi.ALIGN, *bench_roi.POOL,
             *bench_roi.SENSITIVE, *bench_roi.DEFORMABLE)}  # fmt: skip
    for case in (bench_deform_conv.CASES[1], bench_conv.CASES[1], *pools.values()):
        if available(case.operator):
            yield case.tiny()


class Device:
    """The only device; launches keep kernels by its number, which no other one has."""

    id, compute_capability = -1, "90"
    attributes: ClassVar[dict[str, int]] = {
        "MultiProcessorCount": 132,
        "MaxSharedMemoryPerMultiprocessor": 228 << 10,
        "MaxSharedMemoryPerBlockOptin": 227 << 10,
    }

    def __init__(self, number: int = 0) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


class Pointer(NamedTuple):
    ptr: int
    device_id: int


class ThinArray(np.ndarray):
    """A NumPy array with the attributes that make it one of a device."""

    device = Device()
    data = Pointer(1 << 20, Device.id)

    def get(self) -> np.ndarray:
        return self.view(np.ndarray)


def thin_cupy() -> dict[str, ModuleType]:
    """The modules of a cupy whose arrays are NumPy's; what it lacks is NumPy's too."""

    class Module(ModuleType):
        def __getattr__(self, name: str) -> Any:
            function = getattr(np, name)

            def thin(*arguments: Any, **keywords: Any) -> Any:
                return function(*arguments, **keywords).view(ThinArray)

            made = thin if callable(function) and not isinstance(function, type) else function
            setattr(self, name, made)
            return made

    cupy, cuda = Module("cupy"), ModuleType("cupy.cuda")
    cupy.ndarray, cupy.cuda, cuda.Device = ThinArray, cuda, Device
    return {"cupy": cupy, "cupy.cuda": cuda}


@contextlib.contextmanager
def no_device() -> Iterator[None]:
    """Arrays of cupy are NumPy's in here, and launches and products do nothing."""

    def kernel(*_: Any) -> Any:
        return mock_kernel

    with (
        mock.patch.dict(sys.modules, thin_cupy()),
        mock.patch.object(_cuda, "_kernel", kernel),
        mock.patch.object(_cuda, "gemm", lambda *_, **__: None),
    ):
        yield


def mock_kernel(grid: Any, block: Any, args: Any, shared_mem: int = 0) -> None:
    """A launch that does nothing."""


mock_kernel.max_dynamic_shared_size_bytes = 227 << 10


def prepared(case: Workload, mode: str) -> Call:
    """A call on small arrays, made before so that everything that is kept is there."""
    arrays, grad_y = draw(case, np.random.default_rng(0))
    thin = {k: a.astype(np.float32).view(ThinArray) for k, a in arrays.items()}
    calls = library_call(case.operator, thin, case.keywords, grad_y.astype("f4").view(ThinArray))
    for _ in range(WARM):
        calls[mode]()
    return calls[mode]


def python_calls(call: Call) -> int:
    """How many functions of the library one call enters."""
    count = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(LIBRARY)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


def seconds(call: Call) -> float:
    """Seconds of the processor of one call."""
    sampler = partial(seconds_per_call, call, time.process_time)
    return take_turns({"": sampler}, rounds=ROUNDS)[""].median


if __name__ == "__main__":
    main()
