"""Checks of gradients, and bounds of rounding errors: what the library's own tests use.

A gradient is checked along a random direction. For ``L(a) = Σ grad_y · f(a)`` and a direction d
of the argument a, the derivative by finite differences

    (L(a + h·d) − L(a − h·d)) / 2h        or        (−3 L(a) + 4 L(a + h·d) − L(a + 2h·d)) / 2h

has to agree with ``Σ f_backward(grad_y, a) · d``. Both are exact for a quadratic function, and
what bilinear sampling makes of offsets is one as long as no position crosses a pixel. The second
looks to the right only, which is how derivatives on the pixels are defined.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from deformable._array import FLOATS, Array, array_module
from deformable.nn import Layer, Param

TOLERANCE = 1e-6
STEP = 2.0**-20  # with directions of few bits too, a + h·d hardly ever needs rounding
NOISE = 4.0  # roundings of L that a difference quotient may be off by
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def check_backward(
    f: Callable[..., Array],
    f_backward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    rng: np.random.Generator | None = None,
    wrt: Iterable[str] | None = None,
    one_sided: bool = False,
    step: float = STEP,
    tolerance: float = TOLERANCE,
) -> None:
    """Compare a backward function with finite differences of its forward function, in float64.

    Parameters
    ----------
    f : callable
        ``f(*args, **kwargs)`` returns an array.
    f_backward : callable
        ``f_backward(grad_y, *args, **kwargs)`` returns a NamedTuple of gradients whose fields are
        names of arguments of `f`.
    args, kwargs : sequence, mapping
        Arrays of numpy or cupy among other things. Floating-point ones are converted to float64;
        an argument that is None is not checked.
    rng : numpy.random.Generator, optional
        Draws ``grad_y`` and the directions.
    wrt : iterable of str, optional
        Check only these gradients: passed on to `f_backward`, which must return None for others.
    one_sided : bool
        Look to the right only: for arguments on a kink whose right-hand derivative is meant.
    step : float
        h above; directions have entries of size 1.
    tolerance : float
        Largest error, relative to the Euclidean norm of the gradient.

    Raises
    ------
    AssertionError
        Naming the argument, both derivatives and the step; also where a gradient is missing, or
        has another shape or dtype than its argument.

    Examples
    --------
    >>> from typing import NamedTuple
    >>> import numpy as np
    >>> class Gradients(NamedTuple):
    ...     a: np.ndarray
    >>> def square(a):
    ...     return a * a
    >>> check_backward(square, lambda grad_y, a: Gradients(2 * a * grad_y), [np.ones(3)])
    >>> check_backward(square, lambda grad_y, a: Gradients(a * grad_y), [np.ones(3)], rng=
    ...     np.random.default_rng(0))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: square: gradient of a along a random direction is ..., expected ...
    """
    rng = np.random.default_rng() if rng is None else rng
    bound = inspect.signature(f).bind(*args, **(kwargs or {}))
    at = {name: _float64(value) for name, value in bound.arguments.items()}

    def call(function: Callable[..., Any], *first: Any, **moved: Array) -> Any:
        bound.arguments = {**at, **moved}
        return function(*first, *bound.args, **bound.kwargs)

    chosen = None if wrt is None else tuple(wrt)
    grad_y = _normal(rng, call(f))
    backward = f_backward if chosen is None else partial(f_backward, wrt=chosen)
    for name, gradient in call(backward, grad_y)._asdict().items():
        where = f"{getattr(f, '__name__', f)}: gradient of {name}"
        if at.get(name) is None or (chosen is not None and name not in chosen):
            _require(gradient is None, f"{where} is an array, expected None")
        else:
            value = partial(lambda name, a: call(f, **{name: a}), name)
            _compare(where, value, at[name], gradient, grad_y, rng, step, tolerance, one_sided)


def check_layer(
    layer: Layer,
    inputs: Sequence[Any],
    *,
    rng: np.random.Generator | None = None,
    step: float = STEP,
    tolerance: float = TOLERANCE,
) -> None:
    """Compare the gradients of a layer's inputs and parameters with finite differences.

    The layer is left as it is: every evaluation calls a copy, so that layers which draw random
    numbers or follow running averages do the same each time.

    Parameters
    ----------
    layer : deformable.nn.Layer
        With parameters in float64.
    inputs : sequence
        What the layer is called with. Floating-point arrays are converted to float64; an input
        whose gradient is None is not checked.
    rng, step, tolerance
        As in :func:`check_backward`.

    Raises
    ------
    AssertionError
        As :func:`check_backward`, naming ``input 0`` or the parameter.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> check_layer(nn.Linear(4, 2, dtype=np.float64), [np.ones((3, 4))])
    """
    rng = np.random.default_rng() if rng is None else rng
    inputs = [_float64(value) for value in inputs]
    trial = copy.deepcopy(layer)
    y, backward = trial(*inputs)
    grad_y = _normal(rng, y)
    gradients = backward(grad_y)

    def value_with_input(i: int, a: Array) -> Array:
        return copy.deepcopy(layer)(*inputs[:i], a, *inputs[i + 1 :])[0]

    def value_with_param(name: str, a: Array) -> Array:
        moved = copy.deepcopy(layer)
        moved.buffers()[name].data = a
        return moved(*inputs)[0]

    cases: list[tuple[str, Callable[[Array], Array], Array, Array]] = []
    for i, gradient in enumerate(gradients if isinstance(gradients, tuple) else (gradients,)):
        if gradient is not None:
            cases.append((f"input {i}", partial(value_with_input, i), inputs[i], gradient))
    for name, param in trial.buffers().items():
        if isinstance(param, Param):
            cases.append((name, partial(value_with_param, name), param.data, param.grad))
    for name, value, at, gradient in cases:
        where = f"{type(layer).__name__}: gradient of {name}"
        _compare(where, value, at, gradient, grad_y, rng, step, tolerance)


def error_bound(dtype: Any, magnitude: Any = 1.0, terms: int = 1) -> Any:
    """How far a sum of products may be from the exact one, whatever the order of summation.

    ``4 eps · magnitude · (1 + log2(terms))`` with the eps of the dtype that sums are computed in,
    float32 at least; for half precision one eps of its own is added, as its terms and the result
    are rounded to it.

    Parameters
    ----------
    dtype : dtype
        Of the arrays: float16, bfloat16, float32 or float64.
    magnitude : float or array
        The sum of the absolute values of the terms, ``Σ |w| |x|``.
    terms : int
        How many there are; none are as exact as one.

    Returns
    -------
    float or array
        As `magnitude`.

    Raises
    ------
    TypeError
        Any other dtype.

    Examples
    --------
    >>> error_bound("float64", magnitude=2.0, terms=8) == 32 * 2.0**-52
    True
    """
    name = np.dtype(dtype).name
    if name not in EPSILON:
        raise TypeError(f"error_bound: dtype is {name}, expected one of {', '.join(EPSILON)}")
    sums = EPSILON["float64" if name == "float64" else "float32"]
    storage = 0.0 if sums == EPSILON[name] else EPSILON[name]
    return (4 * sums * (1 + math.log2(max(terms, 1))) + storage) * magnitude


def _compare(
    where: str,
    f: Callable[[Array], Array],
    at: Array,
    gradient: Array | None,
    grad_y: Array,
    rng: np.random.Generator,
    step: float,
    tolerance: float,
    one_sided: bool = False,
) -> None:
    """Raise unless ``gradient`` is that of ``Σ grad_y · f`` at ``at``."""
    if gradient is None:
        raise AssertionError(f"{where} is None, expected an array")
    for what in ("shape", "dtype"):
        have, want = getattr(gradient, what), getattr(at, what)
        _require(have == want, f"{where} has {what} {have}, expected {want}")

    direction = rng.integers(32, 96, at.shape, endpoint=True) / 64
    if not one_sided:
        direction *= rng.choice([-1, 1], at.shape)
    move = array_module(at).asarray(step * direction)
    weights, moves = ((-3, 4, -1), (0, 1, 2)) if one_sided else ((1, -1), (1, -1))
    terms = [
        weight * grad_y * f(at + times * move) for weight, times in zip(weights, moves, strict=True)
    ]

    by_differences = sum(float(term.sum()) for term in terms) / (2 * step)
    by_gradient = float((gradient * move).sum()) / step
    noise = sum(float(abs(term).sum()) for term in terms) * NOISE * EPSILON["float64"] / step
    size = max(float((gradient * gradient).sum()) ** 0.5, abs(by_differences))
    _require(
        abs(by_gradient - by_differences) <= tolerance * size + noise,
        f"{where} along a random direction is {by_gradient}, "
        f"expected {by_differences} by differences of step {step}",
    )


def _require(holds: bool, message: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not holds:
        raise AssertionError(message)


def _float64(value: Any) -> Any:
    """A floating-point array in float64, anything else as it is."""
    is_real = hasattr(value, "shape") and value.dtype.name in FLOATS
    return value.astype(np.float64) if is_real else value


def _normal(rng: np.random.Generator, like: Array) -> Array:
    return array_module(like).asarray(rng.standard_normal(like.shape))
