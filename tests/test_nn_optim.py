"""Optimizers against their formulas, clipping, and schedules."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import nn
from deformable.testing import error_bound
from tests.arrays import host

STEPS = 5
BOUND = error_bound("float64", 10.0, terms=STEPS)


def sgd(data, grads, lr, momentum=0.0, decay=0.0, nesterov=False):
    """Stochastic gradient descent, one number at a time."""
    velocity = 0.0
    for grad in grads:
        grad = grad + decay * data
        velocity = momentum * velocity + grad
        data -= lr * (grad + momentum * velocity if nesterov else velocity)
    return data


def adam(data, grads, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.0, decoupled=False):
    """Adam as in the paper's Algorithm 1; AdamW as in its paper's Algorithm 2."""
    mean = square = 0.0
    for t, grad in enumerate(grads, start=1):
        start = data
        if not decoupled:
            grad = grad + decay * data
        mean = betas[0] * mean + (1 - betas[0]) * grad
        square = betas[1] * square + (1 - betas[1]) * grad**2
        hat_mean, hat_square = mean / (1 - betas[0] ** t), square / (1 - betas[1] ** t)
        data = start - lr * hat_mean / (hat_square**0.5 + eps)
        if decoupled:
            data -= lr * decay * start
    return data


OPTIMIZERS = {
    "SGD": (nn.SGD, {}, sgd, {}),
    "momentum": (nn.SGD, {"momentum": 0.9}, sgd, {"momentum": 0.9}),
    "nesterov": (
        nn.SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        sgd,
        {"momentum": 0.9, "nesterov": True, "decay": 0.1},
    ),
    "Adam": (nn.Adam, {}, adam, {}),
    "Adam with decay": (
        nn.Adam,
        {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1},
        adam,
        {"betas": (0.8, 0.9), "eps": 1e-3, "decay": 0.1},
    ),
    "AdamW": (nn.AdamW, {"weight_decay": 0.1}, adam, {"decay": 0.1, "decoupled": True}),
}


def params_and_grads(xp, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (4,)]
    params = [nn.Param(xp.asarray(rng.normal(size=shape).astype(dtype))) for shape in shapes]
    grads = [[xp.asarray(rng.normal(size=s).astype(dtype)) for s in shapes] for _ in range(STEPS)]
    return params, grads


def run(optimizer, grads):
    for step in grads:
        for param, grad in zip(optimizer.params, step, strict=True):
            param.add_grad(grad)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_its_formula(name, xp):
    kind, options, formula, its_options = OPTIMIZERS[name]
    params, grads = params_and_grads(xp)
    starts = [host(xp, param.data) for param in params]
    run(kind(params, lr=0.1, **options), grads)
    for i, (param, start) in enumerate(zip(params, starts, strict=True)):
        for index, value in np.ndenumerate(start):
            expected = formula(value, [host(xp, g[i])[index] for g in grads], 0.1, **its_options)
            assert abs(host(xp, param.data)[index] - expected) <= BOUND


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_multipliers_scale_the_rate_and_decay_can_be_off(name):
    kind, options, formula, its_options = OPTIMIZERS[name]
    grads = [np.array([1.0]), np.array([-0.5])]
    for lr_mult, decay in [(0.1, True), (1.0, False), (0.0, True)]:
        param = nn.Param(np.array([2.0]), lr_mult, decay)
        run(kind([param], lr=0.1, **options), [[grad] for grad in grads])
        kept = (
            its_options
            if decay
            else its_options | ({"decay": 0.0} if "decay" in its_options else {})
        )
        expected = formula(2.0, [float(grad[0]) for grad in grads], 0.1 * lr_mult, **kept)
        assert abs(param.data[0] - expected) <= BOUND


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_gradient_stays(name, xp):
    kind, options, *_ = OPTIMIZERS[name]
    params, grads = params_and_grads(xp)
    optimizer, before = kind(params, lr=0.1, **options), params[1].data
    params[0].add_grad(grads[0][0])
    optimizer.step()
    assert params[1].data is before
    assert params[0].grad is not None
    optimizer.zero_grad()
    assert params[0].grad is None


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_from_a_state_ends_in_the_same_bits(name, dtype, xp):
    kind, options, *_ = OPTIMIZERS[name]
    params, grads = params_and_grads(xp, dtype)
    again, _ = params_and_grads(xp, dtype)
    run(kind(params, lr=0.1, **options), grads)
    first = kind(again, lr=0.1, **options)
    run(first, grads[:2])
    state = first.state()
    second = kind(again, lr=0.1, **options)
    second.load_state(state)
    assert second.steps == 2
    run(second, grads[2:])
    for param, expected in zip(again, params, strict=True):
        assert_array_equal(host(xp, param.data), host(xp, expected.data))


def test_a_state_is_a_snapshot(xp):
    params, grads = params_and_grads(xp)
    optimizer = nn.Adam(params)
    run(optimizer, grads[:1])
    state = optimizer.state()
    before = {name: host(xp, a).copy() for name, a in state.items() if name != "steps"}
    run(optimizer, grads[1:])
    assert int(state["steps"]) == 1
    for name, array in before.items():
        assert_array_equal(host(xp, state[name]), array)


def test_a_state_of_another_optimizer_is_refused():
    params, _ = params_and_grads(np)
    with pytest.raises(ValueError, match=r"SGD.load_state: missing names \['0.momentum'"):
        nn.SGD(params, 0.1).load_state(nn.Adam(params).state())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_low_precision_parameters_are_moved_in_float32(name, dtype, xp):
    pytest.importorskip("ml_dtypes")
    kind, options, *_ = OPTIMIZERS[name]
    params, grads = params_and_grads(xp, dtype)
    exact = [nn.Param(param.data.astype(np.float32)) for param in params]
    optimizer, reference = kind(params, lr=0.1, **options), kind(exact, lr=0.1, **options)
    run(optimizer, grads[:1])
    run(reference, [[grad.astype(np.float32) for grad in grads[0]]])
    for param, expected in zip(params, exact, strict=True):
        assert param.data.dtype == dtype
        assert_array_equal(host(xp, param.data), host(xp, expected.data).astype(dtype))
    for name, array in optimizer.state().items():
        assert name == "steps" or array.dtype == np.float32


def test_optimizers_never_wait_for_the_device(xp, no_synchronisation):
    params, grads = params_and_grads(xp)
    optimizer = nn.AdamW(params)
    with no_synchronisation():
        run(optimizer, grads)
        params[0].add_grad(grads[0][0])
        nn.clip_grad_norm(params, 1.0)


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gradients_are_clipped_by_their_common_norm(max_norm, dtype, xp):
    params, grads = params_and_grads(xp, dtype)
    for param, grad in zip(params, grads[0], strict=True):
        param.add_grad(grad)
    flat = np.concatenate([host(xp, g).ravel() for g in grads[0]]).astype(np.float64)
    norm = np.linalg.norm(flat)
    assert abs(float(nn.clip_grad_norm([*params, nn.Param(None)], max_norm)) - norm) <= error_bound(
        dtype, norm, terms=10
    )
    clipped = np.concatenate([host(xp, p.grad).ravel() for p in params])
    assert clipped.dtype == dtype
    expected = flat * min(1, max_norm / norm)
    assert (abs(clipped - expected) <= error_bound(dtype, abs(expected), terms=10)).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_may_come_from_numpy(name, xp):
    kind, options, *_ = OPTIMIZERS[name]
    params, grads = params_and_grads(xp, "float32")
    again, _ = params_and_grads(xp, "float32")
    run(kind(params, lr=0.1, **options), grads)
    numbers = {
        key: value if isinstance(value, bool) else tuple(np.array(value))
        if isinstance(value, tuple) else np.float64(value)
        for key, value in options.items()
    }  # fmt: skip
    optimizer = kind(again, lr=np.float64(0.1), **numbers)
    optimizer.lr = np.float64(0.1)
    run(optimizer, grads)
    for param, expected in zip(again, params, strict=True):
        assert_array_equal(host(xp, param.data), host(xp, expected.data))
    assert all(a.dtype == np.float32 for key, a in optimizer.state().items() if key != "steps")


def test_options_that_are_no_numbers_are_refused():
    with pytest.raises(TypeError, match=r"^SGD: momentum is '0.9', expected a number"):
        nn.SGD([], 0.1, momentum="0.9")
    with pytest.raises(ValueError, match=r"^AdamW: betas is nan, expected a finite number"):
        nn.AdamW([], betas=(0.9, np.nan))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, np.nan])
def test_gradients_are_clipped_to_a_positive_norm(max_norm):
    with pytest.raises(ValueError, match=f"clip_grad_norm: max_norm is {max_norm}, expected above"):
        nn.clip_grad_norm([], max_norm)


def test_an_infinite_norm_changes_no_gradient(xp):
    params, grads = params_and_grads(xp, "float32")
    for param, grad in zip(params, grads[0], strict=True):
        param.add_grad(grad)
    assert float(nn.clip_grad_norm(params, np.inf)) == float(nn.clip_grad_norm(params, 1e6))
    for param, grad in zip(params, grads[0], strict=True):
        assert_array_equal(host(xp, param.grad), host(xp, grad))


def test_clipping_nothing_is_nothing():
    assert float(nn.clip_grad_norm([nn.Param(np.ones(3))], 1.0)) == 0


def test_one_cycle_rises_to_its_peak_and_falls():
    rates = [
        nn.one_cycle(step, 100, peak=2.0, warmup=0.25, start=0.1, end=0.01) for step in range(101)
    ]
    assert rates[0] == pytest.approx(0.2, rel=1e-12)
    assert rates[25] == 2.0
    assert rates[100] == pytest.approx(0.02, rel=1e-12)
    assert (np.diff(rates[:26]) > 0).all()
    assert (np.diff(rates[25:]) < 0).all()
    assert rates[10] == pytest.approx(
        2 * (1 + (0.1 - 1) * (1 + np.cos(np.pi * 0.4)) / 2), rel=1e-12
    )


def test_one_cycle_without_warmup_or_without_fall():
    assert nn.one_cycle(0, 10, peak=2.0, warmup=0.0) == 2.0
    assert nn.one_cycle(10, 10, peak=2.0, warmup=1.0) == 2.0


def test_cosine_falls_along_half_a_period():
    for step in range(11):
        expected = 0.2 + 1.8 * (1 + np.cos(np.pi * step / 10)) / 2
        assert nn.cosine(step, 10, peak=2.0, end=0.1) == pytest.approx(expected, rel=1e-12)


def test_multi_step_falls_at_every_milestone():
    rates = [nn.multi_step(step, (3, 5), peak=2.0, factor=0.5) for step in range(7)]
    assert rates == [2, 2, 2, 1, 1, 0.5, 0.5]
