"""The simulator finds the bugs that kernels can have: planted ones, each beside its repair."""

import re
import textwrap

import numpy as np
import pytest

pytest.importorskip("tests.simt.fakecupy", reason="the simulator")
import cupy

from tests import conftest
from tests.simt import build
from tests.simt.build import SimtError
from tests.simt.settings import ORDERS, configure

pytestmark = [
    pytest.mark.skipif(
        conftest.HAVE_GPU, reason="a GPU is here: kernels do not run in the simulator"
    ),
    pytest.mark.skipif(not build.available(), reason="no g++ to build kernels with"),
]
THREADS = 64
SIZE = 64
PTX = (build.HERE.parents[1] / "deformable" / "cuda" / "ptx.cuh").read_text()


def kernel(body, planted, before=""):
    """A kernel whose body chooses between BUG and FIX: ``PICK(bug, fix)``."""
    code = textwrap.dedent(
        """\
        {before}
        extern "C" __global__ void k(const float* x, float* y, int* i, const __half* h, int n) {{
          const int t = threadIdx.x, b = blockIdx.x;
        {body}
        }}
        """
    ).format(before=before, body=body)
    pick = "#define PICK(bug, fix) " + ("bug" if planted else "fix")
    code = f'{PTX}\n{pick}\n#line 1 "kernel.cu"\n{code}'
    return cupy.RawModule(code=code).get_function("k")


def launch(function, grid=2, block=THREADS, shared=0):
    """Run it on x = 0, 1, 2 ..., y not written yet, i = 0, h = 0, n = 64."""
    x = cupy.arange(SIZE, dtype="f")
    y = cupy.empty(SIZE, "f")
    i = cupy.zeros(SIZE, "i")
    h = cupy.zeros(SIZE, "e")
    function((grid,), (block,), (x, y, i, h, np.int32(SIZE)), shared_mem=shared)
    return y.get()


class Bug:
    def __init__(self, message, body, before="", **launch):
        self.message, self.body, self.before, self.launch = message, body, before, launch


BUGS = {
    # ---- memory
    "global read past the end": Bug(
        "out of bounds: read of 4 bytes, 4 bytes past the end of x",
        "if (t == 5) y[0] = x[PICK(n, n - 1)];  // here",
        grid=1,
    ),
    "global write past the end": Bug(
        "out of bounds: write of 4 bytes, 8 bytes past the end of y",
        "if (t == 5) y[n + PICK(1, -1)] = 1;  // here",
        grid=1,
    ),
    "global read before the start": Bug(
        "out of bounds: read of 4 bytes, 4 bytes before the start of x",
        "if (t == 5) y[0] = x[PICK(-1, 0)];  // here",
        grid=1,
    ),
    "half read past the end": Bug(
        "out of bounds: read of 2 bytes, 2 bytes past the end of h",
        "if (t == 5) y[0] = static_cast<float>(h[PICK(n, n - 1)]);  // here",
        grid=1,
    ),
    "atomic past the end": Bug(
        "out of bounds: atomic of 4 bytes, 4 bytes past the end of y",
        "if (t == 5) atomicAdd(y + PICK(n, n - 1), 1.f);  // here",
        grid=1,
    ),
    "vector load over the end": Bug(
        "out of bounds: read of 4 bytes, 4 bytes past the end of x",
        "const float4 v = reinterpret_cast<const float4*>(x)[t + PICK(1, 0)];  // here\n"
        "y[t] = v.x + v.w;",
        grid=1,
        block=16,
    ),
    "index that wrapped around": Bug(
        "out of bounds: read of 4 bytes",
        "const unsigned at = t - PICK(1u, 0u);\nif (t == 0) y[0] = x[at];  // here",
        grid=1,
    ),
    "memcpy over the end": Bug(
        "out of bounds: read of 1 bytes, 1 bytes past the end of x",
        "float v[8];\nif (t == 0) memcpy(v, x + n - PICK(7, 8), sizeof v);  // here\n"
        "if (t == 0) y[0] = v[0];",
        grid=1,
    ),
    "null pointer": Bug(
        "null pointer used",
        "const float* from = PICK(nullptr, x);\nif (t == 0) y[0] = *from;  // here",
        grid=1,
    ),
    "write to a const argument": Bug(
        "write to x, which is read only",
        "if (t == 0) *const_cast<float*>(PICK(x, y)) = 1;  // here",
        grid=1,
    ),
    "shared memory past its end": Bug(
        "out of bounds: pointer .* past the end of the variable that it points to",
        "__shared__ float s[64];\nfloat* to = s;\nto[t + PICK(1, 0)] = 1;  // here",
    ),
    "dynamic shared memory past its end": Bug(
        "out of bounds: write of 4 bytes, 4 bytes past the end of dynamic shared memory",
        "DYN_SHARED(float, s);\ns[t + PICK(1, 0)] = 1;  // here",
        shared=4 * THREADS,
    ),
    "row of a shared array": Bug(
        "index outside the array",
        "__shared__ float s[4][8];\nif (t < 8) s[n / PICK(16, 17)][t] = 1;  // here",
    ),
    "local array": Bug(
        "index outside the array",
        "float v[4] = {1, 2, 3, 4};\nif (t == 0) y[b] = v[n / PICK(16, 17)];  // here",
    ),
    # ---- alignment
    "vector load misaligned": Bug(
        "misaligned",
        "const float4 v = *reinterpret_cast<const float4*>(x + PICK(1, 4));  // here\n"
        "if (t == 0) y[b] = v.x;",
    ),
    "half2 misaligned": Bug(
        "misaligned",
        "const half2 v = *reinterpret_cast<const half2*>(h + PICK(1, 2));  // here\n"
        "if (t == 0) y[b] = v.x;",
    ),
    "cp.async misaligned": Bug(
        "misaligned: cp.async needs addresses aligned to 16 bytes",
        "__shared__ __align__(16) float s[8];\n"
        "if (t == 0) cp_async<16>(s, x + PICK(1, 4));  // here\n"
        "cp_async_commit();\ncp_async_wait<0>();",
    ),
    "ldmatrix misaligned": Bug(
        "misaligned: ldmatrix_x4 needs an address aligned to 16 bytes",
        "__shared__ __align__(16) __half s[16 * 17];\n"
        "for (int j = t; j < 16 * 17; j += 32) s[j] = 0;\n__syncwarp();\nu32 r[4];\n"
        "ldmatrix_x4(r, s + t % 16 * PICK(17, 16));  // here\n",
        block=32,
    ),
    "vector reduction misaligned": Bug(
        "misaligned: red_add of float4 needs an address aligned to 16 bytes",
        "red_add(y + PICK(2, 4), make_float4(1, 1, 1, 1));  // here",
    ),
    # ---- races
    "no barrier after filling shared memory": Bug(
        "race on static shared memory",
        "__shared__ float s[64];\ns[t] = x[t];  // here\nPICK(, __syncthreads());\n"
        "const float v = s[63 - t];  // here\nif (b == 0) y[t] = v;",
    ),
    "no barrier before filling it again": Bug(
        "race on static shared memory",
        "__shared__ float s[64];\nfloat sum = 0;\n"
        "for (int j = 0; j < 2; ++j) {\n"
        "  s[t] = x[t] + j;  // here\n"
        "  __syncthreads();\n  sum += s[63 - t];  // here\n  PICK(, __syncthreads());\n}\n"
        "if (b == 0) y[t] = sum;",
    ),
    "sum without atomics in a block": Bug(
        "race on i at byte 0",
        "if (b == 0) PICK(*i += 1, atomicAdd(i, 1));  // here",
    ),
    "sum without atomics across blocks": Bug(
        "race on i at byte 0: (read|write) here, (read|written) by thread 0 of block 0",
        "if (t == 0) PICK(*i += 1, atomicAdd(i, 1));  // here",
    ),
    "atomic and plain access": Bug(
        "race on i at byte 0: read here, atomic by thread 0",
        "if (t == 0) atomicAdd(i, 1);\nPICK(, __syncthreads());\n"
        "if (b == 0 && t == 1) y[0] = *i;  // here",
        grid=1,
    ),
    "two blocks write one element": Bug(
        "race on y at byte 0: write here, written by thread 0 of block 0",
        "if (t == 0) y[b * PICK(0, 1)] = 1;  // here",
    ),
    "block reads what another wrote": Bug(
        "race on y at byte 0: read here, written by thread 0 of block 0",
        "if (t == 0) y[b] = 1;\nif (b == 1 && t == 1) y[2] = y[PICK(0, 3)];  // here",
    ),
    "lanes without __syncwarp": Bug(
        "race on static shared memory",
        "__shared__ float s[32];\ns[t] = x[t];  // here\nPICK(, __syncwarp());\ny[b * 32 + t] = s[31 - t];  // here",
        block=32,
    ),
    "shuffle in place of __syncwarp": Bug(
        "race on static shared memory",
        "__shared__ float s[32];\ns[t] = x[t];  // here\n"
        "PICK(__shfl_sync(~0u, t, 0), __syncwarp());\ny[b * 32 + t] = s[31 - t];  // here",
        block=32,
    ),
    "__syncwarp between two warps": Bug(
        "race on static shared memory",
        "__shared__ float s[64];\ns[t] = x[t];  // here\nPICK(__syncwarp(), __syncthreads());\n"
        "const float v = s[63 - t];  // here\nif (b == 0) y[t] = v;",
    ),
    "copies not waited for before the barrier": Bug(
        "race on static shared memory",
        "__shared__ __align__(16) float s[64];\n"
        "if (t < 16) cp_async<16>(s + 4 * t, x + 4 * t);\ncp_async_commit();\n"
        "PICK(__syncthreads(), cp_async_wait<0>());\n"
        "PICK(cp_async_wait<0>(), __syncthreads());  // here\nconst float v = s[63 - t];  // here\n"
        "if (b == 0) y[t] = v;",
    ),
    "copies never committed": Bug(
        "a cp_async was never waited for",
        "__shared__ __align__(16) float s[64];\n"
        "if (t < 16) cp_async<16>(s + 4 * t, x + 4 * t);  // here\n"
        "PICK(, cp_async_commit());\ncp_async_wait<0>();",
    ),
    "copies never waited for": Bug(
        "a cp_async was never waited for",
        "__shared__ __align__(16) float s[64];\n"
        "if (t < 16) cp_async<16>(s + 4 * t, x + 4 * t);  // here\n"
        "cp_async_commit();\nPICK(, cp_async_wait<0>());",
    ),
    # ---- barriers and warps
    "barrier in a branch": Bug(
        "barrier divergence: this thread has returned while 32 others wait",
        "if (t < 32 || PICK(false, true)) __syncthreads();  // here",
    ),
    "return before a barrier": Bug(
        "barrier divergence: __syncthreads of line \\d+ after 44 threads have returned",
        "if (PICK(t >= 20, false)) return;\n__syncthreads();  // here",
        order="reversed",
    ),
    "two barriers": Bug(
        "barrier divergence: thread 0 is at the __syncthreads of line \\d+, thread 63 at",
        "if (PICK(t < 32, true))\n  __syncthreads();  // here\nelse\n  __syncthreads();",
    ),
    "barrier in a loop of different lengths": Bug(
        "barrier divergence",
        "for (int j = 0; j < PICK(1 + t / 32, 2); ++j)\n  __syncthreads();  // here",
    ),
    "lanes at different shuffles": Bug(
        "warp divergence: lane 0 is at __shfl_xor_sync\\(mask ffffffff\\) of line \\d+, lane 16 at",
        "int v = t;\nif (PICK(t % 32 < 16, true))\n  v = __shfl_xor_sync(~0u, v, 1);\nelse\n"
        "  v = __shfl_xor_sync(~0u, v, 2);  // here\nif (b == 0) y[t] = v;",
    ),
    "lanes at a shuffle and at a barrier": Bug(
        "deadlock: thread 0 waits at __shfl_sync of line \\d+, thread 16 at __syncthreads of line",
        "if (PICK(t % 32 < 16, true)) __shfl_sync(~0u, t, 0);  // here\n__syncthreads();",
    ),
    "mask without the caller": Bug(
        "__shfl_sync of line \\d+: the mask 0000ffff does not name the calling lane 16",
        "__shfl_sync(PICK(0xffffu, ~0u), t, 0);  // here",
    ),
    # ---- loops that do not end
    "endless loop": Bug(
        "this launch seems to run for ever",
        "int j = t;\nwhile (j != PICK(-1, 0)) j = max(j - 1, 0);  // here\nif (b == 0) y[t] = j;",
    ),
    "spinning on a flag": Bug(
        "this launch seems to run for ever",
        "if (t == 0 && b == 0) while (atomicAdd(i, 0) != PICK(1, 0)) {}  // here",
    ),
    "trap": Bug("trap: __trap", "if (n == PICK(64, 65)) __trap();  // here"),
    # ---- undefined behaviour of numbers
    "int overflow in a product": Bug(
        "signed integer overflow in \\*",
        "if (t == 0 && b == 0) *i = n * n * n * n * PICK(n * n, 1);  // here",
    ),
    "int overflow in a sum": Bug(
        "signed integer overflow in \\+",
        "if (t == 0 && b == 0) *i = (n << 24) + PICK((n << 24), 1);  // here",
    ),
    "negation of INT_MIN": Bug(
        "signed integer overflow in negation",
        "const int low = -2147483647 - PICK(n / 64, 0);\nif (t == 0 && b == 0) *i = -low;  // here",
    ),
    "division by zero": Bug(
        "integer division by zero",
        "if (t == 0 && b == 0) *i = 1 / (n - PICK(64, 63));  // here",
    ),
    "shift too far": Bug(
        "shift by more than the width",
        "if (t == 0 && b == 0) *i = 1 << (n - PICK(32, 63));  // here",
    ),
    "NaN to int": Bug(
        "NaN or a float outside the integer's range",
        "if (t == 0 && b == 0) *i = static_cast<int>(PICK(x[0] / x[0], x[1]));  // here",
    ),
    "1e30 to int": Bug(
        "NaN or a float outside the integer's range",
        "if (t == 0 && b == 0) *i = static_cast<int>(floorf(x[1] * PICK(1e30f, 1.f)));  // here",
    ),
    "impossible bool": Bug(
        "bool or enum with an impossible value",
        "__shared__ bool s[64];\nif (PICK(false, true)) s[t] = true;\nif (s[t]) y[b] = 1;  // here",
        block=1,
    ),
    "no return value": Bug(
        "function without its return value|unreachable",
        "if (t == 0) y[b] = f(n + PICK(0, 1));",
        before="__device__ float f(int n) {  // here\n  if (n != 64) return 1;\n}",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found_where_it_is(name):
    bug = BUGS[name]
    options = dict(bug.launch)
    with configure(order=options.pop("order", "forward"), steps=1 << 20):
        with pytest.raises(SimtError, match=bug.message) as error:
            launch(kernel(bug.body, True, bug.before), **options)
    lines = f"{bug.before}\n\n\n{bug.body}".split("\n")
    places = [f"kernel.cu:{line}" for line, text in enumerate(lines, 1) if "// here" in text]
    where = re.search(r"\[block \(\d, 0, 0\) thread \(\d+, 0, 0\)\] at (.*)", str(error.value))
    assert where and where[1] in places, str(error.value)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BUGS)
def test_repaired_bug_runs(name, order):
    bug = BUGS[name]
    options = {key: value for key, value in bug.launch.items() if key != "order"}
    with configure(order=order):
        launch(kernel(bug.body, False, bug.before), **options)
