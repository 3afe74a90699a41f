"""RawModule and its kernels: CUDA source built with g++, launched in the simulator, checked.

The interface is CuPy's. A kernel argument that points to memory is an object with ``data.ptr``,
``dtype``, ``shape`` and ``strides`` (fakecupy's arrays).
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
CACHE = pathlib.Path(
    os.environ.get("SIMT_CACHE", pathlib.Path(tempfile.gettempdir()) / f"simt-{os.getuid()}")
)
SHARED = ("-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti", "-Wall")
RUNTIME = (*SHARED, "-O2", "-fvisibility=default")
KERNEL = (
    *SHARED,
    *("-O1", "-gdwarf-4", "-ffp-contract=off", "-fno-strict-aliasing"),
    # every variable of a kernel library is its own, not shared with those of equal names elsewhere
    *("-fvisibility=hidden", "-fno-gnu-unique", "-fno-threadsafe-statics"),
    *("-fsanitize=thread,undefined,float-cast-overflow", "-fsanitize-coverage=trace-pc"),
    *("-fno-sanitize=vptr,float-divide-by-zero",),
    *("-Wno-unknown-pragmas", "-Wno-unused", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    *("-Wno-sign-compare", "-Wno-attributes"),
)
# Without crtbegin.o the .bss of the library is its shared memory and nothing else.
LINK = ("-shared", "-nostartfiles")

ENTRY = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(([^)]*)\)\s*)?(\w+)\s*\(([^)]*)\)")
ORDERS = ("forward", "reversed", "random")


class SimtError(RuntimeError):
    """What a kernel, its source or its launch did wrong."""


@dataclasses.dataclass
class Settings:
    order: str = "forward"  # of blocks, and of the threads of a block
    seed: int = 0  # of the random order
    races: bool = True
    steps: int = (
        1 << 28
    )  # memory accesses and basic blocks of one launch, then it counts as endless
    blocks: tuple | None = None  # (first, count): run only these blocks of a grid
    compute_capability: str = "90"


settings = Settings()


@contextlib.contextmanager
def configure(**changes):
    """Run launches with other settings: ``with configure(order="reversed"): ...``."""
    before = dataclasses.replace(settings)
    vars(settings).update(vars(dataclasses.replace(settings, **changes)))
    try:
        yield
    finally:
        vars(settings).update(vars(before))


def available():
    """Whether this machine can build kernels."""
    return shutil.which("g++") is not None


# ---- building


@functools.cache
def _dialect_hash():
    files = sorted((HERE / "dialect").iterdir()) + sorted((HERE / "runtime").iterdir())
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SimtError(result.stderr[:6000])


def _build(name, text, compile_options, link_options):
    """A shared library of this C++ text, from the cache where it has been built before."""
    key = "\0".join((text, *compile_options, *link_options, _dialect_hash()))
    library = CACHE / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            source, compiled, linked = (f"{folder}/{name}.{end}" for end in ("cpp", "o", "so"))
            pathlib.Path(source).write_text(text)
            _run(["g++", *compile_options, "-c", source, "-o", compiled])
            _run(["g++", compiled, *link_options, "-o", linked])
            os.replace(linked, library)
    return library


class _Region(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("grain", ctypes.c_int),
        ("writable", ctypes.c_bool),
        ("shared", ctypes.c_bool),
        ("internal", ctypes.c_bool),
        ("history", ctypes.c_void_p),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("call", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_size_t),
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_size_t),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("check_races", ctypes.c_int),
        ("first_block", ctypes.c_size_t),
        ("block_count", ctypes.c_size_t),
        ("steps", ctypes.c_size_t),
    ]


class _Parameter(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_char_p), ("size", ctypes.c_int), ("pointer", ctypes.c_char)]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("count", ctypes.c_int),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("call", ctypes.c_void_p),
    ]


@functools.cache
def _runtime():
    include = f'#include "{HERE}/runtime/runtime.cpp"\n'
    library = ctypes.CDLL(
        str(_build("runtime", include, RUNTIME, ("-shared",))), mode=ctypes.RTLD_GLOBAL
    )
    library.simt_launch.restype = ctypes.c_char_p
    library.simt_error_address.restype = ctypes.c_void_p
    return library


FOOTER = """
#line 1 "footer"
extern "C" {
extern __attribute__((visibility("hidden"))) char __ehdr_start, __bss_start, _end;
__attribute__((visibility("default"))) SIMT_RAW void simt_image(char** p) {
  p[0] = &__ehdr_start;
  p[1] = &__bss_start;
  p[2] = &_end;
}
}
extern "C" __attribute__((visibility("default"))) const SimtKernel simt_kernels[] = {%s};
"""


class RawModule:
    """The kernels of a CUDA source text, with cupy.RawModule's interface."""

    def __init__(self, *, code, options=(), backend="nvrtc", name_expressions=None):
        if not isinstance(code, str) or not isinstance(options, tuple):
            raise TypeError("RawModule: code is a string, options a tuple of strings")
        if name_expressions:
            raise NotImplementedError('kernels are extern "C", specialised by -D options')
        self.code, self.options = code, options

    def get_function(self, name):
        if name not in self._kernels:
            raise SimtError(f"there is no kernel {name}")
        return Kernel(self, self._kernels[name])

    @functools.cached_property
    def _kernels(self):
        self._entries = {m[2]: m for m in ENTRY.finditer(self.code)}
        footer = FOOTER % ", ".join(
            f'SimtBinding<{name}>::describe("{name}")' for name in self._entries
        )
        # after the dialect's own header, which shall not see them
        defines = "".join(
            "#define {} {}\n".format(*f"{option[2:]}=1".split("=")[:2])
            for option in self.options
            if option.startswith("-D")
        )
        text = f'#include "simt.h"\n{defines}#line 1 "kernel.cu"\n{self.code}\n{footer}'
        architecture = f"-D__CUDA_ARCH__={settings.compute_capability}0"
        include = f"-I{HERE / 'dialect'}"
        _runtime()
        self.path = _build("kernel", text, (*KERNEL, include, architecture), LINK)
        self.library = ctypes.CDLL(str(self.path))
        image = (ctypes.c_void_p * 3)()
        self.library.simt_image(image)
        self.start, self.bss, self.end = image
        table = (_Kernel * len(self._entries)).in_dll(self.library, "simt_kernels")
        return {kernel.name.decode(): kernel for kernel in table}

    def regions(self):
        """Shared memory, which is all of the library's .bss, and its constants, all before it."""
        regions = [_Region(self.start, self.bss - self.start, b"", 1, False, False, True)]
        if self.end > self.bss:
            size = self.end - self.bss
            regions.append(_Region(self.bss, size, b"static shared memory", 2, True, True, False))
        return (_Region * len(regions))(*regions)

    def place(self, address):
        """' at file:line' of the kernel's own code at an address in the library."""
        if not address or not self.start <= address < self.bss:
            return ""
        offset = hex(address - self.start - 1)
        command = ["addr2line", "-i", "-e", str(self.path), offset]
        frames = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        own = [frame for frame in frames if frame and not frame.startswith(str(HERE))]
        return f" at {pathlib.Path(own[0].split()[0]).name}" if own else ""


# ---- launching


@dataclasses.dataclass
class Parameter:
    name: str
    dtype: str
    size: int
    pointer: str

    def __str__(self):
        kind = self.dtype if self.dtype != "V" else f"a struct of {self.size} bytes"
        return f"a pointer to {kind}" if self.pointer else kind


def _parameter_names(declaration):
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", declaration, flags=re.S)
    return [re.findall(r"\w+", parameter)[-1] for parameter in text.split(",") if parameter.strip()]


def _dtype_code(dtype):
    return "bf2" if dtype.name == "bfloat16" else dtype.str[1:]


def _extent(array):
    """First address and number of bytes of a view, whatever its strides."""
    if array.size == 0:
        return array.data.ptr, 0
    steps = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    low = array.data.ptr + sum(step for step in steps if step < 0)
    return low, sum(map(abs, steps)) + array.dtype.itemsize


class Kernel:
    """One kernel of a module; calling it launches it, as with cupy.RawKernel."""

    SHARED_LIMIT = 227 << 10

    def __init__(self, module, description):
        self.module = module
        self.name = description.name.decode()
        self._call = description.call
        bounds, _, declaration = module._entries[self.name].groups()
        self.max_threads_per_block = (
            int(bounds.split(",")[0]) if bounds and bounds[0].isdigit() else 1024
        )
        self._max_dynamic_shared = 48 << 10
        names = _parameter_names(declaration)
        parameters = description.parameters[: description.count]
        self.parameters = [
            Parameter(name, p.dtype.decode(), p.size, p.pointer.decode().strip("\0"))
            for name, p in zip(names, parameters, strict=True)
        ]

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._max_dynamic_shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        if not 0 <= size <= self.SHARED_LIMIT:
            raise SimtError(
                f"{self.name}: {size} bytes of shared memory, {self.SHARED_LIMIT} exist"
            )
        self._max_dynamic_shared = size

    def __call__(self, grid, block, args, *, shared_mem=0):
        grid, block = self._dimensions(grid, block, shared_mem)
        pointers, regions, keep = self._arguments(args)
        first, count = settings.blocks or (0, 0)
        launch = _Launch(
            self._call,
            pointers,
            grid,
            block,
            shared_mem,
            regions,
            len(regions),
            ORDERS.index(settings.order),
            settings.seed,
            settings.races,
            first,
            count,
            settings.steps,
        )
        built_in = self.module.regions()
        error = _runtime().simt_launch(
            ctypes.byref(launch), built_in, ctypes.c_size_t(len(built_in))
        )
        del keep
        if error:
            place = self.module.place(_runtime().simt_error_address())
            raise SimtError(f"{self.name}: {error.decode()}{place}")

    def _dimensions(self, grid, block, shared_mem):
        for name, dimensions in (("grid", grid), ("block", block)):
            if not isinstance(dimensions, tuple) or not 1 <= len(dimensions) <= 3:
                raise TypeError(
                    f"{self.name}: {name} is {dimensions!r}, expected a tuple of 1 to 3"
                )
            if any(int(size) < 1 for size in dimensions):
                raise SimtError(
                    f"{self.name}: {name} is {dimensions}: empty work must not be launched"
                )
        grid, block = ((*map(int, sizes), 1, 1)[:3] for sizes in (grid, block))
        threads = block[0] * block[1] * block[2]
        if grid[0] >= 2**31 or max(grid[1:]) > 65535 or block[2] > 64:
            raise SimtError(f"{self.name}: invalid launch of {grid} blocks of {block} threads")
        if threads > self.max_threads_per_block:
            limit = self.max_threads_per_block
            raise SimtError(f"{self.name}: {threads} threads per block, at most {limit}")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            limit = self.max_dynamic_shared_size_bytes
            raise SimtError(
                f"{self.name}: {shared_mem} bytes of shared memory, the limit is {limit}"
            )
        return (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)

    def _arguments(self, args):
        if len(args) != len(self.parameters):
            raise SimtError(
                f"{self.name}: {len(args)} arguments for {len(self.parameters)} parameters"
            )
        cells = []
        views = []
        for argument, parameter in zip(args, self.parameters, strict=True):
            where = f"{self.name}: argument {parameter.name}"
            if not parameter.pointer:
                cells.append(self._value(argument, parameter, where))
            elif argument is None:
                cells.append(ctypes.c_void_p(0))
            else:
                self._check_array(argument, parameter, where)
                cells.append(ctypes.c_void_p(argument.data.ptr))
                views.append((*_extent(argument), parameter, argument.dtype.itemsize))
        pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        regions = self._regions(views)
        regions.append(
            _Region(ctypes.addressof(pointers), ctypes.sizeof(pointers), b"", 1, False, False, True)
        )
        return pointers, (_Region * len(regions))(*regions), cells

    @staticmethod
    def _check_array(argument, parameter, where):
        if not hasattr(argument, "data") or not hasattr(argument.data, "ptr"):
            raise SimtError(f"{where} is {type(argument).__name__}, the kernel takes {parameter}")
        if parameter.dtype not in ("", "V", _dtype_code(argument.dtype)):
            raise SimtError(f"{where} has dtype {argument.dtype}, the kernel takes {parameter}")
        if argument.size and argument.data.ptr % parameter.size and parameter.size <= 16:
            raise SimtError(f"{where} is not aligned to {parameter.size} bytes")

    @staticmethod
    def _value(argument, parameter, where):
        """The bytes that CuPy passes: of a NumPy scalar or one-element array, as they are; a Python
        int or float is 8 bytes."""
        if isinstance(argument, np.void):
            raise SimtError(f"{where} is a np.void, CuPy takes 0-d structured arrays")
        if type(argument) in (int, float, bool):
            argument = np.array(argument)
        if isinstance(argument, np.generic | np.ndarray) and argument.size == 1:
            same = parameter.dtype == ("V" if argument.dtype.names else _dtype_code(argument.dtype))
            if same and argument.dtype.itemsize == parameter.size:
                return (ctypes.c_char * parameter.size).from_buffer_copy(argument.tobytes())
            given = f"{argument.dtype} of {argument.dtype.itemsize} bytes"
            raise SimtError(f"{where} is {given}, the kernel takes {parameter}")
        raise SimtError(f"{where} is {type(argument).__name__}, the kernel takes {parameter}")

    def _regions(self, views):
        """The memory of the arguments; views that overlap become one region."""
        regions = []
        for base, size, parameter, grain in sorted(views, key=lambda view: view[:2]):
            writable = parameter.pointer == "w"
            last = regions[-1] if regions else None
            if not size:
                continue
            if last and base < last.base + last.size:
                if last.writable != writable:
                    raise SimtError(
                        f"{self.name}: {last.name.decode()} and {parameter.name} overlap, "
                        "and one of them is written"
                    )
                last.size = max(last.size, base + size - last.base)
                last.name += b"/" + parameter.name.encode()
                last.grain = min(last.grain, grain)
            else:
                name = parameter.name.encode()
                regions.append(_Region(base, size, name, grain, writable, False, False))
        return regions
