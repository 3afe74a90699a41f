"""The substitute for cupy: as strict as cupy, and stricter."""

import gc
import inspect
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from tests.simt import build, fakecupy, substitute
from tests.simt import fakecupy as cupy
from tests.simt.fakecupy import _memory
from tests.simt.fakecupy.cuda import cublas, device, runtime

RNG = np.random.default_rng(0)

# ---- against the real one

PLACES = ["", "ndarray", "cuda", "cuda.Device", "cuda.Stream", "cuda.cublas", "cuda.device"]
PLACES += ["cuda.runtime", "lib.stride_tricks", "RawModule", "RawKernel"]
ASK_CUPY = """
import inspect, json, re, sys
import cupy

def parameters(thing):
    try:
        return list(inspect.signature(thing).parameters)
    except (TypeError, ValueError):  # compiled: the first line of its documentation tells
        text = re.search(r"\\((.*?)\\)(?: ->|\\n|$)", (thing.__doc__ or "").replace("\\\\", ""))
        words = re.findall(r"[\\w.]+(?==|,|$)", re.sub(r"=[^,]*", "", text[1])) if text else None
        return words

answer = {}
for place in json.load(sys.stdin):
    thing = cupy
    try:
        for name in place.split(".") if place else []:
            thing = getattr(thing, name)
    except ImportError:
        continue
    answer[place] = {
        name: parameters(getattr(thing, name)) if callable(getattr(thing, name)) else None
        for name in dir(thing)
    }
json.dump(answer, sys.stdout)
"""


@pytest.fixture(scope="module")
def real():
    """The names in the real cupy and their parameters, asked in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-c", ASK_CUPY], input=json.dumps(PLACES), capture_output=True, text=True
    )
    if "No module named 'cupy'" in process.stderr:
        pytest.skip("the real cupy is not installed")
    assert not process.returncode, process.stderr
    return json.loads(process.stdout)


def ours(place):
    """The same of the substitute."""
    if place == "RawKernel":
        return {"max_dynamic_shared_size_bytes": None, "__call__": None}
    thing = cupy
    for name in place.split(".") if place else []:
        thing = getattr(thing, name)
    names = {n: v for n, v in vars(thing).items() if not n.startswith("_")}
    if inspect.ismodule(thing):  # without what it has only imported for itself
        names = {n: v for n, v in names.items() if not inspect.ismodule(v) or "cupy" in v.__name__}
    return names


OWN_NAMES = {
    "RawModule": {"built", "watchers", "file", "entries", "regions", "place"},
    "cuda": {"current", "NULL_STREAM", "cublas"},  # cublas is loaded when asked for
    "cuda.cublas": {"LEGAL", "current", "note", "device"}
    | {name for name in vars(runtime) if name.startswith("CUDA_R")},
    "cuda.device": {"ATTRIBUTES", "CUBLAS_HANDLES", "DEVICES", "current", "settings"},
    "cuda.runtime": {"DEVICES", "current"},
    "lib.stride_tricks": {"checked"},
}
OTHER_FORMS = {"einsum", "matmul", "pad", "transpose", "reshape", "broadcast_shapes"}


@pytest.mark.parametrize("place", PLACES)
def test_names_and_parameters_are_cupys(real, place):
    if place not in real:
        pytest.skip(f"cupy.{place} cannot be loaded here")
    for name, thing in ours(place).items():
        if name in OWN_NAMES.get(place, ()):
            continue
        assert name in real[place], f"cupy has no {place}.{name}"
        theirs = real[place][name]
        if callable(thing) and not isinstance(thing, type) and theirs and name not in OTHER_FORMS:
            mine = [p for p in inspect.signature(thing).parameters if p != "self"]
            mine = [p for p in mine if not (p.startswith("x") and p[1:].isdigit())]
            assert set(mine) <= set(theirs), f"{place}.{name}: {mine}, cupy's are {theirs}"


def test_constants_are_cudas():
    # from library_types.h and cublas_api.h
    assert (runtime.CUDA_R_32F, runtime.CUDA_R_64F) == (0, 1)
    assert (runtime.CUDA_R_16F, runtime.CUDA_R_16BF) == (2, 14)
    assert (cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_COMPUTE_64F) == (68, 70)
    assert cublas.CUBLAS_COMPUTE_32F_FAST_TF32 == 77
    assert (cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T, cublas.CUBLAS_GEMM_DEFAULT) == (0, 1, -1)


def test_it_can_be_imported_as_cupy():
    code = """
from tests.simt import substitute
substitute.install()
import cupy
import cupy.cuda.cublas
from cupy.cuda import device, runtime
from cupy.lib.stride_tricks import sliding_window_view
assert cupy.cuda.cublas.gemmEx and not cupy.is_available()
assert cupy.get_array_module(cupy.zeros(3)) is cupy
"""
    root = build.HERE.parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# ---- no mixing, no implicit conversion


X = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "use",
    [
        lambda a, b: a + b,
        lambda a, b: b + a,
        lambda a, b: np.add(b, a),
        lambda a, b: cupy.maximum(a, b),
        lambda a, b: a @ b.T,
        lambda a, b: a.__iadd__(b),
        lambda a, b: b.__iadd__(a),
        lambda a, b: a == b,
        lambda a, b: cupy.where(a > 1, a, b),
        lambda a, b: cupy.concatenate([a, b]),
        lambda a, b: cupy.sum(b),
        lambda a, b: cupy.matmul(a, b.T),
        lambda a, b: cupy.ascontiguousarray(b),
        lambda a, b: a.__setitem__(slice(None), b),
        lambda a, b: a[b > 1],
        lambda a, b: cupy.empty_like(b),
        lambda a, b: np.asarray(a),
        lambda a, b: np.array([a, a]),
        lambda a, b: np.float32(a),
        lambda a, b: b.__setitem__(slice(None), a),
    ],
)
def test_numpy_arrays_do_not_mix(use):
    with pytest.raises(TypeError, match=r"Unsupported type|Implicit conversion|only 0-d|supported"):
        use(cupy.asarray(X), X.copy())


def test_numpy_scalars_and_python_numbers_mix():
    a = cupy.asarray(X.astype("f4"))
    assert (a + np.float32(1)).dtype == a.dtype == (2 * a).dtype
    assert (a + np.float64(1)).dtype == np.float64  # NEP 50


def test_answers_are_device_arrays_of_no_dimensions_not_scalars():
    a = cupy.asarray(X)
    for answer in (
        a.sum(),
        a.max(),
        a[0, 0],
        cupy.mean(a),
        a @ a.T,
        cupy.sqrt(a)[1, 1],
        a.argmax(),
    ):
        assert isinstance(answer, cupy.ndarray)
    assert isinstance(np.exp(a), cupy.ndarray) and isinstance(np.sum(a), cupy.ndarray)


def test_objects_and_strings_are_refused():
    for wrong in (["a"], [None], [object()]):
        with pytest.raises(ValueError, match="Unsupported dtype"):
            cupy.asarray(wrong)


def test_what_cupy_does_not_have_does_not_exist():
    a = cupy.asarray(X)
    for name in ("tofile", "setflags", "byteswap", "ctypes", "__array_interface__", "nonsense"):
        assert not hasattr(a, name)
    assert not hasattr(a.flags, "writeable")
    for name in ("vectorize", "frompyfunc", "longdouble", "genfromtxt"):
        assert not hasattr(cupy, name)
    with pytest.raises(TypeError, match="initial"):
        cupy.sum(a, initial=0)
    with pytest.raises(TypeError, match="where"):
        cupy.exp(a, where=a > 1)
    with pytest.raises(ValueError, match="kind"):
        cupy.sort(a, kind="quicksort")
    with pytest.raises(TypeError, match="sort of bfloat16"):
        a.astype(ml_dtypes.bfloat16).sort()


# ---- values


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_floats_are_summed_in_float32(dtype):
    ones = cupy.full((1, 40000), 0.25, dtype)
    exact = np.float32(10000).astype(dtype)
    for total in (
        ones.sum(),
        cupy.sum(ones, axis=1),
        ones @ ones.T * 4,
        cupy.dot(ones[0], ones[0]),
    ):
        assert total.dtype == dtype
        assert (total.get() == (exact if total.ndim or total.get() > 5000 else exact / 4)).all()
    assert ones.mean().get() == dtype(0.25)
    assert ones.var().get() == 0
    assert cupy.einsum("ij,kj->ik", ones, ones).get() * 4 == exact
    assert ones.sum(dtype="f4").dtype == np.float32


def test_functions_and_methods_are_numpys():
    a = cupy.asarray(X)
    pairs = [
        (cupy.pad(a, 1), np.pad(X, 1)),
        (a.transpose(1, 0)[::-1], X.T[::-1]),
        (cupy.where(a > 2, a, 0), np.where(X > 2, X, 0)),
        (cupy.cumsum(a, axis=1), X.cumsum(1)),
        (cupy.searchsorted(a[1], a[0] + 2), np.searchsorted(X[1], X[0] + 2)),
        (cupy.tensordot(a, a, ([1], [1])), X @ X.T),
        (cupy.clip(a, 1, 3), X.clip(1, 3)),
        (a.reshape(3, 2).astype("i4"), X.reshape(3, 2).astype("i4")),
        (cupy.take_along_axis(a, cupy.argsort(-a, axis=1), 1), -np.sort(-X)),
        (cupy.lib.stride_tricks.sliding_window_view(a, 2, axis=1)[0], [[0, 1], [1, 2]]),
        (cupy.lib.stride_tricks.as_strided(a, (2, 2), (24, 8)), X[:, :2]),
        (a.std(axis=0, ddof=1), X.std(0, ddof=1)),
        (cupy.asarray([a[0, 0], a[1, 1]]), [0, 4]),
        (cupy.stack([a, a], axis=1), np.stack([X, X], 1)),
        (cupy.linspace(0, 1, 5), np.linspace(0, 1, 5)),
        (cupy.eye(3) * cupy.arange(3), np.diag([0, 1, 2])),
    ]
    for got, expected in pairs:
        np.testing.assert_array_equal(got.get(), expected)
    b = cupy.empty_like(a)
    assert cupy.add(a, 1, out=b) is b
    a += b
    np.testing.assert_array_equal(a.get(), 2 * X + 1)


def test_a_gpu_does_not_warn():
    a = cupy.asarray(X)
    assert cupy.isnan(a / 0).any().item() and cupy.isinf(cupy.log(a)).any().item()
    a[...] = a.astype("f2") * 1e6


def test_memory_orders_are_kept():
    nhwc = cupy.zeros((2, 4, 5, 3), "f4").transpose(0, 3, 1, 2)
    for made in (
        cupy.asarray(nhwc, "f8").astype("f4"),
        cupy.array(nhwc),
        cupy.empty_like(nhwc),
        nhwc + 1,
    ):
        assert made.strides == nhwc.strides
    assert cupy.ascontiguousarray(nhwc).flags.c_contiguous
    assert nhwc.copy().flags.c_contiguous
    assert nhwc.astype("f4", order="C", copy=False).flags.c_contiguous


def test_what_comes_from_the_host_is_in_c_or_fortran_order():
    host = np.arange(24.0).reshape(2, 3, 4)
    assert cupy.asarray(host.T).flags.f_contiguous
    for other in (host, host.transpose(0, 2, 1), host[:, ::-1]):
        assert cupy.asarray(other).flags.c_contiguous
        np.testing.assert_array_equal(cupy.asarray(other).get(), other)


# ---- memory


def test_fresh_memory_is_poison_aligned_and_guarded():
    for dtype in ("f2", "f4", "f8", ml_dtypes.bfloat16):
        assert np.isnan(cupy.empty(5, dtype).get().astype("f8")).all()
    assert (cupy.empty(5, "i4").get() == -1).all()
    a, b = cupy.empty(5, "f4"), cupy.empty(5, "f4")
    assert a.data.ptr % 512 == 0
    assert abs(a.data.ptr - b.data.ptr) >= _memory.GUARD
    assert a[2:].data.ptr == a.data.ptr + 8


def test_large_memory_is_not_there_until_it_is_touched():
    with substitute.memory() as peak:
        big = cupy.zeros((1 << 20, 1 << 16), "f4")
        assert big[12345, 54321].get() == 0
        del big
    assert peak == [1 << 38]


def test_memory_is_measured_and_freed():
    gc.collect()  # what other tests have left in cycles
    before = cupy.get_default_memory_pool().used_bytes()
    with substitute.memory() as peak:
        a = cupy.zeros(1000, "f8")
        view = a[10:]
        del a
        cupy.zeros(500, "f8")
        assert cupy.get_default_memory_pool().used_bytes() == before + 8000
        del view
    assert peak == [12000]
    assert cupy.get_default_memory_pool().used_bytes() == before


# ---- waiting for the device


@pytest.mark.parametrize(
    "wait",
    [
        lambda a: a.get(),
        lambda a: float(a[0, 0]),
        lambda a: int(a[0, 0]),
        lambda a: bool(a[0, 0]),
        lambda a: [1, 2, 3][a.astype("i4")[0, 1]],
        lambda a: a[0, 0].item(),
        lambda a: a.tolist(),
        lambda a: repr(a),
        lambda a: a[a > 2],
        lambda a: cupy.asnumpy(a),
        lambda a: cupy.nonzero(a),
        lambda a: cupy.unique(a),
        lambda a: cupy.cuda.Device().synchronize(),
        lambda a: cupy.cuda.get_current_stream().synchronize(),
    ],
)
def test_waiting_is_counted_and_can_be_forbidden(wait):
    a = cupy.asarray(X)
    before = substitute.synchronisations()
    wait(a)
    assert substitute.synchronisations() == before + 1
    with substitute.no_synchronisation(), pytest.raises(substitute.DeviceSynchronized):
        wait(a)


def test_computing_does_not_wait():
    with substitute.no_synchronisation():
        a = cupy.asarray(X)
        b = cupy.where(a > 2, a, 0).sum(axis=1) @ cupy.ones(2)
        a[a > 2] = 0
        assert b.shape == () and a.dtype == b.dtype and len(a) == 2


# ---- matrix products


def gemm(a, b, c, alpha=1, beta=0, compute=None, **changes):
    """c = alpha a @ b + beta c of row-major matrices, in cuBLAS's way: cᵀ = bᵀ aᵀ."""
    kinds = {"float16": 2, "bfloat16": 14, "float32": 0, "float64": 1}
    compute = compute or (70 if a.dtype == np.float64 else 68)
    scalar = np.float64 if compute == 70 else np.float32
    alpha, beta = np.array(alpha, scalar), np.array(beta, scalar)
    (m, k), n = a.shape, b.shape[1]
    values = {
        "handle": device.get_cublas_handle(),
        "transa": int(b.strides[1] != b.itemsize),
        "transb": int(a.strides[1] != a.itemsize),
        "m": n,
        "n": m,
        "k": k,
        "alpha": alpha.ctypes.data,
        "A": b.data.ptr,
        "Atype": kinds[b.dtype.name],
        "lda": max(b.strides) // b.itemsize,
        "B": a.data.ptr,
        "Btype": kinds[a.dtype.name],
        "ldb": max(a.strides) // a.itemsize,
        "beta": beta.ctypes.data,
        "C": c.data.ptr,
        "Ctype": kinds[c.dtype.name],
        "ldc": c.strides[0] // c.itemsize,
        "computeType": compute,
        "algo": -1,
    }
    cublas.gemmEx(*(values | changes).values())


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        ("f4", "f4"),
        ("f8", "f8"),
        ("f2", "f2"),
        ("f2", "f4"),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, "f4"),
    ],
)
def test_gemm_multiplies(dtype, out, transposed):
    a, b = RNG.integers(-4, 5, (3, 5)).astype(dtype), RNG.integers(-4, 5, (5, 7)).astype(dtype)
    c = RNG.integers(-9, 9, (3, 9)).astype(out)
    expected = 2 * (a.astype("f8") @ b.astype("f8")) - c[:, :7].astype("f8")
    at = cupy.asarray(a.T.copy()).T if transposed[0] else cupy.asarray(a)
    bt = cupy.asarray(b.T.copy()).T if transposed[1] else cupy.asarray(b)
    wide = cupy.asarray(c)
    gemm(at, bt, wide[:, :7], alpha=2, beta=-1)
    np.testing.assert_array_equal(wide[:, :7].get().astype("f8"), expected)
    np.testing.assert_array_equal(wide[:, 7:].get(), c[:, 7:])


def test_batched_gemm_multiplies_every_pair():
    a, b = RNG.integers(-4, 5, (6, 3, 5)).astype("f4"), RNG.integers(-4, 5, (6, 5, 2)).astype("f4")
    c = cupy.empty((6, 3, 2), "f4")
    one, zero = np.array(1, "f4"), np.array(0, "f4")
    da, db = cupy.asarray(a), cupy.asarray(b)
    cublas.gemmStridedBatchedEx(
        *(device.get_cublas_handle(), 0, 0, 2, 3, 5, one.ctypes.data),
        *(db.data.ptr, 0, 2, 10, da.data.ptr, 0, 5, 15, zero.ctypes.data),
        *(c.data.ptr, 0, 2, 6, 6, 68, -1),
    )
    np.testing.assert_array_equal(c.get(), a @ b)


def test_gemm_sums_halves_in_float32_and_does_not_read_what_it_overwrites():
    a = cupy.full((1, 40000), 0.25, "f2")
    c = cupy.empty((1, 1), "f2")
    gemm(a, a.T, c)
    assert c.get() == 2500


def test_tf32_rounds_the_factors():
    a = cupy.asarray(np.float32([[1 + 2**-11, 1 + 2**-12]]))
    exact, rounded = cupy.empty((1, 2), "f4"), cupy.empty((1, 2), "f4")
    gemm(cupy.ones((1, 1), "f4"), a, exact)
    gemm(cupy.ones((1, 1), "f4"), a, rounded, compute=77)
    assert exact.get().tolist() == a.get().tolist()
    assert rounded.get().tolist() == [[1 + 2**-10, 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"handle": 5}, "no handle"),
        ({"algo": 3}, "algorithm"),
        ({"computeType": 64}, "compute type"),
        ({"computeType": 70}, "combination of types"),
        ({"Atype": 2}, "combination of types"),
        ({"transa": 5}, "operation"),
        ({"m": -1}, "m is -1"),
        ({"lda": 6}, "lda is 6, A has 7 rows"),
        ({"ldb": 4}, "ldb is 4, B has 5 rows"),
        ({"ldc": 6}, "ldc is 6, C has 7 rows"),
        ({"lda": 8}, "A takes 156 bytes, 140 lie"),
        ({"n": 4}, "B takes 80 bytes, 60 lie"),
        ({"k": 6}, "A takes 168 bytes, 140 lie"),
        ({"C": 12345}, "C takes 84 bytes, 0 lie"),
        ({"m": np.int32(7)}, "m is int32, expected int"),
    ],
)
def test_wrong_gemm_is_refused(changes, message):
    a, b, c = cupy.ones((3, 5), "f4"), cupy.ones((5, 7), "f4"), cupy.ones((3, 7), "f4")
    with pytest.raises((cublas.CUBLASError, TypeError), match=message):
        gemm(a, b, c, **changes)
    assert (c.get() == 1).all()


def test_empty_gemm_does_nothing():
    gemm(cupy.ones((0, 5), "f4"), cupy.ones((5, 7), "f4"), cupy.ones((0, 7), "f4"), ldb=5, ldc=7)


# ---- devices


def test_arrays_belong_to_the_device_they_were_made_on():
    with cupy.cuda.Device(1):
        a = cupy.ones(3)
        assert a.device == cupy.cuda.Device(1) == cupy.cuda.Device()
        assert fakecupy.cuda.get_device_id() == 1
    assert cupy.cuda.Device().id == 0
    with pytest.raises(ValueError, match="Array device must be same as the current device"):
        a + 1
    with pytest.raises(RuntimeError, match="invalid device"):
        cupy.cuda.Device(2)


def test_device_tells_what_kernels_need_to_know():
    attributes = cupy.cuda.Device().attributes
    assert attributes["MaxSharedMemoryPerBlockOptin"] == 232448
    major, minor = attributes["ComputeCapabilityMajor"], attributes["ComputeCapabilityMinor"]
    assert f"{major}{minor}" == cupy.cuda.Device().compute_capability == "90"
