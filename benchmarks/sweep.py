"""Times of the GPU path under other choices of its constants, one changed at a time.

python -m benchmarks.sweep [--only D4,B1] [--tiny]
"""

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import deformable
from benchmarks import gpu
from benchmarks.bench_deform_conv import CASES
from benchmarks.contest import device_log, library, upload
from benchmarks.harness import (
    BOTH,
    FORWARD,
    LIMITS,
    OURS,
    RESULTS,
    Log,
    markdown,
    take_turns,
    until_interrupted,
    verify,
)
from benchmarks.workloads import Convolution, draw
from deformable import _conv, _fused, _fused_backward

SHAPES = ("D3", "D4", "B1", "B4")
DTYPES = ("float32", "tf32", "float16")
# a constant of the library and what else it could be
CHOICES: list[tuple[ModuleType, str, tuple[Any, ...]]] = [
    (_conv, "CHUNK_BYTES", (8 << 20, 16 << 20, 64 << 20)),
    (_fused, "LEAST_STEPS", (4, 16)),
    (_fused, "WIDTHS", ((64, 128), (32, 64))),
    (_fused_backward, "LEAST_STAGES", (8, 32)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="try it out; no results are written")
    parser.add_argument("--rounds", type=int, default=20, help="samples of everything")
    parser.add_argument("--only", type=lambda s: s.split(","), default=list(SHAPES))
    parser.add_argument("--dtypes", type=lambda s: s.split(","), default=list(DTYPES))
    parser.add_argument("--output", type=Path, default=RESULTS / "sweep.jsonl")
    options = parser.parse_args()
    log = device_log(options)
    failed = list[str]()
    with until_interrupted():
        for case in (case for case in CASES if case.name in options.only):
            for dtype in options.dtypes:
                with gpu.attempt(f"{case.label} {dtype}", failed):
                    _sweep(case.tiny() if options.tiny else case, dtype, options, log)
    print(markdown([["what", "measured"], *([r["what"], r["measured"]] for r in log.records)]))
    gpu.finish(failed)


def _sweep(case: Convolution, dtype: str, options: argparse.Namespace, log: Log) -> None:
    arrays, grad_y = draw(case, np.random.default_rng(0))
    exact = library(OURS, case, [(arrays, grad_y)], np.asarray).sets[0].results(BOTH)
    storage = "float32" if dtype == "tf32" else dtype
    runner = library(OURS, case, upload(arrays, grad_y, storage, offset="float32"))
    with deformable.float32_precision("high" if dtype == "tf32" else "highest"):
        for mode in (FORWARD, BOTH):
            call = gpu.rotating(runner.calls(mode))
            for choice, change in _variants():
                with change:
                    errors = verify(runner.sets[0], mode, exact)
                    right = max(errors.values()) <= LIMITS[dtype]
                    sampler = partial(gpu.batch_seconds, call, gpu.batch_size(call))
                    median = take_turns({"": sampler}, rounds=options.rounds)[""].median
                measured = f"{median * 1e6:.1f} us" if right else f"wrong: {errors}"
                log.add(what=f"{case.label} {dtype} {mode}: {choice}", measured=measured)


def _variants() -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    """The library as it is, first and last, and with one constant changed."""
    yield "as it is", _constants({})
    for module, name, values in CHOICES:
        for value in values:
            yield f"{name} = {value}", _constants({(module, name): value})
    yield "as it is, again", _constants({})


@contextlib.contextmanager
def _constants(values: Mapping[tuple[ModuleType, str], Any]) -> Iterator[None]:
    """Other values of constants of the library, and no plan made with others."""
    before = {(module, name): getattr(module, name) for module, name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[tuple[ModuleType, str], Any]) -> None:
    for (module, name), value in values.items():
        setattr(module, name, value)
    _fused.product_plan.cache_clear()
    _fused_backward.weight_plan.cache_clear()


if __name__ == "__main__":
    main()
