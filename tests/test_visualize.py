"""Where operators look, computed and drawn: against positions worked out by hand."""

import itertools

import matplotlib
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from deformable import deform_conv2d, nn, visualize
from deformable.visualize import Sampling
from tests import reference
from tests.arrays import host

GRID = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=2)))  # taps around the middle

OFFSET = np.zeros((1, 18, 3, 3))


@pytest.fixture(autouse=True)
def closed_figures():
    with matplotlib.rc_context({"backend": "Agg"}):
        yield
        visualize.plt.close("all")


def drawn(ax):
    """The points of every label, as (y, x)."""
    return {c.get_label(): np.asarray(c.get_offsets())[:, ::-1] for c in ax.collections}


def constant(shift, size, taps=9):
    """Offsets (1, 2 taps, *size) that are ``shift`` everywhere."""
    return np.tile(np.reshape(shift, (2, 1, 1)), (taps, *size))[None].astype(float)


# ---- computing


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"dilation": (3, 2)}])
def test_zero_offsets_look_at_the_regular_grid(geometry):
    layer = Sampling(np.zeros((1, 18, 5, 6)), **geometry)
    stride, padding = geometry.get("stride", 1), geometry.get("padding", 0)
    dilation = geometry.get("dilation", 1)
    expected = np.array([2, 3]) * stride - padding + (GRID + 1) * dilation
    assert_array_equal(layer.looks((2, 3)), expected)


def test_channels_are_dy_and_dx_of_every_tap_of_the_group():
    offset = np.arange(36.0).reshape(1, 36, 1, 1)
    for group in range(2):
        looks = Sampling(offset, padding=1, group=group).looks((0, 0))
        assert_array_equal(looks, GRID + 18 * group + np.arange(18).reshape(9, 2))


def test_points_are_those_that_the_convolution_samples(xp):
    """An image that holds its own coordinates: the samples are the positions."""
    offset = np.random.default_rng(0).uniform(-1, 1, (2, 18, 4, 6))
    image = np.indices((14, 18)).astype(float)[:, None]
    geometry = {"stride": (2, 3), "padding": (0, 1), "dilation": (3, 2)}
    layer = Sampling(xp.asarray(offset), **geometry)
    looks = layer.looks(np.argwhere(np.ones((4, 6))), index=1)
    for tap in range(9):
        weight = np.zeros((1, 1, 3, 3))
        weight.flat[tap] = 1
        args = [xp.asarray(a) for a in (image, offset[[1, 1]], weight)]
        samples = host(xp, deform_conv2d(*args, **geometry)).reshape(2, 24).T
        inside = ((looks[:, tap] >= 0) & (looks[:, tap] <= (13, 17))).all(axis=1)
        assert inside.sum() >= 12
        assert_allclose(samples[inside], looks[inside, tap], atol=1e-12)


def test_offsets_are_interpolated_between_positions():
    offset = np.random.default_rng(0).normal(size=(1, 2, 4, 5))
    point = np.array([1.25, 2.5])
    between = [reference.bilinear(offset[0], *point)]
    assert_allclose(Sampling(offset, 1).looks(point) - point, between, atol=1e-14)


def test_three_stacked_layers_have_729_points_at_the_hand_computed_places():
    shifts = np.array([[0.5, 0.25], [-0.75, 0.5], [0.125, -1.5]])
    layers = [Sampling(constant(shift, (21, 21)), padding=1) for shift in shifts]
    first, second, third = visualize.trace(layers, (10, 10))
    assert_array_equal(third, 10 + shifts[2] + GRID)
    assert_array_equal(second.reshape(9, 9, 2), (third + shifts[1])[:, None] + GRID)
    assert_array_equal(first.reshape(81, 9, 2), (second + shifts[0])[:, None] + GRID)


def test_strides_paddings_and_dilations_of_stacked_layers_multiply():
    lower = Sampling(constant((0.5, 0), (8, 8)), 3, stride=2, padding=2, dilation=2)
    upper = Sampling(constant((0, 0.25), (4, 4), taps=2), (1, 2), stride=(2, 1), padding=(0, 1))
    points = visualize.trace([lower, upper], (1, 2))[0]
    # upper: y = 1·2, x = 2 − 1 + (0, 1) + .25; lower: 2·(y, x) − 2 + 2·(0, 1, 2) + (.5, 0)
    expected = [
        (2 * 2 - 2 + 2 * i + 0.5, 2 * x - 2 + 2 * j)
        for x in (1.25, 2.25)
        for i in range(3)
        for j in range(3)
    ]
    assert_array_equal(points, expected)


def test_taps_outside_of_a_map_in_between_lead_nowhere():
    layer = Sampling(np.zeros((1, 18, 4, 4)), padding=1)
    first, second = visualize.trace([layer, layer], (0, 0))
    outside = (second <= -1).any(axis=1)
    assert outside.sum() == 5
    assert_array_equal(np.isnan(first.reshape(9, 9, 2)).all(axis=(1, 2)), outside)
    assert np.isfinite(first.reshape(9, 9, 2)[~outside]).all()


def test_less_than_a_pixel_outside_the_outermost_position_is_seen():
    offset = np.random.default_rng(0).normal(size=(1, 2, 3, 3))
    layer = Sampling(offset, 1)
    assert_allclose(layer.looks((-0.5, 2.75)), layer.looks((0, 2)), atol=0)


def test_middles_ignore_offsets_and_follow_the_windows():
    layers = [
        Sampling(np.ones((1, 18, 9, 9)), stride=2, padding=1),
        Sampling(np.ones((1, 8, 4, 4)), 2, stride=2),
    ]
    assert_array_equal(visualize.middles(layers, [(0, 0), (1, 3)]), [(1, 1), (5, 13)])
    ordinary = [layer._replace(offset=None) for layer in layers]
    assert_array_equal(visualize.trace(ordinary, (1, 3))[0], [(5, 13)])
    assert_array_equal(visualize.middles([], (1, 3)), (1, 3))


def test_samplings_follow_a_network_to_its_input():
    rng = np.random.default_rng(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1, rng=rng),
        nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.DeformConv2d(2, 2, 3, padding=2, dilation=2, offset_groups=2, rng=rng),
        nn.GlobalAvgPool2d(),
        nn.Linear(2, 3, rng=rng),
    )
    net.layers[2].offset_conv.bias.data = np.arange(36, dtype=np.float32) / 64
    layers = visualize.samplings(net, np.zeros((2, 1, 16, 16), np.float32))
    assert [layer.taps for layer in layers] == [1, 1, 9]
    first, second, third = visualize.trace(layers, (1, 2), index=1)
    assert_array_equal(third, np.array([1, 2]) + 2 * GRID + np.arange(18).reshape(9, 2) / 64)
    assert_array_equal(second, 2 * third + 0.5)  # the middle of a window of 2 pixels
    assert_array_equal(first, 2 * second)


def test_a_layer_that_resizes_in_an_unknown_way_is_an_error():
    class Crop(nn.Layer):
        def __call__(self, x):
            return x[:, :, 1:], lambda grad_y: grad_y

    with pytest.raises(ValueError, match="samplings: Crop makes"):
        visualize.samplings(nn.Sequential(Crop()), np.zeros((1, 1, 4, 4)))


def test_effective_dilation_without_offsets_is_the_dilation():
    dilation = visualize.effective_dilation(np.zeros((2, 36, 3, 4)), dilation=3)
    assert dilation.shape == (2, 2, 3, 4)
    assert (dilation == 3).all()


def test_effective_dilation_is_the_mean_over_the_adjacent_pairs():
    offset = np.random.default_rng(0).normal(size=(1, 18, 1, 1))
    points = {divmod(t, 3): np.divmod(t, 3) + offset[0, 2 * t : 2 * t + 2, 0, 0] for t in range(9)}
    pairs = [
        (a, b) for a, b in itertools.combinations(points, 2) if abs(np.subtract(a, b)).sum() == 1
    ]
    assert len(pairs) == 12
    expected = np.mean([np.linalg.norm(points[a] - points[b]) for a, b in pairs])
    assert_allclose(visualize.effective_dilation(offset).item(), expected, rtol=1e-14)


def test_bins_of_a_roi_without_offsets_divide_it():
    bins = visualize.roi_bins((3, 10, 20, 16, 44), output_size=(4, 2))
    assert bins.shape == (4, 2, 4)
    assert_array_equal(bins[0, 0], (9.5, 19.5, 12.5, 25.5))
    assert_array_equal(bins[3, 1], (12.5, 37.5, 15.5, 43.5))


def test_roi_offsets_are_dx_dy_times_gamma_and_size():
    offset = np.zeros((2, 2, 2))
    offset[:, 1, 0] = 0.5, -1
    shift = visualize.roi_bins((0, 0, 8, 20), offset, 2, gamma=0.25) - visualize.roi_bins(
        (0, 0, 8, 20), None, 2
    )
    assert_array_equal(shift[1, 0], (1, -5, 1, -5))
    assert_array_equal(np.delete(shift.reshape(4, 4), 2, axis=0), np.zeros((3, 4)))


def test_rounded_rois_contain_their_last_pixel_and_share_parts():
    offset = np.zeros((2, 2, 1))
    offset[0] = [[1], [2]]
    bins = visualize.roi_bins((0.5, -0.5, 9.4, 8.9), offset, (3, 1), gamma=0.1, rounded=True)
    # 1 .. 9 and −1 .. 9, both ends included: 9 wide and 11 high
    assert_allclose(bins[:, 0, 0], 0.5 + 0.9 * np.array([1, 1, 2]))
    assert_allclose(bins[:, 0, 1], -1.5 + 11 / 3 * np.arange(3))
    below_half = visualize.roi_bins((np.nextafter(0.5, 0), 0, 1, 1), output_size=1, rounded=True)
    assert below_half[0, 0].tolist() == [-0.5, -0.5, 1.5, 1.5]


def test_input_gradient_sees_the_pixels_of_the_taps():
    layer = nn.DeformConv2d(1, 1, 3, padding=1, rng=np.random.default_rng(0))
    layer.offset_conv.bias.data = np.tile([2, -1], 9).astype(np.float32)
    seen = visualize.input_gradient(layer, np.zeros((1, 1, 9, 9), np.float32), (4, 4)) > 0
    expected = np.zeros((9, 9), bool)
    expected[5:8, 2:5] = True
    assert_array_equal(seen, expected)


def test_input_gradient_is_that_of_the_chosen_channel_in_the_middle():
    net = nn.Conv2d(1, 2, (1, 3), padding=(0, 1))
    net.weight.data = np.array([[2, 0, 0], [0, 0, 3]], np.float32).reshape(2, 1, 1, 3)
    seen = [
        visualize.input_gradient(net, np.zeros((2, 1, 7, 5), np.float32), channel=channel)
        for channel in (0, 1, None)
    ]
    assert [{tuple(at): m[tuple(at)] for at in np.argwhere(m)} for m in seen] == [
        {(3, 1): 2},
        {(3, 3): 3},
        {(3, 1): 2, (3, 3): 3},
    ]


def test_input_gradient_leaves_the_network_as_it_was():
    rng = np.random.default_rng(0)
    drop = nn.Dropout(0.5, rng=np.random.default_rng(1))
    conv, norm = nn.Conv2d(1, 2, 3, rng=rng), nn.BatchNorm2d(2)
    net = nn.Sequential(conv, nn.Sequential(norm, drop), nn.GlobalAvgPool2d())
    x = rng.normal(size=(2, 1, 6, 6)).astype(np.float32)
    conv.weight.grad = marked = np.ones((2, 1, 3, 3), np.float32)
    state, draws = net.state(), drop.rng.bit_generator.state
    gradient = visualize.input_gradient(net, x, channel=1)
    assert (gradient > 0).all(), "nothing was dropped"
    assert all(array is net.state()[name] for name, array in state.items())
    assert conv.weight.grad is marked
    assert norm.weight.grad is None and not norm.frozen
    assert drop.p == 0.5 and drop.rng.bit_generator.state == draws


def test_a_network_is_put_back_after_an_error():
    norm = nn.BatchNorm2d(2)
    with pytest.raises(ValueError):
        visualize.input_gradient(norm, np.zeros((1, 3, 4, 4), np.float32))
    assert not norm.frozen


def test_effective_size_counts_what_is_above_the_threshold():
    magnitude = np.zeros((8, 8))
    magnitude[2:6, 2:6] = 1
    magnitude[0] = 0.04
    assert visualize.effective_size(magnitude) == 4
    magnitude[0] = 0.05
    assert visualize.effective_size(magnitude) == np.sqrt(24)
    assert visualize.effective_size(np.zeros((3, 3))) == 0


# ---- drawing


def test_points_are_drawn_where_they_are_computed(xp):
    offset = np.random.default_rng(0).normal(0, 0.3, (2, 18, 9, 9))
    layers = [Sampling(xp.asarray(offset), padding=1)] * 2
    ax = visualize.sampling_points(layers, (4, 5), index=1)
    points = drawn(ax)
    assert_array_equal(points["sampling points"], visualize.trace(layers, (4, 5), 1)[0])
    assert_array_equal(points["output position"], [(4, 5)])
    assert list(points) == ["sampling points", "output position"]


def test_points_of_stacked_layers_are_drawn_at_the_hand_computed_places():
    lower = Sampling(constant((0.5, 0), (8, 8)), 3, stride=2, padding=2, dilation=2)
    upper = Sampling(constant((0, 0.25), (4, 4), taps=2), (1, 2), stride=(2, 1), padding=(0, 1))
    points = drawn(visualize.sampling_points([lower, upper], (1, 2), np.zeros((16, 16))))
    # upper looks at (2, 1.25) and (2, 2.25), lower from there on in steps of two pixels
    columns = ((0.5, 2.5, 4.5), (2.5, 4.5, 6.5))
    expected = [(y, x) for xs in columns for y in (2.5, 4.5, 6.5) for x in xs]
    assert_array_equal(points["sampling points"], expected)
    assert_array_equal(points["output position"], [(4, 3)])


def test_every_depth_is_drawn_over_the_pixels_it_stands_for():
    layers = [
        Sampling(None, 1, stride=4),
        Sampling(np.zeros((1, 18, 20, 20)), padding=1),
        Sampling(constant((1, 0), (20, 20)), padding=1),
        Sampling(constant((0, 1), (20, 20)), padding=1),
    ]
    points = drawn(visualize.sampling_points(layers, (10, 10), every_depth=True))
    counts = {label: len(at) for label, at in points.items()}
    assert counts == {
        "sampling points": 729,
        "deformable layer 2": 81,
        "deformable layer 3": 9,
        "output position": 1,
    }
    assert_array_equal(points["deformable layer 3"], 4 * (np.array([10, 11]) + GRID))
    assert_array_equal(points["output position"], [(40, 40)])
    assert_array_equal(points["sampling points"].mean(axis=0), 4 * np.array([11, 11]))


def test_all_positions_are_drawn_where_none_is_chosen():
    points = drawn(visualize.sampling_points(Sampling(np.zeros((1, 18, 3, 4)))))
    assert len(points["sampling points"]) == 9 * 12
    assert_array_equal(points["output position"], 1 + np.argwhere(np.ones((3, 4))))


def test_points_that_lead_nowhere_are_not_drawn():
    layer = Sampling(np.zeros((1, 18, 4, 4)), padding=1)
    points = drawn(visualize.sampling_points([layer, layer], (0, 0)))["sampling points"]
    assert len(points) == 4 * 9
    assert np.isfinite(points).all()


def test_arrows_start_at_the_undisplaced_tap_and_end_where_it_looks():
    offset = np.random.default_rng(0).normal(size=(1, 18, 4, 6))
    layer = Sampling(offset, stride=2, padding=1)
    (arrows,) = visualize.offset_field(layer, tap=5, every=2).collections
    positions = np.argwhere(np.ones((2, 3))) * 2
    assert_array_equal(arrows.XY[:, ::-1], positions * 2 - 1 + np.array([1, 2]))
    ends = arrows.XY[:, ::-1] + np.stack([arrows.V, arrows.U], axis=1)
    assert_allclose(ends, layer.looks(positions)[:, 5])
    assert (arrows.angles, arrows.scale_units, arrows.scale) == ("xy", "xy", 1)


def test_arrows_of_no_tap_are_the_mean_of_all():
    offset = np.random.default_rng(0).normal(size=(1, 18, 2, 2))
    (arrows,) = visualize.offset_field(Sampling(offset, padding=1)).collections
    assert_allclose(arrows.V, offset[0, 0::2].mean(axis=0).ravel())
    assert_allclose(arrows.U, offset[0, 1::2].mean(axis=0).ravel())
    assert_array_equal(arrows.XY[:, ::-1], np.argwhere(np.ones((2, 2))))


@pytest.mark.parametrize(
    ("shift", "brighter", "yellow"),
    [((0, 1), 0, 1), ((0, -1), 0, -1), ((-1, 0), 1, 0), ((0, 0), 0, 0)],
)
def test_colours_tell_left_from_right_and_up_from_down(shift, brighter, yellow):
    offset = constant(shift, (2, 2), taps=1)
    ax = visualize.offset_field(Sampling(offset, 1), colours=True)
    red, green, blue = ax.images[0].get_array()[0, 0]
    assert np.sign(round(red + green - 2 * blue, 6)) == yellow
    if not yellow:
        assert np.sign(round(blue - 0.5, 6)) == brighter
    assert ax.child_axes[0].get_title() == f"{np.hypot(*shift) or 1:.1f} px"


def test_rois_are_drawn_around_their_bins():
    offset = np.random.default_rng(0).normal(size=(2, 3, 3))
    ax = visualize.roi_parts((4, 6, 16, 36), offset, 3)
    bins, roi = ax.collections
    assert (bins.get_label(), roi.get_label()) == ("bins", "RoI")
    boxes = [path.get_extents().extents for path in bins.get_paths()]
    assert_allclose(boxes, visualize.roi_bins((4, 6, 16, 36), offset, 3).reshape(9, 4))
    assert_allclose(roi.get_paths()[0].get_extents().extents, (3.5, 5.5, 15.5, 35.5))


def test_the_receptive_field_is_drawn_with_its_size():
    net = nn.Conv2d(1, 1, 3, padding=1)
    net.weight.data = np.ones_like(net.weight.data)
    ax = visualize.receptive_field(net, np.zeros((1, 1, 9, 9), np.float32), (2, 5))
    assert ax.get_title() == "effective size 3.0 pixels"
    assert_array_equal(np.argwhere(ax.images[0].get_array()), GRID + (2, 5))  # noqa: RUF005
    (square,) = ax.patches
    assert (square.get_x(), square.get_y(), square.get_width()) == (3.5, 0.5, 3.0)


@pytest.mark.parametrize(
    "draw",
    [
        lambda **k: visualize.sampling_points(Sampling(OFFSET), **k),
        lambda **k: visualize.offset_field(Sampling(OFFSET), **k),
        lambda **k: visualize.roi_parts((0, 0, 4, 4), **k),
    ],
    ids=["sampling_points", "offset_field", "roi_parts"],
)
@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (3, 6, 5), (6, 5, 3)])
def test_functions_draw_over_an_image_on_the_axes_given(draw, shape):
    _, ax = visualize.plt.subplots()
    assert draw(image=np.random.default_rng(0).normal(size=shape), ax=ax) is ax
    assert ax.images[0].get_array().shape[:2] == (6, 5)
    assert ax.yaxis_inverted()
    fresh = draw()
    assert fresh is not ax and fresh.yaxis_inverted()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sampling(OFFSET[:, :17]).looks((0, 0)), r"\(1, 17, 3, 3\), expected \(1, 18, 3"),
        (lambda: Sampling(OFFSET[0]).looks((0, 0)), r"offset has shape \(18, 3, 3\)"),
        (lambda: Sampling(OFFSET, group=1).looks((0, 0)), "group is 1"),
        (lambda: Sampling(OFFSET).looks((0, 0), index=1), "index is 1"),
        (lambda: visualize.trace(Sampling(OFFSET), (0, 3)), r"position \(0.0, 3.0\) is outside"),
        (
            lambda: visualize.trace(Sampling(OFFSET), (np.nan, 0)),
            r"position \(nan, 0.0\) is outside",
        ),
        (lambda: visualize.trace(Sampling(OFFSET), 3), "positions have shape"),
        (lambda: visualize.sampling_points(Sampling(None)), "positions have shape"),
        (lambda: visualize.effective_dilation(OFFSET, 1, 1), "kernel_size is 1"),
        (lambda: visualize.effective_dilation(OFFSET[:, :17]), r"expected \(1, 18, 3, 3\)"),
        (lambda: visualize.offset_field(Sampling(OFFSET), tap=9), "tap is 9"),
        (lambda: visualize.offset_field(Sampling(None)), "offset is None"),
        (lambda: visualize.roi_bins((1, 2, 3)), r"roi has shape \(3,\)"),
        (lambda: visualize.roi_bins((1, 2, 3, 4), OFFSET[0, :3]), "offset has shape"),
    ],
)
def test_mistakes_are_reported(call, message):
    with pytest.raises(ValueError, match=message):
        call()
