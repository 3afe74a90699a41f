"""A comparison on a GPU: verify, take turns, record. The bench_* files say what takes part."""

import argparse
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import deformable
from benchmarks import gpu, rivals_gpu
from benchmarks.gpu import Runner, cupy
from benchmarks.harness import (
    BOTH,
    FORWARD,
    LIMITS,
    RESULTS,
    Contender,
    Log,
    available,
    environment,
    library_call,
    take_turns,
    until_interrupted,
    verify,
)
from benchmarks.table import gpu_tables
from benchmarks.workloads import Workload, draw

PACKAGES = ("numpy", "cupy-cuda12x", "cupy-cuda13x", "torch", "torchvision")
DTYPES = ("float32", "tf32", "float16", "bfloat16")
# of an H200: bytes copied per second and products in bfloat16 as measured, else its datasheet
BYTES_PER_SECOND = 4.3e12
OPERATIONS_PER_SECOND = {
    "float64": 67e12,
    "float32": 67e12,
    "tf32": 395e12,
    "float16": 790e12,
    "bfloat16": 790e12,
}
Inputs = tuple[dict[str, Any], Any]  # arguments by name and the gradient of the result


# (workload, arguments and gradient in float64, dtype) -> who takes part, ours first
Invite = Callable[[Any, dict[str, np.ndarray], np.ndarray, str], list[Runner]]


def run(description: str, output: str, cases: Iterable[Workload], invite: Invite) -> None:
    """The whole program: options, measurements, records, tables."""
    options = _options(description, RESULTS / output)
    log = device_log(options)
    words, failed = options.only.split(","), list[str]()
    with until_interrupted():
        for case in cases:
            named = any(word in f"{case.operator} {case.label}" for word in words)
            if named and available(case.operator):
                _measure(case.tiny() if options.tiny else case, invite, options, log, failed)
    print(gpu_tables(log.records))
    gpu.finish(failed)


def device_log(options: argparse.Namespace) -> Log:
    """The log of a run on the GPU; one on tiny shapes is not written down."""
    if not gpu.HAVE_GPU and not options.tiny:
        sys.exit("no GPU: only --tiny runs here, to try the benchmark out")
    ran = environment(PACKAGES, device=gpu.device_name(), clocks=gpu.clocks())
    print(ran, end="\n\n")
    return Log(None if options.tiny else options.output, ran)


def _options(description: str, output: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tiny", action="store_true", help="try it out; no results are written")
    parser.add_argument("--rounds", type=int, default=50, help="samples of the device's time")
    parser.add_argument("--only", default="", help="comma-separated words: labels must have one")
    parser.add_argument("--dtypes", type=lambda s: s.split(","), default=list(DTYPES))
    parser.add_argument("--modes", type=lambda s: s.split(","), default=[FORWARD, BOTH])
    parser.add_argument("--output", type=Path, default=output)
    return parser.parse_args()


def _measure(
    case: Workload, invite: Invite, options: argparse.Namespace, log: Log, failed: list[str]
) -> None:
    """All dtypes and modes of a case, on the same fresh numbers; adds to what ``failed``."""
    seed = secrets.randbits(32)
    arrays, grad_y = draw(case, np.random.default_rng(seed))
    exact = library_call(case.operator, arrays, case.keywords, grad_y)
    reference = Contender("float64", exact).results(BOTH)
    for dtype in options.dtypes:
        tf32 = dtype == "tf32"
        precision = deformable.float32_precision("high" if tf32 else "highest")
        attempt = gpu.attempt(f"{case.label} {dtype}", failed)
        with attempt, precision, rivals_gpu.precision(tf32):
            runners = invite(case, arrays, grad_y, "float32" if tf32 else dtype)
            for mode in options.modes:
                log.add(
                    operator=case.operator, label=case.label, dtype=dtype, mode=mode, seed=seed,
                    floor=floor(case, arrays, mode, dtype),
                    contenders=compare(runners, mode, reference, LIMITS[dtype], options.rounds),
                    clocks=gpu.clocks(), torch=rivals_gpu.describe(),
                )  # fmt: skip


def floor(case: Workload, arrays: Mapping[str, np.ndarray], mode: str, dtype: str) -> float:
    """Seconds that the least traffic, or the arithmetic of the products, takes on an H200.

    Forward reads the arguments and writes the result; backward reads them and the gradient of the
    result again and writes the gradients. Positions are counted in four bytes.
    """
    itemsize = {"float64": 8, "float32": 4, "tf32": 4}.get(dtype, 2)
    arguments = sum(
        a.size * (4 if k in ("offset", "rois") else itemsize) for k, a in arrays.items()
    )
    result = int(np.prod(case.result_shape)) * itemsize
    moved = arguments + result if mode == FORWARD else 3 * arguments + 2 * result
    flops = case.products.flops * (1 if mode == FORWARD else 3) if case.products else 0
    return max(moved / BYTES_PER_SECOND, flops / OPERATIONS_PER_SECOND[dtype])


def compare(
    runners: Sequence[Runner],
    mode: str,
    reference: Mapping[str, np.ndarray],
    limit: float,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Verify the first runner, which is ours, and measure in turns all that have this mode.

    Per runner: errors against the reference, seconds of the device ("gpu", and "graph" where it
    can be captured), seconds of the host per eager call with ("wall") and without waiting for the
    device ("issue"), and the peak of memory.
    """
    runners = [runner for runner in runners if mode in runner.sets[0].calls]
    answer: dict[str, dict[str, Any]] = {}
    for runner in runners:
        gpu.poison(sum(array.nbytes for array in reference.values()))
        errors = verify(runner.sets[0], mode, reference) if runner.same else {}
        if not answer and not max(errors.values()) <= limit:
            raise AssertionError(f"{runner.name} {mode} is off by {errors}, expected {limit}")
        answer[runner.name] = {"errors": errors}

    eager = {runner.name: gpu.rotating(runner.calls(mode)) for runner in runners}
    graphs = {runner.name: gpu.captured(runner.graph, runner.calls(mode)) for runner in runners}
    sizes = {name: gpu.batch_size(call) for name, call in eager.items()}
    clocks: dict[str, tuple[int, dict[str, Callable[[], float]]]] = {
        "gpu": (rounds, {n: partial(gpu.batch_seconds, c, sizes[n]) for n, c in eager.items()}),
        "graph": (rounds, {n: graph.seconds for n, graph in graphs.items() if graph is not None}),
        "wall": (5, {n: partial(gpu.wall_seconds, c, sizes[n]) for n, c in eager.items()}),
        "issue": (5, {n: partial(gpu.issue_seconds, c, sizes[n]) for n, c in eager.items()}),
    }
    for clock, (times_taken, samplers) in clocks.items():
        for name, times in take_turns(samplers, rounds=times_taken).items():
            answer[name][clock] = times._asdict()
    for runner in runners:
        answer[runner.name]["peak"] = runner.peak(runner.calls(mode)[0])
    return answer


# ---- inputs on the device


def upload(
    arrays: Mapping[str, np.ndarray], grad_y: np.ndarray, dtype: str, **other: str
) -> list[Inputs]:
    """Sets of the same inputs on the device, so many that together they pass by its L2 cache.

    ``other`` names the dtypes of arguments that do not have the common one.
    """
    first = {k: cupy.asarray(a.astype(_dtype(other.get(k, dtype)))) for k, a in arrays.items()}
    gradient = cupy.asarray(grad_y.astype(_dtype(dtype)))
    size = gradient.nbytes + sum(array.nbytes for array in first.values())
    return [
        ({name: array.copy() for name, array in first.items()}, gradient.copy())
        for _ in range(gpu.sets_needed(size))
    ]


def channels_last(inputs: Inputs) -> Inputs:
    """The inputs with their images, offsets and masks channels-last in memory."""

    def rearranged(array: Any) -> Any:
        if array.ndim != 4:
            return array
        return cupy.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    arrays, grad_y = inputs
    moved = {k: a if k == "weight" else rearranged(a) for k, a in arrays.items()}
    return moved, rearranged(grad_y)


def library(
    name: str,
    case: Workload,
    sets: Iterable[Inputs],
    to_numpy: Callable[[Any], np.ndarray] = lambda array: array.get(),
) -> Runner:
    """This library on these inputs."""
    calls = (library_call(case.operator, arrays, case.keywords, grad) for arrays, grad in sets)
    return Runner([Contender(name, one, to_numpy) for one in calls])


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
