"""The benchmarks verify before they time, run without a GPU, and then write no results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import deformable
from benchmarks import (
    bench_conv,
    bench_cpu,
    bench_deform_conv,
    bench_roi,
    contest,
    gpu,
    harness,
    host_cost,
    microbench,
    rivals_gpu,
    sweep,
    table,
)
from benchmarks.workloads import Convolution, Pooling, draw
from tests.conftest import HAVE_GPU

ROOT = Path(__file__).parent.parent
CASES = [*bench_cpu.EVERY, *bench_deform_conv.CASES, *bench_deform_conv.ELSEWHERE,
         *bench_conv.CASES, *bench_roi.ALIGN, *bench_roi.POOL, *bench_roi.SENSITIVE,
         *bench_roi.DEFORMABLE]  # fmt: skip
COMPARISONS = {
    "deform_conv2d": (bench_deform_conv, bench_deform_conv.CASES[1]),
    "conv2d": (bench_conv, bench_conv.CASES[1]),
    "roi_align": (bench_roi, bench_roi.ALIGN[0]),
    "deform_ps_roi_pool": (bench_roi, bench_roi.DEFORMABLE[0]),
}
# functions of the library that an eager call on cupy arrays enters: forward, forward + backward
ENTERED = {
    "deform_conv2d": (29, 84),
    "conv2d": (32, 81),
    "roi_align": (38, 76),
    "roi_pool": (34, 90),
    "ps_roi_pool": (38, 76),
    "ps_roi_align": (37, 74),
    "deform_ps_roi_pool": (41, 100),
    "deform_roi_pool": (38, 94),
}


def compared(monkeypatch, module, case, *options):
    """Without torch, which may be there and warn."""
    monkeypatch.setattr(rivals_gpu, "torch", lambda: None)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny", "--rounds=1", *options])
    contest.run("", "unused.jsonl", [case], module.invite)


@pytest.mark.parametrize("operator", COMPARISONS)
def test_a_comparison_runs_on_tiny_shapes_and_writes_no_results(
    operator, monkeypatch, tmp_path, capsys
):
    file = tmp_path / "results.jsonl"
    compared(monkeypatch, *COMPARISONS[operator], "--dtypes=float32", f"--output={file}")
    assert operator in capsys.readouterr().out
    assert not file.exists()


@pytest.mark.skipif(HAVE_GPU, reason="with a GPU it would run")
@pytest.mark.parametrize("program", [microbench, sweep, bench_deform_conv])
def test_without_a_gpu_only_tiny_runs_are_allowed(program, monkeypatch, tmp_path):
    file = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["benchmark", f"--output={file}"])
    run = getattr(program, "main", lambda: contest.run("", "unused.jsonl", [], program.invite))
    with pytest.raises(SystemExit, match="no GPU"):
        run()
    assert not file.exists()


@pytest.mark.parametrize("wrong", [lambda y: y * 1.01, lambda y: y * np.float32(np.nan)])
def test_a_wrong_result_is_not_timed_and_others_are(wrong, monkeypatch, capsys):
    right = deformable.deform_conv2d

    def forward(**arguments):
        y = right(**arguments)
        return y if isinstance(y, np.ndarray) or y.dtype == np.float16 else wrong(y)

    monkeypatch.setattr(deformable, "deform_conv2d", forward)
    module, case = COMPARISONS["deform_conv2d"]
    with pytest.raises(SystemExit, match=f"^failed: {case.tiny().label} float32$"):
        compared(monkeypatch, module, case, "--dtypes=float32,float16")
    printed = capsys.readouterr()
    assert "deformable forward is off by" in printed.err
    assert "float16" in printed.out and "float32" not in printed.out.partition("\n\n")[2]


def test_what_was_measured_before_an_interrupt_is_printed(monkeypatch, capsys):
    module, case = COMPARISONS["roi_align"]

    def cases():
        yield case
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny", "--rounds=1", "--dtypes=float32"])
    monkeypatch.setattr(rivals_gpu, "torch", lambda: None)
    contest.run("", "unused.jsonl", cases(), module.invite)
    printed = capsys.readouterr()
    assert case.tiny().label in printed.out
    assert "interrupted" in printed.err


def test_the_cpu_benchmark_runs_on_tiny_shapes_and_writes_no_results(tmp_path):
    file = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks.bench_cpu", "--tiny", "--no-memory", "--only=C "]
    done = subprocess.run(
        [*command, f"--output={file}"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "deform_conv2d" in done.stdout
    assert not file.exists()


@pytest.mark.parametrize("mode", [0, 1], ids=["forward", "both"])
@pytest.mark.parametrize("case", list(host_cost.cases()), ids=lambda case: case.operator)
def test_a_call_enters_few_functions(case, mode):
    with host_cost.no_device():
        entered = host_cost.python_calls(
            host_cost.prepared(case, (harness.FORWARD, harness.BOTH)[mode])
        )
    assert 0 < entered <= ENTERED[case.operator][mode]


@pytest.mark.skipif(HAVE_GPU, reason="the simulator runs them")
@pytest.mark.parametrize("name", microbench.MEASUREMENTS)
def test_a_microbenchmark_computes_what_it_says(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny", "--rounds=1", f"--only={name}"])
    microbench.main()
    assert len(capsys.readouterr().out.splitlines()) > 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}-{case.label}")
def test_a_result_has_the_shape_that_its_workload_tells(case):
    tiny = case.tiny()
    arrays, grad_y = draw(tiny, np.random.default_rng(0))
    y = getattr(deformable, tiny.operator)(**arrays, **tiny.keywords)
    assert y.shape == grad_y.shape == tiny.result_shape


@pytest.mark.parametrize("spread", [0.0, 2.0, 8.0])
def test_offsets_of_workloads_keep_off_the_pixels_in_single_precision(spread):
    case = Convolution("test", 1, 1, 20, 20, 1, spread=spread, outside=0.1)
    offset = case.arrays(np.random.default_rng(0))["offset"]
    assert (np.abs(offset - np.round(offset)) >= 1 / 256).all()
    assert (offset.astype(np.float32) == offset).all()


def test_rois_of_workloads_lie_in_their_image():
    case = Pooling("test", "roi_align", 2, 1, 30, 40, 50, 7, sides=(64, 1000))
    rois = case.arrays(np.random.default_rng(0))["rois"]
    assert (rois[:, 1:3] < rois[:, 3:5]).all()
    assert (rois[:, 1:] >= 0).all() and (rois[:, 3:] <= np.array([40, 30]) * 16).all()
    assert set(rois[:, 0]) == {0, 1}


@pytest.mark.parametrize("result", [np.full(3, np.nan), np.ones(4)])
def test_nan_and_wrong_shapes_are_infinitely_wrong(result):
    assert harness.relative_error(result, np.ones(3)) == float("inf")


def test_contenders_take_turns():
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    times = harness.take_turns(samplers, rounds=3)
    assert "".join(order[3:]) == "abcbcacab"
    assert times["a"] == harness.Times(1.0, 1.0, 1.0, 3)


def test_where_there_is_no_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert harness.commit() == "unknown"


def test_a_log_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "results" / "log.jsonl"
    log = harness.Log(file, {"device": "none"})
    log.add(what="a", measured="1 us")
    log.add(what="b", measured="2 us")
    assert harness.read_log(file) == ({"device": "none"}, log.records)
    assert all(json.loads(line) for line in file.read_text().splitlines())
    assert "2 us" in table.tables(log.records)


def test_sets_of_inputs_do_not_share_memory():
    arrays, grad_y = draw(bench_deform_conv.CASES[0].tiny(), np.random.default_rng(0))
    sets = contest.upload(arrays, grad_y, "float32")
    places = [array.data.ptr for inputs, grad in sets for array in (*inputs.values(), grad)]
    assert len(sets) == gpu.sets_needed(grad_y.size * 4 + sum(4 * a.size for a in arrays.values()))
    assert len(set(places)) == len(places)
