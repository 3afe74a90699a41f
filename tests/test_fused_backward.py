"""Gradients of convolutions on tensor cores: every tile edge, every precision, NaN, memory."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import deformable
from deformable import (
    _conv,
    _fused,
    _fused_backward,
    conv2d,
    conv2d_backward,
    deform_conv2d,
    deform_conv2d_backward,
)
from deformable.testing import error_bound
from tests.arrays import on
from tests.conftest import HAVE_GPU, kernels
from tests.test_fused import (
    DEPTHWISE,
    PRECISIONS,
    SHAPES,
    TF32,
    geometry,
    inner_case,
    launched,
    plain,
    random_case,
)

cupy = pytest.importorskip("cupy")

__all__ = ["launched"]  # a fixture

LEAST = {"float16": 2.0**-24}  # between numbers so small that they have fewer bits

BACKWARD = {conv2d: conv2d_backward, deform_conv2d: deform_conv2d_backward}
KERNELS = {
    *("weight_gradient", "column_gradient", "im2col", "offset_gradient", "image_gradient"),
    *("depthwise_weight_gradient", "col2im"),
}


@pytest.fixture(scope="module")
def order():
    with kernels("random"):
        yield


def exactly(arrays):
    return {name: a.astype(np.float64) for name, a in arrays.items()}


def with_gradient(operator, arrays, keywords, seed=7):
    """The arguments of the backward call: a random gradient of the result before all others."""
    y = operator(**exactly(arrays), **keywords)
    grad_y = np.random.default_rng(seed).normal(size=y.shape)
    return {"grad_y": grad_y.astype(arrays["x"].dtype)} | arrays


def magnitudes(operator, arrays, keywords):
    """Of each gradient, the sum of the absolute values of the terms."""
    exact = {k: a if k == "offset" else np.abs(a) for k, a in exactly(arrays).items()}
    sums = BACKWARD[operator](**exact, **keywords)._asdict()
    if "offset" in exact:  # what is moved are differences of the four corners of a cell
        cell = np.floor(exact["offset"])
        mask = exact.pop("mask", np.ones((cell.shape[0], cell.shape[1] // 2, *cell.shape[2:])))
        corners = 0
        for dy, dx in itertools.product((0, 1), repeat=2):
            at = cell.copy()
            at[:, 0::2] += dy
            at[:, 1::2] += dx
            moved = exact | {"offset": at, "mask": mask}
            corners += BACKWARD[operator](**moved, **keywords, wrt="mask").mask
        sums["offset"] = np.repeat(corners * mask, 2, axis=1)
        if sums["mask"] is not None:
            sums["mask"] = corners
    return sums


def check(operator, arrays, keywords, precision="highest", wrt=None):
    """Compare gradients on the GPU with NumPy's in float64; answer them."""
    dtype = arrays["x"].dtype
    with deformable.float32_precision(precision):
        have = BACKWARD[operator](**on(cupy, arrays), **keywords, wrt=wrt)
    want = BACKWARD[operator](**exactly(arrays), **keywords, wrt=wrt)._asdict()
    magnitude = magnitudes(operator, arrays, keywords)
    terms = arrays["weight"].size + arrays["grad_y"].size
    for name, gradient in have._asdict().items():
        assert (gradient is None) == (want[name] is None), name
        if gradient is None:
            continue
        bound = error_bound(arrays[name].dtype, magnitude[name], terms)
        bound = bound + error_bound(dtype, magnitude[name]) + LEAST.get(arrays[name].dtype.name, 0)
        if precision == "high":
            bound = bound + TF32 * magnitude[name]
        assert (gradient.shape, gradient.dtype) == (arrays[name].shape, arrays[name].dtype)
        error = np.abs(gradient.get().astype(np.float64) - want[name])
        worst = np.max(error / np.maximum(bound, np.finfo(np.float64).tiny))
        assert (error <= bound).all(), f"{name}: {worst:.2f} times what is allowed"
    return have


# ---- shapes

# Where a dtype has no code of its own but what loads and rounds, some shapes suffice.
SOME = ["positions fill tiles", "channels end within a load"]


def shapes(*precisions):
    """Every shape for these precisions, some for the others."""
    return [(p, name) for p in PRECISIONS for name in (SHAPES if p in precisions else SOME)]


@pytest.mark.parametrize(("precision", "name"), shapes("float16", "float32"))
def test_gradients_of_a_deformable_convolution_of_any_shape(name, precision, order, launched):
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = random_case(dtype, **SHAPES[name])
    check(deform_conv2d, with_gradient(deform_conv2d, arrays, keywords), keywords, mode)
    assert KERNELS & set(launched) == {"weight_gradient", "column_gradient", "image_gradient"}


@pytest.mark.parametrize(("precision", "name"), shapes("float32"))
def test_gradients_of_a_plain_convolution_of_any_shape(name, precision, order, launched):
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = plain(*random_case(dtype, **SHAPES[name]))
    check(conv2d, with_gradient(conv2d, arrays, keywords), keywords, mode)
    assert KERNELS & set(launched) == {"weight_gradient", "column_gradient", "col2im"}


DEPTHWISE_KERNELS = {
    conv2d: {"depthwise_weight_gradient", "col2im"},
    deform_conv2d: {"depthwise_weight_gradient", "offset_gradient", "image_gradient"},
}


@pytest.mark.parametrize("name", DEPTHWISE)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("operator", BACKWARD)
def test_gradients_with_one_channel_per_group(name, dtype, operator, order, launched):
    arrays, keywords = random_case(dtype, **DEPTHWISE[name])
    if operator is conv2d:
        arrays, keywords = plain(arrays, keywords)
    arrays = with_gradient(operator, arrays, keywords)
    launched.clear()
    check(operator, arrays, keywords)
    assert KERNELS & set(launched) == DEPTHWISE_KERNELS[operator]


@pytest.mark.parametrize("operator", BACKWARD)
def test_gradients_with_one_channel_per_group_are_made_in_pieces(
    operator, order, launched, monkeypatch
):
    """Of positions: of blocks that add up, of samples that are listed at once."""
    monkeypatch.setattr(_fused, "resources", lambda device: (4, 228 << 10))
    monkeypatch.setattr(_conv, "CHUNK_BYTES", 1 << 16)
    sizes = {"c": 4, "groups": 4, "o": 4, "h": 27, "w": 28, "n": 2}
    arrays, keywords = random_case(np.float32, **sizes)
    if operator is conv2d:
        arrays, keywords = plain(arrays, keywords)
    arrays = with_gradient(operator, arrays, keywords)
    launched.clear()
    check(operator, arrays, keywords)
    g = geometry(np.float32, **sizes)
    x = cupy.asarray(arrays["x"])
    o = _fused.operands(x, None, None)
    (parts, _), _ = _fused_backward.depthwise_plan(g, o, 4)
    assert parts == 3 and 3 * 256 < g.batch * g.positions < 6 * 256
    assert (launched.count("image_gradient") > 1) == (operator is deform_conv2d)


@pytest.mark.parametrize("array", ["grad_y", "x"])
@pytest.mark.parametrize("operator", BACKWARD)
def test_arrays_with_one_channel_per_group_may_begin_anywhere(array, operator, order):
    """Channels lie together, but vectors of them are not aligned."""
    arrays, keywords = random_case(np.float32, c=8, o=8, groups=8)
    if operator is conv2d:
        arrays, keywords = plain(arrays, keywords)
    given = on(cupy, with_gradient(operator, arrays, keywords))
    last = given[array].transpose(0, 2, 3, 1)
    memory = cupy.empty(last.size + 1, np.float32)
    memory[1:] = last.ravel()
    moved = given | {array: memory[1:].reshape(last.shape).transpose(0, 3, 1, 2)}
    have = BACKWARD[operator](**moved, **keywords)
    want = BACKWARD[operator](**given, **keywords)
    bound = error_bound(np.float32, np.abs(want.weight.get()).max() * 10)
    for a, b in zip(have, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (np.abs(a.get() - b.get()) <= bound).all()


@pytest.mark.parametrize("channels", [8, 12, 16, 40, 64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_loads_that_check_nothing_stay_within_the_image(channels, precision, order):
    """All corners are pixels, the last one too; channels fill a tile, or end within one."""
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = inner_case(dtype, channels, taps=4)
    check(deform_conv2d, with_gradient(deform_conv2d, arrays, keywords), keywords, mode)


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_slot_may_have_more_samples_than_taps_are_left(precision, order):
    """Of a plain convolution, whose full tiles of positions check nothing else."""
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = plain(*random_case(dtype, c=8, h=16, w=16))
    check(conv2d, with_gradient(conv2d, arrays, keywords), keywords, mode)


# ---- how the work is cut into pieces


@pytest.mark.parametrize("processors", [1, 300])
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_positions_and_taps_may_be_split_among_blocks(
    processors, precision, order, launched, monkeypatch
):
    monkeypatch.setattr(_fused, "resources", lambda device: (processors, 228 << 10))
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = random_case(dtype, n=3, c=32, h=17, w=15, o=12, offset_groups=2)
    arrays = with_gradient(deform_conv2d, arrays, keywords)
    g = geometry(dtype, n=3, c=32, h=17, w=15, o=12, offset_groups=2)
    size, terms = arrays["x"].itemsize, 3 if precision == "float32" else 1
    weights = _fused_backward.weight_variant(g, size, terms, 4, processors, 1 << 20)
    columns = _fused_backward.column_variant(g, size, terms, processors, 3 * 17 * 15)
    assert (weights.parts > 1) == (columns.grid[1] > 1) == (processors > 1)
    check(deform_conv2d, arrays, keywords, mode)


@pytest.mark.parametrize("operator", BACKWARD)
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_little_memory_makes_more_pieces(operator, precision, order, launched, monkeypatch):
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = random_case(dtype, n=3, c=24, h=9, w=8, o=140, offset_groups=3)
    if operator is conv2d:
        arrays, keywords = plain(arrays, keywords)
    arrays = with_gradient(operator, arrays, keywords)
    check(operator, arrays, keywords, mode)
    once = list(launched)
    monkeypatch.setattr(_fused_backward, "WORKSPACE_BYTES", 1 << 16)
    monkeypatch.setattr(_conv, "CHUNK_BYTES", 1 << 16)
    launched.clear()
    check(operator, arrays, keywords, mode)
    for kernel in "weight_gradient", "column_gradient":
        assert launched.count(kernel) > once.count(kernel) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_what_is_asked_for_is_computed(precision, order, launched):
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = random_case(dtype, c=32, offset_groups=2)
    arrays = with_gradient(deform_conv2d, arrays, keywords)
    everything = check(deform_conv2d, arrays, keywords, mode)
    kernels_of = {
        "x": {"column_gradient", "image_gradient"},
        "offset": {"column_gradient"},
        "mask": {"column_gradient"},
        "weight": {"weight_gradient"},
        "bias": set(),
    }
    for name, expected in kernels_of.items():
        launched.clear()
        only = check(deform_conv2d, arrays, keywords, mode, wrt=name)
        assert KERNELS & set(launched) == expected
        assert_array_equal(getattr(only, name).get(), getattr(everything, name).get())


# ---- exactness


@pytest.mark.parametrize(
    ("precision", "groups"), [*((p, 1) for p in PRECISIONS), ("float16", 12), ("float32", 12)]
)
@pytest.mark.parametrize("operator", BACKWARD)
def test_ten_runs_are_bitwise_equal(operator, precision, groups):
    dtype, mode = PRECISIONS[precision]
    sizes = {"c": 32, "o": 12} if groups == 1 else {"c": 12, "o": 12, "groups": 12}
    arrays, keywords = random_case(dtype, n=2, h=9, w=16, offset_groups=2, **sizes)
    if operator is conv2d:
        arrays, keywords = plain(arrays, keywords)
    arrays = on(cupy, with_gradient(operator, arrays, keywords))
    runs = []
    for seed in range(10):
        with kernels("random", seed), deformable.float32_precision(mode):
            runs.append(BACKWARD[operator](**arrays, **keywords))
    assert len({b"".join(a.get().tobytes() for a in run if a is not None) for run in runs}) == 1


@pytest.mark.parametrize("rounded", ["grad_y", "x", "weight"])
def test_tf32_is_the_nearest_one(rounded, order):
    arrays, keywords = random_case(
        np.float32, c=1, o=3, kernel=(1, 1), padding=0, mask=False, bias=False
    )
    arrays = {"grad_y": np.ones((1, 3, 5, 6), np.float32)} | arrays
    arrays["offset"][:] = 0
    arrays["x"][:], arrays["weight"][:] = 1, 1
    arrays[rounded][:] += 0.75 * TF32
    with deformable.float32_precision("high"):
        grad = deform_conv2d_backward(**on(cupy, arrays), **keywords)
    nearest = {name: 1 + TF32 * (name == rounded) for name in ("grad_y", "x", "weight")}
    x, weight = 3 * nearest["grad_y"] * nearest["weight"], 30 * nearest["grad_y"] * nearest["x"]
    assert_array_equal(grad.x.get(), np.full_like(arrays["x"], x))
    assert_array_equal(grad.weight.get(), np.full_like(arrays["weight"], weight))


@pytest.mark.parametrize(
    ("sign", "sizes", "fields"),
    [
        ("any", {"h": 24, "w": 24, "o": 256}, ("x", "offset", "weight", "mask")),
        ("positive", {"h": 4, "w": 8, "o": 1024}, ("x", "weight", "mask")),
    ],
)
def test_float32_is_not_rounded_to_tf32(sign, sizes, fields, order):
    """Sums of thousands of terms, that tensor cores truncate: within 3e-6 of the scale.

    What is truncated of positive terms adds up. Gradients of offsets are differences of such sums.
    """
    arrays, keywords = random_case(np.float32, c=8, **sizes)
    arrays["grad_y"] = with_gradient(deform_conv2d, arrays, keywords)["grad_y"]
    if sign == "positive":
        arrays = {name: a if name == "offset" else np.abs(a) for name, a in arrays.items()}
    exact = deform_conv2d_backward(**exactly(arrays), **keywords)
    names = {"float32": "highest", "tf32": "high"}
    error = {}
    for name, mode in names.items():
        with deformable.float32_precision(mode):
            have = deform_conv2d_backward(**on(cupy, arrays), **keywords)
        error[name] = {
            field: np.abs(getattr(have, field).get() - want).max() / np.abs(want).max()
            for field, want in exact._asdict().items()
        }
    for field in fields:
        assert error["float32"][field] <= 3e-6
        assert 1e-5 <= error["tf32"][field] <= 1e-3


@pytest.mark.parametrize("array", ["grad_y", "x", "weight", "mask", "offset"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("precision", "groups"), [*((p, 2) for p in PRECISIONS), ("float16", 8), ("float32", 8)]
)
def test_nan_and_infinities_go_where_they_go_in_numpy(array, value, precision, groups, order):
    """Also those that 3 products for one would turn into NaN, as inf − inf."""
    dtype, mode = PRECISIONS[precision]
    sizes = {"c": 8, "groups": groups, "offset_groups": 2, "o": 16 if groups == 8 else 6}
    arrays, keywords = random_case(dtype, n=2, h=4, w=4, **sizes)
    arrays = with_gradient(deform_conv2d, arrays, keywords)
    rng = np.random.default_rng(1)
    for _ in range(3):
        arrays[array][tuple(rng.integers(arrays[array].shape))] = value
    with deformable.float32_precision(mode):
        have = deform_conv2d_backward(**on(cupy, arrays), **keywords)
    want = deform_conv2d_backward(**exactly(arrays), **keywords)
    for name in "x", "offset", "weight", "mask":
        a = getattr(have, name).get().astype(np.float64)
        b = getattr(want, name)
        assert_array_equal(np.isnan(a), np.isnan(b), name)
        assert_array_equal(a == np.inf, b == np.inf, name)
        assert_array_equal(a == -np.inf, b == -np.inf, name)


@pytest.mark.parametrize("inside", [True, False])
def test_an_infinity_leaves_other_positions_as_they_are(inside, order, monkeypatch):
    """Also those in blocks that compute a second time, without corrections."""
    monkeypatch.setattr(_fused, "resources", lambda device: (1, 228 << 10))
    sizes = {"c": 16, "h": 8, "w": 11, "o": 40, "kernel": (1, 4), "padding": 0}
    arrays, keywords = inner_case(np.float32, 16, 4) if inside else random_case(np.float32, **sizes)
    arrays = with_gradient(deform_conv2d, arrays, keywords)
    finite = deform_conv2d_backward(**on(cupy, arrays), **keywords)
    arrays["grad_y"][0, 1, 2, 3] = np.inf
    have = deform_conv2d_backward(**on(cupy, arrays), **keywords)
    want = deform_conv2d_backward(**exactly(arrays), **keywords)
    x, untouched = have.x.get(), np.isfinite(want.x)
    assert_array_equal(np.isnan(x), np.isnan(want.x))
    assert_array_equal(x[untouched], finite.x.get()[untouched])
    for name in "offset", "mask":
        a, b = getattr(have, name).get(), getattr(finite, name).get()
        assert not np.isfinite(a[..., 2, 3]).all()
        a[..., 2, 3] = b[..., 2, 3]
        assert_array_equal(a, b)


@pytest.mark.parametrize("axis", [-2, -1])
def test_an_offset_may_have_an_infinite_gradient_along_one_axis_only(axis, order):
    """The image changes its sign along that axis; along the other one it is NaN, as inf − inf."""
    arrays, keywords = inner_case(np.float32, channels=1, taps=1)
    for name in "x", "weight", "mask":
        arrays[name] = np.abs(arrays[name])
    arrays["x"] *= (-1.0) ** np.indices(arrays["x"].shape)[axis]
    arrays = {"grad_y": np.full((1, 8, 8, 8), np.inf, np.float32)} | arrays
    have = deform_conv2d_backward(**on(cupy, arrays), **keywords, wrt="offset").offset.get()
    along, across = have[:, axis % 2 :: 2], have[:, 1 - axis % 2 :: 2]
    assert np.isinf(along).all() and np.isnan(across).all()
    assert_array_equal(have, deform_conv2d_backward(**exactly(arrays), **keywords).offset)


@pytest.mark.parametrize("position", [0, 31])
@pytest.mark.parametrize(("channels", "channel"), [(64, 0), (64, 63), (6, 3)])
def test_a_single_sum_shows_that_there_are_infinities(position, channels, channel, order):
    """The others are infinite; it is NaN, whose factor has no low part: 0 inf."""
    arrays, keywords = plain(
        *random_case(np.float32, c=channels, h=4, w=8, o=1, kernel=(1, 1), padding=0)
    )
    arrays["weight"][0, channel] = np.inf
    grad_y = np.full((1, 1, 4, 8), 1 + 2.0**-20, np.float32)
    grad_y.flat[position] = 1
    grads = conv2d_backward(**on(cupy, {"grad_y": grad_y} | arrays), **keywords, wrt="x")
    assert np.isposinf(grads.x.get()[0, channel]).all()
    assert np.isfinite(np.delete(grads.x.get()[0], channel, 0)).all()


def test_an_infinity_leaves_the_weights_of_other_output_channels_as_they_are(order):
    """In tiles of which all warps compute a second time, without corrections."""
    arrays, keywords = random_case(np.float32, h=4, w=5, o=64)
    arrays = with_gradient(deform_conv2d, arrays, keywords)
    want = deform_conv2d_backward(**on(cupy, arrays), **keywords, wrt="weight").weight.get()
    arrays["grad_y"][0, 1::2, 2, 3] = np.inf
    want[1::2] = deform_conv2d_backward(**exactly(arrays), **keywords, wrt="weight").weight[1::2]
    assert np.isinf(want[1::2]).any(axis=(1, 2, 3)).all()
    have = deform_conv2d_backward(**on(cupy, arrays), **keywords, wrt="weight").weight.get()
    assert_array_equal(have, want)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_outside_is_never_seen(precision, order):
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = random_case(dtype, c=24, h=8, w=8, o=8)
    arrays["offset"][:] = -50
    arrays = with_gradient(deform_conv2d, arrays, keywords)
    arrays["x"][:] = np.inf
    with deformable.float32_precision(mode):
        grads = deform_conv2d_backward(**on(cupy, arrays), **keywords)
    for name in "x", "offset", "weight", "mask":
        assert not getattr(grads, name).get().any(), name


# ---- arrays as they are


@pytest.mark.parametrize(
    ("offset", "mask"),
    [(np.float16, np.float32), (np.float32, np.float64), (np.float64, np.float16)],
)
def test_offsets_and_masks_keep_their_dtypes(offset, mask, order):
    arrays, keywords = random_case(np.float16)
    arrays["offset"] = arrays["offset"].astype(offset)
    arrays["mask"] = arrays["mask"].astype(mask)
    check(deform_conv2d, with_gradient(deform_conv2d, arrays, keywords), keywords)


def test_arrays_are_read_through_any_strides(order):
    arrays, keywords = random_case(np.float32, n=2)
    given = on(cupy, with_gradient(deform_conv2d, arrays, keywords))
    want = deform_conv2d_backward(**given, **keywords)
    given["offset"] = cupy.ascontiguousarray(given["offset"][..., ::-1])[..., ::-1]
    for name in "mask", "weight", "grad_y":
        given[name] = cupy.ascontiguousarray(given[name].transpose(0, 2, 3, 1))
        given[name] = given[name].transpose(0, 3, 1, 2)
    have = deform_conv2d_backward(**given, **keywords)
    for a, b in zip(have, want, strict=True):
        assert_array_equal(a.get(), b.get())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gradient_of_the_result_is_copied_only_if_it_must_be(precision, order):
    dtype, mode = PRECISIONS[precision]
    unit = 16 // np.dtype(dtype).itemsize
    flat = cupy.asarray(np.random.default_rng(0).normal(size=6 * 2 * unit + 1).astype(dtype))
    rows, misaligned = flat[:-1].reshape(6, -1), flat[1:].reshape(6, -1)
    with deformable.float32_precision(mode):
        for groups in 1, 2, 4:
            g = geometry(dtype, c=16, h=2, w=3, o=2 * unit, groups=groups)
            o = _fused.operands(rows, None, None)
            filled = 2 * unit // groups % unit
            packed = _fused_backward.pack_rows(g, o, rows)
            assert (packed is rows) == (not filled and precision != "tf32")
            for given in rows, misaligned:
                packed = _fused_backward.pack_rows(g, o, given).get().reshape(6, groups, -1)
                want = np.zeros((6, groups, unit if filled else 2 * unit // groups), dtype)
                want[..., : 2 * unit // groups] = given.get().reshape(6, groups, -1)
                if precision == "tf32":
                    want = ((want.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)
                    packed = (packed.view(np.uint32) & 0xFFFFE000).view(np.float32)
                assert_array_equal(packed, want)


def test_nan_stays_nan_in_tf32(order):
    """Also one of all bits, whose rounding would be zero."""
    arrays, keywords = plain(*random_case(np.float32, o=4))
    arrays = with_gradient(conv2d, arrays, keywords)
    arrays["grad_y"].view(np.uint32)[0, 2, 3, 4] = 0x7FFFFFFF
    with deformable.float32_precision("high"):
        grads = conv2d_backward(**on(cupy, arrays), **keywords)
    assert np.isnan(grads.weight.get()[2]).all() and np.isnan(grads.x.get()[0, :, 3, 4]).all()
    assert not np.isnan(grads.weight.get()[1]).any()


@pytest.mark.skipif(HAVE_GPU, reason="the substitute counts allocations")
@pytest.mark.parametrize("operator", BACKWARD)
def test_memory_is_bounded_by_the_workspace(operator, monkeypatch):
    """Beside results, an image in float32 and packed weights; columns alone would be more."""
    from tests.simt import substitute

    workspace = 1 << 18
    monkeypatch.setattr(_fused_backward, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(_conv, "CHUNK_BYTES", workspace // 4)
    monkeypatch.setattr(_fused, "resources", lambda device: (300, 228 << 10))
    sizes = {"c": 32, "h": 32, "w": 32, "o": 16, "kernel": (5, 5), "padding": 2}
    arrays, keywords = random_case(np.float16, **sizes)
    if operator is conv2d:
        arrays, keywords = plain(arrays, keywords)
    arrays = on(cupy, with_gradient(operator, arrays, keywords))
    for name in "x", "grad_y":
        last = cupy.ascontiguousarray(arrays[name].transpose(0, 2, 3, 1))
        arrays[name] = last.transpose(0, 3, 1, 2)
    with kernels("forward", races=False):
        BACKWARD[operator](**arrays, **keywords)  # kernels are compiled
        with substitute.memory() as peak:
            grads = BACKWARD[operator](**arrays, **keywords)
    results = sum(a.nbytes for a in grads if a is not None)
    image, cells = 4 * arrays["x"].size, 8 * 33 * 33 + 8
    packed = 2 * arrays["weight"].nbytes + (1 << 12)
    bound = workspace + results + image + packed + cells
    assert 25 * arrays["x"].nbytes > bound, "the bound says nothing"
    assert peak[0] <= bound


# ---- where these kernels are used


@pytest.mark.skipif(HAVE_GPU, reason="needs GPUs of different kinds")
@pytest.mark.parametrize(
    ("capability", "dtype", "groups", "fused"),
    [
        ("75", np.float16, 1, False),
        ("75", np.float32, 1, False),
        ("80", np.float16, 1, True),
        ("120", ml_dtypes.bfloat16, 1, True),
        ("90", np.float64, 1, False),
        ("75", np.float64, 16, None),
    ],
)
def test_kernels_are_chosen_by_gpu_and_dtype(capability, dtype, groups, fused, launched):
    """``fused`` is None where every group has one channel."""
    from tests.simt.settings import configure

    arrays, keywords = random_case(dtype, groups=groups)
    with kernels("forward"), configure(compute_capability=capability):
        check(deform_conv2d, with_gradient(deform_conv2d, arrays, keywords), keywords)
        arrays, keywords = plain(arrays, keywords)
        check(conv2d, with_gradient(conv2d, arrays, keywords), keywords)
    assert ("weight_gradient" in launched) == ("column_gradient" in launched) == (fused is True)
    assert ("im2col" in launched) == (fused is False)
    assert ("depthwise_weight_gradient" in launched) == (fused is None)
