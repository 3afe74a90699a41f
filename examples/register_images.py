"""Find out how an image was warped: offsets that are learned directly, without a network.

    python examples/register_images.py
    python examples/register_images.py --image gravel.png

A photograph and a smoothly warped copy of it are given. A deformable convolution with a single tap
of weight 1 draws the copy from the photograph if its offsets say where every pixel comes from, so
the offsets are searched: the gradient of the squared difference by the offsets, smoothed in space
from coarse to fine, moves them until both images agree. Nothing else is learned here, which makes
this the shortest look at what a gradient by a sampling position is good for.

The table tells how far the offsets are from the truth, in pixels. Where the copy shows what lies
outside of the photograph nothing tells them; these pixels (2-3 %) count all the same.
"""

import argparse
from pathlib import Path
from types import ModuleType

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread
from sklearn.datasets import load_sample_image
from tqdm import tqdm

from deformable import deform_conv2d, deform_conv2d_backward, nn
from deformable.visualize import Sampling, offset_field

SIDE = 128  # of the images, in pixels
LARGEST = 4.0  # displacement, in pixels
COARSE, FINE = 10.0, 0.7  # standard deviations of the smoothing, in pixels
RATE = 0.1  # pixels that a step may move


def photograph(file: Path | None = None) -> np.ndarray:
    """The middle of an image file, or part of a flower: (1, 1, SIDE, SIDE), mean 0, deviation 1."""
    if file is None:
        pixels = load_sample_image("flower.jpg")[150 : 150 + SIDE, 200 : 200 + SIDE]
    else:
        pixels = imread(file)
        top, left = ((size - SIDE) // 2 for size in pixels.shape[:2])
        if min(top, left) < 0:
            raise SystemExit(f"{file} has {pixels.shape[:2]} pixels, {SIDE} x {SIDE} are needed")
        pixels = pixels[top : top + SIDE, left : left + SIDE]
    grey = pixels.reshape(SIDE, SIDE, -1)[..., :3].mean(axis=2)  # without opacity
    return ((grey - grey.mean()) / grey.std()).astype(np.float32)[None, None]


def smooth(maps, width: float, xp: ModuleType):
    """Gaussian means of `maps` (..., SIDE, SIDE): a matrix times their columns and their rows."""
    place = xp.arange(SIDE, dtype=maps.dtype)
    matrix = xp.exp(-(((place[:, None] - place) / width) ** 2) / 2)
    matrix /= matrix.sum(axis=1, keepdims=True)
    return matrix @ maps @ matrix.T


def smooth_flow(rng: np.random.Generator) -> np.ndarray:
    """Random offsets (1, 2, SIDE, SIDE) that change slowly."""
    flow = smooth(rng.standard_normal((1, 2, SIDE, SIDE)), 16.0, np)
    return (flow * (LARGEST / np.linalg.norm(flow, axis=1).max())).astype(np.float32)


def register(image, warped, steps: int, xp: ModuleType):
    """The offsets with which `image` looks like `warped`, and the loss of every step."""
    tap = xp.ones((1, 1, 1, 1), image.dtype)
    offset = nn.Param(xp.zeros((1, 2, SIDE, SIDE), image.dtype))
    optimizer = nn.Adam([offset])
    losses = []
    with tqdm(range(steps), desc="register", unit="step") as progress:
        for step in progress:
            loss, grad = nn.mse(deform_conv2d(image, offset.data, tap), warped)
            grads = deform_conv2d_backward(grad, image, offset.data, tap, wrt=["offset"])
            width = COARSE * (FINE / COARSE) ** (step / steps)
            offset.add_grad(smooth(grads.offset, width, xp))
            optimizer.lr = nn.cosine(step, steps, RATE)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            if step % 100 == 99:
                progress.set_postfix(loss=f"{float(loss):.1e}")
    return offset.data, [float(loss) for loss in losses]


def draw(image, warped, offset, flow, losses, path: Path) -> None:
    """Both images, what differs before and after, the offsets, their error, and the loss."""
    found = deform_conv2d(image, offset, np.ones((1, 1, 1, 1), np.float32))
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    axes = figure.subplots(2, 4)
    pictures = {
        "photograph": (image, "gray"),
        "warped copy": (warped, "gray"),
        "difference before": (warped - image, "PuOr"),
        "difference after": (warped - found, "PuOr"),
    }
    for axis, (title, (picture, colours)) in zip(axes[0], pictures.items(), strict=True):
        axis.imshow(picture[0, 0], cmap=colours, vmin=-2.5, vmax=2.5)
        axis.set(title=title)
    for axis, title, field in zip(
        axes[1], ("offsets of the copy, x 2", "offsets found, x 2"), (flow, offset), strict=False
    ):
        offset_field(Sampling(field, 1), ax=axis, every=8, magnify=2)
        axis.set(title=title)
    axes[1, 2].semilogy(losses)
    axes[1, 2].set(title="squared difference by step", box_aspect=1)
    error = axes[1, 3].imshow(np.linalg.norm(offset - flow, axis=1)[0], vmin=0, vmax=0.1)
    axes[1, 3].set(title="error of the offsets, in pixels")
    figure.colorbar(error, ax=axes[1, 3], shrink=0.8, extend="max")
    for axis in axes.flat:
        if axis is not axes[1, 2]:
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, warp, register, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--image", type=Path, help="file with a photograph of your own")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the warp")
    parser.add_argument("--out", type=Path, default=Path("out"), help="for the picture")
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps, and a check of the claim"
    )
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = 300
    args.out.mkdir(parents=True, exist_ok=True)
    if args.device == "gpu":
        import cupy as xp
    else:
        xp = np

    image, flow = photograph(args.image), smooth_flow(np.random.default_rng(args.seed))
    warped = deform_conv2d(image, flow, np.ones((1, 1, 1, 1), np.float32))
    offset, losses = register(*map(xp.asarray, (image, warped)), args.steps, xp)
    offset = offset if xp is np else offset.get()
    picture = args.out / f"register-images-{args.seed}.png"
    draw(image, warped, offset, flow, losses, picture)

    before, after = np.linalg.norm(flow, axis=1), np.linalg.norm(offset - flow, axis=1)
    print(f"\n{'error of the offsets, in pixels':34}{'mean':>8}{'median':>8}{'95 % below':>12}")
    for name, error in (("before: no offsets", before), ("after", after)):
        median, most = np.quantile(error, [0.5, 0.95])
        print(f"{name:34}{error.mean():>8.3f}{median:>8.4f}{most:>12.3f}")
    print(f"\npicture: {picture}")
    if args.quick:
        assert after.mean() < 0.05, "the offsets should be right within 0.05 pixels"


if __name__ == "__main__":
    main()
