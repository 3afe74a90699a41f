"""examples/scaled_digits.py keeps its promises, and goes on where it was stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import nn
from tests.examples import assert_same_checkpoints, check_resumed, example


@pytest.fixture
def scaled_digits():
    return example("scaled_digits")


@pytest.fixture
def few_digits(scaled_digits, monkeypatch):
    """scaled_digits with 60 digits and small networks."""
    shrink(scaled_digits, monkeypatch.setattr)
    return scaled_digits


def shrink(scaled_digits, put=setattr):
    data = scaled_digits.load_digits()
    data.images, data.target = data.images[:60], data.target[:60]
    put(scaled_digits, "load_digits", lambda: data)
    small = {"plain": ((4, 6), (2, 2)), "modulated": ((4, 6), (2, 2), 1, True)}
    put(scaled_digits, "NETWORKS", small | {"plain, wider": ((5, 8), (2, 2))})


@pytest.mark.parametrize("options", [["--rotate", "60"], ["--offsets-only"]])
def test_it_does_what_it_claims(options, scaled_digits, tmp_path, capsys):
    scaled_digits.main(["--quick", "--out", str(tmp_path), *options])
    table = capsys.readouterr().out
    if "--offsets-only" in options:
        assert "offsets trained" in table
    else:
        assert "modulated, layer 2 of 2" in table
        assert (tmp_path / "modulated-60.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [[], ["--offsets-only"]])
@pytest.mark.parametrize("killed_at", [0, 1, 3, 9, 11])
def test_a_resumed_run_ends_as_if_never_stopped(
    options, killed_at, few_digits, tmp_path, capsys, monkeypatch
):
    run = ["--epochs", "3", *options, "--out"]
    check_resumed(few_digits, run, killed_at, tmp_path, capsys, monkeypatch)


KILLED = """
import os, signal, sys
from deformable import nn
from tests.test_example_scaled_digits import example, shrink

step, steps = nn.Optimizer.step, iter(range(int(sys.argv[1])))

def killed(optimizer):
    if next(steps, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    step(optimizer)

nn.Optimizer.step = killed
scaled_digits = example("scaled_digits")
shrink(scaled_digits)
scaled_digits.main(sys.argv[2:])
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_a_run_that_is_killed_twice_ends_as_if_never_stopped(few_digits, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = ["--epochs", "3", "--out"]
    few_digits.main([*run, str(whole)])
    expected = capsys.readouterr().out.replace(str(whole), str(parts))
    root = Path(__file__).parents[1]
    for steps in "5", "4":
        done = subprocess.run(
            [sys.executable, "-c", KILLED, steps, *run, str(parts), "--resume"],
            cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        assert list(parts.glob("*.npz"))
    few_digits.main([*run, str(parts), "--resume"])
    assert capsys.readouterr().out == expected
    assert_same_checkpoints(whole, parts)


def test_a_finished_run_resumed_trains_nothing(few_digits, tmp_path, monkeypatch):
    run = ["--epochs", "1", "--out", str(tmp_path)]
    few_digits.main(run)
    monkeypatch.delattr(nn.Optimizer, "step")
    few_digits.main([*run, "--resume"])
    with pytest.raises(AttributeError):
        few_digits.main(run)


def test_it_runs_on_a_gpu(few_digits, tmp_path, device, capsys, monkeypatch):
    monkeypatch.setattr(few_digits, "TEST_POSES", 1)  # a GPU may be simulated
    few_digits.main(["--epochs", "1", "--device", device, "--out", str(tmp_path)])
    assert "modulated" in capsys.readouterr().out


def test_it_reads_mnist(few_digits, monkeypatch):
    class Mnist:
        data = np.repeat(np.arange(12), 28 * 28).reshape(12, 28 * 28)
        target = np.array([str(i % 10) for i in range(12)])

    monkeypatch.setattr(few_digits, "fetch_openml", lambda name, as_frame: Mnist)
    args = type("Arguments", (), {"mnist": True, "rotate": 0.0})
    learned, tested = few_digits.split_digits(args, 0, np)
    assert [digits.images.shape for digits in (learned, tested)] == [(10, 14, 14), (2, 14, 14)]
    for digits in learned, tested:
        assert_array_equal(np.round(digits.images[:, 0, 0] * 255) % 10, digits.labels)


def test_digits_are_placed_where_and_as_large_as_said(scaled_digits):
    blobs = np.zeros((1, 8, 8))
    blobs[0, 1:7, 1:7] = 1  # centred, hence so is its image
    digits = scaled_digits.Digits(np.repeat(blobs, 50, axis=0), np.arange(50), 60.0, np)
    scenes = digits.place(np.random.default_rng(0))
    assert_array_equal(np.sort(scenes.labels), np.arange(50))
    mass = scenes.x[:, 0].astype(np.float64)
    total = mass.sum(axis=(1, 2))
    grid = np.mgrid[:24, :24]
    centres = np.stack([(mass * axis).sum(axis=(1, 2)) / total for axis in grid], axis=1)
    assert abs(centres - scenes.centre).max() <= 0.5
    # bilinear sampling rounds 6 x 6 pixels to an area between these two
    area = total * (8 / scenes.side) ** 2
    assert area.min() >= 30
    assert area.max() <= 42
