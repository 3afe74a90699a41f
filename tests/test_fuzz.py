"""Random hostile calls of every operator: see fuzz.py. ``--fuzz 10000`` makes more of them."""

import numpy as np
import pytest

from tests import fuzz


@pytest.mark.parametrize("name", fuzz.OPERATORS)
def test_random_calls_answer_the_documented_value_or_refuse(name, xp, request):
    calls = request.config.getoption("--fuzz") // (1 if xp is np else 5)
    for number in range(calls):
        try:
            fuzz.check(fuzz.OPERATORS[name], xp, number)
        except Exception as error:
            raise AssertionError(f"{name}, call {number} on {xp.__name__}: {error}") from error
