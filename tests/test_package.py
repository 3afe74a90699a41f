"""What a user has after installing: light imports, kernels in the wheel, twins that match."""

import inspect
import re
import subprocess
import sys
import typing
import zipfile
from pathlib import Path

import pytest

import deformable
from deformable import _cuda
from deformable._conv import ConvGeometry
from deformable._roi import RoIGeometry, Rule

ROOT = Path(__file__).parent.parent
CTYPES = {"int": "int32", "double": "float64"}


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_import_brings_neither_cupy_nor_matplotlib():
    code = "import sys, deformable, deformable.nn, deformable.testing; print(*sys.modules)"
    loaded = set(run_python(code).split())
    assert "deformable.nn" in loaded
    assert not loaded & {"cupy", "matplotlib", "sklearn", "tqdm", "mpi4py", "torch"}


@pytest.mark.parametrize("part", ["nn", "testing", "visualize"])
def test_parts_of_the_package_are_there_without_an_import_of_their_own(part):
    code = f"import deformable; print(deformable.{part}.__name__, hasattr(deformable, 'other'))"
    assert run_python(code).split() == [f"deformable.{part}", "False"]


def test_import_takes_little_on_top_of_numpy_and_scipy():
    """Counted in modules, not in seconds: no test depends on how busy a machine is."""
    before = "import sys, numpy, scipy.sparse, numpy.lib.stride_tricks, importlib.resources"
    code = f"{before}; n = len(sys.modules); import deformable; print(len(sys.modules) - n)"
    assert int(run_python(code)) <= 60


def test_every_public_name_is_documented_with_an_example():
    for name in deformable.__all__:
        doc = getattr(deformable, name).__doc__
        assert doc and "Examples\n" in doc and ">>>" in doc, name


def test_every_public_name_is_fully_typed():
    for name in deformable.__all__:
        function = inspect.unwrap(getattr(deformable, name))
        annotated = set(typing.get_type_hints(function))
        assert annotated == {*inspect.signature(function).parameters, "return"}, name


def test_wheel_is_pure_and_holds_the_kernels(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", tmp_path, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"deformable/cuda/{p.name}" for p in (ROOT / "deformable/cuda").glob("*.cu*")}
    assert sources and sources <= names
    assert "deformable/py.typed" in names
    assert not any(name.startswith(("tests/", "examples/", "benchmarks/")) for name in names)


def struct_fields(file, name):
    """(field, numpy type) of a struct in a CUDA header, in order."""
    text = (ROOT / "deformable/cuda" / file).read_text()
    body = re.search(rf"struct {name} {{(.*?)\n}};", text, re.S)[1]
    declarations = re.findall(r"^\s*(int|double) ([\w, ]+);", body, re.M)
    return [
        (field, CTYPES[ctype]) for ctype, fields in declarations for field in fields.split(", ")
    ]


@pytest.mark.parametrize(
    ("file", "geometry"),
    [("conv.cuh", ConvGeometry), ("roi.cuh", RoIGeometry), ("roi.cuh", Rule)],
)
def test_structs_of_both_languages_have_the_same_fields(file, geometry):
    values = [1.0 if geometry.__annotations__[f] is float else 1 for f in geometry._fields]
    layout = _cuda.struct(geometry(*values)).dtype
    python = [(field, layout[field].name) for field in layout.names]
    assert python == struct_fields(file, geometry.__name__)


def test_kernel_sources_are_spliced_with_their_lines():
    text = _cuda.source("deform_conv.cu")
    assert '#include "' not in text
    assert text.count("struct ConvGeometry {") == 1
    after = text.split('#line 1 "conv.cuh"')[1]
    assert '"deform_conv.cu"' in after  # and back to where the include stood


@pytest.mark.parametrize(
    "path", sorted((ROOT / "deformable/cuda").glob("*.cu")), ids=lambda p: p.name
)
def test_a_kernel_file_names_its_python_file(path):
    first = path.read_text().splitlines()[0]
    (named,) = re.findall(r"\w+\.py", first)
    assert (ROOT / "deformable" / named).exists()
