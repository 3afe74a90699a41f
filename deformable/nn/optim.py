"""Optimizers, clipping, and schedules of the learning rate.

A training takes steps:

    optimizer = nn.SGD(net.params(), lr=0.1, momentum=0.9)
    for step in range(total):
        ...                                 # gradients are gathered
        optimizer.lr = nn.one_cycle(step, total, peak=0.1)
        optimizer.step()
        optimizer.zero_grad()
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from deformable._array import Array, array_module, compute_dtype, real_number
from deformable.nn.layer import Buffer, Param, Stateful


class Optimizer(Stateful):
    """Base of the optimizers: moves every parameter that has a gradient.

    A parameter's learning rate is ``lr * param.lr_mult``; weight decay passes over those with
    ``param.decay`` False. Running sums are kept in float32 at least.

    Attributes
    ----------
    lr : float
        May be set before every step.
    """

    sums: tuple[str, ...] = ()  # names of the running sums kept for every parameter

    def __init__(self, params: Iterable[Param], lr: float, weight_decay: float) -> None:
        self.params = list(params)
        # Python's numbers leave running sums in float32, which numpy's would turn into float64
        self.lr = self._number("lr", lr)
        self.weight_decay = self._number("weight_decay", weight_decay)
        self._steps = Buffer(np.array(0))
        self.memory = [
            {
                name: Buffer(
                    array_module(param.data).zeros_like(
                        param.data, dtype=compute_dtype(param.data.dtype)
                    )
                )
                for name in self.sums
            }
            for param in self.params
        ]

    def _number(self, name: str, value: float) -> float:
        return real_number(type(self).__name__, name, value)

    def step(self) -> None:
        """Move every parameter once."""
        self._steps.data = np.array(self.steps + 1)
        for param, memory in zip(self.params, self.memory, strict=True):
            if param.grad is not None:
                wide = compute_dtype(param.data.dtype)
                decay = self.weight_decay if param.decay else 0.0
                data, grad = (a.astype(wide, copy=False) for a in (param.data, param.grad))
                move = self.direction(data, grad, decay, memory)
                param.data = (data - float(self.lr * param.lr_mult) * move).astype(param.data.dtype)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for param in self.params:
            param.grad = None

    def direction(self, data: Array, grad: Array, decay: float, memory: dict[str, Buffer]) -> Array:
        """What is subtracted from ``data``, for a learning rate of 1."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return int(self._steps.data)

    def buffers(self) -> dict[str, Buffer]:
        """The running sums under the positions of their parameters, and the number of steps."""
        return {"steps": self._steps} | {
            f"{i}.{name}": buffer
            for i, memory in enumerate(self.memory)
            for name, buffer in memory.items()
        }


class SGD(Optimizer):
    """Gradient descent with momentum: ``v = momentum * v + grad``, ``data -= lr * v``.

    Parameters
    ----------
    params : iterable of Param
    lr : float
    momentum : float
    weight_decay : float
        Adds ``weight_decay * data`` to the gradient.
    nesterov : bool
        Move by ``grad + momentum * v`` instead.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> param = nn.Param(np.array([1.0]))
    >>> param.add_grad(np.array([2.0]))
    >>> nn.SGD([param], lr=0.25).step()
    >>> param.data.tolist()
    [0.5]
    """

    sums = ("momentum",)

    def __init__(
        self,
        params: Iterable[Param],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(params, lr, weight_decay)
        self.momentum = self._number("momentum", momentum)
        self.nesterov = nesterov

    def direction(self, data: Array, grad: Array, decay: float, memory: dict[str, Buffer]) -> Array:
        """The running sum of the gradients."""
        grad = grad + decay * data
        velocity = memory["momentum"].data = self.momentum * memory["momentum"].data + grad
        return grad + self.momentum * velocity if self.nesterov else velocity


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980).

    Parameters
    ----------
    params : iterable of Param
    lr : float
    betas : (float, float)
        How slowly the means of the gradient and of its square move.
    eps : float
    weight_decay : float
        Adds ``weight_decay * data`` to the gradient.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> param = nn.Param(np.array([1.0]))
    >>> param.add_grad(np.array([20.0]))
    >>> nn.Adam([param], lr=0.25).step()
    >>> param.data.round(6).tolist()
    [0.75]
    """

    sums = ("mean", "square")

    def __init__(
        self,
        params: Iterable[Param],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, weight_decay)
        self.betas = self._number("betas", betas[0]), self._number("betas", betas[1])
        self.eps = self._number("eps", eps)

    def direction(self, data: Array, grad: Array, decay: float, memory: dict[str, Buffer]) -> Array:
        """The mean gradient relative to its size."""
        return self.normalised(grad + decay * data, memory)

    def normalised(self, grad: Array, memory: dict[str, Buffer]) -> Array:
        """Mean gradient over the root of its mean square, both corrected for their start at 0."""
        xp = array_module(grad)
        unbiased = []
        for name, beta, value in zip(self.sums, self.betas, (grad, grad * grad), strict=True):
            mean = memory[name].data = beta * memory[name].data + (1 - beta) * value
            unbiased.append(mean / (1 - beta**self.steps))
        mean, square = unbiased
        return mean / (xp.sqrt(square) + self.eps)


class AdamW(Adam):
    """Adam whose weight decay acts on the parameters and not through the gradient.

    Loshchilov and Hutter 2019, arXiv 1711.05101.

    Parameters
    ----------
    params : iterable of Param
    lr : float
    betas : (float, float)
    eps : float
    weight_decay : float
        Every step also subtracts ``lr * weight_decay * data``.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> param = nn.Param(np.array([1.0]))
    >>> param.add_grad(np.array([0.0]))
    >>> nn.AdamW([param], lr=0.5, weight_decay=0.5).step()
    >>> param.data.tolist()
    [0.75]
    """

    def __init__(
        self,
        params: Iterable[Param],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def direction(self, data: Array, grad: Array, decay: float, memory: dict[str, Buffer]) -> Array:
        """Adam's, and the decay beside it."""
        return self.normalised(grad, memory) + decay * data


def clip_grad_norm(params: Iterable[Param], max_norm: float) -> Array:
    """Scale all gradients together so that their common norm is at most ``max_norm``.

    Parameters
    ----------
    params : iterable of Param
        Those without a gradient are passed over.
    max_norm : float
        Above 0; infinity only asks for the norm.

    Returns
    -------
    norm : array ()
        The norm before, still on the device; 0 where there is no gradient.

    Examples
    --------
    >>> import numpy as np
    >>> from deformable import nn
    >>> param = nn.Param(np.zeros(2))
    >>> param.add_grad(np.array([3.0, 4.0]))
    >>> float(nn.clip_grad_norm([param], max_norm=1.0)), param.grad.round(3).tolist()
    (5.0, [0.6, 0.8])
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm is {max_norm}, expected above 0")
    given = [(param, param.grad) for param in params if param.grad is not None]
    if not given:
        return np.zeros(())
    xp = array_module(given[0][1])
    squares = [xp.square(grad.astype(compute_dtype(grad.dtype))).sum() for _, grad in given]
    norm = xp.sqrt(sum(squares[1:], start=squares[0]))
    scale = 1 / xp.maximum(norm / float(max_norm), 1)
    for param, grad in given:
        param.grad = (grad * scale).astype(grad.dtype, copy=False)
    return norm


def one_cycle(
    step: int, total: int, peak: float, warmup: float = 0.3, start: float = 1 / 25, end: float = 0.0
) -> float:
    """Up from ``start * peak`` to ``peak``, down to ``end * peak``, both along half a cosine.

    Smith and Topin 2018, arXiv 1708.07120.

    Parameters
    ----------
    step : int
        0 to ``total``.
    total : int
        How many steps there are.
    peak : float
        The largest learning rate, after ``warmup * total`` steps.
    warmup : float
        In [0, 1].
    start, end : float
        As parts of ``peak``.

    Examples
    --------
    >>> from deformable import nn
    >>> [round(nn.one_cycle(step, 10, peak=1.0, start=0.1), 2) for step in (0, 3, 10)]
    [0.1, 1.0, 0.0]
    """
    rise = warmup * total
    if step < rise:
        return peak * _half_cosine(step / rise, start, 1.0)
    return peak * _half_cosine((step - rise) / max(total - rise, 1), 1.0, end)


def cosine(step: int, total: int, peak: float, end: float = 0.0) -> float:
    """Down from ``peak`` to ``end * peak`` along half a cosine.

    Loshchilov and Hutter 2017, arXiv 1608.03983.

    Examples
    --------
    >>> from deformable import nn
    >>> [round(nn.cosine(step, 10, peak=1.0), 2) for step in (0, 5, 10)]
    [1.0, 0.5, 0.0]
    """
    return peak * _half_cosine(step / total, 1.0, end)


def multi_step(step: int, milestones: Sequence[int], peak: float, factor: float = 0.1) -> float:
    """``peak``, multiplied by ``factor`` at every milestone that ``step`` has reached.

    Examples
    --------
    >>> from deformable import nn
    >>> [nn.multi_step(step, (10, 20), peak=1.0, factor=0.5) for step in (9, 10, 20)]
    [1.0, 0.5, 0.25]
    """
    return peak * factor ** sum(step >= milestone for milestone in milestones)


def _half_cosine(part: float, first: float, last: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * min(part, 1.0))) / 2
