"""Loading the example scripts, and stopping them halfway."""

import contextlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import nn

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    """An example as a module of its own, so that a test may change it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def stopped_after(steps, monkeypatch):
    """A training stops, as by Ctrl-C, when it has made so many steps of its optimizers."""
    step, left = nn.Optimizer.step, iter(range(steps))

    def stopping(optimizer):
        if next(left, None) is None:
            raise KeyboardInterrupt
        step(optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Optimizer, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            yield


def check_resumed(script, run, steps, folder, capsys, monkeypatch):
    """A run that is stopped and resumed prints and saves what a whole one does; its checkpoints."""
    whole, parts = folder / "whole", folder / "parts"
    script.main([*run, str(whole)])
    expected = capsys.readouterr().out.replace(str(whole), str(parts))
    with stopped_after(steps, monkeypatch):
        script.main([*run, str(parts)])
    capsys.readouterr()
    script.main([*run, str(parts), "--resume"])
    assert capsys.readouterr().out == expected
    return assert_same_checkpoints(whole, parts)


def assert_same_checkpoints(whole, parts):
    """Answers the paths of those of ``whole``, of which there is one at least."""
    paths = list(whole.glob("*.npz"))
    assert paths
    for path in paths:
        with np.load(path) as want, np.load(parts / path.name) as have:
            assert have.files == want.files
            for name in want.files:
                assert_array_equal(have[name], want[name])
    return paths
