"""The checks of gradients find what is wrong, and say what."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from deformable import conv2d, nn
from deformable.testing import check_backward, check_layer, error_bound


class Gradients(NamedTuple):
    a: np.ndarray | None
    b: np.ndarray | None


def product(a, b=None, power=1):
    return a**power if b is None else a**power * b


def product_backward(grad_y, a, b=None, power=1, wrt=("a", "b")):
    slope = power * a ** (power - 1)
    return Gradients(
        a=(grad_y * slope if b is None else grad_y * slope * b) if "a" in wrt else None,
        b=grad_y * a**power if b is not None and "b" in wrt else None,
    )


def wrong(field, change):
    """``product_backward`` with one gradient changed."""

    def backward(*args, **kwargs):
        gradients = product_backward(*args, **kwargs)
        return gradients._replace(**{field: change(getattr(gradients, field))})

    return backward


def operands(xp, shape=(3, 4)):
    rng = np.random.default_rng(0)
    return [xp.asarray(rng.uniform(1, 2, shape)) for _ in range(2)]


def check(backward, args, **options):
    check_backward(product, backward, args, {"power": 3}, rng=np.random.default_rng(1), **options)


def test_right_gradients_pass(xp):
    check(product_backward, operands(xp))


def test_low_precision_arguments_are_checked_in_float64(xp):
    check(product_backward, [a.astype(np.float16) for a in operands(xp)])


def test_empty_arguments_pass(xp):
    check(product_backward, operands(xp, (0, 4)))


@pytest.mark.parametrize("field", ["a", "b"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda g: g * 1.001, id="a little too large"),
        pytest.param(lambda g: g * 0, id="zero"),
        pytest.param(lambda g: g * np.nan, id="NaN"),
        pytest.param(lambda g: -g, id="of the other sign"),
    ],
)
def test_a_wrong_gradient_is_named_with_both_numbers_and_the_step(field, change):
    message = rf"product: gradient of {field} along .* is \S+, expected \S+ by .* step 9.5367431"
    with pytest.raises(AssertionError, match=message):
        check(wrong(field, change), operands(np))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[:2], r"gradient of a has shape \(2, 4\), expected \(3, 4\)"),
        (lambda g: g.astype(np.float32), "gradient of a has dtype float32, expected float64"),
        (lambda g: None, "gradient of a is None, expected an array"),
    ],
)
def test_a_gradient_of_another_form_is_refused(change, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong("a", change), operands(np))


def test_a_wrong_gradient_is_found_without_assertions():
    script = """
import numpy as np
from typing import NamedTuple
from deformable.testing import check_backward
class Gradients(NamedTuple):
    a: np.ndarray
check_backward(lambda a: a * a, lambda grad_y, a: Gradients(a * grad_y), [np.ones(3)])
"""
    root = str(Path(__file__).parents[1])
    process = subprocess.run(
        [sys.executable, "-O", "-c", script],
        env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True,
    )  # fmt: skip
    assert "AssertionError: <lambda>: gradient of a" in process.stderr


def test_one_entry_of_many_being_wrong_is_found():
    def spoil(gradient):
        gradient = gradient.copy()
        gradient[2, 1] *= 1.01
        return gradient

    with pytest.raises(AssertionError, match="gradient of b"):
        check(wrong("b", spoil), operands(np))


def test_an_argument_that_is_none_is_not_checked():
    check(product_backward, [operands(np)[0], None])
    check(product_backward, operands(np)[:1])
    with pytest.raises(AssertionError, match="gradient of b is an array, expected None"):
        check(wrong("b", lambda g: np.ones(1)), [operands(np)[0], None])


def test_wrt_checks_only_what_it_names():
    check(wrong("a", lambda g: g), operands(np), wrt=["a"])
    check(wrong("b", lambda g: None), operands(np), wrt=["a"])
    with pytest.raises(AssertionError, match="gradient of b is an array, expected None"):
        check(wrong("b", lambda g: np.ones((3, 4))), operands(np), wrt=["a"])


class Slope(NamedTuple):
    a: np.ndarray


def test_one_sided_differences_look_to_the_right():
    at_the_kink = [np.zeros(5)]

    def right(grad_y, a):
        return Slope(grad_y * np.where(a >= 0, 1.0, -1.0))

    def left(grad_y, a):
        return Slope(grad_y * np.where(a > 0, 1.0, -1.0))

    check_backward(lambda a: abs(a), right, at_the_kink, one_sided=True)
    with pytest.raises(AssertionError, match="gradient of a"):
        check_backward(lambda a: abs(a), left, at_the_kink, one_sided=True)
    with pytest.raises(AssertionError, match="gradient of a"):
        check_backward(lambda a: abs(a), right, at_the_kink)


class Broken(nn.Linear):
    """A Linear layer whose gradients may be scaled."""

    def __init__(self, weight=1.0, x=1.0):
        super().__init__(4, 2, dtype=np.float64, rng=np.random.default_rng(0))
        self.scale = {"weight": weight, "x": x}

    def __call__(self, x):
        y, linear_backward = super().__call__(x)

        def backward(grad_y):
            grad_x = linear_backward(grad_y)
            self.weight.grad = self.weight.grad * self.scale["weight"]
            return grad_x * self.scale["x"]

        return y, backward


def test_a_right_layer_passes_and_is_left_alone():
    layer, x = Broken(), np.ones((3, 4))
    before = layer.state()
    check_layer(layer, [x])
    assert all(layer.state()[name] is array for name, array in before.items())
    assert [param.grad for param in layer.params()] == [None, None]


@pytest.mark.parametrize(
    ("scale", "name"), [({"weight": 1.001}, "weight"), ({"x": 1.001}, "input 0")]
)
def test_a_wrong_layer_is_named_with_the_gradient(scale, name):
    with pytest.raises(AssertionError, match=f"Broken: gradient of {name} along"):
        check_layer(Broken(**scale), [np.ones((3, 4))], rng=np.random.default_rng(2))


def test_a_parameter_that_gets_no_gradient_is_found():
    layer = Broken()
    layer.unused = nn.Param(np.ones(3))
    with pytest.raises(AssertionError, match="Broken: gradient of unused is None"):
        check_layer(layer, [np.ones((3, 4))])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_convolution_stays_within_the_error_bound(dtype):
    import ml_dtypes  # noqa: F401  (names bfloat16)

    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 16, 9, 9)), rng.normal(size=(8, 16, 3, 3))
    x, weight = x.astype(dtype), weight.astype(dtype)
    exact = conv2d(x.astype(np.float64), weight.astype(np.float64), padding=1)
    size = conv2d(abs(x).astype(np.float64), abs(weight).astype(np.float64), padding=1)
    error = abs(conv2d(x, weight, padding=1).astype(np.float64) - exact)
    assert (error <= error_bound(dtype, size, terms=16 * 9)).all()


def test_the_error_bound_is_the_documented_one():
    assert error_bound("float32", 3.0, terms=4) == 4 * 2.0**-23 * 3 * 3.0
    assert error_bound(np.float64) == error_bound(np.float64, terms=0) == 4 * 2.0**-52
    assert error_bound("float16", 2.0, terms=2) == (8 * 2.0**-23 + 2.0**-10) * 2
    with pytest.raises(TypeError, match="error_bound: dtype is int32, expected one of float16"):
        error_bound(np.int32)
