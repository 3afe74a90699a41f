"""The simulator's CUDA means what CUDA's does."""

import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.simt import build, nvrtc
from tests.simt import fakecupy as cupy

pytestmark = pytest.mark.skipif(not build.available(), reason="no g++ to build kernels with")
PTX = (build.HERE.parents[1] / "deformable" / "cuda" / "ptx.cuh").read_text()
KERNEL = """
{before}
extern "C" __global__ void {name}({parameters}) {{
{body}
}}
"""
LANES = np.arange(32)
RNG = np.random.default_rng(0)

have_run = {}  # kernels, and the first test that ran each: NVRTC gets them all at the end


def run(parameters, body, *args, block=(32,), grid=(1,), before=""):
    """Run ``body`` as a kernel with these parameters."""
    text = KERNEL.format(name="k", before=before, parameters=parameters, body=body)
    have_run.setdefault((before, parameters, body), os.environ["PYTEST_CURRENT_TEST"])
    cupy.RawModule(code=PTX + text).get_function("k")(grid, block, args)


HALF = np.float16(2048) + LANES.astype("f2")
EXPRESSIONS = {
    # warps
    "__shfl_sync(~0u, 10 * t, 5)": 50,
    "__shfl_sync(~0u, 10 * t, t + 1)": 10 * ((LANES + 1) % 32),
    "__shfl_sync(~0u, 10 * t, 3, 8)": 10 * (LANES // 8 * 8 + 3),
    "__shfl_up_sync(~0u, 10 * t, 2)": 10 * np.where(LANES < 2, LANES, LANES - 2),
    "__shfl_up_sync(~0u, 10 * t, 2, 8)": 10 * np.where(LANES % 8 < 2, LANES, LANES - 2),
    "__shfl_down_sync(~0u, 10 * t, 2)": 10 * np.where(LANES > 29, LANES, LANES + 2),
    "__shfl_down_sync(~0u, 10 * t, 2, 8)": 10 * np.where(LANES % 8 > 5, LANES, LANES + 2),
    "__shfl_xor_sync(~0u, 10 * t, 3)": 10 * (LANES ^ 3),
    "__shfl_xor_sync(~0u, 10 * t, 9, 8)": 10 * np.where(LANES % 16 < 8, LANES, LANES ^ 9),
    "t < 20 ? __shfl_xor_sync(0xfffffu, t, 1) : -1": np.where(LANES < 20, LANES ^ 1, -1),
    "__popc(__ballot_sync(~0u, t % 3 == 0))": 11,
    "__ballot_sync(~0u, t == 4)": 16,
    "__any_sync(~0u, t == 4) + 2 * __any_sync(~0u, t == 40)": 1,
    "__all_sync(~0u, t < 32) + 2 * __all_sync(~0u, t < 31)": 1,
    "__reduce_add_sync(~0u, t)": 496,
    "__reduce_max_sync(~0u, t) - __reduce_min_sync(~0u, t - 3)": 34,
    "__reduce_or_sync(~0u, 1u << t % 5) + __reduce_and_sync(~0u, 6u)": 37,
    "__reduce_xor_sync(~0u, unsigned(t))": 0,
    "__popc(__match_any_sync(~0u, t / 3))": np.where(LANES < 30, 3, 2),
    # bits and integers
    "__umulhi(0xffffffffu, unsigned(t))": np.maximum(LANES - 1, 0),
    "__mulhi(-2147483647, 4)": -2,
    "int(__umul64hi(1ull << 63, 6ull))": 3,
    "int(__mul64hi(-(1ll << 62), 8ll))": -2,
    "__clz(t) + __clz(-1)": [32 - int(t).bit_length() for t in LANES],
    "__clzll(t)": [64 - int(t).bit_length() for t in LANES],
    "__ffs(t)": [(int(t) & -int(t)).bit_length() for t in LANES],
    "__ffsll(1ll << (t + 20))": LANES + 21,
    "__popc(t) + __popcll(~0ll)": [int(t).bit_count() + 64 for t in LANES],
    "__brev(t) == 1u << 31": LANES == 1,
    "min(t, 5) + max(t, 20u)": np.minimum(LANES, 5) + np.maximum(LANES, 20),
    "t / 7 * 100 + t % 7": LANES // 7 * 100 + LANES % 7,
    "__float_as_int(__int_as_float(t << 24))": LANES << 24,
    "int(__float_as_uint(__uint_as_float(t + 3u)))": LANES + 3,
    "int(moved(t + 3u))": LANES + 3,
    "int(2 * __longlong_as_double(__double_as_longlong(t * .5)))": LANES,
    # conversions
    "__float2int_rd(t - 3.5f)": LANES - 4,
    "__float2int_ru(t - 3.5f)": LANES - 3,
    "__float2int_rn(t + .5f)": np.rint(LANES + 0.5),
    "__float2int_rz(t - 3.5f)": np.trunc(LANES - 3.5),
    "__double2int_rd(t - 3.5)": LANES - 4,
    "__double2int_rn(t + .5)": np.rint(LANES + 0.5),
    "__double2int_rz(t - 3.5)": np.trunc(LANES - 3.5),
    "int(__float2uint_rn(t + .5f))": np.rint(LANES + 0.5),
    "int(__double2ll_rd(t - 3.5))": LANES - 4,
    "int(2 * __int2float_rn(t))": 2 * LANES,
    "__float2int_rd(1e30f) == 2147483647 && __float2int_rd(-1e30f) == -2147483647 - 1": 1,
    '__float2int_rd(nanf("")) + __double2int_rz(-nan("")) + int(__float2uint_rd(-5.f))': 0,
    "__float2ll_rd(1e30f) == 9223372036854775807ll": 1,
    # floating point
    'max(t - 7.5f, nanf("")) == t - 7.5f && min(nan(""), 2.0) == 2': 1,
    "int(rsqrtf(4.f) * 8 + __fdividef(t, .5f) + __saturatef(3.f))": 4 + 2 * LANES + 1,
    "int(fmaf(t, 2, 1) + abs(-1.5f) * 2 + floorf(-.5f) + rint(2.5))": 2 * LANES + 5,
    "int(rsqrt(4.) * 8 + __frcp_rn(.5f) + __fsqrt_rn(16.f))": 10,
    "int(.5f + 8 * __logf(__expf(4.f)))": 32,
    "int(__fdiv_rn(__fsub_rn(__fadd_rn(__fmul_rn(t, 3), 5), 1), .5f))": 6 * LANES + 8,
    "int(__fmaf_rn(4097.f, 4097.f, -4097.f * 4097.f))": 1,
    "int(2 * __dadd_rn(__dmul_rn(t, .5), 1))": LANES + 2,
    # 16 bits: every operation rounds
    "int(__half2float(__float2half(2048) + __float2half(t)))": HALF,
    "int(__half2float(__hadd(__float2half_rn(t), __float2half(2048))))": HALF,
    "int(__half2float(__hmul(__float2half(t), __float2half(3))))": 3 * LANES,
    "int(__half2float(-__float2half(t) / __float2half(.5f) - __float2half(1)))": -2 * LANES - 1,
    "__float2half(t) * __float2half(2) > __float2half(9)": LANES > 4,
    '__hisnan(__float2half(nanf(""))) + 2 * __hisnan(__float2half(t))': 1,
    "int(__low2float(__halves2half2(__float2half(t), __float2half(9))))": LANES,
    "int(__half2float(__high2half(__floats2half2_rn(9, t))))": LANES,
    "int(__half2float(__low2half(__float2half2_rn(t))))": LANES,
    "int(__half22float2(__float22half2_rn(make_float2(9, t))).y)": LANES,
    "int(__low2float(__hadd2(__float2half2_rn(t), __float2half2_rn(2048))))": HALF,
    "int(__high2float(__hmul2(__float2half2_rn(t), __float2half2_rn(3))))": 3 * LANES,
    "int(__high2float(__hfma2(__float2half2_rn(t), __float2half2_rn(2), __float2half2_rn(1))))": (
        2 * LANES + 1
    ),
    "int(__bfloat162float(__float2bfloat16(256) + __float2bfloat16_rn(1)))": 256,
    "int(__low2float(__halves2bfloat162(__float2bfloat16(t), __float2bfloat16(9))))": LANES,
    "int(__high2float(__floats2bfloat162_rn(9, t)))": LANES,
    "int(__bfloat1622float2(__float22bfloat162_rn(make_float2(9, t))).y)": LANES,
}


@pytest.fixture(scope="module")
def values():
    """What all EXPRESSIONS are in every thread t of a warp: one kernel computes them."""
    y = cupy.empty((len(EXPRESSIONS), 32), "i4")
    lines = [f"y[{32 * i} + t] = {expression};" for i, expression in enumerate(EXPRESSIONS)]
    run("int* y", "\n".join(["const int t = threadIdx.x;", *lines]), y)
    return dict(zip(EXPRESSIONS, y.get(), strict=True))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression(expression, values):
    assert (values[expression] == EXPRESSIONS[expression]).all()


# ---- warps


@pytest.mark.parametrize(
    ("ctype", "dtype"),
    [
        *(("double", "f8"), ("unsigned long long", "u8"), ("float", "f4")),
        *(("__half", "f2"), ("__nv_bfloat16", ml_dtypes.bfloat16)),
    ],
)
def test_shuffles_of_other_numbers(ctype, dtype):
    y = cupy.empty(32, dtype)
    body = f"y[threadIdx.x] = __shfl_xor_sync(~0u, static_cast<{ctype}>(threadIdx.x * .5f), 1);"
    run(f"{ctype}* y", body, y)
    assert y.get().tolist() == ((LANES ^ 1) * 0.5).astype(dtype).tolist()


def test_lanes_that_have_returned_are_not_waited_for():
    y = cupy.zeros(32, "i4")
    body = """
    const int t = threadIdx.x;
    if (t >= 20) return;
    y[t] = __popc(__ballot_sync(~0u, 1)) + __shfl_xor_sync(~0u, t, 1);
    """
    run("int* y", body, y)
    assert y.get().tolist() == np.where(LANES < 20, 20 + (LANES ^ 1), 0).tolist()


def test_lanes_of_a_block_count_in_all_dimensions():
    y = cupy.zeros(64, "i4")
    body = """
    const int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    y[t] = __shfl_sync(~0u, t, 0);
    """
    run("int* y", body, y, block=(4, 8, 2))
    assert y.get().tolist() == [0] * 32 + [32] * 32


def test_indices_of_blocks_and_threads():
    y = cupy.empty((2, 3, 4, 5, 6, 7), "i4")
    body = """
    const dim3 g = gridDim, b = blockDim;
    const int block = blockIdx.x + g.x * (blockIdx.y + g.y * blockIdx.z);
    const int thread = threadIdx.x + b.x * (threadIdx.y + b.y * threadIdx.z);
    y[block * (b.x * b.y * b.z) + thread] = blockIdx.z * 10000 + blockIdx.x * 100 + threadIdx.y;
    """
    run("int* y", body, y, grid=(4, 3, 2), block=(7, 6, 5))
    z, _, x, _, row, _ = np.indices(y.shape)
    assert (y.get() == z * 10000 + x * 100 + row).all()


def test_warps_hand_shared_memory_to_each_other():
    y = cupy.empty(64, "i4")
    body = """
    __shared__ int s[64];
    s[threadIdx.x] = threadIdx.x;
    __threadfence_block();
    __syncthreads();
    y[threadIdx.x] = s[63 - threadIdx.x];
    __threadfence();
    """
    run("int* y", body, y, block=(64,))
    assert y.get().tolist() == list(range(63, -1, -1))


def test_barriers_tell_whether_any_thread_of_the_block_says_yes():
    y = cupy.empty((3, 64), "i4")
    body = """
    const int t = threadIdx.x;
    y[t] = __syncthreads_or(t == 40) != 0;
    y[64 + t] = __syncthreads_or(t == 64) != 0;
    y[128 + t] = __syncthreads_or(4 * t) != 0;
    """
    run("int* y", body, y, block=(64,))
    assert y.get().tolist() == [[1] * 64, [0] * 64, [1] * 64]


# ---- atomics


def test_atomics():
    cells = {  # first value, and the last one
        "atomicAdd(y, t)": (1, 497),
        "atomicSub(y, t)": (1, -495),
        "atomicMax(y, t)": (7, 31),
        "atomicMin(y, t)": (7, 0),
        "atomicAnd(y, ~(1 << t % 3))": (15, 8),
        "atomicOr(y, 1 << t % 3)": (8, 15),
        "atomicXor(y, t)": (5, 5),
        "atomicExch(y, 3)": (5, 3),
        "atomicCAS(y, t, t + 1)": (0, 32),
        "atomicInc(reinterpret_cast<unsigned*>(y), 4u)": (0, 32 % 5),
        "atomicDec(reinterpret_cast<unsigned*>(y), 4u)": (0, -32 % 5),
    }
    y = cupy.array([first for first, _ in cells.values()], "i4")
    lines = [f"{call.replace('y', f'y + {i}', 1)};" for i, call in enumerate(cells)]
    run("int* y", "\n".join(["const int t = threadIdx.x;", *lines]), y)
    assert dict(zip(cells, y.get(), strict=True)) == {c: last for c, (_, last) in cells.items()}


@pytest.mark.parametrize(("dtype", "ctype"), [("f4", "float"), ("f8", "double")])
def test_atomic_sum_of_floats(dtype, ctype):
    y = cupy.zeros(1, dtype)
    run(f"{ctype}* y", "atomicAdd(y, 0.5f);", y, grid=(3,))
    assert y.get() == 48


def test_atomic_sum_of_halves():
    y = cupy.zeros(1, "f2")
    run("__half* y", "atomicAdd(y, __float2half(0.5f));", y)
    assert y.get() == 16


def test_atomics_answer_what_was_there():
    y = cupy.empty(32, "i4")
    run("int* y", "y[threadIdx.x] = atomicAdd(&sum, 2);", y, before="__shared__ int sum;")
    assert sorted(y.get()) == list(range(-1, 63, 2))


# ---- vectors and numbers of 16 bits


def test_vector_types_have_cudas_sizes_and_alignments():
    types = {
        "float2": (8, 8),
        "float3": (12, 4),
        "float4": (16, 16),
        "double2": (16, 16),
        "double4": (32, 16),
        "int2": (8, 8),
        "int4": (16, 16),
        "uint3": (12, 4),
        "uint4": (16, 16),
        "short4": (8, 8),
        "char4": (4, 4),
        "uchar2": (2, 2),
        "longlong2": (16, 16),
        "half2": (4, 4),
        "nv_bfloat162": (4, 4),
    }
    y = cupy.empty((len(types), 2), "i4")
    lines = [
        f"y[{2 * j}] = sizeof({t}); y[{2 * j + 1}] = alignof({t});" for j, t in enumerate(types)
    ]
    run("int* y", "\n".join(lines), y, block=(1,))
    assert dict(zip(types, map(tuple, y.get().tolist()), strict=True)) == types


def test_vector_loads_and_stores():
    x, y = cupy.arange(128, dtype="f4"), cupy.empty(128, "f4")
    body = """
    const float4 v = reinterpret_cast<const float4*>(x)[threadIdx.x];
    reinterpret_cast<float2*>(y)[2 * threadIdx.x] = make_float2(v.w, v.z);
    reinterpret_cast<float2*>(y)[2 * threadIdx.x + 1] = make_float2(v.y, v.x);
    """
    run("const float* x, float* y", body, x, y)
    assert (y.get().reshape(32, 4)[:, ::-1] == np.arange(128).reshape(32, 4)).all()


@pytest.mark.parametrize(
    ("dtype", "ctype"), [(np.float16, "__half"), (ml_dtypes.bfloat16, "__nv_bfloat16")]
)
def test_all_16_bit_floats_convert_to_float_and_back(dtype, ctype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(dtype)
    wide, back = cupy.empty(bits.shape, "f4"), cupy.empty(bits.shape, dtype)
    body = """
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    wide[t] = static_cast<float>(x[t]);
    back[t] = wide[t];
    """
    args = cupy.asarray(values), wide, back
    run(f"const {ctype}* x, float* wide, {ctype}* back", body, *args, grid=(64,), block=(1024,))
    np.testing.assert_array_equal(wide.get(), values.astype("f4"))
    np.testing.assert_array_equal(back.get().astype("f4"), values.astype("f4"))


@pytest.mark.parametrize(
    ("dtype", "ctype"), [(np.float16, "__half"), (ml_dtypes.bfloat16, "__nv_bfloat16")]
)
def test_floats_are_rounded_to_16_bits_as_numpy_does(dtype, ctype):
    bits = RNG.integers(0, 1 << 32, 1 << 15, dtype=np.uint32)
    bits[::2] &= 0xFFFFF000  # ties
    bits[1::4] = RNG.normal(0, 100, bits[1::4].size).astype("f4").view("u4")
    x = bits.view("f4")
    y = cupy.empty(x.shape, dtype)
    body = "const int t = blockIdx.x * blockDim.x + threadIdx.x;\ny[t] = x[t];"
    run(f"const float* x, {ctype}* y", body, cupy.asarray(x), y, grid=(32,), block=(1024,))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(y.get().astype("f4"), x.astype(dtype).astype("f4"))


# ---- numbers


def test_division_by_an_invariant():
    numbers = RNG.integers(0, 1 << 31, 4096, dtype=np.int64).astype("u4")
    for divisor in (1, 2, 3, 7, 10, 641, 65537, 2**31 - 1):
        shift = (divisor - 1).bit_length()
        magic = ((1 << 32) * ((1 << shift) - divisor) // divisor + 1) & 0xFFFFFFFF
        y = cupy.empty(numbers.shape, "u4")
        run(
            "const unsigned* x, unsigned* y, unsigned magic, unsigned shift",
            "const int t = blockIdx.x * 1024 + threadIdx.x;\n"
            "y[t] = (__umulhi(x[t], magic) + x[t]) >> shift;",
            *(cupy.asarray(numbers), y, np.uint32(magic), np.uint32(shift)),
            block=(1024,),
            grid=(4,),
        )
        assert (y.get() == numbers // divisor).all()


def test_loads_and_stores_with_cache_hints():
    x, y = cupy.arange(32, dtype="f4"), cupy.empty((2, 32), "f4")
    body = """
    const int t = threadIdx.x;
    __stcs(y + t, __ldg(x + t) + __ldcs(x + t));
    __stcg(y + 32 + t, __ldcg(x + t) + __ldlu(x + t));
    """
    run("const float* x, float* y", body, x, y)
    assert (y.get() == 2 * LANES).all()


# ---- the instructions of ptx.cuh


@pytest.mark.parametrize(
    ("name", "k", "dtype"),
    [
        ("mma_m16n8k8_tf32", 8, np.float32),
        ("mma_m16n8k16_f16", 16, np.float16),
        ("mma_m16n8k16_bf16", 16, ml_dtypes.bfloat16),
    ],
)
def test_mma_multiplies_matrices(name, k, dtype):
    a = RNG.integers(-8, 9, (16, k)).astype(dtype)
    b = RNG.integers(-8, 9, (k, 8)).astype(dtype)
    c = RNG.integers(-99, 99, (16, 8)).astype("f4")
    e = 4 // a.itemsize
    # the PTX manual's figures: groupID = lane / 4, threadID_in_group = lane % 4
    group, thread = (LANES // 4)[:, None], (LANES % 4)[:, None]
    i = np.arange(4 * e)
    a_rows = group + 8 * (i // e % 2)
    a_columns = thread * e + i % e + 4 * e * (i // (2 * e))
    i = np.arange(2 * e)
    b_rows = thread * e + i % e + 4 * e * (i // e)
    i = np.arange(4)
    c_rows, c_columns = group + 8 * (i // 2), thread * 2 + i % 2
    d = cupy.asarray(c[c_rows, c_columns])
    args = cupy.asarray(a[a_rows, a_columns]).view("u4"), cupy.asarray(b[b_rows, group]).view("u4")
    body = f"""
    const int t = threadIdx.x;
    u32 a[4], b[2];
    float d[4];
    for (int r = 0; r < 4; ++r) a[r] = A[4 * t + r], d[r] = D[4 * t + r];
    for (int r = 0; r < 2; ++r) b[r] = B[2 * t + r];
    {name}(d, a, b);
    for (int r = 0; r < 4; ++r) D[4 * t + r] = d[r];
    """
    run("const u32* A, const u32* B, float* D", body, *args, d)
    expected = a.astype("f4") @ b.astype("f4") + c
    assert (d.get() == expected[c_rows, c_columns]).all()


def test_tf32_rounds_to_nearest_ties_away_and_mma_ignores_the_lower_bits():
    one = 1 << 13
    bits = np.float32(1).view("u4") + np.uint32([0, one // 2 - 1, one // 2, one, one * 3 // 2])
    y = cupy.empty(5, "u4")
    body = "y[threadIdx.x] = to_tf32(x[threadIdx.x]);"
    run("const float* x, u32* y", body, cupy.asarray(bits.view("f4")), y, block=(5,))
    assert ((y.get() - np.float32(1).view("u4")) // one).tolist() == [0, 0, 1, 1, 2]
    special = np.float32([np.inf, -np.inf, np.nan, 0, -0.0])
    run("const float* x, u32* y", body, cupy.asarray(special), y, block=(5,))
    np.testing.assert_array_equal(y.get().view("f4"), special)

    d = cupy.empty(32, "f4")
    body = """
    float d[4] = {};
    const u32 a[4] = {__float_as_uint(1) + 0x1fffu}, b[2] = {__float_as_uint(1)};
    mma_m16n8k8_tf32(d, a, b);
    D[threadIdx.x] = d[0];
    """
    run("float* D", body, d)
    assert (d.get() == 4).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_mma_truncates_its_sums(sign):
    """1 + 8 / 10 of the last bit of 1, as eight equal products."""
    d = cupy.asarray(np.full(32, sign, "f4"))
    body = """
    float d[4] = {D[threadIdx.x]};
    const u32 a[4] = {x, x, x, x}, b[2] = {one, one};
    mma_m16n8k8_tf32(d, a, b);
    D[threadIdx.x] = d[0];
    """
    tenth = np.float32(sign * 0.1 * 2.0**-23).view("u4")
    run("u32 x, u32 one, float* D", body, tenth, np.float32(1).view("u4"), d)
    assert (d.get() == sign).all()


def test_split_tf32_loses_nothing():
    x = (RNG.normal(size=32) * 10.0 ** RNG.integers(-30, 30, 32)).astype("f4")
    high, low = cupy.empty(32, "f4"), cupy.empty(32, "f4")
    body = """
    u32 h, l;
    split_tf32(__float_as_uint(x[threadIdx.x]), h, l);
    high[threadIdx.x] = __uint_as_float(h), low[threadIdx.x] = __uint_as_float(l);
    """
    run("const float* x, float* high, float* low", body, cupy.asarray(x), high, low)
    assert (high.get() + low.get() == x).all()
    assert not (high.get().view("u4") & 0x1FFF).any()
    assert (abs(low.get()) < abs(x) * 2.0**-10).all()


def test_advance_multiplies_in_64_bits():
    body = "*y = advance(nullptr, count, stride) - (const char*)nullptr;"
    y = cupy.empty(1, "i8")
    run(
        "u32 count, u32 stride, long long* y",
        body,
        np.uint32(3 << 30),
        np.uint32(40),
        y,
        block=(1,),
    )
    assert int(y[0]) == 40 * (3 << 30)


@pytest.mark.parametrize(
    ("name", "matrices", "transposed"),
    [
        ("ldmatrix_x2", 2, False),
        ("ldmatrix_x2_trans", 2, True),
        ("ldmatrix_x4", 4, False),
        ("ldmatrix_x4_trans", 4, True),
    ],
)
def test_ldmatrix_hands_out_matrices_of_8_by_8(name, matrices, transposed):
    x = np.arange(matrices * 64, dtype="u2")
    y = cupy.empty((32, matrices, 2), "u2")
    body = f"""
    __shared__ __align__(16) unsigned short s[{matrices} * 64];
    const int t = threadIdx.x;
    for (int j = t; j < {matrices} * 64; j += 32) s[j] = x[j];
    __syncwarp();
    u32 r[{matrices}];
    {name}(r, s + t % {8 * matrices} * 8);
    for (int m = 0; m < {matrices}; ++m) y[t * {matrices} + m] = r[m];
    """
    run("const unsigned short* x, u32* y", body, cupy.asarray(x), y.view("u4"))
    tiles = x.reshape(matrices, 8, 8)
    tiles = tiles.transpose(0, 2, 1) if transposed else tiles
    # lane t holds row t / 4, columns 2 (t % 4) and the next, of every matrix
    assert (y.get() == tiles.reshape(matrices, 32, 2).transpose(1, 0, 2)).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_arrive_when_they_are_waited_for_and_zero_what_is_not_read(size):
    y = cupy.empty((3, 32, size // 4), "f4")
    body = f"""
    __shared__ __align__(16) float s[2][32 * {size // 4}];
    const int t = threadIdx.x, n = {size // 4};
    for (int j = 0; j < n; ++j) s[0][t * n + j] = s[1][t * n + j] = -1;
    cp_async<{size}>(s[0] + t * n, x + t * n);
    cp_async_commit();
    cp_async<{size}>(s[1] + t * n, x + t * n, t % 2 == 0);
    cp_async_commit();
    for (int part = 0; part < 3; ++part) {{
      if (part == 1) cp_async_wait<1>();
      if (part == 2) cp_async_wait<0>();
      if (part) __syncwarp();
      for (int j = 0; j < n && part; ++j) y[(part * 32 + t) * n + j] = s[part - 1][t * n + j];
    }}
    """
    x = np.arange(32 * size // 4, dtype="f4").reshape(32, -1)
    run("const float* x, float* y", body, cupy.asarray(x), y)
    assert (y[1].get() == x).all()
    assert (y[2].get() == np.where(LANES[:, None] % 2, 0, x)).all()


def test_vector_reductions_add_every_part():
    y = cupy.zeros(4, "f4")
    body = """
    red_add(y, make_float4(1, 2, 3, 4));
    red_add(y + 2, make_float2(10, 20));
    red_add(y + 1, 100.f);
    """
    run("float* y", body, y, grid=(2,))
    assert (y.get() == 64 * np.array([1, 102, 13, 24])).all()


# ---- CUDA's own compiler


def test_every_function_of_the_dialect_runs_in_these_tests():
    headers = "".join(file.read_text() for file in (build.HERE / "dialect").glob("*.h"))
    defined = re.findall(r"^(?:SIMT_INLINE|SIMT_RAW inline|inline) .*?\b(\w+)\(", headers, re.M)
    defined += re.findall(r"^SIMT_DEFINE_(?:ATOMIC|LDMATRIX|SHUFFLE)\((\w+),", headers, re.M)
    defined += [
        f"__reduce_{name}_sync" for name in re.findall(r"^SIMT_DEFINE_REDUCE\((\w+)", headers, re.M)
    ]
    functions = {name for name in defined if not name.startswith("simt_")}
    tests = Path(__file__).read_text() + (build.HERE / "planted_bugs.cu").read_text()
    assert len(functions) > 100
    assert functions <= set(re.findall(r"\w+", tests))


REFUSED = {
    "half times float": "y[0] = __half2float(h[0] * 2.5f);",
    "half plus int": "y[0] = __half2float(h[0] + 1);",
    "a shuffle of a struct": "y[0] = __shfl_sync(~0u, make_float2(1, 2), 0).x;",
    "NAN": "y[0] = NAN;",
    "an array of variable size": "float v[2 * blockDim.x];\nv[0] = 1;\ny[0] = v[0];",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused_here(name):
    code = KERNEL.format(
        name="k", before="", parameters="float* y, const __half* h", body=REFUSED[name]
    )
    with pytest.raises(build.BuildError, match="error"):
        cupy.RawModule(code=PTX + code).get_function("k")
    if nvrtc.available():
        with pytest.raises(nvrtc.CompileError):
            nvrtc.resources(PTX + code, (), nvrtc.architectures()[0])


@pytest.mark.skipif(not nvrtc.available(), reason="no NVRTC and CUDA headers")
@pytest.mark.parametrize("architecture", [a for a in nvrtc.ARCHITECTURES if a >= 80])
def test_nvrtc_takes_all_that_ran_here(architecture):
    """The dialect accepts nothing that CUDA does not have. __reduce_add_sync begins with sm_80."""
    if not have_run:
        pytest.skip("none of the tests above has run")
    code = PTX
    for i, ((before, parameters, body), test) in enumerate(have_run.items()):
        name, where = f"k{i}", test.partition("::")[2].replace('"', "'")
        text = KERNEL.format(name=name, before=before, parameters=parameters, body=body)
        code += f'namespace {name} {{\n#line 1 "{where}"{text}}}\n'
    assert set(nvrtc.resources(code, (), architecture)) == {f"k{i}" for i in range(len(have_run))}
