"""Moving test data between NumPy and the library under test."""

import numpy as np


def on(xp, arrays):
    """Arrays by name, as arrays of ``xp``."""
    return {name: xp.asarray(a) for name, a in arrays.items()}


def host(xp, array):
    """An array of ``xp`` as one of NumPy."""
    return array if xp is np else xp.asnumpy(array)
