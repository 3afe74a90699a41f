"""Checks that only a real GPU can answer, beside the tests.

    python -m benchmarks.device_checks [--tiny]       ten runs of every operator, bit for bit
    python -m benchmarks.device_checks --once         every operator once, small: for a sanitizer

With ``--once`` every array is an allocation of its own, so that compute-sanitizer sees where it
ends, which it does not within cupy's pool.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

import deformable
from benchmarks import bench_conv, bench_deform_conv, bench_roi, gpu
from benchmarks.contest import DTYPES, library, upload
from benchmarks.gpu import cupy
from benchmarks.harness import (
    BOTH,
    LIMITS,
    OURS,
    available,
    markdown,
    until_interrupted,
    verify,
)
from benchmarks.workloads import Convolution, Workload, draw

RUNS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="small, without cupy's pool")
    parser.add_argument("--tiny", action="store_true", help="small")
    parser.add_argument("--dtypes", type=lambda s: s.split(","), default=list(DTYPES))
    options = parser.parse_args()
    if not gpu.HAVE_GPU and not options.tiny:
        sys.exit("no GPU: only --tiny runs here, to try the checks out")
    if options.once and gpu.HAVE_GPU:
        cupy.cuda.set_allocator(None)
    rows, failed = [["operator", "workload", "dtype", "error", "same bits"]], list[str]()
    with until_interrupted():
        for case in _cases():
            if options.once or options.tiny:
                case = _wide(case.tiny()) if options.once else case.tiny()
            with gpu.attempt(case.label, failed):
                for dtype, error, same in _check(case, options.dtypes, 1 if options.once else RUNS):
                    rows.append([case.operator, case.label, dtype, f"{error:.0e}", f"{same:.0%}"])
                    if not error <= LIMITS[dtype] or same < 1:
                        failed.append(f"{case.label} {dtype}")
    print(markdown(rows))
    gpu.finish(failed)


def _cases() -> Iterator[Workload]:
    """A case of every operator, and those that take different paths through the kernels."""
    convolutions = {"D4", "D5d", "B4", "S1", "X4", "V4"}
    deformable_ones = [c for c in bench_deform_conv.CASES if c.name in convolutions]
    plain = [case for case in bench_conv.CASES if case.name in {"D4", "X4"}]
    pools = {case.operator: case for case in (*bench_roi.ALIGN, *bench_roi.POOL,
             *bench_roi.SENSITIVE, *bench_roi.DEFORMABLE)}  # fmt: skip
    for case in (*deformable_ones, *plain, *pools.values()):
        if available(case.operator):
            yield case


def _wide(case: Workload) -> Workload:
    """With more channels than a tile of a convolution has, none of which are full."""
    if isinstance(case, Convolution) and case.groups == 1:
        return replace(case, channels=72, out_channels=136)
    return case


def _check(case: Workload, dtypes: list[str], runs: int) -> Iterator[tuple[str, float, float]]:
    """By dtype: the largest error of all results, the share of runs with the bits of the first."""
    arrays, grad_y = draw(case, np.random.default_rng(0))
    reference = library(OURS, case, [(arrays, grad_y)], np.asarray).sets[0].results(BOTH)
    for dtype in dtypes:
        storage = "float32" if dtype == "tf32" else dtype
        inputs = upload(arrays, grad_y, storage, rois="float32", offset="float32")[:1]
        contender = library(OURS, case, inputs).sets[0]
        with deformable.float32_precision("high" if dtype == "tf32" else "highest"):
            gpu.poison(sum(array.nbytes for array in reference.values()))
            error = max(verify(contender, BOTH, reference).values())
            first = {name: array.tobytes() for name, array in contender.results(BOTH).items()}
            same = 1
            for _ in range(runs - 1):
                again = contender.results(BOTH)
                same += all(again[name].tobytes() == bits for name, bits in first.items())
        yield dtype, error, same / runs


if __name__ == "__main__":
    main()
