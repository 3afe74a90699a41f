"""Losses: each returns ``(loss, grad)``, a scalar array and its gradient by the first argument.

Means are taken in float32 at least and stay on the device: ``float(loss)`` is what reads them.
"""

import numpy as np

from deformable._array import (
    Array,
    array_module,
    check_dtypes,
    check_library,
    check_shape,
    compute_dtype,
    real_number,
)


def softmax_cross_entropy(
    logits: Array, labels: Array, ignore_index: int | None = None
) -> tuple[Array, Array]:
    """Mean of ``-log softmax(logits)[label]`` over all labels.

    Parameters
    ----------
    logits : array (N, C, ...)
        float; (N, C) to classify images, (N, C, H, W) to classify pixels.
    labels : array (N, ...)
        Integers in [0, C).
    ignore_index : int, optional
        Labels of this value have no part in the mean, whatever their logits. With no other ones
        the loss is 0.

    Returns
    -------
    loss : array ()
        float32 at least.
    grad : array (N, C, ...)
        The gradient by ``logits``, in their dtype.

    Raises
    ------
    TypeError
        Labels that are not integers, arrays of two libraries.
    ValueError
        Shapes that do not fit; on NumPy a label outside [0, C). On CuPy, where checking it would
        wait for the device, such a label makes the loss and its own gradient NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> loss, grad = nn.softmax_cross_entropy(np.zeros((1, 2)), np.array([1]))
    >>> round(float(loss), 4), grad.tolist()
    (0.6931, [[0.5, -0.5]])
    """
    xp, _ = check_library("softmax_cross_entropy", {"logits": logits, "labels": labels})
    check_dtypes("softmax_cross_entropy", {"logits": logits}, {})
    if labels.dtype.kind not in "iu":
        raise TypeError(f"softmax_cross_entropy: labels have dtype {labels.dtype}, expected int")
    if logits.ndim < 2:
        raise ValueError(
            f"softmax_cross_entropy: logits has shape {logits.shape}, expected (N, C, ...)"
        )
    n, classes, *rest = logits.shape
    check_shape("softmax_cross_entropy", "labels", labels, (n, *rest))

    known = (labels >= 0) & (labels < classes)
    counted = xp.ones_like(known) if ignore_index is None else labels != ignore_index
    if xp is np and (wrong := np.argwhere(counted & ~known)).size:
        place = tuple(map(int, wrong[0]))
        raise ValueError(
            f"softmax_cross_entropy: labels has {labels[place]} at {place}, "
            f"expected at least 0 and less than {classes}"
        )
    wide = logits.astype(compute_dtype(logits.dtype), copy=False)
    if ignore_index is not None:
        wide = xp.where(counted[:, None], wide, 0)  # NaN times a weight of 0 would be NaN
    weight = xp.where(known | ~counted, counted / xp.maximum(counted.sum(), 1), xp.nan)
    weight = weight.astype(wide.dtype)[:, None]
    index = xp.where(known, labels, 0)[:, None]
    shifted = wide - wide.max(axis=1, keepdims=True)
    log_p = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    loss = -(xp.take_along_axis(log_p, index, axis=1) * weight).sum()
    hit = index == xp.arange(classes).reshape(1, classes, *(1 for _ in rest))
    grad = (xp.exp(log_p) - hit) * weight
    return loss, grad.astype(logits.dtype, copy=False)


def mse(pred: Array, target: Array) -> tuple[Array, Array]:
    """Mean of the squared differences.

    Parameters
    ----------
    pred, target : array
        float, of one shape.

    Returns
    -------
    loss : array ()
        float32 at least.
    grad : array
        The gradient by ``pred``, in its dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> loss, grad = nn.mse(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    >>> float(loss), grad.tolist()
    (2.0, [0.0, -2.0])
    """
    difference = _difference("mse", pred, target)
    xp = array_module(difference)
    count = max(difference.size, 1)
    loss = xp.square(difference).sum() / count
    return loss, (difference * (2 / count)).astype(pred.dtype, copy=False)


def smooth_l1(pred: Array, target: Array, beta: float = 1.0) -> tuple[Array, Array]:
    """Mean of ``d**2 / (2 beta)`` where ``d = |pred - target| < beta``, else ``d - beta / 2``.

    Fast R-CNN's loss for boxes (Girshick 2015, arXiv 1504.08083, Eq. 3).

    Parameters
    ----------
    pred, target : array
        float, of one shape.
    beta : float
        Above 0.

    Returns
    -------
    loss : array ()
        float32 at least.
    grad : array
        The gradient by ``pred``, in its dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> loss, grad = nn.smooth_l1(np.array([0.5, 3.0]), np.zeros(2))
    >>> float(loss), grad.tolist()
    (1.3125, [0.25, 0.5])
    """
    beta = real_number("smooth_l1", "beta", beta)
    if beta <= 0:
        raise ValueError(f"smooth_l1: beta is {beta}, expected above 0")
    difference = _difference("smooth_l1", pred, target)
    xp = array_module(difference)
    count = max(difference.size, 1)
    slope = xp.clip(difference / beta, -1, 1)
    loss = (slope * (difference - (beta / 2) * slope)).sum() / count
    return loss, (slope / count).astype(pred.dtype, copy=False)


def _difference(function: str, pred: Array, target: Array) -> Array:
    check_library(function, {"pred": pred, "target": target})
    check_dtypes(function, {"pred": pred, "target": target}, {})
    check_shape(function, "target", target, pred.shape)
    wide = compute_dtype(pred.dtype)
    return pred.astype(wide, copy=False) - target.astype(wide, copy=False)
