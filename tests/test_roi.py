"""What holds for every RoI operator, on both array libraries."""

import tracemalloc
from inspect import signature

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import deformable
from deformable import _cuda, _roi
from deformable._array import compute_dtype
from deformable.deform_roi_pool import INCLUSIVE
from deformable.roi_align import ALIGNED, UNALIGNED
from deformable.roi_pool import CELLS, PIXELS
from deformable.testing import check_backward, error_bound
from tests import reference_roi as reference
from tests.arrays import host, on
from tests.conftest import HAVE_GPU, kernels
from tests.roi_cases import AVERAGES, DEFORMABLE, NAMES, functions, random_case
from tests.test_deform_conv import LAYOUTS, with_strides


def gradients(name, grad_y, arrays, keywords, **more):
    """The gradients of an operator by the names of its arrays."""
    return functions(name)[1](grad_y, **arrays, **keywords, **more)._asdict()


def assert_equal_up_to(bound, have, want):
    assert have.shape == want.shape
    assert np.abs(have - want).max(initial=0) <= bound * max(1, np.abs(want).max(initial=0))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_definition(name, seed, xp):
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case(name, rng)
    y = host(xp, functions(name)[0](**on(xp, arrays), **keywords))
    assert_equal_up_to(1e-13, y, reference.pool(name, **arrays, **keywords))
    grad_y = rng.normal(size=y.shape)
    have = gradients(name, xp.asarray(grad_y), on(xp, arrays), keywords)
    for key, want in reference.pool_backward(name, grad_y, **arrays, **keywords).items():
        assert_equal_up_to(1e-12, host(xp, have[key]), want)


def near_a_kink(name, arrays, keywords):
    """Whether a step of a difference quotient might carry a sample over a grid line."""
    for b in reference.bins_of(
        name, **{k: v for k, v in (arrays | keywords).items() if k != "mask"}
    )[0]:
        at = np.array([*b.y, *b.x]) / (0.5 if b.margin == 0.5 else 1)
        if (np.abs(at - np.rint(at)) < 1e-4).any():
            return True
    return False


@pytest.mark.parametrize("seed", range(200))
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_random_configurations(name, seed):
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case(name, rng)
    while name in DEFORMABLE:
        arrays, keywords = random_case(name, rng, k=2)
        arrays["offset"] = rng.uniform(-2, 2, arrays["offset"].shape)
        if not near_a_kink(name, arrays, keywords):
            break
    check_backward(*functions(name), [], arrays | keywords, rng=rng)


@pytest.mark.parametrize("position", [-0.5, 0.0, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("name", DEFORMABLE)
def test_derivatives_on_grid_lines_are_right_hand_ones(name, position, xp):
    """On the last pixel, from where a sample is clamped, they are 0."""
    x = xp.asarray(np.random.default_rng(0).normal(size=(1, 2, 5, 5)))
    keywords = {"output_size": 1, "sampling_ratio": 1, "gamma": 0.5}
    # a RoI of size 2: offsets are pixels
    if name == "deform_roi_pool":
        rois, first = xp.asarray(np.array([[0, 0.5, 0.5, 2.5, 2.5]])), 1.0
    else:
        rois, first = xp.asarray(np.array([[0.0, 1, 1, 2, 2]])), 0.5
    offset = xp.full((1, 2, 1, 1), position - first)
    forward, backward = functions(name)
    check_backward(
        forward, backward, [x, rois, offset], keywords,
        rng=np.random.default_rng(1), wrt=["offset"], one_sided=True,
    )  # fmt: skip
    grad = host(
        xp, backward(forward(x, rois, offset, **keywords), x, rois, offset, **keywords).offset
    )
    assert grad.all() == (0 <= position < 4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", AVERAGES)
def test_backward_is_the_adjoint(name, seed, xp):
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case(name, rng)
    y = host(xp, functions(name)[0](**on(xp, arrays), **keywords))
    grad_y = rng.normal(size=y.shape)
    grad_x = host(xp, gradients(name, xp.asarray(grad_y), on(xp, arrays), keywords, wrt="x")["x"])
    terms = np.abs(y * grad_y).sum() + np.abs(grad_x * arrays["x"]).sum()
    assert abs((y * grad_y).sum() - (grad_x * arrays["x"]).sum()) <= 1e-12 * max(1, terms)


@pytest.mark.parametrize("name", NAMES)
def test_bins_of_a_constant_image_are_constant(name, xp):
    x = xp.full((1, 36, 20, 20), 3.0)
    rois = xp.asarray(np.array([[0.0, 2, 3, 15, 12], [0, 4.5, 5.25, 9.75, 17]]))
    arguments = (x, rois, None) if name in DEFORMABLE else (x, rois)
    y = host(xp, functions(name)[0](*arguments, 3))
    assert np.abs(y - 3).max() <= 1e-14 * 9


@pytest.mark.parametrize("name", NAMES)
def test_each_image_has_its_own_rois(name, xp):
    """Any number of images, in any order of the RoIs, and images without RoIs."""
    rng = np.random.default_rng(0)
    for n in (0, 1, 31, 33, 257):
        arrays, keywords = random_case(name, rng, n=n, k=n, height=3, width=2, mask=True)
        arrays["rois"][:, 0] = rng.integers(0, max(n // 2, 1), n)  # one half has none
        y = functions(name)[0](**on(xp, arrays), **keywords)
        grad_y = xp.asarray(rng.normal(size=y.shape))
        grads = gradients(name, grad_y, on(xp, arrays), keywords)
        assert y.shape[0] == n
        for key, grad in grads.items():
            assert grad is None or grad.shape == arrays[key].shape
        for image in {0, n // 4, n // 2} if n else ():
            mine = arrays["rois"][:, 0] == image
            one = {key: a[mine] for key, a in arrays.items() if key != "x"}
            one["rois"][:, 0] = 0
            one["x"] = arrays["x"][image : image + 1]
            assert_equal_up_to(
                1e-13, host(xp, functions(name)[0](**on(xp, one), **keywords)), host(xp, y)[mine]
            )
            its_grad_y = xp.asarray(host(xp, grad_y)[mine])
            its = gradients(name, its_grad_y, on(xp, one), keywords)
            for key, grad in its.items():
                if grad is not None:
                    own = host(xp, grads[key])
                    own = own[image : image + 1] if key == "x" else own[mine]
                    assert_equal_up_to(1e-12, host(xp, grad), own)


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_go_through_many_rois_and_tiles_of_pixels(name, offsets, xp):
    """More RoIs of one image, and more bins near a tile, than a block has threads."""
    if xp is np or (offsets and name not in DEFORMABLE):
        pytest.skip("no kernels, or no offsets")
    rng = np.random.default_rng(17)
    arrays, keywords = random_case(
        name, rng, n=3, k=300, depth=2, classes=2, height=33, width=17, output_size=(3, 2),
        part=(2, 2), spatial_scale=1.0, mask=True,
    )  # fmt: skip
    arrays["rois"][:, 0] = rng.choice([0, 2], 300, p=[0.05, 0.95])
    if name in DEFORMABLE and not offsets:
        arrays["offset"] = None
    given = {key: a if a is None else xp.asarray(a) for key, a in arrays.items()}
    y = functions(name)[0](**arrays, **keywords)
    assert_equal_up_to(1e-13, host(xp, functions(name)[0](**given, **keywords)), y)
    want = gradients(name, y, arrays, keywords)
    for key, grad in gradients(name, xp.asarray(y), given, keywords).items():
        if grad is not None:
            assert_equal_up_to(1e-12, host(xp, grad), want[key])


LIST_HITS = """
extern "C" __global__ void __launch_bounds__(256)
    list_hits(const Run* runs, const int* order, const Reach* reaches, int* times,
              const RoIGeometry g) {
  __shared__ List<int> near;
  __shared__ List<Hit> hits;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for_bins_that_see(pixel_tile(g), g, runs, {order, reaches}, near, hits, [&](int found) {
    for (int i = thread; i < found; i += threads) ++times[blockIdx.x * g.rows() + hits.item[i].row];
  });
}
"""


@pytest.mark.parametrize("size", [(70, 5), (5, 70), (64, 16)])
@pytest.mark.parametrize("offsets", [True, False])
def test_every_bin_is_listed_in_the_tiles_that_it_sees_alone(offsets, size, xp, monkeypatch):
    if xp is np:
        pytest.skip("has no tiles")
    rng, k, rows, columns = np.random.default_rng(22), 40, 32, _roi.TILE_WIDTH
    corners = rng.integers(-8, np.array(size[::-1]) + 4, (k, 2))
    images = np.sort(rng.integers(0, 2, (k, 1)), axis=0)
    rois = np.concatenate([images, corners, corners + rng.integers(1, 12, (k, 2))], axis=1) * 1.0
    x = np.empty((2, 6, *size))
    g = _roi.roi_geometry("a test", x, rois, (2, 3), 1.0, group_size=(1, 3), gamma=1.0)
    offset = rng.integers(-2, 3, (k, 4, 1, 1)) / 4 if offsets else None
    g = g._replace(classes=2, part_h=1, part_w=1) if offsets else g

    at = _roi.make_bins(g, ALIGNED, _roi.boxes("a test", g, ALIGNED, rois), offset)
    seen, matters = [], np.ones(g.rows, bool)
    for number, pixels, length in (at.run_y, g.height, rows), (at.run_x, g.width, columns):
        tile = np.arange(0, pixels, length)[:, None]
        first, count = at.runs.pixel[number], at.runs.pixels[number]
        seen.append((first < tile + length) & (first + count > tile))
        matters &= count > 0
    of_image = at.image == np.arange(2)[:, None, None, None, None]
    of_plane = at.plane == np.arange(g.planes)[:, None]
    want = of_image & seen[0][:, None, None] & seen[1][:, None] & of_plane

    plan = _roi.make_plan(
        g, ALIGNED, xp.asarray(rois), offset if offset is None else xp.asarray(offset)
    )
    starts = np.searchsorted(images.ravel(), np.arange(3))
    order = xp.asarray(np.concatenate((np.arange(k), starts)).astype(np.int32))
    times = xp.zeros(want.shape, np.int32)
    text = _cuda.source("roi_gather.cuh") + LIST_HITS
    monkeypatch.setattr(_cuda, "source", lambda file: text)
    launch = _cuda.Launch(
        "a test", "list_hits", (want.size // g.rows,), (8, rows), g,
        **_roi.macros(g, np.dtype(np.float32), rows=rows),
    )  # fmt: skip
    launch(plan.runs, order, plan.reaches, times)
    assert_array_equal(host(xp, times)[..., matters], want[..., matters])


@pytest.mark.parametrize("depth", [34, 70])
@pytest.mark.parametrize("name", [*NAMES, "largest"])
def test_kernels_share_channels_among_whole_warps(name, depth, xp):
    """32 lanes, some without channels, and lanes that take a second turn."""
    if xp is np:
        pytest.skip("is what kernels are compared with")
    mode = {"mode": "max"} if name == "largest" else {}
    name, rng = "roi_align" if mode else name, np.random.default_rng(21)
    arrays, keywords = random_case(
        name, rng, n=1, k=4, depth=depth, classes=1, height=7, width=6, output_size=(2, 2),
        part=(2, 2), mask=True,
    )  # fmt: skip
    keywords |= mode
    y = functions(name)[0](**arrays, **keywords)
    assert_equal_up_to(1e-13, host(xp, functions(name)[0](**on(xp, arrays), **keywords)), y)
    want = gradients(name, y, arrays, keywords)
    for key, grad in gradients(name, xp.asarray(y), on(xp, arrays), keywords).items():
        if grad is not None:
            assert_equal_up_to(1e-12, host(xp, grad), want[key])


@pytest.mark.parametrize("name", NAMES)
def test_ten_runs_are_bitwise_equal(name, xp):
    rng = np.random.default_rng(1)
    arrays, keywords = random_case(name, rng, k=40, depth=3, mask=True)
    arrays = on(xp, {key: a.astype(np.float32) for key, a in arrays.items()})
    y = functions(name)[0](**arrays, **keywords)
    first = gradients(name, y, arrays, keywords)
    for _ in range(9):
        again = gradients(name, y, arrays, keywords)
        assert host(xp, functions(name)[0](**arrays, **keywords)).tobytes() == host(xp, y).tobytes()
        for key, grad in again.items():
            assert grad is None or host(xp, grad).tobytes() == host(xp, first[key]).tobytes()


@pytest.mark.skipif(HAVE_GPU, reason="a GPU chooses the order of its threads itself")
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("name", NAMES)
def test_ten_orders_of_threads_give_the_same_bits(name, mode):
    """Of RoIs that share pixels, bins that share offsets, and lanes that share sums."""
    if mode == "max" and name != "roi_align":
        pytest.skip("has no other mode")
    from tests.simt.settings import configure

    rng = np.random.default_rng(19)
    arrays, keywords = random_case(
        name, rng, n=2, k=12, depth=10, classes=1, height=12, width=10, output_size=(2, 2),
        part=(1, 2), spatial_scale=1.0, mask=True,
    )  # fmt: skip
    if name == "roi_align":
        keywords["mode"] = mode
    results = set()
    with kernels("random"):
        import cupy

        for seed in range(10):
            with configure(order="random", seed=seed):
                given = on(cupy, {key: a.astype(np.float32) for key, a in arrays.items()})
                y = functions(name)[0](**given, **keywords)
                grads = gradients(name, y, given, keywords)
            grads = [host(cupy, g).tobytes() for g in (y, *grads.values()) if g is not None]
            results.add(tuple(grads))
    assert len(results) == 1


@pytest.mark.parametrize("limit", ["BLOCK_BYTES", "INT32_MAX"])
@pytest.mark.parametrize("name", NAMES)
def test_results_of_numpy_do_not_depend_on_limits(name, limit, monkeypatch):
    """Small blocks; and 64-bit indices, as for arrays of more than 2^31 elements."""
    rng = np.random.default_rng(2)
    arrays, keywords = random_case(name, rng, k=9, mask=True)
    y = functions(name)[0](**arrays, **keywords)
    want = gradients(name, y, arrays, keywords)
    monkeypatch.setattr(_roi, limit, 1)
    assert_array_equal(functions(name)[0](**arrays, **keywords), y)
    for key, grad in gradients(name, y, arrays, keywords).items():
        if grad is not None:
            assert_equal_up_to(1e-13, grad, want[key])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_any_memory_order_gives_the_same(name, layout, xp):
    rng = np.random.default_rng(3)
    arrays, keywords = random_case(name, rng, mask=True)
    want = host(xp, functions(name)[0](**on(xp, arrays), **keywords))
    arrays["grad_y"] = rng.normal(size=want.shape)
    grad_y = xp.asarray(arrays["grad_y"])
    plain = {key: a for key, a in arrays.items() if key != "grad_y"}
    want_grads = gradients(name, grad_y, on(xp, plain), keywords)
    lay = LAYOUTS[layout]
    given = {key: lay(a) if a.ndim == 4 else a[::-1][::-1] for key, a in arrays.items()}
    if xp is not np:
        given = {key: with_strides(xp, a) for key, a in given.items()}
    before = {key: host(xp, a).copy() for key, a in given.items()}
    grad_y = given.pop("grad_y")
    assert_array_equal(host(xp, functions(name)[0](**given, **keywords)), want)
    for key, grad in gradients(name, grad_y, given, keywords).items():
        if grad is not None:
            assert_array_equal(host(xp, grad), host(xp, want_grads[key]))
            assert_array_equal(host(xp, given[key]), before[key])


NUMBERS = ["start", "extent", "total", "phase", "rate", "first", "inner", "outer", "end"]
INTEGERS = ["pixel", "pixels", "backwards"]
RUN = np.dtype({"names": NUMBERS + INTEGERS, "formats": ["f8"] * 9 + ["i4"] * 3}, align=True)
RULES = {
    "unaligned": (UNALIGNED, False),
    "aligned": (ALIGNED, False),
    "aligned, shifted": (ALIGNED, True),
    "cells": (CELLS, False),
    "pixels": (PIXELS, False),
    "inclusive": (INCLUSIVE, False),
    "inclusive, shifted": (INCLUSIVE, True),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", RULES)
def test_kernels_look_where_numpy_does(rule, seed, xp):
    """At no pixel more, even where it weighs nothing."""
    if xp is np:
        pytest.skip("is what kernels are compared with")
    rng, (rule, offsets) = np.random.default_rng(seed), RULES[rule]
    arrays, keywords = random_case(
        "deform_ps_roi_pool", rng, k=8, height=[5, 40][seed % 2], width=[37, 7][seed % 2],
        output_size=(20, 14) if seed == 3 else (3, 2),  # more runs than a block has threads
        sampling_ratio=(rng.integers(-1, 4), 2), mask=False,
    )  # fmt: skip
    rois, offset = arrays["rois"], arrays["offset"] if offsets else None
    keywords["group_size"] = 1
    g = _roi.roi_geometry("a test", arrays["x"], rois, **keywords)
    if offsets:
        part_h, part_w = offset.shape[2:]
        g = g._replace(classes=offset.shape[1] // 2, part_h=part_h, part_w=part_w)
    check_plan(xp, g, rule, rois, offset)


def test_samples_of_a_roi_that_ends_before_it_begins_lie_where_the_definition_says(xp):
    """On the border, the last bit of their positions decides which of them count."""
    rng, k, size = np.random.default_rng(24), 100, np.array([4, 3])
    border = np.where(rng.random((k, 2)) < 0.5, -1, size)
    length = -rng.integers(1, 400, (k, 2)) / 4
    bin_, sample = rng.integers(0, 3, (2, k, 2))
    first = border - (bin_ + (sample + 0.5) / 3) * length / 3 + 0.5
    rois = np.concatenate([np.zeros((k, 1)), first, first + length], axis=1)
    arrays = {"x": rng.normal(size=(1, 1, *size[::-1])), "rois": rois}
    keywords = {"output_size": 3, "spatial_scale": 1.0, "sampling_ratio": 3, "aligned": True}
    y = host(xp, deformable.roi_align(**on(xp, arrays), **keywords))
    pairs = {"output_size": (3, 3), "sampling_ratio": (3, 3), "mode": "avg"}
    want = reference.pool("roi_align", **arrays, **keywords | pairs)
    assert_equal_up_to(1e-13, y, want)


def test_kernels_count_samples_next_to_the_border_as_numpy_does(xp):
    """They lie on the border but for rounding errors, which are largest far from the origin."""
    if xp is np:
        pytest.skip("is what kernels are compared with")
    rng, k = np.random.default_rng(23), 200
    size = np.array([1 << 20, 1 << 10])
    border = rng.choice([-1, 0, 1], (k, 2))
    border = np.where(border == 1, size - rng.integers(0, 2, (k, 2)), border)
    length = 10 ** rng.uniform(-6, 2, (k, 2))
    first = border - (rng.integers(0, 3, (k, 2)) + 0.5) * length / 3
    rois = np.concatenate([np.zeros((k, 1)), first, first + length], axis=1)
    x = np.broadcast_to(0.0, (1, 1, *size[::-1]))
    g = _roi.roi_geometry("a test", x, rois, 1, 1.0, sampling_ratio=3)
    check_plan(xp, g, ALIGNED._replace(shift=0.0), rois, None)


def check_plan(xp, g, rule, rois, offset):
    box = _roi.boxes("a test", g, rule, rois)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = _roi.make_bins(g, rule, box, offset)
    given = xp.asarray(rois), offset if offset is None else xp.asarray(offset)
    plan = _roi.make_plan(g, rule, *given, np.dtype(np.float64))

    runs = host(xp, plan.runs).view(RUN).ravel()
    for name in set(RUN.names) - {"rate", "pixel"}:
        assert_array_equal(runs[name], getattr(at.runs, name))
    sees = at.runs.pixels > 0
    assert_array_equal(runs["pixel"][sees], at.runs.pixel[sees])
    assert_array_equal(host(xp, plan.images), box.image)

    first, end = at.runs.pixel, at.runs.pixel + at.runs.pixels
    reaches = host(xp, plan.reaches)
    for roi in range(g.rois):
        for column, number, size in (0, at.run_y, g.height), (2, at.run_x, g.width):
            own = np.unique(number[roi * g.bins : (roi + 1) * g.bins])
            own = own[sees[own]]
            want = first[own].min(initial=size), end[own].max(initial=0)
            assert tuple(reaches[roi, column : column + 2]) == want

    assert (plan.table is None) == (offset is not None)
    if offset is None:
        taps = at.runs.taps(np.float64)
        weights = np.zeros((len(runs), 128))
        number = np.repeat(np.arange(len(runs)), taps.length)
        weights[number, taps.pixel - first[number].astype(int)] = taps.weight
        assert_equal_up_to(1e-13, host(xp, plan.table), weights[:, : _roi.TILE])


# ---- dtypes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_within_twice_the_naive_error(name, dtype, xp):
    """Naive: the exact result, rounded."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    half = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(4)
    arrays, keywords = random_case(name, rng, depth=8, height=8, width=8, mask=True)
    arrays = {key: a.astype(half) for key, a in arrays.items()}
    exact = {key: a.astype(np.float64) for key, a in arrays.items()}
    want = {"y": functions(name)[0](**exact, **keywords)}
    grad_y = rng.normal(size=want["y"].shape).astype(half)
    want |= gradients(name, grad_y.astype(np.float64), exact, keywords)
    have = {"y": functions(name)[0](**on(xp, arrays), **keywords)}
    have |= gradients(name, xp.asarray(grad_y), on(xp, arrays), keywords)
    for key, value in have.items():
        if value is None:
            continue
        assert value.dtype == half
        error = np.linalg.norm(host(xp, value).astype(np.float64) - want[key])
        assert error <= 2 * np.linalg.norm(want[key].astype(half).astype(np.float64) - want[key])


@pytest.mark.parametrize("name", AVERAGES)
def test_float32_is_within_the_rounding_of_its_sums(name, xp):
    rng = np.random.default_rng(5)
    arrays, keywords = random_case(name, rng, depth=8, height=60, width=90, mask=False)
    arrays = {key: a.astype(np.float32) for key, a in arrays.items()}
    exact = {key: a.astype(np.float64) for key, a in arrays.items()}
    y = host(xp, functions(name)[0](**on(xp, arrays), **keywords))
    size = functions(name)[0](**exact | {"x": np.abs(exact["x"])}, **keywords)
    error = np.abs(y - functions(name)[0](**exact, **keywords))
    assert (error <= error_bound(np.float32, size, terms=60 * 90)).all()
    grad_y = rng.normal(size=y.shape).astype(np.float32)
    grad = host(xp, gradients(name, xp.asarray(grad_y), on(xp, arrays), keywords)["x"])
    size = gradients(name, np.abs(grad_y).astype(np.float64), exact, keywords)["x"]
    error = np.abs(grad - gradients(name, grad_y.astype(np.float64), exact, keywords)["x"])
    assert (error <= error_bound(np.float32, size, terms=y.size)).all()


@pytest.mark.parametrize("name", NAMES)
def test_positions_may_have_another_dtype(name, xp):
    rng = np.random.default_rng(6)
    arrays, keywords = random_case(name, rng, mask=True)
    arrays = {key: a.astype(np.float16).astype(np.float32) for key, a in arrays.items()}
    other = {key: a if key == "x" else a.astype(np.float64) for key, a in arrays.items()}
    want = functions(name)[0](**on(xp, arrays), **keywords)
    have = functions(name)[0](**on(xp, other), **keywords)
    assert have.dtype == np.float32
    assert_array_equal(host(xp, have), host(xp, want))
    for key, grad in gradients(name, want, on(xp, other), keywords).items():
        assert grad is None or grad.dtype == other[key].dtype


# ---- odd RoIs


@pytest.mark.parametrize("value", [-1.0, 2.0, 1e30, -1e30, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_roi_of_no_image_is_refused_or_nan(name, value, xp):
    """NumPy refuses it; on a GPU, where values are not looked at, only its own results are NaN."""
    check_bad_roi(name, xp, column=0, value=value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_roi_that_is_not_finite_is_refused_or_nan(name, column, value, xp):
    check_bad_roi(name, xp, column, value)


def check_bad_roi(name, xp, column, value):
    rng = np.random.default_rng(7)
    arrays, keywords = random_case(name, rng, n=2, k=5, output_size=(2, 2), part=(2, 2), mask=True)
    good = np.arange(5) != 2
    without = on(xp, {key: a if key == "x" else a[good] for key, a in arrays.items()})
    arrays["rois"][2, column] = value
    arrays = on(xp, arrays)
    forward = functions(name)[0]
    want = forward(**without, **keywords)
    if xp is np:
        with pytest.raises(
            ValueError, match=rf"^{name}: rois\[2\] is \[.*\], expected finite numb"
        ):
            forward(**arrays, **keywords)
        with pytest.raises(ValueError, match=rf"^{name}_backward: rois\[2\] is"):
            gradients(name, np.ones((5, *want.shape[1:])), arrays, keywords)
        return
    y = host(xp, forward(**arrays, **keywords))
    assert np.isnan(y[2]).all()
    assert_array_equal(y[good], host(xp, want))
    grad_y = rng.normal(size=y.shape)
    have = gradients(name, xp.asarray(grad_y), arrays, keywords)
    want = gradients(name, xp.asarray(grad_y[good]), without, keywords)
    assert_equal_up_to(1e-13, host(xp, have.pop("x")), host(xp, want.pop("x")))
    for key, grad in have.items():
        if grad is not None:
            assert np.isnan(host(xp, grad)[2]).all()
            assert_array_equal(host(xp, grad)[good], host(xp, want[key]))


@pytest.mark.parametrize("name", NAMES)
def test_the_index_of_an_image_is_truncated(name, xp):
    arrays, keywords = random_case(name, np.random.default_rng(8), n=2, k=3)
    arrays["rois"][:, 0] = 0, 1, 1
    want = host(xp, functions(name)[0](**on(xp, arrays), **keywords))
    arrays["rois"][:, 0] = -0.75, 1.25, 2 - 2.0**-40  # beyond the precision of float32
    assert_array_equal(host(xp, functions(name)[0](**on(xp, arrays), **keywords)), want)


@pytest.mark.parametrize("size", [1e4, 1e9, 1e30, 1e300])
@pytest.mark.parametrize("name", NAMES)
def test_huge_rois_cost_what_the_image_does(name, size, xp):
    rng = np.random.default_rng(9)
    x = rng.normal(size=(1, 2, 30, 40))
    corners = np.array([[0.0, 0, size, size], [-size, -size, size, size], [-size, 3, 10, size]])
    rois = np.concatenate([np.zeros((3, 1)), corners], axis=1)
    offset = (xp.asarray(rng.normal(size=(3, 2, 2, 2))),) if name in DEFORMABLE else ()
    options = {"group_size": 1} if name.endswith("ps_roi_pool") else {}
    if name == "ps_roi_align":
        x = np.repeat(x, 4, axis=1)
    forward, backward = functions(name)
    arguments = (xp.asarray(x), xp.asarray(rois), *offset, 2)
    tracemalloc.start()
    try:
        y = forward(*arguments, **options)
        grads = backward(y, *arguments, **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    if xp is np:
        assert peak <= 16e6
    assert np.isfinite(host(xp, y)).all()
    assert all(np.isfinite(host(xp, grad)).all() for grad in grads if grad is not None)


FAR = [1e30, -1e30, 2.0**31, -(2.0**31), 2.0**63, -1e-30, 1e-300, 3e5, -0.0]


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("name", NAMES)
def test_kernels_make_of_hostile_numbers_what_numpy_does(name, seed, xp):
    if xp is np:
        pytest.skip("is what others are compared with")
    rng = np.random.default_rng(seed)
    arrays, keywords = random_case(name, rng, k=5)
    for key, values in ("rois", FAR), ("offset", [*FAR, np.nan, np.inf, -np.inf]):
        if key in arrays:
            chosen = rng.random(arrays[key].shape) < 0.15
            chosen[:, 0] &= key == "offset"
            arrays[key][chosen] = rng.choice(values, chosen.sum())
    want = functions(name)[0](**arrays, **keywords)
    have = host(xp, functions(name)[0](**on(xp, arrays), **keywords))
    assert_allclose(have, want, rtol=1e-12, atol=1e-13)
    grad_y = rng.normal(size=want.shape)
    want = gradients(name, grad_y, arrays, keywords)
    for key, grad in gradients(name, xp.asarray(grad_y), on(xp, arrays), keywords).items():
        if grad is not None:
            size = np.abs(want[key][np.isfinite(want[key])]).max(initial=1)
            assert_allclose(host(xp, grad), want[key], rtol=1e-12, atol=1e-13 * size)


@pytest.mark.parametrize("size", [1e4, 1e9])
def test_all_samples_of_a_huge_roi_count(size, xp):
    """They lie on the pixels, and one is half a pixel beyond the last: the pixel counts twice."""
    x = np.random.default_rng(10).normal(size=(1, 1, 6, 9))
    rois = xp.asarray(np.array([[0, 0.5, 0.5, size + 0.5, size + 0.5]]))
    y = deformable.roi_align(xp.asarray(x), rois, 1, aligned=True)
    # samples at 0.5, 1.5, ..., of which the last one but one of the image is that of its last cell
    rows, columns = (np.r_[0.5, np.ones(n - 2), 1.5] for n in x.shape[2:])
    want = rows @ x[0, 0] @ columns / size**2
    assert abs(host(xp, y).item() - want) <= 1e-12 * abs(want)


# ---- offsets and masks


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**63)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", DEFORMABLE)
def test_far_offsets_are_outside(name, axis, value, xp):
    rng = np.random.default_rng(11)
    arrays, keywords = random_case(
        name, rng, output_size=(2, 2), part=(2, 2), classes=1, mask=False
    )
    arrays["offset"][1, axis, 0, 1] = value
    y = host(xp, functions(name)[0](**on(xp, arrays), **keywords))
    assert not y[1, :, 0, 1].any()
    assert np.isfinite(y).all()
    grads = gradients(name, xp.ones(y.shape), on(xp, arrays), keywords)
    assert all(np.isfinite(host(xp, g)).all() for g in grads.values() if g is not None)
    assert not host(xp, grads["offset"])[1, :, 0, 1].any()


@pytest.mark.parametrize("gamma", [0.0, 0.1])
@pytest.mark.parametrize("name", DEFORMABLE)
def test_infinite_offsets_are_outside_whatever_they_are_times(name, gamma, xp):
    x, rois = xp.ones((1, 1, 4, 4)), xp.asarray(np.array([[0.0, 1, 1, 1, 1]]))
    offset = xp.full((1, 2, 1, 1), np.inf)
    assert host(xp, functions(name)[0](x, rois, offset, 1, gamma=gamma)).item() == 0


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", DEFORMABLE)
def test_nan_offset_gives_nan_where_it_is_used(name, axis, xp):
    rng = np.random.default_rng(12)
    arrays, keywords = random_case(
        name, rng, output_size=(2, 2), part=(2, 2), classes=1, mask=True, n=2, k=3
    )
    arrays["offset"][1, axis, 0, 1] = np.nan
    y = host(xp, functions(name)[0](**on(xp, arrays), **keywords))
    used = np.zeros(y.shape, bool)
    used[1, :, 0, 1] = True
    assert_array_equal(np.isnan(y), used)
    grads = gradients(name, xp.ones(y.shape), on(xp, arrays), keywords)
    own = np.zeros(arrays["offset"].shape, bool)
    own[1, :, 0, 1] = True
    assert_array_equal(np.isnan(host(xp, grads["offset"])), own)
    assert_array_equal(np.isnan(host(xp, grads["mask"])), used[:, 0])
    assert np.isfinite(host(xp, grads["x"])).all()


@pytest.mark.parametrize("name", DEFORMABLE)
def test_mask_multiplies_the_bins(name, xp):
    arrays, keywords = random_case(name, np.random.default_rng(13), mask=True)
    mask = arrays.pop("mask")
    plain = host(xp, functions(name)[0](**on(xp, arrays), **keywords))
    mask[:] = np.where(mask > 0, 0.5, -2)
    masked = functions(name)[0](**on(xp, arrays | {"mask": mask}), **keywords)
    assert_array_equal(host(xp, masked), plain * mask[:, None])


@pytest.mark.parametrize("name", NAMES)
def test_pixels_without_weight_are_not_looked_at(name, xp):
    """Infinities of the image do not leak into bins that do not see them."""
    x = np.full((1, 1, 9, 9), np.inf)
    x[..., 2:6, 2:6] = 1
    rois = np.array([[0.0, 2.5, 2.5, 5.5, 5.5]])  # between the centers of pixels 2 and 5
    if name in ("roi_pool", "ps_roi_pool", "deform_ps_roi_pool"):
        rois = np.array([[0.0, 2, 2, 5, 5]])
    offset = (None,) if name in DEFORMABLE else ()
    options = {"aligned": True} if name == "roi_align" else {}
    arguments = xp.asarray(x), xp.asarray(rois), *offset, 1
    if name == "deform_ps_roi_pool":  # its samples begin at the bin's corner, at 1.5
        x[..., 1, :] = x[..., 1] = 1
        arguments = xp.asarray(x), xp.asarray(rois), *offset, 1
    assert abs(host(xp, functions(name)[0](*arguments, **options)).item() - 1) <= 1e-15


@pytest.mark.parametrize("name", DEFORMABLE)
def test_gradients_leave_pixels_without_weight_alone(name, xp):
    """A sample on a pixel: its neighbours have slopes, but no weight."""
    x = np.full((1, 1, 5, 5), np.inf)
    x[..., 2, 2] = 3
    rois, offset = np.array([[0, 0.5, 0.5, 2.5, 2.5]]), np.full((1, 2, 1, 1), 1.0)
    if name == "deform_ps_roi_pool":
        rois, offset = np.array([[0.0, 1, 1, 2, 2]]), np.full((1, 2, 1, 1), 1.5)
    arrays = {"x": x, "rois": rois, "offset": offset, "mask": np.ones((1, 1, 1))}
    keywords = {"output_size": 1, "sampling_ratio": 1, "gamma": 0.5}
    grads = gradients(name, xp.full((1, 1, 1, 1), 2.0), on(xp, arrays), keywords)
    assert host(xp, grads["mask"]).item() == 6
    assert not np.isfinite(host(xp, grads["offset"])).any()
    grads = gradients(name, xp.full((1, 1, 1, 1), np.inf), on(xp, arrays), keywords)
    seen = np.zeros(x.shape)
    seen[..., 2, 2] = np.inf
    assert_array_equal(host(xp, grads["x"]), seen)
    arrays["mask"][:] = np.inf
    grads = gradients(name, xp.full((1, 1, 1, 1), 2.0), on(xp, arrays), keywords)
    assert_array_equal(host(xp, grads["x"]), seen)
    arrays["mask"][:] = 0
    grads = gradients(name, xp.full((1, 1, 1, 1), 2.0), on(xp, arrays), keywords)
    assert not host(xp, grads["offset"]).any()


# ---- arguments


@pytest.mark.parametrize("name", NAMES)
def test_wrt_computes_only_what_it_names(name, xp):
    rng = np.random.default_rng(14)
    arrays, keywords = random_case(name, rng, mask=True)
    arrays = on(xp, arrays)
    grad_y = functions(name)[0](**arrays, **keywords)
    everything = gradients(name, grad_y, arrays, keywords)
    for field, want in everything.items():
        only = gradients(name, grad_y, arrays, keywords, wrt=[field])
        assert_array_equal(host(xp, only[field]), host(xp, want))
        assert [key for key, grad in only.items() if grad is not None] == [field]
    assert set(gradients(name, grad_y, arrays, keywords, wrt=()).values()) == {None}


def small(name, **changes):
    arguments = {
        "x": np.zeros((1, 8, 5, 5)),
        "rois": np.zeros((3, 5)),
        "output_size": (2, 2),
    }
    if name in DEFORMABLE:
        arguments["offset"] = np.zeros((3, 2, 2, 2))
    return arguments | changes


ERRORS = {
    "x": (
        {"x": np.zeros((8, 5, 5))},
        ValueError,
        r"x has shape \(8, 5, 5\), expected \(N, C, H, W",
    ),
    "no channels": ({"x": np.zeros((1, 0, 5, 5))}, ValueError, "at least one channel"),
    "no rows": ({"x": np.zeros((1, 8, 0, 5))}, ValueError, "at least one channel, row"),
    "rois": ({"rois": np.zeros((3, 4))}, ValueError, r"rois has shape \(3, 4\), expected \(K, 5\)"),
    "list": ({"rois": [[0.0] * 5]}, TypeError, "rois is list, expected a numpy or cupy array"),
    "integer x": ({"x": np.zeros((1, 8, 5, 5), int)}, TypeError, "x has dtype int64"),
    "integer rois": ({"rois": np.zeros((3, 5), int)}, TypeError, "rois has dtype int64"),
    "half rois": ({"rois": np.zeros((3, 5), np.float16)}, TypeError, "rois has dtype float16"),
    "no bins": ({"output_size": 0}, ValueError, "output_size is 0, expected at least 1"),
    "bins": ({"output_size": 1.5}, TypeError, "output_size is 1.5, expected an int or a pair"),
    "scale": ({"spatial_scale": "1"}, TypeError, "spatial_scale is '1', expected a number"),
    "infinite scale": ({"spatial_scale": np.inf}, ValueError, "expected a finite number"),
}
ERRORS_OF_ONE = {
    "mode": ("roi_align", {"mode": "sum"}, ValueError, "mode is 'sum', expected 'avg' or 'max'"),
    "ratio": ("roi_align", {"sampling_ratio": 0.5}, TypeError, "sampling_ratio is 0.5"),
    "groups of bins": ("ps_roi_align", {"output_size": 3}, ValueError, "divisible by 3 x 3 groups"),
    "groups": ("ps_roi_pool", {"group_size": (5, 1)}, ValueError, "divisible by 5 x 1 groups"),
    "no groups": ("ps_roi_pool", {"group_size": 0}, ValueError, "group_size is 0"),
    "no samples": (
        "deform_ps_roi_pool",
        {"sampling_ratio": 0},
        ValueError,
        "sampling_ratio is 0, expected at least 1",
    ),
    "offset": (
        "deform_roi_pool",
        {"offset": np.zeros((3, 2, 2, 3))},
        ValueError,
        r"offset has shape \(3, 2, 2, 3\), expected \(3, 2, 2, 2\)",
    ),
    "offsets of parts": (
        "deform_ps_roi_pool",
        {"offset": np.zeros((2, 2, 2, 2))},
        ValueError,
        r"offset has shape \(2, 2, 2, 2\), expected \(3, 2 classes, part height, part width\)",
    ),
    "odd offsets": (
        "deform_ps_roi_pool",
        {"offset": np.zeros((3, 3, 2, 2))},
        ValueError,
        "classes",
    ),
    "classes": (
        "deform_ps_roi_pool",
        {"offset": np.zeros((3, 6, 2, 2))},
        ValueError,
        "divides the 2",
    ),
    "mask": (
        "deform_roi_pool",
        {"mask": np.zeros((3, 2))},
        ValueError,
        r"mask has shape \(3, 2\), expected \(3, 2, 2\)",
    ),
    "gamma": ("deform_roi_pool", {"gamma": np.nan}, ValueError, "gamma is nan, expected a finite"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name, error):
    changes, kind, message = ERRORS[error]
    check_refused(name, changes, kind, message)


@pytest.mark.parametrize("error", ERRORS_OF_ONE)
def test_bad_options_are_named(error):
    check_refused(*ERRORS_OF_ONE[error])


def check_refused(name, changes, kind, message):
    forward, backward = functions(name)
    with pytest.raises(kind, match=f"^{name}: .*{message}"):
        forward(**small(name, **changes))
    with pytest.raises(kind, match=f"^{name}_backward: "):
        backward(np.zeros((3, 2, 2, 2)), **small(name, **changes))


@pytest.mark.parametrize("name", NAMES)
def test_bad_gradients_are_named(name):
    backward = functions(name)[1]
    shape = functions(name)[0](**small(name)).shape
    with pytest.raises(ValueError, match=r"grad_y has shape \(3, 2\), expected \(3, "):
        backward(np.zeros((3, 2)), **small(name))
    with pytest.raises(TypeError, match="grad_y is NoneType"):
        backward(None, **small(name))
    with pytest.raises(ValueError, match="wrt has 'rois', expected some of x"):
        backward(np.zeros(shape), **small(name), wrt=["rois"])


@pytest.mark.parametrize("name", NAMES)
def test_libraries_do_not_mix(name, xp):
    if xp is np:
        pytest.skip("needs two libraries")
    arguments = on(xp, {k: v for k, v in small(name).items() if k != "output_size"})
    with pytest.raises(TypeError, match=r"rois is a numpy array, expected .*cupy as x is"):
        functions(name)[0](**arguments | {"rois": np.zeros((3, 5))}, output_size=2)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name, xp, no_synchronisation):
    if xp is np:
        pytest.skip("has no device")
    arrays, keywords = random_case(name, np.random.default_rng(15), mask=True)
    arrays = on(xp, arrays)
    with no_synchronisation():
        y = functions(name)[0](**arrays, **keywords)
        gradients(name, y, arrays, keywords)


@pytest.mark.skipif(HAVE_GPU, reason="the substitute counts allocations")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name", [*NAMES, "largest"])
def test_workspace_on_a_gpu_is_copies_and_the_plan(name, dtype):
    """Copies of x, of its gradient and of grad_y, and where maxima lie."""
    from tests.simt import substitute

    mode = {"mode": "max"} if name == "largest" else {}
    name = "roi_align" if mode else name
    arrays, keywords = random_case(
        name, np.random.default_rng(20), n=1, k=50, depth=24, classes=1, height=12, width=12,
        output_size=(7, 7), sampling_ratio=(8, 8), group_size=(7, 7), part=(7, 7), mask=True,
    )  # fmt: skip
    keywords = {k: v for k, v in keywords.items() if k in signature(functions(name)[0]).parameters}
    keywords |= mode
    wide, maximum = compute_dtype(np.dtype(dtype)).itemsize, name == "roi_pool" or bool(mode)
    runs = 2 * 49 * 88 if name in DEFORMABLE else (7 + 7) * (88 + 16 * wide * (not maximum))
    numbers = {key: a.size for key, a in arrays.items() if key != "x"}
    plan = 50 * (runs + 4 + 16 + 4) + 8 * sum(numbers.values()) + 8
    with kernels("forward", races=False):
        import cupy

        given = on(cupy, {key: a.astype(dtype) for key, a in arrays.items()})
        with substitute.memory() as forward:
            y = functions(name)[0](**given, **keywords)
        grad_y = cupy.ascontiguousarray(y)
        with substitute.memory() as backward:
            gradients(name, grad_y, given, keywords)
    assert forward[0] <= given["x"].nbytes + y.nbytes + plan
    own = 3 * wide * 50 * 49 + sum(wide * numbers.get(key, 0) * 2 for key in ("offset", "mask"))
    images = 1 + ("ps_" in name) + (maximum or name in DEFORMABLE)
    places = 2 * wide * y.size * maximum
    bound = images * given["x"].nbytes + y.nbytes + places + plan + own
    assert backward[0] <= bound
    assert bound <= 64 * y.nbytes, "less than the samples of all bins"


def test_many_rois_take_less_than_four_times_their_arrays():
    rng = np.random.default_rng(16)
    x = rng.normal(size=(1, 256, 50, 50)).astype(np.float32)
    corners = rng.uniform(0, 350, (2000, 2))
    corners = np.concatenate([corners, corners + rng.uniform(64, 448, (2000, 2))], axis=1)
    rois = np.concatenate([np.zeros((2000, 1)), corners], axis=1).astype(np.float32)
    tracemalloc.start()
    try:
        y = deformable.roi_align(x, rois, 7, 1 / 16, 2)
        grad = deformable.roi_align_backward(y, x, rois, 7, 1 / 16, 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak + x.nbytes + rois.nbytes <= 4 * (x.nbytes + rois.nbytes + y.nbytes + grad.x.nbytes)
