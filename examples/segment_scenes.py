"""What is where: two digits of any size in a scene, and the class of every pixel.

    python examples/segment_scenes.py
    python examples/segment_scenes.py --resume --seeds 2

Two digits of scikit-learn stand in a scene of 56 x 56 pixels, 10 to 40 pixels large, one before
the other where they meet. Every pixel belongs to one of eleven classes: the ten digits, and what is
behind them. To name a pixel of a stroke a network has to see the whole digit, whatever its size.

Four small networks compute at half the resolution and answer at the full one. They differ in their
last three convolutions of 3x3 taps: dilated by 2, 3 and 4 pixels, the same with more channels, and
deformable ones whose taps start 2 pixels apart, without and with modulation. The wider net has as
many parameters as the largest deformable one: what these gain is not size. The convolutions that
predict offsets learn at 0.3 times the rate of the others.

A run that was stopped goes on with --resume, and ends as if it had not been stopped.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from sklearn.datasets import load_digits
from tqdm import tqdm

from deformable import deform_conv2d, nn, visualize
from deformable.nn.layer import to_host

SIDES = (1.2 / 7, 5 / 7)  # of the digits, of that of the scene
STROKE = 0.4  # brightness from which on a pixel belongs to a digit
BATCH = 16
PEAK = 2e-2  # learning rate
TEST_PARTS, PART = 8, 50  # how many batches of test scenes, of so many
CHECKPOINT = 50  # steps
SPLIT, INIT, TRAIN, TEST = range(4)  # what random numbers are drawn for
# of the classes: white behind, and "muted" of Paul Tol, told apart by all kinds of eyes
COLOURS = ["white", "#cc6677", "#332288", "#ddcc77", "#117733", "#88ccee"]
COLOURS += ["#882255", "#44aa99", "#999933", "#aa4499", "black"]


def generator(seed, *purpose):
    """Random numbers that depend on nothing but the seed and what they are for.

    So a resumed run needs no old state: it asks for the numbers of the next step.
    """
    return np.random.default_rng([seed, *purpose])


# ---- data


def split_digits(args, seed):
    """Images (n, 8, 8) and labels to learn from, and a sixth of all to test with."""
    data = load_digits(n_class=args.digits)
    order = generator(seed, SPLIT).permutation(len(data.images))
    tested, learned = np.split(order, [len(order) // 6])
    return [(data.images[part] / 16, data.target[part]) for part in (learned, tested)]


def placed(images, side, centre, canvas, xp):
    """Images (n, h, h) so large and there, on canvases (n, canvas, canvas).

    It is a deformable convolution with a single tap: its offsets say where in the image each pixel
    of the canvas finds its value.
    """
    n, height = images.shape[:2]
    to_pixel = np.indices((canvas, canvas))
    from_centre = to_pixel - centre.reshape(n, 2, 1, 1)
    found = (height - 1) / 2 + height / side.reshape(n, 1, 1, 1) * from_centre
    padded = np.zeros((n, 1, canvas, canvas), np.float32)
    padded[:, 0, :height, :height] = images
    offset = (found - to_pixel).astype(np.float32)
    tap = np.ones((1, 1, 1, 1), np.float32)
    return deform_conv2d(*(xp.asarray(a) for a in (padded, offset, tap)))[:, 0]


def scenes(rng, digits, count, canvas, xp):
    """Scenes (count, 1, canvas, canvas), and the class of every pixel: 0 behind the digits."""
    images, labels = digits
    pick = rng.integers(len(images), size=(2, count))
    side = canvas * rng.uniform(*SIDES, (2 * count, 1))
    centre = (canvas - 1 + (canvas - side) * rng.uniform(-1, 1, (2 * count, 2))) / 2
    layers = placed(images[pick.ravel()], side, centre, canvas, xp)
    back, front = layers.reshape(2, count, canvas, canvas)
    back_class, front_class = xp.asarray(labels[pick] + 1).reshape(2, count, 1, 1)
    hidden = front > STROKE
    image = xp.where(hidden, front, xp.maximum(back, front))
    classes = xp.where(hidden, front_class, xp.where(back > STROKE, back_class, 0))
    return image[:, None], classes


# ---- networks


class Enlarge(nn.Layer):
    """Four channels become one of twice the height and width (Shi et al. 2016, 1609.05158)."""

    def __call__(self, x):
        n, c, h, w = x.shape
        y = x.reshape(n, c // 4, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3)

        def backward(grad_y):
            grad = grad_y.reshape(n, c // 4, h, 2, w, 2).transpose(0, 1, 3, 5, 2, 4)
            return grad.reshape(n, c, h, w)

        return y.reshape(n, c // 4, 2 * h, 2 * w), backward


def network(rng, classes, widths, dilations, kind="plain"):
    """Convolutions of 3x3 taps, the first of stride 2, and the classes of all pixels."""
    layers, inputs = [], 1
    for i, outputs in enumerate(widths):
        dilation = (1, 1, *dilations)[i]
        options = {"padding": dilation, "dilation": dilation, "bias": False, "rng": rng}
        if kind == "plain" or i < 2:
            conv = nn.Conv2d(inputs, outputs, 3, stride=1 if i else 2, **options)
        else:
            options |= {"modulated": kind == "modulated", "offset_lr_mult": 0.3}
            conv = nn.DeformConv2d(inputs, outputs, 3, **options)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Conv2d(inputs, 4 * classes, 1, rng=rng), Enlarge())


NETWORKS = {
    "dilated": ((16, 24, 24, 24, 24), (2, 3, 4)),
    "dilated, wider": ((20, 32, 34, 34, 34), (2, 3, 4)),
    "deformable": ((16, 24, 24, 24, 24), (2, 2, 2), "deformable"),
    "modulated": ((16, 24, 24, 24, 24), (2, 2, 2), "modulated"),
}


# ---- training


def train(net, digits, args, seed, name, xp):
    """Train `net`, and leave checkpoints."""
    setting = f"{args.canvas}-{args.digits}-{args.batch}-{args.steps}-{seed}"
    stem = f"scenes-{name.replace(', ', '-')}-{setting}"
    path = args.out / f"{stem}.npz"
    optimizer = nn.Adam(net.params())
    if args.resume and path.exists():
        nn.load(path, net, optimizer)
    first = optimizer.steps
    with tqdm(range(first, args.steps), initial=first, total=args.steps, desc=stem) as progress:
        for step in progress:
            rng = generator(seed, TRAIN, step)
            x, classes = scenes(rng, digits, args.batch, args.canvas, xp)
            logits, backward = net(x)
            loss, grad = nn.softmax_cross_entropy(logits, classes)
            backward(grad)
            optimizer.lr = nn.one_cycle(step, args.steps, PEAK)
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.steps % CHECKPOINT == 0 or optimizer.steps == args.steps:
                nn.save(path, net, optimizer)
                right = float((logits.argmax(axis=1) == classes).mean())
                progress.set_postfix(loss=f"{float(loss):.3f}", accuracy=f"{right:.1%}")


# ---- measuring


def mean_iou(net, digits, args, seed, xp):
    """Mean over the classes that there are of intersection over union, in percent."""
    count = args.digits + 1
    confusion = np.zeros((count, count))
    for part in range(TEST_PARTS):
        x, classes = scenes(generator(seed, TEST, part), digits, PART, args.canvas, xp)
        pairs = to_host(classes * count + net.predict(x).argmax(axis=1))
        confusion += np.bincount(pairs.ravel(), minlength=count**2).reshape(count, count)
    both, true = np.diag(confusion), confusion.sum(axis=1)
    either = true + confusion.sum(axis=0) - both
    return 100 * np.mean(both[true > 0] / either[true > 0])


def draw(nets, digits, args, seed, xp, path):
    """Scenes, their classes, the answers of the nets, and where the last one looks."""
    x, classes = scenes(generator(seed, TEST, 0), digits, 4, args.canvas, xp)
    maps = {"classes": classes} | {
        name: net.predict(x).argmax(axis=1) for name, net in nets.items()
    }
    colours = {"cmap": ListedColormap(COLOURS), "vmin": 0, "vmax": len(COLOURS) - 1}
    name, net = list(nets.items())[-1]
    convolutions = nn.Sequential(*net.layers[:-2])
    figure = Figure(figsize=(2.1 * (len(maps) + 2), 8.8), layout="constrained")
    for i, row in enumerate(figure.subplots(4, len(maps) + 2)):
        row[0].imshow(to_host(x[i, 0]), cmap="gray")
        for ax, pixels in zip(row[1:], maps.values(), strict=False):
            ax.imshow(to_host(pixels[i]), interpolation="nearest", **colours)
        strokes = np.argwhere(to_host(classes[i, ::2, ::2]) > 0)
        position = strokes[len(strokes) // 2]
        layers = visualize.samplings(convolutions, x[i : i + 1])
        visualize.sampling_points(layers, position, x[i, 0], row[-1])
        for ax, title in zip(row, ("scene", *maps, f"{name} looks"), strict=True):
            ax.set(xticks=[], yticks=[], title=title if i == 0 else None)
            ax.set(xlim=(-0.5, args.canvas - 0.5), ylim=(args.canvas - 0.5, -0.5))
    key = [Patch(color=COLOURS[1 + digit], label=str(digit)) for digit in range(args.digits)]
    figure.legend(handles=key, loc="outside lower center", ncols=len(key))
    figure.savefig(path, dpi=110)


def main(argv=None):
    """Read the command line, train all networks with all seeds, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--canvas", type=int, default=56, help="side of a scene, even, in pixels")
    parser.add_argument("--digits", type=int, default=10, help="how many of the ten there are")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--out", type=Path, default=Path("out"), help="checkpoints and the picture")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints there")
    parser.add_argument("--quick", action="store_true", help="seconds, and the claim is checked")
    args = parser.parse_args(argv)
    if args.quick:
        args.canvas, args.digits, args.batch, args.steps = 40, 3, 8, 120
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "gpu":
        import cupy as xp
    else:
        xp = np

    names = ["dilated", "deformable"] if args.quick else list(NETWORKS)
    control = names[0] if args.quick else "dilated, wider"
    nets, scores = {}, {name: [] for name in names}
    for seed in range(args.seed, args.seed + args.seeds):
        learned, tested = split_digits(args, seed)
        for name in names:
            net = network(generator(seed, INIT), args.digits + 1, *NETWORKS[name])
            nets[name] = net.to(xp)
            train(net, learned, args, seed, name, xp)
            scores[name].append(mean_iou(net, tested, args, seed, xp))

    mean = {name: np.mean(values) for name, values in scores.items()}
    print(f"\n{'':16}parameters  mean IoU  against {control:16}by seed")
    for name, net in nets.items():
        size = sum(param.data.size for param in net.params())
        against = mean[name] - mean[control]
        by_seed = "  ".join(f"{score:.1f}" for score in scores[name])
        print(f"{name:16}{size:10,}{mean[name]:9.1f}%{against:+10.1f}{'':16}{by_seed}")
    shown = {name: nets[name] for name in (control, "deformable")}
    picture = args.out / f"scenes-{args.canvas}.png"
    draw(shown, tested, args, seed, xp, picture)
    print(f"\npicture: {picture}")
    if args.quick:
        assert mean["deformable"] >= mean["dilated"] + 5


if __name__ == "__main__":
    main()
