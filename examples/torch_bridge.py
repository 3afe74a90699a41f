"""The operators in PyTorch: no copy between the two, and gradients by its autograd.

    python examples/torch_bridge.py

`differentiable(f, f_backward)` makes a function of tensors from any operator of this library. A
tensor of the CPU and a NumPy array share their memory, and so do, by DLPack, a CUDA tensor and a
CuPy array; the kernels run on the stream that PyTorch is on. This one function serves all operators
because each has its gradients beside it: `f_backward` takes the gradient of the result and then the
arguments of `f`, and returns the gradients under the names of these.

The script compares deformable convolution with torchvision's, where that is installed, and lets a
small torch.nn network learn with it.
"""

import argparse
import contextlib
import inspect
import math
from functools import partial

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from deformable import deform_conv2d, deform_conv2d_backward


def to_array(value):
    """The NumPy or CuPy array in the memory of a tensor; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    tensor = value.detach()
    if tensor.is_cuda:
        import cupy

        return cupy.from_dlpack(tensor)
    if tensor.dtype == torch.bfloat16:  # which NumPy alone does not know
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_tensor(array):
    """The tensor in the memory of an array; None for None."""
    if array is None:
        return None
    if array.dtype.name == "bfloat16" and isinstance(array, np.ndarray):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


@contextlib.contextmanager
def on_stream_of(tensor):
    """CuPy uses the device and the stream that PyTorch (2.10 or newer) uses."""
    if not tensor.is_cuda:
        yield
        return
    import cupy

    stream = torch.cuda.current_stream(tensor.device)
    with cupy.cuda.Device(tensor.device.index), cupy.cuda.Stream.from_external(stream):
        yield


def differentiable(f, f_backward):
    """`f` for tensors, as torch.autograd knows it."""
    signature = inspect.signature(f)
    names = list(signature.parameters)
    pairs = partial(zip, strict=True)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            tensors = [arg if isinstance(arg, torch.Tensor) else None for arg in args]
            ctx.save_for_backward(*tensors)
            ctx.settings = [arg if tensor is None else None for arg, tensor in pairs(args, tensors)]
            with on_stream_of(args[0]):
                return to_tensor(f(*map(to_array, args)))

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            args = [a if b is None else b for a, b in pairs(ctx.settings, ctx.saved_tensors)]
            wrt = [name for name, needed in pairs(names, ctx.needs_input_grad) if needed]
            with on_stream_of(grad_y):
                grads = f_backward(to_array(grad_y), *map(to_array, args), wrt=wrt)
                return tuple(to_tensor(getattr(grads, name, None)) for name in names)

    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return Operator.apply(*bound.args)

    return call


deform_conv = differentiable(deform_conv2d, deform_conv2d_backward)


class DeformConv2d(torch.nn.Module):
    """Deformable convolution with the convolution that predicts its offsets."""

    def __init__(self, inputs, outputs, kernel_size, padding=0):
        super().__init__()
        self.padding = padding
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, kernel_size, kernel_size))
        torch.nn.init.kaiming_normal_(self.weight)
        self.offset = torch.nn.Conv2d(inputs, 2 * kernel_size**2, kernel_size, padding=padding)
        for param in self.offset.parameters():
            torch.nn.init.zeros_(param)

    def forward(self, x):
        return deform_conv(x, self.offset(x), self.weight, padding=self.padding)


def compare(device):
    """Largest differences to torchvision's deformable convolution, or None without torchvision."""
    try:
        from torchvision.ops import deform_conv2d as theirs
    except ImportError:
        return None
    torch.manual_seed(0)
    shapes = {
        "x": (2, 4, 9, 8),
        "offset": (2, 18, 9, 8),
        "weight": (6, 4, 3, 3),
        "mask": (2, 9, 9, 8),
    }
    tensors = {
        name: torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for name, shape in shapes.items()
    }
    results = []
    for f in deform_conv, theirs:
        y = f(*list(tensors.values())[:3], padding=1, mask=tensors["mask"])
        results.append([y, *torch.autograd.grad(y.sin().sum(), tensors.values())])
    names = ["result", *(f"gradient of {name}" for name in tensors)]
    return {
        name: (ours - other).abs().max().item()
        for name, ours, other in zip(names, *results, strict=True)
    }


def learn(device, steps):
    """Losses of a small network that tells the size of squares."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        DeformConv2d(8, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveMaxPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 1),
    ).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in tqdm(range(steps), desc="learn"):
        side = torch.randint(2, 15, (32,), generator=rng)
        place = torch.arange(16)
        inside = place < side[:, None]
        x = (inside[:, :, None] & inside[:, None]).float()[:, None].to(device)
        loss = torch.nn.functional.mse_loss(net(x)[:, 0], side.to(device) / 15)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(argv=None):
    """Read the command line, compare and learn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="fewer steps, and a check")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = 40
    device = "cuda" if args.device == "gpu" else "cpu"
    differences = compare(device)
    losses = learn(device, args.steps)
    if differences is None:
        print("torchvision is not installed: nothing compared")
    else:
        print(f"\n{'difference to torchvision':28}{'largest':>9}")
        for name, difference in differences.items():
            print(f"{name:28}{difference:>9.1e}")
    print(f"\nloss: {losses[0]:.4f} at first, {losses[-1]:.4f} after {args.steps} steps")
    if args.quick:
        assert math.sqrt(losses[-1]) < 0.5 * math.sqrt(losses[0])


if __name__ == "__main__":
    main()
