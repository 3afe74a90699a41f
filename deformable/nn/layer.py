"""What every layer is: parameters, found by walking the attributes, and a call that returns
``(y, backward)``.

    y, backward = layer(x)        # training form
    grad_x = backward(grad_y)     # adds to the .grad of the layer's parameters
    y = layer.predict(x)          # inference form: keeps nothing alive

``backward`` is a function nested in the call: it remembers what it differentiates, and the layer
stores nothing. A layer may therefore stand in a network twice, or be called again before the
first gradient went back. Arrays are replaced, never written into, so what :meth:`Layer.state`
returns stays as it was while training goes on.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Self

import numpy as np

from deformable._array import Array, array_module, check_dtypes, check_library, check_shape

Backward = Callable[..., Any]


class Buffer:
    """An array of a layer's state that is not trained, as the running mean of BatchNorm2d.

    Attributes
    ----------
    data : array
    """

    def __init__(self, data: Array) -> None:
        self.data = data


class Param(Buffer):
    """A trained array and its gradient.

    Attributes
    ----------
    data : array
    grad : array or None
        The sum of the gradients since it was last set to None; shape and dtype of ``data``.
    lr_mult : float
        Optimizers multiply their learning rate by it.
    decay : bool
        Whether weight decay applies. Biases and the scales of BatchNorm2d are made with False.
    """

    def __init__(self, data: Array, lr_mult: float = 1.0, decay: bool = True) -> None:
        super().__init__(data)
        self.grad: Array | None = None
        self.lr_mult = lr_mult
        self.decay = decay

    def add_grad(self, grad: Array) -> None:
        """Gather one more gradient."""
        self.grad = grad if self.grad is None else self.grad + grad


class Stateful:
    """What has named arrays: a layer, an optimizer."""

    def buffers(self) -> dict[str, Buffer]:
        """The places of the arrays, by flat names."""
        raise NotImplementedError

    def state(self) -> dict[str, Array]:
        """All arrays by their flat names: a snapshot that later training leaves alone."""
        return {name: buffer.data for name, buffer in self.buffers().items()}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Copy the arrays of ``state``, each to the library on which the one it replaces is.

        Raises
        ------
        TypeError, ValueError
            Where a name is missing or unknown, something is no array, or a shape or dtype differs;
            nothing is changed.
        """
        load_buffers(f"{type(self).__name__}.load_state", self.buffers(), state)


class Layer(Stateful):
    """Base of all layers: a subclass defines ``__call__``, and ``predict`` where it differs."""

    def __call__(self, *inputs: Any, **options: Any) -> tuple[Array, Backward]:
        """Return ``(y, backward)``; ``backward(grad_y)`` returns the gradients of the inputs."""
        raise NotImplementedError

    def predict(self, *inputs: Any, **options: Any) -> Array:
        """Return ``y`` alone, in inference form."""
        return self(*inputs, **options)[0]

    def children(self) -> Iterator[tuple[str, Any]]:
        """The named attributes in which parameters and layers are looked for.

        Lists, tuples and dicts are searched too: ``blocks.0`` is the first of ``self.blocks``.
        """
        return _leaves("", vars(self))

    def buffers(self) -> dict[str, Buffer]:
        """Every :class:`Buffer` and :class:`Param` by its flat name, as ``"0.weight"``.

        One that several layers share has the first name under which it is found.
        """
        found: dict[str, Buffer] = {}
        for name, value in self.children():
            if isinstance(value, Buffer):
                found[name] = value
            elif isinstance(value, Layer):
                found |= {f"{name}.{inner}": buffer for inner, buffer in value.buffers().items()}
        first = {buffer: name for name, buffer in reversed(found.items())}
        return {name: buffer for name, buffer in found.items() if first[buffer] == name}

    def params(self) -> list[Param]:
        """The trained parameters, each once."""
        return [buffer for buffer in self.buffers().values() if isinstance(buffer, Param)]

    def to(self, target: Any) -> Self:
        """Move all arrays to ``numpy``, to ``cupy``, or to a ``cupy.cuda.Device``; returns itself.

        Move a network before an optimizer is made for its parameters.
        """
        for buffer in self.buffers().values():
            buffer.data = move(buffer.data, target)
            if isinstance(buffer, Param) and buffer.grad is not None:
                buffer.grad = move(buffer.grad, target)
        return self


class Sequential(Layer):
    """Layers one after the other; the first may take several inputs.

    Parameters
    ----------
    *layers : Layer

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> y, backward = net(np.ones((5, 4), np.float32))
    >>> y.shape, backward(y).shape, list(net.state())
    ((5, 2), (5, 4), ['0.weight', '0.bias', '2.weight', '2.bias'])
    """

    def __init__(self, *layers: Layer) -> None:
        for layer in layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"Sequential: got {type(layer).__name__}, expected layers")
        self.layers = list(layers)

    def children(self) -> Iterator[tuple[str, Layer]]:
        """The layers under their positions."""
        return ((str(i), layer) for i, layer in enumerate(self.layers))

    def __call__(self, *inputs: Array) -> tuple[Array, Backward]:
        """Call the layers in turn."""
        backwards = []
        for layer in self.layers:
            y, layer_backward = layer(*inputs)
            backwards.append(layer_backward)
            inputs = (y,)

        def backward(grad_y: Array) -> Any:
            for layer_backward in reversed(backwards):
                grad_y = layer_backward(grad_y)
            return grad_y

        return inputs[0], backward

    def predict(self, *inputs: Array) -> Array:
        """Call the layers in turn, in inference form."""
        for layer in self.layers:
            inputs = (layer.predict(*inputs),)
        return inputs[0]


def he_normal(shape: tuple[int, ...], dtype: Any, rng: np.random.Generator | None) -> np.ndarray:
    """Weights (outputs, *inputs) of variance 2 / inputs, drawn in float64: He et al. 2015."""
    rng = np.random.default_rng() if rng is None else rng
    scale = math.sqrt(2 / max(math.prod(shape[1:]), 1))
    return (rng.standard_normal(shape) * scale).astype(dtype)


def check_input(layer: str, x: Array, weight: Array, shape: tuple[int | str, ...]) -> None:
    """Raise unless x is of the library and dtype of a layer's weight, and has this shape."""
    check_library(layer, {"weight": weight, "x": x})
    check_dtypes(layer, {"weight": weight, "x": x}, {})
    check_shape(layer, "x", x, shape)


def to_host(array: Array) -> np.ndarray:
    """The array in the computer's main memory."""
    return array if isinstance(array, np.ndarray) else array.get()


def move(array: Array, target: Any) -> Array:
    """The array on an array library (as it is where it is there already) or a CuPy device."""
    if isinstance(target, ModuleType):
        return array if array_module(array) is target else target.asarray(to_host(array))
    if not hasattr(target, "__enter__"):
        raise TypeError(f"to: target is {target!r}, expected numpy, cupy or a cupy.cuda.Device")
    with target:
        return sys.modules["cupy"].asarray(to_host(array))


def _leaves(prefix: str, parts: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """What ``parts`` holds, also in nested lists, tuples and dicts, by flat names."""
    for key, part in parts.items():
        if isinstance(part, list | tuple):
            part = dict(enumerate(part))
        if isinstance(part, dict):
            yield from _leaves(f"{prefix}{key}.", part)
        else:
            yield f"{prefix}{key}", part


def check_state(function: str, buffers: Mapping[str, Buffer], state: Mapping[str, Any]) -> None:
    """Raise unless ``state`` has the names, shapes and dtypes of ``buffers``."""
    missing, unknown = set(buffers) - set(state), set(state) - set(buffers)
    if missing or unknown:
        raise ValueError(
            f"{function}: missing names {sorted(missing)}, unknown names {sorted(unknown)}"
        )
    for name, buffer in buffers.items():
        have, want = state[name], buffer.data
        if not (hasattr(have, "shape") and hasattr(have, "dtype")):
            raise TypeError(f"{function}: {name} is {type(have).__name__}, expected an array")
        if have.shape != want.shape:
            raise ValueError(f"{function}: {name} has shape {have.shape}, expected {want.shape}")
        if have.dtype != want.dtype:
            raise ValueError(f"{function}: {name} has dtype {have.dtype}, expected {want.dtype}")


def load_buffers(function: str, buffers: Mapping[str, Buffer], state: Mapping[str, Array]) -> None:
    """Check the whole ``state`` first, then copy it into ``buffers``."""
    check_state(function, buffers, state)
    for name, buffer in buffers.items():
        xp = array_module(buffer.data)
        source = to_host(state[name]) if xp is np else state[name]
        buffer.data = xp.array(source)
