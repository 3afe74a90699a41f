"""The changes that mutate.py makes to kernels."""

from tests.simt import mutate

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
