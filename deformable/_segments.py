"""Maxima over segments of rows, and which row of its segment won: max pooling in NumPy.

Segments of any lengths go round by round: round j compares row j of all segments that have one.
Sorted by length these are a prefix, so that no work is wasted on short ones, and every round is
one gather and one comparison of whole rows. Results stay in that order.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Segments(NamedTuple):
    """Segments of rows, the longest first; ``order`` names them."""

    order: np.ndarray
    first: np.ndarray  # row of each
    stride: int  # to its next row
    sizes: np.ndarray  # how many segments have a row j
    places: np.ndarray | None  # where row i lies, if not at i

    def inverse(self) -> np.ndarray:
        """Where each segment is in the order."""
        places = np.empty_like(self.order)
        places[self.order] = np.arange(len(places))
        return places

    def rounds(self) -> Iterator[tuple[int, np.ndarray]]:
        """Round j, and row j of all segments that have one."""
        for j, size in enumerate(self.sizes):
            index = self.first[:size] + j * self.stride
            yield j, index if self.places is None else self.places[index]


def segments(
    first: np.ndarray, count: np.ndarray, stride: int = 1, places: np.ndarray | None = None
) -> Segments:
    """Segments of the ``count`` rows first, first + stride, ..."""
    most = int(count.max(initial=0))
    shorter = (most - count).astype(np.min_scalar_type(most))  # small integers are sorted faster
    order = np.argsort(shorter, kind="stable")
    sizes = len(count) - np.cumsum(np.bincount(count.astype(np.int64)))[:-1]
    return Segments(order, first[order], stride, sizes, places)


def sortable(rows: np.ndarray) -> np.ndarray:
    """Integers in the order of these numbers, 0 and −0 equal, NaN above all."""
    values = rows + 0  # −0 + 0 = 0
    values[np.isnan(values)] = np.nan  # of positive sign
    bits = values.view(f"i{values.itemsize}")
    bits ^= bits >> 8 * bits.itemsize - 1 & np.iinfo(bits.dtype).max
    return bits


def largest(rows: np.ndarray, of: Segments) -> np.ndarray:
    """The largest element of every segment in each column of ``rows``; 0 if there is none."""
    best = np.zeros((len(of.order), rows.shape[1]), rows.dtype)
    buffer = np.empty_like(best)
    for j, index in of.rounds():
        now, taken = best[: len(index)], buffer[: len(index)]
        rows.take(index, axis=0, out=taken if j else now, mode="clip")
        if j:
            np.maximum(now, taken, out=now)
    return best


def winners(
    keys: np.ndarray, of: Segments, codes: np.ndarray | None = None, pitch: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`largest` of ``sortable`` keys, and which of a segment's rows is the first of these.

    Row j of a segment has the code j · pitch, to which are added its ``codes`` below pitch.
    """
    best = np.zeros((len(of.order), keys.shape[1]), keys.dtype)
    code = np.zeros(best.shape, np.min_scalar_type(pitch * max(1, len(of.sizes))))
    buffer, larger = np.empty_like(best), np.empty(best.shape, np.uint8)  # to multiply by
    for j, index in of.rounds():
        m = len(index)
        here = code.dtype.type(j * pitch)
        if codes is not None:
            here = here + codes.take(index, axis=0, mode="clip")
        if j == 0:
            keys.take(index, axis=0, out=best[:m], mode="clip")
            code[:m] = here
            continue
        taken = keys.take(index, axis=0, out=buffer[:m], mode="clip")
        # codes grow from round to round: the largest is that of the last row to surpass all before
        np.greater(taken, best[:m], out=larger[:m].view(bool))
        np.maximum(best[:m], taken, out=best[:m])
        np.maximum(code[:m], larger[:m] * here, out=code[:m])
    return best, code
