"""Handwritten digits of every size and direction: what deformable convolution is good for.

    python examples/scaled_digits.py --rotate 60 --seeds 3
    python examples/scaled_digits.py --offsets-only

The digits of scikit-learn stand anywhere on a canvas of 24 x 24 pixels, 7 to 24 pixels large, and
turned by up to --rotate degrees. Five small networks learn to read them: a plain one, the same
with more channels or with more layers, and two whose last two convolutions are deformable. The
wider one has as many parameters as the larger deformable one: what these gain is not size.

With --offsets-only a plain network learns digits of one size. Then its convolutions are made
deformable, which changes no answer, and only the convolutions that predict the offsets learn from
digits of all sizes: the filters stay as they are, and learn where to look.

A run that was stopped goes on with --resume, and ends as if it had not been stopped.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import fetch_openml, load_digits
from tqdm import tqdm

from deformable import deform_conv2d, nn, visualize

CANVAS = 24
ALL_SIDES = (7.2, 24.0)  # of the digits, in pixels
ONE_SIDE = (12.0, 12.0)
SIZES = {"small": (7.2, 12.8), "medium": (12.8, 18.4), "large": (18.4, 24.0)}
TEST_POSES = 5  # of every test digit
BATCH = 32
SPLIT, INIT, TRAIN, TEST = range(4)  # what random numbers are drawn for


def generator(seed, *purpose):
    """Random numbers that depend on nothing but the seed and what they are for.

    So a resumed run needs no old state: it asks for the numbers of the next epoch.
    """
    return np.random.default_rng([seed, *purpose])


# ---- data


class Scenes(NamedTuple):
    """Placed digits; the first two on the device of the network."""

    x: np.ndarray  # (n, 1, CANVAS, CANVAS)
    labels: np.ndarray  # (n,)
    side: np.ndarray  # (n,) in pixels
    centre: np.ndarray  # (n, 2) in pixels, (y, x)


class Digits:
    """Images (n, side, side) with values from 0 to 1 and their labels, to be placed at random."""

    def __init__(self, images, labels, rotate, xp):
        self.images, self.labels, self.xp = images, labels, xp
        self.rotate = math.radians(rotate)

    def place(self, rng, sides=ALL_SIDES, poses=1) -> Scenes:
        """Every image `poses` times, in random order.

        Placing an image is a deformable convolution with a single tap: its offsets say where in
        the image each pixel of the canvas finds its value.
        """
        index = np.tile(rng.permutation(len(self.images)), poses)
        n, image_side = len(index), self.images.shape[1]
        side = rng.uniform(*sides, n)
        angle = rng.uniform(-self.rotate, self.rotate, n)
        centre = (CANVAS - 1 + (CANVAS - side) * rng.uniform(-1, 1, (2, n))) / 2

        y, x = np.mgrid[:CANVAS, :CANVAS]
        dy, dx = (axis - c.reshape(n, 1, 1) for axis, c in zip((y, x), centre, strict=True))
        shrink = image_side / side
        cos, sin = (shrink * np.array([np.cos(angle), np.sin(angle)])).reshape(2, n, 1, 1)
        middle = (image_side - 1) / 2
        image_y, image_x = middle + cos * dy - sin * dx, middle + sin * dy + cos * dx
        offset = np.stack([image_y - y, image_x - x], axis=1).astype(np.float32)

        padded = np.zeros((n, 1, CANVAS, CANVAS), np.float32)
        padded[:, 0, :image_side, :image_side] = self.images[index]
        tap = np.ones((1, 1, 1, 1), np.float32)
        canvas = deform_conv2d(*(self.xp.asarray(a) for a in (padded, offset, tap)))
        return Scenes(canvas, self.xp.asarray(self.labels[index]), side, centre.T)


def split_digits(args, seed, xp):
    """The digits to learn from, and a sixth of all to test with."""
    if args.mnist:
        data = fetch_openml("mnist_784", as_frame=False)
        images = data.data[:12_000].reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)) / 255
        labels = data.target[:12_000].astype(int)
    else:
        data = load_digits()
        images, labels = data.images / 16, data.target
    order = generator(seed, SPLIT).permutation(len(images))
    tested, learned = np.split(order, [len(images) // 6])
    return (Digits(images[part], labels[part], args.rotate, xp) for part in (learned, tested))


# ---- networks


def network(rng, widths, strides, deformable=0, modulated=False):
    """Convolutions of 3x3 taps, the last `deformable` of them so, and a linear classifier."""
    layers, inputs = [], 1
    for i, (outputs, stride) in enumerate(zip(widths, strides, strict=True)):
        options = {"stride": stride, "padding": 1, "bias": False, "rng": rng}
        if i < len(widths) - deformable:
            conv = nn.Conv2d(inputs, outputs, 3, **options)
        else:
            conv = nn.DeformConv2d(inputs, outputs, 3, modulated=modulated, **options)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.GlobalAvgPool2d(), nn.Linear(inputs, 10, rng=rng))


NETWORKS = {
    "plain": ((12, 24, 24, 32), (2, 1, 2, 1)),
    "plain, wider": ((16, 32, 32, 43), (2, 1, 2, 1)),
    "plain, 6 layers": ((12, 24, 24, 24, 24, 32), (2, 1, 1, 2, 1, 1)),
    "deformable": ((12, 24, 24, 32), (2, 1, 2, 1), 2),
    "modulated": ((12, 24, 24, 32), (2, 1, 2, 1), 2, True),
}


def made_deformable(net):
    """The same network, with deformable convolutions of the same filters."""
    layers = []
    for layer in net.layers:
        if isinstance(layer, nn.Conv2d):
            outputs, inputs, *kernel = layer.weight.data.shape
            shape = inputs, outputs, kernel, layer.stride, layer.padding
            layer = nn.DeformConv2d(*shape, bias=False).from_conv(layer)
        layers.append(layer)
    return nn.Sequential(*layers)


def freeze_all_but_offsets(net):
    """From now on training changes only the convolutions that predict offsets."""
    for param in net.params():
        param.lr_mult = 0.0
    for layer in net.layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.frozen = True
        if isinstance(layer, nn.DeformConv2d):
            for param in layer.offset_conv.params():
                param.lr_mult = 1.0


# ---- training


def train(net, digits, args, seed, name, sides=ALL_SIDES, peak=3e-3):
    """Train `net`, and leave a checkpoint after every epoch."""
    stem = f"{name.replace(', ', '-').replace(' ', '-')}-{args.rotate:g}-{args.epochs}-{seed}"
    path = args.out / f"{stem}.npz"
    optimizer = nn.Adam(net.params())
    if args.resume and path.exists():
        nn.load(path, net, optimizer)
    steps = math.ceil(len(digits.images) / BATCH)
    total = args.epochs * steps
    with tqdm(total=total, initial=optimizer.steps, desc=stem, unit=" steps") as progress:
        for epoch in range(optimizer.steps // steps, args.epochs):
            scenes = digits.place(generator(seed, TRAIN, epoch), sides)
            losses = hits = 0
            for first in range(0, len(scenes.x), BATCH):
                batch = slice(first, first + BATCH)
                logits, backward = net(scenes.x[batch])
                loss, grad = nn.softmax_cross_entropy(logits, scenes.labels[batch])
                backward(grad)
                optimizer.lr = nn.one_cycle(optimizer.steps, total, peak)
                optimizer.step()
                optimizer.zero_grad()
                losses = losses + loss
                hits = hits + (logits.argmax(axis=1) == scenes.labels[batch]).sum()
                progress.update()
            nn.save(path, net, optimizer)
            loss, part = float(losses) / steps, int(hits) / len(scenes.x)
            progress.set_postfix(loss=f"{loss:.3f}", accuracy=f"{part:.1%}")


# ---- measuring


def accuracy(net, digits, seed, sides=ALL_SIDES):
    """How many of the test digits are read, in percent."""
    scenes = digits.place(generator(seed, TEST), sides, TEST_POSES)
    hits = 0
    for first in range(0, len(scenes.x), 256):
        batch = slice(first, first + 256)
        answers = net.predict(scenes.x[batch]).argmax(axis=1)
        hits += int((answers == scenes.labels[batch]).sum())
    return 100 * hits / len(scenes.x)


def dilation_by_size(net, digits, seed):
    """Effective dilation at the centres of small, medium and large digits: a row per layer."""
    scenes = digits.place(generator(seed, TEST))
    sizes = [(low <= scenes.side) & (scenes.side < high) for low, high in SIZES.values()]
    rows = []
    for layer in visualize.samplings(net, scenes.x):
        if layer.offset is not None:
            dilation = visualize.effective_dilation(layer.offset)[:, 0]
            y, x = (scenes.centre.T * dilation.shape[1] / CANVAS).round().astype(int)
            at_centre = dilation[np.arange(len(y)), y, x]
            rows.append([at_centre[size].mean() for size in sizes])
    return rows


def draw(net, digits, seed, path):
    """Sampling points of the stacked deformable layers (the paper's Fig. 5), and what they see."""
    scenes = digits.place(generator(seed, TEST))
    small, *others = [int(abs(scenes.side - side).argmin()) for side in (9, 15, 22)]
    columns = zip(("background", *SIZES), (small, small, *others), strict=True)
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    for (title, i), (points, field) in zip(columns, figure.subplots(2, 4).T, strict=True):
        x = scenes.x[i : i + 1]
        position = (scenes.centre[i] / 4).round().astype(int)  # after two strides of 2
        if title == "background":
            position = np.where(position < 3, 5, 0)
        visualize.sampling_points(visualize.samplings(net, x), position, x[0, 0], points)
        points.set(title=title, xticks=[], yticks=[], xlim=(-6, 29), ylim=(29, -6))
        features = nn.Sequential(*net.layers[:-2])
        visualize.receptive_field(features, x, tuple(position), field)
        field.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=150)


# ---- the two experiments


def compare(args, xp):
    """Train all networks with all seeds; print accuracy and effective dilation."""
    names = ["plain, wider", "modulated"] if args.quick else list(NETWORKS)
    nets, scores, dilations = {}, {name: [] for name in names}, {name: [] for name in names}
    for seed in args.all_seeds:
        learned, tested = split_digits(args, seed, xp)
        for name in names:
            net = nets[name] = network(generator(seed, INIT), *NETWORKS[name]).to(xp)
            train(net, learned, args, seed, name)
            scores[name].append(accuracy(net, tested, seed))
            dilations[name].append(dilation_by_size(net, tested, seed))

    error = {name: 100 - np.mean(values) for name, values in scores.items()}
    print(f"\n{'':16}parameters  accuracy   error  against wider   accuracy by seed")
    for name, net in nets.items():
        size = sum(param.data.size for param in net.params())
        against = error[name] / error["plain, wider"] - 1
        by_seed = "  ".join(f"{score:.1f}" for score in scores[name])
        print(
            f"{name:16}{size:10,}{100 - error[name]:9.1f}%{error[name]:7.1f}%{against:+15.0%}"
            f"   {by_seed}"
        )
    print(f"\neffective dilation on digits that are{''.join(f'{size:>9}' for size in SIZES)}")
    for name in names:
        rows = np.mean(dilations[name], axis=0)
        for layer, row in enumerate(rows, start=1):
            values = "".join(f"{value:9.2f}" for value in row)
            print(f"{f'{name}, layer {layer} of {len(rows)}':37}{values}")

    print()
    for name, net in nets.items():
        if dilations[name][0]:
            picture = args.out / f"{name}-{args.rotate:g}.png"
            draw(net, tested, args.all_seeds[-1], picture)
            print(f"where {name} convolutions look: {picture}")
    if args.quick:
        assert error["modulated"] < 0.8 * error["plain, wider"]


def learn_offsets(args, xp):
    """Train at one size, make the convolutions deformable, and train only their offsets."""
    table = []
    for seed in args.all_seeds:
        learned, tested = split_digits(args, seed, xp)
        plain = network(generator(seed, INIT), *NETWORKS["plain"]).to(xp)
        train(plain, learned, args, seed, "one size", ONE_SIDE)
        net = made_deformable(plain).to(xp)
        scores = [accuracy(plain, tested, seed, ONE_SIDE)]
        scores += [accuracy(either, tested, seed) for either in (plain, net)]
        freeze_all_but_offsets(net)
        train(net, learned, args, seed, "offsets only", peak=2e-3)
        table.append([*scores, accuracy(net, tested, seed)])

    titles = (
        "digits of the one size",
        "digits of all sizes",
        "made deformable",
        "offsets trained",
    )
    print(f"\n{'':24}accuracy   by seed")
    for title, scores in zip(titles, np.transpose(table), strict=True):
        print(f"{title:24}{scores.mean():7.1f}%   {'  '.join(f'{score:.1f}' for score in scores)}")
    if args.quick:
        _, before, swapped, after = np.transpose(table)
        assert (swapped == before).all()
        assert (after >= before + 14).all()


def main(argv=None):
    """Read the command line and run one experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rotate", type=float, default=0.0, metavar="DEG")
    parser.add_argument("--offsets-only", action="store_true", help="the second experiment")
    parser.add_argument("--mnist", action="store_true", help="digits of MNIST, downloaded")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--out", type=Path, default=Path("out"), help="checkpoints and pictures")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints there")
    parser.add_argument("--quick", action="store_true", help="seconds, and the claim is checked")
    args = parser.parse_args(argv)
    args.all_seeds = range(args.seed, args.seed + args.seeds)
    if args.quick:
        args.epochs = 5
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "gpu":
        import cupy as xp
    else:
        xp = np
    (learn_offsets if args.offsets_only else compare)(args, xp)


if __name__ == "__main__":
    main()
