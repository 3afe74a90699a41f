"""The kernels compile for every GPU, without a driver: no warning, no register spilled."""

import json
import re

import pytest

from deformable import _cuda
from tests.simt import build, nvrtc, report, sass
from tests.simt.module import RawModule

CUDA = build.HERE.parents[1] / "deformable" / "cuda"
FILES = sorted(CUDA.glob("*.cu*"))
PTX = (CUDA / "ptx.cuh").read_text()
REGISTERS = 65536  # of a multiprocessor, for the threads of a block

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="no NVRTC and CUDA headers")


# ---- rules that keep the kernels within what the simulator and NVRTC know


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
@pytest.mark.parametrize("what", [r"\basm\b", "extern __shared__"])
def test_one_header_has_all_ptx_and_dynamic_shared_memory(what, file):
    assert bool(re.search(what, file.read_text())) == (file.name == "ptx.cuh")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_variable_outlives_a_launch(file):
    assert not re.search(r"^(static )?__(device|managed)__[^(;]*[;=]", file.read_text(), re.M)


def test_one_module_compiles_kernels():
    compiles = re.compile(r"\.(RawModule|RawKernel|ElementwiseKernel|ReductionKernel)\(")
    library = CUDA.parent
    found = [f.name for f in library.rglob("*.py") if compiles.search(f.read_text())]
    assert found == ["_cuda.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_headers_are_our_own_or_cheap(file):
    system = re.findall(r"#\s*include\s*<(.*?)>", file.read_text())
    assert set(system) <= {"cuda_fp16.h", "cuda_bf16.h"}


def test_ptx_wrappers_have_their_twins_in_the_simulator():
    wrapper = re.compile(
        r"^(?:SIMT_INLINE|SIMT_RAW inline|inline|__device__ __forceinline__) \S.*? (\w+)\(", re.M
    )
    twins = (build.HERE / "dialect" / "ptx.h").read_text()
    defined = set(wrapper.findall(twins)) | set(re.findall(r"SIMT_DEFINE_LDMATRIX\((\w+),", twins))
    assert set(wrapper.findall(PTX)) <= defined


# ---- the compiler


@needs_nvrtc
def test_resources_are_those_of_the_assembler():
    code = """
    extern "C" __global__ void small(float* y) { y[threadIdx.x] = 1; }
    extern "C" __global__ void large(float* y) {
      __shared__ float s[256];
      s[threadIdx.x] = y[threadIdx.x];
      __syncthreads();
      float sum = 0;
      #pragma unroll
      for (int i = 0; i < 64; ++i) sum += s[i] * s[i + threadIdx.x];
      y[threadIdx.x] = sum;
    }"""
    found = nvrtc.resources(code, (), nvrtc.architectures()[0])
    assert set(found) == {"small", "large"}
    small, large = found["small"], found["large"]
    assert (small.shared, large.shared) == (0, 1024)
    assert 4 < small.instructions < 32 and 128 < large.instructions < 1024
    assert 0 < small.registers < large.registers <= 255
    assert small.spilled == large.spilled == small.stack == 0


@needs_nvrtc
def test_spills_and_local_arrays_are_seen():
    code = """
    extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* y) {
      float v[64];
      #pragma unroll
      for (int i = 0; i < 64; ++i) v[i] = y[i * 1024];
      __syncthreads();
      #pragma unroll
      for (int i = 0; i < 64; ++i) y[i * 1024 + 1] = v[i] * v[63 - i];
    }
    extern "C" __global__ void indexes(float* y, int i) {
      float v[64] = {};
      for (int j = 0; j < i; ++j) v[j * i % 64] += y[j] * v[j % 64];
      for (int j = 0; j < 64; ++j) y[j] = v[j];
    }"""
    found = nvrtc.resources(code, (), 80)
    assert found["spills"].spilled > 0
    assert found["indexes"].stack >= 256


@needs_nvrtc
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('extern "C" __global__ void k(float* y) { y[0] = z; }', 'identifier "z" is undefined'),
        ('extern "C" __global__ void k(float* y) { int unused; y[0] = 1; }', "never referenced"),
        (
            'extern "C" __global__ void k(float* y) { __shared__ float s[4] = {1}; y[0] = s[0]; }',
            "initializer",
        ),
        (
            'extern "C" __global__ void k(float* y) {\n'
            "  __shared__ float s[20000]; s[threadIdx.x] = 1; y[0] = s[1]; }",
            "too much shared data",
        ),
        (
            "#include <cuda_fp16.h>\n"
            'extern "C" __global__ void k(__half* y) { y[0] = y[1] * 2.5; }',
            "more than one operator",
        ),
    ],
    ids=[
        "error",
        "warning",
        "initialised shared memory",
        "too much shared memory",
        "half * double",
    ],
)
def test_what_the_compiler_refuses_is_an_error(code, message):
    with pytest.raises(nvrtc.CompileError, match=message):
        nvrtc.resources(code, (), nvrtc.architectures()[0])


@needs_nvrtc
def test_every_ptx_wrapper_compiles_for_every_gpu():
    code = """
    extern "C" __global__ void k(const float* x, float* y, const __half* h) {
      DYN_SHARED(__half, s);
      float d[4] = {};
      u32 a[4], b[2];
      cp_async<4>(s, x);
      cp_async<8>(s, h);
      cp_async<16>(s, x, threadIdx.x < 3);
      cp_async_commit();
      cp_async_wait<0>();
      ldmatrix_x4(a, s);
      ldmatrix_x2(b, s);
      mma_m16n8k16_f16(d, a, b);
      ldmatrix_x4_trans(a, s);
      ldmatrix_x2_trans(b, s);
      mma_m16n8k16_bf16(d, a, b);
      a[0] = to_tf32(x[1]);
      mma_m16n8k8_tf32(d, a, b);
      red_add(y, d[0]);
      red_add(y, make_float2(d[1], d[2]));
      red_add(y, make_float4(d[0], d[1], d[2], d[3]));
    }
    extern "C" __global__ void sum(const float4* x, float* y) { red_add(y, *x); }
    """
    found = {name: nvrtc.resources(PTX + code, (), name) for name in nvrtc.architectures()}
    assert all(set(kernels) == {"k", "sum"} for kernels in found.values())
    # one instruction where sm_80 adds four floats one by one
    assert found[90]["sum"].instructions < found[80]["sum"].instructions


LOOP = """
extern "C" __global__ void loop(const float4* __restrict__ x, float4* y, float z, int n) {
  float4 sum = {0, 0, 0, 0};
  #pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float4 v = __ldg(x + i);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    BODY
  }
  y[threadIdx.x] = sum;
}"""
MULTIPLIED = "sum.x = sum.x * z + v.y, sum.y = sum.y * z + v.z;"


@needs_nvrtc
@pytest.mark.parametrize(
    ("body", "more"),
    [
        (8 * MULTIPLIED, 16),
        ("if (v.x > z) {" + 8 * MULTIPLIED + "}", 17),
        ("if (i % 64 == 0) { __syncthreads(); " + 50 * MULTIPLIED + "}", 4),
        ("for (int j = 0; j < n; ++j) {" + MULTIPLIED + "}", 20),
    ],
    ids=["always", "one of two ways", "seldom", "a loop without loads"],
)
def test_instructions_of_the_inner_loop_are_those_of_its_usual_way(body, more):
    for architecture in nvrtc.architectures():
        plain, changed = (
            nvrtc.resources(LOOP.replace("BODY", text), (), architecture)["loop"].per_load
            for text in ("", body)
        )
        assert 7 <= plain <= 12  # a load, four sums; an address, an end, a branch
        assert plain < changed <= plain + more + 4


NESTED = """
extern "C" __global__ void loop(const float4* __restrict__ x, float4* y, float z, int n, int m) {
  #pragma unroll 1
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    float4 sum = {0, 0, 0, 0};
    #pragma unroll 1
    for (int i = j; i < n; ++i) {
      const float4 v = __ldg(x + i);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    if (sum.x < z) {
      BODY
      y[j] = sum;
    }
  }
}"""


@needs_nvrtc
def test_instructions_around_the_inner_loop_are_those_of_a_round_that_stores():
    body = 16 * "sum.x = sum.x * z + sum.y; sum.y = sum.y * z + sum.x;"
    for architecture in nvrtc.architectures():
        plain, changed = (
            nvrtc.resources(NESTED.replace("BODY", text), (), architecture)["loop"]
            for text in ("", body)
        )
        assert plain.inner + 8 <= plain.around <= plain.inner + 40
        assert plain.around + 32 <= changed.around <= plain.around + 44
        assert changed.inner <= 16


def test_loads_that_exclude_each_other_are_not_counted_together():
    def instruction(**fields):
        usual = {"counts": True, "predicate": sass.ALWAYS, "target": None, "leaves": False}
        kinds = dict.fromkeys(("load", "store", "product"), False)
        return sass.Instruction(**usual | kinds | fields)

    code = [
        instruction(load=True, predicate=9),
        instruction(predicate=9, target=4),
        instruction(),
        instruction(load=True),
        instruction(target=0, leaves=True),
    ]
    short, around = sass.inner_loops(code)
    assert short == sass.Loop(products=0, loads=1, stores=0, instructions=3)
    assert around is None
    code[1] = instruction(predicate=1, target=4)  # the first load happens if it does not branch
    both, _ = sass.inner_loops(code)
    assert both == sass.Loop(products=0, loads=2, stores=0, instructions=5)


@needs_nvrtc
def test_report_has_a_row_per_kernel_and_tells_what_does_not_compile():
    good = ("-DDEPTHWISE=0", "-DDTYPE=float", "-DINDEX=int", "-DVEC=4")
    stale = ("-DDTYPE=nothing",)
    broken = []
    rows = list(report.rows([("conv.cu", good), ("conv.cu", stale)], broken))
    kernels = [kernel for _, kernel, _, _ in rows]
    assert sorted(kernels) == sorted(RawModule(code=_cuda.source("conv.cu")).entries)
    variant = "conv.cu", good
    text = "\n".join(report.table(rows, {variant: {"im2col": 12345}}))
    assert all(f"sm_{name}" in text for name in nvrtc.architectures())
    assert text.count("12345") == len(nvrtc.architectures())
    found = {kernel: on for _, kernel, _, on in rows}["im2col"]
    costs = [report.per_element("conv.cu", "im2col", good, on) for on in found.values()]
    assert all(3 <= cost <= 6 for cost in costs), "a load, a store, addresses for 4 elements"
    assert all(kernel in text for kernel in kernels)
    assert len(broken) == 1 and broken[0].startswith("conv.cu -DDTYPE=nothing: sm_")


def test_report_forgets_kernels_whose_file_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LAUNCHED", tmp_path / "launched.json")
    variant = ["-DDTYPE=float"], {"im2col": 0}
    report.LAUNCHED.write_text(json.dumps([["conv.cu", *variant], ["gone.cu", *variant]]))
    report.remember([])
    assert [file for file, *_ in json.loads(report.LAUNCHED.read_text())] == ["conv.cu"]


# ---- every variant that the tests of this session have launched: runs last, see conftest.py


@needs_nvrtc
def test_all_that_was_launched_fits_on_every_gpu(background_compiler):
    modules = [module for module in RawModule.built if module.file != "kernel.cu"]
    if not modules:
        pytest.skip("no kernel of the library was launched in this session")
    problems = []
    for module in {(m.code, m.options): m for m in modules}.values():
        try:
            found = background_compiler.wait(module.code, module.options)
        except nvrtc.CompileError as error:
            problems.append(f"{module.file} {module.options}: {error}")
            continue
        for kernel in found[nvrtc.architectures()[0]]:
            row = module.file, kernel, module.options, {a: f[kernel] for a, f in found.items()}
            problems += report.problems([row])
            threads, _ = module.launched.get(kernel, (0, 0))
            problems += [
                f"{module.file} {kernel} on sm_{name}: {threads} threads of {f.registers} registers"
                for name, f in row[3].items()
                if -(-f.registers // 8) * 8 * threads > REGISTERS
            ]
    report.remember(modules)
    assert not problems, "\n".join(sorted(set(problems)))
