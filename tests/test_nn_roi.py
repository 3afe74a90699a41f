"""The RoI layers: gradients, what the offset branches compute, bounds, and what they refuse."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import deformable
from deformable import nn
from deformable.testing import check_layer, error_bound
from tests.arrays import host

SIZE = {"output_size": (2, 3), "spatial_scale": 0.5}
PLAIN = {
    "RoIPool": {},
    "RoIAlign": {"sampling_ratio": 2, "aligned": True},
    "RoIAlign max": {"sampling_ratio": (2, 1), "mode": "max"},
    "PSRoIPool": {},
    "PSRoIPool average": {"group_size": 1},
    "PSRoIAlign": {"sampling_ratio": 2},
}
FUNCTIONS = {
    "RoIPool": "roi_pool",
    "RoIAlign": "roi_align",
    "PSRoIPool": "ps_roi_pool",
    "PSRoIAlign": "ps_roi_align",
}
DEFORMABLE = {
    "DeformRoIPool": {"sampling_ratio": 2},
    "DeformRoIPool modulated": {"gamma": 0.3, "modulated": True},
    "DeformRoIPool bounded": {"max_offset": 0.5},
    "DeformPSRoIPool": {},
    "DeformPSRoIPool classes": {"classes": 2, "sampling_ratio": 3, "gamma": 0.3},
    "DeformPSRoIPool modulated": {"group_size": (1, 3), "modulated": True, "max_offset": 0.5},
    "DeformPSRoIPool average": {"group_size": 1},
}


def images(xp, channels=12, n=2, dtype=np.float64):
    rng = np.random.default_rng(1)
    return xp.asarray(rng.normal(size=(n, channels, 9, 8)).astype(dtype))


def boxes(xp, count=4, dtype=np.float64):
    """RoIs in images of 18 x 16 pixels, some of which reach beyond the border."""
    rng = np.random.default_rng(2)
    first = rng.uniform(-3, 9, (count, 2))
    last = first + rng.uniform(4, 11, (count, 2))
    index = np.arange(count)[:, None] % 2
    return xp.asarray(np.concatenate([index, first, last], axis=1).astype(dtype))


def plain(name):
    return getattr(nn, name.split()[0])(**SIZE, **PLAIN[name])


def deformed(name, dtype=np.float64, spread=0.0, seed=0):
    """A layer; ``spread`` > 0 gives it offsets of about that size."""
    layer = getattr(nn, name.split()[0])(12, **SIZE, **DEFORMABLE[name], dtype=dtype)
    rng = np.random.default_rng(seed)
    for param in layer.params():
        param.data = (spread * rng.normal(size=param.data.shape)).astype(dtype)
    return layer


def pooling(name):
    """The function of a deformable layer, and its arguments."""
    options = {
        key: value
        for key, value in (SIZE | DEFORMABLE[name]).items()
        if key not in ("classes", "modulated", "max_offset")
    }
    is_ps = name.startswith("DeformPS")
    return (deformable.deform_ps_roi_pool if is_ps else deformable.deform_roi_pool), options


@pytest.mark.parametrize("name", PLAIN)
def test_gradients_of_a_pooling(name, xp):
    check_layer(plain(name), [images(xp), boxes(xp)], rng=np.random.default_rng(3))


@pytest.mark.parametrize("name", PLAIN)
def test_a_pooling_is_the_operator_with_its_options(name, xp):
    function = getattr(deformable, FUNCTIONS[name.split()[0]])
    expected = function(images(xp), boxes(xp), **SIZE, **PLAIN[name])
    assert_array_equal(host(xp, plain(name).predict(images(xp), boxes(xp))), host(xp, expected))


@pytest.mark.parametrize("name", DEFORMABLE)
def test_gradients_of_a_deformable_pooling(name, xp):
    layer = deformed(name, spread=0.2).to(xp)
    check_layer(layer, [images(xp), boxes(xp)], rng=np.random.default_rng(3))


def test_gradients_of_offsets_from_features(xp):
    layer = nn.DeformPSRoIPool(5, **SIZE, classes=2, modulated=True, dtype=np.float64)
    rng = np.random.default_rng(0)
    for param in layer.params():
        param.data = rng.normal(size=param.data.shape)
    inputs = [images(xp), boxes(xp), images(xp, channels=5)]
    check_layer(layer.to(xp), inputs, rng=np.random.default_rng(3))
    y, backward = layer(*inputs)
    assert [grad is None for grad in backward(y)] == [False, True, False]


@pytest.mark.parametrize("name", DEFORMABLE)
def test_an_untrained_layer_moves_no_bin(name, xp):
    function, options = pooling(name)
    layer = getattr(nn, name.split()[0])(12, **SIZE, **DEFORMABLE[name], dtype=np.float64).to(xp)
    assert not host(xp, layer.offsets(images(xp), boxes(xp))).any()
    expected = host(xp, function(images(xp), boxes(xp), None, **options))
    factor = 0.5 if "modulated" in name else 1.0
    assert_array_equal(host(xp, layer.predict(images(xp), boxes(xp))), factor * expected)


def test_a_fully_connected_layer_predicts_offsets_and_mask_from_the_pooled_roi(xp):
    x, rois = images(xp), boxes(xp)
    name = "DeformRoIPool modulated"
    layer = deformed(name, spread=0.2).to(xp)
    function, options = pooling(name)
    pooled = host(xp, function(x, rois, None, **options)).reshape(4, 12 * 6)
    maps = pooled @ host(xp, layer.offset_fc.weight.data).T + host(xp, layer.offset_fc.bias.data)
    maps = maps.reshape(4, 3, 2, 3)
    bound = error_bound("float64", 12 * 6 * abs(maps).max(), terms=12 * 6)
    assert abs(host(xp, layer.offsets(x, rois)) - maps[:, :2]).max() <= bound
    mask = xp.asarray(1 / (1 + np.exp(-maps[:, 2])))
    expected = host(xp, function(x, rois, xp.asarray(maps[:, :2]), **options, mask=mask))
    assert abs(host(xp, layer.predict(x, rois)) - expected).max() <= 10 * bound


def test_each_bin_reads_its_offset_from_maps_of_its_own(xp):
    """Constant maps, a different one for every class, direction and bin, are the offsets."""
    layer = deformed("DeformPSRoIPool classes").to(xp)
    offsets = np.arange(4 * 6) / 24.0
    layer.offset_conv.bias.data = xp.asarray(offsets)
    x, rois = images(xp, channels=12), boxes(xp)
    expected = np.broadcast_to(offsets.reshape(4, 2, 3), (4, 4, 2, 3))
    bound = error_bound("float64", terms=4 * 9)
    assert abs(host(xp, layer.offsets(x, rois)) - expected).max() <= bound
    function, options = pooling("DeformPSRoIPool classes")
    expected = host(xp, function(x, rois, xp.asarray(np.array(expected)), **options))
    assert abs(host(xp, layer.predict(x, rois)) - expected).max() <= 100 * bound


@pytest.mark.parametrize("name", ["DeformRoIPool bounded", "DeformPSRoIPool modulated"])
def test_a_bound_holds_however_large_the_prediction(name, xp):
    offsets = host(xp, deformed(name, spread=100.0).to(xp).offsets(images(xp), boxes(xp)))
    assert abs(offsets).max() <= 0.5
    assert abs(offsets).mean() >= 0.4


@pytest.mark.parametrize("name", DEFORMABLE)
def test_offsets_learn_from_the_first_step(name, xp):
    layer = deformed(name).to(xp)
    y, backward = layer(images(xp), boxes(xp))
    backward(y)
    for param in layer.params():
        assert host(xp, param.grad).any()


def test_the_learning_rate_of_the_fully_connected_branch_is_that_of_the_paper():
    assert {param.lr_mult for param in nn.DeformRoIPool(4, 3).params()} == {0.01}
    assert {param.lr_mult for param in nn.DeformPSRoIPool(4, 3).params()} == {1.0}
    for kind in nn.DeformRoIPool, nn.DeformPSRoIPool:
        params = kind(4, 3, offset_lr_mult=0.1).params()
        assert [param.lr_mult for param in params] == [0.1, 0.1]
        assert [param.decay for param in params] == [True, False]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["DeformRoIPool modulated", "DeformPSRoIPool modulated"])
def test_every_dtype_goes_in_and_comes_out(name, dtype, xp):
    pytest.importorskip("ml_dtypes")
    layer, exact = deformed(name, dtype, 0.01).to(xp), deformed(name).to(xp)
    exact.load_state({key: a.astype(np.float64) for key, a in layer.state().items()})
    x, rois = images(xp, dtype=dtype), boxes(xp, dtype=np.float32)
    y, backward = layer(x, rois)
    expected, exact_backward = exact(x.astype(np.float64), rois)
    (grad_x, _), (expected_grad, _) = backward(y), exact_backward(y.astype(np.float64))
    assert y.dtype == grad_x.dtype == dtype
    assert {str(param.grad.dtype) for param in layer.params()} == {dtype}
    for have, want in (y, expected), (grad_x, expected_grad):
        have, want = host(xp, have).astype(np.float64), host(xp, want)
        error = np.linalg.norm(have - want) / np.linalg.norm(want)
        assert error <= error_bound(dtype, terms=12 * 6)


@pytest.mark.parametrize("name", [*PLAIN, *DEFORMABLE])
def test_no_rois_go_through(name, xp):
    layer = (plain(name) if name in PLAIN else deformed(name, spread=0.2)).to(xp)
    y, backward = layer(images(xp), boxes(xp, count=0))
    assert y.shape[0] == 0
    assert not host(xp, backward(y)[0]).any()
    assert not any(host(xp, param.grad).any() for param in layer.params())


def test_a_pooling_may_begin_a_network(xp):
    rng = np.random.default_rng(0)
    head = nn.Sequential(
        deformed("DeformRoIPool", spread=0.2), nn.Flatten(),
        nn.Linear(12 * 6, 4, dtype=np.float64, rng=rng),
    )  # fmt: skip
    check_layer(head.to(xp), [images(xp), boxes(xp)], rng=rng)


@pytest.mark.parametrize("name", [*PLAIN, *DEFORMABLE])
def test_layers_are_saved_and_loaded(name, tmp_path, xp):
    layer = (plain(name) if name in PLAIN else deformed(name, spread=0.2)).to(xp)
    other = (plain(name) if name in PLAIN else deformed(name)).to(xp)
    nn.save(tmp_path / "layer.npz", layer)
    nn.load(tmp_path / "layer.npz", other)
    inputs = images(xp), boxes(xp)
    assert_array_equal(host(xp, other.predict(*inputs)), host(xp, layer.predict(*inputs)))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("RoIPool", {"output_size": 0}, "RoIPool: output_size is 0, expected at least 1"),
        ("PSRoIAlign", {"output_size": 0}, "PSRoIAlign: output_size is 0, expected at least 1"),
        ("DeformRoIPool", {"max_offset": 0.0}, "DeformRoIPool: max_offset is 0.0, expected above"),
        ("DeformPSRoIPool", {"max_offset": np.inf}, "max_offset is inf, expected a finite"),
        ("DeformPSRoIPool", {"classes": 0}, "DeformPSRoIPool: classes is 0, expected at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(kind, options, message):
    channels = {"in_channels": 4} if kind.startswith("Deform") else {}
    with pytest.raises(ValueError, match=message):
        getattr(nn, kind)(**({"output_size": 3} | channels | options))


def test_images_that_do_not_fit_are_refused_in_the_words_of_the_layer():
    layer = deformed("DeformRoIPool")
    message = r"^DeformRoIPool: x has shape \(2, 4, 9, 8\), expected \(N, 12, H, W\)"
    for call in (layer, layer.offsets):
        with pytest.raises(ValueError, match=message):
            call(images(np, channels=4), boxes(np))
        with pytest.raises(TypeError, match=r"^DeformRoIPool: x is list, expected"):
            call([1.0], boxes(np))
