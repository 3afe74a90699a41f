"""Layers, losses and optimizers for training networks of these operators without a framework.

    net = nn.Sequential(
        nn.DeformConv2d(3, 16, 3, padding=1, rng=rng), nn.BatchNorm2d(16), nn.ReLU(),
        nn.GlobalAvgPool2d(), nn.Linear(16, 10, rng=rng),
    )
    optimizer = nn.Adam(net.params(), lr=1e-3)

    logits, backward = net(images)
    loss, grad = nn.softmax_cross_entropy(logits, labels)
    backward(grad)
    optimizer.step()
    optimizer.zero_grad()

Images are (N, C, H, W); the layers keep the memory order of what comes, so channels-last arrays,
which the convolutions return, stay channels-last. Everything runs on NumPy and CuPy arrays.
"""

from deformable.nn import distributed
from deformable.nn.basic import BatchNorm2d, Dropout, Flatten, Linear, ReLU
from deformable.nn.conv import Conv2d, DeformConv2d
from deformable.nn.files import load, save
from deformable.nn.layer import Buffer, Layer, Param, Sequential
from deformable.nn.loss import mse, smooth_l1, softmax_cross_entropy
from deformable.nn.optim import (
    SGD,
    Adam,
    AdamW,
    Optimizer,
    clip_grad_norm,
    cosine,
    multi_step,
    one_cycle,
)
from deformable.nn.pool import AvgPool2d, GlobalAvgPool2d, MaxPool2d
from deformable.nn.roi import (
    DeformPSRoIPool,
    DeformRoIPool,
    PSRoIAlign,
    PSRoIPool,
    RoIAlign,
    RoIPool,
)

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "AvgPool2d",
    "BatchNorm2d",
    "Buffer",
    "Conv2d",
    "DeformConv2d",
    "DeformPSRoIPool",
    "DeformRoIPool",
    "Dropout",
    "Flatten",
    "GlobalAvgPool2d",
    "Layer",
    "Linear",
    "MaxPool2d",
    "Optimizer",
    "PSRoIAlign",
    "PSRoIPool",
    "Param",
    "ReLU",
    "RoIAlign",
    "RoIPool",
    "Sequential",
    "clip_grad_norm",
    "cosine",
    "distributed",
    "load",
    "mse",
    "multi_step",
    "one_cycle",
    "save",
    "smooth_l1",
    "softmax_cross_entropy",
]
