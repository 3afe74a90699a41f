"""The tables of the README, from the files under benchmarks/results.

python -m benchmarks.table [FILE.jsonl ...]
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.harness import OURS, RESULTS, markdown, read_log

Record = dict[str, Any]


def main(files: Sequence[str]) -> None:
    for path in map(Path, files) if files else sorted(RESULTS.glob("*.jsonl")):
        ran, records = read_log(path)
        print(f"{path.name}: {', '.join(f'{key} {value}' for key, value in ran.items())}\n")
        print(tables(records), end="\n\n")


def tables(records: Sequence[Record]) -> str:
    """What a list of records amounts to."""
    if any("contenders" in record for record in records):
        return gpu_tables(records)
    if any("times" in record or "memory" in record for record in records):
        return cpu_tables(records)
    return markdown([["what", "measured"], *([r["what"], r["measured"]] for r in records)])


# ---- processor


def cpu_tables(records: Sequence[Record]) -> str:
    """Times, then memory."""
    timed = [record for record in records if "times" in record]
    weighed = [record for record in records if "memory" in record]
    made = [_cpu_times(timed)] if timed else []
    return "\n\n".join(made + ([_cpu_memory(weighed)] if weighed else []))


def _cpu_times(records: Sequence[Record]) -> str:
    names = dict.fromkeys(name for record in records for name in record["times"])
    others = [name for name in names if name not in (OURS, "products")]
    title = ["operator", "workload", "dtype", "mode", "ms (p10-p90)", "products"]
    rows = [[*title, *(f"{name} ms, ×" for name in others), "busy", "errors"]]
    for record in records:
        times = record["times"]
        ours = times[OURS]["median"]
        share = f"{times['products']['median'] / ours:.0%}" if "products" in times else "-"
        against = (
            f"{times[name]['median'] * 1e3:.1f}, {times[name]['median'] / ours:.2f}"
            if name in times
            else "-"
            for name in others
        )
        rows.append(
            [*_which(record), _spread(times[OURS], 1e3), share, *against, f"{record['busy']:.2f}",
             ", ".join(_worst(errors) for errors in record["errors"].values())]
        )  # fmt: skip
    return markdown(rows)


def _cpu_memory(records: Sequence[Record]) -> str:
    rows = [["operator", "workload", "dtype", "mode", "MiB", "torchvision MiB"]]
    for record in records:
        cells = (_mebibytes(record["memory"].get(name)) for name in (OURS, "torchvision"))
        rows.append([*_which(record), *cells])
    return markdown(rows)


# ---- GPU


def gpu_tables(records: Sequence[Record]) -> str:
    """Every comparison, then the geometric means of the ratios per operator, dtype and mode."""
    if not records:
        return "nothing was measured"
    names = dict.fromkeys(name for record in records for name in record["contenders"])
    others = [name for name in names if name != OURS]
    title = ["operator", "workload", "dtype", "mode", "us (p10-p90)", "floor", "wall us"]
    rows = [[*title, "MiB", "error", *others]]
    for record in records:
        found = record["contenders"]
        ours = found[OURS]
        floor = f"{record['floor'] / _device(ours)['median']:.0%}"
        rows.append(
            [*_which(record), _spread(_device(ours), 1e6), floor,
             f"{ours['wall']['median'] * 1e6:.1f}", _mebibytes(ours["peak"]),
             _worst(ours["errors"]), *(_against(found.get(name), ours) for name in others)]
        )  # fmt: skip
    return "\n\n".join([markdown(rows), _means(records, others)])


def _device(measured: Record) -> Record:
    """Times of the device: without the host's gaps where they could be taken so."""
    return measured.get("graph") or measured["gpu"]


def _ratio(measured: Record, ours: Record) -> float:
    """Times of the same clock over ours."""
    both = "graph" in measured and "graph" in ours
    clock = "graph" if both else "gpu"
    return measured[clock]["median"] / ours[clock]["median"]


def _against(measured: Record | None, ours: Record) -> str:
    if measured is None:
        return "-"
    wall = measured["wall"]["median"] / ours["wall"]["median"]
    parts = [f"×{_ratio(measured, ours):.2f}", f"wall ×{wall:.2f}", _mebibytes(measured["peak"])]
    return ", ".join(parts + ([_worst(measured["errors"])] if measured["errors"] else []))


def _means(records: Sequence[Record], others: Sequence[str]) -> str:
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["operator"], record["dtype"], record["mode"]), []).append(record)
    rows = [["operator", "dtype", "mode", *(f"{name}: mean × (least)" for name in others)]]
    for group, members in groups.items():
        cells = []
        for name in others:
            ratios = [
                _ratio(found[name], found[OURS])
                for found in (record["contenders"] for record in members)
                if name in found
            ]
            cells.append(f"{geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "-")
        rows.append([*group, *cells])
    return markdown(rows)


# ---- cells


def _which(record: Record) -> list[str]:
    return [record["operator"], record["label"], record["dtype"], record["mode"]]


def _spread(times: Record, unit: float) -> str:
    median, p10, p90 = (times[key] * unit for key in ("median", "p10", "p90"))
    return f"{median:.2f} ({p10:.2f}-{p90:.2f})"


def _worst(errors: dict[str, float]) -> str:
    return f"{max(errors.values()):.0e}"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


if __name__ == "__main__":
    main(sys.argv[1:])
