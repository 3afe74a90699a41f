"""examples/torch_bridge.py: tensors and arrays share memory, and gradients are autograd's."""

import numpy as np
import pytest

from deformable import conv2d, conv2d_backward, deform_conv2d
from tests.examples import example

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def bridge():
    return example("torch_bridge")


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def test_it_does_what_it_claims(bridge, capsys):
    bridge.main(["--quick"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    differences = [float(row[-1]) for row in rows if row[:1] in (["result"], ["gradient"])]
    assert len(differences) in (0, 5)
    assert all(difference <= 1e-11 for difference in differences)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_and_arrays_share_memory(bridge, dtype):
    tensor = torch.arange(6.0).to(dtype).reshape(2, 3).T
    array = bridge.to_array(tensor)
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    array[0, 1] = 7
    assert tensor[0, 1] == 7
    back = bridge.to_tensor(array)
    assert (back.data_ptr(), back.dtype, back.stride()) == (tensor.data_ptr(), dtype, (1, 3))


def test_gradients_are_those_of_autograd(bridge):
    torch.manual_seed(0)
    tensors = random(1, 2, 4, 5), random(1, 18, 4, 5), random(3, 2, 3, 3), random(3)
    f = bridge.deform_conv
    mask = random(1, 9, 4, 5)
    assert torch.autograd.gradcheck(lambda *a: f(*a[:4], padding=1, mask=a[4]), (*tensors, mask))


def test_only_what_is_needed_has_a_gradient(bridge):
    x, offset, weight = random(1, 2, 4, 5), random(1, 18, 2, 3).detach(), random(3, 2, 3, 3)
    y = bridge.deform_conv(x, offset, weight)
    np.testing.assert_array_equal(
        bridge.to_array(y), deform_conv2d(*map(bridge.to_array, (x, offset, weight)))
    )
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape
    assert offset.grad is None


def test_every_operator_can_be_made_differentiable(bridge):
    torch.manual_seed(0)
    f = bridge.differentiable(conv2d, conv2d_backward)
    assert torch.autograd.gradcheck(
        lambda x, weight: f(x, weight, stride=2), (random(1, 2, 5, 4), random(3, 2, 2, 2))
    )


def test_second_derivatives_are_refused(bridge):
    x, offset, weight = random(1, 2, 4, 5), random(1, 18, 2, 3), random(3, 2, 3, 3)
    y = bridge.deform_conv(x, offset, weight)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_gradients_on_a_gpu_are_those_of_autograd(bridge):
    pytest.importorskip("cupy")
    torch.manual_seed(0)
    shapes = (1, 2, 4, 5), (1, 18, 4, 5), (3, 2, 3, 3)
    tensors = [random(*shape).detach().cuda().requires_grad_() for shape in shapes]
    array = bridge.to_array(tensors[0])
    assert array.data.ptr == tensors[0].data_ptr()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.autograd.gradcheck(lambda *a: bridge.deform_conv(*a, padding=1), tensors)
