"""examples/detect_scenes.py keeps its promises, and goes on where it was stopped."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from deformable import nn
from deformable.testing import check_layer, error_bound
from tests.examples import check_resumed, example

SMALL = ["--scenes", "24", "--steps", "6"]


@pytest.fixture
def detect_scenes():
    return example("detect_scenes")


@pytest.fixture
def often_saved(detect_scenes, monkeypatch):
    """detect_scenes with a checkpoint after every second step."""
    monkeypatch.setattr(detect_scenes, "EVERY", 2)
    return detect_scenes


def boxes(rng, n):
    first = rng.uniform(0, 50, (n, 2))
    return np.concatenate([first, first + rng.uniform(5, 30, (n, 2))], axis=1)


def test_it_does_what_it_claims(detect_scenes, tmp_path, capsys):
    detect_scenes.main(["--quick", "--out", str(tmp_path)])
    table = capsys.readouterr().out
    assert "deformable" in table
    assert (tmp_path / "parts-0.1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("killed_at", [0, 1, 2, 5, 8])
def test_a_resumed_run_ends_as_if_never_stopped(
    killed_at, often_saved, tmp_path, capsys, monkeypatch
):
    run = [*SMALL, "--heads", "deformable RoI", "deformable PS-RoI vote", "--out"]
    saved = check_resumed(often_saved, run, killed_at, tmp_path, capsys, monkeypatch)
    assert len(saved) == 2


def test_another_offset_lr_trains_the_deformable_heads_only(often_saved, tmp_path, monkeypatch):
    run = [*SMALL, "--out", str(tmp_path)]
    often_saved.main(run)
    plain = ["RoIAlign", "RoIAlign, wider", "PS-RoI vote"]
    monkeypatch.delattr(nn.Optimizer, "step")
    often_saved.main([*run, "--resume"])
    often_saved.main([*run, "--resume", "--offset-lr", "1", "--heads", *plain])
    with pytest.raises(AttributeError):
        often_saved.main([*run, "--resume", "--offset-lr", "1"])


def test_it_runs_on_a_gpu(often_saved, tmp_path, device, capsys, monkeypatch):
    smaller = {"BATCH": 1, "NEAR": 1, "ANYWHERE": 1, "CANVAS": 40, "SIDES": (7.0, 16.0)}
    for name, value in smaller.items():
        monkeypatch.setattr(often_saved, name, value)
    run = ["--scenes", "20", "--steps", "1", "--out", str(tmp_path), "--heads"]
    often_saved.main([*run, *often_saved.DEFORMABLE, "--device", device])
    assert "deformable PS-RoI vote" in capsys.readouterr().out


def test_the_wider_head_has_as_many_parameters_as_the_deformable_one(detect_scenes):
    sizes = {}
    for name in detect_scenes.HEADS:
        net = detect_scenes.Detector(name, 0, 0.1)
        sizes[name] = sum(param.data.size for param in net.params())
    assert_allclose(sizes["RoIAlign, wider"], sizes["deformable RoI"], rtol=0.003)


@pytest.mark.parametrize("name", ["PS-RoI vote", "deformable PS-RoI vote"])
def test_gradients_of_the_vote(name, detect_scenes, xp):
    head = detect_scenes.make_head(name, np.random.default_rng(0), 1.0)
    for param in head.params():
        param.data = np.random.default_rng(1).normal(0, 0.1, param.data.shape)
    rng = np.random.default_rng(2)
    rois = np.insert(boxes(rng, 3).round(), 0, [0, 1, 0], axis=1)
    features = rng.normal(size=(2, 32, 20, 20))
    check_layer(head.to(xp), [xp.asarray(features), xp.asarray(rois)], rng=rng)


def test_bins_that_may_move_but_do_not_see_the_same_roi(detect_scenes):
    """But for their samples, which begin with the bin: half a step to the upper left."""
    still, moving = (
        detect_scenes.make_head(name, np.random.default_rng(0), 1.0)
        for name in ("PS-RoI vote", "deformable PS-RoI vote")
    )
    for param in *still.params(), *moving.params():
        param.data = param.data.astype(np.float64)
    slope = np.mgrid[:20, :20].reshape(1, 2, 20, 20).astype(np.float64)
    rois = np.array([[0.0, 10, 20, 50, 70]])
    half_step = np.array([50, 40]) * detect_scenes.SCALE / detect_scenes.BINS / 2 / 2
    moved = slope - half_step.reshape(1, 2, 1, 1)
    expected = still.predict(np.tile(moved, (1, 16, 1, 1)), rois)
    error = abs(moving.predict(np.tile(slope, (1, 16, 1, 1)), rois) - expected).max()
    assert error <= error_bound("float64", 20 * 32, terms=32 * 25 * 4)


def test_changes_of_boxes_lead_where_they_should(detect_scenes):
    rng = np.random.default_rng(0)
    rois, targets = boxes(rng, 20), boxes(rng, 20)
    targets[:, 2:] = np.minimum(targets[:, 2:], targets[:, :2] + 20)
    assert_allclose(detect_scenes.decode(rois, detect_scenes.encode(rois, targets)), targets)


def test_overlap_is_intersection_over_union(detect_scenes):
    a = np.array([[0.0, 0, 4, 2]])
    b = np.array([[0.0, 0, 4, 2], [2, 0, 4, 2], [2, 1, 6, 3], [4, 0, 8, 2], [5, 5, 6, 6]])
    assert_allclose(detect_scenes.overlap(a, b), [[1, 1 / 2, 2 / 14, 0, 0]])


def test_of_boxes_that_overlap_the_best_stays(detect_scenes):
    b = np.array([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [2, 0, 12, 10]])
    assert detect_scenes.suppress(b, np.array([0.5, 0.9, 0.1, 0.3])) == [1, 2]


def test_average_precision_is_the_area_below_the_curve(detect_scenes):
    score, right = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])
    assert_allclose(detect_scenes.average_precision(score, right, 4), (1 + 2 / 3) / 4)
    assert detect_scenes.average_precision(score[:0], right[:0], 4) == 0


def test_perfect_answers_measure_100_percent(detect_scenes):
    """A network that knows the proposals answers what there is."""
    scenes = detect_scenes.Scenes(
        np.zeros((2, 1, 80, 80), np.float32),
        [np.array([[5.0, 5, 25, 30], [40, 40, 70, 60]])] * 2,
        [np.array([3, 7])] * 2,
    )
    some = detect_scenes.proposals(
        detect_scenes.generator(0, detect_scenes.TEST, 0), scenes, [0, 1]
    )

    class Oracle:
        def predict(self, images, rois):
            assert_array_equal(rois, some.rois.astype(np.float32))
            scores = 20.0 * (some.labels[:, None] == np.arange(11))
            return np.concatenate([scores, detect_scenes.encode(rois[:, 1:], some.boxes)], axis=1)

    result = detect_scenes.measure(Oracle(), scenes, 0, np)
    assert_allclose(result, 100)
    assert set(some.labels) == {3, 7, 10}


def test_scenes_hold_digits_where_they_say(detect_scenes):
    args = type("Arguments", (), {"scenes": 12})
    learned, tested = detect_scenes.draw_scenes(args, 0)
    assert [len(part.images) for part in (learned, tested)] == [12, 3]
    for image, found, labels in zip(learned.images, learned.boxes, learned.labels, strict=True):
        assert len(found) == len(labels) >= 1
        for x1, y1, x2, y2 in found.astype(int):
            inside = image[0, y1:y2, x1:x2] > 0.3
            for border in inside[0], inside[-1], inside[:, 0], inside[:, -1]:
                assert border.any()
