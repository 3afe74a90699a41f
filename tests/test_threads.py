"""Many threads at once: operators, compilation, layers and the precision of products."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deformable import _cuda, float32_precision, nn
from tests.arrays import host
from tests.fuzz import OPERATORS, legal_call, results_of

THREADS = 8


def in_threads(work):
    """The results of ``work(i)`` for every thread, all of which begin together."""
    start = threading.Barrier(THREADS)

    def run(i):
        start.wait()
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def calls_of_all_operators(xp, seed):
    """What each operator and its backward answer to one random call, as bytes."""
    results = []
    for operator in OPERATORS.values():
        answers = results_of(operator, legal_call(operator, xp, seed))
        results += [host(xp, a).tobytes() for a in answers]
    return results


def test_eight_threads_answer_what_one_does(xp):
    """The first calls race for the compiled kernels."""
    repeats = 12 if xp is np else 4  # of every operator: some hundred calls a thread
    alone = [calls_of_all_operators(xp, seed) for seed in range(THREADS)]
    _cuda.source.cache_clear()
    _cuda._kernel.cache_clear()

    def work(i):
        return all(calls_of_all_operators(xp, i) == alone[i] for _ in range(repeats))

    assert in_threads(work) == [True] * THREADS


def test_precision_belongs_to_a_thread():
    seen = {}
    inside = threading.Barrier(2)

    def work(precision):
        with float32_precision(precision):
            inside.wait()
            seen[precision] = _cuda._precision.get()
            inside.wait()

    threads = [threading.Thread(target=work, args=(p,)) for p in ("high", "highest")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"high": "high", "highest": "highest"}
    assert _cuda._precision.get() == "highest"


def test_precision_belongs_to_an_asynchronous_task():
    async def work(precision):
        with float32_precision(precision):
            await asyncio.sleep(0)  # the other task runs here
            return _cuda._precision.get()

    async def both():
        return await asyncio.gather(work("high"), work("highest"))

    assert asyncio.run(both()) == ["high", "highest"]


def test_precision_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), float32_precision("high"):
        1 / 0  # noqa: B018
    assert _cuda._precision.get() == "highest"


@pytest.fixture
def net():
    rng = np.random.default_rng(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, rng=rng),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.DeformConv2d(4, 4, 3, padding=1, modulated=True, rng=rng),
        nn.MaxPool2d(2),
        nn.GlobalAvgPool2d(),
        nn.Linear(4, 3, rng=rng),
    )
    look_around(net.layers[3], rng)
    return net


def look_around(layer, rng):
    """Let the offsets of a new layer depend on its input."""
    weight = layer.offset_conv.weight
    weight.data = rng.normal(0, 0.1, weight.data.shape).astype(np.float32)


def test_threads_share_a_network_for_inference(net, xp):
    net.to(xp)
    images = [
        xp.asarray(np.random.default_rng(i).standard_normal((2, 2, 8, 8), np.float32))
        for i in range(THREADS)
    ]
    alone = [host(xp, net.predict(x)).tobytes() for x in images]
    repeats = 20 if xp is np else 3

    def work(i):
        return all(host(xp, net.predict(images[i])).tobytes() == alone[i] for _ in range(repeats))

    assert in_threads(work) == [True] * THREADS


def test_calls_of_a_layer_do_not_know_of_each_other(xp):
    """Two forward passes, then their backward passes the other way round."""
    rng = np.random.default_rng(1)
    layer = nn.DeformConv2d(2, 4, 3, padding=1, modulated=True, max_offset=2.0, rng=rng)
    look_around(layer, rng)
    layer.to(xp)
    images = [xp.asarray(rng.standard_normal((1, 2, 6, 5), np.float32)) for _ in range(2)]
    alone = []
    for x in images:
        y, backward = layer(x)
        alone.append(host(xp, backward(y)))
    (y0, backward0), (y1, backward1) = layer(images[0]), layer(images[1])
    np.testing.assert_array_equal(host(xp, backward1(y1)), alone[1])
    np.testing.assert_array_equal(host(xp, backward0(y0)), alone[0])
