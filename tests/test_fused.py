"""Convolutions forward in one kernel: every tile edge, every precision, NaN and infinities."""

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import deformable
from deformable import _fused, _fused_backward, conv2d, deform_conv2d
from deformable.testing import error_bound
from tests.arrays import on
from tests.conftest import HAVE_GPU, kernels

cupy = pytest.importorskip("cupy")

TF32 = 2.0**-10  # what rounding both factors may change of a product
PRECISIONS = {
    "float16": (np.float16, "highest"),
    "bfloat16": (ml_dtypes.bfloat16, "highest"),
    "tf32": (np.float32, "high"),
    "float32": (np.float32, "highest"),
}


@pytest.fixture(params=["forward"] if HAVE_GPU else ["forward", "reversed"], scope="module")
def order(request):
    with kernels(request.param):
        yield


@pytest.fixture
def launched(monkeypatch):
    """The kernels that have been launched, in their order."""
    names = []
    run = deformable._cuda.Launch.__call__

    def remember(launch, *arrays):
        names.append(launch.name)
        run(launch, *arrays)

    monkeypatch.setattr(deformable._cuda.Launch, "__call__", remember)
    return names


def random_case(
    dtype, *, n=1, c=16, h=5, w=6, o=32, kernel=(3, 3), groups=1, offset_groups=1, stride=1,
    padding=1, dilation=1, mask=True, bias=True, seed=0,
):  # fmt: skip
    """Arrays and keywords of a deformable convolution; offsets reach beyond the image."""
    rng = np.random.default_rng(seed)
    keywords = {
        name: value if isinstance(value, tuple) else (value, value)
        for name, value in {"stride": stride, "padding": padding, "dilation": dilation}.items()
    }
    size = [
        (side + 2 * pad - (step * (taps - 1) + 1)) // skip + 1
        for side, taps, skip, pad, step in zip((h, w), kernel, *keywords.values(), strict=True)
    ]
    samples = offset_groups * kernel[0] * kernel[1]
    arrays = {
        "x": rng.normal(size=(n, c, h, w)),
        "offset": rng.normal(0, 2, (n, 2 * samples, *size)),
        "weight": rng.normal(size=(o, c // groups, *kernel)),
    }
    if bias:
        arrays["bias"] = rng.normal(size=o)
    if mask:
        arrays["mask"] = rng.normal(size=(n, samples, *size))
    return {name: a.astype(dtype) for name, a in arrays.items()}, keywords


def geometry(dtype, **sizes):
    arrays, keywords = random_case(dtype, **sizes)
    names = ("x", "offset", "weight", "bias")
    return deformable.deform_conv._check(
        "", *(arrays[name] for name in names), *keywords.values(), arrays["mask"]
    )[0]


def plain(arrays, keywords):
    """The plain convolution of the same arrays, whose groups cannot be seen from the shapes."""
    groups = arrays["x"].shape[1] // arrays["weight"].shape[1]
    arrays = {name: a for name, a in arrays.items() if name in ("x", "weight", "bias")}
    return arrays, keywords | {"groups": groups}


def check(operator, arrays, keywords, precision="highest"):
    """Compare a call on the GPU with NumPy in float64; answer the result."""
    dtype = arrays["x"].dtype
    with deformable.float32_precision(precision):
        y = operator(**on(cupy, arrays), **keywords).get()
    exact = {name: a.astype(np.float64) for name, a in arrays.items()}
    terms = arrays["weight"][0].size
    magnitude = operator(
        **{k: a if k == "offset" else np.abs(a) for k, a in exact.items()}, **keywords
    )
    bound = error_bound(dtype, magnitude, terms)
    if precision == "high":
        bound = bound + TF32 * magnitude
    assert y.dtype == dtype
    error = np.abs(y.astype(np.float64) - operator(**exact, **keywords))
    assert (error <= bound).all(), f"{(error / bound).max():.2f} times what is allowed"
    return y


# ---- shapes

SHAPES = {
    "positions fill tiles": {"h": 8, "w": 8},
    "one position in the second tile": {"h": 5, "w": 13},
    "fewer positions than a warp has rows": {"h": 2, "w": 2},
    "a tile of several images": {"n": 5, "h": 3, "w": 5},
    "stride and dilation": {
        "h": 11, "w": 12, "stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)
    },
    "one channel": {"c": 1, "o": 3},
    "a step of four samples": {"c": 4, "o": 17},
    "a step of two samples": {"c": 12, "o": 20},
    "channels end within a load": {"c": 7, "o": 7},
    "channels end within a unit": {"c": 30, "o": 31},
    "channels end within a step": {"c": 40, "o": 57},
    "more channels than a tile of columns": {"c": 72, "o": 12},
    "two tiles of output channels": {"c": 8, "o": 130},
    "a last tile with one output channel": {"c": 8, "o": 129, "kernel": (1, 2)},
    "groups": {"c": 24, "groups": 2, "o": 20},
    "offset groups": {"c": 48, "offset_groups": 3, "o": 8},
    "more samples of offset groups than one plan": {"c": 32, "offset_groups": 8, "o": 9},
    "groups and offset groups that straddle": {"c": 48, "groups": 2, "offset_groups": 3, "o": 6},
    "a kernel of one tap": {"kernel": (1, 1), "padding": 0},
    "a kernel of many taps": {"kernel": (5, 7), "c": 8, "h": 7, "w": 8, "padding": 3},
    "neither mask nor bias": {"mask": False, "bias": False},
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_deformable_convolution_of_any_shape(name, precision, order, launched):
    dtype, mode = PRECISIONS[precision]
    check(deform_conv2d, *random_case(dtype, **SHAPES[name]), mode)
    assert "fused_conv" in launched and "im2col" not in launched


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_plain_convolution_of_any_shape(name, precision, order, launched):
    dtype, mode = PRECISIONS[precision]
    check(conv2d, *plain(*random_case(dtype, **SHAPES[name])), mode)
    assert "fused_conv" in launched and "im2col" not in launched


DEPTHWISE = {
    "one output channel for each": {"c": 16, "groups": 16, "o": 16},
    "three output channels for each": {"c": 6, "groups": 6, "o": 18},
    "offset groups": {"c": 24, "groups": 24, "o": 24, "offset_groups": 3, "n": 2},
    "more positions than a tile": {"c": 5, "groups": 5, "o": 5, "h": 9, "w": 8},
    "a kernel of many taps": {"c": 2, "groups": 2, "o": 4, "kernel": (11, 13), "padding": 7},
    "neither mask nor bias": {"c": 8, "groups": 8, "o": 8, "mask": False, "bias": False},
    "more channels than a turn of the lanes": {"c": 264, "groups": 264, "o": 264, "h": 3, "w": 3},
    "one channel more": {"c": 33, "groups": 33, "o": 33, "h": 3, "w": 3},
    "stride and dilation": {
        "c": 4, "groups": 4, "o": 4, "h": 9, "w": 8, "stride": (1, 2), "dilation": (3, 1)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DEPTHWISE)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("operator", [deform_conv2d, conv2d])
def test_depthwise_convolution(name, dtype, operator, order, launched):
    arrays, keywords = random_case(dtype, **DEPTHWISE[name])
    if operator is conv2d:
        arrays, keywords = plain(arrays, keywords)
    check(operator, arrays, keywords)
    assert launched[-1:] == ["depthwise"] and set(launched[:-1]) <= {"arrange"}


def test_depthwise_weights_may_begin_anywhere(order):
    """Those of one tap lie already as the kernel reads them."""
    arrays, keywords = random_case(np.float32, c=8, o=8, groups=8, kernel=(1, 1), padding=0)
    given = on(cupy, arrays)
    memory = cupy.empty(9, np.float32)
    memory[1:] = given["weight"].ravel()
    have = deform_conv2d(**given | {"weight": memory[1:].reshape(8, 1, 1, 1)}, **keywords)
    assert_array_equal(have.get(), deform_conv2d(**given, **keywords).get())


# ---- how a convolution is cut into pieces


@pytest.mark.parametrize("processors", [1, 4, 300])
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_sums_may_be_split_among_blocks(processors, precision, order, launched, monkeypatch):
    """Few processors get tiles of 128 positions, many get parts of the sums."""
    monkeypatch.setattr(_fused, "resources", lambda device: (processors, 228 << 10))
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = random_case(
        dtype, n=3, c=96, h=9, w=5, o=12, kernel=(1, 7), padding=(0, 3), offset_groups=2
    )  # the last part has fewer steps than the others
    check(deform_conv2d, arrays, keywords, mode)
    assert ("add_parts" in launched) == (processors > 1)
    arrays, keywords = plain(arrays, keywords)
    del arrays["bias"]
    check(conv2d, arrays, keywords, mode)


@pytest.mark.parametrize("sizes", [{"c": 24, "offset_groups": 3}, {"c": 40}])
@pytest.mark.parametrize("shared", [48, 64, 100])
def test_plans_fit_into_the_shared_memory(shared, sizes, order, monkeypatch):
    """They are split: the last one has fewer slots, and a part of the sums may begin within one."""
    monkeypatch.setattr(_fused, "resources", lambda device: (4, shared << 10))
    check(deform_conv2d, *random_case(np.float16, o=10, **sizes))


def test_48_kib_of_shared_memory_are_too_much_without_leave(order, monkeypatch):
    """Static arrays come on top of them."""
    resources = 132, 228 << 10
    monkeypatch.setattr(_fused, "resources", lambda device: resources)
    sizes = {"c": 32, "kernel": (2, 11), "padding": (1, 5)}
    assert _fused.variant(geometry(np.float16, **sizes), 2, 1, 4, *resources).shared == 48 << 10
    check(deform_conv2d, *random_case(np.float16, **sizes))


@pytest.mark.parametrize("sizes", [{}, {"c": 256, "o": 512, "n": 8}, {"c": 4, "groups": 2}])
@pytest.mark.parametrize("shared", [100 << 10, 164 << 10, 228 << 10])
def test_the_blocks_of_a_multiprocessor_share_its_memory(sizes, shared):
    g = geometry(np.float32, **{"h": 30, "w": 20} | sizes)
    for terms in 1, 3:
        v = _fused.variant(g, 4, terms, 4, 132, shared)
        blocks = _fused.WARPS // v.warps if shared >= 164 << 10 else 1
        outputs, reserved = 12 * 32 * v.warps, 1 << 10
        assert blocks * (v.shared + outputs + reserved) <= shared
        assert v.layout.planned >= min(v.layout.slots, _fused.LEAST_PLANNED)


@pytest.mark.parametrize("sizes", [{}, {"c": 512, "o": 256}, {"c": 256, "groups": 8, "n": 3}])
@pytest.mark.parametrize("processors", [1, 16, 132])
def test_split_sums_take_no_more_than_the_tiles_of_resident_blocks(sizes, processors):
    g = geometry(np.float16, **{"h": 20, "w": 20} | sizes)
    for terms, itemsize in (1, 2), (3, 4):
        v = _fused.variant(g, itemsize, terms, 4, processors, 228 << 10)
        parts = v.grid[2]
        sums = parts * g.batch * g.positions * g.out_channels * 4
        assert parts == 1 or sums <= processors * 128 << 10
        assert parts == 1 or processors > 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_is_fetched_that_was_never_written(precision, order):
    """The step behind the last one, which is never used, is: of forward and of backward."""
    dtype, mode = PRECISIONS[precision]
    arrays, _ = random_case(dtype, c=8, o=20, groups=2)
    g, arrays = geometry(dtype, c=8, o=20, groups=2), on(cupy, arrays)
    x, weight = arrays["x"], arrays["weight"]
    with deformable.float32_precision(mode):
        o = _fused.operands(x, arrays["offset"], arrays["mask"])
        plan = _fused.product_plan(g, o, _fused.view(weight))
        forward = cupy.full(plan.packed, 0xFFFFFFFF, np.uint32)
        plan.pack_weights(weight, forward, cupy.empty(plan.samples, np.int32))
        backward = _fused_backward.pack_weights(g, o, weight)
    size = o.dtype.itemsize
    stages = (
        (_fused.variant(g, size, o.terms, 4, o.multiprocessors, o.shared).stage, forward),
        (_fused_backward.column_variant(g, size, o.terms, o.multiprocessors, 0).stage, backward),
    )
    for stage, packed in stages:
        assert not packed[-stage:].get().any() and packed[-2 * stage : -stage].get().any()


# ---- exactness


@pytest.mark.parametrize("precision", PRECISIONS)
def test_offsets_of_zero_change_nothing(precision, order):
    """The same products in the same order: not one bit."""
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = random_case(dtype, c=24, groups=2, mask=False)
    arrays["offset"][:] = 0
    with deformable.float32_precision(mode):
        have = deform_conv2d(**on(cupy, arrays), **keywords)
        arrays, keywords = plain(arrays, keywords)
        assert_array_equal(have.get(), conv2d(**on(cupy, arrays), **keywords).get())


@pytest.mark.parametrize("processors", [4, 300])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_ten_runs_are_bitwise_equal(processors, precision, monkeypatch):
    monkeypatch.setattr(_fused, "resources", lambda device: (processors, 228 << 10))
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = random_case(dtype, c=64, o=12)
    arrays = on(cupy, arrays)
    results = set()
    for seed in range(10):
        with kernels("random", seed), deformable.float32_precision(mode):
            results.add(deform_conv2d(**arrays, **keywords).get().tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("sign", ["any", "positive"])
def test_float32_is_not_rounded_to_tf32(sign, order, monkeypatch):
    """K = 4608, sums that tensor cores truncate: within 3e-6 of the scale, as float32 sums.

    What is truncated of positive terms adds up.
    """
    monkeypatch.setattr(_fused, "resources", lambda device: (1, 228 << 10))
    arrays, keywords = random_case(np.float32, c=512, h=4, w=8, o=32)
    if sign == "positive":
        arrays = {name: np.abs(a) for name, a in arrays.items()}
    exact = deform_conv2d(**{k: a.astype(np.float64) for k, a in arrays.items()}, **keywords)
    scale = np.abs(exact).max()

    def error(y):
        return np.abs(y - exact).max() / scale

    y = deform_conv2d(**on(cupy, arrays), **keywords).get()
    taps = np.tile(np.eye(9, dtype=np.float32).reshape(9, 1, 3, 3), (512, 1, 1, 1))
    columns = deform_conv2d(**arrays | {"weight": taps, "bias": None}, **keywords)[0]
    naive = np.broadcast_to(arrays["bias"][:, None, None], y.shape[1:])
    for weight, column in zip(arrays["weight"].reshape(32, 4608).T, columns, strict=True):
        naive = naive + weight[:, None, None] * column
    assert error(y) <= min(3e-6, error(naive))
    with deformable.float32_precision("high"):
        rounded = deform_conv2d(**on(cupy, arrays), **keywords).get()
    assert 1e-5 <= error(rounded) <= 1e-3


@pytest.mark.parametrize("rounded", ["x", "weight"])
@pytest.mark.parametrize("operator", [deform_conv2d, conv2d])
def test_tf32_is_the_nearest_one(operator, rounded, order):
    arrays, keywords = random_case(
        np.float32, c=1, o=1, kernel=(1, 1), padding=0, mask=False, bias=False
    )
    arrays["offset"][:] = 0
    arrays["x"][:], arrays["weight"][:] = 1, 1
    arrays[rounded][:] += 0.75 * TF32
    if operator is conv2d:
        arrays, keywords = plain(arrays, keywords)
    with deformable.float32_precision("high"):
        y = operator(**on(cupy, arrays), **keywords).get()
    assert_array_equal(y, np.full_like(y, 1 + TF32))


@pytest.mark.parametrize("array", ["x", "weight", "mask", "offset", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_and_infinities_go_where_they_go_in_numpy(array, value, precision, order):
    """Also those that 3 products for one would turn into NaN, as inf − inf."""
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = random_case(dtype, n=2, c=8, groups=2, offset_groups=2, o=6, h=4, w=4)
    rng = np.random.default_rng(1)
    for _ in range(3):
        arrays[array][tuple(rng.integers(arrays[array].shape))] = value
    with deformable.float32_precision(mode):
        have = deform_conv2d(**on(cupy, arrays), **keywords).get().astype(np.float64)
    want = deform_conv2d(**{k: a.astype(np.float64) for k, a in arrays.items()}, **keywords)
    assert array == "bias" or np.isfinite(want).any()
    assert (np.isfinite(value) or array == "offset") or not np.isfinite(want).all()
    assert_array_equal(np.isnan(have), np.isnan(want))
    assert_array_equal(have == np.inf, want == np.inf)
    assert_array_equal(have == -np.inf, want == -np.inf)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_outside_is_never_seen(precision, order):
    dtype, mode = PRECISIONS[precision]
    arrays, keywords = random_case(dtype, c=20, o=8)
    arrays["x"][:] = np.inf
    arrays["offset"][:] = -50
    with deformable.float32_precision(mode):
        y = deform_conv2d(**on(cupy, arrays), **keywords).get()
    assert_array_equal(y, np.broadcast_to(arrays["bias"][:, None, None], y.shape[1:])[None])


# ---- arrays as they are


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_offsets_and_masks_keep_their_dtypes(kind, order):
    arrays, keywords = random_case(np.float16)
    arrays["offset"] = arrays["offset"].astype(kind)
    arrays["mask"] = arrays["mask"].astype(np.float32)
    check(deform_conv2d, arrays, keywords)


def test_offsets_masks_and_weights_are_read_through_any_strides(order):
    arrays, keywords = random_case(np.float32, n=2)
    given = on(cupy, arrays)
    want = deform_conv2d(**given, **keywords).get()
    given["offset"] = cupy.ascontiguousarray(given["offset"][..., ::-1])[..., ::-1]
    for name in "mask", "weight":
        given[name] = cupy.ascontiguousarray(given[name].transpose(0, 2, 3, 1))
        given[name] = given[name].transpose(0, 3, 1, 2)
    assert_array_equal(deform_conv2d(**given, **keywords).get(), want)
    given["offset"] = cupy.broadcast_to(given["offset"][:, :, :1, :1], given["offset"].shape)
    copy = given | {"offset": given["offset"].copy()}
    assert_array_equal(
        deform_conv2d(**given, **keywords).get(), deform_conv2d(**copy, **keywords).get()
    )


def test_the_image_of_the_next_pixel_is_not_touched(order):
    """A channels-last view between NaN: loads of 16 bytes end where the channels end."""
    arrays, keywords = random_case(np.float16, c=10, o=8)
    want = deform_conv2d(**on(cupy, arrays), **keywords).get()
    wide = cupy.full((1, 5, 6, 12), np.nan, np.float16)
    wide[..., :10] = cupy.asarray(arrays["x"].transpose(0, 2, 3, 1))
    given = on(cupy, arrays) | {"x": wide[..., :10].transpose(0, 3, 1, 2)}
    assert_array_equal(deform_conv2d(**given, **keywords).get(), want)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_output_channels_of_a_group_begin_anywhere(dtype, order):
    """Lines have a multiple of 16 bytes, but stores of so many would not be aligned."""
    check(deform_conv2d, *random_case(dtype, c=96, groups=8, o=72))


def inner_case(dtype, channels, taps):
    """A case of 8 x 8 positions whose corners are all pixels, up to the last one."""
    arrays, keywords = random_case(
        dtype, c=channels, h=8, w=7 + taps, o=8, kernel=(1, taps), padding=0
    )
    y, x = np.indices((8, 8))
    arrays["offset"][:, 0::2] = np.where(y < 7, 0.5, -0.5)
    arrays["offset"][:, 1::2] = np.where(x < 7, 0.5, taps - 1.5) - np.arange(taps)[:, None, None]
    return arrays, keywords


@pytest.mark.parametrize("channels", [4, 7, 12, 30, 40, 64])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_loads_that_check_nothing_stay_within_the_image(channels, dtype, order):
    """All corners are pixels, the last one too; channels end within a load, a unit or a step."""
    check(deform_conv2d, *inner_case(dtype, channels, taps=4))


def test_parts_that_begin_within_a_plan_know_what_lies_inside(order, monkeypatch):
    monkeypatch.setattr(_fused, "resources", lambda device: (300, 228 << 10))
    arrays, keywords = inner_case(np.float32, 96, taps=7)
    arrays["offset"][:, 2::6] = 50  # every third tap is outside
    check(deform_conv2d, arrays, keywords)


@pytest.mark.skipif(HAVE_GPU, reason="the substitute counts allocations")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("processors", [1, 300])
def test_memory_is_packed_weights_and_parts_of_split_sums(dtype, processors, monkeypatch):
    from tests.simt import substitute

    monkeypatch.setattr(_fused, "resources", lambda device: (processors, 228 << 10))
    arrays, keywords = random_case(dtype, c=64, h=20, w=20)
    given = on(cupy, arrays)
    given["x"] = cupy.ascontiguousarray(given["x"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    with kernels("forward"):
        deform_conv2d(**given, **keywords)  # kernels are compiled
        with substitute.memory() as peak:
            y = deform_conv2d(**given, **keywords)
    size, steps = arrays["x"].itemsize, 9 * arrays["x"].itemsize
    packed = arrays["weight"].size * size * (2 if dtype == np.float32 else 1) * (steps + 1) // steps
    samples = 9 * 16
    parts = steps // _fused.LEAST_STEPS if processors == 300 else 0
    assert peak[0] <= y.nbytes + packed + samples + parts * y.size * 4


# ---- where these kernels are used


@pytest.mark.skipif(HAVE_GPU, reason="needs GPUs of different kinds")
@pytest.mark.parametrize(
    ("capability", "dtype", "groups", "used"),
    [
        ("75", np.float16, 1, "im2col"),
        ("80", np.float16, 1, "fused_conv"),
        ("120", np.float32, 1, "fused_conv"),
        ("90", np.float64, 1, "im2col"),
        ("75", np.float64, 16, "depthwise"),
    ],
)
def test_kernels_are_chosen_by_gpu_and_dtype(capability, dtype, groups, used, launched):
    from tests.simt.settings import configure

    arrays, keywords = random_case(dtype, groups=groups)
    with kernels("forward"), configure(compute_capability=capability):
        check(deform_conv2d, arrays, keywords)
        check(conv2d, *plain(arrays, keywords))
    chosen = {"im2col", "fused_conv", "depthwise"} & set(launched)
    assert chosen == {used}


def test_what_counts_beyond_int_is_left_to_other_kernels():
    x = cupy.empty((1, 16, 1, 1), np.float16)
    small = geometry(np.float16)
    assert _fused.covers(small, x)
    assert not _fused.covers(small._replace(batch=1 << 30), x)
    assert not _fused.covers(small._replace(height=1 << 28, offset_groups=16), x)
    assert not _fused.covers(small._replace(out_channels=1 << 17), x)
    depthwise = small._replace(groups=16)
    assert _fused.covers(depthwise, x)
    assert not _fused.covers(depthwise._replace(out_channels=1 << 21), x)
    assert not _fused.covers(
        depthwise._replace(channels=1 << 20, groups=1 << 20, out_channels=1 << 28), x
    )
    assert not _fused.covers(depthwise._replace(kernel_h=1000, kernel_w=2), x)
