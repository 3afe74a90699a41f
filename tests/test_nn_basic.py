"""The small layers between the convolutions."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import nn
from deformable.testing import EPSILON, check_layer, error_bound
from tests.arrays import host


def images(xp, n=3, dtype=np.float64, seed=1):
    return xp.asarray(np.random.default_rng(seed).normal(2, 3, (n, 4, 5, 6)).astype(dtype))


def vectors(xp, n=3, dtype=np.float64):
    return xp.asarray(np.random.default_rng(1).normal(size=(n, 4)).astype(dtype))


def batch_norm(frozen=False, dtype=np.float64):
    """A layer whose parameters and running averages are not those of the start."""
    rng = np.random.default_rng(2)
    layer = nn.BatchNorm2d(4, frozen=frozen, dtype=dtype)
    for buffer in layer.buffers().values():
        buffer.data = rng.uniform(0.5, 2, 4).astype(buffer.data.dtype)
    return layer


def linear(dtype=np.float64, bias=True):
    return nn.Linear(4, 3, bias=bias, dtype=dtype, rng=np.random.default_rng(0))


LAYERS = {
    "linear": (linear, vectors),
    "linear without bias": (lambda dtype=np.float64: linear(dtype, bias=False), vectors),
    "flatten": (lambda dtype=None: nn.Flatten(), images),
    "relu": (lambda dtype=None: nn.ReLU(), images),
    "dropout": (lambda dtype=None: nn.Dropout(0.3, rng=np.random.default_rng(0)), images),
    "batch norm": (lambda dtype=np.float64: batch_norm(dtype=dtype), images),
    "frozen batch norm": (lambda dtype=np.float64: batch_norm(True, dtype), images),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name, xp):
    make, inputs = LAYERS[name]
    check_layer(make().to(xp), [inputs(xp)], rng=np.random.default_rng(3))


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_goes_through(name, xp):
    make, inputs = LAYERS[name]
    layer, x = make().to(xp), inputs(xp, n=0)
    before = layer.state()
    y, backward = layer(x)
    assert y.shape[0] == layer.predict(x).shape[0] == 0
    assert backward(y).shape == x.shape
    assert not any(host(xp, param.grad).any() for param in layer.params())
    for buffer, array in before.items():
        assert_array_equal(host(xp, layer.state()[buffer]), host(xp, array))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", LAYERS)
def test_low_precision_goes_in_and_comes_out(name, dtype, xp):
    pytest.importorskip("ml_dtypes")
    make, inputs = LAYERS[name]
    layer, exact = make(dtype=dtype).to(xp), make().to(xp)
    exact.load_state({key: a.astype(np.float64) for key, a in layer.state().items()})
    x = inputs(xp, n=300, dtype=dtype)  # so many that sums in half precision would show
    y, backward = layer(x)
    expected, exact_backward = exact(x.astype(np.float64))
    grad_y = xp.asarray(np.random.default_rng(4).normal(size=y.shape).astype(dtype))
    grad_x, expected_grad = backward(grad_y), exact_backward(grad_y.astype(np.float64))
    assert y.dtype == grad_x.dtype == layer.predict(x).dtype == dtype
    assert {str(param.grad.dtype) for param in layer.params()} <= {dtype}
    pairs = [(y, expected), (grad_x, expected_grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(layer.params(), exact.params(), strict=True)]
    for have, want in pairs:
        have, want = host(xp, have).astype(np.float64), host(xp, want)
        error = np.linalg.norm(have - want) / np.linalg.norm(want)
        assert error <= error_bound(dtype, 3.0, terms=9000)  # three roundings to the dtype


@pytest.mark.parametrize("name", ["relu", "dropout", "batch norm", "frozen batch norm"])
def test_memory_stays_channels_last(name, xp):
    x = xp.ascontiguousarray(images(xp).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    y, backward = LAYERS[name][0]().to(xp)(x)
    for array in y, backward(y):
        assert array.transpose(0, 2, 3, 1).flags.c_contiguous


def test_linear_is_a_product_and_a_sum(xp):
    layer, x = linear().to(xp), vectors(xp)
    layer.bias.data = xp.asarray(np.array([1.0, 2.0, 3.0]))
    expected = host(xp, x) @ host(xp, layer.weight.data).T + [1.0, 2.0, 3.0]
    error = abs(host(xp, layer.predict(x)) - expected).max()
    assert error <= error_bound("float64", abs(expected).max(), terms=5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_product_of_one_number_is_rounded_once(dtype, xp):
    pytest.importorskip("ml_dtypes")
    a = 1 + 3 * EPSILON[dtype]
    layer = nn.Linear(2, 1, bias=False, dtype=dtype)
    layer.load_state({"weight": np.array([[a, -1]], dtype)})
    y = layer.to(xp).predict(xp.asarray(np.array([[a, 1]], dtype)))
    assert host(xp, y) == np.array(a * a - 1, dtype)


def test_flatten_orders_channels_rows_columns(xp):
    x = images(xp).transpose(0, 2, 3, 1)
    assert_array_equal(host(xp, nn.Flatten().predict(x)), host(xp, x).reshape(3, 120))


def test_relu_cuts_and_lets_nan_through(xp):
    x = xp.asarray(np.array([-1.0, 0.0, 2.0, np.nan, -np.inf, np.inf]))
    y, backward = nn.ReLU()(x)
    assert_array_equal(host(xp, y), [0, 0, 2, np.nan, 0, np.inf])
    assert host(xp, backward(xp.ones_like(x))).tolist() == [0, 0, 1, 0, 0, 1]


def test_dropout_keeps_the_mean_and_draws_what_its_generator_says(xp):
    x, p = xp.ones((100, 100)), 0.3
    y, _ = nn.Dropout(p, rng=np.random.default_rng(5))(x)
    kept = np.random.default_rng(5).random((100, 100), dtype=np.float32) >= p
    assert_array_equal(host(xp, y), np.where(kept, 1 / (1 - p), 0))
    assert abs(kept.mean() - (1 - p)) <= 5 * np.sqrt(p * (1 - p) / kept.size)


def test_dropout_draws_anew_with_every_call(xp):
    layer, x = nn.Dropout(0.5, rng=np.random.default_rng(5)), xp.ones((10, 10))
    assert (host(xp, layer(x)[0]) != host(xp, layer(x)[0])).any()
    assert_array_equal(host(xp, layer.predict(x)), np.ones((10, 10)))


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_dropout_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match="Dropout: p is"):
        nn.Dropout(p)


def test_batch_norm_normalises_every_channel(xp):
    x = images(xp, n=50)
    layer = nn.BatchNorm2d(4, eps=0.0, dtype=np.float64).to(xp)
    y = host(xp, layer(x)[0])
    bound = error_bound("float64", 10.0, terms=50 * 30)
    assert (abs(y.mean(axis=(0, 2, 3))) <= bound).all()
    assert (abs(y.std(axis=(0, 2, 3)) - 1) <= bound).all()


def test_batch_norm_follows_mean_and_unbiased_variance(xp):
    layer = nn.BatchNorm2d(4, momentum=0.25, dtype=np.float64).to(xp)
    mean, var = np.zeros(4), np.ones(4)
    for seed in range(3):
        x = images(xp, seed=seed)
        layer(x)
        mean += 0.25 * (host(xp, x).mean(axis=(0, 2, 3)) - mean)
        var += 0.25 * (host(xp, x).var(axis=(0, 2, 3), ddof=1) - var)
    bound = error_bound("float64", 10.0, terms=90)
    assert (abs(host(xp, layer.running_mean.data) - mean) <= bound).all()
    assert (abs(host(xp, layer.running_var.data) - var) <= bound).all()


@pytest.mark.parametrize("call", [lambda layer, x: layer.predict(x), lambda layer, x: layer(x)[0]])
def test_batch_norm_uses_its_averages_in_prediction_and_when_frozen(call, xp):
    layer, x = batch_norm(frozen=True).to(xp), images(xp)
    state = {name: host(xp, a).reshape(4, 1, 1).copy() for name, a in layer.state().items()}
    scale = state["weight"] / np.sqrt(state["running_var"] + layer.eps)
    expected = (host(xp, x) - state["running_mean"]) * scale + state["bias"]
    error = abs(host(xp, call(layer, x)) - expected).max()
    assert error <= error_bound("float64", abs(expected).max(), terms=3)
    for name, array in layer.state().items():
        assert_array_equal(host(xp, array), state[name].ravel())


def test_batch_norm_of_one_value_follows_nothing(xp):
    layer = batch_norm().to(xp)
    before = host(xp, layer.running_var.data).copy()
    y, _ = layer(xp.ones((1, 4, 1, 1)))
    assert_array_equal(host(xp, y).ravel(), host(xp, layer.bias.data))
    assert_array_equal(host(xp, layer.running_var.data), before)


def test_batch_norm_keeps_its_averages_in_float32_at_least():
    state = nn.BatchNorm2d(4, dtype=np.float16).state()
    assert {name: str(a.dtype) for name, a in state.items()} == {
        "weight": "float16",
        "bias": "float16",
        "running_mean": "float32",
        "running_var": "float32",
    }


def test_batch_norm_may_get_its_momentum_from_numpy():
    layer = nn.BatchNorm2d(4, eps=np.float64(1e-5), momentum=np.float64(0.1))
    assert layer(np.ones((3, 4, 2, 2), np.float32))[0].dtype == np.float32
    assert layer.running_mean.data.dtype == layer.running_var.data.dtype == np.float32


def test_biases_and_scales_have_no_weight_decay():
    assert [param.decay for param in linear().params()] == [True, False]
    assert [param.decay for param in batch_norm().params()] == [False, False]


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (linear(), (3, 5), r"Linear: x has shape \(3, 5\), expected \(N, 4\)"),
        (
            batch_norm(),
            (3, 5, 2, 2),
            r"BatchNorm2d: x has shape \(3, 5, 2, 2\), expected \(N, 4, H, W\)",
        ),
        (
            nn.GlobalAvgPool2d(),
            (3, 5, 2),
            r"GlobalAvgPool2d: x has shape \(3, 5, 2\), expected \(N, C, H, W\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(layer, shape, message):
    for call in layer, layer.predict:
        with pytest.raises(ValueError, match=message):
            call(np.ones(shape))


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (linear(), np.ones((3, 4), "f4"), "Linear: x has dtype float32, expected float64 as"),
        (linear(), [1.0], "Linear: x is list, expected a numpy or cupy array"),
        (batch_norm(), np.ones((3, 4, 2, 2), int), "BatchNorm2d: x has dtype int64, expected one"),
        (
            batch_norm(),
            np.ones((3, 4, 2, 2), "f4"),
            "BatchNorm2d: x has dtype float32, expected float64",
        ),
    ],
)
def test_dtypes_that_do_not_fit_are_refused(layer, x, message):
    for call in layer, layer.predict:
        with pytest.raises(TypeError, match=message):
            call(x)
