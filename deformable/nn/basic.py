"""The small layers between the convolutions."""

import math
from typing import Any

import numpy as np

from deformable._array import (
    Array,
    array_module,
    compute_dtype,
    integer,
    real_number,
)
from deformable.nn.distributed import sum_over_ranks
from deformable.nn.layer import Backward, Buffer, Layer, Param, check_input, he_normal


class Linear(Layer):
    """Fully connected: ``x @ weight.T + bias``.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    dtype : dtype
    rng : numpy.random.Generator, optional
        Draws the weights: normal with variance 2 / inputs. The bias is zero.

    Attributes
    ----------
    weight : Param
        (out_features, in_features)
    bias : Param or None
        (out_features,)

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> y, backward = nn.Linear(4, 2)(np.ones((3, 4), np.float32))
    >>> y.shape, backward(y).shape
    ((3, 2), (3, 4))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: Any = np.float32,
        rng: np.random.Generator | None = None,
    ) -> None:
        in_features = integer("Linear", "in_features", in_features, least=1)
        out_features = integer("Linear", "out_features", out_features, least=1)
        self.weight = Param(he_normal((out_features, in_features), dtype, rng))
        self.bias = Param(np.zeros(out_features, dtype), decay=False) if bias else None

    def __call__(self, x: Array) -> tuple[Array, Backward]:
        """Multiply x (N, in_features)."""
        weight = self.weight.data
        check_input("Linear", x, weight, ("N", weight.shape[1]))
        y = _product(x, weight.T)
        if self.bias is not None:
            y = y + self.bias.data

        def backward(grad_y: Array) -> Array:
            grad_y = grad_y.astype(x.dtype, copy=False)
            self.weight.add_grad(_product(grad_y.T, x))
            if self.bias is not None:
                total = grad_y.sum(axis=0, dtype=compute_dtype(grad_y.dtype))
                self.bias.add_grad(total.astype(grad_y.dtype, copy=False))
            return _product(grad_y, weight)

        return y, backward


class Flatten(Layer):
    """All axes but the first become one, in row-major order of their indices.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> nn.Flatten().predict(np.ones((2, 3, 4, 5))).shape
    (2, 60)
    """

    def __call__(self, x: Array) -> tuple[Array, Backward]:
        """Flatten x (N, ...)."""
        shape = x.shape

        def backward(grad_y: Array) -> Array:
            return grad_y.reshape(shape)

        return x.reshape(shape[0], math.prod(shape[1:])), backward


class ReLU(Layer):
    """``max(x, 0)``, with derivative 0 at 0.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> nn.ReLU().predict(np.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """

    def __call__(self, x: Array) -> tuple[Array, Backward]:
        """Cut x of any shape off below."""
        y = array_module(x).maximum(x, 0)

        def backward(grad_y: Array) -> Array:
            return grad_y * (y > 0)

        return y, backward


class Dropout(Layer):
    """In training, values become 0 with probability ``p``, and the others are scaled up for it.

    Parameters
    ----------
    p : float
        In [0, 1).
    rng : numpy.random.Generator, optional
        Draws, on the CPU, which values are dropped: the same ones on a GPU.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> layer = nn.Dropout(0.5, rng=np.random.default_rng(0))
    >>> sorted(set(layer(np.ones(100))[0].tolist())), layer.predict(np.ones(2)).tolist()
    ([0.0, 2.0], [1.0, 1.0])
    """

    def __init__(self, p: float = 0.5, rng: np.random.Generator | None = None) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p is {p}, expected 0 <= p < 1")
        self.p = p
        self.rng = np.random.default_rng() if rng is None else rng

    def __call__(self, x: Array) -> tuple[Array, Backward]:
        """Drop values of x of any shape."""
        xp = array_module(x)
        kept = self.rng.random(x.shape, dtype=np.float32) >= self.p
        scale = xp.empty_like(x)
        scale[...] = xp.asarray(kept)
        scale /= 1 - self.p

        def backward(grad_y: Array) -> Array:
            return grad_y * scale

        return x * scale, backward

    def predict(self, x: Array) -> Array:
        """Return x."""
        return x


class BatchNorm2d(Layer):
    """Batch normalisation of every channel (Ioffe and Szegedy 2015, arXiv 1502.03167).

    In training ``y = weight * (x - mean) / sqrt(var + eps) + bias`` with mean and variance over
    the batch and all positions; ``predict`` uses their running averages, which every training
    call moves by ``momentum`` towards the batch's.

    Parameters
    ----------
    channels : int
    eps : float
    momentum : float
    frozen : bool
        Use the running averages in training too, and leave them: for small batches and for
        training parts of a trained network.
    comm : mpi4py communicator, optional
        Take mean and variance over the batches of all ranks.
    dtype : dtype
        Of weight and bias; the running averages are float32 at least.

    Attributes
    ----------
    weight, bias : Param
        (channels,), ones and zeros, without weight decay.
    running_mean, running_var : Buffer
        (channels,)

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> x = np.random.default_rng(0).normal(3, 2, (8, 4, 5, 5))
    >>> y, backward = nn.BatchNorm2d(4, dtype=np.float64)(x)
    >>> bool(abs(y.mean()) < 1e-12), bool(abs(y.std() - 1) < 1e-4)
    (True, True)
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        frozen: bool = False,
        comm: Any = None,
        dtype: Any = np.float32,
    ) -> None:
        wide = compute_dtype(np.dtype(dtype))
        channels = integer("BatchNorm2d", "channels", channels, least=1)
        self.weight = Param(np.ones(channels, dtype), decay=False)
        self.bias = Param(np.zeros(channels, dtype), decay=False)
        self.running_mean = Buffer(np.zeros(channels, wide))
        self.running_var = Buffer(np.ones(channels, wide))
        self.eps = real_number("BatchNorm2d", "eps", eps)
        self.momentum = real_number("BatchNorm2d", "momentum", momentum)
        self.frozen = frozen
        self.comm = comm

    def __call__(self, x: Array) -> tuple[Array, Backward]:
        """Normalise x (N, channels, H, W)."""
        self._check(x)
        xp, frozen = array_module(x), self.frozen
        if frozen:
            mean, var = _column(self.running_mean.data), _column(self.running_var.data)
        else:
            count = max(self._over_ranks(x.size // x.shape[1]), 1)
            mean = self._over_ranks(_sum(x)) / count
            var = self._over_ranks(_sum(xp.square(x - mean))) / count
            if count > 1:
                self._follow(mean, var * (count / (count - 1)))
        centred = x - mean
        inverse = 1 / xp.sqrt(var + self.eps)
        scale = inverse * _column(self.weight.data)
        y = (centred * scale + _column(self.bias.data)).astype(x.dtype, copy=False)

        def backward(grad_y: Array) -> Array:
            sum_grad, sum_product = _sum(grad_y), _sum(grad_y * centred)
            for param, grad in (self.weight, sum_product * inverse), (self.bias, sum_grad):
                param.add_grad(grad.reshape(param.data.shape).astype(param.data.dtype, copy=False))
            if frozen:
                return (grad_y * scale).astype(x.dtype, copy=False)
            slope = self._over_ranks(sum_product) * (inverse * inverse / count)
            grad_x = grad_y - self._over_ranks(sum_grad) / count - centred * slope
            return (grad_x * scale).astype(x.dtype, copy=False)

        return y, backward

    def predict(self, x: Array) -> Array:
        """Normalise x (N, channels, H, W) by the running averages."""
        self._check(x)
        scale = self.weight.data / array_module(x).sqrt(self.running_var.data + self.eps)
        shift = self.bias.data - self.running_mean.data * scale
        return (x * _column(scale) + _column(shift)).astype(x.dtype, copy=False)

    def _check(self, x: Array) -> None:
        weight = self.weight.data
        check_input("BatchNorm2d", x, weight, ("N", *weight.shape, "H", "W"))

    def _follow(self, mean: Array, var: Array) -> None:
        """Move the running averages towards those of a batch."""
        for running, batch in (self.running_mean, mean), (self.running_var, var):
            step = batch.reshape(running.data.shape) - running.data
            running.data = running.data + self.momentum * step

    def _over_ranks(self, total: Any) -> Any:
        return total if self.comm is None else sum_over_ranks(total, self.comm)


def _product(a: Array, b: Array) -> Array:
    """``a @ b`` in their dtype: NumPy returns float32 for bfloat16."""
    dtype = a.dtype
    if a.shape[0] == b.shape[1] == 1:  # which CuPy would make a sum of rounded products
        wide = compute_dtype(dtype)
        a, b = a.astype(wide, copy=False), b.astype(wide, copy=False)
    return (a @ b).astype(dtype, copy=False)


def _column(channels: Array) -> Array:
    """(C,) seen as (1, C, 1, 1)."""
    return channels.reshape(1, -1, 1, 1)


def _sum(x: Array) -> Array:
    """The sums of the channels, (1, C, 1, 1)."""
    return x.sum(axis=(0, 2, 3), keepdims=True, dtype=compute_dtype(x.dtype))
