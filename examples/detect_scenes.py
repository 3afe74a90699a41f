"""Find handwritten digits in cluttered scenes: what deformable RoI pooling is good for.

    python examples/detect_scenes.py --seeds 3
    python examples/detect_scenes.py --seeds 3 --resume --offset-lr 1

Scenes of 80 x 80 pixels hold about three digits of scikit-learn, stretched and turned, among pieces
of others. Proposals are boxes near the digits, and some anywhere. A small network looks at a scene
once, and a head at each proposal: which digit it is, if any, and how the box should change.

Two kinds of heads are compared, each with bins that stay and with bins that move. A fully connected
one reads all bins of a RoI; its wider form has as many parameters as the deformable one: what this
gains is not size. The other kind is that of R-FCN: each bin has score maps of its own, and the bins
vote. They are trained with the same scenes in the same order.

The layer that predicts the offsets learns with a tenth of the others' learning rate, as one that
reads a whole RoI easily moves its bins too far: the paper takes a hundredth. --offset-lr 1 tells
whether it matters; the second command above takes the other heads from their checkpoints. Here the
fully connected head then moves its bins twice as far; AP70 stays, the boxes fit a little less.

A run that was stopped goes on with --resume, and ends as if it had not been stopped.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

from deformable import deform_conv2d, nn, visualize

CANVAS, PATCH, PIECE = 80, 44, 11  # sides of a scene, of a drawn digit, of a piece of clutter
SIDES = (14.0, 32.0)  # of the digits before they are turned
TURN = math.radians(40)
TRIES, PIECES = 4, 8  # digits that are tried to be placed, pieces of clutter
NEAR, ANYWHERE = 5, 10  # proposals: near each digit, and anywhere
DIGITS = 10  # classes; the next one is the background
CHANNELS, SCALE, BINS = 32, 1 / 4, 5  # of the features; of a RoI, along each axis
ANSWERS = DIGITS + 1 + 4  # scores and the change of the box
HEADS = ["RoIAlign", "RoIAlign, wider", "deformable RoI", "PS-RoI vote", "deformable PS-RoI vote"]
DEFORMABLE = [name for name in HEADS if name.startswith("deformable")]
SPREAD = np.array([0.1, 0.1, 0.2, 0.2])  # of the changes of boxes: targets are divided by it
BATCH, EVERY = 8, 50  # scenes of a step; steps from one checkpoint to the next
SPLIT, INIT, DRAW, TRAIN, TEST = range(5)  # what random numbers are drawn for


def generator(seed, *purpose):
    """Random numbers that depend on nothing but the seed and what they are for.

    So a resumed run needs no old state: it asks for the numbers of the next step.
    """
    return np.random.default_rng([seed, *purpose])


# ---- boxes: (..., 4) as x1, y1, x2, y2; the first pixel reaches from 0 to 1


def overlap(boxes, others):
    """Intersection over union of all boxes (n, 4) with all others (m, 4): (n, m)."""
    first = np.maximum(boxes[:, None, :2], others[:, :2])
    last = np.minimum(boxes[:, None, 2:], others[:, 2:])
    common = np.prod(np.maximum(last - first, 0), axis=2)
    area, other_area = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (boxes, others))
    return common / (area[:, None] + other_area - common)


def encode(rois, boxes):
    """How RoIs have to change to become boxes: shift by their size, logarithm of the growth."""
    size, wanted = rois[:, 2:] - rois[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - rois[:, :2] - rois[:, 2:]) / 2
    return np.concatenate([shift / size, np.log(wanted / size)], axis=1) / SPREAD


def decode(rois, changes):
    """The boxes that RoIs become: the inverse of `encode`."""
    changes = changes * SPREAD
    size = rois[:, 2:] - rois[:, :2]
    centre = (rois[:, :2] + rois[:, 2:]) / 2 + size * changes[:, :2]
    half = size / 2 * np.exp(np.clip(changes[:, 2:], -2, 2))
    return np.concatenate([centre - half, centre + half], axis=1)


def suppress(boxes, scores, most=0.4):
    """Indices of the boxes, best first, without those that overlap a better one."""
    order, same, kept = np.argsort(-scores, kind="stable"), overlap(boxes, boxes) > most, []
    while len(order):
        kept.append(order[0])
        order = order[~same[order[0], order]]
    return kept


# ---- scenes


class Scenes(NamedTuple):
    """Images, and a list with the digits of each."""

    images: np.ndarray  # (n, 1, CANVAS, CANVAS)
    boxes: list[np.ndarray]  # (digits, 4)
    labels: list[np.ndarray]  # (digits,)


def draw_digits(rng, images):
    """Images (n, 8, 8), each stretched and turned, in the middle of a patch.

    It is a deformable convolution with a single tap: its offsets say where in the image each pixel
    of the patch finds its value.
    """
    n, image_side = len(images), images.shape[1]
    angle = rng.uniform(-TURN, TURN, n).reshape(n, 1, 1)
    shrink_y, shrink_x = image_side / rng.uniform(*SIDES, (2, n, 1, 1))
    y, x = np.mgrid[:PATCH, :PATCH]
    dy, dx = y - (PATCH - 1) / 2, x - (PATCH - 1) / 2
    middle = (image_side - 1) / 2
    image_y = middle + shrink_y * (np.cos(angle) * dy - np.sin(angle) * dx)
    image_x = middle + shrink_x * (np.sin(angle) * dy + np.cos(angle) * dx)
    offset = np.stack([image_y - y, image_x - x], axis=1).astype(np.float32)
    padded = np.zeros((n, 1, PATCH, PATCH), np.float32)
    padded[:, 0, :image_side, :image_side] = images
    return deform_conv2d(padded, offset, np.ones((1, 1, 1, 1), np.float32))[:, 0]


def draw_scene(rng, images, labels):
    """One scene: its image, the boxes of the digits and their labels."""
    chosen = rng.integers(len(images), size=TRIES + PIECES)
    patches = draw_digits(rng, images[chosen])
    scene = rng.normal(0, 0.1, (CANVAS, CANVAS)).astype(np.float32)
    boxes, found = np.empty((0, 4)), []
    for patch, label in zip(patches[:TRIES], labels[chosen], strict=False):
        rows, columns = (np.flatnonzero((patch > 0.3).any(axis=axis)) for axis in (1, 0))
        ink = patch[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        y, x = rng.integers(CANVAS + 1 - np.array(ink.shape))
        box = np.array([[x, y, x + ink.shape[1], y + ink.shape[0]]], float)
        if (overlap(box, boxes) < 0.05).all():
            place = scene[y : y + ink.shape[0], x : x + ink.shape[1]]
            np.maximum(place, ink, out=place)
            boxes, found = np.concatenate([boxes, box]), [*found, label]
    for patch in patches[TRIES:]:
        from_y, from_x = rng.integers(PATCH // 4, 3 * PATCH // 4 - PIECE, 2)
        y, x = rng.integers(CANVAS - PIECE, size=2)
        place = scene[y : y + PIECE, x : x + PIECE]
        np.maximum(place, patch[from_y : from_y + PIECE, from_x : from_x + PIECE], out=place)
    return scene[None], boxes, np.array(found)


def draw_scenes(args, seed):
    """Scenes to learn from and, of other digits, to test with."""
    data = load_digits()
    order = generator(seed, SPLIT).permutation(len(data.images))
    tested, learned = np.split(order, [len(data.images) // 6])
    for purpose, part, count in (DRAW, learned, args.scenes), (TEST, tested, args.scenes // 4):
        rng, images, labels = generator(seed, purpose), data.images[part] / 16, data.target[part]
        drawn = [
            draw_scene(rng, images, labels)
            for _ in tqdm(range(count), desc=f"scenes-{seed}", unit=" scenes", leave=False)
        ]
        scenes, boxes, found = zip(*drawn, strict=True)
        yield Scenes(np.stack(scenes), list(boxes), list(found))


def propose(rng, boxes):
    """Boxes near the given ones and anywhere, whose corners lie between pixels."""
    near = np.repeat(boxes, NEAR, axis=0)
    size = near[:, 2:] - near[:, :2]
    centre = (near[:, :2] + near[:, 2:]) / 2 + size * rng.uniform(-0.25, 0.25, size.shape)
    size = size * np.exp(rng.uniform(-0.4, 0.4, size.shape))
    centre = np.concatenate([centre, rng.uniform(0, CANVAS, (ANYWHERE, 2))])
    size = np.concatenate([size, rng.uniform(*SIDES, (ANYWHERE, 2))])
    first = np.clip(np.round(centre - size / 2), 0, CANVAS - 4)
    last = np.clip(np.round(centre + size / 2), first + 4, CANVAS)
    return np.concatenate([first, last], axis=1)


class Proposals(NamedTuple):
    """Of several scenes: RoIs, and what there is to find."""

    rois: np.ndarray  # (k, 5), a scene's index and a box
    labels: np.ndarray  # (k,), DIGITS for the background
    boxes: np.ndarray  # (k, 4), of the digit that overlaps most

    @property
    def found(self):
        """Which of them show a digit."""
        return np.flatnonzero(self.labels < DIGITS)


def proposals(rng, scenes, chosen):
    """Proposals for the chosen scenes."""
    parts = []
    for i, scene in enumerate(chosen):
        boxes, rois = scenes.boxes[scene], propose(rng, scenes.boxes[scene])
        same = overlap(rois, boxes)
        best = same.argmax(axis=1)
        label = np.where(same.max(axis=1) >= 0.5, scenes.labels[scene][best], DIGITS)
        parts.append((np.insert(rois, 0, i, axis=1), label, boxes[best]))
    return Proposals(*map(np.concatenate, zip(*parts, strict=True)))


# ---- networks


class Vote(nn.Layer):
    """R-FCN's head: each bin has score maps of its own, and the answer is the mean of the bins."""

    def __init__(self, pool, rng):
        self.maps = nn.Conv2d(CHANNELS, ANSWERS * BINS * BINS, 1, rng=rng)
        self.pool = pool
        self.mean = nn.GlobalAvgPool2d()

    def __call__(self, features, rois):
        """Vote for the RoIs (K, 5) of features (N, CHANNELS, H, W)."""
        maps, maps_backward = self.maps(features)
        if isinstance(self.pool, nn.DeformPSRoIPool):
            inputs = maps, to_last_pixel(rois), features
        else:
            inputs = maps, rois
        bins, pool_backward = self.pool(*inputs)
        votes, mean_backward = self.mean(bins)

        def backward(grad):
            grad_maps, _, *grad_features = pool_backward(mean_backward(grad))
            return sum(grad_features, maps_backward(grad_maps)), None

        return votes, backward


def to_last_pixel(rois):
    """The same RoIs for operators whose RoIs end with their last pixel, not behind it."""
    inclusive = rois.copy()
    inclusive[:, 3:] -= 1
    return inclusive


def fully_connected(pool, width, rng):
    """Fast R-CNN's head: a layer that reads all bins, and one that answers."""
    return nn.Sequential(
        pool,
        nn.Flatten(),
        nn.Linear(CHANNELS * BINS * BINS, width, rng=rng),
        nn.ReLU(),
        nn.Linear(width, ANSWERS, rng=rng),
    )


def make_head(name, rng, offset_lr):
    """One of the heads that are compared."""
    grid = {"output_size": BINS, "spatial_scale": SCALE, "sampling_ratio": 2}
    branch = {"in_channels": CHANNELS, "offset_lr_mult": offset_lr}
    match name:
        case "RoIAlign":
            return fully_connected(nn.RoIAlign(**grid, aligned=True), 96, rng)
        case "RoIAlign, wider":
            return fully_connected(nn.RoIAlign(**grid, aligned=True), 145, rng)
        case "deformable RoI":
            return fully_connected(nn.DeformRoIPool(**grid, **branch), 96, rng)
        case "PS-RoI vote":
            return Vote(nn.PSRoIAlign(**grid), rng)
        case "deformable PS-RoI vote":
            return Vote(nn.DeformPSRoIPool(**grid, **branch), rng)


class Detector(nn.Layer):
    """Answers for every RoI the scores of the classes and the change of its box."""

    def __init__(self, name, seed, offset_lr):
        rng = generator(seed, INIT)
        layers, inputs = [], 1
        # kernels of 4 at stride 2: every feature lies in the middle of its 4 x 4 pixels
        for outputs, kernel, stride in (16, 4, 2), (32, 4, 2), (32, 3, 1), (CHANNELS, 3, 1):
            conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False, rng=rng)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.backbone = nn.Sequential(*layers)
        self.head = make_head(name, rng, offset_lr)

    def __call__(self, images, rois):
        """Look at images (N, 1, H, W) once, and at their RoIs (K, 5)."""
        features, backbone_backward = self.backbone(images)
        answers, head_backward = self.head(features, rois)

        def backward(grad):
            return backbone_backward(head_backward(grad)[0]), None

        return answers, backward

    def predict(self, images, rois):
        """The same, in inference form."""
        return self.head.predict(self.backbone.predict(images), rois)

    def offsets(self, images, rois):
        """The offsets (K, 2, BINS, BINS) of a deformable head."""
        features = self.backbone.predict(images)
        if isinstance(self.head, Vote):
            return self.head.pool.offsets(features, to_last_pixel(rois))
        return self.head.layers[0].offsets(features, rois)


# ---- training


def loss_and_grad(answers, some, xp):
    """Cross-entropy of the classes and, of RoIs that show a digit, smooth L1 of the boxes."""
    found = some.found
    changes = encode(some.rois[found, 1:], some.boxes[found])
    grad = xp.zeros_like(answers)
    loss, grad[:, : DIGITS + 1] = nn.softmax_cross_entropy(
        answers[:, : DIGITS + 1], xp.asarray(some.labels)
    )
    found = xp.asarray(found)
    box_loss, box_grad = nn.smooth_l1(
        answers[found, DIGITS + 1 :], xp.asarray(changes, dtype=answers.dtype)
    )
    grad[found, DIGITS + 1 :] = 2 * box_grad
    return loss + 2 * box_loss, grad


def train(net, scenes, args, seed, name, xp):
    """Train `net`, and leave a checkpoint now and then."""
    stem = f"{name.replace(', ', '-').replace(' ', '-')}-{args.steps}-{seed}"
    if name in DEFORMABLE:
        stem += f"-{args.offset_lr:g}"
    path = args.out / f"{stem}.npz"
    optimizer = nn.Adam(net.params())
    if args.resume and path.exists():
        nn.load(path, net, optimizer)
    with tqdm(
        range(optimizer.steps, args.steps), initial=optimizer.steps, total=args.steps,
        desc=stem, unit=" steps",
    ) as progress:  # fmt: skip
        for step in progress:
            rng = generator(seed, TRAIN, step)
            chosen = rng.choice(len(scenes.images), BATCH, replace=False)
            some = proposals(rng, scenes, chosen)
            answers, backward = net(
                xp.asarray(scenes.images[chosen]), xp.asarray(some.rois, dtype=np.float32)
            )
            loss, grad = loss_and_grad(answers, some, xp)
            backward(grad)
            optimizer.lr = nn.one_cycle(step, args.steps, peak=6e-3)
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.steps % EVERY == 0 or optimizer.steps == args.steps:
                nn.save(path, net, optimizer)
                hits = answers[:, : DIGITS + 1].argmax(axis=1) == xp.asarray(some.labels)
                progress.set_postfix(
                    loss=f"{float(loss):.3f}", accuracy=f"{float(hits.mean()):.1%}"
                )


# ---- measuring


class Result(NamedTuple):
    """Mean overlap of the improved boxes with their digits, and average precisions, in percent."""

    overlap: float
    ap50: float
    ap70: float


def measure(net, scenes, seed, xp):
    """How well the digits of the test scenes are found."""
    overlaps, detections = [], []  # of the latter: class, score, whether right at 50 and 70 %
    for first in range(0, len(scenes.images), 50):
        chosen = range(first, min(first + 50, len(scenes.images)))
        some = proposals(generator(seed, TEST, first), scenes, chosen)
        answers = net.predict(
            xp.asarray(scenes.images[chosen]), xp.asarray(some.rois, dtype=np.float32)
        )
        answers = (answers if xp is np else answers.get()).astype(np.float64)
        boxes = decode(some.rois[:, 1:], answers[:, DIGITS + 1 :])
        found = some.found
        overlaps += [
            overlap(box[None], true[None])[0, 0]
            for box, true in zip(boxes[found], some.boxes[found], strict=True)
        ]
        scores = np.exp(answers[:, : DIGITS + 1])
        scores /= scores.sum(axis=1, keepdims=True)
        for i, scene in enumerate(chosen):
            here = some.rois[:, 0] == i
            detections += detect(
                boxes[here], scores[here], scenes.boxes[scene], scenes.labels[scene]
            )
    label, score, *right = np.transpose(detections)
    digits = zip(*np.unique(np.concatenate(scenes.labels), return_counts=True), strict=True)
    precisions = [
        [average_precision(score[label == digit], hits[label == digit], count) for hits in right]
        for digit, count in digits
    ]
    return Result(100 * np.mean(overlaps), *(100 * np.mean(precisions, axis=0)))


def detect(boxes, scores, true_boxes, true_labels):
    """Detections of a scene: class, score, and whether each is right at 50 and at 70 % overlap."""
    for digit in range(DIGITS):
        likely = np.flatnonzero(scores[:, digit] > 0.05)
        kept = likely[suppress(boxes[likely], scores[likely, digit])]
        truth = true_boxes[true_labels == digit]
        same = overlap(boxes[kept], truth)
        right = np.zeros((len(kept), 2), bool)
        for column, least in enumerate((0.5, 0.7)):
            free = np.ones(len(truth), bool)
            for row, overlaps in enumerate(same):
                matches = np.where(free, overlaps, 0)
                if matches.max(initial=0) >= least:
                    free[matches.argmax()] = False
                    right[row, column] = True
        for row, (at50, at70) in zip(kept, right, strict=True):
            yield digit, scores[row, digit], at50, at70


def average_precision(scores, right, digits):
    """Area below the curve of precision over recall, which is made to fall."""
    hits = np.cumsum(right[np.argsort(-scores, kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return (falling * np.diff(hits, prepend=0)).sum() / digits


def draw(nets, scenes, path, xp):
    """The shifted parts of digits' RoIs: Fig. 6 of the paper, with a row for every network."""
    figure = Figure(figsize=(12, 2.6 * len(nets)), layout="constrained")
    grid = figure.subplots(len(nets), 5, squeeze=False)
    for (name, net), row in zip(nets.items(), grid, strict=True):
        row[0].set_ylabel(name)
        for scene, ax in enumerate(row):
            image = xp.asarray(scenes.images[scene : scene + 1])
            roi = np.insert(scenes.boxes[scene][:1], 0, 0, axis=1).astype(np.float32)
            offset = net.offsets(image, xp.asarray(roi))[0]
            visualize.roi_parts(roi[0], offset, BINS, image=image[0, 0], ax=ax)
            x, y = roi[0, 1:].reshape(2, 2).mean(axis=0)
            half = max(SIDES) / 2 + 6
            ax.set(xticks=[], yticks=[], xlim=(x - half, x + half), ylim=(y + half, y - half))
    figure.savefig(path, dpi=150)


def main(argv=None):
    """Read the command line, train and compare the heads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--offset-lr", type=float, default=0.1, metavar="X", help="relative")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS, metavar="HEAD")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--scenes", type=int, default=1600, help="to learn from; a fourth to test")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--out", type=Path, default=Path("out"), help="checkpoints and pictures")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints there")
    parser.add_argument("--quick", action="store_true", help="seconds, and the claim is checked")
    args = parser.parse_args(argv)
    if args.quick:
        args.heads, args.steps, args.scenes = ["RoIAlign, wider", "deformable RoI"], 200, 800
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "gpu":
        import cupy as xp
    else:
        xp = np

    nets, results = {}, {name: [] for name in args.heads}
    for seed in range(args.seed, args.seed + args.seeds):
        learned, tested = draw_scenes(args, seed)
        for name in args.heads:
            net = nets[name] = Detector(name, seed, args.offset_lr).to(xp)
            train(net, learned, args, seed, name, xp)
            results[name].append(measure(net, tested, seed, xp))

    print(f"\n{'':24}parameters  mean IoU   AP50   AP70   AP70 by seed")
    for name, net in nets.items():
        size = sum(param.data.size for param in net.params())
        mean = Result(*np.mean(results[name], axis=0))
        by_seed = "  ".join(f"{result.ap70:.1f}" for result in results[name])
        print(
            f"{name:24}{size:10,}{mean.overlap:9.1f}%{mean.ap50:7.1f}{mean.ap70:7.1f}   {by_seed}"
        )
    moving = {name: net for name, net in nets.items() if name in DEFORMABLE}
    if moving:
        picture = args.out / f"parts-{args.offset_lr:g}.png"
        draw(moving, tested, picture, xp)
        print(f"\nwhere the parts of RoIs go: {picture}")
    if args.quick:
        wider, deformable = (np.mean([r.overlap for r in results[name]]) for name in args.heads)
        assert deformable > wider + 0.5


if __name__ == "__main__":
    main()
