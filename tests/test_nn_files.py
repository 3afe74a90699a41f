"""Networks in files: complete or absent, and never a surprise on reading."""

import copy
import io
import os
import signal
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deformable import nn
from tests.arrays import host


def network(seed=0, dtype=np.float32, width=4):
    rng = np.random.default_rng(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, dtype=dtype, rng=rng),
        nn.BatchNorm2d(width, dtype=dtype),
        nn.GlobalAvgPool2d(),
        nn.Linear(width, 2, dtype=dtype, rng=rng),
    )


def train(net, optimizer, xp, steps=2):
    x = xp.asarray(np.random.default_rng(1).normal(size=(3, 1, 5, 5)).astype(np.float32))
    for _ in range(steps):
        y, backward = net(x)
        backward(y)
        optimizer.step()
        optimizer.zero_grad()


def assert_equal_states(xp, have, want):
    assert have.keys() == want.keys()
    for name, array in have.items():
        assert array.dtype == want[name].dtype
        is_host = isinstance(array, np.ndarray)
        assert_array_equal(array if is_host else host(xp, array), host(xp, want[name]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_saved_comes_back_in_the_same_bits(dtype, xp, tmp_path):
    pytest.importorskip("ml_dtypes")
    net, other = network(0, dtype).to(xp), network(1, dtype).to(xp)
    nn.save(tmp_path / "net.npz", net)
    nn.load(tmp_path / "net.npz", other)
    assert all(isinstance(array, xp.ndarray) for array in other.state().values())
    assert_equal_states(xp, other.state(), net.state())


def test_a_file_of_a_gpu_is_read_on_the_cpu(xp, tmp_path):
    net, other = network(0).to(xp), network(1)
    nn.save(tmp_path / "net.npz", net)
    nn.load(tmp_path / "net.npz", other)
    assert_equal_states(xp, other.state(), net.to(np).state())


def test_training_goes_on_in_the_same_bits(xp, tmp_path):
    path, whole, parts, resumed = tmp_path / "net.npz", *(network().to(xp) for _ in range(3))
    train(whole, nn.Adam(whole.params()), xp, steps=5)
    optimizer = nn.Adam(parts.params())
    train(parts, optimizer, xp, steps=2)
    nn.save(path, parts, optimizer)
    optimizer = nn.Adam(resumed.params())
    nn.load(path, resumed, optimizer)
    assert optimizer.steps == 2
    train(resumed, optimizer, xp, steps=3)
    assert_equal_states(xp, resumed.state(), whole.state())


def test_a_network_is_read_without_its_optimizer(tmp_path):
    net, other = network(0), network(1)
    nn.save(tmp_path / "net.npz", net, nn.Adam(net.params()))
    nn.load(tmp_path / "net.npz", other)
    assert_equal_states(np, other.state(), net.state())


def killed(*args, **arrays):
    if hasattr(args[0], "write"):
        args[0].write(b"half of it")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("module", "name"), [(np.lib.format, "write_array"), (os, "fsync"), (os, "replace")]
)
def test_writing_replaces_the_file_only_when_complete(module, name, tmp_path, monkeypatch):
    path, net = tmp_path / "net.npz", network(0)
    nn.save(path, net)
    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        nn.save(path, network(1))
    other = network(2)
    nn.load(path, other)
    assert_equal_states(np, other.state(), net.state())
    assert [file.name for file in tmp_path.iterdir()] == ["net.npz"]


def test_an_array_may_have_any_name(tmp_path):
    layer = nn.Layer()
    for name in ("file", "allow_pickle", "args", "naïve"):
        setattr(layer, name, nn.Param(np.ones(2)))
    other = copy.deepcopy(layer)
    for param in other.params():
        param.data = np.zeros(2)
    nn.save(tmp_path / "layer.npz", layer)
    nn.load(tmp_path / "layer.npz", other)
    assert_equal_states(np, other.state(), layer.state())
    with np.load(tmp_path / "layer.npz") as arrays:
        assert sorted(arrays) == sorted(layer.state())


def test_a_file_is_as_readable_as_any_other(tmp_path):
    nn.save(tmp_path / "net.npz", network())
    (tmp_path / "other").touch()
    assert (tmp_path / "net.npz").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (network(width=5), r"load: 0.weight has shape \(4, 1, 3, 3\), expected \(5, 1, 3, 3\)"),
        (network(dtype=np.float64), "load: 0.weight has dtype float32, expected float64"),
        (nn.Linear(4, 2), r"load: missing names \['bias', 'weight'\], unknown names \['0.bias', "),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(other, message, tmp_path):
    nn.save(tmp_path / "net.npz", network(1))
    before = other.state()
    with pytest.raises(ValueError, match=message):
        nn.load(tmp_path / "net.npz", other)
    assert all(other.state()[name] is array for name, array in before.items())


def test_half_precisions_are_not_confused(tmp_path):
    pytest.importorskip("ml_dtypes")
    nn.save(tmp_path / "net.npz", network(dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"load: 0\.weight has dtype \|V2, expected float16"):
        nn.load(tmp_path / "net.npz", network(dtype="float16"))
    nn.save(tmp_path / "net.npz", network(dtype="float16"))
    with pytest.raises(ValueError, match=r"load: 0\.weight has dtype float16, expected bfloat16"):
        nn.load(tmp_path / "net.npz", network(dtype="bfloat16"))


def test_an_optimizer_that_is_missing_or_does_not_fit_changes_nothing(tmp_path):
    net, other = network(0), network(1)
    before = other.state()
    nn.save(tmp_path / "net.npz", net)
    with pytest.raises(ValueError, match=r"load: missing names \['optimizer/0.mean'"):
        nn.load(tmp_path / "net.npz", other, nn.Adam(other.params()))
    nn.save(tmp_path / "net.npz", net, nn.SGD(net.params(), 0.1))
    with pytest.raises(ValueError, match=r"unknown names \['optimizer/0.momentum'"):
        nn.load(tmp_path / "net.npz", other, nn.Adam(other.params()))
    assert all(other.state()[name] is array for name, array in before.items())


def test_pickled_objects_are_refused(tmp_path):
    state = network().state() | {"0.bias": np.array([{"code": "anything"}] * 4, object)}
    np.savez(tmp_path / "net.npz", **state)
    with pytest.raises(ValueError, match=r"load: 0\.bias has dtype object, expected float32"):
        nn.load(tmp_path / "net.npz", network())


def write_members(path, members, compression=zipfile.ZIP_DEFLATED):
    """A zip archive of (name, bytes) as they are."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in members:
            archive.writestr(name, content)


def as_npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def members_of(layer, **changes):
    arrays = {name: as_npy(array) for name, array in layer.state().items()} | changes
    return [(f"{name}.npy", content) for name, content in arrays.items()]


def declares(shape, dtype="<f4"):
    """The head of a .npy file of this shape."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


HOSTILE = {
    "no zip": (b"nothing of the kind", "is no complete archive"),
    "empty file": (b"", "is no complete archive"),
    "no array": ({"weight": b"nothing of the kind"}, "is no complete archive"),
    "cut array": ({"weight": as_npy(np.zeros((2, 4), np.float32))[:-4]}, "is no complete archive"),
    "code for a header": (
        {"weight": b"\x93NUMPY\x01\x00" + b"\x10\x00" + b"__import__('os')"},
        "is no complete archive",
    ),
    "later format": ({"weight": b"\x93NUMPY\x09\x00"}, "is no complete archive"),
    "byte order": (
        {"weight": as_npy(np.zeros((2, 4), ">f4"))},
        r"weight has dtype >f4, expected float32",
    ),
    "declared huge": (
        {"weight": declares((2**40, 4))},
        r"weight has shape \(1099511627776, 4\), expected \(2, 4\)",
    ),
    "negative": ({"weight": declares((-1, 4))}, r"weight has shape \(-1, 4\), expected"),
    "path out of here": ({"../../evil": as_npy(np.zeros(1))}, r"unknown names \['../../evil'\]"),
    "root": ({"/etc/evil": as_npy(np.zeros(1))}, r"unknown names \['/etc/evil'\]"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_and_changes_nothing(case, tmp_path):
    content, message = HOSTILE[case]
    layer = nn.Linear(4, 2)
    path, before = tmp_path / "net.npz", layer.state()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_members(path, members_of(layer, **content))
    with pytest.raises(ValueError, match=f"^load: .*{message}"):
        nn.load(path, layer)
    assert all(layer.state()[name] is array for name, array in before.items())
    assert [file.name for file in tmp_path.iterdir()] == ["net.npz"]


def test_two_arrays_of_one_name_are_refused(tmp_path):
    layer = nn.Linear(4, 2)
    write_members(tmp_path / "net.npz", 2 * members_of(layer))
    with pytest.raises(ValueError, match=r"load: .* has two arrays of one name"):
        nn.load(tmp_path / "net.npz", layer)


def test_a_cut_or_changed_file_is_refused(tmp_path):
    layer, path = nn.Linear(40, 20, rng=np.random.default_rng(0)), tmp_path / "net.npz"
    nn.save(path, layer)
    content = path.read_bytes()
    for wrong in (content[:-30], content[: len(content) // 2], content.replace(b"\x3c", b"\x3d")):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"^load: "):
            nn.load(path, nn.Linear(40, 20))


@pytest.mark.parametrize("name", ["weight", "other"])
def test_a_zip_bomb_is_not_unpacked(name, tmp_path):
    """64 MiB of zeros in 64 KiB: behind an array that is declared as it should be, or unknown."""
    layer = nn.Linear(4, 2)
    bomb = as_npy(np.zeros((2, 4), np.float32)) + bytes(64 << 20)
    write_members(tmp_path / "net.npz", members_of(layer, **{name: bomb}))
    tracemalloc.start()
    try:
        if name == "weight":
            nn.load(tmp_path / "net.npz", layer)
        else:
            with pytest.raises(ValueError, match="unknown names"):
                nn.load(tmp_path / "net.npz", layer)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


KILLED = """
import os, signal, sys
import numpy as np
from deformable import nn

def half(file, *rest, **options):
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

np.lib.format.write_array = half
nn.save(sys.argv[1], nn.Linear(4, 2))
"""


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_a_process_that_is_killed_while_writing_leaves_the_file_from_before(tmp_path):
    path, layer, other = tmp_path / "net.npz", nn.Linear(4, 2), nn.Linear(4, 2)
    nn.save(path, layer)
    root = str(Path(__file__).parents[1])
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)], env=os.environ | {"PYTHONPATH": root}
    )
    assert process.returncode == -signal.SIGKILL
    nn.load(path, other)
    assert_equal_states(np, other.state(), layer.state())


def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path):
    path = tmp_path / "net.npz"
    layers = [nn.Linear(64, 64, rng=np.random.default_rng(i)) for i in range(8)]
    read = nn.Linear(64, 64)

    def write(layer):
        for _ in range(5):
            nn.save(path, layer)

    with ThreadPoolExecutor(len(layers)) as pool:
        list(pool.map(write, layers))
    nn.load(path, read)
    assert any((read.weight.data == layer.weight.data).all() for layer in layers)
    assert [file.name for file in tmp_path.iterdir()] == ["net.npz"]
