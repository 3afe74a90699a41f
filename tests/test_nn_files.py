"""Networks in files: complete or absent, and never a surprise on reading."""

import os

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import nn
from tests.arrays import host


def network(seed=0, dtype=np.float32, width=4):
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, dtype=dtype, rng=rng),
        nn.BatchNorm2d(width, dtype=dtype),
        nn.GlobalAvgPool2d(),
        nn.Linear(width, 2, dtype=dtype, rng=rng),
    )


def train(net, optimizer, xp, steps=2):
    x = xp.asarray(np.random.default_rng(1).normal(size=(3, 1, 5, 5)).astype(np.float32))
    for _ in range(steps):
        y, backward = net(x)
        backward(y)
        optimizer.step()
        optimizer.zero_grad()


def assert_equal_states(xp, have, want):
    assert have.keys() == want.keys()
    for name, array in have.items():
        assert array.dtype == want[name].dtype
        is_host = isinstance(array, np.ndarray)
        assert_array_equal(array if is_host else host(xp, array), host(xp, want[name]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_saved_comes_back_in_the_same_bits(dtype, xp, tmp_path):
    pytest.importorskip("ml_dtypes")
    net, other = network(0, dtype).to(xp), network(1, dtype).to(xp)
    nn.save(tmp_path / "net.npz", net)
    nn.load(tmp_path / "net.npz", other)
    assert all(isinstance(array, xp.ndarray) for array in other.state().values())
    assert_equal_states(xp, other.state(), net.state())


def test_a_file_of_a_gpu_is_read_on_the_cpu(xp, tmp_path):
    net, other = network(0).to(xp), network(1)
    nn.save(tmp_path / "net.npz", net)
    nn.load(tmp_path / "net.npz", other)
    assert_equal_states(xp, other.state(), net.to(np).state())


def test_training_goes_on_in_the_same_bits(xp, tmp_path):
    path, whole, parts, resumed = tmp_path / "net.npz", *(network().to(xp) for _ in range(3))
    train(whole, nn.Adam(whole.params()), xp, steps=5)
    optimizer = nn.Adam(parts.params())
    train(parts, optimizer, xp, steps=2)
    nn.save(path, parts, optimizer)
    optimizer = nn.Adam(resumed.params())
    nn.load(path, resumed, optimizer)
    assert optimizer.steps == 2
    train(resumed, optimizer, xp, steps=3)
    assert_equal_states(xp, resumed.state(), whole.state())


def test_a_network_is_read_without_its_optimizer(tmp_path):
    net, other = network(0), network(1)
    nn.save(tmp_path / "net.npz", net, nn.Adam(net.params()))
    nn.load(tmp_path / "net.npz", other)
    assert_equal_states(np, other.state(), net.state())


def killed(*args, **arrays):
    if hasattr(args[0], "write"):
        args[0].write(b"half of it")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("module", "name"), [(np, "savez"), (os, "fsync"), (os, "replace")])
def test_writing_replaces_the_file_only_when_complete(module, name, tmp_path, monkeypatch):
    path, net = tmp_path / "net.npz", network(0)
    nn.save(path, net)
    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        nn.save(path, network(1))
    other = network(2)
    nn.load(path, other)
    assert_equal_states(np, other.state(), net.state())
    assert [file.name for file in tmp_path.iterdir()] == ["net.npz"]


def test_a_file_is_as_readable_as_any_other(tmp_path):
    nn.save(tmp_path / "net.npz", network())
    (tmp_path / "other").touch()
    assert (tmp_path / "net.npz").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (network(width=5), r"load: 0.weight has shape \(4, 1, 3, 3\), expected \(5, 1, 3, 3\)"),
        (network(dtype=np.float64), "load: 0.weight has dtype float32, expected float64"),
        (nn.Linear(4, 2), r"load: missing names \['bias', 'weight'\], unknown names \['0.bias', "),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(other, message, tmp_path):
    nn.save(tmp_path / "net.npz", network(1))
    before = other.state()
    with pytest.raises(ValueError, match=message):
        nn.load(tmp_path / "net.npz", other)
    assert all(other.state()[name] is array for name, array in before.items())


def test_half_precisions_are_not_confused(tmp_path):
    pytest.importorskip("ml_dtypes")
    nn.save(tmp_path / "net.npz", network(dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"load: 0\.weight has dtype \|V2, expected float16"):
        nn.load(tmp_path / "net.npz", network(dtype="float16"))
    nn.save(tmp_path / "net.npz", network(dtype="float16"))
    with pytest.raises(ValueError, match=r"load: 0\.weight has dtype float16, expected bfloat16"):
        nn.load(tmp_path / "net.npz", network(dtype="bfloat16"))


def test_an_optimizer_that_is_missing_or_does_not_fit_changes_nothing(tmp_path):
    net, other = network(0), network(1)
    before = other.state()
    nn.save(tmp_path / "net.npz", net)
    with pytest.raises(ValueError, match=r"load: missing names \['optimizer/0.mean'"):
        nn.load(tmp_path / "net.npz", other, nn.Adam(other.params()))
    nn.save(tmp_path / "net.npz", net, nn.SGD(net.params(), 0.1))
    with pytest.raises(ValueError, match=r"unknown names \['optimizer/0.momentum'"):
        nn.load(tmp_path / "net.npz", other, nn.Adam(other.params()))
    assert all(other.state()[name] is array for name, array in before.items())


def test_pickled_objects_are_refused(tmp_path):
    state = network().state() | {"0.bias": np.array([{"code": "anything"}] * 4, object)}
    np.savez(tmp_path / "net.npz", **state)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        nn.load(tmp_path / "net.npz", network())
