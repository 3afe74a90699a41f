"""Data-parallel training on several processes: every rank takes a part of the batch.

The communicator is mpi4py's and is passed in: nothing here imports MPI. Arrays of a GPU go
through main memory, so any build of MPI will do.

    comm = MPI.COMM_WORLD
    broadcast_params(net.params(), comm)
    ...
    backward(grad)
    allreduce_grads(net.params(), comm)
    optimizer.step()
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from deformable._array import Array, array_module, compute_dtype
from deformable.nn.layer import Buffer, Param, to_host


def allreduce_grads(params: Iterable[Param], comm: Any) -> None:
    """Replace every gradient by its mean over the ranks, in one exchange of one flat buffer.

    With a loss that is a mean over the batch and batches of one size, that is the gradient of
    the whole batch. A parameter without a gradient on this rank counts as zero.

    Parameters
    ----------
    params : iterable of Param
        The same ones in the same order on every rank.
    comm : mpi4py.MPI.Comm
    """
    params = list(params)
    if not params:
        return
    dtype = np.result_type(*(compute_dtype(param.data.dtype) for param in params))
    flat = np.concatenate(
        [
            np.zeros(param.data.size, dtype)
            if param.grad is None
            else to_host(param.grad).ravel().astype(dtype)
            for param in params
        ]
    )
    mean = sum_over_ranks(flat, comm) / comm.Get_size()
    ends = np.cumsum([param.data.size for param in params])
    for param, grad in zip(params, np.split(mean, ends[:-1]), strict=True):
        grad = grad.reshape(param.data.shape).astype(param.data.dtype)
        param.grad = array_module(param.data).asarray(grad)


def broadcast_params(params: Iterable[Buffer], comm: Any, root: int = 0) -> None:
    """Give every rank the values that rank ``root`` has, bit for bit, in one exchange.

    Parameters
    ----------
    params : iterable of Param or Buffer
        The same ones in the same order on every rank: ``layer.params()``, or
        ``layer.buffers().values()`` for the running averages as well.
    comm : mpi4py.MPI.Comm
    root : int
    """
    params = list(params)
    if not params:
        return
    pieces = [np.ascontiguousarray(to_host(param.data)) for param in params]
    flat = np.frombuffer(bytearray().join(piece.tobytes() for piece in pieces), np.uint8)
    comm.Bcast(flat, root)
    ends = np.cumsum([piece.nbytes for piece in pieces])
    for param, piece, value in zip(params, pieces, np.split(flat, ends[:-1]), strict=True):
        value = value.view(piece.dtype).reshape(piece.shape)
        param.data = array_module(param.data).array(value)


def sum_over_ranks(value: Array | int, comm: Any) -> Any:
    """The sum of an array, or of an integer, over all ranks."""
    if isinstance(value, int):
        return comm.allreduce(value)
    host = np.ascontiguousarray(to_host(value))
    total = np.empty_like(host)
    comm.Allreduce(host, total)
    return array_module(value).asarray(total)
