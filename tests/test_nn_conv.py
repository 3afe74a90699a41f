"""The convolution layers: gradients, initial values, bounds, and swapping a trained layer."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.ndimage import gaussian_filter

from deformable import conv2d, deform_conv2d, nn
from deformable.testing import check_layer, error_bound
from tests.arrays import host

CONVS = {
    "1x1": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "without bias": {"kernel_size": 3, "bias": False},
}
DEFORMABLE = CONVS | {
    "offset groups": {"kernel_size": 3, "padding": 1, "offset_groups": 2},
    "modulated": {"kernel_size": 3, "padding": 1, "modulated": True},
    "modulated groups": {"kernel_size": 2, "groups": 2, "offset_groups": 4, "modulated": True},
    "bounded": {"kernel_size": 3, "padding": 1, "max_offset": 0.5},
}


def images(xp, n=2, dtype=np.float64):
    return xp.asarray(np.random.default_rng(1).normal(size=(n, 4, 7, 6)).astype(dtype))


def conv(options, dtype=np.float64, seed=0):
    return nn.Conv2d(4, 6, **options, dtype=dtype, rng=np.random.default_rng(seed))


def deform_conv(options, dtype=np.float64, seed=0, spread=0.0):
    """A layer; ``spread`` > 0 gives it offsets of about that size, between the pixels."""
    rng = np.random.default_rng(seed)
    layer = nn.DeformConv2d(4, 6, **options, dtype=dtype, rng=rng)
    for param in layer.offset_conv.params():
        param.data = (spread * rng.normal(size=param.data.shape)).astype(dtype)
    return layer


@pytest.mark.parametrize("name", CONVS)
def test_gradients_of_a_convolution(name, xp):
    check_layer(conv(CONVS[name]).to(xp), [images(xp)], rng=np.random.default_rng(2))


@pytest.mark.parametrize("name", DEFORMABLE)
def test_gradients_of_a_deformable_convolution(name, xp):
    layer = deform_conv(DEFORMABLE[name], spread=0.2).to(xp)
    check_layer(layer, [images(xp)], rng=np.random.default_rng(2))


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_is_the_operator_with_its_parameters(name, xp):
    layer, x = conv(CONVS[name]).to(xp), images(xp)
    options = {
        key: value for key, value in CONVS[name].items() if key not in ("kernel_size", "bias")
    }
    bias = layer.bias and layer.bias.data
    expected = conv2d(x, layer.weight.data, bias, **options)
    assert_array_equal(host(xp, layer.predict(x)), host(xp, expected))


@pytest.mark.parametrize("name", DEFORMABLE)
def test_an_untrained_layer_looks_at_the_regular_grid(name, xp):
    layer, x = deform_conv(DEFORMABLE[name]).to(xp), images(xp)
    layer.load_state(nn.DeformConv2d(4, 6, **DEFORMABLE[name], dtype=np.float64).state())
    assert not host(xp, layer.offsets(x)).any()
    factor = 0.5 if layer.modulated else 1.0
    weight, bias = factor * layer.weight.data, layer.bias and layer.bias.data
    expected = conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    error = abs(host(xp, layer.predict(x) - expected)).max()
    assert error <= error_bound("float64", abs(host(xp, expected)).max(), terms=4 * 9)


def test_offsets_and_mask_are_the_maps_that_the_branch_predicts(xp):
    layer, x = deform_conv(DEFORMABLE["modulated"], spread=0.3).to(xp), images(xp)
    raw = host(xp, layer.offset_conv.predict(x))
    offset, mask = xp.asarray(raw[:, :18]), xp.asarray(1 / (1 + np.exp(-raw[:, 18:])))
    assert_array_equal(host(xp, layer.offsets(x)), host(xp, offset))
    expected = deform_conv2d(x, offset, layer.weight.data, layer.bias.data, padding=1, mask=mask)
    error = abs(host(xp, layer.predict(x) - expected)).max()
    assert error <= error_bound("float64", abs(host(xp, expected)).max(), terms=4 * 9)


def test_offsets_learn_from_the_first_step(xp):
    layer, x = nn.DeformConv2d(4, 6, 3, padding=1, rng=np.random.default_rng(0)), images(xp)
    y, backward = layer.to(xp)(x.astype(np.float32))
    backward(y)
    assert host(xp, layer.offset_conv.weight.grad).any(axis=(1, 2, 3)).all()


def test_a_bound_holds_however_large_the_prediction(xp):
    layer = deform_conv(DEFORMABLE["bounded"], spread=100.0).to(xp)
    offsets = host(xp, layer.offsets(images(xp)))
    assert abs(offsets).max() <= 0.5
    assert abs(offsets).min() >= 0.1


def test_a_bound_may_come_from_numpy(xp):
    layer = nn.DeformConv2d(4, 6, 3, max_offset=np.float64(2.0)).to(xp)
    assert layer.offsets(xp.ones((1, 4, 5, 5), np.float32)).dtype == np.float32


def test_a_bound_hardly_changes_small_offsets(xp):
    bounded = deform_conv({"kernel_size": 3, "max_offset": 8.0}, spread=0.01).to(xp)
    free = deform_conv({"kernel_size": 3}, spread=0.01).to(xp)
    small = host(xp, free.offsets(images(xp)))
    cubic = abs(small) ** 3 / (3 * 8.0**2)  # the first term that tanh leaves out
    assert (abs(host(xp, bounded.offsets(images(xp))) - small) <= cubic + 1e-15).all()


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("name", CONVS)
def test_taking_over_a_trained_convolution_changes_no_output(name, modulated, xp):
    trained = conv(CONVS[name], seed=1)
    layer = deform_conv(CONVS[name] | {"modulated": modulated}, seed=2, spread=1.0).to(xp)
    assert layer.from_conv(trained) is layer
    expected = host(xp, trained.to(xp).predict(images(xp)))
    error = abs(host(xp, layer.predict(images(xp))) - expected).max()
    assert error <= error_bound("float64", abs(expected).max(), terms=4 * 9)
    assert all(isinstance(array, xp.ndarray) for array in layer.state().values())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"kernel_size": 3, "padding": 1}, r"padding is \(1, 1\), expected \(0, 0\)"),
        ({"kernel_size": 3, "stride": 2}, r"stride is \(2, 2\), expected \(1, 1\)"),
        ({"kernel_size": 3, "dilation": 2}, r"dilation is \(2, 2\), expected \(1, 1\)"),
        ({"kernel_size": 3, "groups": 2}, "groups is 2, expected 1"),
        ({"kernel_size": 3, "bias": False}, r"missing names \['bias'\]"),
        ({"kernel_size": 2}, r"weight has shape \(6, 4, 2, 2\), expected \(6, 4, 3, 3\)"),
    ],
)
def test_a_convolution_that_does_not_fit_is_not_taken_over(other, message):
    layer = deform_conv({"kernel_size": 3}, spread=1.0)
    before = layer.state()
    with pytest.raises(ValueError, match=rf"^DeformConv2d.from_conv: .*{message}"):
        layer.from_conv(conv(other))
    assert all(layer.state()[name] is array for name, array in before.items())


@pytest.mark.parametrize("other", [nn.DeformConv2d(4, 6, 3), nn.ReLU()], ids=["deformable", "none"])
def test_only_an_ordinary_convolution_is_taken_over(other):
    with pytest.raises(TypeError, match=f"conv is {type(other).__name__}, expected Conv2d"):
        nn.DeformConv2d(4, 6, 3).from_conv(other)


def test_multipliers_and_decay_are_set_where_they_belong():
    layer = nn.DeformConv2d(4, 6, 3, offset_lr_mult=0.1)
    assert [param.lr_mult for param in layer.params()] == [1.0, 1.0, 0.1, 0.1]
    assert [param.decay for param in layer.params()] == [True, False, True, False]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["modulated", "bounded"])
def test_every_dtype_goes_in_and_comes_out(name, dtype, xp):
    pytest.importorskip("ml_dtypes")
    layer, exact = deform_conv(DEFORMABLE[name], dtype).to(xp), deform_conv(DEFORMABLE[name]).to(xp)
    exact.load_state({key: a.astype(np.float64) for key, a in layer.state().items()})
    x = images(xp, dtype=dtype)
    y, backward = layer(x)
    expected, exact_backward = exact(x.astype(np.float64))
    grad_x, expected_grad = backward(y), exact_backward(y.astype(np.float64))
    assert y.dtype == grad_x.dtype == dtype
    assert {str(param.grad.dtype) for param in layer.params()} == {dtype}
    for have, want in (y, expected), (grad_x, expected_grad):
        have, want = host(xp, have).astype(np.float64), host(xp, want)
        error = np.linalg.norm(have - want) / np.linalg.norm(want)
        assert error <= error_bound(dtype, terms=6 * 9)


def test_an_empty_batch_goes_through(xp):
    layer = deform_conv(DEFORMABLE["modulated"], spread=0.2).to(xp)
    y, backward = layer(images(xp, n=0))
    assert y.shape == (0, 6, 7, 6)
    assert backward(y).shape == (0, 4, 7, 6)
    assert not any(host(xp, param.grad).any() for param in layer.params())


def test_memory_stays_channels_last(xp):
    x = xp.ascontiguousarray(images(xp).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for layer in conv(CONVS["strided"]), deform_conv(DEFORMABLE["bounded"], spread=0.2):
        y, backward = layer.to(xp)(x)
        for array in y, backward(y):
            assert array.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 3, "groups": 3}, "in_channels is 4, expected a multiple of groups, 3"),
        ({"kernel_size": 3, "groups": 0}, "groups is 0, expected at least 1"),
        ({"kernel_size": 3, "offset_groups": 0}, "offset_groups is 0, expected at least 1"),
        ({"kernel_size": 0}, "kernel_size is 0, expected at least 1"),
        (
            {"kernel_size": 3, "offset_groups": 3},
            "in_channels is 4, expected a multiple of offset_groups, 3",
        ),
        (
            {"kernel_size": 3, "max_offset": 0.0},
            "max_offset is 0.0, expected above 0",
        ),
        (
            {"kernel_size": 3, "max_offset": np.inf},
            "max_offset is inf, expected a finite number",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^DeformConv2d: {message}"):
        nn.DeformConv2d(4, 6, **options)


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "groups", "offset_groups"])
def test_numbers_of_channels_and_groups_are_integers(name):
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3} | {name: 2.0}
    with pytest.raises(TypeError, match=f"^DeformConv2d: {name} is 2.0, expected an int"):
        nn.DeformConv2d(**options)


def trained(max_offset=None, max_norm=None):
    """The loss and the largest offset after a training whose offsets learn far too fast.

    Images are to be moved by two pixels; black ones would have a loss of about 1.
    """
    rng = np.random.default_rng(0)
    wide = gaussian_filter(rng.normal(size=(4, 1, 16, 20)), (0, 0, 1.5, 1.5))
    x, target = wide[..., 2:18] / wide.std(), wide[..., :16] / wide.std()
    options = {"padding": 1, "offset_lr_mult": 100.0, "dtype": np.float64}
    layer = nn.DeformConv2d(1, 1, 3, **options, max_offset=max_offset, rng=rng)
    optimizer = nn.SGD(layer.params(), lr=0.05, momentum=0.9)
    for _ in range(80):
        y, backward = layer(x)
        loss, grad = nn.mse(y, target)
        backward(grad)
        if max_norm is not None:
            nn.clip_grad_norm(layer.params(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return loss, abs(layer.offsets(x)).max()


@pytest.mark.parametrize("against_it", [{"max_offset": 1.5}, {"max_norm": 0.1}])
def test_bounded_offsets_or_clipped_gradients_save_a_training_that_explodes(against_it):
    lost, far = trained()
    assert lost > 0.7
    assert far > 100
    loss, distance = trained(**against_it)
    assert loss < lost / 2
    assert distance < 30


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.DeformConv2d])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((2, 4, 7, 6)), TypeError, "x has dtype float64, expected float32 as weight has"),
        (np.ones((2, 4, 7, 6), np.uint8), TypeError, "x has dtype uint8, expected one of float16"),
        (np.ones((2, 3, 7, 6), np.float32), ValueError, r"\(2, 3, 7, 6\), expected \(N, 4, H, W\)"),
        (np.ones((4, 7, 6), np.float32), ValueError, r"\(4, 7, 6\), expected \(N, 4, H, W\)"),
        ([1.0], TypeError, "x is list, expected a numpy or cupy array"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_the_words_of_the_layer(kind, x, error, message):
    layer = kind(4, 6, 3, groups=2)
    for call in (layer, layer.offsets) if kind is nn.DeformConv2d else (layer,):
        with pytest.raises(error, match=f"^{kind.__name__}: x .*{message.removeprefix('x ')}"):
            call(x)
