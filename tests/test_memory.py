"""How much memory calls take at most, and that nothing stays behind."""

import contextlib
import gc
import tracemalloc
import weakref

import numpy as np
import pytest

import deformable
from benchmarks import bench_cpu, bench_deform_conv
from benchmarks.workloads import draw
from deformable import _conv, _cuda, _fused, _roi, nn
from deformable._array import compute_dtype
from tests.arrays import on
from tests.conftest import HAVE_GPU
from tests.fuzz import OPERATORS
from tests.test_device import LAYERS

BLOCK = 1 << 14  # instead of BLOCK_BYTES and CHUNK_BYTES
BLOCKS = 8  # that may be alive: columns, their gradients, samples, matrices
SPLIT_BYTES = 132 * 256 * 128 * 4  # a wide tile of every multiprocessor
WORKSPACE_BYTES = 128 << 20

# Calls whose columns would take seven times the memory of all their arrays.
SHAPES = {
    "conv2d": {"x": (1, 32, 20, 20), "weight": (4, 32, 5, 5)},
    "deform_conv2d": {
        "x": (1, 32, 20, 20),
        "offset": (1, 50, 16, 16),
        "weight": (4, 32, 5, 5),
        "mask": (1, 25, 16, 16),
    },
}


@contextlib.contextmanager
def counted_by_numpy():
    """A list that holds, at the end, the most bytes that were in use at once, above the start."""
    answer = []
    tracemalloc.start()
    try:
        yield answer
        answer.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def launch_nothing(monkeypatch):
    """All is allocated for the kernels, but they do not run, which without a GPU takes long."""
    monkeypatch.setattr(_cuda.Launch, "__call__", lambda *_: None)
    monkeypatch.setattr(_cuda, "gemm", lambda *_, **__: None)


@pytest.fixture(params=["numpy", "cupy"])
def library(request, monkeypatch):
    """An array library and what counts its memory."""
    if request.param == "numpy":
        yield np, counted_by_numpy
        return
    if HAVE_GPU:
        pytest.skip("the substitute counts allocations")
    from tests.simt import fakecupy, substitute

    launch_nothing(monkeypatch)
    yield fakecupy, substitute.memory


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_peak_is_bounded_by_the_arrays_and_some_blocks(name, dtype, library, monkeypatch):
    xp, counter = library
    for size in "BLOCK_BYTES", "CHUNK_BYTES":
        monkeypatch.setattr(_conv, size, BLOCK)
    operator, rng = OPERATORS[name], np.random.default_rng(0)
    arrays = {k: rng.normal(size=shape).astype(dtype) for k, shape in SHAPES[name].items()}
    arrays = on(xp, arrays)
    y = operator.forward(**arrays)
    operator.backward(y, **arrays)  # kernels are compiled, caches filled

    with counter() as forward:
        operator.forward(**arrays)
    with counter() as backward:
        operator.backward(y, **arrays)
    wide = compute_dtype(np.dtype(dtype)).itemsize
    bound = 4 * wide * (sum(a.size for a in arrays.values()) + y.size) + BLOCKS * BLOCK
    columns = wide * y.size // y.shape[1] * int(np.prod(arrays["weight"].shape[1:]))
    assert columns > bound, "the bound says nothing"
    assert max(forward[0], backward[0]) <= bound


# ---- at the sizes of networks


REAL = {f"{case.operator} {case.label}": case for case in bench_cpu.EVERY}
TYPICAL = [
    "deform_conv2d A 2x64x56x56->64 v1",
    "deform_conv2d B 1x256x32x32->256 offset groups 4 v2",
    "deform_conv2d large 8x64x112x112->64 v1",
    "roi_align D 1x256x50x50 128 RoIs 7x7",
    "roi_pool D 1x256x50x50 128 RoIs 7x7",
    "deform_ps_roi_pool E 1x490x50x50 300 RoIs 7x7 sampling_ratio 4",
]


@pytest.mark.parametrize("name", TYPICAL)
def test_peak_at_real_sizes_on_numpy(name):
    """Arrays, one copy of them forward and two backward, and some blocks.

    Averages of RoIs have blocks as large as two images, if these are larger.
    """
    case = REAL[name]
    arrays, grad_y = draw(case, np.random.default_rng(0))
    arrays, grad_y = {k: a.astype(np.float32) for k, a in arrays.items()}, grad_y.astype("f4")
    operator = OPERATORS[case.operator]
    with counted_by_numpy() as forward:
        operator.forward(**arrays, **case.keywords)
    with counted_by_numpy() as backward:
        operator.backward(grad_y, **arrays, **case.keywords)
    size = grad_y.nbytes + sum(a.nbytes for a in arrays.values())
    blocks = 4 * (_roi if "rois" in arrays else _conv).BLOCK_BYTES
    images = 0 if "rois" not in arrays else 2 * arrays["x"].nbytes
    assert forward[0] <= size + blocks
    assert backward[0] <= 2 * size + blocks + images


@pytest.mark.skipif(HAVE_GPU, reason="the substitute counts allocations")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name", ["D3", "D4", "B4"])
def test_peak_at_real_sizes_on_a_gpu(name, dtype, channels_last, monkeypatch):
    """On an H200.

    Forward takes room for packed weights, for sums that are split, and to lay out an image that is
    not channels-last; backward a workspace of a fixed size, and copies of all arrays in float32.
    """
    from tests.simt import fakecupy as cupy
    from tests.simt import substitute

    launch_nothing(monkeypatch)
    monkeypatch.setattr(_fused, "resources", lambda device: (132, 228 << 10))
    case = next(case for case in bench_deform_conv.CASES if case.name == name)

    def image(channels, dtype):
        shape = (case.batch, channels, case.height, case.width)
        if not channels_last:
            return cupy.zeros(shape, dtype)
        return cupy.zeros((shape[0], *shape[2:], channels), dtype).transpose(0, 3, 1, 2)

    arrays = {
        "x": image(case.channels, dtype),
        "offset": image(18 * case.offset_groups, np.float32),
        "weight": cupy.zeros((case.out_channels, case.channels // case.groups, 3, 3), dtype),
    }
    with substitute.memory() as forward:
        y = deformable.deform_conv2d(**arrays, **case.keywords)
    with substitute.memory() as backward:
        deformable.deform_conv2d_backward(y, **arrays, **case.keywords)
    moved = 0 if channels_last else arrays["x"].nbytes
    words = 2 if dtype == np.float32 else 1  # of a weight that is packed
    assert forward[0] <= y.nbytes + moved + 1.25 * words * arrays["weight"].nbytes + SPLIT_BYTES
    elements = y.size + sum(a.size for a in arrays.values())
    assert backward[0] <= 2 * 4 * elements + WORKSPACE_BYTES


def made_by_the_library():
    """Bytes that tracemalloc has seen it allocate and that are in use."""
    own = tracemalloc.Filter(True, "*/deformable/*")
    return sum(t.size for t in tracemalloc.take_snapshot().filter_traces([own]).traces)


@pytest.mark.parametrize("name", LAYERS)
def test_predict_keeps_nothing_alive(name):
    layer, *inputs = LAYERS[name]
    inputs = [a.copy() for a in inputs]
    layer.predict(*inputs)
    state = {name: array.copy() for name, array in layer.state().items()}
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        y = layer.predict(*inputs)
        assert gc.collect() == 0, "a cycle of references"
        left = made_by_the_library()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert left <= y.nbytes + 4096
    references = [weakref.ref(a) for a in (y, *inputs)]
    del y, inputs
    assert [reference() for reference in references] == [None] * len(references)
    assert all((layer.state()[name] == array).all() for name, array in state.items())


@pytest.mark.parametrize("name", LAYERS)
def test_a_training_call_keeps_its_input_no_longer_than_its_backward(name):
    layer, *inputs = LAYERS[name]
    inputs = [a.copy() for a in inputs]
    gc.disable()
    try:
        y, backward = layer(*inputs)
        grads = backward(y)
        grads = [g for g in (grads if isinstance(grads, tuple) else (grads,)) if g is not None]
        references = [weakref.ref(a) for a in (y, *grads, *inputs)]
        for param in layer.params():
            param.grad = None
        del y, grads, backward, inputs
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


def test_training_does_not_grow():
    rng = np.random.default_rng(0)
    net = nn.Sequential(
        nn.DeformConv2d(2, 4, 3, padding=1, modulated=True, rng=rng), nn.BatchNorm2d(4), nn.ReLU(),
        nn.MaxPool2d(2), nn.GlobalAvgPool2d(), nn.Dropout(0.1, rng=rng), nn.Linear(4, 3, rng=rng),
    )  # fmt: skip
    optimizer = nn.Adam(net.params())
    images = rng.standard_normal((4, 2, 24, 24), np.float32)

    def step():
        logits, backward = net(images)
        backward(nn.softmax_cross_entropy(logits, np.arange(4) % 3)[1])
        nn.clip_grad_norm(net.params(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    tracemalloc.start()
    try:
        for _ in range(20):
            step()
        gc.collect()
        before = made_by_the_library()
        gc.disable()
        for _ in range(20):
            step()
        assert gc.collect() == 0, "steps leave cycles of references"
        assert made_by_the_library() <= before + images.nbytes / 2
    finally:
        gc.enable()
        tracemalloc.stop()
