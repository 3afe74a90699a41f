"""Draws the pictures of the pages: ``python docs/pictures.py`` writes them to docs/images."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image

from deformable.visualize import GREEN, ORANGE, Sampling, offset_field, roi_parts, sampling_points

IMAGES = Path(__file__).parent / "images"
SPREAD = np.mgrid[-1:2, -1:2].reshape(2, 9).T  # (y, x) of the taps around the middle


def flower():
    """A part of a photograph of scikit-learn, 128 x 128, grey."""
    return load_sample_image("flower.jpg")[150:278, 200:328].mean(axis=2)


def everywhere(shifts, size):
    """Offsets (1, 18, size, size): the taps are shifted by (9, 2) at every position."""
    return np.broadcast_to(np.reshape(shifts, (1, 18, 1, 1)), (1, 18, size, size))


def taps():
    """The order of the taps and of the channels of their offsets."""
    shifts = [(-0.3, -0.25), (-0.35, 0.1), (-0.2, 0.3), (0.1, -0.35), (-0.25, 0.2)]
    shifts += [(0.15, 0.3), (0.3, -0.3), (0.3, 0.1), (0.25, 0.3)]
    figure = Figure(figsize=(5, 5), layout="constrained")
    ax = figure.subplots()
    for tap, (regular, shift) in enumerate(zip(SPREAD + 2, np.array(shifts), strict=True)):
        y, x = regular + shift
        ax.annotate("", (x, y), regular[::-1], arrowprops={"arrowstyle": "->", "color": "0.4"})
        ax.plot(*regular[::-1], "o", color="0.7", markersize=7)
        ax.plot(x, y, "o", color=ORANGE, markersize=9)
        side = np.sign(shift[0])
        label = f"tap {tap}\n({2 * tap}, {2 * tap + 1})"
        ax.text(x, y + 0.14 * side, label, ha="center", va="top" if side > 0 else "bottom")
    ax.plot(2, 2, "s", color=GREEN, markersize=6)
    ax.set(xlim=(0, 4), ylim=(4, 0), xticks=range(5), yticks=range(5), xlabel="x", ylabel="y")
    ax.set(title="channels (dy, dx) of the offsets of a 3x3 kernel", aspect="equal")
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    return figure


def points():
    """A convolution, a deformable one, and three of them stacked."""
    rng = np.random.default_rng(0)
    size, position = 16, (7, 9)
    backbone = Sampling(None, kernel_size=1, stride=8)
    smooth = rng.normal(0, 0.45, (9, 2)) + 0.5 * SPREAD
    layers = {
        "a convolution": [Sampling(everywhere(0 * SPREAD, size), padding=1)],
        "a deformable convolution": [Sampling(everywhere(smooth, size), padding=1)],
        "three of them": [
            Sampling(everywhere(smooth * scale, size), padding=1) for scale in (0.6, 0.8, 1)
        ],
    }
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for ax, (title, stack) in zip(figure.subplots(1, 3), layers.items(), strict=True):
        sampling_points([backbone, *stack], position, flower(), ax)
        ax.set(title=title, xticks=[], yticks=[], xlim=(-0.5, 127.5), ylim=(127.5, -0.5))
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, markerscale=1.5)
    return figure


def field():
    """The offsets of one tap, as arrows and as colours."""
    y, x = np.indices((24, 24)) - 11.5
    away = np.exp(-(y**2 + x**2) / 90)
    layer = Sampling(np.stack([y * away, x * away])[None] / 4, 1)
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    arrows, colours = figure.subplots(1, 2)
    offset_field(layer, ax=arrows, every=2)
    offset_field(layer, ax=colours, colours=True)
    arrows.set(title="as arrows", xticks=[], yticks=[], xlim=(-1.5, 24.5), ylim=(24.5, -1.5))
    colours.set(title="as colours", xticks=[], yticks=[])
    return figure


def bins():
    """A RoI, and the bins of deformable RoI pooling."""
    offset = np.random.default_rng(1).normal(0, 0.9, (2, 3, 3))
    roi = (52, 44, 118, 104)
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    columns = zip(figure.subplots(1, 2), ("RoI pooling", "deformable"), (None, offset), strict=True)
    for ax, title, shifts in columns:
        roi_parts(roi, shifts, 3, image=flower(), ax=ax)
        ax.set(title=title, xticks=[], yticks=[], xlim=(-0.5, 127.5), ylim=(127.5, -0.5))
    return figure


PICTURES = {"taps": taps, "points": points, "field": field, "bins": bins}


def main():
    """Write all pictures."""
    IMAGES.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        draw().savefig(IMAGES / f"{name}.png", dpi=100, bbox_inches="tight", pad_inches=0.06)


if __name__ == "__main__":
    main()
