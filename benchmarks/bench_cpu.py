"""The NumPy path beside torchvision, onnxruntime and OpenVINO, on the processor.

    python -m benchmarks.bench_cpu [--threads 1] [--only A,B] [--output FILE]

All contenders get the same C-contiguous (N, C, H, W) arrays; ours returns channels-last ones, as it
always does. What they compute is compared with our own in float64 before any time is taken. Then
they are called in turns of 50 ms within one process. "products" is the bare matrix products that a
convolution consists of: columns times weights, and for the backward the two products more, whole
and into arrays that exist already. Memory is what a process grows by during one call, the results
included; it has made the call before, so that what libraries keep for good does not count.

With one thread the clock is that of the process, so that other processes of a busy machine do not
count (their traffic in the caches does); "busy" says which share of the time the process had.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rivals
from benchmarks.harness import (
    BOTH,
    FORWARD,
    LIMITS,
    OURS,
    RESULTS,
    ROOT,
    Contender,
    Log,
    available,
    environment,
    library_call,
    seconds_per_call,
    take_turns,
    verify,
)
from benchmarks.table import cpu_tables
from benchmarks.workloads import Convolution, Pooling, Products, Workload, draw

SEED = 1703
TURN = 0.05  # seconds of calls in a row, so that none pays for the caches that another one filled
PACKAGES = ("numpy", "scipy", "torch", "torchvision", "onnxruntime", "openvino")
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

CONVOLUTIONS = [
    Convolution(*shape, offset_groups=offset_groups, modulated=modulated)
    for *shape, offset_groups in (
        ("A", 2, 64, 56, 56, 64, 1),
        ("B", 1, 256, 32, 32, 256, 1),
        ("B", 1, 256, 32, 32, 256, 4),
        ("C", 8, 16, 28, 28, 32, 1),
    )
    for modulated in (False, True)
]
ROI_MAP = (1, 256, 50, 50)
CLASSES = 10  # of the position-sensitive maps
POOLINGS = [
    Pooling("D", "roi_align", *ROI_MAP, 128, 7, options={"sampling_ratio": 2}),
    Pooling("D", "roi_align", *ROI_MAP, 128, 7),
    Pooling("D", "roi_pool", *ROI_MAP, 128, 7),
    *(
        Pooling(
            "E", operator, 1, CLASSES * size * size, 50, 50, 300, size,
            options={"sampling_ratio": 4},
        )
        for operator in ("ps_roi_align", "deform_ps_roi_pool")
        for size in (3, 7)
    ),
]  # fmt: skip
LARGE = Convolution("large", 8, 64, 112, 112, 64)  # for its memory only
EVERY = [*CONVOLUTIONS, *POOLINGS, LARGE]
MEMORY_CALLS = 5
DTYPES = ("float32", "float64")
# of a rival's error: rounding in float32 may take torchvision's roi_pool into the next pixel
RIVAL_LIMIT = 0.05


def main() -> None:
    options = _options()
    _with_threads(options.threads)
    if options.memory_of:
        print(_peak_growth(*json.loads(options.memory_of), options))
        return
    ran = environment(PACKAGES, threads=options.threads, blas=_blas())
    log = Log(None if options.tiny else options.output, ran)
    print(f"{ran}\n")
    if not options.no_times:
        for workload in _workloads(options, [*CONVOLUTIONS, *POOLINGS]):
            for dtype in options.dtypes:
                for mode in (FORWARD, BOTH):
                    _measure(workload, dtype, mode, options, log)
    if not options.no_memory:
        for workload in _workloads(options, EVERY):
            for mode in (FORWARD, BOTH):
                _measure_memory(workload, mode, options, log)
    print(cpu_tables(log.records))
    if log.path is not None:
        print(f"\nwritten to {log.path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of BLAS and of every rival")
    parser.add_argument("--seconds", type=float, default=4.0, help="of turns per line")
    parser.add_argument("--only", default="", help="comma-separated words: labels must have one")
    parser.add_argument("--dtypes", type=lambda s: s.split(","), default=list(DTYPES))
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--no-times", action="store_true", help="memory only")
    parser.add_argument("--tiny", action="store_true", help="try it out; no results are written")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.jsonl")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def _with_threads(threads: int) -> None:
    """Start again with these numbers of threads, which libraries read as they are loaded.

    OpenBLAS is also freed of a processor type that the environment may have tied it to: the other
    libraries take the instructions they find.
    """
    fixed = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    wanted = fixed | dict.fromkeys(THREAD_VARIABLES, str(threads))
    if wanted != os.environ:
        command = [sys.executable, "-m", "benchmarks.bench_cpu", *sys.argv[1:]]
        os.execve(sys.executable, command, wanted)


def _workloads(options: argparse.Namespace, every: list[Workload]) -> Iterator[Workload]:
    words = options.only.split(",")
    for workload in every:
        named = f"{workload.operator} {workload.label}"
        if any(word in named for word in words) and available(workload.operator):
            yield workload.tiny() if options.tiny else workload


def _blas() -> str:
    """Name and version of numpy's BLAS, and its kernels where threadpoolctl can tell them."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    tool = rivals.find("threadpoolctl")
    pools = tool.threadpool_info() if tool is not None else []
    kernels = {pool["architecture"] for pool in pools if "architecture" in pool}
    return " ".join([blas["name"], blas["version"], *sorted(kernels)])


# ---- contenders


def _arguments(workload: Workload, dtype: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Fresh arguments and a gradient of the result, in this dtype and C-contiguous."""
    arrays, grad_y = draw(workload, np.random.default_rng(SEED))
    return {name: a.astype(dtype, order="C") for name, a in arrays.items()}, grad_y.astype(dtype)


def _contenders(
    workload: Workload, arrays: Mapping[str, np.ndarray], grad_y: np.ndarray, threads: int
) -> Iterator[Contender]:
    """This library first, then every rival that is installed and has the operator."""
    yield Contender(OURS, library_call(workload.operator, arrays, workload.keywords, grad_y))
    found = [_torchvision(workload, arrays, grad_y, threads)]
    if isinstance(workload, Convolution):
        for rival in (rivals.onnxruntime, rivals.openvino):
            found.append(rival(arrays, workload.keywords, threads))
    yield from (contender for contender in found if contender is not None)


def _torchvision(
    workload: Workload, arrays: Mapping[str, np.ndarray], grad_y: np.ndarray, threads: int
) -> Contender | None:
    torch = rivals.find("torch")
    if torch is None:
        return None
    torch.set_num_threads(threads)
    tensors = {name: rivals.torch_tensor(array) for name, array in arrays.items()}
    return rivals.torchvision(
        workload.operator, tensors, _torchvision_keywords(workload), rivals.torch_tensor(grad_y)
    )


def _torchvision_keywords(workload: Workload) -> dict[str, Any]:
    """The same keyword arguments, without those that only our operator has."""
    unknown = {"gamma", "group_size"} if workload.operator in rivals.STAND_INS else set()
    return {key: value for key, value in workload.keywords.items() if key not in unknown}


def _products(size: Products, dtype: str) -> dict[str, Callable[[], Any]]:
    """The bare matrix products of a convolution."""
    rng = np.random.default_rng(SEED)
    columns = rng.standard_normal((size.groups, size.m, size.k)).astype(dtype)
    weights = rng.standard_normal((size.groups, size.k, size.n)).astype(dtype)
    rows = np.empty((size.groups, size.m, size.n), dtype)
    grad_columns, grad_weights = np.empty_like(columns), np.empty_like(weights)

    def forward() -> None:
        np.matmul(columns, weights, out=rows)

    def both() -> None:
        forward()
        np.matmul(rows, weights.transpose(0, 2, 1), out=grad_columns)
        np.matmul(columns.transpose(0, 2, 1), rows, out=grad_weights)

    return {FORWARD: forward, BOTH: both}


# ---- measurements


def _measure(
    workload: Workload, dtype: str, mode: str, options: argparse.Namespace, log: Log
) -> None:
    """Verify all contenders, then take their times in turns."""
    arrays, grad_y = _arguments(workload, dtype)
    exact = {name: a.astype(np.float64) for name, a in arrays.items()}
    reference = Contender(
        "float64",
        library_call(workload.operator, exact, workload.keywords, grad_y.astype(np.float64)),
    ).results(BOTH)

    calls, errors = {}, {}
    for contender in _contenders(workload, arrays, grad_y, options.threads):
        if mode not in contender.calls:
            continue
        if contender.name == OURS or rivals.comparable(workload.operator):
            errors[contender.name] = verify(contender, mode, reference)
            worst = max(errors[contender.name].values())
            limit = LIMITS[dtype] if contender.name == OURS else RIVAL_LIMIT
            if not worst <= limit:
                raise AssertionError(
                    f"{workload.operator} {workload.label} {dtype} {mode}: {contender.name} is "
                    f"off by {errors[contender.name]}, expected at most {limit}"
                )
        calls[contender.name] = contender.calls[mode]
    if workload.products is not None:
        calls["products"] = _products(workload.products, dtype)[mode]

    before = time.process_time(), time.perf_counter()
    clock = time.process_time if options.threads == 1 else time.perf_counter
    samplers = {name: partial(seconds_per_call, call, clock, TURN) for name, call in calls.items()}
    times = take_turns(samplers, seconds=0.0 if options.tiny else options.seconds)
    busy = (time.process_time() - before[0]) / (time.perf_counter() - before[1])
    log.add(
        operator=workload.operator, label=workload.label, dtype=dtype, mode=mode,
        times={name: t._asdict() for name, t in times.items()}, errors=errors, busy=round(busy, 3),
    )  # fmt: skip


def _measure_memory(workload: Workload, mode: str, options: argparse.Namespace, log: Log) -> None:
    """What a fresh process grows by in one call, for us and for torchvision, in float32."""
    grown = {}
    for name in (OURS, "torchvision"):
        if name == "torchvision" and rivals.find("torchvision") is None:
            continue
        number = next(i for i, w in enumerate(EVERY) if workload in (w, w.tiny()))
        command = [sys.executable, "-m", "benchmarks.bench_cpu", f"--threads={options.threads}"]
        command += ["--tiny"] * options.tiny + ["--memory-of", json.dumps([number, name, mode])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        grown[name] = int(done.stdout)
    log.add(
        operator=workload.operator, label=workload.label, dtype="float32", mode=mode, memory=grown
    )


def _peak_growth(number: int, name: str, mode: str, options: argparse.Namespace) -> int:
    """Bytes by which the resident memory of this process peaks above its size before one call.

    The median of some calls: what allocators keep of freed memory differs from one to the next.
    """
    workload = EVERY[number].tiny() if options.tiny else EVERY[number]
    grown = []
    for _ in range(1 + MEMORY_CALLS):
        arrays, grad_y = _arguments(workload, "float32")
        if name == OURS:
            call = library_call(workload.operator, arrays, workload.keywords, grad_y)[mode]
        else:
            call = _torchvision(workload, arrays, grad_y, options.threads).calls[mode]
        ctypes.CDLL(None).malloc_trim(0)  # what the drawing of arguments left behind
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        result = call()
        grown.append(_status("VmHWM") - before)
        del result, call
    del grown[0]  # it loaded the code and filled the buffers that libraries keep
    return statistics.median_low(grown)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
