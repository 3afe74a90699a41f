"""Random calls of the RoI operators."""

import numpy as np

import deformable

NAMES = (
    "roi_pool",
    "roi_align",
    "ps_roi_pool",
    "ps_roi_align",
    "deform_roi_pool",
    "deform_ps_roi_pool",
)
DEFORMABLE = NAMES[4:]
AVERAGES = NAMES[1:]


def functions(name):
    """An operator and its backward."""
    return getattr(deformable, name), getattr(deformable, f"{name}_backward")


def random_case(name, rng, **fixed):
    """Arrays and keywords of a random call; ``fixed`` are some of its sizes and
    keywords, where the operator has them.

    RoIs touch and cross every border, are at times empty, or end before they begin.
    """
    pick = lambda key, choices: fixed.pop(key, int(rng.choice(choices)))  # noqa: E731
    n, k, depth, classes = (
        pick(key, choices)
        for key, choices in (
            ("n", [2, 3]),
            ("k", [3, 5]),
            ("depth", [1, 2, 3]),
            ("classes", [1, 2]),
        )
    )
    masked = fixed.pop("mask", rng.random() < 0.5)
    part = fixed.pop("part", tuple(rng.integers(1, 4, 2).tolist()))
    height, width = pick("height", range(2, 9)), pick("width", range(2, 9))
    output_size = fixed.pop("output_size", tuple(map(int, rng.integers(1, 4, 2))))
    scale = fixed.pop("spatial_scale", float(rng.choice([1, 0.5, 0.25, 0.3])))
    keywords = {"output_size": output_size, "spatial_scale": scale}
    groups = (1, 1)
    if name == "ps_roi_align":
        groups = output_size
    elif "ps_" in name:
        groups = keywords["group_size"] = fixed.pop(
            "group_size", tuple(rng.integers(1, 4, 2).tolist())
        )
    if name not in ("roi_pool", "ps_roi_pool"):
        least = 1 if name == "deform_ps_roi_pool" else -1
        keywords["sampling_ratio"] = tuple(rng.integers(least, 4, 2).tolist())
    if name == "roi_align":
        keywords |= {"aligned": bool(rng.integers(2)), "mode": "avg"}

    channels = depth * classes * groups[0] * groups[1]
    size = np.array([width, height]) / scale
    corners = rng.uniform(-0.4, 1.4, (2, k, 2)) * size
    if rng.random() < 0.8:
        corners.sort(axis=0)
    image = rng.integers(0, n, (k, 1)) if n else np.zeros((k, 1))
    rois = np.concatenate([image, *np.round(corners * 8) / 8], axis=1)
    arrays = {"x": rng.normal(size=(n, channels, height, width)), "rois": rois}
    if name in DEFORMABLE:
        if name == "deform_roi_pool":
            part, classes = output_size, 1
        keywords["gamma"] = float(rng.choice([0.1, 0.5, 1]))
        arrays["offset"] = rng.integers(-16, 17, (k, 2 * classes, *part)) / 8
        if masked:
            arrays["mask"] = rng.normal(size=(k, *output_size))
    return arrays, keywords | fixed
