"""Deformable convolution against its definition, on both array libraries."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import deformable
from deformable import (
    _conv,
    _fused,
    conv2d,
    conv2d_backward,
    deform_conv2d,
    deform_conv2d_backward,
)
from deformable._bilinear import Samples
from deformable._conv import Chunk, conv_geometry
from deformable.testing import check_backward, error_bound
from tests import reference
from tests.arrays import host, on
from tests.conftest import HAVE_GPU, kernels
from tests.golden_cases import check_golden, golden_cases

FIELDS = ("x", "offset", "weight", "bias", "mask")


def random_case(rng, dtype=np.float64, **sizes):
    """Arrays and keywords of a random call; ``sizes`` fixes some of what is drawn."""
    pick = lambda name, choices: sizes.get(name, int(rng.choice(choices)))  # noqa: E731
    n, groups, offset_groups = pick("n", [1, 2, 3]), pick("groups", [1, 2]), pick("og", [1, 2, 3])
    c = pick("c", [groups * offset_groups, 2 * groups * offset_groups])
    o = groups * pick("o", [1, 2, 3])
    kh, kw = pick("kh", [1, 2, 3]), pick("kw", [1, 2, 3])
    stride = (pick("sh", [1, 2]), pick("sw", [1, 3]))
    padding = (pick("ph", [0, 1, 2]), pick("pw", [0, 1]))
    dilation = (pick("dh", [1, 2]), pick("dw", [1, 2]))
    h = pick("h", [3, 4, 7]) + dilation[0] * (kh - 1)
    w = pick("w", [2, 5, 6]) + dilation[1] * (kw - 1)
    out_h = (h + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (w + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    # Fractions of at least 1/64 keep the positions away from the grid lines, where a derivative
    # by differences does not exist.
    offset_shape = (n, 2 * offset_groups * kh * kw, out_h, out_w)
    offset = np.rint(rng.normal(0, 2, offset_shape)) + rng.integers(1, 64, offset_shape) / 64
    arrays = {
        "x": rng.normal(size=(n, c, h, w)),
        "offset": offset,
        "weight": rng.normal(size=(o, c // groups, kh, kw)),
    }
    if sizes.get("bias", rng.random() < 0.7):
        arrays["bias"] = rng.normal(size=o)
    if sizes.get("mask", rng.random() < 0.5):
        arrays["mask"] = rng.normal(size=(n, offset_groups * kh * kw, out_h, out_w))
    arrays = {name: a.astype(dtype) for name, a in arrays.items()}
    return arrays, {"stride": stride, "padding": padding, "dilation": dilation}


@pytest.mark.parametrize(("case", "dtype"), golden_cases("deform_conv2d"))
def test_golden_cases(case, dtype, xp):
    check_golden(case, dtype, deform_conv2d, deform_conv2d_backward, xp)


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_definition(seed, xp):
    arrays, keywords = random_case(np.random.default_rng(seed))
    y = host(xp, deform_conv2d(**on(xp, arrays), **keywords))
    expected = reference.deform_conv2d(**arrays, **keywords)
    assert np.abs(y - expected).max() <= 1e-13 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("seed", range(220))
def test_gradients_of_random_configurations(seed):
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case(rng)
    check_backward(deform_conv2d, deform_conv2d_backward, [], arrays | keywords, rng=rng)


@pytest.mark.parametrize("seed", range(12))
def test_gradients_agree_between_the_libraries(seed, xp):
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case(rng)
    grad_y = rng.normal(size=deform_conv2d(**arrays, **keywords).shape)
    want = deform_conv2d_backward(grad_y, **arrays, **keywords)
    have = deform_conv2d_backward(xp.asarray(grad_y), **on(xp, arrays), **keywords)
    for name in arrays:
        a, b = host(xp, getattr(have, name)), getattr(want, name)
        assert a.shape == b.shape == arrays[name].shape
        assert np.abs(a - b).max() <= 1e-12 * max(1, np.abs(b).max())


@pytest.mark.parametrize("position", [-1.0, 0.0, 1.0, 4.0, 5.0])
def test_derivatives_on_grid_lines_are_right_hand_ones(position, xp):
    """At −1 the cell [−1, 0) counts, at H nothing does."""
    rng = np.random.default_rng(0)
    x = xp.asarray(rng.normal(size=(1, 1, 5, 5)))
    weight, offset = xp.ones((1, 1, 1, 1)), xp.zeros((1, 2, 5, 5))
    shift = np.zeros((1, 2, 5, 5))
    shift[0, 0] = position - np.arange(5)[:, None]
    shift[0, 1] = position - np.arange(5)
    offset = xp.asarray(shift)
    check_backward(
        deform_conv2d,
        deform_conv2d_backward,
        [x, offset, weight],
        rng=rng,
        wrt=["offset"],
        one_sided=True,
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_a_sample_at_the_far_border_has_no_pixel(axis, xp):
    """At y = H or x = W nothing counts: not the image, nor the next row, nor the next image."""
    shape = (2, 1, 3, 4)
    shift = np.zeros((2, 2, 3, 4))
    shift[:, axis] = shape[2 + axis] - np.indices((3, 4))[axis]
    x, offset, weight = xp.ones(shape), xp.asarray(shift), xp.ones((1, 1, 1, 1))
    assert not host(xp, deform_conv2d(x, offset, weight)).any()
    grad_y = xp.full(shape, np.nan)  # which would be seen in any sum
    assert not host(xp, deform_conv2d_backward(grad_y, x, offset, weight).x).any()


@pytest.mark.parametrize("groups", [1, 2])
def test_zero_offset_is_convolution(groups, xp):
    rng = np.random.default_rng(1)
    arrays, keywords = random_case(rng, groups=groups, og=1, mask=False, bias=True)
    arrays["offset"][:] = 0
    arrays = on(xp, arrays)
    offset = arrays.pop("offset")
    plain = conv2d(**arrays, **keywords, groups=groups)
    y = deform_conv2d(**arrays, offset=offset, **keywords)
    assert_array_equal(host(xp, y), host(xp, plain))
    grad_y = xp.asarray(rng.normal(size=y.shape))
    have = deform_conv2d_backward(grad_y, **arrays, offset=offset, **keywords)
    want = conv2d_backward(grad_y, **arrays, **keywords, groups=groups)
    for name in want._fields:
        a, b = host(xp, getattr(have, name)), host(xp, getattr(want, name))
        assert np.abs(a - b).max() <= 1e-13 * np.abs(b).max()


def test_integer_offset_is_shifted_convolution(xp):
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(1, 2, 9, 8)), rng.normal(size=(3, 2, 3, 3))
    offset = np.empty((1, 18, 9, 8))
    offset[:, 0::2], offset[:, 1::2] = 2, -1
    shifted = np.zeros_like(x)
    shifted[:, :, :-2, 1:] = x[:, :, 2:, :-1]
    y = deform_conv2d(xp.asarray(x), xp.asarray(offset), xp.asarray(weight), padding=1)
    plain = conv2d(xp.asarray(shifted), xp.asarray(weight), padding=1)
    # at the rim the taps of the shifted image see zeros that the image itself has values for
    assert_array_equal(host(xp, y)[..., 1:-3, 2:-1], host(xp, plain)[..., 1:-3, 2:-1])


def test_mask_scales_every_tap(xp):
    rng = np.random.default_rng(3)
    arrays, keywords = random_case(rng, mask=True, bias=False)
    mask = arrays.pop("mask")
    unmasked = deform_conv2d(**on(xp, arrays), **keywords)
    halved = deform_conv2d(**on(xp, arrays), mask=xp.full(mask.shape, 0.5), **keywords)
    assert_array_equal(2 * host(xp, halved), host(xp, unmasked))


@pytest.mark.parametrize("n", [0, 1, 31, 33, 257])
def test_batches_equal_the_loop_over_images(n, xp):
    rng = np.random.default_rng(n)
    arrays, keywords = random_case(rng, n=n, h=3, w=2, mask=True, bias=True)
    y = deform_conv2d(**on(xp, arrays), **keywords)
    grad_y = xp.asarray(rng.normal(size=y.shape))
    grads = deform_conv2d_backward(grad_y, **on(xp, arrays), **keywords)
    assert y.shape[0] == n
    assert all(getattr(grads, name).shape == arrays[name].shape for name in FIELDS)
    for b in {0, n // 2, n - 1} if n else ():
        one = arrays | {k: arrays[k][b : b + 1] for k in ("x", "offset", "mask")}
        error = host(xp, y)[b] - host(xp, deform_conv2d(**on(xp, one), **keywords))[0]
        assert np.abs(error).max() <= 1e-13
        grad = deform_conv2d_backward(grad_y[b : b + 1], **on(xp, one), **keywords)
        for name in ("x", "offset", "mask"):
            error = host(xp, getattr(grads, name))[b] - host(xp, getattr(grad, name))[0]
            assert np.abs(error).max() <= 1e-13
    if n == 0:
        assert not host(xp, grads.weight).any() and not host(xp, grads.bias).any()


LAYOUTS = {
    "channels last": lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "Fortran": np.asfortranarray,
    "negative strides": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_order_gives_the_same(layout, xp):
    rng = np.random.default_rng(4)
    arrays, keywords = random_case(rng, mask=True, bias=True, c=12, groups=1, og=2)
    want = deform_conv2d(**on(xp, arrays), **keywords)
    grad_y = rng.normal(size=want.shape)
    want_grads = deform_conv2d_backward(xp.asarray(grad_y), **on(xp, arrays), **keywords)
    lay = LAYOUTS[layout]
    given = {name: lay(a) if a.ndim == 4 else a for name, a in arrays.items()}
    if xp is not np:  # the same strides on the other library
        given = {name: with_strides(xp, a) for name, a in given.items()}
    before = {name: host(xp, a).copy() for name, a in given.items()}
    y = deform_conv2d(**given, **keywords)
    grads = deform_conv2d_backward(xp.asarray(grad_y), **given, **keywords)
    assert_array_equal(host(xp, y), host(xp, want))
    for name in FIELDS:
        assert_array_equal(host(xp, getattr(grads, name)), host(xp, getattr(want_grads, name)))
        assert_array_equal(host(xp, given[name]), before[name])


def with_strides(xp, array):
    """An array of ``xp`` that lies in memory as ``array`` does: its axes in the same order."""
    order = np.argsort([-abs(s) for s in array.strides], kind="stable")
    out = xp.ascontiguousarray(xp.asarray(np.ascontiguousarray(array)).transpose(*map(int, order)))
    return out.transpose(*map(int, np.argsort(order)))


def test_broadcast_offsets_are_read_through_zero_strides():
    rng = np.random.default_rng(5)
    x, weight = rng.normal(size=(2, 4, 6, 6)), rng.normal(size=(3, 4, 3, 3))
    offset = np.broadcast_to(rng.normal(size=(1, 18, 1, 1)), (2, 18, 4, 4))
    y = deform_conv2d(x, offset, weight)
    assert_array_equal(y, deform_conv2d(x, offset.copy(), weight))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_within_twice_the_naive_error(dtype, xp):
    """Naive: positions and sums in float32, but samples, products' factors and result rounded."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    half = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(6)
    arrays, keywords = random_case(rng, c=8, groups=1, og=1, o=4, kh=3, kw=3, mask=True, bias=True)
    arrays = {name: a.astype(half) for name, a in arrays.items()}
    exact = {name: a.astype(np.float64) for name, a in arrays.items()}
    grad_y = rng.normal(size=deform_conv2d(**exact, **keywords).shape).astype(half)

    given = on(xp, arrays)
    have = [deform_conv2d(**given, **keywords)]
    have += [*deform_conv2d_backward(xp.asarray(grad_y), **given, **keywords)]
    want = [deform_conv2d(**exact, **keywords)]
    want += [*deform_conv2d_backward(grad_y.astype(np.float64), **exact, **keywords)]
    naive = naive_half(half, exact, grad_y.astype(np.float64), keywords)
    for name, a, b, c in zip(("y", *FIELDS), have, want, naive, strict=True):
        assert a.dtype == half
        error = np.linalg.norm(host(xp, a).astype(np.float64) - b)
        assert error <= 2 * np.linalg.norm(c - b), name


def naive_half(half, exact, grad_y, keywords):
    """The operator and its gradients with every intermediate array stored in ``half``."""

    def rounded(a):
        return a.astype(half).astype(np.float64)

    x, offset, weight, bias, mask = (exact[name] for name in FIELDS)
    channels, taps = x.shape[1], weight.shape[2] * weight.shape[3]
    # columns by a convolution with one-hot weights, one output channel for each (channel, tap)
    pick = np.eye(channels * taps).reshape(channels * taps, channels, *weight.shape[2:])
    columns = rounded(deform_conv2d(x, offset, pick, mask=mask, **keywords))
    flat = weight.reshape(len(weight), channels * taps)
    y = np.einsum("ok,nkhw->nohw", flat, columns) + bias[:, None, None]
    grad_columns = rounded(np.einsum("ok,nohw->nkhw", flat, grad_y))
    grads = deform_conv2d_backward(grad_columns, x, offset, pick, mask=mask, **keywords)
    grad_weight = np.einsum("nohw,nkhw->ok", grad_y, columns).reshape(weight.shape)
    grad_bias = grad_y.sum(axis=(0, 2, 3))
    return map(rounded, (y, grads.x, grads.offset, grad_weight, grad_bias, grads.mask))


def test_float32_kernels_are_within_the_rounding_of_their_sums(xp):
    rng = np.random.default_rng(7)
    arrays, keywords = random_case(rng, np.float32, c=16, groups=1, og=2, kh=3, kw=3, mask=True)
    y = host(xp, deform_conv2d(**on(xp, arrays), **keywords))
    exact = {name: a.astype(np.float64) for name, a in arrays.items()}
    magnitude = deform_conv2d(
        **{k: a if k == "offset" else np.abs(a) for k, a in exact.items()}, **keywords
    )
    error = np.abs(y - deform_conv2d(**exact, **keywords))
    assert (error <= error_bound(np.float32, magnitude, terms=16 * 9)).all()


@pytest.mark.parametrize("kind", ["offset", "weight", "float16"])
def test_offsets_may_have_another_dtype(kind, xp):
    """Positions are computed in the dtype of sums, whatever the offsets come in."""
    rng = np.random.default_rng(8)
    arrays, keywords = random_case(rng, np.float32, mask=True)
    arrays["offset"] = arrays["offset"].astype(np.float16).astype(np.float64)
    want = deform_conv2d(
        **on(xp, arrays | {"offset": arrays["offset"].astype(np.float32)}), **keywords
    )
    have = deform_conv2d(**on(xp, arrays), **keywords)
    assert have.dtype == np.float32
    assert_array_equal(host(xp, have), host(xp, want))
    grads = deform_conv2d_backward(want, **on(xp, arrays), **keywords)
    assert grads.offset.dtype == np.float64 and grads.mask.dtype == np.float32


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**63)])
@pytest.mark.parametrize("axis", [0, 1])
def test_far_offsets_are_outside(value, axis, xp):
    rng = np.random.default_rng(9)
    arrays, keywords = random_case(rng, np.float32, mask=False, kh=3, kw=3)
    arrays["offset"][:, axis] = value
    without = arrays | {"weight": arrays["weight"].copy()}
    near = arrays | {"offset": arrays["offset"].copy()}
    near["offset"][:, axis] = -1000  # as far out as it needs to be
    y = host(xp, deform_conv2d(**on(xp, arrays), **keywords))
    assert np.isfinite(y).all()
    assert_array_equal(y, host(xp, deform_conv2d(**on(xp, without | near), **keywords)))
    grads = deform_conv2d_backward(xp.ones(y.shape, np.float32), **on(xp, arrays), **keywords)
    assert all(np.isfinite(host(xp, g)).all() for g in grads if g is not None)
    assert not host(xp, grads.offset)[:, :2].any()


@pytest.mark.parametrize("axis", [0, 1])
def test_nan_offset_gives_nan_where_it_is_used(axis, xp):
    rng = np.random.default_rng(10)
    arrays, keywords = random_case(rng, n=2, og=2, c=4, groups=1, kh=3, kw=3, mask=True, bias=True)
    tap = 2 * (9 + 4)  # of offset group 1
    arrays["offset"][1, tap + axis, 0, 1] = np.nan
    y = host(xp, deform_conv2d(**on(xp, arrays), **keywords))
    used = np.zeros(y.shape, bool)
    used[1, :, 0, 1] = True
    assert_array_equal(np.isnan(y), used)
    grads = deform_conv2d_backward(xp.ones(y.shape), **on(xp, arrays), **keywords)
    own = np.zeros(arrays["offset"].shape, bool)
    own[1, tap : tap + 2, 0, 1] = True
    assert_array_equal(np.isnan(host(xp, grads.offset)), own)
    assert_array_equal(np.isnan(host(xp, grads.mask))[1, 13, 0, 1], True)
    assert np.isnan(host(xp, grads.mask)).sum() == 1
    assert np.isfinite(host(xp, grads.x)).all() and np.isfinite(host(xp, grads.bias)).all()


def test_a_sample_outside_never_sees_the_image(xp):
    """Infinities of the image do not leak through corners of weight zero."""
    x = xp.full((1, 1, 3, 3), np.inf)
    offset = xp.full((1, 2, 3, 3), -7.0)
    y = deform_conv2d(x, offset, xp.ones((1, 1, 1, 1)))
    assert not host(xp, y).any()


def test_a_nan_gradient_reaches_samples_inside_and_outside_alike(xp):
    """A sum of products with NaN is NaN, also where the image counts as zero."""
    grad_y = np.zeros((1, 1, 1, 3))
    grad_y[..., :2] = np.nan
    offset = np.zeros((1, 2, 1, 3))
    offset[:, 1, 0, 0] = -7
    grads = deform_conv2d_backward(
        xp.asarray(grad_y), xp.ones((1, 1, 1, 3)), xp.asarray(offset), xp.ones((1, 1, 1, 1))
    )
    assert_array_equal(np.isnan(host(xp, grads.offset))[0, :, 0], [[True, True, False]] * 2)


@pytest.mark.parametrize("size", [(0, 0), (0, 3), (3, 0)])
def test_an_image_without_pixels_may_be_padded(size, xp):
    x, weight = xp.zeros((2, 1, *size)), xp.ones((1, 1, 3, 3))
    offset = xp.zeros((2, 18, size[0] + 2, size[1] + 2))
    y = deform_conv2d(x, offset, weight, xp.ones(1), padding=2)
    assert_array_equal(host(xp, y), np.ones((2, 1, size[0] + 2, size[1] + 2)))
    grads = deform_conv2d_backward(y, x, offset, weight, padding=2)
    assert grads.x.shape == x.shape and not host(xp, grads.offset).any()


@pytest.mark.parametrize("field", FIELDS)
def test_wrt_computes_only_what_it_names(field, xp):
    rng = np.random.default_rng(11)
    arrays, keywords = random_case(rng, mask=True, bias=True)
    arrays = on(xp, arrays)
    grad_y = xp.asarray(rng.normal(size=deform_conv2d(**arrays, **keywords).shape))
    everything = deform_conv2d_backward(grad_y, **arrays, **keywords)
    only = deform_conv2d_backward(grad_y, **arrays, **keywords, wrt=[field])
    assert_array_equal(host(xp, getattr(only, field)), host(xp, getattr(everything, field)))
    assert [f for f in FIELDS if getattr(only, f) is not None] == [field]


@pytest.mark.parametrize(
    ("field", "unneeded"),
    [
        ("x", "gradients"),
        ("offset", "matrix"),
        ("weight", "gradients"),
        ("bias", "seen"),
        ("mask", "matrix"),
    ],
)
def test_wrt_skips_the_work_for_others(field, unneeded, monkeypatch):
    arrays, keywords = random_case(np.random.default_rng(11), mask=True, bias=True)
    grad_y = deform_conv2d(**arrays, **keywords)
    monkeypatch.delattr(Samples, unneeded)
    only = deform_conv2d_backward(grad_y, **arrays, **keywords, wrt=[field])
    assert getattr(only, field) is not None


def test_absent_arguments_have_no_gradient(xp):
    rng = np.random.default_rng(12)
    arrays, keywords = random_case(rng, mask=False, bias=False)
    arrays = on(xp, arrays)
    grads = deform_conv2d_backward(deform_conv2d(**arrays, **keywords), **arrays, **keywords)
    assert grads.mask is None and grads.bias is None and grads.x is not None


def test_ten_runs_are_bitwise_equal(xp):
    rng = np.random.default_rng(13)
    arrays, keywords = random_case(rng, np.float32, n=2, c=8, groups=1, og=2, h=7, mask=True)
    arrays["offset"] *= 3  # many samples meet at the same pixels
    arrays = on(xp, arrays)
    grad_y = deform_conv2d(**arrays, **keywords)
    first = [host(xp, g) for g in deform_conv2d_backward(grad_y, **arrays, **keywords)]
    for _ in range(9):
        again = deform_conv2d_backward(grad_y, **arrays, **keywords)
        for a, b in zip(again, first, strict=True):
            assert a is b is None or host(xp, a).tobytes() == b.tobytes()


@pytest.mark.parametrize("limit", [1, 1000, 20_000])
def test_results_do_not_depend_on_the_size_of_blocks(limit, xp, monkeypatch):
    rng = np.random.default_rng(14)
    arrays, keywords = random_case(rng, n=3, c=4, groups=2, og=2, mask=True, bias=True)
    arrays = on(xp, arrays)
    y = deform_conv2d(**arrays, **keywords)
    grads = deform_conv2d_backward(y, **arrays, **keywords)
    monkeypatch.setattr(_conv, "BLOCK_BYTES", limit)
    monkeypatch.setattr(_conv, "CHUNK_BYTES", limit)
    pieces = deform_conv2d_backward(y, **arrays, **keywords)
    assert np.abs(host(xp, deform_conv2d(**arrays, **keywords) - y)).max() <= 1e-13
    for name in FIELDS:
        a, b = host(xp, getattr(pieces, name)), host(xp, getattr(grads, name))
        assert np.abs(a - b).max() <= 1e-12 * np.abs(b).max(), name


@pytest.mark.parametrize("og", [1, 2])
@pytest.mark.parametrize(("dtype", "depth"), [("float16", 264), ("float32", 132)])
@pytest.mark.parametrize("fused", [False, True])
def test_lanes_take_a_second_turn_where_channels_are_many(fused, dtype, depth, og, xp, monkeypatch):
    """32 lanes of 16 bytes reach all channels but the last ones. Small fractions add up exactly."""
    if not fused:
        monkeypatch.setattr(_fused, "covers", lambda g, x: False)
    rng = np.random.default_rng(15)
    some = lambda *shape: rng.integers(-2, 3, shape).astype(dtype)  # noqa: E731
    arrays = {
        "x": some(1, og * depth, 6, 4),
        "offset": some(1, 4 * og, 5, 4) / 2,
        "weight": some(2, og * depth, 2, 1),
        "mask": some(1, 2 * og, 5, 4),
    }
    grad_y = some(1, 2, 5, 4)
    want = deform_conv2d_backward(grad_y, **arrays)
    have = deform_conv2d_backward(xp.asarray(grad_y), **on(xp, arrays))
    for name in arrays:
        assert_array_equal(host(xp, getattr(have, name)), getattr(want, name))


# ---- more than 2**31 pixels or positions


def test_counting_by_int64_gives_the_same_bits(monkeypatch):
    rng = np.random.default_rng(16)
    arrays, keywords = random_case(rng, np.float32, n=2, c=3, groups=1, og=1, mask=True)
    monkeypatch.setattr(_fused, "covers", lambda g, x: False)
    with kernels("forward"):
        import cupy

        arrays = on(cupy, arrays)
        y = deform_conv2d(**arrays, **keywords)
        grads = deform_conv2d_backward(y, **arrays, **keywords)
        monkeypatch.setattr(deformable.deform_conv, "index_type", lambda g: "int64")
        assert_array_equal(deform_conv2d(**arrays, **keywords).get(), y.get())
        again = deform_conv2d_backward(y, **arrays, **keywords)
        for name in arrays:
            assert_array_equal(getattr(again, name).get(), getattr(grads, name).get())


@pytest.mark.skipif(HAVE_GPU, reason="only simulated memory costs nothing before it is used")
def test_the_end_of_an_image_of_more_than_2_31_pixels():
    """Its last rows give what they give where there are no others."""
    with kernels("forward"):
        import cupy

        alone, behind_others = (last_row(cupy, height) for height in (8, 2**16 + 8))
    for a, b in zip(alone, behind_others, strict=True):
        assert a.any()
        assert_array_equal(a, b)


def last_row(xp, height, width=2**15, count=256):
    """What the kernels compute of the last positions and pixels of an image."""
    from tests.simt.settings import configure

    rng = np.random.default_rng(17)
    image = xp.zeros((1, 1, height, width), np.float32)
    image[..., -4:, -count:] = xp.asarray(rng.normal(size=(4, count)))
    arrays = {"x": image, "weight": xp.zeros((1, 1, 1, 1))}
    g = conv_geometry("test", arrays, [(1, 1), (0, 0), (1, 1)])
    first = g.positions - count
    offset = xp.zeros((1, height, width, 2), np.float32)
    quarters = rng.integers(-8, 9, (count, 2)) / 4  # exact also at y = 2**16
    offset[0, -1, -count:] = xp.asarray(quarters)
    chunk = Chunk(first, count, (1, count, 1))
    o = _fused.operands(image, offset.transpose(0, 3, 1, 2), None)
    columns = deformable.deform_conv._im2col(g, o, image, offset, None, chunk)

    grad_offset = xp.zeros(offset.shape, np.float32)
    offset_gradient = deformable.deform_conv._offset_gradient(g, o, chunk)
    offset_gradient(image, offset, None, columns, None, grad_offset, None)

    around = 3 * (width + 1)  # that many cells at the end are those around the last row
    plan = deformable.deform_conv._image_gradient(g, o, chunk)
    cells, weights = xp.zeros((plan.cells + 1, 2), np.int32), xp.empty((count, 4), np.float32)
    links = xp.empty((2, count), np.int32)
    grad_image = xp.zeros((1, height, width, 1), np.float32)
    plan.link_samples(offset, None, cells, links, weights)
    with configure(last_blocks=-(-around // 256)):
        plan.list_samples(links, cells)
    with configure(last_blocks=1):  # of 256 pixels
        plan.gather(columns, None, cells, links, weights, grad_image)
    results = columns, grad_offset[0, -1, -count:], weights, grad_image[0, -1, -count:]
    return [a.get() for a in results]


def small(**changes):
    arrays = {
        "x": np.zeros((1, 2, 5, 5)),
        "offset": np.zeros((1, 18, 3, 3)),
        "weight": np.zeros((2, 2, 3, 3)),
    }
    return arrays | changes


ERRORS = {
    "offset channels": (
        small(offset=np.zeros((1, 17, 3, 3))),
        ValueError,
        r"deform_conv2d: offset has shape \(1, 17, 3, 3\), expected \(1, 18, 3, 3\)",
    ),
    "offset size": (small(offset=np.zeros((1, 18, 4, 3))), ValueError, "offset has shape"),
    "offset groups": (small(offset=np.zeros((1, 54, 3, 3))), ValueError, "offset groups"),
    "mask": (
        small(mask=np.zeros((1, 8, 3, 3))),
        ValueError,
        r"mask has shape \(1, 8, 3, 3\), expected \(1, 9, 3, 3\)",
    ),
    "bias": (small(bias=np.zeros(3)), ValueError, r"bias has shape \(3,\), expected \(2,\)"),
    "channels": (small(weight=np.zeros((2, 3, 3, 3))), ValueError, "weight has shape"),
    "out channels": (
        small(weight=np.zeros((3, 1, 3, 3))),
        ValueError,
        "divisible by groups = 2",
    ),
    "no channels": (small(x=np.zeros((1, 0, 5, 5))), ValueError, "at least one channel"),
    "x ndim": (small(x=np.zeros((2, 5, 5))), ValueError, r"x has shape \(2, 5, 5\), expected"),
    "too large a kernel": (small(dilation=3), ValueError, "kernel fits in"),
    "stride": (small(stride=0), ValueError, "stride is 0, expected at least 1"),
    "padding": (small(padding=-1), ValueError, "padding is -1, expected at least 0"),
    "stride type": (small(stride=1.5), TypeError, "stride is 1.5, expected an int"),
    "integer x": (small(x=np.zeros((1, 2, 5, 5), int)), TypeError, "x has dtype int64"),
    "mixed dtypes": (
        small(weight=np.zeros((2, 2, 3, 3), np.float32)),
        TypeError,
        "weight has dtype float32, expected float64 as x has",
    ),
    "complex offset": (small(offset=np.zeros((1, 18, 3, 3), complex)), TypeError, "complex128"),
    "half offset": (
        small(offset=np.zeros((1, 18, 3, 3), np.float16)),
        TypeError,
        "offset has dtype float16, expected float64 or float32",
    ),
    "byte order": (small(x=np.zeros((1, 2, 5, 5), ">f8")), TypeError, "x has dtype >f8"),
    "no x": (small(x=None), TypeError, "x is NoneType, expected a numpy or cupy array"),
    "no offset": (small(offset=None), TypeError, "offset is NoneType"),
    "list": (small(x=[[1.0]]), TypeError, "x is list, expected a numpy or cupy array"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named(name):
    arguments, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        deform_conv2d(**arguments)
    with pytest.raises(error, match="deform_conv2d_backward: "):
        deform_conv2d_backward(np.zeros((1, 2, 3, 3)), **arguments)


def test_bad_gradients_are_named():
    with pytest.raises(TypeError, match="grad_y is NoneType, expected a numpy or cupy array"):
        deform_conv2d_backward(None, **small())
    with pytest.raises(
        ValueError, match=r"grad_y has shape \(1, 2, 3, 4\), expected \(1, 2, 3, 3\)"
    ):
        deform_conv2d_backward(np.zeros((1, 2, 3, 4)), **small())
    with pytest.raises(ValueError, match="wrt has 'rois', expected some of x, offset"):
        deform_conv2d_backward(np.zeros((1, 2, 3, 3)), **small(), wrt=["rois"])


def test_libraries_do_not_mix(xp):
    if xp is np:
        pytest.skip("needs two libraries")
    with pytest.raises(TypeError, match=r"weight is a numpy array, expected .*cupy as x is"):
        deform_conv2d(**(small() | {"x": xp.zeros((1, 2, 5, 5))}))
