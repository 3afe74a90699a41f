"""Losses and their gradients."""

from typing import NamedTuple

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import nn
from deformable.testing import check_backward, error_bound
from tests.arrays import host


class Gradient(NamedTuple):
    pred: np.ndarray


def check_loss(loss, pred, *rest):
    """Check the gradient that a loss answers beside its value."""

    def value(pred):
        return loss(pred, *rest)[0]

    def backward(grad_y, pred):
        return Gradient(grad_y * loss(pred, *rest)[1])

    check_backward(value, backward, [pred], rng=np.random.default_rng(0))


def logits_and_labels(xp, shape, dtype=np.float64):
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(0, 3, shape), rng.integers(0, shape[1], (shape[0], *shape[2:]))
    return xp.asarray(logits.astype(dtype)), xp.asarray(labels)


SHAPES = [(5, 3), (2, 4, 3, 5), (2, 3, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ignore_index", [None, 2, 255])
def test_gradient_of_softmax_cross_entropy(shape, ignore_index, xp):
    logits, labels = logits_and_labels(xp, shape)
    check_loss(nn.softmax_cross_entropy, logits, labels, ignore_index)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ignore_index", [None, 0, -1])
def test_softmax_cross_entropy_is_its_formula(shape, ignore_index, xp):
    logits, labels = logits_and_labels(xp, shape)
    if ignore_index == -1:
        labels[0] = -1
    loss, _ = nn.softmax_cross_entropy(logits, labels, ignore_index)
    terms = [
        np.log(np.exp(row).sum()) - row[label]
        for row, label in zip(
            np.moveaxis(host(xp, logits), 1, -1).reshape(-1, shape[1]),
            host(xp, labels).ravel(),
            strict=True,
        )
        if label != ignore_index
    ]
    assert abs(float(loss) - np.mean(terms)) <= error_bound("float64", max(terms), len(terms))


def test_ignored_labels_get_no_gradient(xp):
    logits, labels = logits_and_labels(xp, (5, 3))
    labels[:2] = 255
    _, grad = nn.softmax_cross_entropy(logits, labels, ignore_index=255)
    assert not host(xp, grad)[:2].any()
    assert host(xp, grad)[2:].all()
    labels[...] = 255
    loss, grad = nn.softmax_cross_entropy(logits, labels, ignore_index=255)
    assert float(loss) == 0
    assert not host(xp, grad).any()


@pytest.mark.parametrize("logit", [np.nan, np.inf, -np.inf])
def test_logits_of_ignored_labels_may_be_anything(logit, xp):
    logits, labels = logits_and_labels(xp, (2, 4, 3, 5))
    labels[:, 1] = -1
    expected_loss, expected = nn.softmax_cross_entropy(logits, labels, ignore_index=-1)
    logits[:, :2, 1] = logit
    loss, grad = nn.softmax_cross_entropy(logits, labels, ignore_index=-1)
    assert float(loss) == float(expected_loss)
    assert_array_equal(host(xp, grad), host(xp, expected))


def test_large_logits_do_not_overflow(xp):
    logits = xp.asarray(np.array([[1000.0, 0.0], [0.0, -1000.0]]))
    loss, grad = nn.softmax_cross_entropy(logits, xp.asarray(np.array([0, 1])))
    assert float(loss) == 500.0
    assert host(xp, grad).tolist() == [[0, 0], [0.5, -0.5]]


@pytest.mark.parametrize("bad", [-1, 3])
def test_a_label_that_is_no_class_is_an_error_or_nan(bad, xp):
    logits, labels = logits_and_labels(xp, (5, 3))
    labels[2] = bad
    if xp is np:
        with pytest.raises(ValueError, match=rf"labels has {bad} at \(2,\), expected .* than 3"):
            nn.softmax_cross_entropy(logits, labels)
        return
    loss, grad = nn.softmax_cross_entropy(logits, labels)
    assert np.isnan(float(loss))
    assert_array_equal(np.isnan(host(xp, grad)).all(axis=1), np.arange(5) == 2)
    assert_array_equal(np.isnan(host(xp, grad)).any(axis=1), np.arange(5) == 2)


def test_losses_never_wait_for_the_device(xp, no_synchronisation):
    logits, labels = logits_and_labels(xp, (2, 4, 3, 5))
    with no_synchronisation():
        nn.softmax_cross_entropy(logits, labels, ignore_index=1)
        nn.mse(logits, logits)
        nn.smooth_l1(logits, logits)


def pred_and_target(xp, shape=(4, 5), dtype=np.float64):
    rng = np.random.default_rng(2)
    return [xp.asarray(rng.normal(0, 2, shape).astype(dtype)) for _ in range(2)]


@pytest.mark.parametrize("arguments", [(), (0.5,), (3,)])
def test_gradient_of_smooth_l1(arguments, xp):
    pred, target = pred_and_target(xp)
    check_loss(nn.smooth_l1, pred, target, *arguments)


def test_gradient_of_mse(xp):
    check_loss(nn.mse, *pred_and_target(xp))


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_smooth_l1_is_its_formula(beta, xp):
    pred, target = pred_and_target(xp)
    d = abs(host(xp, pred) - host(xp, target))
    expected = np.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean()
    loss, _ = nn.smooth_l1(pred, target, beta)
    assert abs(float(loss) - expected) <= error_bound("float64", expected, terms=20)


def test_mse_is_its_formula(xp):
    pred, target = pred_and_target(xp)
    expected = ((host(xp, pred) - host(xp, target)) ** 2).mean()
    assert abs(float(nn.mse(pred, target)[0]) - expected) <= error_bound("float64", expected, 20)


LOSSES = {
    "softmax_cross_entropy": lambda pred, xp: nn.softmax_cross_entropy(
        pred, xp.zeros(len(pred), dtype=np.int64)
    ),
    "mse": lambda pred, xp: nn.mse(pred, xp.ones_like(pred)),
    "smooth_l1": lambda pred, xp: nn.smooth_l1(pred, xp.ones_like(pred)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_is_summed_in_float32(name, xp):
    pred, _ = pred_and_target(xp, (3000, 4), np.float16)
    loss, grad = LOSSES[name](pred, xp)
    expected, _ = LOSSES[name](pred.astype(np.float64), xp)
    assert loss.dtype == np.float32
    assert grad.dtype == np.float16
    assert abs(float(loss) - float(expected)) <= error_bound("float32", float(expected), 12000)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_costs_nothing(name, xp):
    loss, grad = LOSSES[name](xp.zeros((0, 4)), xp)
    assert float(loss) == 0
    assert grad.shape == (0, 4)


def test_mistakes_are_refused(xp):
    logits, labels = logits_and_labels(xp, (5, 3))
    with pytest.raises(
        ValueError, match=r"cross_entropy: labels has shape \(4,\), expected \(5,\)"
    ):
        nn.softmax_cross_entropy(logits, labels[:4])
    with pytest.raises(
        ValueError, match=r"cross_entropy: logits has shape \(5,\), expected \(N, C, \.\.\.\)"
    ):
        nn.softmax_cross_entropy(logits[:, 0], labels)
    with pytest.raises(TypeError, match="cross_entropy: labels have dtype float64, expected int"):
        nn.softmax_cross_entropy(logits, logits[:, 0])
    with pytest.raises(TypeError, match="cross_entropy: logits has dtype int64"):
        nn.softmax_cross_entropy(labels[:, None], labels)
    with pytest.raises(ValueError, match=r"mse: target has shape \(4, 3\), expected \(5, 3\)"):
        nn.mse(logits, logits[:4])
    with pytest.raises(TypeError, match="smooth_l1: target has dtype float32, expected float64"):
        nn.smooth_l1(logits, logits.astype(np.float32))
    with pytest.raises(ValueError, match=r"smooth_l1: beta is 0.0, expected above 0"):
        nn.smooth_l1(logits, logits, beta=0)
    with pytest.raises(ValueError, match="smooth_l1: beta is inf, expected a finite number"):
        nn.smooth_l1(logits, logits, beta=np.inf)
