"""Plain convolution against its definition, on both array libraries."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import deformable
from deformable import _conv, _fused, conv2d, conv2d_backward
from deformable._array import FLOATS
from deformable._conv import Chunk, ConvGeometry, conv_geometry, index_type, sum_rows
from deformable.testing import check_backward
from tests import reference
from tests.arrays import host, on
from tests.conftest import HAVE_GPU, kernels

FIELDS = ("x", "weight", "bias")


def random_case(rng, n=None):
    groups, n = int(rng.integers(1, 4)), int(rng.integers(1, 4)) if n is None else n
    c, o = groups * int(rng.integers(1, 5)), groups * int(rng.integers(1, 4))
    kernel, stride, dilation = rng.integers(1, 4, (3, 2))
    padding = rng.integers(0, 3, 2)
    h, w = rng.integers(2, 8, 2) + dilation * (kernel - 1)
    arrays = {
        "x": rng.normal(size=(n, c, h, w)),
        "weight": rng.normal(size=(o, c // groups, *kernel)),
        "bias": rng.normal(size=o),
    }
    pairs = {"stride": stride, "padding": padding, "dilation": dilation}
    return arrays, {k: tuple(map(int, v)) for k, v in pairs.items()} | {"groups": groups}


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_definition(seed, xp):
    arrays, keywords = random_case(np.random.default_rng(seed))
    y = host(xp, conv2d(**on(xp, arrays), **keywords))
    expected = reference.conv2d(**arrays, **keywords)
    assert y.shape == expected.shape
    assert np.abs(y - expected).max() <= 1e-13 * np.abs(expected).max()


@pytest.mark.parametrize("seed", range(60))
def test_gradients_of_random_configurations(seed):
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case(rng)
    check_backward(conv2d, conv2d_backward, [], arrays | keywords, rng=rng)


@pytest.mark.parametrize("seed", range(10))
def test_gradient_of_the_image_is_the_adjoint(seed, xp):
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case(rng)
    arrays = on(xp, arrays | {"bias": np.zeros_like(arrays["bias"])})
    y = conv2d(**arrays, **keywords)
    grad_y = xp.asarray(rng.normal(size=y.shape))
    grads = conv2d_backward(grad_y, **arrays, **keywords)
    product = float((y * grad_y).sum())
    for name in ("x", "weight"):
        assert abs(float((arrays[name] * getattr(grads, name)).sum()) - product) <= 1e-12 * (
            float(abs(y * grad_y).sum())
        )


@pytest.mark.parametrize("n", [0, 1, 33])
def test_gradients_agree_between_the_libraries(n, xp):
    rng = np.random.default_rng(n)
    arrays, keywords = random_case(rng, n)
    grad_y = rng.normal(size=conv2d(**arrays, **keywords).shape)
    have = conv2d_backward(xp.asarray(grad_y), **on(xp, arrays), **keywords)
    want = conv2d_backward(grad_y, **arrays, **keywords)
    for name in FIELDS:
        a, b = host(xp, getattr(have, name)), getattr(want, name)
        assert a.shape == arrays[name].shape
        assert np.abs(a - b).max(initial=0) <= 1e-12 * max(1, np.abs(b).max(initial=0))


@pytest.mark.parametrize("seed", [1, 3, 4])  # of 2 groups, of one channel per group, of 3
@pytest.mark.parametrize("limit", [1, 3000])
def test_results_do_not_depend_on_the_size_of_blocks(limit, seed, xp, monkeypatch):
    arrays, keywords = random_case(np.random.default_rng(seed), n=3)
    arrays = on(xp, arrays)
    y = conv2d(**arrays, **keywords)
    grads = conv2d_backward(y, **arrays, **keywords)
    monkeypatch.setattr(_conv, "BLOCK_BYTES", limit)
    monkeypatch.setattr(_conv, "CHUNK_BYTES", limit)
    pieces = conv2d_backward(y, **arrays, **keywords)
    assert np.abs(host(xp, conv2d(**arrays, **keywords) - y)).max() <= 1e-13
    for name in FIELDS:
        a, b = host(xp, getattr(pieces, name)), host(xp, getattr(grads, name))
        assert np.abs(a - b).max() <= 1e-12 * np.abs(b).max(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_result_has_the_dtype_of_x_and_sums_in_float32(dtype, xp):
    """4096 ones added in half precision would stop at 2048 (or 256)."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = xp.asarray(np.ones((1, 4096, 1, 1), kind))
    weight = xp.asarray(np.ones((1, 4096, 1, 1), kind))
    y = conv2d(x, weight)
    assert y.dtype == kind
    assert float(host(xp, y).astype(np.float64)[0, 0, 0, 0]) == 4096
    grads = conv2d_backward(y, x, weight)
    assert grads.x.dtype == grads.weight.dtype == kind


@pytest.mark.parametrize(("dtype", "channels"), [("float16", 264), ("float32", 132)])
@pytest.mark.parametrize("fused", [False, True])
def test_lanes_take_a_second_turn_where_channels_are_many(fused, dtype, channels, xp, monkeypatch):
    """32 lanes of 16 bytes reach all channels but the last ones. Small integers add up exactly."""
    if not fused:
        monkeypatch.setattr(_fused, "covers", lambda g, x: False)
    rng = np.random.default_rng(6)
    small = lambda *shape: rng.integers(-2, 3, shape).astype(dtype)  # noqa: E731
    arrays = {"x": small(2, channels, 3, 2), "weight": small(2, channels, 2, 1)}
    grad_y = small(2, 2, 2, 2)
    want = conv2d_backward(grad_y, **arrays)
    have = conv2d_backward(xp.asarray(grad_y), **on(xp, arrays))
    for name in arrays:
        assert_array_equal(host(xp, getattr(have, name)), getattr(want, name))


# ---- more than 2**31 pixels or positions


@pytest.mark.parametrize(
    ("sizes", "ctype"),
    [
        ({"batch": 2**31 - 1}, "int"),
        ({"batch": 2**31}, "int64"),
        ({"height": 2**15, "width": 2**16 - 1}, "int"),
        ({"height": 2**15, "width": 2**16}, "int64"),
        ({"out_height": 2**15, "out_width": 2**16 - 1}, "int"),
        ({"batch": 2, "out_height": 2**15, "out_width": 2**15}, "int64"),
    ],
    ids=str,
)
def test_int_counts_pixels_and_positions_as_far_as_it_can(sizes, ctype):
    assert index_type(ConvGeometry(*[1] * len(ConvGeometry._fields))._replace(**sizes)) == ctype


def test_counting_by_int64_gives_the_same_bits(monkeypatch):
    arrays, keywords = random_case(np.random.default_rng(2))
    arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
    monkeypatch.setattr(_fused, "covers", lambda g, x: False)
    with kernels("forward"):
        import cupy

        arrays = on(cupy, arrays)
        y = conv2d(**arrays, **keywords)
        grads = conv2d_backward(y, **arrays, **keywords)
        monkeypatch.setattr(deformable.conv, "index_type", lambda g: "int64")
        assert_array_equal(conv2d(**arrays, **keywords).get(), y.get())
        for a, b in zip(conv2d_backward(y, **arrays, **keywords), grads, strict=True):
            assert_array_equal(a.get(), b.get())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (10, 33), (300, 40)])
def test_the_gradient_of_a_bias_is_the_sum_of_all_rows(shape, dtype, xp):
    """Of integers, all of whose sums are exact in float32."""
    kind = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype, dtype))
    rows = np.random.default_rng(5).integers(-4, 5, shape)
    have = host(xp, sum_rows(xp.asarray(rows.astype(kind)), kind))
    assert have.dtype == kind
    assert_array_equal(have, rows.sum(axis=0).astype(kind))


@pytest.mark.parametrize("rows", [1, 65535**2, 65536**2, 1 << 40])
def test_parts_of_rows_are_no_more_than_blocks_that_a_grid_has(rows):
    half = np.dtype(np.float16)
    (parts, _), sum_parts, _ = _conv._sum_plan((rows, 1), half, half)
    assert sum_parts.grid == (1, parts) and parts <= 65535
    split = int(sum_parts.values[2])
    assert (parts - 1) * split < rows <= parts * split


@pytest.mark.skipif(HAVE_GPU, reason="only simulated memory costs nothing before it is used")
def test_the_end_of_an_image_of_more_than_2_31_pixels():
    """Its last rows give what they give where there are no others."""
    with kernels("forward"):
        import cupy

        alone, behind_others = (last_rows(cupy, height) for height in (32, 2**28 + 32))
    for a, b in zip(alone, behind_others, strict=True):
        assert a.any()
        assert_array_equal(a, b)


def last_rows(xp, height):
    """The last columns of an image 8 pixels wide, and the last pixels of their adjoint."""
    from tests.simt.settings import configure

    image = xp.zeros((1, 1, height, 8), np.float32)
    image[..., -4:, :] = xp.arange(1, 33, dtype=np.float32).reshape(4, 8)
    arrays = {"x": image, "weight": xp.zeros((1, 1, 3, 3))}
    g = conv_geometry("test", arrays, 3 * [(1, 1)])
    first = g.positions - 24
    chunk = Chunk(first, 24, (1, 24, 9))
    columns = deformable.conv._im2col(g, image, chunk)
    grad_image = xp.zeros((1, height, 8, 1), np.float32)
    with configure(last_blocks=1):  # of 256 pixels
        deformable.conv._col2im_launch(g, image.dtype, chunk)(columns, None, grad_image)
    return columns.get(), grad_image[:, -32:].get()


def test_wrt_computes_only_what_it_names(xp):
    arrays, keywords = random_case(np.random.default_rng(5))
    arrays = on(xp, arrays)
    y = conv2d(**arrays, **keywords)
    everything = conv2d_backward(y, **arrays, **keywords)
    for field in FIELDS:
        only = conv2d_backward(y, **arrays, **keywords, wrt=(field,))
        assert [f for f in FIELDS if getattr(only, f) is not None] == [field]
        assert_array_equal(host(xp, getattr(only, field)), host(xp, getattr(everything, field)))


@pytest.mark.parametrize(
    ("field", "unneeded"),
    [("bias", "_windows"), ("bias", "blocks"), ("weight", "columns_from_groups")],
)
def test_wrt_skips_the_work_for_others(field, unneeded, monkeypatch):
    arrays, keywords = random_case(np.random.default_rng(5))
    y = conv2d(**arrays, **keywords)
    monkeypatch.delattr(deformable.conv, unneeded)
    assert getattr(conv2d_backward(y, **arrays, **keywords, wrt=(field,)), field) is not None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"groups": 2}, ValueError, "weight has shape"),
        ({"groups": 0}, ValueError, "groups is 0, expected at least 1"),
        ({"groups": (1, 1)}, TypeError, r"groups is \(1, 1\), expected an int"),
        ({"x": None}, TypeError, "x is NoneType, expected a numpy or cupy array"),
        ({"weight": None}, TypeError, "weight is NoneType"),
        ({"stride": np.array(1)}, TypeError, r"stride is array\(1\), expected an int"),
        ({"stride": 2**31}, ValueError, "stride is 2147483648, expected at most 2147483647"),
        ({"bias": np.zeros(2)}, ValueError, r"bias has shape \(2,\), expected \(3,\)"),
        ({"padding": 2**31}, ValueError, "padding"),
        ({"padding": 2**30}, ValueError, r"padding is \(1073741824, .*, expected a padded side"),
        ({"stride": (1, 0)}, ValueError, r"stride is \(1, 0\)"),
        ({"dilation": True}, TypeError, "dilation is True, expected an int"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    arguments = {"x": np.zeros((1, 3, 5, 5)), "weight": np.zeros((3, 3, 2, 2))} | changes
    with pytest.raises(error, match=f"conv2d: .*{message}"):
        conv2d(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grad_y": None}, TypeError, "grad_y is NoneType, expected a numpy or cupy array"),
        ({"wrt": 5}, TypeError, "wrt is 5, expected some of x, weight, bias"),
        ({"wrt": [None]}, ValueError, "wrt has None, expected some of x, weight, bias"),
        ({"wrt": [np.zeros(2)]}, ValueError, "wrt has array"),
    ],
)
def test_bad_input_of_the_backward_is_named(changes, error, message):
    arguments = {"grad_y": np.zeros((1, 3, 4, 4)), "x": np.zeros((1, 3, 5, 5))}
    arguments |= {"weight": np.zeros((3, 3, 2, 2))} | changes
    with pytest.raises(error, match=f"conv2d_backward: {message}"):
        conv2d_backward(**arguments)


@pytest.mark.parametrize("size", [(0, 0), (0, 3), (3, 0)])
def test_an_image_without_pixels_may_be_padded(size, xp):
    x, weight = xp.zeros((2, 1, *size)), xp.ones((1, 1, 3, 3))
    y = conv2d(x, weight, xp.ones(1), padding=2)
    assert_array_equal(host(xp, y), np.ones((2, 1, size[0] + 2, size[1] + 2)))
    grads = conv2d_backward(y, x, weight, padding=2)
    assert grads.x.shape == x.shape and not host(xp, grads.weight).any()
