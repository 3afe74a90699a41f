"""cupy.lib"""

from tests.simt.fakecupy.lib import stride_tricks

__all__ = ["stride_tricks"]
