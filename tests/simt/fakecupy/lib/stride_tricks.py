"""cupy.lib.stride_tricks"""

import numpy as np

from tests.simt.fakecupy._ndarray import checked

as_strided = checked(np.lib.stride_tricks.as_strided, "x, shape=None, strides=None")
sliding_window_view = checked(
    np.lib.stride_tricks.sliding_window_view, "x, window_shape, axis=None"
)
