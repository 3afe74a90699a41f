"""Checks of arguments that every function shares."""

import numpy as np
import pytest

from deformable._array import real_number


@pytest.mark.parametrize("value", [np.nan, np.inf, np.float32(np.inf), 10**400], ids=type)
def test_a_number_that_is_not_finite_is_named(value):
    with pytest.raises(ValueError, match=r"f: scale is .*, expected a finite number"):
        real_number("f", "scale", value)


@pytest.mark.parametrize("value", ["1", None, True, 1j, np.ones(1), np.bool_(True)])
def test_what_is_no_number_is_named(value):
    with pytest.raises(TypeError, match=r"f: scale is .*, expected a number"):
        real_number("f", "scale", value)


@pytest.mark.parametrize("value", [2, 2.0, np.int8(2), np.float16(2)])
def test_a_number_becomes_a_float(value):
    assert type(real_number("f", "scale", value)) is float
