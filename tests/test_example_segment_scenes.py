"""examples/segment_scenes.py keeps its promises, and goes on where it was stopped."""

import argparse

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import nn
from deformable.testing import check_layer
from tests.arrays import host
from tests.examples import check_resumed, example


@pytest.fixture
def script():
    return example("segment_scenes")


@pytest.fixture
def small(script, monkeypatch):
    """Two small networks, few test scenes, a checkpoint after every second step."""
    specs = {
        "dilated, wider": ((3, 4, 4, 4, 4), (2, 3, 4)),
        "deformable": ((2, 3, 3, 3, 3), (2, 2, 2), "modulated"),
    }
    monkeypatch.setattr(script, "NETWORKS", specs)
    for name, value in {"TEST_PARTS": 1, "PART": 4, "CHECKPOINT": 2}.items():
        monkeypatch.setattr(script, name, value)
    return script


RUN = ["--canvas", "12", "--digits", "2", "--batch", "2", "--steps", "5", "--out"]


def test_it_does_what_it_claims(script, tmp_path, capsys):
    script.main(["--quick", "--out", str(tmp_path)])
    assert "deformable" in capsys.readouterr().out
    assert (tmp_path / "scenes-40.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("killed_at", [0, 3, 4, 6])
def test_a_resumed_run_ends_as_if_never_stopped(killed_at, small, tmp_path, capsys, monkeypatch):
    check_resumed(small, RUN, killed_at, tmp_path, capsys, monkeypatch)


def test_it_runs_on_a_gpu(small, tmp_path, device, capsys):
    small.main([*RUN, str(tmp_path), "--device", device, "--steps", "1"])
    assert "deformable" in capsys.readouterr().out


def test_the_wider_network_has_the_parameters_of_the_largest_deformable_one(script):
    sizes = {
        name: sum(p.data.size for p in script.network(np.random.default_rng(0), 11, *spec).params())
        for name, spec in script.NETWORKS.items()
    }
    assert sizes["dilated"] < sizes["deformable"] < sizes["modulated"]
    assert sizes["modulated"] <= sizes["dilated, wider"] <= 1.02 * sizes["modulated"]


def test_networks_answer_every_pixel(script):
    for spec in script.NETWORKS.values():
        net = script.network(np.random.default_rng(0), 4, *spec)
        assert net.predict(np.ones((1, 1, 10, 12), np.float32)).shape == (1, 4, 10, 12)


def test_offsets_learn_more_slowly(script):
    net = script.network(np.random.default_rng(0), 4, *script.NETWORKS["deformable"])
    by_rate = {param.lr_mult for param in net.params()}
    (deformable, *_) = [layer for layer in net.layers if isinstance(layer, nn.DeformConv2d)]
    assert by_rate == {1.0, 0.3}
    assert {param.lr_mult for param in deformable.offset_conv.params()} == {0.3}


def test_enlarging_moves_channels_into_squares(script):
    x = np.arange(8.0).reshape(1, 8, 1, 1)
    y, _ = script.Enlarge()(x)
    assert_array_equal(y, [[[[0, 1], [2, 3]], [[4, 5], [6, 7]]]])
    check_layer(script.Enlarge(), [np.random.default_rng(0).normal(size=(2, 8, 3, 2))])


def test_pixels_of_strokes_have_the_class_of_the_digit_in_front(script, xp):
    digits = np.ones((2, 8, 8)), np.array([3, 5])
    x, classes = (host(xp, a) for a in script.scenes(np.random.default_rng(0), digits, 20, 32, xp))
    assert (x.shape, classes.shape) == ((20, 1, 32, 32), (20, 32, 32))
    assert set(np.unique(classes)) == {0, 4, 6}
    bright = x[:, 0] > script.STROKE
    assert_array_equal(classes > 0, bright)
    sides = np.sqrt([(c == one).sum() for c in classes for one in (4, 6) if (c == one).any()])
    assert sides.max() <= 32 * script.SIDES[1] + 1


def test_mean_iou_is_that_of_the_definition(script, monkeypatch):
    monkeypatch.setattr(script, "TEST_PARTS", 3)
    classes = np.array([[[0, 0, 1], [2, 2, 2]]])
    answers = np.array([[[0, 1, 1], [2, 2, 0]]])
    monkeypatch.setattr(script, "scenes", lambda *_: (None, classes))
    net = argparse.Namespace(predict=lambda _: np.eye(5)[answers].transpose(0, 3, 1, 2))
    args = argparse.Namespace(digits=4, canvas=3)  # of which two do not appear
    # of 0: 1 of 3, of 1: 1 of 2, of 2: 2 of 3
    expected = 100 * (1 / 3 + 1 / 2 + 2 / 3) / 3
    assert abs(script.mean_iou(net, None, args, 0, np) - expected) <= 1e-12
