"""Maxima over segments of rows, and which row of its segment won: max pooling in NumPy.

Segments of any lengths go round by round: round j compares row j of all segments that have one.
Sorted by length these are a prefix, so that no work is wasted on short ones, and every round is
one gather and one comparison of whole rows.
"""

from collections.abc import Iterator

import numpy as np


def sortable(rows: np.ndarray) -> np.ndarray:
    """Integers in the order of these numbers, 0 and −0 equal, NaN above all."""
    values = rows + 0  # −0 + 0 = 0
    values[np.isnan(values)] = np.nan  # of positive sign
    bits = values.view(f"i{values.itemsize}")
    bits ^= bits >> 8 * bits.itemsize - 1 & np.iinfo(bits.dtype).max
    return bits


def largest(rows: np.ndarray, first: np.ndarray, count: np.ndarray, stride: int = 1) -> np.ndarray:
    """Of every segment, the largest of the rows first, first + stride, ..., element by element.

    There are ``count`` of them; where there are none the result is 0.
    """
    order = np.argsort(-count, kind="stable")
    best = np.zeros((len(first), rows.shape[1]), rows.dtype)
    buffer = np.empty_like(best)
    for j, index in _rounds(first[order], count, stride):
        taken = rows.take(index, axis=0, out=buffer[: len(index)], mode="clip")
        now = best[: len(index)]
        np.maximum(now, taken, out=now) if j else np.copyto(now, taken)
    return best[np.argsort(order)]


def winners(
    keys: np.ndarray,
    first: np.ndarray,
    count: np.ndarray,
    stride: int = 1,
    codes: np.ndarray | None = None,
    pitch: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`largest` of ``sortable`` keys, and which of a segment's rows is the first of these.

    Row j of a segment has the code j · pitch, to which are added its ``codes`` below pitch.
    """
    order = np.argsort(-count, kind="stable")
    best = np.zeros((len(first), keys.shape[1]), keys.dtype)
    code = np.zeros(best.shape, np.min_scalar_type(pitch * int(count.max(initial=1))))
    buffer, larger = np.empty_like(best), np.empty(best.shape, bool)
    for j, index in _rounds(first[order], count, stride):
        m = len(index)
        taken = keys.take(index, axis=0, out=buffer[:m], mode="clip")
        here = code.dtype.type(j * pitch)
        if codes is not None:
            here = here + codes.take(index, axis=0, mode="clip")
        if j == 0:
            best[:m], code[:m] = taken, here
            continue
        # codes grow from round to round: the largest is that of the last row to surpass all before
        np.greater(taken, best[:m], out=larger[:m])
        np.maximum(best[:m], taken, out=best[:m])
        np.maximum(code[:m], larger[:m] * here, out=code[:m])
    back = np.argsort(order)
    return best[back], code[back]


def _rounds(first: np.ndarray, count: np.ndarray, stride: int) -> Iterator[tuple[int, np.ndarray]]:
    """Round j, and row j of the segments that have one; ``first`` of the longest segment first."""
    shorter = np.cumsum(np.bincount(count.astype(np.int64)))
    for j, done in enumerate(shorter[:-1]):
        yield j, first[: len(first) - done] + j * stride
