"""Other implementations of the operators, as contenders: whichever of them can be imported."""

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.harness import BOTH, FORWARD, Contender

# what an operator is compared with, where the rival has none of the same name
STAND_INS = {"deform_ps_roi_pool": "ps_roi_align", "deform_roi_pool": "roi_align"}
# operators of the same name that mean something else: torchvision's never reads the last row
DIFFERENT = {"ps_roi_pool"}


def comparable(operator: str) -> bool:
    """Whether the rival's results are to be those of this library."""
    return operator not in DIFFERENT and operator not in STAND_INS


def find(name: str) -> ModuleType | None:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"not found: {name}", file=sys.stderr)
        return None


def torch_tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def autograd(
    function: Callable[..., Any],
    arrays: Mapping[str, Any],
    keywords: Mapping[str, Any],
    grad_y: Any,
) -> dict[str, Callable[[], Any]]:
    """The modes of a function of torch tensors: its gradient by the framework's autograd."""
    import torch

    fixed = {name: t for name, t in arrays.items() if name in ("rois", "boxes")}
    moving = {name: t for name, t in arrays.items() if t is not None and name not in fixed}

    def forward() -> Any:
        with torch.inference_mode():
            return function(**arrays, **keywords)

    def both() -> dict[str, Any]:
        leaves = {name: t.detach().requires_grad_() for name, t in moving.items()}
        y = function(**{**arrays, **leaves}, **keywords)
        return {
            "y": y.detach(),
            **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y), strict=True)),
        }

    return {FORWARD: forward, BOTH: both}


def torchvision(
    operator: str,
    arrays: Mapping[str, Any],
    keywords: Mapping[str, Any],
    grad_y: Any,
    to_numpy: Callable[[Any], np.ndarray] = lambda t: t.numpy(),
) -> Contender | None:
    """torchvision's operator, or the one that stands in for it, on tensors."""
    module = find("torchvision.ops")
    name = STAND_INS.get(operator, operator)
    if module is None or not hasattr(module, name):
        return None
    function = getattr(module, name)
    if name == "deform_conv2d":
        known = dict(arrays)
        renamed = {"x": "input"}
    else:
        known = {key: arrays[key] for key in ("x", "rois")}
        renamed = {"x": "input", "rois": "boxes"}

    def call(**given: Any) -> Any:
        return function(**{renamed.get(key, key): value for key, value in given.items()})

    return Contender("torchvision", autograd(call, known, keywords, grad_y), to_numpy)


def onnxruntime(
    arrays: Mapping[str, np.ndarray], keywords: Mapping[str, Any], threads: int
) -> Contender | None:
    """onnxruntime's DeformConv (of opset 19), forward only; weights are constants of its model."""
    ort, onnx = find("onnxruntime"), find("onnx")
    if ort is None or onnx is None:
        return None
    x, weight, offset = arrays["x"], arrays["weight"], arrays["offset"]
    dtype = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
    feed = {key: arrays[key] for key in ("x", "offset", "mask") if key in arrays}
    constants = {key: arrays[key] for key in ("weight", "bias") if key in arrays}
    node = onnx.helper.make_node(
        "DeformConv",
        ["x", "weight", "offset", *(k if k in arrays else "" for k in ("bias", "mask"))],
        ["y"],
        kernel_shape=weight.shape[2:],
        pads=[keywords["padding"]] * 4,
        dilations=[keywords["dilation"]] * 2,
        group=x.shape[1] // weight.shape[1],
        offset_group=offset.shape[1] // (2 * weight.shape[2] * weight.shape[3]),
    )
    inputs = [onnx.helper.make_tensor_value_info(k, dtype, a.shape) for k, a in feed.items()]
    output = onnx.helper.make_tensor_value_info("y", dtype, None)
    held = [onnx.numpy_helper.from_array(a, name=key) for key, a in constants.items()]
    graph = onnx.helper.make_graph([node], "deform_conv", inputs, [output], held)
    opset = onnx.helper.make_opsetid("", 19)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return Contender("onnxruntime", {FORWARD: lambda: session.run(None, feed)[0]})


def openvino(
    arrays: Mapping[str, np.ndarray], keywords: Mapping[str, Any], threads: int
) -> Contender | None:
    """OpenVINO's DeformableConvolution, forward only; weights are constants of its model.

    It computes float64 in float32, so that there is nothing to compare with.
    """
    ov, opset = find("openvino"), find("openvino.opset8")
    if ov is None or opset is None or arrays["x"].dtype != np.float32:
        return None
    x, weight, offset = arrays["x"], arrays["weight"], arrays["offset"]
    names = [key for key in ("x", "offset", "mask") if key in arrays]
    nodes = {k: opset.parameter(arrays[k].shape, arrays[k].dtype.type, name=k) for k in names}
    y = opset.deformable_convolution(
        nodes["x"], nodes["offset"], opset.constant(weight),
        strides=[1, 1],
        pads_begin=[keywords["padding"]] * 2,
        pads_end=[keywords["padding"]] * 2,
        dilations=[keywords["dilation"]] * 2,
        mask=nodes.get("mask"),
        group=x.shape[1] // weight.shape[1],
        deformable_group=offset.shape[1] // (2 * weight.shape[2] * weight.shape[3]),
        bilinear_interpolation_pad=True,
    )  # fmt: skip
    if "bias" in arrays:
        y = opset.add(y, opset.constant(arrays["bias"].reshape(1, -1, 1, 1)))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = ov.Model([y], [nodes[k] for k in names], "deform_conv")
    compiled = ov.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    feed = [ov.Tensor(arrays[k], shared_memory=True) for k in names]

    def forward() -> np.ndarray:
        return request.infer(feed, share_inputs=True, share_outputs=True)[0]

    return Contender("openvino", {FORWARD: forward}, np.array)
