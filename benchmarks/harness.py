"""What all benchmarks share: contenders, verification before timing, turns, records, tables."""

import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import deformable

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FORWARD, BOTH = "forward", "forward + backward"
OURS = "deformable"
# ‖result − reference‖ / ‖reference‖ against float64: what rounding alone can explain
LIMITS = {"float16": 5e-3, "bfloat16": 4e-2, "float32": 2e-5, "tf32": 5e-3, "float64": 1e-12}


class Contender(NamedTuple):
    """One implementation of a workload, ready to be called on arguments that it holds.

    ``calls`` has a function per mode. FORWARD returns the result, BOTH a dict of the result "y"
    and the gradients by the names of the arguments; ``numpy`` converts one array of them.
    """

    name: str
    calls: Mapping[str, Callable[[], Any]]
    numpy: Callable[[Any], np.ndarray] = np.asarray

    def results(self, mode: str) -> dict[str, np.ndarray]:
        answer = self.calls[mode]()
        named = answer if isinstance(answer, Mapping) else {"y": answer}
        return {name: self.numpy(array) for name, array in named.items() if array is not None}


def library_call(
    operator: str, arrays: Mapping[str, Any], keywords: Mapping[str, Any], grad_y: Any
) -> dict[str, Callable[[], Any]]:
    """The modes of an operator of this library, on arrays of numpy or cupy."""
    forward = getattr(deformable, operator)
    backward = getattr(deformable, f"{operator}_backward")

    def both() -> dict[str, Any]:
        y = forward(**arrays, **keywords)
        return {"y": y, **backward(grad_y, **arrays, **keywords)._asdict()}

    return {FORWARD: lambda: forward(**arrays, **keywords), BOTH: both}


def available(operator: str) -> bool:
    """Whether the library has this operator; says so on the error stream where it has not."""
    found = hasattr(deformable, operator)
    if not found:
        print(f"skipped: the library has no {operator}", file=sys.stderr)
    return found


# ---- verification


def relative_error(result: np.ndarray, reference: np.ndarray) -> float:
    """‖result − reference‖ / ‖reference‖; NaN, or a wrong shape, is infinitely wrong."""
    if result.shape != reference.shape:
        return float("inf")
    difference = float(np.linalg.norm((result.astype(np.float64) - reference).ravel()))
    size = float(np.linalg.norm(reference.ravel()))
    error = difference / size if size else difference
    return error if error == error else float("inf")


def verify(
    contender: Contender, mode: str, reference: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Relative errors of everything the contender computes, by name."""
    results = contender.results(mode)
    expected = ["y"] if mode == FORWARD else list(reference)
    missing = set(expected) - set(results)
    if missing:
        raise AssertionError(f"{contender.name} computes no {', '.join(sorted(missing))}")
    return {name: relative_error(results[name], reference[name]) for name in expected}


# ---- timing


@contextlib.contextmanager
def until_interrupted() -> Iterator[None]:
    """What is measured in here until Ctrl-C, or until its time runs out, is kept and printed."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: what follows is what there was until then", file=sys.stderr)


class Times(NamedTuple):
    """Seconds per call."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Times":
        p10, p90 = np.percentile(samples, (10, 90))
        return cls(statistics.median(samples), float(p10), float(p90), len(samples))


def seconds_per_call(
    call: Callable[[], Any],
    clock: Callable[[], float] = time.perf_counter,
    shortest: float = 2e-3,
) -> float:
    """Seconds of one call, of as many in a row as take ``shortest`` seconds."""
    count, start = 0, clock()
    while True:
        call()
        count += 1
        elapsed = clock() - start
        if elapsed >= shortest:
            return elapsed / count


def take_turns(
    samplers: Mapping[str, Callable[[], float]], seconds: float = 0.0, rounds: int = 7
) -> dict[str, Times]:
    """Times of several contenders sampled in turns, so that a slow moment hits them all.

    A sampler returns seconds per call. Every round has a sample of each and begins with another
    one. Rounds go on for ``seconds``, and there are ``rounds`` of them at least.
    """
    names = list(samplers)
    for name in names:
        samplers[name]()  # memory, caches, compiled kernels
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while names and (done < rounds or time.perf_counter() - start < seconds):
            first = done % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(samplers[name]())
            done += 1
    finally:
        gc.enable()
    return {name: Times.of(values) for name, values in samples.items()}


# ---- records


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the library, with a + where its files differ from that."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
        except OSError:  # there is no git
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "deformable")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def environment(packages: Iterable[str], **more: Any) -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions(packages),
        **more,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (li.split(":")[1].strip() for li in lines if li.startswith("model name")), "unknown"
    )


class Log:
    """Records of a run as JSON lines, the first of which is the environment.

    ``path`` None keeps them from the disk: a run on tiny shapes, or without the device that it is
    about, must not look like a result.
    """

    def __init__(self, path: Path | None, environment: Mapping[str, Any]) -> None:
        self.records: list[dict[str, Any]] = []
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"environment": dict(environment)}) + "\n")

    def add(self, **record: Any) -> dict[str, Any]:
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record


def read_log(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The environment and the records of a file that :class:`Log` wrote."""
    first, *rest = map(json.loads, path.read_text().splitlines())
    return first["environment"], rest


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the titles, as a table in aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
