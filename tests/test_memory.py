"""How much memory calls take at most, and that nothing stays behind."""

import contextlib
import gc
import tracemalloc
import weakref

import numpy as np
import pytest

import deformable
from deformable import nn
from deformable._array import compute_dtype
from tests.arrays import on
from tests.conftest import HAVE_GPU, kernels
from tests.fuzz import OPERATORS
from tests.test_device import LAYERS

BLOCK = 1 << 14  # instead of BLOCK_BYTES and CHUNK_BYTES
BLOCKS = 8  # that may be alive: columns, their gradients, samples, matrices

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


@pytest.fixture(params=["numpy", "cupy"])
def library(request):
    """An array library and what counts its memory."""
    if request.param == "numpy":
        yield np, counted_by_numpy
        return
    if HAVE_GPU:
        pytest.skip("the substitute counts allocations")
    from tests.simt import fakecupy, substitute
    from tests.simt.settings import configure

    with kernels("forward"), configure(races=False):  # which makes them ten times faster
        yield fakecupy, substitute.memory


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_peak_is_bounded_by_the_arrays_and_some_blocks(name, dtype, library, monkeypatch):
    xp, counter = library
    for size in "BLOCK_BYTES", "CHUNK_BYTES":
        monkeypatch.setattr(deformable.conv, size, BLOCK)
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
