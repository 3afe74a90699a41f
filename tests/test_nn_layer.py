"""What every layer does: parameters, states, libraries, composition, and no memory of calls."""

import gc
import weakref

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import nn
from deformable.testing import check_layer
from tests.arrays import host


def network(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, dtype=dtype, rng=rng),
        nn.BatchNorm2d(4, dtype=dtype),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(nn.DeformConv2d(4, 5, 3, padding=1, dtype=dtype, rng=rng), nn.ReLU()),
        nn.GlobalAvgPool2d(),
        nn.Linear(5, 2, dtype=dtype, rng=rng),
    )


NAMES = [
    "0.weight",
    "0.bias",
    "1.weight",
    "1.bias",
    "1.running_mean",
    "1.running_var",
    "4.0.weight",
    "4.0.bias",
    "4.0.offset_conv.weight",
    "4.0.offset_conv.bias",
    "6.weight",
    "6.bias",
]


def images(xp, n=2, dtype=np.float64):
    return xp.asarray(np.random.default_rng(1).normal(size=(n, 3, 6, 6)).astype(dtype))


class Branches(nn.Layer):
    """Two inputs, a list of layers, and one layer used twice."""

    def __init__(self):
        rng = np.random.default_rng(3)
        self.arms = [nn.Linear(4, 4, dtype=np.float64, rng=rng) for _ in range(2)]
        self.again = self.arms[0]

    def __call__(self, a, b):
        y, first = self.arms[0](a)
        z, second = self.arms[1](b)
        z, third = self.again(z)

        def backward(grad):
            return first(grad), second(third(grad))

        return y + z, backward


def test_parameters_are_found_by_their_attributes():
    net = network()
    assert list(net.state()) == NAMES
    assert len(net.params()) == len(NAMES) - 2
    assert list(Branches().state()) == [
        "arms.0.weight",
        "arms.0.bias",
        "arms.1.weight",
        "arms.1.bias",
    ]


def test_parameters_are_found_however_deep_they_lie():
    net = nn.Layer()
    net.rows = [[nn.Linear(2, 3, bias=False)], (nn.Linear(2, 3, bias=False),)]
    net.heads = {"box": nn.Linear(2, 4, bias=False), 5: [nn.Param(np.ones(1))]}
    assert list(net.state()) == [
        "rows.0.0.weight",
        "rows.1.0.weight",
        "heads.box.weight",
        "heads.5.0",
    ]


def test_a_network_has_the_gradients_of_its_composition(xp):
    net = network()
    between_pixels = net.layers[4].layers[0].offset_conv.bias
    between_pixels.data = np.random.default_rng(4).uniform(0.2, 0.8, between_pixels.data.shape)
    net.to(xp)
    check_layer(net, [images(xp)], rng=np.random.default_rng(0))


def test_a_layer_may_have_several_inputs_and_occur_twice(xp):
    rng = np.random.default_rng(0)
    inputs = [xp.asarray(rng.normal(size=(3, 4))) for _ in range(2)]
    check_layer(Branches().to(xp), inputs, rng=rng)
    shared = nn.Linear(4, 4, dtype=np.float64, rng=rng)
    check_layer(nn.Sequential(shared, nn.ReLU(), shared).to(xp), inputs[:1], rng=rng)
    check_layer(nn.Sequential(Branches(), nn.ReLU()).to(xp), inputs, rng=rng)


def test_gradients_add_up_until_they_are_forgotten(xp):
    net = network().to(xp)
    y, backward = net(images(xp))
    backward(xp.ones_like(y))
    once = [host(xp, param.grad) for param in net.params()]
    backward(xp.ones_like(y))
    for param, grad in zip(net.params(), once, strict=True):
        assert_array_equal(host(xp, param.grad), 2 * grad)


def test_calls_may_overlap(xp):
    """The backward of a call belongs to that call, whatever was called since."""
    net, other = network().to(xp), network().to(xp)
    x, z = images(xp), images(xp, 5)
    y, backward = net(x)
    net(z)
    for param in net.params():
        param.data = param.data + 1
    expected, expected_backward = other(x)
    assert_array_equal(host(xp, y), host(xp, expected))
    grad, expected_grad = backward(y), expected_backward(expected)
    assert_array_equal(host(xp, grad), host(xp, expected_grad))


def test_prediction_keeps_nothing_alive():
    net, x = network(), images(np)
    alive = weakref.ref(x)
    y = net.predict(x)
    del x
    gc.collect()
    assert alive() is None
    assert y.shape == (2, 2)


def test_prediction_is_that_of_every_layer_and_changes_nothing(xp):
    net, x = network().to(xp), images(xp)
    before, expected = net.state(), x
    for layer in net.layers:
        expected = layer.predict(expected)
    assert_array_equal(host(xp, net.predict(x)), host(xp, expected))
    assert all(net.state()[name] is array for name, array in before.items())
    assert (host(xp, net(x)[0]) != host(xp, expected)).all()  # other averages


def test_a_call_lives_as_long_as_its_backward():
    net, x = network(), images(np)
    alive = weakref.ref(x)
    _, backward = net(x)
    del x
    gc.collect()
    assert alive() is not None
    del backward
    gc.collect()
    assert alive() is None


def test_a_state_is_a_snapshot(xp):
    net = network().to(xp)
    before = net.state()
    copies = {name: host(xp, array).copy() for name, array in before.items()}
    optimizer = nn.SGD(net.params(), lr=0.1)
    y, backward = net(images(xp))
    backward(xp.ones_like(y))
    optimizer.step()
    for name, copy in copies.items():
        assert_array_equal(host(xp, before[name]), copy)
    moved = net.state()
    assert all(
        (host(xp, moved[name]) != copies[name]).any() for name in ("0.bias", "1.running_mean")
    )


def test_a_loaded_state_is_a_copy(xp):
    net, other = network(0).to(xp), network(1)
    state = other.state()
    net.load_state(state)
    state["0.weight"][...] = 0
    assert_array_equal(host(xp, net.state()["0.weight"]), network(1).state()["0.weight"])
    x = images(xp)
    assert net.predict(x).dtype == np.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, r"missing names \['0.bias'\], unknown names \[\]"),
        ({"7.bias": np.ones(3)}, r"missing names \[\], unknown names \['7.bias'\]"),
        ({"0.bias": np.ones(3)}, r"0.bias has shape \(3,\), expected \(4,\)"),
        ({"6.bias": np.ones(2, np.float32)}, r"6.bias has dtype float32, expected float64"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    net = network(0)
    before = net.state()
    state = {
        name: array for name, array in (network(1).state() | change).items() if array is not None
    }
    with pytest.raises(ValueError, match=f"Sequential.load_state: {message}"):
        net.load_state(state)
    assert all(net.state()[name] is array for name, array in before.items())


def test_moving_keeps_the_values(xp):
    net = network()
    y, backward = net(images(np))
    backward(y)
    expected, grads = net.state(), [param.grad for param in net.params()]
    for target in [xp] if xp is np else [xp, xp.cuda.Device(0)]:
        net.to(target)
        assert all(isinstance(array, xp.ndarray) for array in net.state().values())
        assert all(isinstance(param.grad, xp.ndarray) for param in net.params())
        net.to(np)
        for name, array in net.state().items():
            assert_array_equal(array, expected[name])
        for param, grad in zip(net.params(), grads, strict=True):
            assert_array_equal(param.grad, grad)


def test_initial_values_depend_on_the_generator_alone():
    for name, array in network(5).state().items():
        assert_array_equal(array, network(5).state()[name])
        single = network(5, np.float32).state()[name]
        assert single.dtype == np.float32
        assert_array_equal(single, array.astype(np.float32))
    assert (network(6).state()["0.weight"] != network(5).state()["0.weight"]).all()


def test_initial_weights_have_the_variance_of_he():
    layer = nn.Conv2d(64, 128, 3, groups=2, rng=np.random.default_rng(0))
    inputs = 32 * 9
    deviation = layer.weight.data.std() * np.sqrt(inputs / 2)
    assert abs(deviation - 1) <= 5 / np.sqrt(2 * layer.weight.data.size)


def test_a_layer_without_a_call_says_so():
    with pytest.raises(NotImplementedError):
        nn.Layer()(1)


def test_a_gradient_has_the_dtype_of_its_parameter(xp):
    layer = nn.Linear(2, 3).to(xp)
    _, backward = layer(xp.ones((4, 2), np.float32))
    assert backward(xp.ones((4, 3))).dtype == np.float32
    assert all(param.grad.dtype == np.float32 for param in layer.params())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: nn.Linear(1, 1).load_state({"weight": [[1.0]], "bias": [0.0]}),
            "Linear.load_state: weight is list, expected an array",
        ),
        (lambda: nn.Linear(2.5, 3), "Linear: in_features is 2.5, expected an int"),
        (lambda: nn.Sequential([nn.ReLU()]), "Sequential: got list, expected layers"),
        (lambda: nn.Linear(2, 3).to("cuda"), "to: target is 'cuda', expected numpy, cupy or"),
    ],
)
def test_what_is_no_layer_and_no_device_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()
