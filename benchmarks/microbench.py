"""What the GPU does at best: the rates and costs that designs and ceilings are reckoned with.

    python -m benchmarks.microbench [--only copy,gather] [--tiny]

Every figure is the median of many samples; what can be computed is compared with NumPy first.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import deformable
from benchmarks import gpu
from benchmarks.bench_deform_conv import CASES
from benchmarks.contest import device_log
from benchmarks.gpu import Call, cupy
from benchmarks.harness import (
    RESULTS,
    Times,
    markdown,
    relative_error,
    take_turns,
    until_interrupted,
)
from deformable import _cuda

FILE = "microbench.cu"
THREADS = 256
BLOCKS_PER_PROCESSOR = 8
WIDTHS = (1, 2, 4)
LAUNCHES = 100

Figures = Iterator[tuple[str, str]]  # what was measured, and how much


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="try it out; no results are written")
    parser.add_argument("--rounds", type=int, default=30, help="samples of everything")
    parser.add_argument("--only", default="", help="comma-separated names of measurements")
    parser.add_argument("--output", type=Path, default=RESULTS / "microbench.jsonl")
    options = parser.parse_args()
    log = device_log(options)
    rows, failed = [["what", "measured"]], list[str]()
    with until_interrupted():
        for name in (n for n in MEASUREMENTS if any(word in n for word in options.only.split(","))):
            with gpu.attempt(name, failed):
                for what, measured in MEASUREMENTS[name](options):
                    log.add(measurement=name, what=what, measured=measured)
                    rows.append([what, measured])
    print(markdown(rows))
    gpu.finish(failed)


def _median(call: Call, options: argparse.Namespace) -> float:
    """Seconds of the device per call."""
    calls = gpu.batch_size(call)
    times = take_turns({"": partial(gpu.batch_seconds, call, calls)}, rounds=options.rounds)
    return times[""].median


def _rate(amount: float, unit: str, seconds: float) -> str:
    return f"{amount / seconds / 1e12:.3f} T{unit}/s ({seconds * 1e6:.1f} us)"


def _grid() -> tuple[int]:
    processors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    return (processors * BLOCKS_PER_PROCESSOR,)


# ---- memory


def copies(options: argparse.Namespace) -> Figures:
    """Bytes read and written per second, from device memory and within the L2 cache."""
    sizes = {
        "device memory, 2 GiB": 2 << 30,
        "L2 cache, 16 MiB": 16 << 20,
        "L2 cache, 8 MiB": 8 << 20,
    }
    for where, size in sizes.items():
        size = 1 << 12 if options.tiny else size
        kernel = gpu.kernel(FILE, "copy", "ptx.cuh", WIDTH=4)
        source = cupy.full(size // 4, 1.5, np.float32)
        target = cupy.empty(size // 4, np.float32)
        call = partial(kernel, _grid(), (THREADS,), (source, target, np.int64(size // 16)))
        call()
        assert bool((source == target).all()), "copy: something was not copied"
        yield f"copy, {where}", _rate(2 * size, "B", _median(call, options))


def _pixels(near: bool, samples: int, height: int, width: int) -> np.ndarray:
    """Upper left pixels of samples: about a regular 3x3 grid of taps, or anywhere."""
    rng = np.random.default_rng(0)
    if not near:
        y, x = rng.integers(0, height - 1, samples), rng.integers(0, width - 1, samples)
    else:
        position, tap = np.divmod(np.arange(samples), 9)
        shift = np.round(rng.normal(0, 2, (2, samples))).astype(int)
        y = np.clip(position // width % height + tap // 3 - 1 + shift[0], 0, height - 2)
        x = np.clip(position % width + tap % 3 - 1 + shift[1], 0, width - 2)
    return (y * width + x).astype(np.int32)


def gathers(options: argparse.Namespace) -> Figures:
    """Bytes of corners loaded per second, 16 bytes per load."""
    height, width, samples = (6, 7, 64) if options.tiny else (200, 160, 32000 * 9)
    for channels in (8,) if options.tiny else (64, 256):
        lanes = min(32, channels // 4)
        block = (lanes, THREADS // lanes)
        rng = np.random.default_rng(1)
        host = rng.integers(-8, 8, (height * width, channels)).astype(np.float32)
        image = cupy.asarray(host)
        for near in (True, False):
            rows = _pixels(near, samples, height, width)
            sums = cupy.empty(_grid()[0] * THREADS, np.float32)
            arguments = (image, cupy.asarray(rows), sums)
            sizes = tuple(np.int64(n) for n in (samples, width, channels))
            kernel = gpu.kernel(FILE, "gather", "ptx.cuh", WIDTH=4)
            call = partial(kernel, _grid(), block, (*arguments, *sizes))
            call()
            corners = (rows[:, None] + [0, 1, width, width + 1]).ravel()
            expected = np.bincount(corners, minlength=len(host)) @ host.sum(
                axis=1, dtype=np.float64
            )
            found = sums.get().sum(dtype=np.float64)
            assert found == expected, f"gather: the sum is {found}, expected {expected}"
            where = "about a regular grid" if near else "anywhere"
            moved = samples * 4 * channels * 4
            seconds = _median(call, options)
            yield f"gather of corners {where}, {channels} channels", _rate(moved, "B", seconds)


def scatters(options: argparse.Namespace) -> Figures:
    """Bytes added per second by `red`, 1, 2 and 4 floats at a time."""
    pixels, samples, channels = (20, 90, 8) if options.tiny else (32000, 32000 * 9, 128)
    rng = np.random.default_rng(2)
    patterns = {
        "row after row": np.arange(samples) % pixels,
        "rows anywhere": rng.integers(0, pixels, samples),
        "36 additions to a pixel in a row": np.arange(samples) // 36 % pixels,
    }
    for pattern, rows in patterns.items():
        for wide in WIDTHS:
            lanes = min(32, channels // wide)
            block = (lanes, THREADS // lanes)
            image = cupy.zeros((pixels, channels), np.float32)
            kernel = gpu.kernel(FILE, "scatter", "ptx.cuh", WIDTH=wide)
            sizes = (np.int64(samples), np.int64(channels))
            indices = cupy.asarray(rows.astype(np.int32))
            call = partial(kernel, _grid(), block, (image, indices, *sizes))
            call()
            expected = np.bincount(rows, minlength=pixels)
            assert (image.get() == expected[:, None]).all(), "scatter: a wrong sum"
            seconds = _median(call, options)
            yield f"red.v{wide}, {pattern}", _rate(samples * channels * 4, "B", seconds)


# ---- products


def products(options: argparse.Namespace) -> Figures:
    """Operations per second of the library's calls of cuBLAS, columns times weights."""
    for case in CASES[:8]:
        size = (case.tiny() if options.tiny else case).products
        # at most 32 MiB of float32 columns, as the library makes them
        m = min(size.m, max(1, (32 << 20) // (4 * size.k)))
        for dtype in ("float32", "tf32", "float16"):
            storage = "float32" if dtype == "tf32" else dtype
            rng = np.random.default_rng(3)
            host = [rng.integers(-2, 3, shape) for shape in ((1, m, size.k), (1, size.n, size.k))]
            columns, weights = (cupy.asarray(a.astype(storage)) for a in host)
            out = cupy.empty((1, m, size.n), storage)
            with deformable.float32_precision("high" if dtype == "tf32" else "highest"):
                call = partial(_cuda.gemm, columns, weights.mT, out)
                call()
                exact = host[0][:, :8].astype(np.float64) @ host[1].mT
                error = relative_error(out.get()[:, :8], exact)
                assert error <= 1e-3, f"gemm: off by {error}"
                seconds = _median(call, options)
            flops = 2 * m * size.k * size.n
            shape = f"{m}x{size.k} @ {size.k}x{size.n}"
            yield f"cuBLAS {dtype} {case.name} {shape}", _rate(flops, "FLOP", seconds)


def tf32_errors(options: argparse.Namespace) -> Figures:
    """What three products in TF32 lose, by how often their sums move to plain float32."""
    k = 64 if options.tiny else 2304
    kernel = gpu.kernel(FILE, "tf32_product", "ptx.cuh", WIDTH=1)
    for promote in (0, 64, 16, 4, 1):
        errors = []
        for seed in range(2 if options.tiny else 64):
            rng = np.random.default_rng(seed)
            a, b = (rng.standard_normal((n, k)).astype(np.float32) for n in (16, 8))
            d = cupy.empty((16, 8), np.float32)
            numbers = (np.int64(k), np.int64(promote))
            kernel((1,), (32,), (cupy.asarray(a), cupy.asarray(b), d, *numbers))
            errors.append(relative_error(d.get(), a.astype(np.float64) @ b.T.astype(np.float64)))
        often = f"every {promote} steps" if promote else "never"
        yield f"3xTF32, K = {k}, promoted {often}", f"error {np.median(errors):.1e}"


# ---- the host


def launches(options: argparse.Namespace) -> Figures:
    """Microseconds of the host, and of the device, that a launch takes."""
    nothing = gpu.kernel(FILE, "nothing", "ptx.cuh", WIDTH=1)
    unused = cupy.zeros(1, np.float32)
    a, b = (cupy.ones((1, 64, 64), np.float32) for _ in range(2))
    out = cupy.empty((1, 64, 64), np.float32)
    calls: dict[str, Call] = {
        "launch of a RawKernel": lambda: nothing((1,), (32,), (unused,)),
        "deformable._cuda.gemm": lambda: _cuda.gemm(a, b, out),
        "cupy.matmul": lambda: cupy.matmul(a, b),
        "cupy.empty": lambda: cupy.empty((64, 64), np.float32),
    }
    for name, call in calls.items():
        clocks: dict[str, Callable[[], float]] = {
            "host": partial(gpu.issue_seconds, call, LAUNCHES),
            "until done": partial(gpu.wall_seconds, call, LAUNCHES),
        }
        times: dict[str, Times] = take_turns(clocks, rounds=options.rounds)
        yield name, ", ".join(f"{t.median * 1e6:.2f} us {clock}" for clock, t in times.items())
    graph = gpu.captured(gpu.Graph, [calls["launch of a RawKernel"]] * LAUNCHES)
    if graph is not None:
        seconds = take_turns({"": graph.seconds}, rounds=options.rounds)[""].median
        yield f"a launch in a graph of {LAUNCHES}", f"{seconds * 1e6:.2f} us"


MEASUREMENTS: dict[str, Callable[[Any], Figures]] = {
    "copy": copies,
    "gather": gathers,
    "scatter": scatters,
    "products": products,
    "tf32": tf32_errors,
    "launches": launches,
}


if __name__ == "__main__":
    main()
