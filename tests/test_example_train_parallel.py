"""examples/train_parallel.py: several ranks do what one does, and end together."""

import numpy as np
import pytest

from deformable import nn
from deformable.testing import error_bound
from tests import mpi
from tests.examples import EXAMPLES, assert_same_checkpoints, example, stopped_after

SCRIPT = str(EXAMPLES / "train_parallel.py")


@pytest.fixture(autouse=True)
def _where_mpi_starts():
    """The example starts it in this process."""
    mpi.require()


@pytest.fixture
def script(monkeypatch):
    """The example with 120 digits."""
    script = example("train_parallel")
    data = script.load_digits()
    data.images, data.target = data.images[:120], data.target[:120]
    monkeypatch.setattr(script, "load_digits", lambda: data)
    return script


def test_one_two_and_four_ranks_have_the_same_losses(tmp_path):
    example("train_parallel").main(["--quick", "--out", str(tmp_path)])
    for ranks in 2, 4:
        finished = mpi.run(ranks, SCRIPT, "--quick", "--out", str(tmp_path), cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
        assert f"loss of {ranks} ranks in float64" in finished.stdout
    one, two, four = (np.load(path) for path in sorted(tmp_path.glob("*-[124].npy")))
    assert one[-1] < 0.8 * one[0]
    bound = error_bound("float64", one, terms=96)
    for losses in two, four:
        assert (losses != one).any(), "they were added up in another order"
        assert (abs(losses - one) <= bound).all()
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


DIES = """
import os, runpy, signal, sys
from mpi4py import MPI
from deformable import nn

script, how = sys.argv.pop(1), sys.argv.pop(1)
step = nn.Optimizer.step

def dies(optimizer):
    if MPI.COMM_WORLD.Get_rank() == 1 and optimizer.steps == 2:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError("of one rank")
    step(optimizer)

nn.Optimizer.step = dies
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_rank_that_dies_ends_all_of_them(how, tmp_path):
    (tmp_path / "program.py").write_text(DIES)
    finished = mpi.run(2, "program.py", SCRIPT, how, cwd=tmp_path, timeout=60)
    assert finished.returncode != 0
    assert "digits that are read" not in finished.stdout
    assert ("ArithmeticError: of one rank" in finished.stderr) == (how == "raises")


@pytest.mark.parametrize("killed_at", [0, 2, 5])
def test_a_resumed_run_ends_as_if_never_stopped(killed_at, script, tmp_path, monkeypatch, capsys):
    run = ["--epochs", "3", "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    script.main([*run, str(whole)])
    with stopped_after(killed_at, monkeypatch):
        script.main([*run, str(parts)])
    script.main([*run, str(parts), "--resume"])
    assert len(assert_same_checkpoints(whole, parts)) == len(list(parts.glob("*.npz"))) == 1
    table = [text.splitlines() for text in capsys.readouterr().out.split("loss of 1 ranks")[1:]]
    assert [line for line in table[0] if "read" in line] == [
        line for line in table[1] if "read" in line
    ]


def test_a_finished_run_resumed_trains_nothing(script, tmp_path, monkeypatch):
    run = ["--epochs", "1", "--out", str(tmp_path)]
    script.main(run)
    monkeypatch.delattr(nn.SGD, "direction")
    script.main([*run, "--resume"])


def test_it_runs_on_a_gpu(script, tmp_path, device, capsys):
    data = script.load_digits()
    data.images, data.target = data.images[:12], data.target[:12]  # a GPU may be simulated
    run = ["--epochs", "1", "--batch", "10", "--out", str(tmp_path)]
    script.main([*run, "--device", device])
    assert "digits that are read" in capsys.readouterr().out


def test_a_batch_that_ranks_cannot_share_is_refused(script, tmp_path, capsys):
    class Three:
        def Get_rank(self):
            return 0

        def Get_size(self):
            return 3

    with pytest.raises(SystemExit):
        script.main(["--batch", "40"], Three())
    assert "a batch of 40 cannot be shared by 3 ranks" in capsys.readouterr().err
