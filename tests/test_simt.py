"""The simulator finds what kernels can do wrong: planted bugs, each beside its repair."""

import functools
import re
from typing import NamedTuple

import numpy as np
import pytest

from tests.simt import build, nvrtc, source
from tests.simt import fakecupy as cupy
from tests.simt.build import SimtError
from tests.simt.settings import ORDERS, configure

pytestmark = pytest.mark.skipif(not build.available(), reason="no g++ to build kernels with")
SIZE = 64
PTX = (build.HERE.parents[1] / "deformable" / "cuda" / "ptx.cuh").read_text()
KERNEL = """
extern "C" __global__ void {name}(const float* x, float* y, int* i, const __half* h, int n) {{
  [[maybe_unused]] const int t = threadIdx.x, b = blockIdx.x;
#line {line} "{file}"
{body}}}
"""


class Planted(NamedTuple):
    """A section of planted_bugs.cu."""

    kernel: str
    message: str  # a pattern
    launch: dict
    line: int  # at which the body begins
    body: str


def read_planted_bugs():
    text = (build.HERE / "planted_bugs.cu").read_text()
    pattern = r"^//// (.*)\n// message: (.*)\n(?:// launch: (.*)\n)?((?:(?!//).*\n?)*)"
    for match in re.finditer(pattern, text, re.M):
        name, message, options, body = match.groups("")
        pairs = (option.split("=") for option in options.split())
        launch = {key: int(value) if value.isdigit() else value for key, value in pairs}
        kernel, line = "k_" + re.sub(r"\W", "_", name), text.count("\n", 0, match.start(4)) + 1
        yield pytest.param(Planted(kernel, message, launch, line, body), id=name)


PLANTED = list(read_planted_bugs())


def source_of(pick, *kernels):
    """A source text of kernels, each (name, body, file and line of the body)."""
    texts = (
        KERNEL.format(name=name, body=body, file=file, line=line)
        for name, body, file, line in kernels
    )
    return "\n".join((PTX, f"#define PICK(bug, repair) {pick}", *texts))


@functools.cache
def planted(pick):
    """All sections as one module, with their bugs or repaired."""
    bugs = (parameter.values[0] for parameter in PLANTED)
    kernels = ((p.kernel, p.body, "planted_bugs.cu", p.line) for p in bugs)
    return cupy.RawModule(code=source_of(pick, *kernels))


def run(kernel, grid=2, block=64, shared=0, order="forward", **settings):
    """Run a kernel on x = 0, 1, 2 ..., y not written yet, i = 0 and h = 0; what y is then."""
    x = cupy.arange(SIZE, dtype="f")
    y = cupy.empty(SIZE, "f")
    i, h = cupy.zeros(SIZE, "i"), cupy.zeros(SIZE, "e")
    with configure(order=order, **settings):
        kernel((grid,), (block,), (x, y, i, h, np.int32(SIZE)), shared_mem=shared)
    return y.get()


def launch(body, pick, **options):
    """Run a body as a kernel."""
    module = cupy.RawModule(code=source_of(pick, ("k", body, "body.cu", 1)))
    return run(module.get_function("k"), **options)


def test_every_kind_of_undefined_behaviour_is_planted():
    hooks = (build.HERE / "runtime" / "hooks.h").read_text()
    kinds = re.findall(r'^SIMT_UNDEFINED_HOOK\(\w+, "(.*)"\)', hooks, re.M)
    patterns = [parameter.values[0].message for parameter in PLANTED]
    assert len(PLANTED) > 50 and len(kinds) > 10
    assert not [k for k in kinds if not any(re.match(pattern, k) for pattern in patterns)]


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_found_where_it_is(bug):
    with pytest.raises(SimtError, match=bug.message) as error:
        run(planted("bug").get_function(bug.kernel), steps=1 << 20, **bug.launch)
    lines = enumerate(bug.body.split("\n"), bug.line)
    places = [f"planted_bugs.cu:{n}" for n, line in lines if line.endswith("// here")]
    where = re.search(r"\[block \(\d, 0, 0\) thread \(\d+, 0, 0\)\] at (.*)", str(error.value))
    assert where and where[1] in places, str(error.value)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bug", PLANTED)
def test_repaired_bug_runs(bug, order):
    run(planted("repair").get_function(bug.kernel), **bug.launch | {"order": order})


@pytest.mark.skipif(not nvrtc.available(), reason="no NVRTC and CUDA headers")
def test_repaired_bugs_are_cuda():
    code = planted("repair").code
    assert len(nvrtc.resources(code, (), 90)) == len(PLANTED)


# ---- what was never written is poison, so that results show it


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("PICK(, y[t] = 1);", id="output"),
        pytest.param(
            "__shared__ float s[64];\nPICK(, s[t] = 1);\ny[t] = s[t];", id="shared memory"
        ),
        pytest.param("DYN_SHARED(float, s);\nPICK(, s[t] = 1);\ny[t] = s[t];", id="dynamic"),
        pytest.param(
            "int v = 1;\nif (t < 32) v = __shfl_sync(PICK(1u << t, ~0u), v, 5);\n"
            "y[t] = t == 9 && v != 1 ? x[0] / x[0] : 1;",
            id="lane that is not there",
        ),
    ],
)
def test_what_nobody_wrote_is_nan(body):
    options = {"grid": 1, "shared": 256}
    assert np.isnan(launch(body, "bug", **options)).any()
    assert (launch(body, "repair", **options) == 1).all()


def test_local_variable_without_a_value_is_the_same_garbage_in_every_run():
    body = "float v[4];\nif (n < 0) v[t % 4] = 1;\ny[t] = v[t % 4] + PICK(0, 0);\n"
    garbage = launch(body, "bug", grid=1)
    assert (garbage == np.full(4, 0xFE, np.uint8).view("f")).all()


def test_shared_memory_is_forgotten_between_blocks():
    body = "__shared__ float s[64];\nif (b == 0) s[t] = 1;\nif (b == 1) y[t] = s[t];\n"
    assert np.isnan(launch(body, "bug")).all()


# ---- orders of threads


def test_orders_differ():
    body = "const int place = atomicAdd(i, 1);\ny[place] = 64 * b + t;\n"
    seen = {order: tuple(launch(body, "", block=32, order=order)) for order in ORDERS}
    assert seen["forward"] == (*range(32), *range(64, 96))
    assert seen["reversed"] == seen["forward"][::-1]
    assert sorted(seen["random"]) == sorted(seen["forward"])
    assert len(set(seen.values())) == 3
    assert tuple(launch(body, "", block=32, order="random", seed=1)) not in seen.values()


def test_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order is 'sideways'"), configure(order="sideways"):
        pass


# ---- more than 2**31 elements, of which only those of the last block exist in memory


@pytest.mark.parametrize("index", ["int", "long long"])
def test_index_overflow_is_found_without_the_memory(index):
    size = 2**31 + 512
    code = """
    extern "C" __global__ void k(unsigned char* y, long long size) {
      const INDEX j = static_cast<INDEX>(blockIdx.x) * blockDim.x + threadIdx.x;
      if (j < size) y[j] = 1;
    }"""
    kernel = cupy.RawModule(code=code, options=(f"-DINDEX={index}",)).get_function("k")
    y = cupy.zeros(size, np.uint8)
    with configure(last_blocks=1):
        if index == "int":
            with pytest.raises(SimtError, match="out of bounds: write of 1 bytes"):
                kernel((size // 256,), (256,), (y, np.int64(size)))
        else:
            kernel((size // 256,), (256,), (y, np.int64(size)))
            assert y[-256:].get().tolist() == [1] * 256
            assert y[-512:-256].get().tolist() == [0] * 256


# ---- arguments and launches


@pytest.fixture(scope="module")
def adder():
    code = """
    struct Sizes { int rows, columns; float scale; };
    extern "C" __global__ void __launch_bounds__(128)
        k(const float* __restrict__ x,  // read, a comment
          double* y, const Sizes sizes, int n, float s) {
      if (threadIdx.x == 0) y[0] = x[0] + sizes.rows * 10 + sizes.columns * s + n;
    }"""
    return cupy.RawModule(code=code).get_function("k")


SIZES = np.dtype([("rows", "i4"), ("columns", "i4"), ("scale", "f4")])


def arguments(**changes):
    values = {
        "x": cupy.ones(4, "f"),
        "y": cupy.zeros(4, "d"),
        "sizes": np.array((2, 3, 0.5), SIZES),
        "n": np.int32(4),
        "s": np.float32(5),
    }
    return tuple((values | changes).values())


def test_arguments_arrive(adder):
    args = arguments()
    adder((1,), (1,), args)
    assert args[1].get()[0] == 1 + 20 + 15 + 4


def swapped(names):
    return np.zeros((), np.dtype([(name, SIZES[name]) for name in names]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", lambda: cupy.zeros(4, "d"), "x has dtype float64, the kernel takes a pointer to f4"),
        ("x", lambda: np.zeros(4, "f"), "x is ndarray, the kernel takes a pointer to f4"),
        ("x", lambda: cupy.zeros(17, "u1")[1:].view("f"), "x is not aligned to 4 bytes"),
        ("n", lambda: 4, "n is int64 of 8 bytes, the kernel takes i4"),
        ("n", lambda: np.uint32(4), "n is uint32 of 4 bytes, the kernel takes i4"),
        ("s", lambda: 4.0, "s is float64 of 8 bytes, the kernel takes f4"),
        ("s", lambda: cupy.zeros((), "f"), "s is ndarray, the kernel takes f4"),
        ("s", lambda: None, "s is NoneType, the kernel takes f4"),
        (
            "sizes",
            lambda: np.zeros((), SIZES)[()],
            "sizes is void, the kernel takes a struct of 12",
        ),
        ("sizes", lambda: np.zeros(2, SIZES), "sizes is ndarray, the kernel takes a struct of 12"),
        ("sizes", lambda: np.zeros(1, "i4,i4"), "sizes is .* of 8 bytes, .* a struct of 12 bytes"),
        ("sizes", lambda: swapped(("columns", "rows", "scale")), "sizes has members"),
    ],
)
def test_wrong_argument_is_refused(adder, name, value, message):
    with pytest.raises(SimtError, match=f"k: argument {message}"):
        adder((1,), (1,), arguments(**{name: value()}))


def test_number_of_arguments_is_checked(adder):
    with pytest.raises(SimtError, match="k: 4 arguments for 5 parameters"):
        adder((1,), (1,), arguments()[:4])


def test_null_pointer_is_an_argument():
    code = 'extern "C" __global__ void k(const float* x, float* y) { y[0] = x ? x[0] : 7; }'
    y = cupy.zeros(1, "f")
    cupy.RawModule(code=code).get_function("k")((1,), (1,), (None, y))
    assert y.get() == 7


def test_bounds_are_those_of_the_view(adder):
    code = 'extern "C" __global__ void k(const float* x, float* y, int j) { y[0] = x[j]; }'
    kernel = cupy.RawModule(code=code).get_function("k")
    x, y = cupy.arange(10, dtype="f"), cupy.zeros(1, "f")
    kernel((1,), (1,), (x[2:6], y, np.int32(3)))
    assert y.get() == 5
    for beyond in (-1, 4):
        with pytest.raises(SimtError, match="out of bounds"):
            kernel((1,), (1,), (x[2:6], y, np.int32(beyond)))
    kernel((1,), (1,), (x.reshape(5, 2).T[:1], y, np.int32(8)))
    assert y.get() == 8


def test_overlapping_arguments_of_which_one_is_written_are_refused():
    code = 'extern "C" __global__ void k(const float* x, float* y) { y[0] = x[0]; }'
    kernel = cupy.RawModule(code=code).get_function("k")
    x = cupy.zeros(10, "f")
    kernel((1,), (1,), (x[:5], x[5:]))
    with pytest.raises(SimtError, match="x and y overlap, and one of them is written"):
        kernel((1,), (1,), (x[:6], x[5:]))


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        ((0,), (32,), 0, "grid is \\(0,\\), no work must not be launched"),
        ((1,), (0,), 0, "block is \\(0,\\), no work must not be launched"),
        ((1, 65536), (1,), 0, "grid is \\(1, 65536\\), the limits are"),
        ((1,), (1, 1, 65), 0, "block is \\(1, 1, 65\\), the limits are"),
        ((1,), (256,), 0, "256 threads per block, the limit is 128"),
        ((1,), (32,), 49153, "49153 bytes of dynamic shared memory, the limit is 49152"),
    ],
)
def test_impossible_launch_is_refused(adder, grid, block, shared, message):
    with pytest.raises(SimtError, match=message):
        adder(grid, block, arguments(), shared_mem=shared)


def test_dynamic_shared_memory_can_be_raised_to_what_the_gpu_has():
    code = (
        PTX
        + """
    extern "C" __global__ void k(float* y, int n) {
      DYN_SHARED(float, s);
      s[n - 1] = 3;
      y[0] = s[n - 1];
    }"""
    )
    kernel = cupy.RawModule(code=code).get_function("k")
    y, size = cupy.zeros(1, "f"), 100 << 10
    kernel.max_dynamic_shared_size_bytes = size
    kernel((1,), (1,), (y, np.int32(size // 4)), shared_mem=size)
    assert y.get() == 3
    with pytest.raises(SimtError, match=r"232449 bytes of .*, there is room for 232448"):
        kernel.max_dynamic_shared_size_bytes = 232449


def test_static_shared_memory_takes_its_part_of_what_there_is():
    code = (
        PTX
        + """
    extern "C" __global__ void k(float* y) {
      __shared__ float own[256];
      DYN_SHARED(float, s);
      own[threadIdx.x] = s[0] = y[0];
      y[1] = own[threadIdx.x] + s[0];
    }"""
    )
    kernel = cupy.RawModule(code=code).get_function("k")
    y = cupy.ones(2, "f")
    kernel((1,), (1,), (y,), shared_mem=47 << 10)
    with pytest.raises(SimtError, match=r"48129 bytes of dynamic shared memory, .* is 48128"):
        kernel((1,), (1,), (y,), shared_mem=(47 << 10) + 1)
    kernel.max_dynamic_shared_size_bytes = 226 << 10
    with pytest.raises(SimtError, match=r"231425 bytes of .*, there is room for 231424"):
        kernel.max_dynamic_shared_size_bytes = (226 << 10) + 1


def test_kernels_of_one_module_may_have_48_kib_of_static_shared_memory_each():
    code = "".join(
        f"""
    extern "C" __global__ void k{i}(float* y) {{
      __shared__ float own[10 << 10];
      own[threadIdx.x] = y[0] + 1;
      y[0] = own[threadIdx.x];
    }}"""
        for i in range(2)
    )
    module, y = cupy.RawModule(code=code), cupy.ones(1, "f")
    for i in range(2):
        module.get_function(f"k{i}")((1,), (1,), (y,))
    assert y.get() == 3


def test_source_errors_are_those_of_the_compiler():
    with pytest.raises(build.BuildError, match=r"kernel.cu:2:\d+: error"):
        cupy.RawModule(code='\nextern "C" __global__ void k() { what; }').get_function("k")


def test_unknown_kernel_is_refused():
    with pytest.raises(SimtError, match="there is no kernel l"):
        cupy.RawModule(code='extern "C" __global__ void k() {}').get_function("l")


def test_macros_do_not_reach_the_simulators_own_headers():
    code = 'extern "C" __global__ void k(T* y) { y[0] = INDEX + FLAG; }'
    options = ("-DT=float", "-DINDEX=41", "-DFLAG", "-lineinfo")
    y = cupy.zeros(1, "f")
    cupy.RawModule(code=code, options=options).get_function("k")((1,), (1,), (y,))
    assert y.get() == 42


# ---- reading source text


def test_entries_and_structs_are_read():
    code = """
    struct alignas(8) Inner { float value[4]; };
    struct Sizes {  // comment; int no;
      int rows, columns;
      __device__ int size() const { if (rows) { return rows * columns; } return 0; }
      unsigned long long big;
    };
    // extern "C" __global__ void gone(int n) {}
    extern "C" __global__ void __launch_bounds__(32 * max(4, WARPS), 2)
        first(const float* __restrict__ x,  // in
              const Sizes sizes, unsigned int n) {}
    extern "C" __global__ void second() {}
    """
    entries = source.entries(code)
    assert list(entries) == ["first", "second"]
    assert entries["first"].bounds == "32 * max(4, WARPS), 2" and not entries["second"].bounds
    assert [name for _, name in entries["first"].parameters] == ["x", "sizes", "n"]
    assert entries["first"].parameters[1][0] == "Sizes"
    assert source.structs(code)["Sizes"] == ["rows", "columns", "big"]


def test_lines_know_their_files():
    code = 'a\n#line 7 "b.cuh"\nb\nc\n#line 3 "a.cu"\nd'
    lines = [("kernel.cu", 1, "a"), ("b.cuh", 7, "b"), ("b.cuh", 8, "c"), ("a.cu", 3, "d")]
    assert list(source.lines(code)) == lines
