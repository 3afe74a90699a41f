"""More elements than 32 bits count.

In the simulator arrays are never touched but at their ends, so they take addresses and hardly any
memory; of launches over all of them only the last blocks run. On a GPU, and where NumPy copies an
image, they take what they have: ``--large``. Whatever counts by 64 bits from some size on is made
to do so on small arrays too, where all of it can be compared.
"""

import copy

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import deformable
from deformable import _bilinear, _cuda, _roi
from deformable._array import INT32_MAX
from tests.arrays import host
from tests.conftest import HAVE_GPU, kernels
from tests.fuzz import OPERATORS, legal_call, results_of

HEIGHT, WIDTH = 1 << 16, (1 << 15) + 8  # 2^31 + 2^19 pixels
FAR = 16000  # a stride that leaves few output positions


@pytest.mark.parametrize("name", OPERATORS)
def test_counting_by_64_bits_changes_no_bit(name, xp, monkeypatch):
    operator = OPERATORS[name]
    calls = [legal_call(operator, xp, seed) for seed in range(20)]
    calls = [c for c in calls if results_of(operator, c)[0].size][:3]
    before = [[host(xp, a) for a in results_of(operator, call)] for call in calls]
    kinds = set()
    run, samples, csr = _cuda.Launch.__call__, _bilinear.Samples, _roi.csr_array

    def run_with_int64(launch, *arrays):
        if not launch.file.startswith("fused_"):  # which are for small images
            launch = copy.copy(launch)
            launch.defines = tuple((dict(launch.defines) | {"INDEX": "int64"}).items())
            launch.kernels = {}
            kinds.add("int64")
        run(launch, *arrays)

    def noted(make):
        def noting(*args, **options):
            made = make(*args, **options)
            kinds.add((made.corner if hasattr(made, "corner") else made.indices).dtype.name)
            return made

        return noting

    monkeypatch.setattr(_cuda.Launch, "__call__", run_with_int64)
    monkeypatch.setattr(_bilinear, "INT32_MAX", 0)
    monkeypatch.setattr(_roi, "INT32_MAX", 2)
    monkeypatch.setattr(_bilinear, "Samples", noted(samples))
    monkeypatch.setattr(_roi, "csr_array", noted(csr))
    for call, results in zip(calls, before, strict=True):
        for have, want in zip(results_of(operator, call), results, strict=True):
            assert_array_equal(host(xp, have), want)
    if not (xp is np and name in ("conv2d", "roi_pool")):  # these have no indices of their own
        assert "int64" in kinds


def test_cells_of_a_large_image_are_counted_by_64_bits():
    """The last pixel of the last group, without an image that has it."""
    y, x = np.full((1, 1, 2), HEIGHT - 1.0), np.full((1, 1, 2), WIDTH - 1.0)
    samples = _bilinear.locate(y, x, HEIGHT, WIDTH, groups=2)
    row = (HEIGHT - 1 + _bilinear.BORDER) * (WIDTH + 2 * _bilinear.BORDER)
    pixel = row + WIDTH - 1 + _bilinear.BORDER
    assert 2 * pixel > INT32_MAX
    assert (samples.first + samples.corner).tolist() == [2 * pixel, 2 * pixel + 1]


# ---- the last pixel of an image of 2^31 + 2^19, and the last of 2^31 bins


@pytest.fixture(params=["numpy", "cupy"])
def far(request):
    """A library with room for 2^31 elements."""
    if request.param == "cupy" and not HAVE_GPU:
        from tests.simt import fakecupy
        from tests.simt.settings import configure

        with kernels("forward"), configure(last_blocks=200):
            yield fakecupy
    elif request.config.getoption("--large"):
        yield pytest.importorskip(request.param)
    else:
        pytest.skip("takes 20 GiB of memory: run with --large")


only_cupy = pytest.mark.parametrize("far", ["cupy"], indirect=True)


def image(xp, dtype, value=3.0):
    """Zeros (1, 1, HEIGHT, WIDTH) but for the last pixel."""
    try:
        x = xp.zeros((1, HEIGHT, WIDTH, 1), dtype)
    except MemoryError:
        pytest.skip("no address space for 2^31 elements")
    x[0, -1, -1, 0] = value
    return x.transpose(0, 3, 1, 2)


def last_position(size):
    """How far a stride of FAR goes along an axis, and the offset from there to the last pixel."""
    last = (size - 1) // FAR * FAR
    return last // FAR + 1, size - 1 - last


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_convolution_sees_the_last_pixel(dtype, far):
    x, weight = image(far, dtype), far.full((1, 1, 2, 2), 2.0, dtype)
    y = deformable.conv2d(x, weight, stride=(HEIGHT - 2, WIDTH - 2))
    assert host(far, y)[0, 0].tolist() == [[0, 0], [0, 6]]
    grads = deformable.conv2d_backward(
        far.ones(y.shape, dtype), x, weight, stride=(HEIGHT - 2, WIDTH - 2), wrt=["weight"]
    )
    assert host(far, grads.weight)[0, 0].tolist() == [[0, 0], [0, 3]]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_deformable_convolution_sees_the_last_pixel(dtype, far):
    (rows, down), (columns, right) = last_position(HEIGHT), last_position(WIDTH)
    offset = np.zeros((1, 2, rows, columns), np.float64 if dtype == np.float64 else np.float32)
    offset[0, :, -1, -1] = down, right - 0.5
    x, weight = image(far, dtype), far.ones((1, 1, 1, 1), dtype)
    arguments = {"x": x, "offset": far.asarray(offset), "weight": weight, "stride": FAR}
    y = deformable.deform_conv2d(**arguments)
    assert host(far, y)[0, 0, -1, -1] == 1.5 and not host(far, y)[0, 0].ravel()[:-1].any()
    grads = deformable.deform_conv2d_backward(
        far.ones(y.shape, dtype), **arguments, wrt=["offset", "weight"]
    )
    assert host(far, grads.offset)[0, 1, -1, -1] == 3
    assert host(far, grads.weight).ravel().tolist() == [1.5]


ROI = [0, WIDTH - 2, HEIGHT - 2, WIDTH, HEIGHT]


@only_cupy
@pytest.mark.parametrize("name", ["roi_pool", "ps_roi_pool", "roi_align", "deform_roi_pool"])
def test_roi_pooling_sees_the_last_pixel_and_sends_a_gradient_back(name, far):
    x, rois = image(far, np.float32, 4.0), far.asarray(np.array([ROI], np.float64))
    own = {"offset": None} if name == "deform_roi_pool" else {}
    y = getattr(deformable, name)(x, rois, **own, output_size=1)
    grads = getattr(deformable, f"{name}_backward")(y, x, rois, **own, output_size=1)
    value = float(host(far, y).ravel()[0])
    assert value > 0
    corner = host(far, grads.x[0, 0, -2:, -2:])
    assert corner[1, 1] > 0 and abs(corner.sum() - value) <= 1e-6


@pytest.mark.parametrize("name", ["ps_roi_pool", "roi_align", "deform_roi_pool"])
def test_roi_pooling_sees_the_last_pixel_on_numpy(name):
    x, rois = image(np, np.float32, 4.0), np.array([ROI], np.float64)
    own = {"offset": None} if name == "deform_roi_pool" else {}
    assert getattr(deformable, name)(x, rois, **own, output_size=1).ravel()[0] > 0


@only_cupy
def test_the_last_of_many_bins_is_computed(far):
    """More bins than 32 bits count, of one RoI on a small image."""
    bins, x = 46341, np.arange(16.0).reshape(1, 1, 4, 4)
    assert bins * bins > INT32_MAX
    rois = far.asarray(np.array([[0, 0, 0, 4, 4]], np.float64))
    y = deformable.roi_align(
        far.asarray(x.astype(np.float16)), rois, bins, sampling_ratio=1, aligned=True
    )
    assert host(far, y[0, 0, -1, -2:]).tolist() == [15, 15]
