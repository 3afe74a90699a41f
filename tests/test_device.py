"""On a device: nothing waits for it, its current stream is used, arrays stay where they are."""

import contextlib

import numpy as np
import pytest

from deformable import nn
from tests.conftest import HAVE_GPU, kernels
from tests.fuzz import OPERATORS, legal_call, results_of

cupy = pytest.importorskip("cupy")
DEVICES = cupy.cuda.runtime.getDeviceCount() if HAVE_GPU else 2
two_devices = pytest.mark.skipif(DEVICES < 2, reason="needs two devices")


@pytest.fixture(autouse=True, scope="module")
def simulation():
    with kernels("forward"):
        yield


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_operators_never_wait_for_the_device(name, dtype, no_synchronisation):
    for seed in range(3):
        arguments = legal_call(OPERATORS[name], cupy, seed, dtype)
        with no_synchronisation():
            results_of(OPERATORS[name], arguments)


def image(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


ROIS = np.array([[0, 1, 1, 5, 4], [1, 0, 2, 3, 5], [1, -9, -9, -5, -5]], np.float32)
LAYERS = {
    "AvgPool2d": (nn.AvgPool2d(2), image(2, 3, 6, 6)),
    "BatchNorm2d": (nn.BatchNorm2d(3), image(2, 3, 6, 6)),
    "Conv2d": (nn.Conv2d(4, 6, 3, groups=2), image(2, 4, 6, 6)),
    "DeformConv2d": (nn.DeformConv2d(4, 6, 3, offset_groups=2, max_offset=3.0), image(2, 4, 6, 6)),
    "DeformPSRoIPool": (nn.DeformPSRoIPool(8, 2), image(2, 8, 6, 6), ROIS),
    "DeformRoIPool": (nn.DeformRoIPool(3, 2, modulated=True), image(2, 3, 6, 6), ROIS),
    "Dropout": (nn.Dropout(0.5), image(2, 3)),
    "Flatten": (nn.Flatten(), image(2, 3, 4, 4)),
    "GlobalAvgPool2d": (nn.GlobalAvgPool2d(), image(2, 3, 4, 4)),
    "Linear": (nn.Linear(3, 4), image(2, 3)),
    "MaxPool2d": (nn.MaxPool2d(2), image(2, 3, 6, 6)),
    "PSRoIAlign": (nn.PSRoIAlign(2), image(2, 8, 6, 6), ROIS),
    "PSRoIPool": (nn.PSRoIPool(2), image(2, 8, 6, 6), ROIS),
    "ReLU": (nn.ReLU(), image(2, 3)),
    "RoIAlign": (nn.RoIAlign(2), image(2, 3, 6, 6), ROIS),
    "RoIPool": (nn.RoIPool(2), image(2, 3, 6, 6), ROIS),
    "Sequential": (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), image(2, 3)),
}


def test_every_layer_is_in_the_table():
    classes = {name: getattr(nn, name) for name in nn.__all__}
    kinds = {name for name, c in classes.items() if isinstance(c, type) and issubclass(c, nn.Layer)}
    assert kinds - {"Layer"} == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_never_wait_for_the_device(name, no_synchronisation):
    layer, *inputs = LAYERS[name]
    layer.to(cupy)
    inputs = [cupy.asarray(a) for a in inputs]
    try:
        with no_synchronisation():
            y, backward = layer(*inputs)
            backward(y)
            layer.predict(*inputs)
    finally:
        layer.to(np)


def test_a_training_step_never_waits_for_the_device(no_synchronisation):
    net = nn.Sequential(nn.DeformConv2d(2, 4, 3), nn.ReLU(), nn.GlobalAvgPool2d(), nn.Linear(4, 3))
    net.to(cupy)
    images, labels = cupy.asarray(image(5, 2, 6, 6)), cupy.asarray(np.arange(5) % 3)
    optimizers = [
        nn.SGD(net.params(), 0.1, momentum=0.9),
        nn.Adam(net.params()),
        nn.AdamW(net.params()),
    ]
    with no_synchronisation():
        for optimizer in optimizers:
            logits, backward = net(images)
            _, grad = nn.softmax_cross_entropy(logits, labels)
            backward(grad)
            nn.clip_grad_norm(net.params(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        for loss in nn.mse, nn.smooth_l1:
            loss(images, 2 * images)


@pytest.mark.parametrize("name", OPERATORS)
def test_work_goes_to_the_current_stream(name):
    operator = OPERATORS[name]
    expected = [cupy.asnumpy(a) for a in results_of(operator, legal_call(operator, cupy))]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, recorded() as entries:
        results = results_of(operator, legal_call(operator, cupy))
    stream.synchronize()
    for have, want in zip(results, expected, strict=True):
        np.testing.assert_array_equal(cupy.asnumpy(have), want)
    if not HAVE_GPU:
        assert entries and {used for _, _, used in entries} == {stream.ptr}


def recorded():
    """Where the launches and products of the substitute go; a GPU keeps no list."""
    if HAVE_GPU:
        return contextlib.nullcontext([])
    from tests.simt.fakecupy import _current

    return _current.record()


@two_devices
@pytest.mark.parametrize("name", OPERATORS)
def test_work_is_done_where_the_arrays_are(name):
    """Device 1's arrays while device 0 is the current one."""
    operator = OPERATORS[name]
    expected = [cupy.asnumpy(a) for a in results_of(operator, legal_call(operator, cupy))]
    with cupy.cuda.Device(1):
        there = legal_call(operator, cupy)
    with recorded() as entries:
        results = results_of(operator, there)
    assert {int(a.device) for a in results} == {1}
    assert {device for _, device, _ in entries} <= {1}
    for have, want in zip(results, expected, strict=True):
        np.testing.assert_array_equal(cupy.asnumpy(have), want)


@two_devices
@pytest.mark.parametrize("name", OPERATORS)
def test_arrays_on_two_devices_are_refused(name):
    operator = OPERATORS[name]
    function = operator.forward.__name__
    here = legal_call(operator, cupy)
    grad_y = operator.forward(**here)
    for moved in [name for name, a in here.items() if isinstance(a, cupy.ndarray)]:
        with cupy.cuda.Device(1):
            there = here | {moved: cupy.zeros(here[moved].shape)}
        with pytest.raises(ValueError, match=f"^{function}: .* is on .*, expected .* where"):
            operator.forward(**there)
        with pytest.raises(ValueError, match=f"^{function}_backward: .* is on .*, exp"):
            operator.backward(grad_y, **there)
