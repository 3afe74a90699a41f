"""Several ranks with parts of a batch do what one rank does with the whole.

The ranks are threads with a communicator of their own; where MPI is installed, processes as well.
"""

import subprocess
import sys
import threading

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import nn
from deformable.testing import error_bound
from tests import mpi
from tests.arrays import host


class Communicator:
    """What is used of an mpi4py communicator, for ranks that are threads."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.values = [None] * size
        self.local = threading.local()

    def Get_size(self):
        return self.size

    def _exchange(self, value):
        self.values[self.local.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def allreduce(self, value):
        return sum(self._exchange(value))

    def Allreduce(self, send, receive):
        assert send.flags.c_contiguous and receive.flags.c_contiguous
        assert send.shape == receive.shape and send.dtype == receive.dtype
        receive[...] = sum(self._exchange(send.copy()))

    def Bcast(self, buffer, root):
        buffer[...] = self._exchange(buffer.copy())[root]

    def run(self, task):
        """``task(rank)`` on every rank: the list of answers."""
        answers = [None] * self.size

        def work(rank):
            self.local.rank = rank
            try:
                answers[rank] = task(rank)
            except BaseException as error:
                answers[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=[rank]) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers


def network(seed=0, comm=None, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.Linear(12, 8, dtype=dtype, rng=rng),
        nn.ReLU(),
        Image(),
        nn.BatchNorm2d(2, dtype=dtype, comm=comm),
        nn.Flatten(),
        nn.Linear(8, 3, dtype=dtype, rng=rng),
    )


class Image(nn.Layer):
    """(N, 8) as (N, 2, 2, 2)."""

    def __call__(self, x):
        return x.reshape(len(x), 2, 2, 2), lambda grad_y: grad_y.reshape(len(x), 8)


def batch(xp, n=8):
    rng = np.random.default_rng(1)
    return xp.asarray(rng.normal(size=(n, 12))), xp.asarray(rng.integers(0, 3, n))


def gradients(net, x, labels):
    logits, backward = net(x)
    loss, grad = nn.softmax_cross_entropy(logits, labels)
    backward(grad)
    return loss


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(ranks, xp):
    comm, (x, labels), whole = Communicator(ranks), batch(xp), network().to(xp)
    loss = float(gradients(whole, x, labels))
    part = len(x) // ranks

    def task(rank):
        net = network(comm=comm).to(xp)
        own = slice(rank * part, (rank + 1) * part)
        loss = gradients(net, x[own], labels[own])
        nn.distributed.allreduce_grads(net.params(), comm)
        return float(loss), net

    answers = comm.run(task)
    bound = error_bound("float64", 10.0, terms=8)
    assert abs(np.mean([loss for loss, _ in answers]) - loss) <= bound
    for _, net in answers:
        for param, expected in zip(net.params(), whole.params(), strict=True):
            assert isinstance(param.grad, xp.ndarray)
            assert abs(host(xp, param.grad - expected.grad)).max() <= bound
        for name, array in net.state().items():
            assert abs(host(xp, array - whole.state()[name])).max() <= bound


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_missing_gradient_counts_as_zero(dtype, xp):
    comm = Communicator(2)

    def task(rank):
        params = [nn.Param(xp.zeros((2, 3), dtype=dtype)), nn.Param(xp.zeros(4, dtype=dtype))]
        params[rank].add_grad(xp.full(params[rank].data.shape, 4.0, dtype=dtype))
        nn.distributed.allreduce_grads(params, comm)
        return params

    for params in comm.run(task):
        for param in params:
            assert param.grad.dtype == dtype
            assert_array_equal(host(xp, param.grad), np.full(param.data.shape, 2.0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_rank_gets_the_values_of_the_root(dtype, xp):
    pytest.importorskip("ml_dtypes")
    comm = Communicator(3)

    def task(rank):
        net = network(seed=rank, dtype=dtype).to(xp)
        nn.distributed.broadcast_params(net.buffers().values(), comm, root=1)
        return net.state()

    expected = network(seed=1, dtype=dtype).state()
    for state in comm.run(task):
        for name, array in state.items():
            assert isinstance(array, xp.ndarray)
            assert_array_equal(host(xp, array), expected[name])


def test_nothing_is_exchanged_as_nothing():
    nn.distributed.allreduce_grads([], comm=None)
    nn.distributed.broadcast_params([], comm=None)


def test_mpi_is_not_imported():
    code = "import sys, deformable.nn; assert not any('mpi4py' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


PROGRAM = """
import sys
from mpi4py import MPI
from tests.test_nn_distributed import batch, gradients, network
from deformable import nn
import numpy as np

comm = MPI.COMM_WORLD
net = network(seed=comm.Get_rank(), comm=comm)
nn.distributed.broadcast_params(net.params(), comm)
x, labels = batch(np)
gradients(net, *(np.array_split(a, comm.Get_size())[comm.Get_rank()] for a in (x, labels)))
nn.distributed.allreduce_grads(net.params(), comm)
if comm.Get_rank() == 0:
    np.savez(sys.argv[1], *(param.grad for param in net.params()))
"""


def test_processes_of_mpi_agree_with_one_process(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    finished = mpi.run(2, "program.py", "gradients.npz", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr

    whole = network()
    gradients(whole, *batch(np))
    with np.load(tmp_path / "gradients.npz") as file:
        for name, param in zip(file.files, whole.params(), strict=True):
            assert abs(file[name] - param.grad).max() <= error_bound("float64", 10.0, terms=8)
