"""Random hostile calls of every operator: see fuzz.py. ``--fuzz 10000`` makes more of them."""

import numpy as np
import pytest

from tests import fuzz


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
