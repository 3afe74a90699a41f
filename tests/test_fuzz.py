"""Random hostile calls of every operator: see fuzz.py. ``--fuzz 10000`` makes more of them."""

import numpy as np
import pytest

from deformable import _roi
from tests import fuzz

MEANS = ("roi_align", "ps_roi_align", "deform_roi_pool", "deform_ps_roi_pool")


@pytest.mark.parametrize("name", fuzz.OPERATORS)
def test_random_calls_answer_the_documented_value_or_refuse(name, xp, request):
    """By itself in one dtype on a GPU or in the simulator, where each takes kernels of its own."""
    calls, dtypes = request.config.getoption("--fuzz"), fuzz.STORAGE
    if not calls:
        calls, dtypes = (200, dtypes) if xp is np else (25, (np.dtype(np.float32),))
    for number in range(calls):
        try:
            fuzz.check(fuzz.OPERATORS[name], xp, number, dtypes)
        except Exception as error:
            raise AssertionError(f"{name}, call {number} on {xp.__name__}: {error}") from error


@pytest.mark.parametrize("name", MEANS)
def test_a_sample_that_is_a_trillionth_of_a_pixel_off_is_noticed(name, monkeypatch):
    position = _roi.Runs.position
    monkeypatch.setattr(_roi.Runs, "position", lambda run, i: position(run, i) + 1e-12)
    with pytest.raises(AssertionError, match="expected"):
        for number in range(200):
            fuzz.check(fuzz.OPERATORS[name], np, number)
