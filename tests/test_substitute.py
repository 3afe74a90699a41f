"""The substitute cupy does as cupy does where NumPy would do otherwise."""

import numpy as np
import pytest

from tests.conftest import HAVE_GPU

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.skipif(HAVE_GPU, reason="a GPU needs no substitute")


@pytest.mark.parametrize("convert", ["array", "asarray", "ascontiguousarray", "astype"])
def test_conversions_reach_float64_and_never_warn(convert):
    """NumPy finds float64 and None equal, and warns of numbers that are too large."""
    values = cupy.full((2, 3), 1e30, np.float32)
    function = getattr(cupy, convert, None) or (lambda a, dtype: getattr(a, convert)(dtype))
    assert function(values, dtype=np.float64).dtype == np.float64
    assert np.isinf(cupy.asnumpy(function(values, dtype=np.float16))).all()


def test_arithmetic_never_warns():
    infinite = cupy.full(3, np.inf, np.float32)
    for result in (
        infinite - infinite,
        infinite.sum() * 0,
        cupy.sqrt(-infinite),
        0 / (infinite * 0),
    ):
        assert np.isnan(cupy.asnumpy(result)).all()
