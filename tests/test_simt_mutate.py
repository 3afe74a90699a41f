"""The changes that mutate.py makes to kernels, and what it says of them."""

import subprocess
import sys

import pytest

from tests.simt import build, mutate

KERNEL = """\
// comment: a < b
#include <x.h>
template <typename S> struct Pair { S x, y; };
__device__ int f(int height, int width) {  // 1 + 1
  if (height < 2 && !flag) return;
  return min(height, width) + p.x * 0;
}
"""


def changed(tmp_path):
    path = tmp_path / "a.cu"
    path.write_text(KERNEL)
    return mutate.mutants(path)


def test_one_token_of_one_line_of_code_changes(tmp_path):
    found = changed(tmp_path)
    assert {mutant.line for mutant in found} == {4, 5, 6}
    lines = {mutant.new.strip() for mutant in found}
    for expected in (
        "if (height <= 2 && !flag) return;",
        "if (height < 3 && !flag) return;",
        "if (height < 2 || !flag) return;",
        "if (height < 2 && flag) return;",
        "if (width < 2 && !flag) return;",
        "if (!(height < 2 && !flag)) return;",
        "if (height < 2 && !flag) ;",
        "return max(height, width) + p.x * 0;",
        "return min(height, width) - p.x * 0;",
        "return min(height, width) + p.y * 0;",
        "return min(height, width) + p.x + 0;",
        "return min(height, width) + p.x * 1;",
    ):
        assert expected in lines
    assert all(mutant.new != mutant.old for mutant in found)
    assert len(found) == len(set(found))


def test_a_mutant_is_applied_where_its_file_is_spliced_in(tmp_path):
    mutant = mutate.Mutant("a.cuh", 7, "  int a = 1;", "  int a = 2;")
    line = "\n  int a = 1;\n"
    code = f'#line 1 "b.cu"{line}#line 6 "a.cuh"\n{line}#line 3 "b.cu"{line}'
    lines = mutant.apply(code).split("\n")
    assert lines[4] == "  int a = 2;"
    assert lines[:4] + lines[5:] == code.split("\n")[:4] + code.split("\n")[5:]


SUM = """\
extern "C" __global__ void sum(const int* x, int* y) {
  y[0] = x[0] + x[1];
  y[1] = x[2] - x[3];
}
"""
SUM_TEST = """\
from pathlib import Path
from tests.simt import fakecupy as cupy

def test_first_sum():
    code = Path(__file__).with_name("sum.cu").read_text()
    kernel = cupy.RawModule(code=f'#line 1 "sum.cu"\\n{code}').get_function("sum")
    y = cupy.zeros(2, "i4")
    kernel((1,), (1,), (cupy.array([2, 3, 5, 7, 11], "i4"), y))
    assert y[0].get() == 5
"""


def judge(folder, test):
    """The lines that mutate.py prints of SUM and a test."""
    (folder / "sum.cu").write_text(SUM)
    (folder / "test_sum.py").write_text(test)
    command = [sys.executable, "-m", "tests.simt.mutate", folder / "sum.cu"]
    command += ["--jobs", "1", folder / "test_sum.py"]
    return subprocess.check_output(command, cwd=build.HERE.parents[1], text=True).split("\n")


@pytest.mark.skipif(not build.available(), reason="no g++ to build kernels with")
def test_what_no_test_notices_is_told(tmp_path):
    told = judge(tmp_path, SUM_TEST)
    assert "survived: sum.cu:2" not in told
    assert told.count("survived: sum.cu:3") == 3  # another sign, two other elements
    assert f"{tmp_path / 'sum.cu'}: 7 of 10 killed (70.0 %)" in told


@pytest.mark.skipif(not build.available(), reason="no g++ to build kernels with")
def test_tests_that_fail_anyway_judge_nothing(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        judge(tmp_path, SUM_TEST.replace("== 5", "== 6"))
    assert "the tests fail, or there are none" in error.value.output
