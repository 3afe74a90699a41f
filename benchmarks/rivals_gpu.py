"""torch and torchvision on a GPU, sharing memory with cupy: whichever of them is installed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks import rivals
from benchmarks.gpu import HAVE_GPU, Runner, TorchGraph, torch_peak_bytes
from benchmarks.harness import BOTH, FORWARD, Contender


def torch() -> Any:
    """torch where it sees the GPU, else None."""
    module = rivals.find("torch") if HAVE_GPU else None
    return module if module is not None and module.cuda.is_available() else None


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """torch with or without TF32, and with the fastest algorithm that cuDNN finds."""
    found = torch()
    if found is None:
        yield
        return
    matmul, cudnn = found.backends.cuda.matmul, found.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = tf32, tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def describe() -> dict[str, Any]:
    """What torch computes with, for the record."""
    found = torch()
    if found is None:
        return {}
    matmul, cudnn = found.backends.cuda.matmul, found.backends.cudnn
    return {
        "torch matmul tf32": matmul.allow_tf32,
        "torch cudnn tf32": cudnn.allow_tf32,
        "torch cudnn benchmark": cudnn.benchmark,
    }


def to_numpy(tensor: Any) -> np.ndarray:
    host = tensor.detach().cpu()
    return (host.float() if "bfloat16" in str(host.dtype) else host).numpy()


def tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """cupy arrays as torch tensors of the same memory."""
    found = torch()
    return {name: found.from_dlpack(array) for name, array in arrays.items()}


def torchvision(
    operator: str, sets: list[tuple[dict[str, Any], Any]], keywords: Mapping[str, Any]
) -> list[Runner]:
    """torchvision's operator through autograd, and the convolution also without autograd."""
    if torch() is None:
        return []
    made = []
    for arrays, grad_y in sets:
        shared = tensors({**arrays, "grad_y": grad_y})
        gradient = shared.pop("grad_y")
        made.append(rivals.torchvision(operator, shared, keywords, gradient, to_numpy))
    if None in made:
        return []
    found = [Runner(made, TorchGraph, torch_peak_bytes, rivals.comparable(operator))]
    if operator == "deform_conv2d":
        direct = [_direct(arrays, keywords, grad_y) for arrays, grad_y in sets]
        found.append(Runner(direct, TorchGraph, torch_peak_bytes))
    return found


def _direct(arrays: Mapping[str, Any], keywords: Mapping[str, Any], grad_y: Any) -> Contender:
    """torchvision's kernels without autograd: what they cost by themselves."""
    found = torch()
    shared = tensors({**arrays, "grad_y": grad_y})
    x, offset, weight, bias = (shared[name] for name in ("x", "offset", "weight", "bias"))
    modulated = "mask" in shared
    mask = shared["mask"] if modulated else x.new_zeros((len(x), 1))
    groups = x.shape[1] // weight.shape[1]
    offset_groups = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
    padding, dilation = keywords["padding"], keywords["dilation"]
    numbers = (1, 1, padding, padding, dilation, dilation, groups, offset_groups, modulated)
    operators = found.ops.torchvision

    def forward() -> Any:
        return operators.deform_conv2d(x, weight, offset, mask, bias, *numbers)

    def both() -> dict[str, Any]:
        y = forward()
        gradients = operators._deform_conv2d_backward(
            shared["grad_y"], x, weight, offset, mask, bias, *numbers
        )
        names = ("x", "weight", "offset", "mask", "bias")
        return {"y": y, **{k: g for k, g in zip(names, gradients, strict=True) if k in shared}}

    return Contender("torchvision kernels", {FORWARD: forward, BOTH: both}, to_numpy)


def conv2d(
    sets: list[tuple[dict[str, Any], Any]], keywords: Mapping[str, Any], dtype: str, same: bool
) -> list[Runner]:
    """torch's plain convolution, channels-last: about what the machine can do at these sizes."""
    found = torch()
    if found is None:
        return []

    def prepared(array: Any) -> Any:
        tensor = found.from_dlpack(array).to(getattr(found, dtype))
        layout = found.channels_last if tensor.ndim == 4 else found.contiguous_format
        return tensor.contiguous(memory_format=layout)

    def convolve(x: Any, weight: Any, bias: Any, **given: Any) -> Any:
        return found.nn.functional.conv2d(x, weight, bias, **given)

    made = []
    for arrays, grad_y in sets:
        known = {name: prepared(arrays[name]) for name in ("x", "weight", "bias")}
        calls: Mapping[str, Callable[[], Any]] = rivals.autograd(
            convolve, known, keywords, prepared(grad_y)
        )
        made.append(Contender("torch conv2d", calls, to_numpy))
    return [Runner(made, TorchGraph, torch_peak_bytes, same)]
